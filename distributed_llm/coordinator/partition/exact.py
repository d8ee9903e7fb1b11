"""Exact ways to the best partition, and a walk that is exact for a given order. Pure."""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from distributed_llm.coordinator.partition.tables import (
    TIE_S,
    Cuts,
    Floats,
    Ints,
    Objective,
    Tables,
)
from distributed_llm.coordinator.plan import LayerMap

# ------------------------------------------------------------------ all layers and links alike


def is_uniform(tables: Tables) -> bool:
    """Return whether all layers are alike, and all links."""
    pairs = ~np.eye(len(tables.names), dtype=bool)
    links = [np.all(each[pairs] == each[0, -1]) for each in (tables.delays, tables.busy)]
    return len(set(tables.cost.layer_bytes)) == 1 and all(links)


def solve_uniform(tables: Tables, objective: Objective) -> LayerMap:
    """Return the best ranges if all layers are alike, and all links; nothing if none fit."""
    size = tables.num_layers
    counts = np.arange(1, size)
    roles = np.full((3, len(tables.names), size), np.inf)  # of a stage of so many layers
    roles[_MIDDLE, :, 1:-1] = tables.seconds(counts[:-1] * 0 + 1, counts[:-1] + 1)
    roles[_FIRST, :, 1:] = tables.seconds(counts * 0, counts)
    roles[_LAST, :, 1:] = tables.seconds(size - counts, counts * 0 + size)
    alone = tables.seconds(np.array(0), np.array(size))
    delay_s, busy_s = (float(each[0, -1]) for each in (tables.delays, tables.busy))
    if objective == "throughput":
        cap_s = _least_slowest(roles, alone, busy_s) + TIE_S
        roles = np.where(roles <= cap_s, roles, np.inf)
        alone = np.where(alone <= cap_s, alone, np.inf)
        delay_s = delay_s if busy_s <= cap_s else math.inf
    total, cuts = _knapsack(roles + (delay_s + TIE_S))
    if total - delay_s < alone.min() + TIE_S:
        return tables.layer_map(cuts)
    return tables.layer_map([(int(alone.argmin()), 0, size)] if np.isfinite(alone.min()) else [])


_MIDDLE, _FIRST, _LAST = 0, 1, 2
_MOVES = (([0, 1, 2, 3], [0, 1, 2, 3]), ([0, 2], [1, 3]), ([0, 1], [2, 3]))
"""By role: the roles that may be taken before (first 1, last 2), and those taken then."""


def _least_slowest(roles: Floats, alone: Floats, busy_s: float) -> float:
    """Return the least time that the slowest stage or link can take, infinite if nothing fits."""

    def suffices(cap_s: float) -> bool:
        if alone.min() <= cap_s or busy_s > cap_s:
            return bool(alone.min() <= cap_s)
        middle, first, last = (roles <= cap_s).sum(axis=2)  # a stage's time grows with its layers
        more = [np.where(ends, ends - middle, -roles.size) for ends in (first, last)]
        best = [np.argsort(-each, kind="stable")[:2] for each in more]
        pairs = [more[0][f] + more[1][w] for f in best[0] for w in best[1] if f != w]
        return bool(middle.sum() + max(pairs, default=-roles.size) >= roles.shape[2])

    times = np.unique(np.concatenate([roles.ravel(), alone, [busy_s]]))
    return float(times[bisect_left(times, True, hi=len(times) - 1, key=suffices)])


