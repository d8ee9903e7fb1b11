"""Rebalancing: moves pipelines to better plans as measured speeds and demand change. Pure.

Every second it has better plans searched for one pipeline, for its own workers and idle ones. If
there is one, the pipeline's balancer says whether to move. Instead, idle workers may serve the
model once more by themselves, if that adds enough speed. Does nothing unless the strategy is
"speed".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

from distributed_llm.common.types import Epoch, WorkerId
from distributed_llm.coordinator.cluster.balancer import Alternative, Balancer
from distributed_llm.coordinator.cluster.cluster import Cluster
from distributed_llm.coordinator.cluster.moves import Moves
from distributed_llm.coordinator.cluster.replanning import Replanning
from distributed_llm.coordinator.cluster.telling import tell
from distributed_llm.coordinator.cluster.worker import Worker
from distributed_llm.coordinator.events import Action, Study
from distributed_llm.coordinator.planning.advice import Advice
from distributed_llm.coordinator.planning.forecast import Forecast
from distributed_llm.coordinator.planning.plan_search import MAX_IDLE, PlanSearch, SearchResult
from distributed_llm.coordinator.planning.planner import Planner
from distributed_llm.coordinator.serving.event_log import EventKind
from distributed_llm.coordinator.serving.pipeline import Pipeline
from distributed_llm.coordinator.serving.steps import StepDone
from distributed_llm.coordinator.speeds.demand import Demand, DemandMeter

_EVERY_S = 1.0
"""Seconds between two searches."""

_ADVISE_EVERY_S = 10.0
"""Seconds between two times that a pipeline's machines are advised about."""

_ERROR_OF_MEAN = 0.2
"""Standard deviation of a fitted time, as a share of the median error of single tasks."""

_HELPFUL = 0.2
"""Least rate of a further pipeline, as a share of that of the one that serves."""

_AS_GOOD = 0.97
"""Two pipelines are preferred to one longer one if they have this share of its rate."""

_RETRY_S = 10.0
"""Seconds without a search after a move was undone; 30 after a second one in a row, then 70, ..."""


@dataclass
class _Lineage:
    """What a pipeline hands on to the one that takes its place.

    Attributes:
        demand: measures what is asked of them.
        balancer: says when they move to another plan.
        observed_at: when a step was observed last, clock seconds.
    """

    demand: DemandMeter = field(default_factory=DemandMeter)
    balancer: Balancer = field(default_factory=Balancer)
    observed_at: float = -inf


@dataclass
class _Outlook:
    """What searches showed of one served plan.

    Attributes:
        searched_at: when better plans were searched last, clock seconds.
        advised_at: when advice was asked for last, likewise.
        advised: the workers that it was about, and the epochs that were served.
        tokens_per_s: expected rate of the plan; None before the first search.
        served: what is expected of the plan under its demand; None before the first search.
        better: the same of the best plan that was found, if that is a better one.
        unconfirmed: whether the last search found a better plan, which has to be found again.
    """

    searched_at: float = 0.0
    advised_at: float = 0.0
    advised: tuple[frozenset[WorkerId], frozenset[Epoch]] = (frozenset(), frozenset())
    tokens_per_s: float | None = None
    served: Forecast | None = None
    better: Forecast | None = None
    unconfirmed: bool = False


