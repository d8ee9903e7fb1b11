"""State tables: what they allow, what they refuse, and how they are drawn."""

import runpy
from enum import Enum, auto
from pathlib import Path
from typing import Any

import pytest

from distributed_llm.common.states import IllegalTransition, StateTable


class Door(Enum):
    OPEN = auto()
    SHUT = auto()
    GONE = auto()


class Cause(Enum):
    PUSHED = auto()
    PULLED_HARD = auto()


TABLE = StateTable(
    "a door",
    Door.OPEN,
    {
        (Door.OPEN, Cause.PUSHED): Door.SHUT,
        (Door.SHUT, Cause.PUSHED): Door.OPEN,
        (Door.SHUT, Cause.PULLED_HARD): Door.GONE,
    },
)


def test_a_transition_of_the_table() -> None:
    assert TABLE.after(Door.OPEN, Cause.PUSHED) is Door.SHUT
    assert TABLE.allows(Door.SHUT, Cause.PULLED_HARD)


def test_any_other_raises_and_says_what_it_was() -> None:
    assert not TABLE.allows(Door.OPEN, Cause.PULLED_HARD)
    with pytest.raises(IllegalTransition, match="a door: PULLED_HARD cannot happen while OPEN"):
        TABLE.after(Door.OPEN, Cause.PULLED_HARD)


def test_the_drawing_has_every_transition_and_the_ends() -> None:
    assert TABLE.mermaid().splitlines() == [
        "stateDiagram-v2",
        "    [*] --> OPEN",
        "    OPEN --> SHUT: pushed",
        "    SHUT --> OPEN: pushed",
        "    SHUT --> GONE: pulled hard",
        "    GONE --> [*]",
    ]


# ------------------------------------------------------------------ the tables of the package


ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "draw_docs.py"))
TABLES: dict[str, StateTable[Any, Any]] = SCRIPT["TABLES"]


def test_the_drawings_in_the_docs_are_those_of_the_tables() -> None:
    """If not: run scripts/draw_docs.py."""
    written = (ROOT / "docs" / "states.md").read_text(encoding="utf-8")
    assert written == SCRIPT["states"]()


def test_the_tree_in_the_docs_has_all_modules_with_their_first_lines() -> None:
    """If not: run scripts/draw_docs.py."""
    written = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert written == SCRIPT["architecture"]()


def test_every_table_of_the_package_is_drawn() -> None:
    package = ROOT / "distributed_llm"
    holders = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if " = StateTable(" in path.read_text(encoding="utf-8")
    }
    assert holders == set(TABLES)


@pytest.mark.parametrize("module", TABLES)
def test_every_state_can_be_reached(module: str) -> None:
    table = TABLES[module]
    reached, before = {table.initial}, set[Enum]()
    while reached != before:
        before = set(reached)
        reached |= {after for (state, _), after in table.transitions.items() if state in before}
    states: type[Enum] = type(table.initial)
    assert reached == set(states)


@pytest.mark.parametrize("module", TABLES)
def test_every_cause_leads_somewhere(module: str) -> None:
    causes = {cause for _, cause in TABLES[module].transitions}
    kind: type[Enum] = type(next(iter(causes)))
    assert causes == set(kind)