def _knapsack(prices: Floats) -> tuple[float, Cuts]:
    """Return the least sum of a first, a last and any number of middle stages, and the cuts.

    Args:
        prices: by role, worker and layers, infinite if it cannot be, float64 [3, W, L].
    """
    size = prices.shape[2]
    best = np.full((4, size + 1), np.inf)  # [roles taken: first 1, last 2; layers covered]
    best[0, 0] = 0.0
    history = [best]
    never = np.full_like(best, np.inf)
    for worker in range(prices.shape[1]):
        best = best.copy()
        for role, (sources, targets) in enumerate(_MOVES):
            most = int(np.isfinite(prices[role, worker]).sum())
            if most:
                before = history[-1][sources, :-1]
                padded = np.concatenate([never[sources, :most], before], axis=1)
                windows = sliding_window_view(padded, most, axis=1)
                reached = (windows + prices[role, worker, most:0:-1]).min(axis=2)
                best[targets] = np.minimum(best[targets], reached)
        history.append(best)
    total = float(best[3, size])
    return total, _unpack(prices, history) if math.isfinite(total) else []


def _unpack(prices: Floats, history: Sequence[Floats]) -> Cuts:
    state, at = 3, prices.shape[2]
    taken: list[list[tuple[int, int]]] = [[], [], []]  # by role, (worker, layers)
    for worker in reversed(range(prices.shape[1])):
        before = history[worker]
        if before[state, at] == history[worker + 1][state, at]:
            continue
        most = min(at, prices.shape[2] - 1)
        options = []
        for role, (sources, targets) in enumerate(_MOVES):
            if state in targets:
                source = sources[targets.index(state)]
                sums = before[source, at - most : at][::-1] + prices[role, worker, 1 : most + 1]
                options.append((float(sums.min()), role, int(sums.argmin()) + 1, source))
        _, role, count, state = min(options)
        taken[role].append((worker, count))
        at -= count
    cuts: Cuts = []
    for worker, count in [*taken[_FIRST], *taken[_MIDDLE], *taken[_LAST]]:
        cuts.append((worker, at, at + count))
        at += count
    return cuts


# ------------------------------------------------------------------ few workers


@dataclass(frozen=True)
class Costs:
    """What is made small: sums of stages [n, L + 1, L + 1] and hops [n, n], or their maximum."""

    stages: Floats
    hops: Floats
    join: np.ufunc


def costs_of(
    tables: Tables, team: Sequence[int], cap_s: float | None, edges: slice = slice(None)
) -> Costs:
    """Return the costs of these workers: sums with nothing above `cap_s`; for None the maximum.

    Args:
        tables: of all workers.
        team: some of them.
        cap_s: seconds.
        edges: the layers, and the end of the last; all if not given.
    """
    index = np.array(team, dtype=np.int64)
    pairs = np.ix_(index, index)
    stages, busy = tables.stages[index, edges, edges], tables.busy[pairs]
    if cap_s is None:
        return Costs(stages, busy, np.maximum)
    stages = np.where(stages <= cap_s, stages + TIE_S, np.inf)
    return Costs(stages, np.where(busy <= cap_s, tables.delays[pairs], np.inf), np.add)


_Solver = Callable[[Costs], tuple[float, Cuts]]


def solve(tables: Tables, team: Sequence[int], objective: Objective, solver: _Solver) -> Cuts:
    """Return the best cuts that `solver` finds; nothing if none fit."""
    cap_s = math.inf
    if objective == "throughput":
        cap_s = solver(costs_of(tables, team, None))[0] + TIE_S
    return solver(costs_of(tables, team, cap_s))[1]


def additions_of(workers: int, layers: int) -> int:
    """Return the additions of `held_karp`."""
    return (workers << workers) * (layers + 1) ** 2 // 2


def solve_exactly(tables: Tables, objective: Objective) -> LayerMap:
    """Return the best ranges; nothing if none fit."""
    team = range(len(tables.names))
    window = Window(len(team), None, None)
    return tables.layer_map(solve(tables, team, objective, lambda c: held_karp(c, window)))


@dataclass(frozen=True)
class Window:
    """Layers to be served by any of the first `workers` of a team.

    Attributes:
        before: which of the team serves the layers before, None at the start of the model.
        after: which serves the layers after, None at the end of the model.
    """

    workers: int
    before: int | None
    after: int | None


