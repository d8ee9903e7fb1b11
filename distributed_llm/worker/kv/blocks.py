"""Which blocks of a layer's memory are whose; pure numbers.

A segment should lie in one piece, for each piece takes attention a call of its own and a sum. So
whoever takes a block leaves some behind it to itself. Nobody else takes those while there are
others; but they are no more than a wish, and memory is never short because of them.
"""

from collections.abc import Iterable

_FREE, _LEFT, _TAKEN = 0, 1, 2

_LEAST_LEFT = 4
_MOST_LEFT = 32
"""Blocks that are left to who begins, and at most to who goes on: as many as it has."""


class Blocks:
    """Numbers of blocks, from 0; the first is never given out."""

    def __init__(self) -> None:
        self._states = bytearray((_TAKEN,))

    @property
    def end(self) -> int:
        """One more than the largest number that is taken."""
        return self._states.rfind(_TAKEN) + 1

    def take(self, before: int | None, held: int, limit: int | None) -> int:
        """Return the number of a block that is taken from now on.

        Args:
            before: the block that it follows, the latest of its segment, where it should come next;
                None if the segment has none.
            held: how many the segment has or is about to have.
            limit: numbers should be less, where there are such that nobody has taken; None: any.
        """
        states = self._states
        if limit is not None and len(states) < limit:
            states.extend(bytes(limit - len(states)))
        run = max(_LEAST_LEFT, min(_MOST_LEFT, held))
        at = len(states) if before is None else before + 1
        if at >= len(states) or states[at] == _TAKEN:
            at = self._found(run, limit)
        states[at] = _TAKEN
        behind = at + 1
        while behind < min(at + run, len(states)) and states[behind] == _FREE:
            states[behind] = _LEFT
            behind += 1
        return at

    def _found(self, run: int, limit: int | None) -> int:
        """Return where so many blocks are free, or fewer if need be; or one that is left."""
        states = self._states
        stop = len(states) if limit is None else limit
        count = run
        while count:
            at = states.find(bytes(count), 0, stop)
            if at >= 0:
                return at
            if limit is None:
                break
            count //= 2
        if limit is not None and (at := states.rfind(_LEFT, 0, stop)) >= 0:
            return at
        states.extend(bytes(run))
        return len(states) - run

    def free(self, numbers: list[int]) -> None:
        """Let others take these blocks, and those that were left behind them."""
        states = self._states
        for number in numbers:
            states[number] = _FREE
            behind = number + 1
            while behind < len(states) and states[behind] == _LEFT:
                states[behind] = _FREE
                behind += 1

    def set_taken(self, numbers: Iterable[int]) -> None:
        """Have these be taken, which nobody has."""
        for number in numbers:
            missing = number + 1 - len(self._states)
            self._states.extend(bytes(max(0, missing)))
            self._states[number] = _TAKEN

    def close_up(self, count: int) -> None:
        """Have the blocks from 1 to `count` be all that are taken."""
        self._states = bytearray((_TAKEN,)) * (count + 1)
