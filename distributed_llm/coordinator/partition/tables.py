"""The partitioning problem in numbers: times of stages and hops as tables. Pure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt

from distributed_llm.common.offloading import LAYERS_AT_ONCE
from distributed_llm.common.types import LayerRange, WorkerId
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.plan import LayerMap

PartitionObjective = Literal["throughput", "latency"]
"""What a partition minimises: its slowest stage or link, or the sum of all; see `search`."""

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Cuts = list[tuple[int, int, int]]
"""A layer map inside of `partition`: (index of the worker, first layer, stop) of each stage."""

TIE_S = 1e-9
"""Times that differ by less are equal, seconds; each further stage must save at least as much."""


@dataclass(frozen=True)
class WorkerTimes:
    """Seconds of one step on one worker, for the step that is planned for; none is negative.

    Of an encoder-decoder, a step that decodes stands for the share of a step with sources that
    comes with it as well. Stages without decoder layers have no part in what decodes.

    Attributes:
        task_s: of a task beside its layers; of an encoder-decoder, of one with sources.
        layer_s: of a layer of mean size; other layers take time in proportion to their bytes. Of an
            encoder-decoder, of a layer that decodes.
        last_s: of norm, head and sampling, on the last stage.
        source_s: as `layer_s`, for a layer that reads sources.
        answer_s: as `task_s`, for a task that decodes.
    """

    task_s: float
    layer_s: float
    last_s: float
    source_s: float = 0.0
    answer_s: float = 0.0


@dataclass(frozen=True)
class Offload:
    """The part of a worker's memory that is room elsewhere: in RAM beside a GPU, then on a disk.

    Attributes:
        room_bytes: there.
        seconds_per_byte: that a step takes to read what is on the disk.
        ram_bytes: that are brought from RAM at most; all others are read from the disk.
        seconds_per_ram_byte: that a step takes for these.
    """

    room_bytes: int
    seconds_per_byte: float
    ram_bytes: int = 0
    seconds_per_ram_byte: float = 0.0


@dataclass(frozen=True)
class Candidate:
    """A worker that may serve layers.

    Attributes:
        memory_bytes: for weights and KV cache, with `offload`.
        shares: stands for the cores that it shares with others; empty: it shares none.
        offload: the part of it that is elsewhere, if there is some.
    """

    worker: WorkerId
    memory_bytes: int
    times: WorkerTimes
    shares: str = ""
    offload: Offload | None = None


@dataclass(frozen=True)
class Hop:
    """Seconds for the activations of one step from a worker to another; infinite if unreachable.

    Attributes:
        latency_s: delay before the first byte; the link may carry other steps meanwhile.
        busy_s: time for which they occupy the link (bytes / bandwidth).
    """

    latency_s: float
    busy_s: float

    def part(self, steps: float, tokens: float) -> "Hop":
        """Return the hop if only shares of the steps and of the tokens take it.

        Who cannot be reached remains so.
        """
        shares = ((self.latency_s, steps), (self.busy_s, tokens))
        return Hop(*(s * share if math.isfinite(s) else s for s, share in shares))


@dataclass(frozen=True)
class Links:
    """The links between workers.

    Between stages of an encoder-decoder, steps that decode take only hops after a decoder layer.

    Attributes:
        default: hop of a pair that is not in `known`.
        known: by (sender, receiver); the way back may differ.
        source_steps: share of the steps that have sources, of an encoder-decoder.
        source_tokens: share of the tokens that are of sources.
    """

    default: Hop
    known: Mapping[tuple[WorkerId, WorkerId], Hop]
    source_steps: float = 1.0
    source_tokens: float = 1.0

    def hop(self, sender: WorkerId, receiver: WorkerId, *, for_sources: bool = False) -> Hop:
        """Return the hop from `sender` to `receiver`.

        Args:
            sender: a worker.
            receiver: another.
            for_sources: whether it is before the first decoder layer of an encoder-decoder.
        """
        hop = self.known.get((sender, receiver), self.default)
        return hop.part(self.source_steps, self.source_tokens) if for_sources else hop


@dataclass(frozen=True)
class Partition:
    """A layer map with its times.

    Attributes:
        slowest_s: seconds of the slowest stage or link; a full pipeline ends a step in this time.
            Stages that share cores compute one after the other, and count as one.
        total_s: seconds of all stages and hops; a step alone takes this time.
    """

    layer_map: LayerMap
    slowest_s: float
    total_s: float


@dataclass(frozen=True)
class Tables:
    """The problem as arrays, for W workers and L layers.

    Attributes:
        times: task_s, layer_s, last_s, source_s, answer_s, float64 [5, W].
        memory: bytes, float64 [W].
        delays: latency_s + busy_s of each hop, float64 [W, W]; infinite from a worker to itself.
        busy: busy_s of each hop, likewise.
        source_delays: as `delays`, before the first decoder layer of an encoder-decoder.
        source_busy: as `busy`, likewise.
        offloads: of `Offload`, in the order of its attributes, float64 [4, W].
    """

    cost: ModelCost
    kv_tokens: int
    names: tuple[WorkerId, ...]
    times: Floats
    memory: Floats
    delays: Floats
    busy: Floats
    source_delays: Floats
    source_busy: Floats
    offloads: Floats

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self.cost.num_layers

    @cached_property
    def lengths(self) -> Floats:
        """Lengths of the stages [start, stop) for steps that decode; see `mean_layers`."""
        return mean_layers(self.cost)[0]

    @cached_property
    def source_lengths(self) -> Floats:
        """Lengths of the stages [start, stop) for sources; see `mean_layers`."""
        return mean_layers(self.cost)[1]

    @cached_property
    def sizes(self) -> Floats:
        """Bytes of the stages [start, stop); see `stage_bytes_table`."""
        return stage_bytes_table(self.cost, self.kv_tokens)

    def seconds(self, start: Ints, stop: Ints) -> Floats:
        """Return the seconds of stages on each worker, infinite where one does not fit.

        Args:
            start: first layers, int64 [...].
            stop: ends, likewise; the result is float64 [W, ...].
        """
        shape = (-1,) + (1,) * start.ndim
        task, layer, last, source, answer = (each.reshape(shape) for each in self.times)
        taken = task + layer * self.lengths[start, stop] + last * (stop == self.num_layers)
        if self.cost.encoder_layers:
            taken += source * self.source_lengths[start, stop]
            taken += answer * (stop > self.cost.encoder_layers)
        sizes, memory = self.sizes[start, stop], self.memory.reshape(shape)
        if self.offloads.any():
            room, *rates = (each.reshape(shape) for each in self.offloads)
            taken += seconds_away(bytes_away(self.cost, sizes, memory - room), *rates)
        fits = sizes <= memory
        result: Floats = np.where(fits, taken, np.inf)
        return result

    @cached_property
    def stages(self) -> Floats:
        """Seconds of the stages [start, stop) on each worker, float64 [W, L + 1, L + 1]."""
        edges = np.indices(self.sizes.shape)
        return self.seconds(edges[0], edges[1])

    def hops(self, before: Floats, after: Floats) -> Floats:
        """Return the seconds of hops by sender, receiver and layers covered.

        Args:
            before: of hops before the first decoder layer of an encoder-decoder, float64 [n, n].
            after: of all others, likewise.

        Returns:
            float64 [n, n, L + 1]; [n, n, 1] if it does not matter how many layers are covered.
        """
        if not self.cost.encoder_layers:
            return after[..., np.newaxis]
        is_before = np.arange(self.num_layers + 1) <= self.cost.encoder_layers
        return np.where(is_before, before[..., np.newaxis], after[..., np.newaxis])

    @property
    def mean_times(self) -> tuple[Floats, Floats]:
        """Seconds of a task beside layers, and of a layer of mean size, float64 [W] each.

        They are those of the stages of an encoder-decoder on average.
        """
        task, layer, _, source, answer = self.times
        if not self.cost.encoder_layers:
            return task, layer
        sums = layer * self.lengths[0, -1] + source * self.source_lengths[0, -1]
        decoding = 1 - self.cost.encoder_layers / self.num_layers
        return task + answer * decoding, sums / self.num_layers

    def subset(self, team: Sequence[int]) -> "Tables":
        """Return the tables of some workers, in this order."""
        index = np.array(team, dtype=np.int64)
        return replace(
            self,
            names=tuple(self.names[w] for w in team),
            times=self.times[:, index],
            memory=self.memory[index],
            delays=self.delays[np.ix_(index, index)],
            busy=self.busy[np.ix_(index, index)],
            source_delays=self.source_delays[np.ix_(index, index)],
            source_busy=self.source_busy[np.ix_(index, index)],
            offloads=self.offloads[:, index],
        )

    def alike(self, layer_bytes: int, kv_bytes: int) -> "Tables":
        """Return these tables as if all layers had these sizes, and all links the median times.

        And as if layers might be cut apart anywhere, and no layer were an encoder's.
        """
        links = ~np.eye(len(self.names), dtype=bool)
        flat = [
            np.where(links, np.median(each[links]), np.inf) for each in (self.delays, self.busy)
        ]
        every = self.num_layers
        cost = replace(
            self.cost,
            layer_bytes=(layer_bytes,) * every,
            table_bytes=(),
            layer_kv_bytes=(kv_bytes,) * every,
            layer_state_bytes=(),
            uncut=(),
            encoder_layers=0,
        )
        times = self.times.copy()
        times[:2] = self.mean_times
        return replace(self, cost=cost, times=times, delays=flat[0], busy=flat[1])

    def layer_map(self, cuts: Cuts) -> LayerMap:
        """Return the layer map of these cuts."""
        return tuple((self.names[w], LayerRange(start, stop)) for w, start, stop in cuts)

    def cuts(self, layer_map: LayerMap) -> Cuts:
        """Return the cuts of this layer map."""
        order = self.order(layer_map)
        return [(w, held.start, held.stop) for w, (_, held) in zip(order, layer_map, strict=True)]

    def order(self, layer_map: LayerMap) -> list[int]:
        """Return the indices of the workers of a layer map, in its order."""
        index = {name: w for w, name in enumerate(self.names)}
        return [index[name] for name, _ in layer_map]

    def minimised(self, cuts: Cuts, objective: PartitionObjective) -> tuple[float, float]:
        """Return the seconds that an objective minimises: first the one, then the other."""
        stages = [float(self.stages[cut]) for cut in cuts]
        delays, busy = [], []
        for (sender, _, at), (receiver, _, _) in pairwise(cuts):
            hop, before = (sender, receiver), at <= self.cost.encoder_layers
            delays.append((self.source_delays if before else self.delays)[hop])
            busy.append(float((self.source_busy if before else self.busy)[hop]))
        total = sum(stages) + sum(delays) + len(cuts) * TIE_S
        slowest = max([*stages, *busy])
        return (slowest, total) if objective == "throughput" else (total, slowest)


def make_tables(
    cost: ModelCost, candidates: Sequence[Candidate], links: Links, kv_tokens: int
) -> Tables:
    """Return the tables of these workers, in this order."""
    names = [candidate.worker for candidate in candidates]
    delays, busy = _hop_tables(names, links)
    source_delays, source_busy = delays, busy
    if cost.encoder_layers:
        source_delays, source_busy = _hop_tables(names, links, for_sources=True)
    times = [
        (each.task_s, each.layer_s, each.last_s, each.source_s, each.answer_s)
        for each in (candidate.times for candidate in candidates)
    ]
    return Tables(
        cost=cost,
        kv_tokens=kv_tokens,
        names=tuple(names),
        times=np.array(times).T,
        memory=np.array([float(candidate.memory_bytes) for candidate in candidates]),
        delays=delays,
        busy=busy,
        source_delays=source_delays,
        source_busy=source_busy,
        offloads=np.array([_offload(candidate) for candidate in candidates]).T,
    )


def _hop_tables(
    workers: Sequence[WorkerId], links: Links, *, for_sources: bool = False
) -> tuple[Floats, Floats]:
    """Return `delays` and `busy` of `Tables` for workers in this order; see `Links.hop`."""
    steps, tokens = links.source_steps, links.source_tokens
    index = {worker: w for w, worker in enumerate(workers)}
    default = links.default.part(steps, tokens) if for_sources else links.default
    delays = np.full((len(index), len(index)), default.latency_s + default.busy_s)
    busy = np.full_like(delays, default.busy_s)
    for (sender, receiver), known in links.known.items():
        if sender in index and receiver in index:
            hop = known.part(steps, tokens) if for_sources else known
            delays[index[sender], index[receiver]] = hop.latency_s + hop.busy_s
            busy[index[sender], index[receiver]] = hop.busy_s
    np.fill_diagonal(delays, np.inf)
    np.fill_diagonal(busy, np.inf)
    return delays, busy


def _offload(candidate: Candidate) -> tuple[float, float, float, float]:
    own = candidate.offload or Offload(0, 0.0)
    ram = float(own.ram_bytes), own.seconds_per_ram_byte
    return (float(own.room_bytes), own.seconds_per_byte, *ram)


def seconds_away(
    away: Floats, byte_s: Floats | float, ram: Floats | float, ram_byte_s: Floats | float
) -> Floats:
    """Return the seconds in which a step brings weights to the devices of its stages.

    They count beside what the stages compute: the next layer is brought while one computes, but
    that is short where it is a few tokens, and bringing weights long.

    Args:
        away: bytes of them, `bytes_away`.
        byte_s: to read one from the disk.
        ram: bytes that are in RAM at most.
        ram_byte_s: to bring one from there.
    """
    in_ram = np.minimum(away, ram)
    taken: Floats = in_ram * ram_byte_s + (away - in_ram) * byte_s
    return taken


def bytes_away(cost: ModelCost, needed: Floats, memory: Floats) -> Floats:
    """Return about how many bytes are brought to a device in every step.

    Args:
        cost: of the model.
        needed: bytes of stages.
        memory: bytes that the devices of their workers have.
    """
    missing = needed - memory
    at_once = LAYERS_AT_ONCE * cost.all_layer_bytes / cost.num_layers
    read: Floats = np.where(missing > 0, np.minimum(missing + at_once, cost.all_layer_bytes), 0.0)
    return read


def stage_bytes_table(cost: ModelCost, kv_tokens: int) -> Floats:
    """Return the bytes of every stage [start, stop) with its KV cache, float64 [L + 1, L + 1].

    It is `ModelCost.stage_bytes` for all pairs at once; infinite where the stage is empty, or
    layers are cut apart that have to be together.
    """
    sizes = zip(cost.layer_fixed_bytes, cost.layer_kv_bytes, strict=True)
    table = _range_sums([fixed + kv * kv_tokens for fixed, kv in sizes])
    table[0, :] += cost.first_bytes
    table[:, -1] += cost.last_bytes
    table += cost.each_bytes
    shares = np.zeros(table.shape, dtype=bool)
    for layer in cost.sharers:
        shares[: layer + 1, layer + 1 :] = True
    table += cost.shared_bytes * shares
    uncut = list(cost.uncut)
    table[uncut, :] = table[:, uncut] = np.inf
    table[np.tril_indices(len(table))] = np.inf
    return table


def _range_sums(values: Sequence[float]) -> Floats:
    """Return sum(values[start:stop]) for all pairs; negative if start > stop."""
    edges = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    table: Floats = edges[np.newaxis, :] - edges[:, np.newaxis]
    return table


@lru_cache(maxsize=8)
def mean_layers(cost: ModelCost) -> tuple[Floats, Floats]:
    """Return the lengths of [start, stop), in layers of mean size, float64 [L + 1, L + 1].

    They are kept, for a search asks hundreds of times about one model; nobody can write to them.

    Returns:
        The lengths for steps that decode, with any prompts; and those for steps in which an
        encoder-decoder reads sources.
    """
    if not sum(cost.read_bytes):
        cost = replace(cost, layer_bytes=(1,) * cost.num_layers, table_bytes=())
    tables = []
    for sizes in (cost.answer_bytes, cost.source_bytes):
        lengths: Floats = _range_sums(sizes) * cost.num_layers / sum(cost.read_bytes)
        lengths.flags.writeable = False
        tables.append(lengths)
    return tables[0], tables[1]
