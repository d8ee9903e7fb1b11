"""How long steps take in a pipeline where some take longer than others. Pure.

A stage whose step was short waits for the stage before, whose step was longer; so the stages of a
full pipeline do less than the slowest of them could. How much less depends on which steps meet:
the pipeline is run, in numbers, for as many steps as show the mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_STEPS = 89
_ROUNDS = 4
"""Times that at least every step goes round."""

_GOLDEN = 0.618034
"""Multiples of it modulo 1 are spread evenly, however many of them there are."""

_Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Times:
    """What stages and links take for a step, in their order: stage, link, stage, ..., stage.

    Attributes:
        busy_s: seconds in which no other step is served, [stages and links].
        delay_s: seconds from then until the next one can begin, alike.
    """

    busy_s: Sequence[float]
    delay_s: Sequence[float]


def round_trip_s(
    usual: Times, longer: Times, *, share: float, depth: int, overhead_s: float
) -> float:
    """Return the mean time from the begin of a step to that of the one that follows on it.

    Args:
        usual: of most steps.
        longer: of the others.
        share: of the others, 0 to 1; they come as evenly as they can.
        depth: steps that are under way.
        overhead_s: between the end of a step and the begin of the one that follows on it.
    """
    kinds = [_Line(usual), _Line(longer)]
    free: _Array = np.zeros(len(usual.busy_s))  # from when on each stage and link is
    ends = [-overhead_s] * depth
    settle = 2 * depth
    for number in range(settle + max(_STEPS, _ROUNDS * depth)):
        line = kinds[number * _GOLDEN % 1.0 < share]
        ends.append(line.run(free, ends[-depth] + overhead_s))
    return depth * (ends[-1] - ends[depth + settle - 1]) / (len(ends) - depth - settle)


class _Line:
    """The pipeline for one kind of step."""

    def __init__(self, times: Times) -> None:
        self._busy: _Array = np.array(times.busy_s)
        passing = self._busy + np.array(times.delay_s)
        self._before: _Array = np.concatenate(([0.0], np.cumsum(passing)[:-1]))

    def run(self, free: _Array, begin: float) -> float:
        """Send a step through; return when it is at its end, and note it in `free`."""
        waited = np.maximum.accumulate(np.maximum(free - self._before, begin))
        np.add(self._before + waited, self._busy, out=free)
        return float(free[-1])
