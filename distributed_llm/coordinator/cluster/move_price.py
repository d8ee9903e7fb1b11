"""The price of a move: what moving a pipeline to another plan is expected to cost. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from distributed_llm.common.types import KV_BLOCK, LayerRange, WorkerId
from distributed_llm.coordinator.cluster.cluster import Cluster
from distributed_llm.coordinator.cluster.kv_transfers import transfers_between
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.plan import PipelineStage, Plan
from distributed_llm.coordinator.serving.pipeline import Pipeline
from distributed_llm.coordinator.speeds.work import Work

_LOAD_BYTES_PER_S = 400e6
"""Expected load speed of a worker that has not loaded layers yet."""

_SLOWED_SHARE = 0.5
"""Share of a pipeline's speed that is lost while stages load and KV cache is copied beside it."""

_STALL_S = 0.3
"""Expected seconds for which steps stand still in a move, before there was a move."""

_CHUNK = 128
"""Tokens of a prompt in a step, when KV cache is computed again."""

_COPY_BYTES_PER_S = 30e6
"""Expected speed of copying KV cache between tasks, before any was copied."""

_LEAST_COPIED_BYTES = 1 << 20
"""Bytes of KV cache below which a copy is too short to learn the copy speed from."""

_PREFIX_COPY_S = 2.0
"""Seconds that copying prefixes of ended sequences may take; for that, the oldest are freed."""

_COPY_ALLOWANCE_S = 1.0
"""Seconds by which copying KV cache may cost more than computing it again."""


@dataclass(frozen=True)
class Price:
    """What a move is expected to cost.

    Attributes:
        standstill_s: how long requests stand still, or as much time as they lose by being slower.
        copies: whether KV cache is copied; otherwise it is computed again.
        copy_s: how long copying it takes.
        cached_tokens: positions of ended sequences, kept as prefixes, whose KV cache goes along.
        kv_tokens: positions of KV cache that there is room for beside old and new layers; None if
            workers cannot hold both, so that the new ones have to be loaded after the old ones go.
        handover_s: how long states take that can only be sent while requests stand still.
    """

    standstill_s: float
    copies: bool
    copy_s: float
    cached_tokens: int
    kv_tokens: int | None
    handover_s: float = 0.0


class _Kept(NamedTuple):
    """What a pipeline keeps of sequences.

    Attributes:
        tokens: positions that sequences that run are charged.
        tokens_ended: those that others are charged.
        running: positions and states of those that run, without the latest states.
        latest: the latest states of these.
        ended: positions and states of those that have ended.
    """

    tokens: int
    tokens_ended: int
    running: tuple[float, int]
    latest: int
    ended: tuple[float, int]

    @classmethod
    def by(cls, pipeline: Pipeline) -> "_Kept":
        """Return what a pipeline keeps."""
        scheduler, each = pipeline.scheduler, pipeline.kv_windows.state_tokens
        if scheduler is None:
            return cls(0, 0, (0.0, 0), 0, (0.0, 0))
        tokens, ended, states = (
            scheduler.kv_tokens_used,
            scheduler.kv_tokens_cached,
            scheduler.states,
        )
        return cls(
            tokens,
            ended,
            (max(0.0, tokens - states.charged * each), states.snapshots),
            states.latest,
            (max(0.0, ended - states.charged_ended * each), states.ended),
        )