class Rebalancing:
    """The rebalancer of one cluster."""

    def __init__(
        self, cluster: Cluster, planner: Planner, replanning: Replanning, moves: Moves
    ) -> None:
        self._cluster = cluster
        self._registry = cluster.registry
        self._pipelines = cluster.pipelines
        self._measurements = cluster.measurements
        self._planner = planner
        self._replanning = replanning
        self._moves = moves
        self._search: PlanSearch | None = None  # the one that is not answered yet
        self._searched_epochs: frozenset[Epoch] = frozenset()  # that were served when it was asked
        self._outlooks: dict[int, _Outlook] = {}  # by epoch
        self._lineages: dict[int, _Lineage] = {}  # by the epoch of their first pipeline
        self._left_out: set[WorkerId] = set()
        self._next_at: float | None = None
        self._advice: Mapping[WorkerId, Advice] = {}
        self._advised_epochs: frozenset[Epoch] = frozenset()  # of the pipelines that it is about

    @property
    def advice(self) -> Mapping[WorkerId, Advice]:
        """What each worker is worth, by the latest search; empty once other pipelines serve."""
        return self._advice if self._advised_epochs == self._served_epochs else {}

    def forecasts(self, pipeline: Pipeline) -> tuple[Forecast, Forecast | None] | None:
        """Return what is expected of a pipeline's plan, and of the best one if that is better.

        None if nothing was searched for it.
        """
        outlook = self._outlooks.get(pipeline.epoch)
        return (outlook.served, outlook.better) if outlook and outlook.served else None

    @property
    def _served_epochs(self) -> frozenset[Epoch]:
        return frozenset(pipeline.epoch for pipeline in self._pipelines.loaded)

    def observe(self, pipeline: Pipeline, done: StepDone, *, now: float) -> None:
        """Learn from a step what is asked of a pipeline."""
        lineage = self._lineage(pipeline)
        lineage.observed_at = now
        lineage.demand.observe(done, decoding=pipeline.num_decoding, now=now)

    def _lineage(self, pipeline: Pipeline) -> _Lineage:
        lineage = self._lineages.get(pipeline.lineage)
        if lineage is None:
            lineage = self._lineages[pipeline.lineage] = _Lineage()
        return lineage

    # -------------------------------------------------------------- when to search

    def next_deadline(self) -> float | None:
        """Return when the next search may begin, clock seconds; None while nothing is served."""
        return self._next_at

    def wake(self, *, now: float) -> None:
        """Search every second from now on, because something may be served."""
        if self._next_at is None and self._cluster.settings.strategy == "speed":
            self._next_at = now + _EVERY_S

    def on_timer(self, *, now: float) -> list[Action]:
        """Have plans searched for the pipeline whose last search was longest ago."""
        if self._next_at is None or self._next_at > now:
            return []
        self._next_at = now + _EVERY_S
        serving = self._pipelines.loaded
        if not serving:
            self._next_at = None
            return []
        retry_s = _RETRY_S * (2.0 ** min(self._moves.failures, 6) - 1.0)
        moving = self._moves.move or now < self._moves.undone_at + retry_s
        if self._search or moving or self._replanning.busy:
            return []
        self._forget_others(serving)
        pipeline = min(serving, key=lambda each: self._outlooks[each.epoch].searched_at)
        self._search = self._new_search(pipeline, now)
        self._searched_epochs = self._served_epochs
        self._outlooks[pipeline.epoch].searched_at = now
        return [Study(self._search)] if self._search else []

    def _forget_others(self, serving: Sequence[Pipeline]) -> None:
        """Keep what is known of these pipelines, and nothing of those that are gone."""
        self._outlooks = {
            pipeline.epoch: self._outlooks.get(pipeline.epoch, _Outlook()) for pipeline in serving
        }
        alive = {pipeline.lineage for pipeline in self._pipelines.all}
        self._lineages = {
            epoch: lineage for epoch, lineage in self._lineages.items() if epoch in alive
        }

    def _new_search(self, pipeline: Pipeline, now: float) -> PlanSearch | None:
        """Return a search for a pipeline; None if it could find nothing new."""
        own = {stage.peer for stage in pipeline.stages}
        workers = [worker for worker in self._registry.workers if worker.peer in own]
        if any(worker.leaving for worker in workers):
            return None
        idle = self._registry.idle
        lineage = self._lineage(pipeline)
        demand = lineage.demand.demand
        everybody = frozenset(worker.id for worker in (*workers, *idle))
        outlook = self._outlooks[pipeline.epoch]
        known = outlook.advised == (everybody, self._served_epochs)
        quiet = known and lineage.observed_at < outlook.searched_at and not outlook.unconfirmed
        if quiet and demand is None and not idle:
            return None
        beside = [
            other.tokens_per_s for epoch, other in self._outlooks.items() if epoch != pipeline.epoch
        ]
        advise = not known or now >= outlook.advised_at + _ADVISE_EVERY_S
        advise = advise and None not in beside  # what the others are worth is a part of it
        if quiet and not advise:
            return None  # links may have changed, which can wait for the next advice
        if advise:
            outlook.advised, outlook.advised_at = (everybody, self._served_epochs), now
        return PlanSearch(
            epoch=pipeline.epoch,
            planner=self._planner.only(pipeline.quantize),
            layer_map=pipeline.layer_map,
            machines=self._measurements.machines(self._cluster.memory_of([*workers, *idle])),
            idle=tuple(worker.id for worker in idle),
            hanging=frozenset(worker.id for worker in workers if self._registry.hangs(worker)),
            demand=demand or Demand.expected(min(len(everybody), len(own) + MAX_IDLE)),
            objective=self._planner.objective
            if demand is None
            else self._cluster.settings.objective,
            needed_tokens=self._cluster.needed_tokens(pipeline),
            beside_tokens_per_s=sum(rate or 0.0 for rate in beside),
            advise=advise,
        )

    # -------------------------------------------------------------- what a search found

    def search_done(self, result: SearchResult, *, now: float) -> list[Action]:
        """Move to the best plan that a search found, or add a pipeline, if that is worth it."""
        search, self._search = result.search, None
        outlook = self._outlooks.setdefault(search.epoch, _Outlook())
        outlook.unconfirmed = False
        outlook.tokens_per_s = result.served.score(search.objective)
        outlook.served, outlook.better = result.served, result.better
        current = self._searched_epochs == self._served_epochs
        advised = self._advise(result.advice) if current else []
        return [*advised, *self._act(result, outlook, now)]

    def search_failed(self) -> None:
        """Forget a search that ended with an exception; later ones may do better."""
        self._search = None

    def _advise(self, new_advice: Mapping[WorkerId, Advice]) -> list[Action]:
        """Keep advice about workers that are there; log and tell once who is left out, and why."""
        advice = {**self.advice, **new_advice}
        workers = [worker for worker in self._registry.workers if worker.id in advice]
        self._advice = {worker.id: advice[worker.id] for worker in workers}
        self._advised_epochs = self._served_epochs
        idle = {worker.id for worker in workers if worker.layers is None}
        left_out = {worker for worker in idle if (advice[worker].gain or 0.0) <= 0.0}
        new, self._left_out = left_out - self._left_out, left_out
        log = self._cluster.event_log
        actions: list[Action] = []
        for worker in [each for each in workers if each.id in new]:
            why = advice[worker.id].text.removeprefix("left out: ")
            actions.append(log.note(EventKind.WORKER_LEFT_OUT, worker=worker.id, why=why))
            actions += tell(worker, f"no layers: {why}")
        return actions

    def _act(self, result: SearchResult, outlook: _Outlook, now: float) -> list[Action]:
        search = result.search
        serving = {pipeline.epoch: pipeline for pipeline in self._pipelines.loaded}
        pipeline = serving.get(search.epoch)
        if pipeline is None or self._moves.move or self._replanning.busy:
            return []
        if self._adds(result):
            assert result.extra is not None
            memory = self._cluster.memory_of(self._available(result.extra))
            return self._pipelines.load([search.planner.plan_of(memory, result.extra.layer_map)])
        best = result.best
        if best is None or best.layer_map == pipeline.layer_map:
            return []
        workers = self._available(best, pipeline)
        if len(workers) < len(best.layer_map):
            return []  # somebody has left meanwhile, or is to leave
        plan = search.planner.plan_of(self._cluster.memory_of(workers), best.layer_map)
        if not self._cluster.goes_on_in(plan, pipeline):
            return []  # the move would be undone
        price = self._moves.prices.price(pipeline, plan)
        gain = best.score(search.objective) / result.served.score(search.objective) - 1.0
        lineage = self._lineage(pipeline)
        alternative = Alternative(
            best.layer_map,
            gain,
            self._uncertainty(result),
            price.standstill_s,
            measured=lineage.demand.demand is not None,
        )
        balancer = lineage.balancer
        verdict = balancer.consider(alternative, now=now)
        outlook.unconfirmed = verdict.what == "wait"
        if verdict.what != "move":
            return []
        balancer.moved(pipeline.layer_map, now=now)
        if price.kv_tokens is None:
            return self._moves.replace(pipeline, plan, why=verdict.why)
        return self._moves.begin(pipeline, plan, price, why=verdict.why, now=now)

    def _adds(self, result: SearchResult) -> bool:
        """Return whether idle workers should serve the model once more by themselves.

        With `replicas` "auto" the pipeline must not be far slower than the one that serves, and,
        unless the objective is latency, both together not much slower than one longer pipeline.
        """
        wanted, number = self._cluster.settings.replicas, len(self._pipelines.all)
        extra, search = result.extra, result.search
        if extra is None or (wanted != "auto" and number >= wanted):
            return False
        if len(self._available(extra)) < len(extra.layer_map):
            return False
        if wanted != "auto":
            return True
        served, more = result.served.full_tokens_per_s, extra.full_tokens_per_s
        if more < _HELPFUL * served:
            return False
        if search.objective == "latency":
            return True
        longer = result.best.full_tokens_per_s if result.best else 0.0
        return served + more >= _AS_GOOD * longer

    def _available(self, forecast: Forecast, own: Pipeline | None = None) -> list[Worker]:
        """Return those workers of a forecast that can still be had: idle ones, and of `own`."""
        free = {
            worker.id: worker
            for worker in self._registry.fit
            if worker.layers is None or (own and self._pipelines.pipeline_of(worker.peer) is own)
        }
        return [free[worker] for worker, _ in forecast.layer_map if worker in free]

    def _uncertainty(self, result: SearchResult) -> float:
        """Return the standard deviation of the gain of the best plan."""
        assert result.best is not None
        names = {worker for worker, _ in (*result.best.layer_map, *result.search.layer_map)}
        return _ERROR_OF_MEAN * max(self._measurements.doubt(worker) for worker in names)
