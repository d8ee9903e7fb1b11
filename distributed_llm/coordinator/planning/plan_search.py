"""Search for a better plan than the one that is served. Pure, but slow.

A search takes a few milliseconds for a few workers, and hundreds for many. So a `PlanSearch` holds
copies of all that it needs, and runs in a thread beside the core. Its result may be outdated by the
time it ends: whoever acts on it checks which workers can still be had.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from distributed_llm.common.settings import Objective
from distributed_llm.common.types import Epoch, WorkerId
from distributed_llm.coordinator.plan import LayerMap
from distributed_llm.coordinator.planning.advice import Advice, advise
from distributed_llm.coordinator.planning.forecast import Forecast, best_forecast, forecast
from distributed_llm.coordinator.planning.planner import Planner, ranked_by_speed
from distributed_llm.coordinator.speeds.demand import Demand
from distributed_llm.coordinator.speeds.machines import Machines

MAX_IDLE = 16
"""Most workers without layers that a search considers; it takes the fastest."""


@dataclass(frozen=True)
class PlanSearch:
    """A search for better plans for one pipeline, and what it needs to know.

    Attributes:
        epoch: of the served plan.
        planner: of the coordinator.
        layer_map: of the served plan.
        machines: workers of the pipeline, and idle ones.
        idle: workers without layers; only the fastest `MAX_IDLE` are considered.
        hanging: workers of the pipeline that hang, and give no room for KV cache.
        demand: what is asked of the pipeline.
        objective: what the plans should be best for; see `forecast.best_forecast`.
        needed_tokens: positions of KV cache that requests of the pipeline take or may take.
        beside_tokens_per_s: rate of the other pipelines.
        advise: whether to give advice about the workers too.
    """

    epoch: Epoch
    planner: Planner
    layer_map: LayerMap
    machines: Machines
    idle: tuple[WorkerId, ...]
    hanging: frozenset[WorkerId]
    demand: Demand
    objective: Objective
    needed_tokens: int
    beside_tokens_per_s: float
    advise: bool

    def reply(self) -> "SearchResult":
        """Return what the search finds; this is slow."""
        cost, planner = self.planner.cost, self.planner
        idle = ranked_by_speed(self.machines.subset(self.idle))[:MAX_IDLE]
        own = [worker for worker, _ in self.layer_map]
        machines = self.machines.subset([*own, *idle])
        sizes = machines.memory_bytes
        roomy = {worker: size for worker, size in sizes.items() if worker not in self.hanging}
        kv_tokens = max(self.needed_tokens, planner.kv_tokens(roomy))

        def best(some: Machines, kv_tokens: int) -> Forecast | None:
            return best_forecast(
                cost, some, self.demand, objective=self.objective, kv_tokens=kv_tokens
            )

        advice = None
        if self.advise:
            advice = advise(
                cost,
                machines,
                self.demand,
                objective=self.objective,
                kv_tokens=kv_tokens,
                least_kv_tokens=planner.least_kv_tokens,
                beside_tokens_per_s=self.beside_tokens_per_s,
            )
        spare = machines.subset(idle)
        return SearchResult(
            self,
            served=forecast(cost, machines, self.layer_map, self.demand),
            best=best(machines, kv_tokens),
            extra=best(spare, planner.kv_tokens(spare.memory_bytes)) if idle else None,
            advice=advice or {},
        )


@dataclass(frozen=True)
class SearchResult:
    """The result of a plan search.

    Attributes:
        search: the search.
        served: forecast of the served plan.
        best: forecast of the best plan, None if none fits.
        extra: forecast of a further pipeline of the idle workers, None if none fits.
        advice: by worker; empty if not asked for, or if no plan fits.
    """

    search: PlanSearch
    served: Forecast
    best: Forecast | None
    extra: Forecast | None
    advice: Mapping[WorkerId, Advice]

    @property
    def better(self) -> Forecast | None:
        """Forecast of the best plan if it is better than the served one, by the objective."""
        objective = self.search.objective
        if self.best is None or self.best.layer_map == self.search.layer_map:
            return None
        better = self.best.score(objective) > self.served.score(objective)
        return self.best if better else None