class MovePrices:
    """Tells the prices of moves, and learns from those that were made.

    Attributes:
        stall_s: how long steps stood still in the latest move, without what states should have
            taken meanwhile; 0 before the first.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._unreachable: set[tuple[WorkerId, WorkerId]] = set()  # sender, receiver
        self._copied_bytes_per_s: float | None = None
        self.stall_s = 0.0

    def price(self, old: Pipeline, plan: Plan) -> Price:
        """Return what moving a pipeline that serves to a plan is expected to cost."""
        cost = self._cluster.model.cost_at(old.quantize)
        workers = {worker.id: worker for worker in self._cluster.registry.workers}
        rooms = self._cluster.memory_of(workers[stage.worker] for stage in plan)
        stages = tuple(PipelineStage(workers[s.worker].peer, s.worker, s.layers) for s in plan)
        held = {stage.worker: stage.layers for stage in old.stages}
        load_s = 0.0
        for stage in stages:
            worker, before = workers[stage.worker], held.get(stage.worker)
            added = added_bytes(cost, before, stage.layers)
            fetch_s = worker.stock.fetch_s(added, before, stage.layers)
            read_s = added / (worker.load_bytes_per_s or _LOAD_BYTES_PER_S)
            load_s = max(load_s, read_s, fetch_s)  # reading overlaps fetching
        room = _room_beside(old, stages, cost, rooms)
        transfers = transfers_between(old.stages, stages, cost.encoder_layers)
        reachable = all(transfer.pair not in self._unreachable for transfer in transfers)
        kept = _Kept.by(old)
        sizes = [
            (cost.kv_bytes(transfer.layers), cost.state_bytes(transfer.layers))
            for transfer in transfers
        ]
        running_s, latest_s, prefixes_s = (
            max((positions * kv + states * state for kv, state in sizes), default=0)
            / self._copy_bytes_per_s
            for positions, states in (kept.running, (0.0, kept.latest), kept.ended)
        )
        share = min(1.0, _PREFIX_COPY_S / prefixes_s) if prefixes_s else 1.0
        cached = int(share * kept.tokens_ended)
        copy_s = running_s + share * prefixes_s
        again_s = self._compute_again_s(stages, kept.running[0])
        slower_s = _SLOWED_SHARE * running_s + latest_s  # prefixes are optional
        copies = reachable and slower_s <= again_s + _COPY_ALLOWANCE_S
        if room < kept.tokens or room < KV_BLOCK:
            return Price(load_s + again_s, False, copy_s, cached, kv_tokens=None)
        slowed_s = load_s + copy_s if copies else load_s
        handover_s = latest_s if copies else 0.0
        stall_s = (self.stall_s or _STALL_S) + (handover_s if copies else again_s)
        standstill_s = stall_s + _SLOWED_SHARE * slowed_s
        return Price(standstill_s, copies, copy_s, cached, room, handover_s)

    def _compute_again_s(self, stages: Sequence[PipelineStage], tokens: float) -> float:
        """Return how long a pipeline takes to compute so many tokens of prompts."""
        prompt = Work.of_prompt(_CHUNK, _CHUNK * 256)
        layer_s = self._cluster.measurements.layer_s
        slowest_s = max(len(stage.layers) * layer_s(stage.worker, prompt) for stage in stages)
        return tokens / _CHUNK * slowest_s

    @property
    def _copy_bytes_per_s(self) -> float:
        """Expected speed of copying KV cache: that of the latest copy, at most that of links."""
        link_bytes_per_s = self._cluster.measurements.link_bytes_per_s
        return min(link_bytes_per_s, self._copied_bytes_per_s or _COPY_BYTES_PER_S)

    def copied(self, sent_bytes: int, seconds: float) -> None:
        """Learn from KV cache that a worker has copied."""
        if sent_bytes >= _LEAST_COPIED_BYTES and seconds > 0.0:
            self._copied_bytes_per_s = sent_bytes / seconds

    def copied_slowly(self, times: float) -> None:
        """Learn that copying took so many times as long as was expected."""
        self._copied_bytes_per_s = self._copy_bytes_per_s / times

    def unreachable(self, sender: WorkerId, receiver: WorkerId) -> bool:
        """Learn that a worker cannot send KV cache to another; return whether that is new."""
        pair = (sender, receiver)
        new = pair not in self._unreachable
        self._unreachable.add(pair)
        return new

    def forget(self, worker: WorkerId) -> None:
        """Forget what is known of the links of a worker that is gone."""
        self._unreachable = {pair for pair in self._unreachable if worker not in pair}


def _room_beside(
    old: Pipeline,
    stages: Sequence[PipelineStage],
    cost: ModelCost,
    rooms: Mapping[WorkerId, int],
) -> int:
    """Return the positions that there is room for beside old and new layers, in whole blocks."""
    held = {stage.worker: stage.layers for stage in old.stages}
    room, state_tokens = old.kv_tokens, old.kv_windows.state_tokens
    for stage in stages:
        before = held.get(stage.worker)
        own_bytes = cost.weight_bytes(before) if before else 0
        left_bytes = rooms[stage.worker] - own_bytes - added_bytes(cost, before, stage.layers)
        layers = {*_numbers(stage.layers), *(_numbers(before) if before else ())}
        kv_bytes = sum(cost.layer_kv_bytes[layer] for layer in layers)
        if kv_bytes or left_bytes < 0 or not cost.encoder_layers:  # an encoder keeps nothing
            room = min(room, left_bytes // max(1, kv_bytes))
        if state_tokens:
            state_bytes = sum(cost.layer_state_bytes[layer] for layer in layers)
            room = min(room, int(left_bytes * state_tokens / max(1, state_bytes)))
    return room - room % KV_BLOCK


def added_bytes(cost: ModelCost, before: LayerRange | None, after: LayerRange) -> int:
    """Return the bytes of weights that a worker reads to have other layers."""
    if before is None:
        return cost.weight_bytes(after)
    size = cost.num_layers
    layers = set(_numbers(after)) - set(_numbers(before))
    first = after.start == 0 and before.start != 0
    last = after.stop == size and before.stop != size
    shared = cost.shares(after) and not cost.shares(before)
    return (
        sum(cost.layer_bytes[layer] for layer in layers)
        + cost.first_bytes * first
        + cost.last_bytes * last
        + cost.shared_bytes * shared
    )


def _numbers(layers: LayerRange) -> range:
    return range(layers.start, layers.stop)
