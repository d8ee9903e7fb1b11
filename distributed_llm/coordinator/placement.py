"""Which plan is served or loaded, and how one follows another. Pure.

    waiting --enough workers--> loading --every stage ready--> serving
       ^                        |  ^                              |
       '---nobody can hold it---'  '---a worker came or was lost--'

Every plan has a larger epoch than the one before; answers of an older epoch are dropped.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from distributed_llm.common.errors import (
    ConfigError,
    DistributedLLMError,
    NotEnoughMemory,
    NotReady,
    UnsupportedModel,
    WorkerLost,
)
from distributed_llm.common.messages import DropStage, LoadStage, StageFailed, StageReady
from distributed_llm.common.types import LayerRange, PeerId, WorkerId
from distributed_llm.coordinator.desk import Desk
from distributed_llm.coordinator.events import Action, Send, Stop
from distributed_llm.coordinator.journal import Journal
from distributed_llm.coordinator.model import ServedModel
from distributed_llm.coordinator.pipeline import Pipeline
from distributed_llm.coordinator.planner import Offer, Plan, Strategy, kv_tokens_of, make_plan
from distributed_llm.coordinator.registry import Registry, Worker


@dataclass(frozen=True)
class CoreSettings:
    """How the coordinator decides; times in seconds.

    Attributes:
        layers: the layers of each worker, for strategy "custom".
        min_workers: workers to wait for before the first plan.
        settle_s: quiet time after a join before planning.
        max_batch_tokens: tokens in one step.
        min_kv_tokens: positions of KV cache that a plan must have room for.
        task_timeout_s: without progress, after which a task is sent again.
    """

    strategy: Strategy = "memory"
    layers: Mapping[str, LayerRange] = field(default_factory=dict)
    min_workers: int = 1
    settle_s: float = 0.5
    max_batch_sequences: int = 64
    max_batch_tokens: int = 512
    max_waiting_requests: int = 256
    min_kv_tokens: int = 1024
    heartbeat_interval_s: float = 1.0
    silence_timeout_s: float = 4.0
    task_timeout_s: float = 30.0


class Placement:
    """The plan of the moment.

    Args:
        model: what is served.
        settings: how.
        registry: the workers.
        desk: the requests; they end when nobody can serve them.
        journal: takes what happens.

    Attributes:
        note: why nothing is served.
        epoch: of the plan; 0 before the first.
        pipeline: of the plan that is served, or None.
        replan_at: when to plan for a worker that joined, clock seconds, or None.
    """

    def __init__(
        self,
        model: ServedModel,
        settings: CoreSettings,
        registry: Registry,
        desk: Desk,
        journal: Journal,
    ) -> None:
        self._model = model
        self._settings = settings
        self._registry = registry
        self._desk = desk
        self._journal = journal
        self._plan: Plan = ()
        self._ready: dict[PeerId, int] = {}  # first credits of the stages that are loaded
        self._next_step = 0
        self.state: Literal["waiting", "loading", "serving"] = "waiting"
        self.note = "No worker has joined."
        self.epoch = 0
        self.pipeline: Pipeline | None = None
        self.replan_at: float | None = None

    @property
    def kv_tokens(self) -> int:
        """Positions of KV cache that every stage of the plan has room for."""
        return kv_tokens_of(self._plan) if self._plan else 0

    def uses(self, worker: WorkerId) -> bool:
        """Return whether the plan gives layers to `worker`."""
        return any(stage.worker == worker for stage in self._plan)

    def hangs(self, worker: Worker) -> bool:
        """Return whether a worker is stuck in a task, of this session or an earlier one."""
        return worker.progress_age_s >= self._settings.task_timeout_s

    def replan(self, *, lost: WorkerId | None = None) -> list[Action]:
        """Plan for the workers that are there and have them load their layers.

        Args:
            lost: the worker of the plan that is no longer there, if that is why.
        """
        self.replan_at = None
        fit = [w for w in self._registry.workers if w.state != "unfit" and not self.hangs(w)]
        if self.epoch == 0 and len(fit) < self._settings.min_workers:
            self.note = (
                f"{len(fit)} of {self._settings.min_workers} workers have joined. "
                "Start the others with `dllm worker`."
            )
            return []
        try:
            plan = self._make_plan(fit)
        except (NotEnoughMemory, ConfigError, NotReady) as exc:
            return self._cannot_serve(exc, lost)
        if plan == self._plan and lost is None:
            return []
        return self._load(plan, fit)

    def _make_plan(self, workers: list[Worker]) -> Plan:
        if not workers:
            raise NotReady("No worker is there. Start one with `dllm worker`.")
        return make_plan(
            self._model.cost,
            [Offer(worker.id, worker.capabilities.memory_bytes) for worker in workers],
            strategy=self._settings.strategy,
            kv_tokens=min(self._settings.min_kv_tokens, self._model.defaults.context_length),
            layers=self._settings.layers,
        )

    def _cannot_serve(self, error: DistributedLLMError, lost: WorkerId | None) -> list[Action]:
        if lost is None and self._plan:
            return [self._journal.note(f"the plan stays: {error}", "warning")]
        actions: list[Action] = []
        if lost is not None:
            self.epoch += 1
            for worker in self._registry.workers:
                if worker.layers is not None:
                    worker.assign(None)
                    actions.append(Send(worker.peer, DropStage(epoch=self.epoch)))
            broken = WorkerLost(f"Worker {lost} serves its layers no longer. {error}")
            actions += self._desk.fail_all(broken)
        self._leave_plan()
        self.state, self._plan, self.note = "waiting", (), str(error)[:4096]
        return [*actions, self._journal.note(f"waiting: {error}", "warning")]

    def _load(self, plan: Plan, workers: list[Worker]) -> list[Action]:
        self._leave_plan()
        self.epoch += 1
        self.state, self._plan, self.note = "loading", plan, ""
        self._ready = {}
        self._desk.expect_capacity(kv_tokens_of(plan))
        stages = {stage.worker: stage for stage in plan}
        actions: list[Action] = []
        for worker in workers:
            stage = stages.get(worker.id)
            if stage is None:
                if worker.layers is not None:
                    actions.append(Send(worker.peer, DropStage(epoch=self.epoch)))
                worker.assign(None)
                continue
            worker.assign(stage.layers)
            load = LoadStage(
                epoch=self.epoch,
                source=self._model.source,
                layers=stage.layers,
                dtype=self._model.dtype,
                digest=self._model.digest(stage.layers),
                kv_tokens=stage.kv_tokens,
            )
            actions.append(Send(worker.peer, load))
        cuts = ", ".join(f"{stage.worker} {stage.layers}" for stage in plan)
        return [*actions, self._journal.note(f"plan {self.epoch}: layers {cuts}")]

    def _leave_plan(self) -> None:
        if self.pipeline:
            self._next_step = self.pipeline.next_step
            self.pipeline = None

    def stage_ready(self, worker: Worker, ready: StageReady) -> list[Action]:
        """Take it that a worker has loaded its layers; once all have, serve."""
        if ready.epoch != self.epoch or worker.state != "loading":
            self._journal.rejected["stale_epoch"] += 1
            return []
        worker.state = "serving"
        worker.weight_bytes = ready.weight_bytes
        self._ready[worker.peer] = ready.credits
        actions: list[Action] = [
            self._journal.note(
                f"worker {worker.id} loaded layers {worker.layers} in {ready.load_s:.1f} s"
            )
        ]
        if len(self._ready) < len(self._plan):
            return actions
        peers = {w.id: w.peer for w in self._registry.workers}
        self.pipeline = Pipeline(
            self.epoch,
            [(peers[s.worker], s.layers, self._ready[peers[s.worker]]) for s in self._plan],
            dtype=self._model.dtype,
            hidden_size=self._model.hidden_size,
            vocab_size=self._model.defaults.vocab_size,
            first_step=self._next_step,
            task_timeout_s=self._settings.task_timeout_s,
        )
        self.state = "serving"
        actions += self._desk.set_capacity(kv_tokens_of(self._plan))
        return [
            *actions,
            self._journal.note(f"serving: {kv_tokens_of(self._plan)} positions of KV cache"),
        ]

    def stage_failed(self, worker: Worker, failed: StageFailed) -> list[Action]:
        """Take it that a worker cannot load its layers: plan without it."""
        if failed.epoch != self.epoch or worker.layers is None:
            self._journal.rejected["stale_epoch"] += 1
            return []
        worker.assign(None)
        worker.state, worker.note = "unfit", failed.message
        actions: list[Action] = [
            self._journal.note(f"worker {worker.id} cannot serve: {failed.message}", "error")
        ]
        if failed.code == UnsupportedModel.code:
            return [*actions, Stop(UnsupportedModel(failed.message))]
        return actions + self.replan(lost=worker.id)

    def validate(self) -> None:
        """Assert the invariants; tests call this after every step."""
        if self.pipeline:
            self.pipeline.validate()
        assert (self.state == "serving") == (self.pipeline is not None)
        assert (self.state == "waiting") == (not self._plan)
        at = 0
        for stage in self._plan:
            assert stage.layers.start == at
            at = stage.layers.stop
        assert at == (self._model.cost.num_layers if self._plan else 0)