def held_karp(costs: Costs, window: Window) -> tuple[float, Cuts]:
    """Return the least cost of serving all layers, infinite if nothing fits, and the cuts.

    best[set, w, j]: the first j layers by exactly these workers, of which w is last.
    """
    count, size = window.workers, costs.stages.shape[1] - 1
    stages, hops = costs.stages[:count], costs.hops[:count, :count]
    zeros = np.zeros(count)
    enter = zeros if window.before is None else costs.hops[window.before, :count]
    leave = zeros if window.after is None else costs.hops[:count, window.after]
    best = np.full((2**count, count, size + 1), np.inf)
    for worker in range(count):
        best[1 << worker, worker] = costs.join(enter[worker], stages[worker, 0])
    for worker, sets in _growing_sets(count):
        step = 1 + 2**18 // (size + 1) ** 2  # sets at a time, so that they stay in the cache
        for at in range(0, len(sets), step):
            some = sets[at : at + step]
            arrived = costs.join(best[some], hops[:, worker, np.newaxis]).min(axis=1)
            reached = costs.join(arrived[:, :, np.newaxis], stages[worker]).min(axis=1)
            best[some | 1 << worker, worker] = reached
    ends = costs.join(best[:, :, size], leave)
    used, worker = (int(each) for each in np.unravel_index(ends.argmin(), ends.shape))
    value, at, cuts = float(ends[used, worker]), size, []
    while math.isfinite(value):
        used ^= 1 << worker
        if not used:
            cuts.append((worker, 0, at))
            break
        arrived = costs.join(best[used, :, :at], hops[:, worker, np.newaxis])
        sums = costs.join(arrived, stages[worker, :at, at])
        sender, begin = (int(each) for each in np.unravel_index(sums.argmin(), sums.shape))
        cuts.append((worker, begin, at))
        worker, at = sender, begin
    return value, cuts[::-1]


@lru_cache
def _growing_sets(count: int) -> list[tuple[int, Ints]]:
    """Return each worker with the sets it may join as bits, smaller sets first."""
    sets = np.arange(1, 2**count)
    members = sum((sets >> worker & 1 for worker in range(count)), start=np.zeros_like(sets))
    return [
        (worker, sets[(members == size) & (sets >> worker & 1 == 0)])
        for size in range(1, count)
        for worker in range(count)
    ]


# ------------------------------------------------------------------ many workers


def walk(costs: Costs) -> tuple[float, Cuts]:
    """Return a way through the layers, infinite if none was found.

    Of all ways to (last worker, layers covered) only the best is gone on with, to workers that it
    has not used. That finds the best if hops lead one way only: no way then comes back to a worker.
    """
    count, edges = costs.stages.shape[:2]
    best = costs.stages[:, 0].copy()  # [last worker, layers covered]
    sender, begin = np.zeros((2, count, edges), dtype=np.int64)
    used = np.zeros((edges, count, count), dtype=bool)  # [layers covered, last worker, worker]
    for at in range(1, edges - 1):
        used[at] = used[begin[:, at], sender[:, at]] | np.eye(count, dtype=bool)
        sums = np.where(used[at], np.inf, costs.join(best[:, at, np.newaxis], costs.hops))
        senders = sums.argmin(axis=0)
        arrived = sums[senders, np.arange(count)]
        reached = costs.join(arrived[:, np.newaxis], costs.stages[:, at])
        better = reached < best
        best = np.where(better, reached, best)
        sender = np.where(better, senders[:, np.newaxis], sender)
        begin[better] = at
    worker, at = int(best[:, -1].argmin()), edges - 1
    value, cuts = float(best[worker, at]), []
    while at and math.isfinite(value):
        start = int(begin[worker, at])
        cuts.append((worker, start, at))
        worker, at = int(sender[worker, at]), start
    return value, cuts[::-1]


def walk_forward(costs: Costs) -> tuple[float, Cuts]:
    """Return the best way that keeps the order of the workers; some may be left out."""
    forward = np.triu(np.ones_like(costs.hops, dtype=bool), 1)
    return walk(replace(costs, hops=np.where(forward, costs.hops, np.inf)))
