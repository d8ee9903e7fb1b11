"""Which workers serve which layers, in which order, at best. Pure.

Any subset of the workers may serve, in any order. Two objectives (PipeEdge's and Halda's):
throughput makes the slowest stage or link as fast as can be, and of such partitions the sum small;
latency makes the sum of all stages and links small, with few stages. Three ways to find the best:

* All layers and links alike: the order does not matter. How fast the slowest stage can be is
  found by bisection (how many layers can each worker do in this time?), the least sum by a
  knapsack with fixed charges over (worker, layers covered). Exact for any number of workers.
* Few workers: dynamic programming over (set of workers used, last worker, layers covered), the
  travelling salesman's of Held and Karp with layers. Exact for all links and layers.
* Else a search: starts from the first way with links and layers evened out, and from a walk that
  remembers one path per (last worker, layers covered); then the second way solves windows of some
  stages and idle workers again and again. It never ends above its starts.

Times that differ by less than a nanosecond count as equal, and a stage more must save as much: so
rounding decides no tie. "Exact" is to within that.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from distributed_llm.common.types import LayerRange, WorkerId
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.partition.exact import (
    Window,
    additions_of,
    costs_of,
    held_karp,
    is_uniform,
    solve,
    solve_exactly,
    solve_uniform,
    walk,
    walk_forward,
)
from distributed_llm.coordinator.partition.tables import (
    TIE_S,
    Candidate,
    Cuts,
    Hop,
    Links,
    Objective,
    Partition,
    Speed,
    Tables,
    make_tables,
    mean_layers,
)
from distributed_llm.coordinator.plan import LayerMap

__all__ = [
    "Candidate",
    "Hop",
    "LayerMap",
    "Links",
    "Objective",
    "Partition",
    "Speed",
    "best_partition",
    "predict",
    "times_of",
]

_EXACT_WORK = 50_000_000
"""Additions up to which all sets of workers are tried; 0.2 s for throughput."""
_WINDOW = 4
"""Stages that the search solves again at a time, ..."""
_IDLE = 3
"""... and workers without layers that may take their place."""
_WINDOWS_WORK = 80_000_000
"""Additions that the search spends on windows."""
_WINDOW_WORK = 1_000_000
"""What one window costs beside its additions, in additions."""
_SHORTLIST = 48
"""Workers that the search considers beside those of its starts."""
_HALVINGS = 8
"""How often the search halves the span in which the time of the slowest stage lies."""


def predict(
    cost: ModelCost,
    candidates: Sequence[Candidate],
    links: Links,
    layer_map: Sequence[tuple[WorkerId, LayerRange]],
) -> Partition:
    """Return the times of given ranges; memory is not looked at.

    Raises:
        KeyError: a range names a worker that is no candidate.
    """
    stages, hops = times_of(cost, candidates, links, layer_map)
    slowest = max([*stages, *(hop.busy_s for hop in hops)])
    total = math.fsum([*stages, *(hop.latency_s + hop.busy_s for hop in hops)])
    return Partition(tuple(layer_map), slowest, total)


def times_of(
    cost: ModelCost,
    candidates: Sequence[Candidate],
    links: Links,
    layer_map: Sequence[tuple[WorkerId, LayerRange]],
) -> tuple[list[float], list[Hop]]:
    """Return the seconds of each stage, and the hops between them.

    Raises:
        KeyError: a range names a worker that is no candidate.
    """
    speeds = {candidate.worker: candidate.speed for candidate in candidates}
    weights = mean_layers(cost)
    stages = []
    for worker, layers in layer_map:
        speed = speeds[worker]
        last = layers.stop == cost.num_layers
        weight = float(weights[layers.start, layers.stop])
        stages.append(speed.task_s + speed.layer_s * weight + speed.last_s * last)
    hops = [links.hop(sender, receiver) for (sender, _), (receiver, _) in pairwise(layer_map)]
    return stages, hops


def best_partition(
    cost: ModelCost,
    candidates: Sequence[Candidate],
    links: Links,
    *,
    objective: Objective,
    kv_tokens: int,
) -> Partition | None:
    """Return the best partition that was found, None if none fits.

    Same input, same answer, in whatever order the candidates come.

    Args:
        cost: of the model.
        candidates: workers of different names.
        links: between them.
        objective: "throughput" makes `slowest_s` small, then `total_s`; "latency" makes `total_s`
            small, then the number of stages, then `slowest_s` of these workers in this order.
        kv_tokens: positions of KV cache that every stage must have room for.
    """
    ranked = sorted(candidates, key=lambda candidate: candidate.worker)
    if not ranked:
        return None
    tables = make_tables(cost, ranked, links, kv_tokens)
    if is_uniform(tables):
        layer_map = solve_uniform(tables, objective)
    elif additions_of(len(ranked), cost.num_layers) <= _EXACT_WORK:
        layer_map = solve_exactly(tables, objective)
    else:
        layer_map = _search(tables, objective)
    if not layer_map:
        return None
    if objective == "latency":
        layer_map = _even_out(tables, layer_map)
    return predict(cost, ranked, links, layer_map)


# ------------------------------------------------------------------ the search


def _in_order(tables: Tables, order: Sequence[int], objective: Objective) -> LayerMap:
    """Return the best ranges of some of these workers in this order; nothing if none fit."""
    team = tables.subset(order)
    return team.layer_map(solve(team, range(len(order)), objective, walk_forward))


def _even_out(tables: Tables, layer_map: LayerMap) -> LayerMap:
    """Return ranges of the same total with the least slowest stage, in the same order."""
    team = tables.subset(tables.order(layer_map))
    workers = range(len(layer_map))
    cuts = [(w, held.start, held.stop) for w, (_, held) in enumerate(layer_map)]
    total, slowest = team.price(cuts, "latency")
    times = np.unique(team.stages[team.stages < slowest])
    least, most = 0, len(times)
    probe = most - 1  # most often nothing is as good
    while least < most:
        value, found = walk_forward(costs_of(team, workers, float(times[probe])))
        if value <= total + TIE_S:
            cuts, most = found, probe
        else:
            least = probe + 1
        probe = (least + most) // 2
    return team.layer_map(cuts)


def _search(tables: Tables, objective: Objective) -> LayerMap:
    """Return good ranges for many workers; nothing if none were found."""
    starts = _starts(tables, objective)
    everyone = range(len(tables.names))
    inviting = _inviting(tables, everyone, everyone, tables.num_layers)[:_SHORTLIST]
    chosen = {w for start in starts for w in tables.order(start)}
    largest = np.argsort(-tables.memory, kind="stable")[: tables.num_layers]
    team = tables.subset(sorted((chosen or set(largest.tolist())) | set(inviting)))
    found = [
        [(w, held.start, held.stop) for w, (_, held) in zip(team.order(start), start, strict=True)]
        for start in starts
    ]
    found += _free_walks(team, objective, found)
    if not found:
        return ()
    best = min(found, key=lambda cuts: team.price(cuts, objective))
    return team.layer_map(_polish(team, best, objective))


def _starts(tables: Tables, objective: Objective) -> list[LayerMap]:
    """Return what is best if all layers were alike and all links, and cut for what they are."""
    sizes = tables.cost.layer_bytes
    alike = {math.ceil(sum(sizes) / len(sizes)), max(sizes)}
    found = [solve_uniform(tables.alike(size), objective) for size in sorted(alike)]
    starts = [
        _in_order(tables, tables.order(layer_map), objective) for layer_map in found if layer_map
    ]
    return [start for start in starts if start]


def _free_walks(tables: Tables, objective: Objective, found: Sequence[Cuts]) -> list[Cuts]:
    """Return what walks in any order find; for throughput below less and less time per stage."""
    team = range(len(tables.names))
    cuts = walk(costs_of(tables, team, math.inf))[1]
    walks = [cuts] if cuts else []
    if objective == "latency" or not (found or walks):
        return walks
    least, most = 0.0, min(tables.price(cuts, objective)[0] for cuts in [*found, *walks])
    for _ in range(_HALVINGS):
        cap_s = (least + most) / 2
        cuts = walk(costs_of(tables, team, cap_s))[1]
        if cuts:
            walks.append(cuts)
            most = tables.price(cuts, objective)[0]
        else:
            least = cap_s
    return walks


def _inviting(
    tables: Tables, senders: Sequence[int], receivers: Sequence[int], most: int
) -> list[int]:
    """Return all workers, least seconds per layer first if each had `most` layers or its fill."""
    bytes_each = sum(tables.cost.layer_bytes) / tables.num_layers
    bytes_each += tables.cost.kv_bytes_per_token * tables.kv_tokens
    layers = np.clip(tables.memory // max(1.0, bytes_each), 0, most)
    arrive = tables.delays[list(senders)].min(axis=0)
    leave = tables.delays[:, list(receivers)].min(axis=1)
    task, layer, _ = tables.speeds
    price = np.where(layers, (task + arrive + leave) / np.maximum(layers, 1) + layer, np.inf)
    return [int(w) for w in np.argsort(price, kind="stable") if math.isfinite(price[w])]


def _polish(tables: Tables, cuts: Cuts, objective: Objective) -> Cuts:
    """Return cuts of which some stages were solved again with idle workers until all is well."""
    work, skipped = _WINDOWS_WORK, 0
    while work > 0 and skipped < max(1, len(tables.names) - len(cuts)):
        price = tables.price(cuts, objective)
        for at in range(0, max(1, len(cuts) - _WINDOW // 2), _WINDOW // 2):
            if at < len(cuts) and work > 0:
                other, additions = _solve_window(tables, cuts, at, skipped, objective)
                work -= additions + _WINDOW_WORK
                if tables.price(other, objective) < tables.price(cuts, objective):
                    cuts = other
        skipped = 0 if tables.price(cuts, objective) < price else skipped + _IDLE
    return cuts


def _solve_window(
    tables: Tables, cuts: Cuts, at: int, skipped: int, objective: Objective
) -> tuple[Cuts, int]:
    """Return the cuts with some stages from `at` on solved again, and the additions it took."""
    head, window, tail = cuts[:at], cuts[at : at + _WINDOW], cuts[at + _WINDOW :]
    start, stop = window[0][1], window[-1][2]
    workers = [w for w, _, _ in window]
    busy = {w for w, _, _ in cuts}
    ends = [cut[0] for cut in (*head[-1:], *tail[:1])]
    inviting = _inviting(tables, [*workers, *ends], [*workers, *ends], stop - start)
    idle = [w for w in inviting if w not in busy][skipped : skipped + _IDLE]
    count = len(workers) + len(idle)
    before = count if head else None
    after = count + len(ends) - 1 if tail else None
    problem = Window(count, before, after)
    team, cap_s, edges = [*workers, *idle, *ends], math.inf, slice(start, stop + 1)
    if objective == "throughput":
        rest = [tables.price(part, objective)[0] for part in (head, tail) if part]
        slowest = held_karp(costs_of(tables, team, None, edges), problem)[0]
        cap_s = max([slowest, *rest]) + TIE_S
    found = held_karp(costs_of(tables, team, cap_s, edges), problem)[1]
    middle = [(team[w], start + begin, start + end) for w, begin, end in found]
    return [*head, *middle, *tail], additions_of(count, stop - start)
