"""Simulation of a full pipeline in which some steps take longer than others. Pure.

A stage with a short step waits for the stage before it, which has a longer one; so the stages of a
full pipeline do less than the slowest of them could. How much less depends on which steps meet.
The pipeline is run for as many steps as show the mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass

_STEPS = 89
"""Least number of steps that are simulated."""

_ROUNDS = 4
"""Least number of steps that are simulated for each step in flight."""

_GOLDEN = 0.618034
"""Golden ratio - 1: its multiples modulo 1 are spread evenly, however many are taken."""


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
    kinds = [list(zip(times.busy_s, times.delay_s, strict=True)) for times in (usual, longer)]
    free_at = [0.0] * len(usual.busy_s)
    ends = [-overhead_s] * depth
    settle = 2 * depth
    for number in range(settle + max(_STEPS, _ROUNDS * depth)):
        kind = kinds[number * _GOLDEN % 1.0 < share]
        ends.append(_run(kind, free_at, ends[-depth] + overhead_s))
    return depth * (ends[-1] - ends[depth + settle - 1]) / (len(ends) - depth - settle)


def _run(step: Sequence[tuple[float, float]], free_at: list[float], at: float) -> float:
    """Run a step from `at` on, and return when it ends, clock seconds.

    Args:
        step: for how long it keeps each place busy, and its delay from there, seconds.
        free_at: when each place is free, clock seconds; changed.
    """
    for place, (busy_s, delay_s) in enumerate(step):
        if free_at[place] > at:
            at = free_at[place]
        at += busy_s
        free_at[place] = at
        at += delay_s
    return free_at[-1]
