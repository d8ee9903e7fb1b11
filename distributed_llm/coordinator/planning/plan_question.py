"""A question answered beside the event loop: which plans some machines should serve. Pure."""

from contextlib import suppress
from dataclasses import dataclass, field

from distributed_llm.common.errors import (
    ConfigError,
    DistributedLLMError,
    NotEnoughMemory,
    NotReady,
)
from distributed_llm.common.types import WorkerId
from distributed_llm.coordinator.plan import Plan
from distributed_llm.coordinator.planning.planner import Planner
from distributed_llm.coordinator.planning.standing import Standing
from distributed_llm.coordinator.speeds.machines import Machines


@dataclass(frozen=True)
class PlanQuestion:
    """How machines should serve the model.

    Attributes:
        planner: of the coordinator.
        machines: all that may have layers.
        several: whether to plan as many pipelines as are wanted; otherwise one.
        used_tokens: positions of KV cache that a single pipeline should have room for, if it can.
        leaving: the worker that is to leave, if the plan is for those that take its layers over.
        doubted: machines that a single pipeline does without, if the others can hold the model.
        standing: what some of the machines have still loaded, for a single pipeline.
    """

    planner: Planner
    machines: Machines
    several: bool = False
    used_tokens: int = 0
    leaving: WorkerId | None = None
    doubted: frozenset[WorkerId] = frozenset()
    standing: Standing = field(default_factory=Standing)

    def reply(self) -> "PlanReply":
        """Return the plans, or why there are none."""
        try:
            if self.several:
                return PlanReply(self, plans=tuple(self.planner.plans(self.machines)))
            return PlanReply(self, plans=(self._plan(),))
        except (NotEnoughMemory, ConfigError, NotReady) as exc:
            return PlanReply(self, error=exc)

    def _plan(self) -> Plan:
        if self.doubted:
            trusted = [name for name in self.machines.memory_bytes if name not in self.doubted]
            with suppress(NotEnoughMemory, ConfigError, NotReady):
                others = self.machines.subset(trusted)
                return self._plan_of(others)
        return self._plan_of(self.machines)

    def _plan_of(self, machines: Machines) -> Plan:
        best = self.planner.plan(machines, used_tokens=self.used_tokens)
        return self.standing.prefer(best, self.planner, machines)


@dataclass(frozen=True)
class PlanReply:
    """The reply to a `PlanQuestion`: plans, or the error that says why there are none."""

    question: PlanQuestion
    plans: tuple[Plan, ...] = ()
    error: DistributedLLMError | None = None
