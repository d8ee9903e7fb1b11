"""Measure what it is worth to choose the depth by times that were measured at each depth.

    python -m benchmarks.depth

"Depth" is how many steps are under way in a pipeline. Two ways to choose it are compared with the
best depth that never changes, on a simulated pipeline whose tasks vary by 10 %:

- "by depth" is the `DepthEstimator` of a pipeline, which fits the times of stages at each depth;
- "by worker" forecasts T(d) from what planning knows, the `WorkerSpeed` of each stage's worker. All
  sizes of steps were tried on the idle workers before, which is the best that can happen to it.
"""

from collections.abc import Sequence

from distributed_llm.common.messages import StageTime, StageTrial
from distributed_llm.coordinator.fading_mean import FadingMean
from distributed_llm.coordinator.speeds.work import Work
from distributed_llm.coordinator.speeds.worker_speed import Prior, WorkerSpeed
from tests.unit.stage_pipeline import EQUAL, LONG, ONE_SLOW, PROPORTIONAL, Cost, Pipeline

_SHAPES = {
    "three equal stages": EQUAL,
    "one of three is slow": ONE_SLOW,
    "four, time in proportion": PROPORTIONAL,
    "eight equal stages": LONG,
}
_SEQUENCES = (4, 16, 64)
_NOISE = 0.1
_HALF_LIFE_S = 5.0
_SETTLE_S, _WINDOW_S, _FIXED_S = 8.0, 30.0, 8.0
_WORTHWHILE = 0.05
_MAX_DEPTH = 8


class SpeedChooser:
    """Chooses the depth by a forecast from the speeds of workers.

    Args:
        costs: of the stages while nothing else uses their machine; these are tried.
    """

    def __init__(self, costs: Sequence[Cost]) -> None:
        self._speeds = [_tried(cost) for cost in costs]
        self._overhead = FadingMean(_HALF_LIFE_S)
        self._choice = len(costs)

    def observe(self, stage: int, tokens: int, compute_s: float, *, depth: int, now: float) -> None:
        """Learn from one task."""
        self._speeds[stage].observe(
            Work(tokens), layers=1.0, is_last=False, layers_s=compute_s, other_s=0.0, now=now
        )

    def observe_overhead(self, seconds: float, now: float) -> None:
        """Learn the part of a round trip in which a step was neither computed nor queued."""
        self._overhead.add(seconds, now)

    def best_depth(self, sequences: int, *, limit: int, now: float) -> int:
        """Return the depth with the shortest round trip; it changes as `DepthEstimator`'s does."""
        depths = range(1, max(1, min(limit, sequences)) + 1)
        round_trips = {depth: self._round_trip_s(sequences, depth) for depth in depths}
        best = min(depths, key=round_trips.__getitem__)
        current = min(self._choice, depths[-1])
        better = round_trips[best] < (1 - _WORTHWHILE) * round_trips[current]
        self._choice = best if better else current
        return self._choice

    def _round_trip_s(self, sequences: int, depth: int) -> float:
        work = Work(-(-sequences // depth))
        stages = [speed.layer_s(work) for speed in self._speeds]
        return max(sum(stages) + (self._overhead.value or 0.0), depth * max(stages))


def _tried(cost: Cost) -> WorkerSpeed:
    speed = WorkerSpeed(Prior(cost(1), cost(2) - cost(1), 0.0, 0.0, 0.0, 0.0), _HALF_LIFE_S)
    trials = []
    for sequences in (1, 4, 16, 64):
        taken_us = round(1e6 * cost(sequences))
        time = StageTime(compute_us=taken_us, layers_us=taken_us, queued_us=0)
        trials.append(StageTrial(sequences=sequences, start=0, num_tokens=1, time=time))
    speed.try_out(trials, layers=1.0, is_last=False, now=0.0)
    return speed


def _row(costs: Sequence[Cost], sequences: int, *, shared: bool) -> list[str]:
    fixed = {
        depth: Pipeline(costs, sequences, shared, _NOISE, fixed_depth=depth).run(_FIXED_S)
        for depth in range(1, min(_MAX_DEPTH, sequences) + 1)
    }
    best = max(fixed, key=fixed.__getitem__)
    cells = [f"{fixed[best]:.0f} (depth {best})"]
    for chooser in (None, SpeedChooser(costs)):
        pipeline = Pipeline(costs, sequences, shared, _NOISE)
        if chooser:
            pipeline.times = chooser
        pipeline.run(_SETTLE_S)
        share = pipeline.run(_WINDOW_S) / fixed[best]
        cells.append(f"{share:.2f} ({pipeline.choices[-1]})")
    return cells


def main() -> None:
    """Measure and print."""
    print("| stages | machines | sequences | best, tokens/s | by depth | by worker |")
    print("|---|---|---|---|---|---|")
    for name, costs in _SHAPES.items():
        for shared in (False, True):
            for sequences in _SEQUENCES:
                machines = "one for all" if shared else "one each"
                cells = [name, machines, str(sequences), *_row(costs, sequences, shared=shared)]
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
