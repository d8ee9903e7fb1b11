"""Which plans are served: for the workers that are there, those that come and go. Pure.

    waiting --enough workers--> loading --every stage ready--> serving
       ^                        |  ^                              |
       '---nobody can hold it---'  '---a worker came or was lost--'

The model may be served several times, each time by workers of their own. How plans are loaded is
the matter of `replicas`; how one becomes another while requests run, that of `relocation`.
"""

from collections.abc import Sequence
from typing import Literal

from distributed_llm.common.errors import (
    ConfigError,
    DistributedLLMError,
    NotEnoughMemory,
    NotReady,
    UnsupportedModel,
    WorkerLost,
)
from distributed_llm.common.messages import StageFailed, StageReady
from distributed_llm.common.settings import CoordinatorSettings
from distributed_llm.common.types import PeerId
from distributed_llm.coordinator.cluster.pipelines import Pipelines
from distributed_llm.coordinator.cluster.registry import Registry, Worker, memory_of
from distributed_llm.coordinator.events import Action, Stop
from distributed_llm.coordinator.plan import Plan
from distributed_llm.coordinator.planning.planner import Planner
from distributed_llm.coordinator.serving.event_log import EventLog
from distributed_llm.coordinator.serving.pipeline import Pipeline
from distributed_llm.coordinator.serving.request_book import RequestBook
from distributed_llm.coordinator.speeds.machines import Machines
from distributed_llm.coordinator.speeds.measurements import Measurements


