"""Which plans are served or loaded, and how one follows another. Pure.

    waiting --enough workers--> loading --every stage ready--> serving
       ^                        |  ^                              |
       '---nobody can hold it---'  '---a worker came or was lost--'

The model may be served several times, each time by workers of their own (`replicas`). Every plan
has a larger epoch than all before; answers of an older epoch are dropped. How one plan becomes
another while requests run is the matter of `relocation`.
"""

from collections.abc import Callable, Mapping, Sequence
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
from distributed_llm.common.types import LayerRange, PeerId
from distributed_llm.coordinator.core_settings import CoreSettings
from distributed_llm.coordinator.desk import Desk
from distributed_llm.coordinator.events import Action, Send, Stop
from distributed_llm.coordinator.journal import Journal
from distributed_llm.coordinator.model import ServedModel
from distributed_llm.coordinator.moves import Move
from distributed_llm.coordinator.planner import Plan
from distributed_llm.coordinator.planning import Planning
from distributed_llm.coordinator.registry import Registry, Worker
from distributed_llm.coordinator.replica import Replica, ReplicaSettings
from distributed_llm.coordinator.requests import Seat


class Placement:
    """The plans of the moment.

    Args:
        model: what is served.
        settings: how.
        registry: the workers.
        desk: the requests; they end when nobody can serve them.
        journal: takes what happens.
        planning: makes plans.
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
        planning: Planning,
        draw_key: Callable[[], str],
    ) -> None:
        self._model = model
        self._settings = settings
        self._registry = registry
        self._desk = desk
        self._journal = journal
        self._planning = planning
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

    def needed_tokens(self, replica: Replica) -> int:
        """Return the positions without which another plan would cost requests of this one."""
        used = replica.scheduler.kv_tokens_used if replica.scheduler else 0
        return max(used, min(self._desk.most_reserved, replica.kv_tokens))

    @property
    def complete(self) -> bool:
        """Whether the model is served as often as is wanted."""
        wanted = self._settings.replicas
        return len(self._replicas) >= (1 if wanted == "auto" else wanted)

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
        if self.epoch == 0 and len(fit) < self._settings.min_workers:
            self.note = (
                f"{len(fit)} of {self._settings.min_workers} workers have joined. "
                "Start the others with `dllm worker`."
            )
            return []
        try:
            plans = self._planning.plans(fit)
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
        try:
            plan = self._planning.plan(self.idle_workers)
        except (NotEnoughMemory, ConfigError, NotReady):
            return []
        return self._load_all([plan])

    def serve_also(self, plan: Plan) -> list[Action]:
        """Serve the model once more, by workers that have no layers."""
        return self._load_all([plan])

    def lose(self, worker: Worker) -> list[Action]:
        """A worker of a plan is no longer there: plan anew for those that it leaves behind."""
        replica = self._of.get(worker.peer)
        if replica is None:
            return []
        self._dissolve(replica)
        try:
            return self._load_all([self._planning.plan(self.idle_workers)])
        except (NotEnoughMemory, ConfigError, NotReady) as exc:
            if self._replicas:
                text = f"{len(self._replicas)} pipelines are left to serve the model: {exc}"
                note = self._journal.note(text, "warning")
                self.replan_when_idle = True
                return [*self._drop_unused(), note, *self._tell_capacity()]
            self.epoch += 1
            broken = WorkerLost(f"Worker {worker.id} serves its layers no longer. {exc}")
            return [*self._drop_unused(), *self._desk.fail_all(broken), *self._wait(exc)]

    # -------------------------------------------------------------- carrying it out

    def _wait(self, error: DistributedLLMError) -> list[Action]:
        self.note, self.replan_when_idle = str(error)[:4096], False
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
            self._desk.collect(replica.scheduler)
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
        replica, key = self._new_replica(plan), self._draw_key()
        self._replicas[replica.epoch] = replica
        for seat in replica.seats:
            self._of[seat.peer] = replica
            self._worker(seat).assign(seat.layers, epoch=replica.epoch)
        text = f"plan {replica.epoch}: layers {replica.layers_text}"
        return [*self._load_stages(replica, key), self._journal.note(text)]

    def _new_replica(self, plan: Plan) -> Replica:
        self.epoch += 1
        peers = {worker.id: worker.peer for worker in self._registry.workers}
        return Replica(
            self.epoch,
            plan,
            tuple(Seat(peers[s.worker], s.worker, s.layers) for s in plan),
            self._replica_settings(),
            new_sequence_id=lambda: next(self._sequence_ids),
            on_change=self._note_change,
        )

    def _load_stages(
        self,
        replica: Replica,
        key: str,
        *,
        beside: bool = False,
        imports: Mapping[PeerId, tuple[LayerRange, ...]] | None = None,
    ) -> list[Action]:
        """Return the orders to load; who is dialled comes first, to know the epoch by then."""
        actions: list[Action] = []
        for seat, following in pairwise((*replica.seats, None)):
            assert seat is not None
            after = None if following is None else self._worker(following)
            order = LoadStage(
                epoch=replica.epoch,
                source=self._model.source,
                layers=seat.layers,
                dtype=self._model.dtype,
                wire_dtype=self._settings.wire_dtype or self._model.dtype,
                digest=self._model.digest(seat.layers),
                kv_tokens=next(s.kv_tokens for s in replica.plan if s.worker == seat.worker),
                link_key=key,
                next_stage=None
                if after is None
                else NextStage(worker=after.id, addresses=after.peer_addresses),
                beside=beside,
                imports=(imports or {}).get(seat.peer, ()),
            )
            actions.append(Send(seat.peer, order))
        return actions[::-1]

    def _worker(self, seat: Seat) -> Worker:
        worker = self._registry.worker(seat.peer)
        assert worker is not None
        return worker

    def replace(self, old: Replica, plan: Plan, *, why: str) -> list[Action]:
        """Load a plan in place of one: for workers that cannot hold the layers of both.

        Args:
            plan: by workers of `old` and idle ones.
        """
        text = f"plan {old.epoch} ends, and another one is loaded in its place: {why}"
        self._dissolve(old)
        actions = self._load_all([plan])
        new = self._replicas[self.epoch]
        new.demand, new.balancer = old.demand, old.balancer
        return [self._journal.note(text), *actions]

    # -------------------------------------------------------------- from one plan to another

    def prepare(
        self, old: Replica, plan: Plan, *, copies: bool, copy_s: float, now: float
    ) -> tuple[Move, list[Action]]:
        """Have the stages of a plan load beside those of a pipeline that serves.

        Args:
            plan: by workers of `old` and idle ones.
            copies: whether the KV cache goes along.
            copy_s: how long that should take.
        """
        new, key = self._new_replica(plan), self._draw_key()
        addresses = {seat.peer: self._worker(seat).peer_addresses for seat in new.seats}
        move = Move(
            old,
            new,
            addresses=addresses,
            link_key=key,
            copies=copies,
            copy_s=copy_s,
            now=now,
        )
        imports: dict[PeerId, tuple[LayerRange, ...]] = {}
        for transfer in move.transfers:
            peer = transfer.receiver.peer
            imports[peer] = (*imports.get(peer, ()), transfer.layers)
        for seat in new.seats:
            worker = self._worker(seat)
            if self._of.get(seat.peer) is old:
                worker.prepare(seat.layers)
            else:
                self._of[seat.peer] = new
                worker.assign(seat.layers, epoch=new.epoch)
        return move, self._load_stages(new, key, beside=True, imports=imports)

    def swap(self, move: Move) -> list[Action]:
        """Serve what a move leads to; the old pipeline is no more."""
        old, new = move.old, move.new
        del self._replicas[old.epoch]
        self.changed.pop(old.epoch, None)
        self._replicas[new.epoch] = new
        for seat in old.seats:
            del self._of[seat.peer]
        for seat in new.seats:
            self._of[seat.peer] = new
            worker = self._worker(seat)
            worker.switch(epoch=new.epoch, weight_bytes=new.weight_bytes_of(seat.peer))
            worker.link = new.link_of(seat.peer)
        for seat in old.seats:
            if seat.peer not in self._of:
                worker = self._worker(seat)
                worker.unassign()
                worker.epoch = 0
        new.demand, new.balancer = old.demand, old.balancer
        if move.copies:
            new.take_over(old)
        else:
            assert old.scheduler is not None
            self._desk.collect(old.scheduler)
            self._desk.requeue(old.scheduler.evacuate())
            old.pipeline = old.scheduler = None
            new.serve()
        return [*move.commit(), *self._tell_capacity()]

    def cancel(self, move: Move) -> list[Action]:
        """Go on with what a move would have left."""
        for seat in move.new.seats:
            worker = self._registry.worker(seat.peer)
            if self._of.get(seat.peer) is move.new:
                del self._of[seat.peer]
                if worker is not None:
                    worker.unassign()
                    worker.epoch = 0
            elif worker is not None:
                worker.next_layers = None
        there = {worker.peer for worker in self._registry.workers}
        return [send for send in move.undo() if send.peer in there]

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
        worker.loaded(ready.weight_bytes, ready.load_s)
        note = f"worker {worker.id} loaded layers {worker.layers} in {ready.load_s:.1f} s"
        actions: list[Action] = [self._journal.note(note)]
        if replica.stage_ready(worker.peer, ready):
            replica.serve()
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
            assert replica.seats[0].layers.start == 0
            for seat in replica.seats:
                assert self._of[seat.peer] is replica
                worker = self._registry.worker(seat.peer)
                assert worker is not None
                assert (worker.layers, worker.epoch) == (seat.layers, epoch)
                assert worker.state in ("loading", "serving")
        served = {seat.peer for r in self._replicas.values() for seat in r.seats}
        loading = {peer for peer, r in self._of.items() if r.epoch not in self._replicas}
        assert set(self._of) == served | loading
        assert len(served) == sum(len(r.seats) for r in self._replicas.values())
