"""`dllm config`: what a user without a copy of the repository has instead of its files."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from distributed_llm.cli import app
from distributed_llm.common.config import load_settings
from distributed_llm.common.errors import ConfigError
from distributed_llm.common.settings import Settings

DEFAULT = Path(__file__).parents[2] / "distributed_llm" / "default.yaml"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DLLM_WORKER__THREADS", raising=False)


def config(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["config", *arguments])


def test_show_prints_the_default_file() -> None:
    done = config("show")
    assert done.exit_code == 0
    assert done.stdout == DEFAULT.read_text(encoding="utf-8")


def test_show_says_where_each_value_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("my.yaml").write_text("worker:\n  threads: 2\n  name: pc\n")
    monkeypatch.setenv("DLLM_WORKER__THREADS", "4")
    lines = config("show", "--config", "my.yaml").stdout.splitlines()
    assert "  threads: 4  # from environment: DLLM_WORKER__THREADS" in lines
    assert '  name: "pc"  # from my.yaml:3' in lines
    assert '  device: "auto"' in lines
    document = json.loads(config("show", "--config", "my.yaml", "--json").stdout)
    assert document["worker"]["name"] == {"value": "pc", "from": "my.yaml:3"}
    assert document["worker"]["device"] == {"value": "auto", "from": "default"}


def test_what_show_prints_can_be_read_back() -> None:
    Path("my.yaml").write_text("coordinator:\n  strategy: custom\n  layers: {pc: 1-4, mac: 5}\n")
    Path("again.yaml").write_text(config("show", "--config", "my.yaml").stdout)
    again, first = (
        load_settings(Path(name), environment={}, overrides={})
        for name in ("again.yaml", "my.yaml")
    )
    assert again == first


def test_init_writes_a_file_that_changes_nothing_yet_and_keeps_one_that_is_there() -> None:
    done = config("init")
    assert done.stdout == "Wrote dllm.yaml. Edit it, and start with: --config dllm.yaml\n"
    assert load_settings(Path("dllm.yaml"), environment={}, overrides={}) == Settings()
    again = config("init")
    assert isinstance(again.exception, ConfigError)
    assert "is there already and was kept" in str(again.exception)


def test_init_with_values() -> None:
    assert config("init", "pc.yaml", "--set", "worker.name=pc").exit_code == 0
    written = load_settings(Path("pc.yaml"), environment={}, overrides={})
    assert written.worker.name == "pc"
    wrong = config("init", "other.yaml", "--set", "worker.nam=pc")
    assert "did you mean 'name'?" in str(wrong.exception)
    assert not Path("other.yaml").exists()
    nowhere = config("init", "no/such/folder.yaml")
    assert "cannot be written: No such file or directory" in str(nowhere.exception)


def test_check_says_what_is_wrong_and_where() -> None:
    Path("good.yaml").write_text("worker:\n  threads: 2\n")
    assert config("check", "good.yaml").stdout == "good.yaml: no mistakes; 1 setting given\n"
    Path("bad.yaml").write_text("worker:\n  threads: 2\n  nam: pc\n")
    wrong = config("check", "bad.yaml")
    assert isinstance(wrong.exception, ConfigError)
    assert wrong.exception.exit_code == 2
    assert str(wrong.exception).startswith("bad.yaml:3: unknown key 'worker.nam'; did you mean")
    absent = config("check", "absent.yaml")
    assert str(absent.exception) == (
        "absent.yaml: no such file; `dllm config init absent.yaml` writes one"
    )


def test_init_refuses_a_name_without_a_value() -> None:
    done = config("init", "--set", "worker.name")
    assert str(done.exception) == "--set worker.name: no value; write SECTION.NAME=VALUE."
    assert not Path("dllm.yaml").exists()