class Placement:
    """The plans of the moment.

    Args:
        settings: how the model is served.
        registry: the workers.
        desk: the requests; they end when nobody can serve them.
        journal: takes what happens.
        planning: makes plans.
        replicas: the pipelines that come of them.

    Attributes:
        note: why nothing is served.
        replan_at: when to plan for a worker that joined, clock seconds, or None.
        replan_when_idle: a better plan may be possible, but requests are running.
    """

    def __init__(
        self,
        settings: CoordinatorSettings,
        registry: Registry,
        book: RequestBook,
        event_log: EventLog,
        planner: Planner,
        measurements: Measurements,
        pipelines: Pipelines,
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._book = book
        self._event_log = event_log
        self._planner = planner
        self._measurements = measurements
        self._pipelines = pipelines
        self.note = "No worker has joined."
        self.replan_at: float | None = None
        self.replan_when_idle = False

    @property
    def state(self) -> Literal["waiting", "loading", "serving"]:
        """Of the cluster."""
        if any(pipeline.in_flight for pipeline in self.pipelines):
            return "serving"
        return "loading" if self.pipelines else "waiting"

    @property
    def pipelines(self) -> list[Pipeline]:
        """What is served or loaded; the newest comes last."""
        return self._pipelines.all

    def pipeline_of(self, peer: PeerId) -> Pipeline | None:
        """Return what the worker at `peer` is part of."""
        return self._pipelines.of(peer)

    def needed_tokens(self, pipeline: Pipeline) -> int:
        """Return the positions without which another plan would cost requests of this one."""
        used = pipeline.scheduler.kv_tokens_used if pipeline.scheduler else 0
        return max(used, min(self._book.most_reserved, pipeline.kv_tokens))

    @property
    def complete(self) -> bool:
        """Whether the model is served as often as is wanted."""
        wanted = self._settings.replicas
        return len(self.pipelines) >= (1 if wanted == "auto" else wanted)

    @property
    def fit_workers(self) -> list[Worker]:
        """Workers that may be given layers."""
        return [
            worker
            for worker in self._registry.workers
            if worker.state != "unfit" and not worker.leaving and not self.hangs(worker)
        ]

    @property
    def idle_workers(self) -> list[Worker]:
        """Those of them that have none."""
        return [worker for worker in self.fit_workers if worker.layers is None]

    def hangs(self, worker: Worker) -> bool:
        """Return whether a worker is stuck in a task, of this session or an earlier one."""
        return worker.progress_age_s >= self._settings.task_timeout_s

    # -------------------------------------------------------------- planning

    def replan(self) -> list[Action]:
        """Plan for all workers that are there; what has to change loads its layers."""
        self.replan_at, self.replan_when_idle = None, False
        fit = self.fit_workers
        if self._pipelines.epoch == 0 and len(fit) < self._settings.min_workers:
            self.note = (
                f"{len(fit)} of {self._settings.min_workers} workers have joined. "
                "Start the others with `dllm worker`."
            )
            return []
        try:
            plans = self._planner.plans(self._machines(fit))
        except (NotEnoughMemory, ConfigError, NotReady) as exc:
            if self.pipelines:
                return [self._event_log.note(f"the plan stays: {exc}", "warning")]
            return self._wait(exc)
        kept = {pipeline.plan for pipeline in self.pipelines} & set(plans)
        for pipeline in self.pipelines:
            if pipeline.plan not in kept:
                self._pipelines.dissolve(pipeline)
        return self._load([plan for plan in plans if plan not in kept])

    def add(self) -> list[Action]:
        """Serve the model once more with workers that have no layers, if they can hold it."""
        self.replan_at, self.replan_when_idle = None, True
        try:
            plan = self._planner.plan(self._machines(self.idle_workers))
        except (NotEnoughMemory, ConfigError, NotReady):
            return []
        return self._load([plan])

    def serve_also(self, plan: Plan) -> list[Action]:
        """Serve the model once more, by workers that have no layers."""
        return self._load([plan])

    def lose(self, worker: Worker) -> list[Action]:
        """A worker of a plan is no longer there: plan anew for those that it leaves behind."""
        pipeline = self._pipelines.of(worker.peer)
        if pipeline is None:
            return []
        self._pipelines.dissolve(pipeline)
        try:
            return self._load([self._planner.plan(self._machines(self.idle_workers))])
        except (NotEnoughMemory, ConfigError, NotReady) as exc:
            if self.pipelines:
                text = f"{len(self.pipelines)} pipelines are left to serve the model: {exc}"
                note = self._event_log.note(text, "warning")
                self.replan_when_idle = True
                return [*self._pipelines.drop_unused(), note, *self._pipelines.tell_capacity()]
            ended = self._pipelines.end_epoch()
            broken = WorkerLost(f"Worker {worker.id} serves its layers no longer. {exc}")
            return [*ended, *self._book.fail_all(broken), *self._wait(exc)]

    def _machines(self, workers: Sequence[Worker]) -> Machines:
        return self._measurements.machines(memory_of(workers))

    def _wait(self, error: DistributedLLMError) -> list[Action]:
        self.note, self.replan_when_idle = str(error)[:4096], False
        return [self._event_log.note(f"waiting: {error}", "warning")]

    def _load(self, plans: Sequence[Plan]) -> list[Action]:
        self.note = ""
        return self._pipelines.load(plans)

    # -------------------------------------------------------------- what workers tell

    def stage_ready(self, worker: Worker, ready: StageReady) -> list[Action]:
        """Take it that a worker has loaded its layers; once all of its plan have, serve."""
        pipeline = self._pipelines.of(worker.peer)
        if pipeline is None or ready.epoch != pipeline.epoch or worker.state != "loading":
            self._event_log.rejected["stale_epoch"] += 1
            return []
        worker.state = "serving"
        worker.weight_bytes = ready.weight_bytes
        worker.loaded(ready.weight_bytes, ready.load_s)
        note = f"worker {worker.id} loaded layers {worker.layers} in {ready.load_s:.1f} s"
        actions: list[Action] = [self._event_log.note(note)]
        if pipeline.stage_ready(worker.peer, ready):
            pipeline.serve()
            actions += self._pipelines.tell_capacity()
            text = f"serving plan {pipeline.epoch}: {pipeline.kv_tokens} positions of KV cache"
            actions.append(self._event_log.note(text))
        return actions

    def stage_failed(self, worker: Worker, failed: StageFailed) -> list[Action]:
        """Take it that a worker cannot load its layers: plan without it."""
        if failed.epoch != worker.epoch or worker.layers is None:
            self._event_log.rejected["stale_epoch"] += 1
            return []
        worker.unassign()
        worker.state, worker.note = "unfit", failed.message
        actions: list[Action] = [
            self._event_log.note(f"worker {worker.id} cannot serve: {failed.message}", "error")
        ]
        if failed.code == UnsupportedModel.code:
            broken = self._pipelines.of(worker.peer)
            assert broken is not None
            self._pipelines.dissolve(broken)
            return [*actions, Stop(UnsupportedModel(failed.message))]
        return actions + self.lose(worker)
