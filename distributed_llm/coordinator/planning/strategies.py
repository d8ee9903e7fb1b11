"""Plans of one pipeline by strategy: `memory`, `even`, `custom` and `speed`. Pure.

Strategy `memory` divides the layers in proportion to memory: of all cuts in which every stage fits
its worker, it takes the one with the least sum of bytes^2 / memory. (By Lagrange, the continuous
optimum of that sum is exact proportion, bytes_i ~ memory_i.) Dynamic programming over (worker,
first layer) finds it, with embedding, head and unequal layers counted exactly. Strategy `speed`
takes the layer map with the best forecast; see `forecast.best_forecast`.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt

from distributed_llm.common.errors import ConfigError, NotEnoughMemory
from distributed_llm.common.layer_states import HELD_STATES
from distributed_llm.common.settings import Objective
from distributed_llm.common.types import LayerRange, WorkerId
from distributed_llm.common.wording import count_text, layers_text, list_text, size_text
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.partition.tables import stage_bytes_table
from distributed_llm.coordinator.plan import LayerMap, Plan, kv_tokens_of, plan_of
from distributed_llm.coordinator.planning.forecast import best_forecast
from distributed_llm.coordinator.speeds.demand import Demand
from distributed_llm.coordinator.speeds.machines import Machines

StaticStrategy = Literal["memory", "even", "custom"]
"""The strategies that need no measured speeds."""

_MAX_ROOM_CONTEXTS = 16
"""Most room for KV cache that a plan by speed is slowed down for, in contexts of the model."""

_MAX_ROOM_TOKENS = 65_536
"""Most room for KV cache that a plan by speed is slowed down for, in positions."""

_USUAL_CONTEXT = 8192
"""Positions of a long request; a plan by speed has room for one even if that makes it slower."""


def make_plan(
    cost: ModelCost,
    memory: Mapping[WorkerId, int],
    *,
    strategy: StaticStrategy,
    kv_tokens: int,
    layers: Mapping[str, LayerRange] | None = None,
) -> Plan:
    """Return the plan of a strategy that needs no measured speeds.

    Args:
        cost: of the model.
        memory: bytes of each worker, for weights and KV cache; their order does not matter.
        strategy: "memory" divides the layers in proportion to memory, "even" in equal numbers,
            "custom" as `layers` says.
        kv_tokens: positions of KV cache that every stage must have room for.
        layers: the layers of each worker; for "custom" only.

    Raises:
        NotEnoughMemory: the model does not fit; the message says what is missing and what would
            fit.
        ConfigError: `layers` does not cover the model, or names an unknown worker.
    """
    ranked = sorted(memory, key=lambda worker: (-memory[worker], worker))[: cost.num_layers]
    if strategy == "custom":
        layer_map = _custom(cost, memory, layers or {})
    elif strategy == "even":
        layer_map = _even(cost, ranked)
    else:
        layer_map = _proportional(cost, {w: memory[w] for w in ranked}, kv_tokens)
    if not layer_map:
        raise NotEnoughMemory(_what_is_missing(cost, memory, kv_tokens))
    for worker, held in layer_map:
        needed = cost.stage_bytes(held, kv_tokens)
        if needed > memory[worker]:
            raise NotEnoughMemory(
                f"Worker {worker} would hold {layers_text(held)}, which take {size_text(needed)}, "
                f"but offers {size_text(memory[worker])}. Give it fewer layers, or use "
                "strategy 'memory', which fits the layers to the workers."
            )
    return plan_of(cost, memory, layer_map)


def plan_by_speed(
    cost: ModelCost, machines: Machines, demand: Demand, *, objective: Objective, kv_tokens: int
) -> Plan:
    """Return the plan of the layer map with the best forecast; see `forecast.best_forecast`.

    Raises:
        NotEnoughMemory: the model does not fit; the message says what is missing.
    """
    best = best_forecast(cost, machines, demand, objective=objective, kv_tokens=kv_tokens)
    if best is None:  # the search among many workers is not exact; this one is, for memory
        return make_plan(cost, machines.memory_bytes, strategy="memory", kv_tokens=kv_tokens)
    return plan_of(cost, machines.memory_bytes, best.layer_map)


def wanted_kv_tokens(
    cost: ModelCost, memory: Mapping[WorkerId, int], *, least: int, context_length: int
) -> int:
    """Return the positions of KV cache that a plan by speed must leave room for.

    That is half of the room in the plan by memory, which has about the most there can be; but no
    more than is ever needed, and at least one usual context if that fits. Never less than `least`.

    Args:
        cost: of the model.
        memory: bytes of each worker.
        least: positions that every plan has room for.
        context_length: of the model, positions.
    """
    try:
        most = kv_tokens_of(make_plan(cost, memory, strategy="memory", kv_tokens=least))
    except NotEnoughMemory:
        return least
    one_context = min(most, context_length, _USUAL_CONTEXT)
    upper = min(most // 2, _MAX_ROOM_CONTEXTS * context_length, _MAX_ROOM_TOKENS)
    return max(least, one_context, upper)


def _even(cost: ModelCost, workers: Sequence[WorkerId]) -> LayerMap:
    count, allowed = len(workers), [0, *(piece.stop for piece in cost.pieces)]
    wanted = [cost.num_layers * i // count for i in range(count + 1)] if count else [0]
    edges = sorted({_nearest(allowed, edge) for edge in wanted})
    return tuple(
        (worker, LayerRange(start, stop))
        for worker, (start, stop) in zip(workers, pairwise(edges), strict=False)
    )


def _nearest(allowed: Sequence[int], edge: int) -> int:
    return min(allowed, key=lambda one: abs(one - edge))


def _custom(
    cost: ModelCost, memory: Mapping[WorkerId, int], layers: Mapping[str, LayerRange]
) -> LayerMap:
    by_name = {str(worker): worker for worker in memory}
    absent = sorted(set(layers) - set(by_name))
    if absent:
        raise ConfigError(
            f"The setting `layers` names {list_text(map(repr, absent))}, not joined yet (there: "
            f"{', '.join(sorted(by_name)) or 'nobody'}). Start what is missing: `dllm worker "
            f"--name {absent[0]}`."
        )
    check_custom(layers, cost)
    ordered = sorted(layers.items(), key=lambda item: item[1])
    return tuple((by_name[name], held) for name, held in ordered)


def check_custom(layers: Mapping[str, LayerRange], cost: ModelCost) -> None:
    """Check that the setting `layers` suits the model: every layer is served, and no others are.

    And that layers are together that have to be. That no layer is left out or named twice in
    between is checked with the settings.

    Raises:
        ConfigError: it does not.
    """
    num_layers, last = cost.num_layers, max(held.stop for held in layers.values())
    if last == num_layers:
        _check_cuts(layers, cost)
        return
    what = (
        f"nobody serves {layers_text(LayerRange(last, num_layers))}"
        if last < num_layers
        else f"there is no layer {last}"
    )
    raise ConfigError(
        f"The setting `layers` does not suit the model, which has "
        f"{count_text(num_layers, 'layer')}: {what}. Name a worker for every layer."
    )


def _check_cuts(layers: Mapping[str, LayerRange], cost: ModelCost) -> None:
    for held in layers.values():
        if not cost.may_be_cut([held.start]):
            raise ConfigError(
                f"The setting `layers` does not suit the model: {cost.together_text}, but "
                f"{layers_text(held)} begin in between. Let no worker begin there."
            )


def _proportional(cost: ModelCost, memory: Mapping[WorkerId, int], kv_tokens: int) -> LayerMap:
    """Return the layer map with the least sum of bytes^2 / memory; empty if none fits.

    best[w][s] is the least sum for layers [s, L) on workers w, w + 1, ...; any of them may be left
    out.
    """
    size = cost.num_layers
    stage_bytes = stage_bytes_table(cost, kv_tokens)
    best = np.full(size + 1, np.inf)
    best[size] = 0.0
    choices: list[npt.NDArray[np.int64]] = []
    for memory_bytes in reversed(list(memory.values())):
        fits = stage_bytes <= memory_bytes
        term = np.where(fits, stage_bytes**2 / max(1, memory_bytes), np.inf)
        total = term + best[np.newaxis, :]  # [first layer, stop]
        np.fill_diagonal(total, best)  # takes no layers
        choices.append(np.argmin(total, axis=1))
        best = np.min(total, axis=1)
    if not np.isfinite(best[0]):
        return ()
    layer_map: list[tuple[WorkerId, LayerRange]] = []
    start = 0
    for worker, choice in zip(memory, reversed(choices), strict=True):
        stop = int(choice[start])
        if stop > start:
            layer_map.append((worker, LayerRange(start, stop)))
        start = stop
    return tuple(layer_map)


def _what_is_missing(cost: ModelCost, memory: Mapping[WorkerId, int], kv_tokens: int) -> str:
    whole = LayerRange(0, cost.num_layers)
    needed = cost.stage_bytes(whole, kv_tokens)
    offered = sum(memory.values())
    each = ", ".join(f"{worker} {size_text(size)}" for worker, size in memory.items())
    kv = cost.kv_bytes(whole) * kv_tokens + HELD_STATES * cost.state_bytes(whole)
    kept = f"KV cache for {count_text(kv_tokens, 'token')} of context"
    if not cost.mean_kv_bytes:
        kept = "states of a text"
    what = (
        f"The model needs {size_text(needed)} (weights {size_text(needed - kv)}, {kept} "
        f"{size_text(kv)}); the workers offer "
        f"{size_text(offered)} ({each or 'none'})"
    )
    if cost.workspace_bytes:
        what += f", beside {size_text(cost.workspace_bytes)} each that they compute with"
    most = max(cost.pieces, key=lambda one: cost.stage_bytes(one, kv_tokens))
    least = cost.stage_bytes(most, kv_tokens)  # that one worker at least must have
    largest = max(memory.values(), default=0)
    if needed > offered:
        what += f": {size_text(needed - offered)} are missing"
        if least > largest and len(most) > 1:
            what += f", and {cost.together_text}: these take {size_text(least)}"
    elif least > largest:
        at_start = " with the embedding" if most.start == 0 else ""
        at_ends = " with the head" if most.stop == cost.num_layers else at_start
        fixed = sum(cost.layer_fixed_bytes[most.start : most.stop])
        ends = at_ends if least > fixed else ""
        reads = ", of which some read keys and values of others" if len(most) > 1 else ""
        what += (
            f", but one of them has to hold {layers_text(most)}{ends}{reads}, which takes "
            f"{size_text(least)}, and the largest has {size_text(largest)}"
        )
    else:
        what += ", but in pieces into which whole layers do not fit"
    if least > largest and (len(most) > 1 or needed <= offered):
        return (
            f"{what}. Add a worker that has as much, raise the --max-memory of one, or take a "
            "smaller model or dtype."
        )
    return (
        f"{what}. {_what_fits(cost, offered, kv_tokens)} Add a worker, raise --max-memory, or take "
        "a smaller model or dtype."
    )


def _what_fits(cost: ModelCost, offered: int, kv_tokens: int) -> str:
    sizes = zip(cost.layer_fixed_bytes, cost.layer_kv_bytes, strict=True)
    layer = max(fixed + kv * kv_tokens for fixed, kv in sizes)
    ends = cost.first_bytes + cost.last_bytes + cost.shared_bytes + cost.each_bytes
    room = max(0, offered - ends)
    return (
        f"One layer takes {size_text(layer)}, embedding and head {size_text(ends)}: about "
        f"{min(cost.num_layers, room // layer)} of {cost.num_layers} layers would fit."
    )
