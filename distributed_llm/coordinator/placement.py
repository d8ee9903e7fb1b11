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
from distributed_llm.common.types import PeerId
from distributed_llm.coordinator.core_settings import CoreSettings
from distributed_llm.coordinator.desk import Desk
from distributed_llm.coordinator.events import Action, Stop
from distributed_llm.coordinator.journal import Journal
from distributed_llm.coordinator.planner import Plan
from distributed_llm.coordinator.planning import Planning
from distributed_llm.coordinator.registry import Registry, Worker
from distributed_llm.coordinator.replica import Replica
from distributed_llm.coordinator.replicas import Replicas


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
        settings: CoreSettings,
        registry: Registry,
        desk: Desk,
        journal: Journal,
        planning: Planning,
        replicas: Replicas,
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._desk = desk
        self._journal = journal
        self._planning = planning
        self._replicas = replicas
        self.note = "No worker has joined."
        self.replan_at: float | None = None
        self.replan_when_idle = False

    @property
    def state(self) -> Literal["waiting", "loading", "serving"]:
        """Of the cluster."""
        if any(replica.pipeline for replica in self.replicas):
            return "serving"
        return "loading" if self.replicas else "waiting"

    @property
    def replicas(self) -> list[Replica]:
        """What is served or loaded; the newest comes last."""
        return self._replicas.all

    def replica_of(self, peer: PeerId) -> Replica | None:
        """Return what the worker at `peer` is part of."""
        return self._replicas.of(peer)

    def needed_tokens(self, replica: Replica) -> int:
        """Return the positions without which another plan would cost requests of this one."""
        used = replica.scheduler.kv_tokens_used if replica.scheduler else 0
        return max(used, min(self._desk.most_reserved, replica.kv_tokens))

    @property
    def complete(self) -> bool:
        """Whether the model is served as often as is wanted."""
        wanted = self._settings.replicas
        return len(self.replicas) >= (1 if wanted == "auto" else wanted)

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
        if self._replicas.epoch == 0 and len(fit) < self._settings.min_workers:
            self.note = (
                f"{len(fit)} of {self._settings.min_workers} workers have joined. "
                "Start the others with `dllm worker`."
            )
            return []
        try:
            plans = self._planning.plans(fit)
        except (NotEnoughMemory, ConfigError, NotReady) as exc:
            if self.replicas:
                return [self._journal.note(f"the plan stays: {exc}", "warning")]
            return self._wait(exc)
        kept = {replica.plan for replica in self.replicas} & set(plans)
        for replica in self.replicas:
            if replica.plan not in kept:
                self._replicas.dissolve(replica)
        return self._load([plan for plan in plans if plan not in kept])

    def add(self) -> list[Action]:
        """Serve the model once more with workers that have no layers, if they can hold it."""
        self.replan_at, self.replan_when_idle = None, True
        try:
            plan = self._planning.plan(self.idle_workers)
        except (NotEnoughMemory, ConfigError, NotReady):
            return []
        return self._load([plan])

    def serve_also(self, plan: Plan) -> list[Action]:
        """Serve the model once more, by workers that have no layers."""
        return self._load([plan])

    def lose(self, worker: Worker) -> list[Action]:
        """A worker of a plan is no longer there: plan anew for those that it leaves behind."""
        replica = self._replicas.of(worker.peer)
        if replica is None:
            return []
        self._replicas.dissolve(replica)
        try:
            return self._load([self._planning.plan(self.idle_workers)])
        except (NotEnoughMemory, ConfigError, NotReady) as exc:
            if self.replicas:
                text = f"{len(self.replicas)} pipelines are left to serve the model: {exc}"
                note = self._journal.note(text, "warning")
                self.replan_when_idle = True
                return [*self._replicas.drop_unused(), note, *self._replicas.tell_capacity()]
            ended = self._replicas.end_epoch()
            broken = WorkerLost(f"Worker {worker.id} serves its layers no longer. {exc}")
            return [*ended, *self._desk.fail_all(broken), *self._wait(exc)]

    def _wait(self, error: DistributedLLMError) -> list[Action]:
        self.note, self.replan_when_idle = str(error)[:4096], False
        return [self._journal.note(f"waiting: {error}", "warning")]

    def _load(self, plans: Sequence[Plan]) -> list[Action]:
        self.note = ""
        return self._replicas.load(plans)

    # -------------------------------------------------------------- what workers tell

    def stage_ready(self, worker: Worker, ready: StageReady) -> list[Action]:
        """Take it that a worker has loaded its layers; once all of its plan have, serve."""
        replica = self._replicas.of(worker.peer)
        if replica is None or ready.epoch != replica.epoch or worker.state != "loading":
            self._journal.rejected["stale_epoch"] += 1
            return []
        worker.state = "serving"
        worker.weight_bytes = ready.weight_bytes
        worker.loaded(ready.weight_bytes, ready.load_s)
        note = f"worker {worker.id} loaded layers {worker.layers} in {ready.load_s:.1f} s"
        actions: list[Action] = [self._journal.note(note)]
        if replica.stage_ready(worker.peer, ready):
            replica.serve()
            actions += self._replicas.tell_capacity()
            text = f"serving plan {replica.epoch}: {replica.kv_tokens} positions of KV cache"
            actions.append(self._journal.note(text))
        return actions

    def stage_failed(self, worker: Worker, failed: StageFailed) -> list[Action]:
        """Take it that a worker cannot load its layers: plan without it."""
        if failed.epoch != worker.epoch or worker.layers is None:
            self._journal.rejected["stale_epoch"] += 1
            return []
        worker.unassign()
        worker.state, worker.note = "unfit", failed.message
        actions: list[Action] = [
            self._journal.note(f"worker {worker.id} cannot serve: {failed.message}", "error")
        ]
        if failed.code == UnsupportedModel.code:
            broken = self._replicas.of(worker.peer)
            assert broken is not None
            self._replicas.dissolve(broken)
            return [*actions, Stop(UnsupportedModel(failed.message))]
        return actions + self.lose(worker)
