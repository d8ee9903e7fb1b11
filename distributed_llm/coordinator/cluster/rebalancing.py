"""Keeps the plans of a cluster up with what is measured. Pure.

Every second it has one pipeline surveyed: its workers as they are now, and those without layers. If
there is a better plan, the pipeline's balancer says whether to move; idle workers that can hold the
model by themselves may serve it once more instead.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from distributed_llm.common.types import WorkerId
from distributed_llm.coordinator.cluster.balancer import Alternative, Balancer
from distributed_llm.coordinator.cluster.placement import Placement
from distributed_llm.coordinator.cluster.registry import Registry, Worker, memory_of
from distributed_llm.coordinator.cluster.relocation import Relocation
from distributed_llm.coordinator.events import Action, Study
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.planning.advice import Advice
from distributed_llm.coordinator.planning.forecast import Forecast
from distributed_llm.coordinator.planning.plan_search import FoundPlans, PlanSearch
from distributed_llm.coordinator.planning.planner import Planner, ranked_by_speed
from distributed_llm.coordinator.serving.event_log import EventLog
from distributed_llm.coordinator.serving.pipeline import Pipeline
from distributed_llm.coordinator.serving.steps import StepDone
from distributed_llm.coordinator.settings import CoreSettings
from distributed_llm.coordinator.speeds.demand import Demand, DemandMeter
from distributed_llm.coordinator.speeds.measurements import Measurements

_EVERY_S = 1.0
_ADVISE_EVERY_S = 10.0
_MAX_IDLE = 16
"""Workers without layers that a survey looks at, the fastest."""

_ERROR_OF_MEAN = 0.2
"""Standard deviation of a fitted time, as a share of the median error of single tasks."""

_HELPFUL = 0.2
"""A further pipeline has to be at least so fast, compared with one that serves."""

_AS_GOOD = 0.97
"""Two pipelines are preferred to a longer one that is this little faster."""

_PATIENCE_S = 10.0
"""After a move was undone; twice as long each time."""


@dataclass
class _Lineage:
    """What is known of pipelines that took each other's place, beyond their plans.

    Attributes:
        demand: what is asked of them.
        balancer: says when they should have another plan.
    """

    demand: DemandMeter = field(default_factory=DemandMeter)
    balancer: Balancer = field(default_factory=Balancer)


class Rebalancing:
    """The rebalancer of one cluster; does nothing unless the strategy is "speed".

    Attributes:
        advice: whether each worker helps, as found last.
    """

    def __init__(
        self,
        cost: ModelCost,
        settings: CoreSettings,
        placement: Placement,
        planner: Planner,
        relocation: Relocation,
        measurements: Measurements,
        registry: Registry,
        event_log: EventLog,
    ) -> None:
        self._cost = cost
        self._settings = settings
        self._placement = placement
        self._planner = planner
        self._relocation = relocation
        self._measurements = measurements
        self._registry = registry
        self._event_log = event_log
        self._surveyed: PlanSearch | None = None  # findings are awaited
        self._looked_at: dict[int, float] = {}  # clock seconds, by epoch
        self._advised: dict[int, tuple[frozenset[WorkerId], float]] = {}  # and when, by epoch
        self._left_out: set[WorkerId] = set()
        self._unconfirmed: set[int] = set()  # epochs of plans for which there may be a better one
        self._rates: dict[int, float] = {}  # tokens per second that are expected, by epoch
        self._lineages: dict[int, _Lineage] = {}
        self._next_at: float | None = None
        self.advice: Mapping[WorkerId, Advice] = {}

    def next_deadline(self) -> float | None:
        """Return when to look again, clock seconds."""
        return self._next_at

    def wake(self, *, now: float) -> None:
        """Something may be served: look."""
        if self._next_at is None and self._settings.strategy == "speed":
            self._next_at = now + _EVERY_S

    def on_timer(self, *, now: float) -> list[Action]:
        """Have the pipeline surveyed that was looked at longest ago, if it may change."""
        if self._next_at is None or self._next_at > now:
            return []
        self._next_at = now + _EVERY_S
        serving = [r for r in self._placement.pipelines if r.in_flight]
        if not serving:
            self._next_at = None
            return []
        patience_s = _PATIENCE_S * (2.0 ** min(self._relocation.failures, 6) - 1.0)
        if self._surveyed or self._relocation.move or now < self._relocation.undone_at + patience_s:
            return []
        self._forget({pipeline.epoch for pipeline in serving})
        pipeline = min(serving, key=lambda r: self._looked_at.get(r.epoch, 0.0))
        self._looked_at[pipeline.epoch] = now
        survey = self._survey(pipeline, now)
        if survey is None:
            return []
        self._surveyed = survey
        return [Study(survey.run)]

    def _forget(self, epochs: set[int]) -> None:
        """Keep what is known of these plans only."""
        self._looked_at = {e: at for e, at in self._looked_at.items() if e in epochs}
        self._advised = {e: found for e, found in self._advised.items() if e in epochs}
        self._rates = {e: found for e, found in self._rates.items() if e in epochs}
        self._unconfirmed &= epochs
        lineages = {pipeline.lineage for pipeline in self._placement.pipelines}
        self._lineages = {e: found for e, found in self._lineages.items() if e in lineages}

    def _lineage(self, pipeline: Pipeline) -> "_Lineage":
        return self._lineages.setdefault(pipeline.lineage, _Lineage())

    def _quickest(self, idle: Sequence[Worker]) -> list[Worker]:
        workers = {worker.id: worker for worker in idle}
        ranked = ranked_by_speed(self._measurements.machines(memory_of(idle)))
        return [workers[worker] for worker in ranked[:_MAX_IDLE]]

    def observe(self, pipeline: Pipeline, done: StepDone, *, now: float) -> None:
        """Learn from a step what is asked of a pipeline."""
        demand = self._lineage(pipeline).demand
        demand.observe(done, decoding=pipeline.num_decoding, now=now)

    def _survey(self, pipeline: Pipeline, now: float) -> PlanSearch | None:
        """Return what to find out about a pipeline; None if nothing has changed."""
        own = {stage.peer for stage in pipeline.stages}
        workers = [worker for worker in self._registry.workers if worker.peer in own]
        if any(worker.leaving for worker in workers):
            return None
        idle = self._placement.idle_workers
        idle = self._quickest(idle)
        demand = self._lineage(pipeline).demand.demand
        everybody = frozenset(worker.id for worker in (*workers, *idle))
        advised, advised_at = self._advised.get(pipeline.epoch, (frozenset(), 0.0))
        unconfirmed = pipeline.epoch in self._unconfirmed
        if demand is None and not idle and advised == everybody and not unconfirmed:
            return None
        advise = advised != everybody or now >= advised_at + _ADVISE_EVERY_S
        if advise:
            self._advised[pipeline.epoch] = everybody, now
        fit = [w for w in workers if not self._placement.hangs(w)]
        needed = self._placement.needed_tokens(pipeline)
        return PlanSearch(
            epoch=pipeline.epoch,
            cost=self._cost,
            layer_map=pipeline.layer_map,
            machines=self._measurements.machines(memory_of([*workers, *idle])),
            idle=tuple(worker.id for worker in idle),
            demand=demand or Demand.expected(len(everybody)),
            goal=self._planner.goal if demand is None else self._settings.objective,
            kv_tokens=max(needed, self._planner.kv_tokens(memory_of([*fit, *idle]))),
            extra_kv_tokens=self._planner.kv_tokens(memory_of(idle)),
            least_kv_tokens=self._planner.least_kv_tokens,
            beside_tokens_per_s=sum(
                found for epoch, found in self._rates.items() if epoch != pipeline.epoch
            ),
            advise=advise,
        )

    # -------------------------------------------------------------- what was found

    def studied(self, findings: FoundPlans, *, now: float) -> list[Action]:
        """Act on what a survey has found."""
        survey, self._surveyed = findings.search, None
        self._unconfirmed.discard(survey.epoch)
        self._rates[survey.epoch] = findings.now.score(survey.goal)
        return [*self._advise(findings.advice), *self._act(findings, now)]

    def _advise(self, found: Mapping[WorkerId, Advice]) -> list[Action]:
        """Keep what is known of each worker; tell once who is left out, and why."""
        advice = {**self.advice, **found}
        workers = [worker for worker in self._registry.workers if worker.id in advice]
        self.advice = {worker.id: advice[worker.id] for worker in workers}
        idle = {worker.id for worker in workers if worker.layers is None}
        left_out = {worker for worker in idle if (advice[worker].gain or 0.0) <= 0.0}
        new, self._left_out = left_out - self._left_out, left_out
        return [
            self._event_log.note(f"worker {worker} has no layers: {advice[worker].text}")
            for worker in sorted(new)
        ]

    def _act(self, findings: FoundPlans, now: float) -> list[Action]:
        survey = findings.search
        pipeline = next((r for r in self._placement.pipelines if r.epoch == survey.epoch), None)
        if pipeline is None or pipeline.in_flight is None or self._relocation.move:
            return []
        if self._adds(findings):
            assert findings.extra is not None
            plan = self._planner.plan_of(
                memory_of(self._found(findings.extra)), findings.extra.layer_map
            )
            return self._placement.serve_also(plan)
        best = findings.best
        if best is None or best.layer_map == pipeline.layer_map:
            return []
        workers = self._found(best, pipeline)
        if len(workers) < len(best.layer_map):
            return []  # somebody has left meanwhile, or is to leave
        plan = self._planner.plan_of(memory_of(workers), best.layer_map)
        price = self._relocation.price(pipeline, plan)
        gain = best.score(survey.goal) / findings.now.score(survey.goal) - 1.0
        offer = Alternative(best.layer_map, gain, self._uncertainty(findings), price.standstill_s)
        verdict = self._lineage(pipeline).balancer.consider(offer, now=now)
        if verdict.what == "wait":
            self._unconfirmed.add(survey.epoch)
        if verdict.what != "move":
            return []
        self._lineage(pipeline).balancer.moved(pipeline.layer_map, now=now)
        if price.kv_tokens is None:
            return self._relocation.replace(pipeline, plan, why=verdict.why)
        return self._relocation.begin(pipeline, plan, price, why=verdict.why, now=now)

    def study_failed(self) -> None:
        """A survey could not be carried out."""
        self._surveyed = None

    def _adds(self, findings: FoundPlans) -> bool:
        """Return whether idle workers should serve the model once more by themselves."""
        wanted, number = self._settings.replicas, len(self._placement.pipelines)
        extra, survey = findings.extra, findings.search
        if extra is None or (wanted != "auto" and number >= wanted):
            return False
        if len(self._found(extra)) < len(extra.layer_map):
            return False
        if wanted != "auto":
            return True
        now, also = findings.now.full_tokens_per_s, extra.full_tokens_per_s
        if also < _HELPFUL * now:
            return False
        if survey.goal == "latency":
            return True
        longer = findings.best.full_tokens_per_s if findings.best else 0.0
        return now + also >= _AS_GOOD * longer

    def _found(self, forecast: Forecast, own: Pipeline | None = None) -> list[Worker]:
        """Return those workers of a forecast that can still be had: idle ones, and of `own`."""
        free = {
            worker.id: worker
            for worker in self._placement.fit_workers
            if worker.layers is None or (own and self._placement.pipeline_of(worker.peer) is own)
        }
        return [free[worker] for worker, _ in forecast.layer_map if worker in free]

    def _uncertainty(self, findings: FoundPlans) -> float:
        assert findings.best is not None
        names = {worker for worker, _ in (*findings.best.layer_map, *findings.search.layer_map)}
        return _ERROR_OF_MEAN * max(self._measurements.doubt(worker) for worker in names)
