"""What stages and hops cost, in tables for the ways to find the best partition. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt

from distributed_llm.common.types import LayerRange, WorkerId
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.plan import LayerMap

Objective = Literal["throughput", "latency"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Cuts = list[tuple[int, int, int]]  # (index of the worker, first layer, stop)

TIE_S = 1e-9
"""What makes a difference, seconds: a stage more must save as much, for one."""


@dataclass(frozen=True)
class Speed:
    """Seconds of one step on a worker, at the load that is planned for; none is negative.

    Attributes:
        task_s: of every task, whatever its layers.
        layer_s: of one layer of mean size; others go by their bytes.
        last_s: of what the last stage computes beside its layers (norm, head, sampling).
    """

    task_s: float
    layer_s: float
    last_s: float


@dataclass(frozen=True)
class Candidate:
    """A worker that may be given layers.

    Attributes:
        memory_bytes: for weights and KV cache.
    """

    worker: WorkerId
    memory_bytes: int
    speed: Speed


@dataclass(frozen=True)
class Hop:
    """What the activations of a step cost on its way between workers; infinite if barred.

    Attributes:
        latency_s: delay before the first byte, in which the link carries other steps.
        busy_s: how long they occupy the link (bytes / bandwidth).
    """

    latency_s: float
    busy_s: float


@dataclass(frozen=True)
class Links:
    """The links between workers.

    Attributes:
        default: what a pair costs that is not known.
        known: by (from, to); the way back may differ.
    """

    default: Hop
    known: Mapping[tuple[WorkerId, WorkerId], Hop]

    def hop(self, sender: WorkerId, receiver: WorkerId) -> Hop:
        """Return what a step costs from `sender` to `receiver`."""
        return self.known.get((sender, receiver), self.default)


@dataclass(frozen=True)
class Partition:
    """Who serves what, and what it takes.

    Attributes:
        layer_map: in the order of their layers; they cover every layer once.
        slowest_s: of the slowest stage or link: a full pipeline ends a step in this time.
        total_s: of all stages and links: a step alone takes this time.
    """

    layer_map: LayerMap
    slowest_s: float
    total_s: float


@dataclass(frozen=True)
class Tables:
    """The problem in numbers, for W workers and L layers.

    Attributes:
        speeds: task_s, layer_s, last_s, float64 [3, W].
        memory: bytes, float64 [W].
        delays: latency_s + busy_s of each hop, infinite to itself, float64 [W, W].
        busy: busy_s of each hop, likewise.
    """

    cost: ModelCost
    kv_tokens: int
    names: tuple[WorkerId, ...]
    speeds: Floats
    memory: Floats
    delays: Floats
    busy: Floats

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self.cost.num_layers

    @cached_property
    def weights(self) -> Floats:
        """The layers [start, stop) in mean layers, float64 [L + 1, L + 1]."""
        return mean_layers(self.cost)

    @cached_property
    def sizes(self) -> Floats:
        """Bytes of each stage with its KV cache, infinite if empty, float64 [L + 1, L + 1]."""
        return stage_bytes_table(self.cost, self.kv_tokens)

    def seconds(self, start: Ints, stop: Ints) -> Floats:
        """Return the times of stages on each worker, infinite where one does not fit, [W, ...]."""
        shape = (-1,) + (1,) * start.ndim
        task, layer, last = (each.reshape(shape) for each in self.speeds)
        taken = task + layer * self.weights[start, stop] + last * (stop == self.num_layers)
        fits = self.sizes[start, stop] <= self.memory.reshape(shape)
        result: Floats = np.where(fits, taken, np.inf)
        return result

    @cached_property
    def stages(self) -> Floats:
        """Seconds of every stage, float64 [W, L + 1, L + 1]."""
        edges = np.indices(self.sizes.shape)
        return self.seconds(edges[0], edges[1])

    def subset(self, team: Sequence[int]) -> "Tables":
        """Return the tables of these workers, in this order."""
        index = np.array(team, dtype=np.int64)
        return replace(
            self,
            names=tuple(self.names[w] for w in team),
            speeds=self.speeds[:, index],
            memory=self.memory[index],
            delays=self.delays[np.ix_(index, index)],
            busy=self.busy[np.ix_(index, index)],
        )

    def alike(self, layer_bytes: int) -> "Tables":
        """Return the tables of a model whose layers are all of this size, on median links."""
        links = ~np.eye(len(self.names), dtype=bool)
        flat = [
            np.where(links, np.median(each[links]), np.inf) for each in (self.delays, self.busy)
        ]
        cost = replace(self.cost, layer_bytes=(layer_bytes,) * self.num_layers)
        return replace(self, cost=cost, delays=flat[0], busy=flat[1])

    def layer_map(self, cuts: Cuts) -> LayerMap:
        """Return the layer map of these cuts."""
        return tuple((self.names[w], LayerRange(start, stop)) for w, start, stop in cuts)

    def order(self, layer_map: LayerMap) -> list[int]:
        """Return the indices of the workers of a layer map, in its order."""
        index = {name: w for w, name in enumerate(self.names)}
        return [index[name] for name, _ in layer_map]

    def price(self, cuts: Cuts, objective: Objective) -> tuple[float, float]:
        """Return what the objective makes small, first of all and then."""
        hops = list(pairwise(w for w, _, _ in cuts))
        stages = [float(self.stages[cut]) for cut in cuts]
        total = sum(stages) + sum(self.delays[hop] for hop in hops) + len(cuts) * TIE_S
        slowest = max([*stages, *(float(self.busy[hop]) for hop in hops)])
        return (slowest, total) if objective == "throughput" else (total, slowest)


def make_tables(
    cost: ModelCost, candidates: Sequence[Candidate], links: Links, kv_tokens: int
) -> Tables:
    """Return the tables of these workers, in this order."""
    index = {candidate.worker: w for w, candidate in enumerate(candidates)}
    delays = np.full((len(index), len(index)), links.default.latency_s + links.default.busy_s)
    busy = np.full_like(delays, links.default.busy_s)
    for (sender, receiver), hop in links.known.items():
        if sender in index and receiver in index:
            delays[index[sender], index[receiver]] = hop.latency_s + hop.busy_s
            busy[index[sender], index[receiver]] = hop.busy_s
    np.fill_diagonal(delays, np.inf)
    np.fill_diagonal(busy, np.inf)
    speeds = [candidate.speed for candidate in candidates]
    return Tables(
        cost=cost,
        kv_tokens=kv_tokens,
        names=tuple(index),
        speeds=np.array([(each.task_s, each.layer_s, each.last_s) for each in speeds]).T,
        memory=np.array([float(candidate.memory_bytes) for candidate in candidates]),
        delays=delays,
        busy=busy,
    )


def stage_bytes_table(cost: ModelCost, kv_tokens: int) -> Floats:
    """Return the bytes of every stage [start, stop) with its KV cache, float64 [L + 1, L + 1].

    It is `ModelCost.stage_bytes` for all pairs at once; infinite where the stage is empty.
    """
    table = _range_sums([size + cost.kv_bytes_per_token * kv_tokens for size in cost.layer_bytes])
    table[0, :] += cost.first_bytes + cost.shared_bytes
    table[:, -1] += cost.last_bytes
    table[1:, -1] += cost.shared_bytes
    table[np.tril_indices(len(table))] = np.inf
    return table


def _range_sums(values: Sequence[int]) -> Floats:
    """Return the sum of values[start:stop] for all pairs; negative if start > stop."""
    edges = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    table: Floats = edges[np.newaxis, :] - edges[:, np.newaxis]
    return table


def mean_layers(cost: ModelCost) -> Floats:
    """Return the layers [start, stop) in layers of mean size, float64 [L + 1, L + 1]."""
    whole = sum(cost.layer_bytes)
    if not whole:
        return _range_sums((1,) * cost.num_layers)
    return _range_sums(cost.layer_bytes) * cost.num_layers / whole
