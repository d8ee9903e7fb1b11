"""How many states sequences keep in layers that have one of their own. Pure."""

from collections.abc import Iterable
from typing import NamedTuple

from distributed_llm.common.layer_states import HELD_STATES
from distributed_llm.coordinator.serving.cached_sequence import CachedSequence


class StateCounts(NamedTuple):
    """States of the sequences of one pipeline, shared ones as often as they are shared.

    Attributes:
        latest: of sequences that run, where they go on from.
        snapshots: of these, beside that.
        ended: of sequences that have ended, from which others may go on.
        charged: to sequences that run.
        charged_ended: to sequences that have ended.
    """

    latest: int = 0
    snapshots: int = 0
    ended: int = 0
    charged: int = 0
    charged_ended: int = 0

    @classmethod
    def of(cls, sequences: Iterable[CachedSequence]) -> "StateCounts":
        """Return how many states sequences keep."""
        running, ended = list[int](), list[int]()
        for sequence in sequences:
            (ended if sequence.ended else running).append(sequence.states)
        charged, charged_ended = sum(running), sum(ended)
        return cls(
            len(running),
            charged - HELD_STATES * len(running),
            charged_ended - (HELD_STATES - 1) * len(ended),
            charged,
            charged_ended,
        )
