"""`--help` shows the default of every option, and it is the one that applies."""

from typing import Any

import pytest
import typer

from distributed_llm.cli import app
from distributed_llm.common.settings import SECTIONS

VERBS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
WORDS = {
    ("worker", "name"): "after this machine",
    ("worker", "max_memory"): "what is free",
    ("worker", "model"): "the coordinator's",
    ("worker", "cache_limit"): "what is free",
    ("worker", "offload"): "none",
}
"""Defaults that are empty in the settings, and what that means."""


def options(verb: str) -> list[Any]:
    return [one for one in VERBS[verb].params if one.param_type_name == "option" and not one.hidden]


@pytest.mark.parametrize(
    "verb", ["up", "coordinator", "worker", "generate", "chat", "status", "plan", "drain"]
)
def test_every_option_that_takes_a_value_shows_its_default(verb: str) -> None:
    without = {"--config", "--worker", "--token-ids", "--help"}
    for option in options(verb):
        if not option.is_flag and option.opts[0] not in without:
            assert option.show_default, f"dllm {verb} {option.opts[0]}"


@pytest.mark.parametrize(
    ("verb", "section"),
    [
        ("coordinator", "coordinator"),
        ("worker", "worker"),
        ("plan", "coordinator"),
        ("status", "client"),
        ("generate", "client"),
        ("drain", "client"),
    ],
)
def test_the_default_that_is_shown_is_that_of_the_setting(verb: str, section: str) -> None:
    fields = SECTIONS[section].model_fields
    given = [one for one in options(verb) if one.name in fields and not one.is_flag]
    shown = {one.name: one.show_default for one in given}
    assert shown
    for name, default in shown.items():
        assert default == WORDS.get((section, name), str(fields[name].default)), name
