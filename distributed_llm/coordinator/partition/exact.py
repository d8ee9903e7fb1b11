"""Solvers: exact for uniform problems and for few workers, and a walk for many. Pure.

A problem is uniform if all layers have one size and all links one speed. The walk is exact where
the order of the workers is given.
"""

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
    PartitionObjective,
    Tables,
)
from distributed_llm.coordinator.plan import LayerMap

# ------------------------------------------------------------------ uniform problems


def is_uniform(tables: Tables) -> bool:
    """Return whether all layers have one size, KV cache included, and all links one speed.

    If layers have to be together, or some are an encoder's, they are not alike.
    """
    pairs = ~np.eye(len(tables.names), dtype=bool)
    links = [np.all(each[pairs] == each[0, -1]) for each in (tables.delays, tables.busy)]
    cost = tables.cost
    sizes = set(zip(cost.read_bytes, cost.layer_fixed_bytes, cost.layer_kv_bytes, strict=True))
    return len(sizes) == 1 and all(links) and not cost.uncut and not cost.encoder_layers


def solve_uniform(tables: Tables, objective: PartitionObjective) -> LayerMap:
    """Return the best layer map of a uniform problem; empty if none fits."""
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
_TRANSITIONS = (([0, 1, 2, 3], [0, 1, 2, 3]), ([0, 2], [1, 3]), ([0, 1], [2, 3]))
"""By role of a stage: the states in which it can be taken, and the state each leads to. A state
tells which ends of the model have their stage: 0 none, 1 the first, 2 the last, 3 both."""


def _least_slowest(roles: Floats, alone: Floats, busy_s: float) -> float:
    """Return the least possible seconds of the slowest stage or link; infinite if nothing fits."""

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


def _knapsack(seconds: Floats) -> tuple[float, Cuts]:
    """Return the least sum of a first, a last and any number of middle stages, and the cuts.

    Args:
        seconds: of a stage, by role, worker and number of layers, float64 [3, W, L]; infinite where
            impossible.
    """
    size = seconds.shape[2]
    best = np.full((4, size + 1), np.inf)  # [state of `_TRANSITIONS`, layers covered]
    best[0, 0] = 0.0
    history = [best]
    never = np.full_like(best, np.inf)
    for worker in range(seconds.shape[1]):
        best = best.copy()
        for role, (sources, targets) in enumerate(_TRANSITIONS):
            most = int(np.isfinite(seconds[role, worker]).sum())
            if most:
                before = history[-1][sources, :-1]
                padded = np.concatenate([never[sources, :most], before], axis=1)
                windows = sliding_window_view(padded, most, axis=1)
                reached = (windows + seconds[role, worker, most:0:-1]).min(axis=2)
                best[targets] = np.minimum(best[targets], reached)
        history.append(best)
    total = float(best[3, size])
    return total, _unpack(seconds, history) if math.isfinite(total) else []


def _unpack(seconds: Floats, history: Sequence[Floats]) -> Cuts:
    state, at = 3, seconds.shape[2]
    taken: list[list[tuple[int, int]]] = [[], [], []]  # by role, (worker, layers)
    for worker in reversed(range(seconds.shape[1])):
        before = history[worker]
        if before[state, at] == history[worker + 1][state, at]:
            continue
        most = min(at, seconds.shape[2] - 1)
        options = []
        for role, (sources, targets) in enumerate(_TRANSITIONS):
            if state in targets:
                source = sources[targets.index(state)]
                sums = before[source, at - most : at][::-1] + seconds[role, worker, 1 : most + 1]
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
class PathTimes:
    """The times of stages and hops, of which a solver minimises the sum or the maximum on a path.

    Attributes:
        stages: seconds of [start, stop) by worker, float64 [n, L + 1, L + 1].
        hops: seconds by sender, receiver and layers covered, float64 [n, n, L + 1]; [n, n, 1] if it
            does not matter how many layers are covered.
        join: `np.add` or `np.maximum`.
    """

    stages: Floats
    hops: Floats
    join: np.ufunc


def path_times(
    tables: Tables, team: Sequence[int], cap_s: float | None, edges: slice = slice(None)
) -> PathTimes:
    """Return the times of some workers, which a solver minimises.

    Args:
        tables: of all workers.
        team: indices of the workers.
        cap_s: seconds that no stage or link may exceed, for the least sum; None for the least
            maximum.
        edges: slice of the L + 1 boundaries between layers, for a part of the layers.
    """
    index = np.array(team, dtype=np.int64)
    pairs = np.ix_(index, index)
    stages = tables.stages[index, edges, edges]
    busy = tables.hops(tables.source_busy[pairs], tables.busy[pairs])
    delays = tables.hops(tables.source_delays[pairs], tables.delays[pairs])
    if busy.shape[2] > 1:
        busy, delays = busy[..., edges], delays[..., edges]
    if cap_s is None:
        return PathTimes(stages, busy, np.maximum)
    stages = np.where(stages <= cap_s, stages + TIE_S, np.inf)
    return PathTimes(stages, np.where(busy <= cap_s, delays, np.inf), np.add)


