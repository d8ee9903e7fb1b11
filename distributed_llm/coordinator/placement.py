"""Which plans are served or loaded, and how one follows another. Pure.

    waiting --enough workers--> loading --every stage ready--> serving
       ^                        |  ^                              |
       '---nobody can hold it---'  '---a worker came or was lost--'

The model may be served several times, each time by workers of their own (`replicas`). Every plan
has a larger epoch than all before; answers of an older epoch are dropped.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise
from typing import Literal

from distributed_llm.common.errors import (
    ConfigError,
    DistributedLLMError,
    NotEnoughMemory,
    NotReady,
    UnsupportedModel,
    WorkerLost,
)
from distributed_llm.common.messages import (
    DropStage,
    LoadStage,
    NextStage,
    StageFailed,
    StageReady,
)
from distributed_llm.common.tensors import DtypeName
from distributed_llm.common.types import LayerRange, PeerId
from distributed_llm.coordinator.desk import Desk
from distributed_llm.coordinator.events import Action, Send, Stop
from distributed_llm.coordinator.journal import Journal
from distributed_llm.coordinator.model import ServedModel
from distributed_llm.coordinator.planner import Offer, Plan, Strategy, make_plan
from distributed_llm.coordinator.registry import Registry, Worker
from distributed_llm.coordinator.replica import Replica, ReplicaSettings
from distributed_llm.coordinator.requests import Seat


@dataclass(frozen=True)
class CoreSettings:
    """How the coordinator decides; times in seconds.

    Attributes:
        layers: the layers of each worker, for strategy "custom".
        replicas: how many times to serve the model, if there are workers enough.
        wire_dtype: of activations between stages; None is the model's.
        min_workers: workers to wait for before the first plan.
        settle_s: quiet time after a join before planning.
        max_batch_sequences: that run at the same time on one pipeline.
        max_batch_tokens: tokens in one step.
        min_kv_tokens: positions of KV cache that a plan must have room for.
        task_timeout_s: without progress, after which a step is computed again.
    """

    strategy: Strategy = "memory"
    layers: Mapping[str, LayerRange] = field(default_factory=dict)
    replicas: int = 1
    wire_dtype: DtypeName | None = None
    min_workers: int = 1
    settle_s: float = 0.5
    max_batch_sequences: int = 256
    max_batch_tokens: int = 512
    max_waiting_requests: int = 256
    min_kv_tokens: int = 1024
    heartbeat_interval_s: float = 1.0
    silence_timeout_s: float = 4.0
    task_timeout_s: float = 30.0


class Placement:
    """The plans of the moment.

    Args:
        model: what is served.
        settings: how.
        registry: the workers.
        desk: the requests; they end when nobody can serve them.
        journal: takes what happens.
        draw_key: gives random keys, with which workers know each other.

    Attributes:
        note: why nothing is served.
        epoch: of the newest plan; 0 before the first.
        replan_at: when to plan for a worker that joined, clock seconds, or None.
        replan_when_idle: a better plan may be possible, but requests are running.
        changed: replicas in which something may be started, by epoch; whoever reads it empties it.
    """

    def __init__(
        self,
        model: ServedModel,
        settings: CoreSettings,
        registry: Registry,
        desk: Desk,
        journal: Journal,
        draw_key: Callable[[], str],
    ) -> None:
        self._model = model
        self._settings = settings
        self._registry = registry
        self._desk = desk
        self._journal = journal
        self._draw_key = draw_key
        self._replicas: dict[int, Replica] = {}  # by epoch
        self._of: dict[PeerId, Replica] = {}
        self._sequence_ids = count(1)
        self.note = "No worker has joined."
        self.epoch = 0
        self.replan_at: float | None = None
        self.replan_when_idle = False
        self.changed: dict[int, Replica] = {}

    @property
    def state(self) -> Literal["waiting", "loading", "serving"]:
        """Of the cluster."""
        if any(replica.pipeline for replica in self._replicas.values()):
            return "serving"
        return "loading" if self._replicas else "waiting"

    @property
    def replicas(self) -> list[Replica]:
        """What is served or loaded, oldest first."""
        return list(self._replicas.values())

    def replica_of(self, peer: PeerId) -> Replica | None:
        """Return what the worker at `peer` is part of."""
        return self._of.get(peer)

    @property
    def kv_tokens(self) -> int:
        """Positions of KV cache in all pipelines."""
        return sum(replica.kv_tokens for replica in self._replicas.values())

    @property
    def complete(self) -> bool:
        """Whether the model is served as often as is wanted."""
        return len(self._replicas) >= self._settings.replicas

    def hangs(self, worker: Worker) -> bool:
        """Return whether a worker is stuck in a task, of this session or an earlier one."""
        return worker.progress_age_s >= self._settings.task_timeout_s

    # -------------------------------------------------------------- planning

    def replan(self) -> list[Action]:
        """Plan for all workers that are there; what has to change loads its layers."""
        self.replan_at, self.replan_when_idle = None, False
        fit = self._fit_workers()
        if self.epoch == 0 and len(fit) < self._settings.min_workers:
            self.note = (
                f"{len(fit)} of {self._settings.min_workers} workers have joined. "
                "Start the others with `dllm worker`."
            )
            return []
        try:
            plans = self._make_plans(fit)
        except (NotEnoughMemory, ConfigError, NotReady) as exc:
            if self._replicas:
                return [self._journal.note(f"the plan stays: {exc}", "warning")]
            return self._wait(exc)
        kept = {r.plan for r in self._replicas.values()} & set(plans)
        for replica in self.replicas:
            if replica.plan not in kept:
                self._dissolve(replica)
        return self._load_all([plan for plan in plans if plan not in kept])

    def add(self) -> list[Action]:
        """Serve the model once more with workers that have no layers, if they can hold it."""
        self.replan_at, self.replan_when_idle = None, True
        idle = [worker for worker in self._fit_workers() if worker.layers is None]
        try:
            plan = self._make_plan(idle)
        except (NotEnoughMemory, ConfigError, NotReady):
            return []
        return self._load_all([plan])

    def lose(self, worker: Worker) -> list[Action]:
        """A worker of a plan is no longer there: plan anew for those that it leaves behind."""
        replica = self._of.get(worker.peer)
        if replica is None:
            return []
        self._dissolve(replica)
        idle = [other for other in self._fit_workers() if other.layers is None]
        try:
            return self._load_all([self._make_plan(idle)])
        except (NotEnoughMemory, ConfigError, NotReady) as exc:
            if self._replicas:
                text = f"the model is served {len(self._replicas)} times: {exc}"
                note = self._journal.note(text, "warning")
                self.replan_when_idle = True
                return [*self._drop_unused(), note, *self._tell_capacity()]
            self.epoch += 1
            broken = WorkerLost(f"Worker {worker.id} serves its layers no longer. {exc}")
            return [*self._drop_unused(), *self._desk.fail_all(broken), *self._wait(exc)]

    def _fit_workers(self) -> list[Worker]:
        return [w for w in self._registry.workers if w.state != "unfit" and not self.hangs(w)]

    def _make_plans(self, workers: list[Worker]) -> list[Plan]:
        """Return as many plans as are wanted, or as the workers can hold."""
        for number in range(min(self._settings.replicas, max(1, len(workers))), 1, -1):
            try:
                return [self._make_plan(group) for group in _dealt(workers, number)]
            except NotEnoughMemory:
                continue
        return [self._make_plan(workers)]

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

    # -------------------------------------------------------------- carrying it out

    def _wait(self, error: DistributedLLMError) -> list[Action]:
        self.note = str(error)[:4096]
        return [self._journal.note(f"waiting: {error}", "warning")]

    def _dissolve(self, replica: Replica) -> None:
        """Give a plan up; its requests wait for another."""
        del self._replicas[replica.epoch]
        self.changed.pop(replica.epoch, None)
        for seat in replica.seats:
            self._of.pop(seat.peer, None)
            worker = self._registry.worker(seat.peer)
            if worker is not None and worker.layers is not None:
                worker.unassign()
        if replica.scheduler:
            self._desk.requeue(replica.scheduler.evacuate())
        replica.pipeline = replica.scheduler = None

    def _drop_unused(self) -> list[Action]:
        """Return the messages that free the layers of workers that no plan needs."""
        actions: list[Action] = []
        for worker in self._registry.workers:
            if worker.layers is None and worker.epoch:
                worker.epoch = 0
                actions.append(Send(worker.peer, DropStage(epoch=self.epoch)))
        return actions

    def _load_all(self, plans: Sequence[Plan]) -> list[Action]:
        actions = [action for plan in plans for action in self._load(plan)]
        self.note = ""
        return [*self._drop_unused(), *actions, *self._tell_capacity()]

    def _load(self, plan: Plan) -> list[Action]:
        self.epoch += 1
        workers = {worker.id: worker for worker in self._registry.workers}
        seats = tuple(Seat(workers[s.worker].peer, s.worker, s.layers) for s in plan)
        replica = Replica(
            self.epoch,
            plan,
            seats,
            self._replica_settings(),
            new_sequence_id=lambda: next(self._sequence_ids),
            on_change=self._note_change,
        )
        self._replicas[self.epoch] = replica
        key = self._draw_key()
        actions: list[Action] = []
        for seat, following in pairwise((*seats, None)):
            assert seat is not None
            self._of[seat.peer] = replica
            workers[seat.worker].assign(seat.layers, epoch=self.epoch)
            after = None if following is None else workers[following.worker]
            actions.append(Send(seat.peer, self._load_stage(seat, after, key, replica)))
        actions.reverse()  # who is dialled shall know the epoch by then
        cuts = ", ".join(f"{stage.worker} {stage.layers}" for stage in plan)
        return [*actions, self._journal.note(f"plan {self.epoch}: layers {cuts}")]

    def _load_stage(
        self, seat: Seat, following: Worker | None, key: str, replica: Replica
    ) -> LoadStage:
        return LoadStage(
            epoch=replica.epoch,
            source=self._model.source,
            layers=seat.layers,
            dtype=self._model.dtype,
            wire_dtype=self._settings.wire_dtype or self._model.dtype,
            digest=self._model.digest(seat.layers),
            kv_tokens=next(s.kv_tokens for s in replica.plan if s.worker == seat.worker),
            link_key=key,
            next_stage=None
            if following is None
            else NextStage(worker=following.id, addresses=following.peer_addresses),
        )

    def _note_change(self, replica: Replica) -> None:
        self.changed[replica.epoch] = replica

    def _replica_settings(self) -> ReplicaSettings:
        return ReplicaSettings(
            wire_dtype=self._settings.wire_dtype or self._model.dtype,
            hidden_size=self._model.hidden_size,
            vocab_size=self._model.defaults.vocab_size,
            max_sequences=self._settings.max_batch_sequences,
            max_tokens=self._settings.max_batch_tokens,
            task_timeout_s=self._settings.task_timeout_s,
        )

    def _tell_capacity(self) -> list[Action]:
        """Tell the desk the room of the largest pipeline: what exceeds it cannot be served."""
        rooms = [replica.kv_tokens for replica in self._replicas.values()]
        return self._desk.set_capacity(max(rooms)) if rooms else []

    # -------------------------------------------------------------- what workers tell

    def stage_ready(self, worker: Worker, ready: StageReady) -> list[Action]:
        """Take it that a worker has loaded its layers; once all of its plan have, serve."""
        replica = self._of.get(worker.peer)
        if replica is None or ready.epoch != replica.epoch or worker.state != "loading":
            self._journal.rejected["stale_epoch"] += 1
            return []
        worker.state = "serving"
        worker.weight_bytes = ready.weight_bytes
        note = f"worker {worker.id} loaded layers {worker.layers} in {ready.load_s:.1f} s"
        actions: list[Action] = [self._journal.note(note)]
        if replica.stage_ready(worker.peer, ready):
            actions += self._tell_capacity()
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
            self._dissolve(self._of[worker.peer])
            return [*actions, Stop(UnsupportedModel(failed.message))]
        return actions + self.lose(worker)

    def validate(self) -> None:
        """Assert the invariants; tests call this after every step."""
        for epoch, replica in self._replicas.items():
            assert replica.epoch == epoch <= self.epoch
            replica.validate()
            assert replica.seats[-1].layers.stop == self._model.cost.num_layers
            for seat in replica.seats:
                assert self._of[seat.peer] is replica
                worker = self._registry.worker(seat.peer)
                assert worker is not None
                assert (worker.layers, worker.epoch) == (seat.layers, epoch)
                assert worker.state in ("loading", "serving")
        assert len(self._of) == sum(len(r.seats) for r in self._replicas.values())


def _dealt(workers: Sequence[Worker], number: int) -> list[list[Worker]]:
    """Return the workers in groups of about the same memory: largest first, to and fro."""
    ranked = sorted(workers, key=lambda w: (-w.capabilities.memory_bytes, w.id))
    groups: list[list[Worker]] = [[] for _ in range(number)]
    for at, worker in enumerate(ranked):
        turn, place = divmod(at, number)
        groups[place if turn % 2 == 0 else number - 1 - place].append(worker)
    return groups
