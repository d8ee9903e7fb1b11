"""Whether another plan would be better than the one that is served. Pure, but slow.

Looking for the best plan takes some milliseconds for a few workers, and some hundred for many. So
what is known is gathered in a survey, which is carried out beside the core; findings may be late,
and are judged by what is so by then.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from distributed_llm.common.settings import Goal
from distributed_llm.common.types import WorkerId
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.plan import LayerMap
from distributed_llm.coordinator.planning.advice import Advice, advise
from distributed_llm.coordinator.planning.forecast import Forecast, best_plan, forecast
from distributed_llm.coordinator.speeds.demand import Demand
from distributed_llm.coordinator.speeds.machines import Machines


@dataclass(frozen=True)
class PlanSearch:
    """Questions about one pipeline.

    Attributes:
        epoch: of its plan.
        layer_map: of its plan.
        machines: that may serve: its own workers, and those that have no layers.
        idle: those that have no layers.
        demand: what is asked of it.
        kv_tokens: positions of KV cache that a plan must have room for.
        extra_kv_tokens: likewise a plan of those that have no layers.
        least_kv_tokens: with which it would do, if need be.
        beside_tokens_per_s: what other pipelines give, which serve the model too.
        advise: whether to tell of every worker if it helps.
    """

    epoch: int
    cost: ModelCost
    layer_map: LayerMap
    machines: Machines
    idle: tuple[WorkerId, ...]
    demand: Demand
    goal: Goal
    kv_tokens: int
    extra_kv_tokens: int
    least_kv_tokens: int
    beside_tokens_per_s: float
    advise: bool

    def answer(self) -> "FoundPlans":
        """Return the answers."""

        def best(machines: Machines, kv_tokens: int) -> Forecast | None:
            return best_plan(self.cost, machines, self.demand, goal=self.goal, kv_tokens=kv_tokens)

        advice = None
        if self.advise:
            advice = advise(
                self.cost,
                self.machines,
                self.demand,
                goal=self.goal,
                kv_tokens=self.kv_tokens,
                least_kv_tokens=self.least_kv_tokens,
                beside_tokens_per_s=self.beside_tokens_per_s,
            )
        return FoundPlans(
            self,
            now=forecast(self.cost, self.machines, self.layer_map, self.demand),
            best=best(self.machines, self.kv_tokens),
            extra=best(self.machines.only(self.idle), self.extra_kv_tokens) if self.idle else None,
            advice=advice or {},
        )


@dataclass(frozen=True)
class FoundPlans:
    """Answers to a survey.

    Attributes:
        now: what the plan of the survey is expected to do.
        best: what the best plan is; None if nothing fits.
        extra: what the idle workers could do in a pipeline of their own; None if it does not fit.
        advice: of each worker; empty if it was not asked for, or nothing fits.
    """

    survey: PlanSearch
    now: Forecast
    best: Forecast | None
    extra: Forecast | None
    advice: Mapping[WorkerId, Advice]
