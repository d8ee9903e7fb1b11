"""Search for a better plan than the one that is served. Pure, but slow.

The best plan takes a few milliseconds for a few workers, and hundreds for many. So a `PlanSearch`
holds copies of all that it needs, and runs in a thread beside the core; by the time it ends, its
results may be outdated, and are checked against what is so then.
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
    """A search for better plans for one pipeline, and what it needs to know.

    Attributes:
        epoch: of the served plan.
        cost: of the model.
        layer_map: of the served plan.
        machines: workers of the pipeline, and idle ones.
        idle: workers without layers.
        demand: what is asked of the pipeline.
        goal: as for `forecast.best_plan`.
        kv_tokens: positions of KV cache that a plan must have room for.
        extra_kv_tokens: likewise, for a plan of idle workers alone.
        least_kv_tokens: room that is enough if a machine were missing; see `advice.advise`.
        beside_tokens_per_s: rate of the other pipelines.
        advise: whether to look for advice about every worker too.
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
        """Return what was found."""

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
            extra=best(self.machines.subset(self.idle), self.extra_kv_tokens)
            if self.idle
            else None,
            advice=advice or {},
        )


@dataclass(frozen=True)
class FoundPlans:
    """The result of a plan search.

    Attributes:
        now: forecast of the served plan.
        best: forecast of the best plan, None if none fits.
        extra: forecast of a further pipeline of the idle workers, None if none fits.
        advice: by worker; empty if not asked for, or if no plan fits.
    """

    search: PlanSearch
    now: Forecast
    best: Forecast | None
    extra: Forecast | None
    advice: Mapping[WorkerId, Advice]
