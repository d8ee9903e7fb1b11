"""How long the stages of each plan computed for an answer. Pure."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from distributed_llm.common.messages import MAX_STAGES, StageTime, StageTiming
from distributed_llm.common.types import Epoch, LayerRange, WorkerId
from distributed_llm.coordinator.plan import PipelineStage


@dataclass
class _PlanTimes:
    """Tasks of one plan and their microseconds, both by stage."""

    stages: Sequence[PipelineStage]
    tasks: list[int]
    compute_us: list[int]


class StageTimes:
    """Compute times of one answer, by the epoch of the plan."""

    def __init__(self) -> None:
        self._plans: dict[Epoch, _PlanTimes] = {}

    def add(
        self,
        epoch: Epoch,
        stages: Sequence[PipelineStage],
        timings: Sequence[StageTime],
        first: int = 0,
    ) -> None:
        """Count one step.

        Args:
            epoch: of the plan; `stages` are its stages.
            timings: of this step, one per stage that it went through.
            first: index of the first of these stages.
        """
        plan = self._plans.get(epoch)
        if plan is None:
            plan = self._plans[epoch] = _PlanTimes(stages, [0] * len(stages), [0] * len(stages))
        for stage, timing in enumerate(timings, first):
            plan.tasks[stage] += 1
            plan.compute_us[stage] += timing.compute_us

    @staticmethod
    def sums(times: Iterable["StageTimes"]) -> tuple[StageTiming, ...]:
        """Return the sums by worker and layer range, in the order of the layers.

        A task counts once for each of the answers in it. Of more than `MAX_STAGES` stages, which
        several plans may have together, the last are left out.
        """
        tasks: Counter[tuple[WorkerId, LayerRange]] = Counter()
        compute_us: Counter[tuple[WorkerId, LayerRange]] = Counter()
        for times_of_answer in times:
            for plan in times_of_answer._plans.values():
                sums = zip(plan.stages, plan.tasks, plan.compute_us, strict=True)
                for stage, count, microseconds in sums:
                    tasks[stage.worker, stage.layers] += count
                    compute_us[stage.worker, stage.layers] += microseconds
        timings = [
            StageTiming(
                worker=worker,
                layers=layers,
                tasks=count,
                compute_s=compute_us[worker, layers] / 1e6,
            )
            for (worker, layers), count in tasks.items()
        ]
        return tuple(sorted(timings, key=lambda timing: timing.layers))[:MAX_STAGES]
