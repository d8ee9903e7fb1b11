"""Carries out moves of layers between workers, one at a time. Pure.

A move that fails in any state is undone, and the pipeline goes on as it was.
"""

from collections import Counter
from collections.abc import Sequence

from distributed_llm.common.messages import (
    HandedOver,
    KVCopied,
    KVFailed,
    StageFailed,
    StageReady,
)
from distributed_llm.common.types import NO_EPOCH, Epoch, LayerRange, WorkerId
from distributed_llm.coordinator.cluster.cluster import Cluster
from distributed_llm.coordinator.cluster.move import (
    COPY_SLOWDOWN,
    Move,
    MoveReason,
    MoveState,
)
from distributed_llm.coordinator.cluster.move_price import MovePrices, Price, added_bytes
from distributed_llm.coordinator.cluster.worker import Worker
from distributed_llm.coordinator.events import Action, Send
from distributed_llm.coordinator.plan import Plan
from distributed_llm.coordinator.serving.event_log import EventKind
from distributed_llm.coordinator.serving.pipeline import Pipeline, PipelineState

_STARVED_S = 10.0
"""Seconds that a request may wait because old and new layers take the room for it."""


class Moves:
    """The moves of one cluster.

    Attributes:
        move: the one that is under way, or None.
        prices: tells what moves are expected to cost.
        num_moves: that were committed.
        begun: moves that were begun, by reason.
        copied_bytes: KV cache that was copied in moves, by reason.
        stall_s: how long answers stood still in the latest one, s; 0 if none ran meanwhile.
        failures: how many moves in a row were undone, without those that showed for the first time
            that two workers cannot reach each other.
        undone_at: when the latest move was undone, clock seconds.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._pipelines = cluster.pipelines
        self._log = cluster.event_log
        self.prices = MovePrices(cluster)
        self.move: Move | None = None
        self.num_moves = 0
        self.begun: Counter[str] = Counter()
        self.copied_bytes: Counter[str] = Counter()
        self.stall_s = 0.0
        self.failures = 0
        self.undone_at = 0.0

    def next_layers(self, worker: Worker) -> LayerRange | None:
        """Return what a worker that serves is about to serve instead, if a move is under way."""
        move = self.move
        if move is None or self._pipelines.pipeline_of(worker.peer) is not move.old:
            return None
        stage = move.new_stage(worker.peer)
        return stage.layers if stage else None

    def loading(self, epoch: Epoch) -> Pipeline | None:
        """Return the pipeline that a move is to lead to, if it has this epoch."""
        return self.move.new if self.move and self.move.new.epoch == epoch else None

    def concerns(self, worker: Worker, epoch: Epoch) -> bool:
        """Return whether a move to this epoch is under way in which a worker has a part."""
        return self._move_of(worker, epoch) is not None

    def is_loading(self, worker: Worker, epoch: Epoch) -> bool:
        """Return whether a worker loads a stage of this epoch for a move."""
        move = self._move_of(worker, epoch)
        return move is not None and move.new_stage(worker.peer) is not None

    # -------------------------------------------------------------- beginning

    def begin(
        self,
        old: Pipeline,
        plan: Plan,
        price: Price,
        *,
        why: str,
        reason: MoveReason = "faster",
        now: float,
    ) -> list[Action]:
        """Move a pipeline that serves to a plan of its own workers and idle ones.

        Args:
            old: the pipeline.
            plan: for it.
            price: of this move; there is room for old and new layers.
            why: what it is for, for people.
            reason: the same, one of a few.
            now: clock seconds.
        """
        assert self.move is None
        assert price.kv_tokens is not None
        assert old.scheduler is not None
        old.scheduler.trim(price.cached_tokens)
        old.scheduler.resize(price.kv_tokens)
        new, key = self._pipelines.new_pipeline(plan), self._pipelines.draw_key()
        self._pipelines.assign(new)
        move = self.move = Move(
            old,
            new,
            addresses={
                stage.peer: self._pipelines.worker(stage).peer_addresses for stage in new.stages
            },
            keys={stage.peer: self._pipelines.worker(stage).key for stage in new.stages},
            link_key=key,
            price=price,
            why=why,
            reason=reason,
            now=now,
        )
        self.begun[reason] += 1
        orders = self._pipelines.load_orders(new, key, beside=old.epoch, transfers=move.transfers)
        note = self._log.note(
            EventKind.MOVE_BEGAN,
            epoch=new.epoch,
            layer_map=new.layer_map,
            before=old.layer_map,
            how="" if price.copies else ", computing its KV cache again",
            why=why,
        )
        return [*orders, note]

    def replace(self, old: Pipeline, plan: Plan, *, why: str) -> list[Action]:
        """Load a plan in place of a pipeline whose workers cannot hold the layers of both.

        Args:
            plan: of workers of `old` and idle ones.
        """
        self._pipelines.dissolve(old)
        actions = self._pipelines.load([plan])
        self._pipelines.all[-1].lineage = old.lineage
        note = self._log.note(
            EventKind.PLAN_REPLACED, epoch=old.epoch, layer_map=old.layer_map, why=why
        )
        return [note, *actions]

    # -------------------------------------------------------------- what workers tell

    def stage_ready(self, worker: Worker, ready: StageReady, *, now: float) -> Sequence[Action]:
        """Record that a stage of the move has loaded; once all have, copy KV cache."""
        move = self._move_of(worker, ready.epoch)
        stage = move.new_stage(worker.peer) if move else None
        if move is None or stage is None:
            return []
        before = worker.layers if self._pipelines.pipeline_of(worker.peer) is move.old else None
        read_bytes = added_bytes(
            self._cluster.model.cost_at(move.old.quantize), before, stage.layers
        )
        worker.learn_load(stage.layers, ready, read_bytes)
        if move.state is not MoveState.LOADING or not move.new.stage_ready(worker.peer, ready):
            return []
        return move.loaded(now=now)

    def stage_failed(self, worker: Worker, failed: StageFailed, *, now: float) -> list[Action]:
        """Undo the move: a stage of it cannot be loaded."""
        actions = self.undo(f"{worker.id} cannot load its layers: {failed.message}", now=now)
        if worker.layers is None:
            worker.fail(failed.message, now=now)
        return actions

    def served_stage_failed(
        self, worker: Worker, failed: StageFailed, *, now: float
    ) -> list[Action]:
        """Undo the move if a worker no longer serves the layers that it has meanwhile."""
        move = self.move
        if move is None or failed.epoch != move.old.epoch:
            return []
        if self._pipelines.pipeline_of(worker.peer) is not move.old:
            return []
        return self.undo(f"{worker.id} cannot serve its layers: {failed.message}", now=now)

    def copied(self, worker: Worker, said: KVCopied, *, now: float) -> Sequence[Action]:
        """Record that a worker has copied its KV cache."""
        move = self._move_of(worker, said.epoch)
        if move is None or move.state is not MoveState.COPYING:
            return []
        self.prices.copied(said.bytes_sent, now - move.state_at)
        move.copied_bytes += said.bytes_sent
        self.copied_bytes[move.reason] += said.bytes_sent
        return move.copied(worker.peer, now=now)

    def handed_over(self, worker: Worker, said: HandedOver) -> None:
        """Record that a new stage has its KV cache."""
        move = self._move_of(worker, said.epoch)
        if move is not None:
            move.handed_over(worker.peer)

    def kv_failed(self, worker: Worker, failed: KVFailed, *, now: float) -> list[Action]:
        """Undo the move: KV cache cannot be sent, received or assembled.

        Later moves between the same two workers do not copy.
        """
        move = self._move_of(worker, failed.epoch)
        if move is None:
            return []
        pair = (worker.id, WorkerId(failed.worker))
        planned = any(transfer.pair == pair for transfer in move.transfers)
        actions = self.undo(f"{worker.id}: {failed.message}", now=now)
        if planned and self.prices.unreachable(*pair):
            self.failures -= 1
        return actions

    def lost(self, worker: Worker, *, now: float) -> list[Action]:
        """Undo the move if a worker that has a part in it is no longer there."""
        self.prices.forget(worker.id)
        if self.move and self.move.concerns(worker.peer):
            return self.undo(f"worker {worker.id} was lost", now=now)
        return []

    # -------------------------------------------------------------- ending

    def undo(self, why: str, *, now: float) -> list[Action]:
        """Undo the move; the old pipeline goes on."""
        assert self.move is not None
        move, self.move = self.move, None
        self.failures += 1
        self.undone_at = now
        if move.old.scheduler is not None:
            move.old.scheduler.resize(move.old.kv_tokens)
        move.new.dissolve()
        for worker in self._pipelines.unassign(move.new):
            worker.epoch = NO_EPOCH
        orders = [send for send in move.undo() if self._cluster.registry.worker(send.peer)]
        note = self._log.note(
            EventKind.MOVE_UNDONE, epoch=move.new.epoch, layer_map=move.new.layer_map, why=why
        )
        return [*orders, note]

    def settle(self, *, now: float) -> list[Action]:
        """Let the move go on if no step is in flight any more; commit it if it can be."""
        move = self.move
        if move is None:
            return []
        if move.state not in (MoveState.LOADING, MoveState.COMMITTED):
            room = move.new.kv_tokens
            needed = self._cluster.needed_tokens(move.old, move.new.kv_windows)
            if room < needed:
                why = f"the new stages have room for {room} tokens, and requests need {needed}"
                return self.undo(why, now=now)
        orders = move.settle(now=now)
        return self._commit(move, now) if move.state is MoveState.COMMITTED else [*orders]

    def _commit(self, move: Move, now: float) -> list[Action]:
        assert move.paused_at is not None
        self.move = None
        self.failures = 0
        self.num_moves += 1
        stall_s = now - move.paused_at
        self.prices.stall_s = max(0.0, stall_s - move.price.handover_s)
        self.stall_s = stall_s if move.old.num_running else 0.0
        self._pipelines.commit(move.old, move.new)
        if move.copies:
            move.new.continue_from(move.old)
        else:
            self._pipelines.requeue(move.old)
            move.new.serve()
        note = self._log.note(
            EventKind.MOVE_COMMITTED,
            epoch=move.new.epoch,
            layer_map=move.new.layer_map,
            took_s=now - move.began_at,
            stood_still=(self.stall_s, now - move.state_at) if self.stall_s else None,
        )
        sends: list[Send] = move.commit_orders()
        return [*sends, *self._pipelines.tell_capacity(), note]

    def next_deadline(self) -> float | None:
        """Return when the move, or a request that waits for its end, has lasted too long."""
        deadlines = (self.move.next_deadline(), self._starved_at()) if self.move else ()
        return min([at for at in deadlines if at is not None], default=None)

    def _starved_at(self) -> float | None:
        """Return when a request has waited too long for room that the move takes, clock seconds."""
        if self.move is None or self.move.old.scheduler is None:
            return None
        since = self._cluster.book.waiting.set_aside_since(self.move.old.longest_tokens)
        return None if since is None else max(since, self.move.began_at) + _STARVED_S

    def on_timer(self, *, now: float) -> Sequence[Action]:
        """Undo a move whose state has lasted too long, or pause if that is COPYING."""
        at = self.next_deadline()
        if self.move is None or at is None or at > now:
            return []
        starved_at = self._starved_at()
        if starved_at is not None and starved_at <= now:
            return self.undo("a request waits for the room that it takes", now=now)
        if self.move.copies:
            self.prices.copied_slowly(COPY_SLOWDOWN)
        if self.move.state is MoveState.COPYING:
            return self.move.copy_timed_out(now=now)
        return self.undo(f"{self.move.state.value} took too long", now=now)

    def _move_of(self, worker: Worker, epoch: Epoch) -> Move | None:
        """Return the move, if it is to this epoch and the worker has a part in it."""
        move = self.move
        return move if move and move.new.epoch == epoch and move.concerns(worker.peer) else None

    def validate(self) -> None:
        """Assert the invariants; tests call this after every step."""
        move = self.move
        if move is not None:
            assert move.state not in (MoveState.COMMITTED, MoveState.UNDONE)
            paused = move.state in (MoveState.FINISHING_STEPS, MoveState.HANDOVER)
            assert (move.old.state is PipelineState.PAUSED) == paused
            assert move.old in self._pipelines.all
            assert move.new not in self._pipelines.all
            for stage in move.new.stages:
                assert self._pipelines.pipeline_of(stage.peer) in (move.old, move.new)
