"""Which worker serves which layers. Pure.

A plan cuts the layers into contiguous ranges, one per worker. Under strategy `memory` the ranges
are in proportion to memory: of all cuts in which every range fits its worker, the one with the
least sum of bytes^2 / memory, whose continuous optimum is exact proportion (bytes_i ~ memory_i by
Lagrange). It is found by dynamic programming over (worker, first layer), so embedding, head and
unequal layers are counted exactly. Under strategy `speed` they are what `forecast` finds best.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt

from distributed_llm.common.errors import ConfigError, NotEnoughMemory
from distributed_llm.common.settings import Goal
from distributed_llm.common.types import LayerRange, WorkerId, size_text
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.plan import Plan, kv_tokens_of, plan_of
from distributed_llm.coordinator.planning.forecast import best_plan
from distributed_llm.coordinator.speeds.demand import Demand
from distributed_llm.coordinator.speeds.machines import Machines

StaticStrategy = Literal["memory", "even", "custom"]
"""Those that do not ask how fast anything is."""

_CONTEXTS = 16
_POSITIONS = 65_536
"""Room for KV cache that no plan has to give speed up for: so many whole contexts or positions."""

_CONTEXT = 8192
"""A request that may take so many positions should be served, if it can be, however slowly."""


@dataclass(frozen=True)
class Offer:
    """A worker that may be given layers.

    Attributes:
        memory_bytes: for weights and KV cache.
    """

    worker: WorkerId
    memory_bytes: int


def make_plan(
    cost: ModelCost,
    offers: Sequence[Offer],
    *,
    strategy: StaticStrategy,
    kv_tokens: int,
    layers: Mapping[str, LayerRange] | None = None,
) -> Plan:
    """Return the stages that serve the model.

    Args:
        cost: of the model.
        offers: the workers, in any order.
        strategy: "memory" in proportion to memory, "even" in equal numbers of layers, "custom".
        kv_tokens: positions of KV cache that every stage must have room for.
        layers: the layers of each worker, for "custom" only.

    Raises:
        NotEnoughMemory: with how much is missing and what would fit.
        ConfigError: `layers` does not cover the model, or names a worker that is not there.
    """
    ranked = sorted(offers, key=lambda offer: (-offer.memory_bytes, offer.worker))
    ranked = ranked[: cost.num_layers]
    if strategy == "custom":
        ranges = _custom_ranges(cost, offers, layers or {})
    elif strategy == "even":
        ranges = _even_ranges(cost, ranked)
    else:
        ranges = _proportional_ranges(cost, ranked, kv_tokens)
    if not ranges:
        raise NotEnoughMemory(_what_is_missing(cost, offers, kv_tokens))
    for offer, held in ranges:
        needed = cost.stage_bytes(held, kv_tokens)
        if needed > offer.memory_bytes:
            raise NotEnoughMemory(
                f"Worker {offer.worker} would hold layers {held}, which need {size_text(needed)}, "
                f"but offers {size_text(offer.memory_bytes)}. Give it fewer layers, or use "
                "strategy 'memory', which fits the layers to the workers."
            )
    memory = {offer.worker: offer.memory_bytes for offer in offers}
    return plan_of(cost, memory, tuple((offer.worker, held) for offer, held in ranges))


def plan_by_speed(
    cost: ModelCost, machines: Machines, demand: Demand, *, goal: Goal, kv_tokens: int
) -> Plan:
    """Return the stages that are expected to serve the model best; see `forecast.best_plan`.

    Raises:
        NotEnoughMemory: with how much is missing and what would fit.
    """
    found = best_plan(cost, machines, demand, goal=goal, kv_tokens=kv_tokens)
    if found is None:  # for many workers that is a search, which may find less than this does
        offers = [Offer(worker, size) for worker, size in machines.memory_bytes.items()]
        return make_plan(cost, offers, strategy="memory", kv_tokens=kv_tokens)
    return plan_of(cost, machines.memory_bytes, found.partition.ranges)


def wanted_kv_tokens(
    cost: ModelCost, memory: Mapping[WorkerId, int], *, least: int, context_length: int
) -> int:
    """Return the positions of KV cache that a plan by speed must leave room for.

    That is half of what the plan in proportion to memory has, which has the most room or nearly;
    less if so many are hardly ever needed; as many as a whole context of usual length takes, if
    there can be so many; and never less than `least`.

    Args:
        cost: of the model.
        memory: of each worker, bytes.
        least: without which nothing is served.
        context_length: of the model.
    """
    offers = [Offer(worker, size) for worker, size in memory.items()]
    try:
        most = kv_tokens_of(make_plan(cost, offers, strategy="memory", kv_tokens=least))
    except NotEnoughMemory:
        return least
    whole = min(most, context_length, _CONTEXT)
    return max(least, whole, min(most // 2, _CONTEXTS * context_length, _POSITIONS))


_Ranges = list[tuple[Offer, LayerRange]]


def _even_ranges(cost: ModelCost, offers: Sequence[Offer]) -> _Ranges:
    count = len(offers)
    edges = [cost.num_layers * i // count for i in range(count + 1)] if count else [0]
    return [
        (offer, LayerRange(start, stop))
        for offer, (start, stop) in zip(offers, pairwise(edges), strict=True)
    ]


def _custom_ranges(
    cost: ModelCost, offers: Sequence[Offer], layers: Mapping[str, LayerRange]
) -> _Ranges:
    by_name = {str(offer.worker): offer for offer in offers}
    absent = sorted(set(layers) - set(by_name))
    if absent:
        raise ConfigError(
            f"The layer map names the worker {absent[0]!r}, which has not joined "
            f"(joined: {', '.join(sorted(by_name)) or 'none'}). Start it with --name {absent[0]}."
        )
    ordered = sorted(layers.items(), key=lambda item: item[1])
    at = 0
    for name, held in ordered:
        if held.start != at:
            what = "gap" if held.start > at else "overlap"
            raise ConfigError(
                f"The layer map has a {what} at layer {min(at, held.start)}: {name!r} starts at "
                f"layer {held.start}, expected {at}."
            )
        at = held.stop
    if at != cost.num_layers:
        raise ConfigError(
            f"The layer map covers layers 0 to {at - 1}, but the model has layers 0 to "
            f"{cost.num_layers - 1}."
        )
    return [(by_name[name], held) for name, held in ordered]


def _proportional_ranges(cost: ModelCost, offers: Sequence[Offer], kv_tokens: int) -> _Ranges:
    """Return the cut with the least sum of bytes^2 / memory; nothing if no cut fits.

    best[w][s]: least cost of serving layers [s, L) with workers w, w+1, ...; a worker may be
    left out.
    """
    size = cost.num_layers
    stage_bytes = _stage_bytes_table(cost, kv_tokens)
    best = np.full(size + 1, np.inf)
    best[size] = 0.0
    choices: list[npt.NDArray[np.int64]] = []
    for offer in reversed(offers):
        fits = stage_bytes <= offer.memory_bytes
        price = np.where(fits, stage_bytes**2 / max(1, offer.memory_bytes), np.inf)
        total = price + best[np.newaxis, :]  # [first layer, stop]
        np.fill_diagonal(total, best)  # takes no layers
        choices.append(np.argmin(total, axis=1))
        best = np.min(total, axis=1)
    if not np.isfinite(best[0]):
        return []
    ranges: _Ranges = []
    start = 0
    for offer, choice in zip(offers, reversed(choices), strict=True):
        stop = int(choice[start])
        if stop > start:
            ranges.append((offer, LayerRange(start, stop)))
        start = stop
    return ranges


def _stage_bytes_table(cost: ModelCost, kv_tokens: int) -> npt.NDArray[np.float64]:
    """Return the bytes of a stage [start, stop) for all pairs, float64 [L + 1, L + 1]."""
    size = cost.num_layers
    edges = np.concatenate([[0.0], np.cumsum(cost.layer_bytes, dtype=np.float64)])
    counts = np.arange(size + 1, dtype=np.float64)
    table: npt.NDArray[np.float64] = edges[np.newaxis, :] - edges[:, np.newaxis]
    table += (counts[np.newaxis, :] - counts[:, np.newaxis]) * cost.kv_bytes_per_token * kv_tokens
    table[0, :] += cost.first_bytes + cost.shared_bytes
    table[:, size] += cost.last_bytes
    table[1:, size] += cost.shared_bytes
    table[np.tril_indices(size + 1)] = np.inf
    return table


def _what_is_missing(cost: ModelCost, offers: Sequence[Offer], kv_tokens: int) -> str:
    whole = LayerRange(0, cost.num_layers)
    needed = cost.stage_bytes(whole, kv_tokens)
    offered = sum(offer.memory_bytes for offer in offers)
    each = ", ".join(f"{offer.worker} {size_text(offer.memory_bytes)}" for offer in offers)
    kv = cost.kv_bytes_per_token * kv_tokens * cost.num_layers
    what = (
        f"The model needs {size_text(needed)} (weights {size_text(needed - kv)}, KV cache for "
        f"{kv_tokens} positions {size_text(kv)}); the workers offer {size_text(offered)} "
        f"({each or 'none'})"
    )
    if needed > offered:
        why = f": {size_text(needed - offered)} are missing"
    else:
        why = ", but in pieces into which whole layers do not fit"
    return (
        f"{what}{why}. {_what_fits(cost, offers, kv_tokens)} Add a worker, raise --max-memory, "
        "or take a smaller model or dtype."
    )


def _what_fits(cost: ModelCost, offers: Sequence[Offer], kv_tokens: int) -> str:
    layer = max(cost.layer_bytes) + cost.kv_bytes_per_token * kv_tokens
    ends = cost.first_bytes + cost.last_bytes + cost.shared_bytes
    room = max(0, sum(offer.memory_bytes for offer in offers) - ends)
    return (
        f"One layer takes {size_text(layer)}, embedding and head {size_text(ends)}: about "
        f"{min(cost.num_layers, room // layer)} of {cost.num_layers} layers would fit."
    )
