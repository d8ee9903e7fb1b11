"""State machines as tables: legal transitions are data, and every other one raises.

The tables are the documentation too: `StateTable.mermaid` draws them, `scripts/draw_docs.py`
writes the drawings into `docs/states.md`, and a test holds the two together. (As in h11, whose
`_state.py` and `make-state-diagrams.py` do the same.)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

S = TypeVar("S", bound=Enum)
C = TypeVar("C", bound=Enum)


class IllegalTransition(AssertionError):
    """A state machine was told something that cannot happen in its state: a bug in this program."""


@dataclass(frozen=True)
class StateTable(Generic[S, C]):
    """The states of one kind of thing, and what leads from one to the next.

    Attributes:
        thing: what has these states, for people.
        initial: the state of a new one.
        transitions: by state and cause, the state that follows.
    """

    thing: str
    initial: S
    transitions: Mapping[tuple[S, C], S]

    def after(self, state: S, cause: C) -> S:
        """Return the state that follows on `state`.

        Raises:
            IllegalTransition: the table has none.
        """
        try:
            return self.transitions[state, cause]
        except KeyError:
            raise IllegalTransition(
                f"{self.thing}: {cause.name} cannot happen while {state.name}"
            ) from None

    def allows(self, state: S, cause: C) -> bool:
        """Return whether `cause` may happen in `state`."""
        return (state, cause) in self.transitions

    def mermaid(self) -> str:
        """Return the table as a Mermaid state diagram."""
        lines = ["stateDiagram-v2", f"    [*] --> {self.initial.name}"]
        lines += [
            f"    {state.name} --> {following.name}: {cause.name.lower().replace('_', ' ')}"
            for (state, cause), following in self.transitions.items()
        ]
        leaving = {state for (state, _), _ in self.transitions.items()}
        ends = dict.fromkeys(s for s in self.transitions.values() if s not in leaving)
        lines += [f"    {state.name} --> [*]" for state in ends]
        return "\n".join(lines)
