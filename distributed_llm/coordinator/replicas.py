"""The pipelines of the moment: who is part of which, and how they come, change and go. Pure.

Every plan that is loaded has a larger epoch than all before; answers of an older epoch are dropped.
A pipeline can take the place of another while requests run: its stages load beside the old ones,
and go on where those stop. What happens meanwhile is the matter of `moves`.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import count, pairwise

from distributed_llm.common.messages import DropStage, LoadStage, NextStage
from distributed_llm.common.types import LayerRange, PeerId, WorkerId
from distributed_llm.coordinator.core_settings import CoreSettings
from distributed_llm.coordinator.desk import Desk
from distributed_llm.coordinator.events import Action, Send
from distributed_llm.coordinator.journal import Journal
from distributed_llm.coordinator.model import ServedModel
from distributed_llm.coordinator.moves import Move
from distributed_llm.coordinator.planner import Plan
from distributed_llm.coordinator.registry import Registry, Worker
from distributed_llm.coordinator.replica import Replica, ReplicaSettings
from distributed_llm.coordinator.requests import Seat


class Replicas:
    """All pipelines, served or loaded, and what their workers are told of it.

    Args:
        model: what is served.
        settings: how.
        registry: the workers.
        desk: the requests; they wait while their pipeline is gone.
        journal: takes what happens.
        draw_key: gives random keys, with which workers know each other.
        wants_trials: whether a worker should try steps of several sizes on its first layers.

    Attributes:
        epoch: of the newest plan; 0 before the first.
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
        wants_trials: Callable[[WorkerId], bool],
    ) -> None:
        self._model = model
        self._settings = settings
        self._registry = registry
        self._desk = desk
        self._journal = journal
        self._draw_key = draw_key
        self._wants_trials = wants_trials
        self._replicas: dict[int, Replica] = {}  # by epoch
        self._of: dict[PeerId, Replica] = {}
        self._sequence_ids = count(1)
        self.epoch = 0
        self.changed: dict[int, Replica] = {}

    @property
    def all(self) -> list[Replica]:
        """What is served or loaded, but not what loads beside it; the newest comes last."""
        return list(self._replicas.values())

    def of(self, peer: PeerId) -> Replica | None:
        """Return what the worker at `peer` is part of."""
        return self._of.get(peer)

    @property
    def kv_tokens(self) -> int:
        """Positions of KV cache in all of them."""
        return sum(replica.kv_tokens for replica in self._replicas.values())

    def tell_capacity(self) -> list[Action]:
        """Tell the desk the room of the largest pipeline: what exceeds it cannot be served."""
        rooms = [replica.kv_tokens for replica in self._replicas.values()]
        return self._desk.set_capacity(max(rooms)) if rooms else []

    # -------------------------------------------------------------- to come and to go

    def load(self, plans: Sequence[Plan]) -> list[Action]:
        """Have workers that are part of nothing load plans; free what others hold in vain."""
        actions = [action for plan in plans for action in self._load(plan)]
        return [*self.drop_unused(), *actions, *self.tell_capacity()]

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

    def dissolve(self, replica: Replica) -> None:
        """Give a pipeline up; its requests wait for another."""
        del self._replicas[replica.epoch]
        self.changed.pop(replica.epoch, None)
        for seat in replica.seats:
            self._of.pop(seat.peer, None)
            worker = self._registry.worker(seat.peer)
            if worker is not None and worker.layers is not None:
                worker.unassign()
        self._evacuate(replica)

    def _evacuate(self, replica: Replica) -> None:
        """Have the requests of a pipeline wait for another; it serves no more."""
        if replica.scheduler:
            self._desk.collect(replica.scheduler)
            self._desk.requeue(replica.scheduler.evacuate())
        replica.pipeline = replica.scheduler = None

    def drop_unused(self) -> list[Action]:
        """Return the messages that free layers which no pipeline needs any more."""
        actions: list[Action] = []
        for worker in self._registry.workers:
            if worker.layers is None and worker.epoch:
                worker.epoch = 0
                actions.append(Send(worker.peer, DropStage(epoch=self.epoch)))
        return actions

    def end_epoch(self) -> list[Action]:
        """Have what is still said of the newest plan dropped; free what nobody needs."""
        self.epoch += 1
        return self.drop_unused()

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
            self._evacuate(old)
            new.serve()
        return [*move.commit(), *self.tell_capacity()]

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

    # -------------------------------------------------------------- what workers are told

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
                trials=self._wants_trials(seat.worker),
                imports=(imports or {}).get(seat.peer, ()),
            )
            actions.append(Send(seat.peer, order))
        return actions[::-1]

    def _worker(self, seat: Seat) -> Worker:
        worker = self._registry.worker(seat.peer)
        assert worker is not None
        return worker

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
