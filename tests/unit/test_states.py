"""State tables: what they allow, what they refuse, and how they are drawn."""

from enum import Enum, auto

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
