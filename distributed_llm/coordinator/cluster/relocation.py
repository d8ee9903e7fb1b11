"""Carries out moves of layers between workers, one at a time. Pure.

A move that fails in any phase is undone, and the pipeline goes on as it was.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from distributed_llm.common.messages import KVCopied, KVFailed, StageFailed, StageReady
from distributed_llm.common.types import KV_BLOCK, LayerRange, WorkerId
from distributed_llm.coordinator.cluster.move import SLOW, Move, transfers_between
from distributed_llm.coordinator.cluster.pipelines import Pipelines
from distributed_llm.coordinator.cluster.registry import Registry, Worker
from distributed_llm.coordinator.events import Action
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.plan import PipelineStage, Plan
from distributed_llm.coordinator.serving.event_log import EventLog
from distributed_llm.coordinator.serving.pipeline import Pipeline
from distributed_llm.coordinator.speeds.measurements import Measurements
from distributed_llm.coordinator.speeds.work import Work

_BYTES_PER_S = 400e6
"""At which a worker is expected to load layers before it has loaded any."""

_SHARE = 0.5
"""Of the speed of a pipeline that is lost while stages load and caches are copied beside it."""

_STALL_S = 0.3
"""Expected standstill of a move before there was one."""

_CHUNK = 128

_COPY_BYTES_PER_S = 30e6
"""At which KV cache is expected to be copied, between tasks, before any was."""

_TELLING_BYTES = 1 << 20
"""Of KV cache; how long fewer take says nothing."""

_KEPT_S = 2.0
"""Prefixes kept for later go along if copying them takes no longer; the oldest ones go first."""


@dataclass(frozen=True)
class Price:
    """What a move is expected to cost.

    Attributes:
        standstill_s: how long requests stand still, or lose as much by being slower for longer.
        copies: whether it is cheaper to copy the KV cache than to compute it again.
        copy_s: how long copying it takes.
        cached_tokens: of prefixes kept for later that go along.
        kv_tokens: positions of KV cache that there is room for beside old and new layers; None if
            workers cannot hold both, so that the new ones have to be loaded after the old ones go.
    """

    standstill_s: float
    copies: bool
    copy_s: float
    cached_tokens: int
    kv_tokens: int | None


class Relocation:
    """The mover of one cluster.

    Args:
        cost: of the model.
        measurements: of the machines.

    Attributes:
        move: that is under way, or None.
        num_moves: that were carried out.
        stall_s: how long steps stood still in the latest of them.
        failures: how many moves in a row were undone.
        undone_at: when the latest of them was, clock seconds.
    """

    def __init__(
        self,
        cost: ModelCost,
        pipelines: Pipelines,
        registry: Registry,
        event_log: EventLog,
        measurements: Measurements,
    ) -> None:
        self._cost = cost
        self._pipelines = pipelines
        self._registry = registry
        self._event_log = event_log
        self._measurements = measurements
        self._apart: set[tuple[WorkerId, WorkerId]] = set()  # cannot send each other anything
        self.move: Move | None = None
        self.num_moves = 0
        self.stall_s = 0.0
        self.failures = 0
        self.undone_at = 0.0
        self._copied_bytes_per_s: float | None = None

    # -------------------------------------------------------------- what it would cost

    def price(self, old: Pipeline, plan: Plan) -> Price:
        """Return what moving a pipeline to a plan is expected to cost."""
        workers = {worker.id: worker for worker in self._registry.workers}
        stages = tuple(PipelineStage(workers[s.worker].peer, s.worker, s.layers) for s in plan)
        held = {stage.worker: stage.layers for stage in old.stages}
        tokens = old.scheduler.kv_tokens_used if old.scheduler else 0
        load_s, room = 0.0, old.kv_tokens
        for stage in stages:
            worker, before = workers[stage.worker], held.get(stage.worker)
            added = self._added_bytes(before, stage.layers)
            load_s = max(load_s, added / (worker.bytes_per_s or _BYTES_PER_S))
            own = self._cost.weight_bytes(before) if before else 0
            layers = len({*_numbers(stage.layers), *(_numbers(before) if before else ())})
            left = worker.capabilities.memory_bytes - own - added
            room = min(room, left // max(1, layers * self._cost.kv_bytes_per_token))
        transfers = transfers_between(old.stages, stages)
        apart = any((t.sender.worker, t.receiver.worker) in self._apart for t in transfers)
        most = max((len(t.layers) for t in transfers), default=0)
        token_s = most * self._cost.kv_bytes_per_token / self._copy_bytes_per_s
        cached = old.scheduler.kv_tokens_cached if old.scheduler else 0
        cached = min(cached, int(_KEPT_S / token_s)) if token_s else cached
        copy_s = (tokens + cached) * token_s
        again_s = self._compute_again_s(stages, tokens)
        copies = not apart and _SHARE * copy_s <= again_s + 1.0
        if room < tokens or room < KV_BLOCK:
            return Price(load_s + again_s, False, copy_s, cached, kv_tokens=None)
        moving_s = _SHARE * (load_s + copy_s) if copies else _SHARE * load_s + again_s
        return Price((self.stall_s or _STALL_S) + moving_s, copies, copy_s, cached, room)

    def _added_bytes(self, before: LayerRange | None, after: LayerRange) -> int:
        """Return the weights that a worker reads to have other layers."""
        if before is None:
            return self._cost.weight_bytes(after)
        cost, size = self._cost, self._cost.num_layers
        layers = set(_numbers(after)) - set(_numbers(before))
        first = after.start == 0 and before.start != 0
        last = after.stop == size and before.stop != size
        has_shared = before.start == 0 or before.stop == size
        return (
            sum(cost.layer_bytes[layer] for layer in layers)
            + cost.first_bytes * first
            + cost.last_bytes * last
            + cost.shared_bytes * ((first or last) and not has_shared)
        )

    def _compute_again_s(self, stages: Sequence[PipelineStage], tokens: int) -> float:
        """Return how long a pipeline takes to compute so many tokens of prompts."""
        prompt = Work.of_prompt(_CHUNK, _CHUNK * 256)
        slowest_s = max(
            len(stage.layers) * self._measurements.layer_s(stage.worker, prompt) for stage in stages
        )
        return tokens / _CHUNK * slowest_s

    # -------------------------------------------------------------- carrying it out

    def begin(
        self, old: Pipeline, plan: Plan, price: Price, *, why: str, now: float
    ) -> list[Action]:
        """Move a pipeline that serves to a plan, by its own workers and idle ones.

        Args:
            price: with `kv_tokens`.
        """
        assert self.move is None
        assert price.kv_tokens is not None
        assert old.scheduler is not None
        old.scheduler.trim(price.cached_tokens)
        old.scheduler.resize(price.kv_tokens)
        copies = price.copies
        before = old.layers_text
        self.move, actions = self._pipelines.prepare(
            old, plan, copies=copies, copy_s=price.copy_s, now=now
        )
        how = "" if copies else ", computing its KV cache again"
        text = (
            f"plan {self.move.new.epoch}: moving to {self.move.new.layers_text} from {before}"
            f"{how}: {why}"
        )
        return [*actions, self._event_log.note(text)]

    def replace(self, old: Pipeline, plan: Plan, *, why: str) -> list[Action]:
        """Load a plan in place of one: for workers that cannot hold the layers of both.

        Args:
            plan: by workers of `old` and idle ones.
        """
        self._pipelines.dissolve(old)
        actions = self._pipelines.load([plan])
        new = self._pipelines.all[-1]
        new.lineage = old.lineage
        text = f"plan {old.epoch} ends, and another one is loaded in its place: {why}"
        return [self._event_log.note(text), *actions]

    def stage_ready(self, worker: Worker, ready: StageReady, *, now: float) -> list[Action] | None:
        """Take it that a stage has loaded; None if it is not of the move."""
        move = self._of(worker, ready.epoch)
        if move is None or all(stage.peer != worker.peer for stage in move.new.stages):
            return None
        layers = worker.next_layers or worker.layers
        assert layers is not None
        before = worker.layers if worker.next_layers else None
        worker.loaded(self._added_bytes(before, layers), ready.load_s)
        if move.phase != "loading" or not move.new.stage_ready(worker.peer, ready):
            return []
        return [*move.loaded(now=now)]

    def stage_failed(
        self, worker: Worker, failed: StageFailed, *, now: float
    ) -> list[Action] | None:
        """Take it that a stage cannot be loaded; None if it is not of the move."""
        if self._of(worker, failed.epoch) is None:
            return None
        actions = self.cancel(f"{worker.id} cannot load its layers: {failed.message}", now=now)
        if worker.layers is None:
            worker.state, worker.note = "unfit", failed.message
        return actions

    def copied(self, worker: Worker, said: KVCopied, *, now: float) -> list[Action]:
        """Take it that a worker has sent its KV cache."""
        move = self._of(worker, said.epoch)
        if move is None or move.phase != "copying":
            return []
        if said.bytes_sent >= _TELLING_BYTES and now > move.phase_at:
            self._copied_bytes_per_s = said.bytes_sent / (now - move.phase_at)
        return [*move.copied(worker.peer, now=now)]

    @property
    def _copy_bytes_per_s(self) -> float:
        """What a worker sends of its KV cache while it serves, as seen last, or else at most."""
        measured = self._measurements.bytes_per_s
        return min(measured, self._copied_bytes_per_s or _COPY_BYTES_PER_S)

    def took_over(self, worker: Worker, epoch: int) -> list[Action]:
        """Take it that a stage has its KV cache."""
        move = self._of(worker, epoch)
        if move is not None:
            move.took_over(worker.peer)
        return []

    def kv_failed(self, worker: Worker, failed: KVFailed, *, now: float) -> list[Action]:
        """Take it that the KV cache cannot go along."""
        move = self._of(worker, failed.epoch)
        if move is None:
            return []
        pair = (worker.id, WorkerId(failed.worker))
        pairs = {(t.sender.worker, t.receiver.worker) for t in move.transfers} - self._apart
        actions = self.cancel(f"{worker.id}: {failed.message}", now=now)
        if pair in pairs:  # the next move between these two goes without
            self._apart.add(pair)
            self.failures -= 1
        return actions

    def loading(self, epoch: int) -> Pipeline | None:
        """Return the pipeline that is loading, if it has this epoch."""
        return self.move.new if self.move and self.move.new.epoch == epoch else None

    def lost(self, worker: Worker, *, now: float) -> list[Action]:
        """A worker is no longer there."""
        self._apart = {pair for pair in self._apart if worker.id not in pair}
        if self.move and self.move.concerns(worker.peer):
            return self.cancel(f"worker {worker.id} was lost", now=now)
        return []

    def cancel(self, why: str, *, now: float) -> list[Action]:
        """Undo the move."""
        assert self.move is not None
        move, self.move = self.move, None
        self.failures += 1
        self.undone_at = now
        if move.old.scheduler is not None:
            move.old.scheduler.resize(move.old.kv_tokens)
        text = f"plan {move.new.epoch}: layers stay as they are; the move was undone: {why}"
        return [*self._pipelines.cancel(move), self._event_log.note(text, "warning")]

    def settle(self, *, now: float) -> list[Action]:
        """Go on if nothing is left to wait for."""
        move = self.move
        if move is None:
            return []
        actions: list[Action] = [*move.settle(now=now)]
        if not move.is_over:
            return actions
        self.move = None
        self.failures = 0
        self.num_moves += 1
        self.stall_s = now - (now if move.held_at is None else move.held_at)
        text = (
            f"plan {move.new.epoch} is served: layers moved in {now - move.began_at:.1f} s, "
            f"steps stood still for {1000 * self.stall_s:.0f} ms, of which "
            f"{1000 * (now - move.phase_at):.0f} ms to hand over"
        )
        return [*actions, *self._pipelines.swap(move), self._event_log.note(text)]

    def next_deadline(self) -> float | None:
        """Return when the move has taken too long, clock seconds."""
        return self.move.next_deadline() if self.move else None

    def on_timer(self, *, now: float) -> list[Action]:
        """Undo a move that has taken too long, or end its copying."""
        at = self.next_deadline()
        if self.move is None or at is None or at > now:
            return []
        if self.move.copies and self.move.phase != "loading":  # slower than was expected
            self._copied_bytes_per_s = self._copy_bytes_per_s / SLOW
        if self.move.phase == "copying":
            return [*self.move.copied_enough(now=now)]
        return self.cancel(f"{self.move.phase.replace('_', ' ')} took too long", now=now)

    def _of(self, worker: Worker, epoch: int) -> Move | None:
        """Return the move, if it is to this epoch and the worker has a part in it."""
        move = self.move
        return move if move and move.new.epoch == epoch and move.concerns(worker.peer) else None


def _numbers(layers: LayerRange) -> range:
    return range(layers.start, layers.stop)
