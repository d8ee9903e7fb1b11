"""A limit on the lines that a log gets, and the count of those that it does not get. Pure.

Whoever can make a line appear, such as a peer that sends nonsense, could fill a disk with lines.
"""

from collections.abc import Mapping
from dataclasses import dataclass

PERIOD_S = 60.0
"""Length of the periods in which lines are counted, seconds."""

MOST_LINES = 100
"""Lines of one kind in a period, unless there is a limit for the kind."""


@dataclass
class _Period:
    ends_at: float
    lines: int = 0
    left_out: int = 0


class LogLimit:
    """Counts lines by kind: a period begins with a line, and has so many of them at most.

    Args:
        most: lines of some kinds in a period; others have `MOST_LINES`.
    """

    def __init__(self, most: Mapping[str, int]) -> None:
        self._most = most
        self._periods: dict[str, _Period] = {}

    def admits(self, kind: str, *, now: float) -> bool:
        """Return whether a line may be written; count it.

        Args:
            kind: of a closed set, as each is remembered for a period.
            now: clock seconds.
        """
        period = self._periods.get(kind)
        if period is None or (period.ends_at <= now and not period.left_out):
            period = self._periods[kind] = _Period(now + PERIOD_S)
        admitted = period.lines < self._most.get(kind, MOST_LINES)
        if admitted:
            period.lines += 1
        else:
            period.left_out += 1
        return admitted

    def next_deadline(self) -> float | None:
        """Return when `take_left_out` next has something to tell, clock seconds, or None."""
        ends = [period.ends_at for period in self._periods.values() if period.left_out]
        return min(ends, default=None)

    def take_left_out(self, *, now: float) -> list[tuple[str, int]]:
        """Return the kinds of which lines were left out, and how many, once their periods end."""
        ended = {kind: each for kind, each in self._periods.items() if each.ends_at <= now}
        for kind in ended:
            del self._periods[kind]
        return [(kind, period.left_out) for kind, period in ended.items() if period.left_out]


def left_out_text(kind: str, count: int) -> str:
    """Return the line that stands for lines that were left out."""
    return f"{count} more lines were left out in {PERIOD_S:.0f} s: {kind}"
