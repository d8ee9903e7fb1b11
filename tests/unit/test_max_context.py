"""The longest text that is served can be said on the command line, to all who make plans."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from distributed_llm import cli, console, up_command
from distributed_llm.common.errors import ConfigError
from distributed_llm.coordinator import serve
from distributed_llm.up import run

VERBS: dict[str, Callable[..., Any]] = {
    "coordinator": cli.coordinator,
    "plan": lambda **options: cli.plan("model", ["pc=1GiB"], **options),
    "up": up_command.up,
}


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """What those who do the work are given: settings, or the words for a coordinator."""
    given: list[Any] = []

    async def served(settings: Any, *_: Any, **__: Any) -> int:
        given.append(settings.max_context)
        return 0

    async def started(wanted: Any) -> int:
        words = list(wanted.coordinator)
        given.append(words[words.index("--max-context") + 1] if "--max-context" in words else None)
        return 0

    def planned(_model: str, _workers: Any, settings: Any, **_: Any) -> None:
        given.append(settings.max_context)

    monkeypatch.setenv("DLLM_STATE", str(tmp_path))
    monkeypatch.setattr(cli, "start_process", lambda *_: None)
    monkeypatch.setattr(up_command, "start_process", lambda *_: None)
    monkeypatch.setattr(serve, "serve", served)
    monkeypatch.setattr(serve, "plan", planned)
    monkeypatch.setattr(run, "run", started)
    monkeypatch.setattr(console, "print_plan", lambda *_, **__: None)
    return given


@pytest.mark.parametrize(
    ("verb", "number", "unsaid"),
    [("coordinator", 4096, "auto"), ("plan", 4096, "auto"), ("up", "4096", None)],
)
def test_it_is_handed_on(verb: str, number: int | str, unsaid: str | None, given: Any) -> None:
    for options in ({"max_context": "4096"}, {}):
        with contextlib.suppress(typer.Exit):
            VERBS[verb](**options)
    assert given == [number, unsaid]


@pytest.mark.parametrize("verb", VERBS)
def test_what_is_no_number_is_refused(verb: str, given: Any) -> None:
    with pytest.raises(ConfigError, match="max_context"):
        VERBS[verb](max_context="long")
    assert given == []
