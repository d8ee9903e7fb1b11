"""What the stages of one pipeline are yet to be told to forget of their KV cache. Pure.

Tasks say it, because a message of its own could come before or after the tasks around it. What a
task said that some stages may not have got is said again by a later one.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

from distributed_llm.common.messages import MAX_RELEASED, SeenFrom
from distributed_llm.common.types import SequenceId


@dataclass(frozen=True)
class Forgotten:
    """What one task has the stages forget.

    Attributes:
        released: sequences that are freed.
        seen_from: of sequences of which layers with a window drop earlier positions.
    """

    released: tuple[SequenceId, ...] = ()
    seen_from: tuple[SeenFrom, ...] = ()


def joined(forgotten: Iterable[Forgotten]) -> Forgotten:
    """Return what several tasks say, as one says it; beyond the limit of one it is left out."""
    both = ToForget()
    for one in forgotten:
        both.put_back(one)
    return both.take()


class ToForget:
    """What no task has said yet."""

    def __init__(self) -> None:
        self._released: dict[SequenceId, None] = {}  # an ordered set
        self._seen_from: dict[SequenceId, int] = {}

    @property
    def released(self) -> list[SequenceId]:
        """Sequences to be freed, in this order."""
        return list(self._released)

    @property
    def seen_from(self) -> dict[SequenceId, int]:
        """By sequence, the first position that layers with a window see from now on."""
        return dict(self._seen_from)

    def release(self, sequence_ids: Iterable[SequenceId]) -> None:
        """Have the next tasks free sequences on every stage."""
        self._released.update(dict.fromkeys(sequence_ids))

    def drop(self, seen_from: Mapping[SequenceId, int]) -> None:
        """Have the next tasks drop positions that layers with a window do not see any more.

        Args:
            seen_from: by sequence, the first position that they see from now on.
        """
        for sequence_id, position in seen_from.items():
            self._seen_from[sequence_id] = max(position, self._seen_from.get(sequence_id, 0))

    def take(self, beside: Forgotten = Forgotten()) -> Forgotten:
        """Return what the next task says, at most as much as one may.

        Args:
            beside: what it says too, because other tasks do that it may overtake.
        """
        released = tuple(islice(self._released, MAX_RELEASED - len(beside.released)))
        for sequence_id in released:
            del self._released[sequence_id]
        dropping = list(islice(self._seen_from.items(), MAX_RELEASED - len(beside.seen_from)))
        for sequence_id, _ in dropping:
            del self._seen_from[sequence_id]
        seen_from = tuple(SeenFrom(sequence_id=i, position=at) for i, at in dropping)
        return Forgotten(released, seen_from)

    def put_back(self, forgotten: Forgotten) -> None:
        """Have later tasks say again what a task did that some stages may not have got."""
        self.release(forgotten.released)
        self.drop({one.sequence_id: one.position for one in forgotten.seen_from})
