"""`dllm api` listens beyond its machine without keys only where the settings say so."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from distributed_llm import api_command
from distributed_llm.api import serve as serving
from distributed_llm.cli import app
from distributed_llm.common.config import load_settings
from distributed_llm.common.errors import ConfigError
from distributed_llm.common.settings import ApiSettings, ClientSettings

WIDE = "0.0.0.0:0"


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ApiSettings, ClientSettings]]:
    """With what the API was started."""
    found = []

    async def serve(api: ApiSettings, asked: ClientSettings, **_: object) -> int:
        found.append((api, asked))
        return 0

    monkeypatch.setattr(serving, "serve", serve)
    monkeypatch.setattr(api_command, "start_process", lambda *_: None)
    return found


def api(*arguments: str) -> BaseException | None:
    return CliRunner().invoke(app, ["api", *arguments]).exception


@pytest.mark.parametrize(
    ("flag", "setting"),
    [("--open", "`open: true` under `api`"), ("--insecure", "`insecure: true` under `client`")],
)
def test_a_flag_alone_opens_no_port_to_others(
    served: Sequence[object], flag: str, setting: str
) -> None:
    for binds in (["--bind", WIDE], ["--bind", "127.0.0.1:0", "--bind", WIDE]):
        refused = api(flag, *binds)
        assert isinstance(refused, ConfigError)
        assert str(refused).startswith(f"{flag} lets everybody who reaches {WIDE} use the model")
        assert setting in str(refused)
        assert "dllm key create" in str(refused)
    assert not served
    assert api(flag, "--bind", "127.0.0.1:0", "--bind", "[::1]:0") is None
    assert api(flag) is None
    assert len(served) == 2


@pytest.mark.parametrize("setting", ["api: {open: true}", "client: {insecure: true}"])
def test_the_settings_may_open_it(
    served: list[tuple[ApiSettings, ClientSettings]], tmp_path: Path, setting: str
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(setting)
    assert api("--config", str(file), "--bind", WIDE) is None
    assert served[0][0].bind == (WIDE,)
    assert served[0][0].open is ("open" in setting)


def test_several_addresses_and_names_may_be_given_as_text() -> None:
    settings = load_settings(
        None,
        environment={
            "DLLM_API__BIND": "127.0.0.1:8000, 127.0.0.1:11434",
            "DLLM_API__ALLOWED_HOSTS": "LLM.example.org,pc",
            "DLLM_API__MAX_BODY": "1MiB",
        },
        overrides={},
    ).api
    assert settings.bind == ("127.0.0.1:8000", "127.0.0.1:11434")
    assert settings.allowed_hosts == ("llm.example.org", "pc")
    assert settings.max_body == 1 << 20


@pytest.mark.parametrize(
    "wrong",
    [
        {"bind": ""},
        {"bind": "localhost"},
        {"allowed_hosts": "http://pc"},
        {"allowed_hosts": "pc:8000"},
        {"max_body": "1"},
        {"max_requests": 0},
        {"max_requests_per_key": True},
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="api"):
        load_settings(None, environment={}, overrides={f"api.{key}": wrong[key] for key in wrong})