_Solver = Callable[[PathTimes], tuple[float, Cuts]]


def solve(
    tables: Tables, team: Sequence[int], objective: PartitionObjective, solver: _Solver
) -> Cuts:
    """Return the best cuts for the objective that `solver` finds; empty if none fit."""
    cap_s = math.inf
    if objective == "throughput":
        cap_s = solver(path_times(tables, team, None))[0] + TIE_S
    return solver(path_times(tables, team, cap_s))[1]


def additions_of(workers: int, layers: int) -> int:
    """Return how many additions `held_karp` does."""
    return (workers << workers) * (layers + 1) ** 2 // 2


def solve_exactly(tables: Tables, objective: PartitionObjective) -> LayerMap:
    """Return the best layer map, by Held-Karp; empty if none fits."""
    team = range(len(tables.names))
    window = Window(len(team), None, None)
    return tables.layer_map(solve(tables, team, objective, lambda c: held_karp(c, window)))


@dataclass(frozen=True)
class Window:
    """A part of the layers, to be served by any of the first `workers` workers of a team.

    Attributes:
        workers: how many.
        before: index of the worker that serves the layers before; None at the start of the model.
        after: index of the worker that serves the layers after; None at the end of the model.
    """

    workers: int
    before: int | None
    after: int | None


def held_karp(times: PathTimes, window: Window) -> tuple[float, Cuts]:
    """Return the least time of serving all layers, infinite if nothing fits, and the cuts.

    best[set, w, j] is the least time of the first j layers on exactly this set of workers (a bit
    each), with w the last. (Held and Karp, 1962.)
    """
    count, size = window.workers, times.stages.shape[1] - 1
    stages, hops = times.stages[:count], times.hops[:count, :count]
    zeros = np.zeros(count)
    enter = zeros if window.before is None else times.hops[window.before, :count, 0]
    leave = zeros if window.after is None else times.hops[:count, window.after, -1]
    best = np.full((2**count, count, size + 1), np.inf)
    for worker in range(count):
        best[1 << worker, worker] = times.join(enter[worker], stages[worker, 0])
    for worker, sets in _growing_sets(count):
        step = 1 + 2**18 // (size + 1) ** 2  # sets at a time, so that they stay in the cache
        for at in range(0, len(sets), step):
            some = sets[at : at + step]
            arrived = times.join(best[some], hops[:, worker]).min(axis=1)
            reached = times.join(arrived[:, :, np.newaxis], stages[worker]).min(axis=1)
            best[some | 1 << worker, worker] = reached
    ends = times.join(best[:, :, size], leave)
    used, worker = (int(each) for each in np.unravel_index(ends.argmin(), ends.shape))
    value, at, cuts = float(ends[used, worker]), size, []
    while math.isfinite(value):
        used ^= 1 << worker
        if not used:
            cuts.append((worker, 0, at))
            break
        arrived = times.join(best[used, :, :at], hops[:, worker, :at])
        sums = times.join(arrived, stages[worker, :at, at])
        sender, begin = (int(each) for each in np.unravel_index(sums.argmin(), sums.shape))
        cuts.append((worker, begin, at))
        worker, at = sender, begin
    return value, cuts[::-1]


@lru_cache
def _growing_sets(count: int) -> list[tuple[int, Ints]]:
    """Return (worker, sets of others as bits that it may join), smaller sets first."""
    sets = np.arange(1, 2**count)
    members = sum((sets >> worker & 1 for worker in range(count)), start=np.zeros_like(sets))
    return [
        (worker, sets[(members == size) & (sets >> worker & 1 == 0)])
        for size in range(1, count)
        for worker in range(count)
    ]


# ------------------------------------------------------------------ many workers


def walk(times: PathTimes) -> tuple[float, Cuts]:
    """Return the time of a path through the layers, infinite if none was found, and its cuts.

    Only the best path to each (last worker, layers covered) is extended, by workers that it has not
    used. This is exact if hops lead one way only, for then no path can return to a worker.
    """
    count, edges = times.stages.shape[:2]
    best = times.stages[:, 0].copy()  # [last worker, layers covered]
    sender, begin = np.zeros((2, count, edges), dtype=np.int64)
    used = np.zeros((edges, count, count), dtype=bool)  # [layers covered, last worker, worker]
    for at in range(1, edges - 1):
        used[at] = used[begin[:, at], sender[:, at]] | np.eye(count, dtype=bool)
        hops = times.hops[..., min(at, times.hops.shape[2] - 1)]
        sums = np.where(used[at], np.inf, times.join(best[:, at, np.newaxis], hops))
        senders = sums.argmin(axis=0)
        arrived = sums[senders, np.arange(count)]
        reached = times.join(arrived[:, np.newaxis], times.stages[:, at])
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


def walk_forward(times: PathTimes) -> tuple[float, Cuts]:
    """Return the best path that keeps the order of the workers, as `walk` does.

    Some may be left out.
    """
    forward = np.triu(np.ones(times.hops.shape[:2], dtype=bool), 1)[..., np.newaxis]
    return walk(replace(times, hops=np.where(forward, times.hops, np.inf)))
