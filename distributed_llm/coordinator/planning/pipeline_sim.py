"""Simulation of a full pipeline in which some steps take longer than others. Pure.

A stage with a short step waits for the stage before it, which has a longer one; so the stages of a
full pipeline do less than the slowest of them could. How much less depends on which steps meet.
The pipeline is run in max-plus arithmetic, for as many steps as show the mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_STEPS = 89
"""Least number of steps that are simulated."""

_ROUNDS = 4
"""Least number of steps that are simulated for each step in flight."""

_GOLDEN = 0.618034
"""Golden ratio - 1: its multiples modulo 1 are spread evenly, however many are taken."""

_Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class StepTimes:
    """Times of one kind of step at every place: stage, link, stage, ..., stage.

    Attributes:
        busy_s: seconds for which a place serves this step and no other.
        delay_s: further seconds until the step reaches the next place.
    """

    busy_s: Sequence[float]
    delay_s: Sequence[float]


def round_trip_s(
    usual: StepTimes, longer: StepTimes, *, share: float, depth: int, overhead_s: float
) -> float:
    """Return the mean seconds from the start of a step to the start of its successor.

    Args:
        usual: times of a step of the shorter kind.
        longer: times of a step of the longer kind.
        share: of longer steps, 0 to 1; they are spread evenly.
        depth: steps in flight.
        overhead_s: between the end of a step and the start of its successor.
    """
    kinds = [_StepKind(usual), _StepKind(longer)]
    free: _Array = np.zeros(len(usual.busy_s))  # clock at which each place is free
    ends = [-overhead_s] * depth
    settle = 2 * depth
    for number in range(settle + max(_STEPS, _ROUNDS * depth)):
        kind = kinds[number * _GOLDEN % 1.0 < share]
        ends.append(kind.run(free, ends[-depth] + overhead_s))
    return depth * (ends[-1] - ends[depth + settle - 1]) / (len(ends) - depth - settle)


class _StepKind:
    """Runs one kind of step through the pipeline."""

    def __init__(self, times: StepTimes) -> None:
        self._busy: _Array = np.array(times.busy_s)
        passing = self._busy + np.array(times.delay_s)
        self._before: _Array = np.concatenate(([0.0], np.cumsum(passing)[:-1]))

    def run(self, free: _Array, start: float) -> float:
        """Run a step from `start` on; update `free` and return when it ends, clock seconds."""
        waited = np.maximum.accumulate(np.maximum(free - self._before, start))
        np.add(self._before + waited, self._busy, out=free)
        return float(free[-1])
