"""Which workers serve which layers, in which order: the best partition, or a good one. Pure.

Any subset of the workers may serve, in any order. There are two objectives (those of PipeEdge and
of Halda): "throughput" minimises the slowest stage or link, and among such partitions the sum;
"latency" minimises the sum of all stages and links. `best_partition` has three ways:

* All layers and all links are alike: then the order does not matter. Bisection finds how fast the
  slowest stage can be (how many layers can each worker compute in this time?), and a knapsack with
  fixed charges over (worker, layers covered) the least sum. Exact for any number of workers.
  No layers of an encoder-decoder are alike in this sense.
* Few workers: dynamic programming over (set of workers used, last worker, layers covered), which is
  Held and Karp's for the travelling salesman, with layers. Exact for any links and layers.
* Otherwise a search. It starts from the first way, with layers and links taken to be alike
  ("relaxed"), and from walks, which remember one path per (last worker, layers covered). Then the
  second way solves windows of a few stages and idle workers, until none gets better. The result is
  never worse than a start.

What each part is worth is measured by `python -m benchmarks.planning quality`.

Times that differ by less than a nanosecond (`TIE_S`) are equal, and each further stage must save as
much; so rounding decides no tie. "Exact" is up to that.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from distributed_llm.common.types import LayerRange
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.partition.exact import (
    Window,
    additions_of,
    held_karp,
    is_uniform,
    path_times,
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
    Partition,
    PartitionObjective,
    Tables,
    bytes_away,
    make_tables,
    mean_layers,
    seconds_away,
)
from distributed_llm.coordinator.plan import LayerMap

_EXACT_ADDITIONS = 50_000_000
"""Additions up to which Held-Karp is used; they take 0.2 s for throughput."""

_WINDOW = 4
"""Stages in a window."""

_IDLE = 3
"""Idle workers that may replace the workers of a window."""

_MAX_ADDITIONS = 80_000_000
"""Additions that a search may spend on windows."""

_WINDOW_ADDITIONS = 1_000_000
"""Additions that a window is charged for the time that it takes beside its own."""

_SHORTLIST = 48
"""Workers that the search considers besides those of its starts."""

_HALVINGS = 8
"""Steps of the bisection of the bound that walks for throughput are capped at."""


def predict(
    cost: ModelCost, candidates: Sequence[Candidate], links: Links, layer_map: LayerMap
) -> Partition:
    """Return a layer map with its times, without checking memory.

    Raises:
        KeyError: the layer map names a worker that is no candidate.
    """
    stages, hops = times_of(cost, candidates, links, layer_map)
    cores = {candidate.worker: candidate.shares or candidate.worker for candidate in candidates}
    together: dict[str, float] = {}
    for (worker, _), stage_s in zip(layer_map, stages, strict=True):
        together[cores[worker]] = together.get(cores[worker], 0.0) + stage_s
    slowest = max([*together.values(), *(hop.busy_s for hop in hops)])
    total = math.fsum([*stages, *(hop.latency_s + hop.busy_s for hop in hops)])
    return Partition(layer_map, slowest, total)


def times_of(
    cost: ModelCost, candidates: Sequence[Candidate], links: Links, layer_map: LayerMap
) -> tuple[list[float], list[Hop]]:
    """Return the seconds of each stage, and the hops between them.

    Raises:
        KeyError: the layer map names a worker that is no candidate.
    """
    by_worker = {candidate.worker: candidate for candidate in candidates}
    lengths, source_lengths = mean_layers(cost)
    stages = []
    for worker, layers in layer_map:
        times, away_s = by_worker[worker].times, _away_s(cost, by_worker[worker], layers)
        last = layers.stop == cost.num_layers
        length = float(lengths[layers.start, layers.stop])
        taken = times.task_s + times.layer_s * length + times.last_s * last + away_s
        if cost.encoder_layers:
            taken += times.source_s * float(source_lengths[layers.start, layers.stop])
            taken += times.answer_s * (layers.stop > cost.encoder_layers)
        stages.append(taken)
    hops = [
        links.hop(sender, receiver, for_sources=held.stop <= cost.encoder_layers)
        for (sender, held), (receiver, _) in pairwise(layer_map)
    ]
    return stages, hops


def _away_s(cost: ModelCost, candidate: Candidate, layers: LayerRange) -> float:
    """Return the seconds in which a stage brings what does not fit on its device."""
    if (own := candidate.offload) is None:
        return 0.0
    needed, memory = cost.weight_bytes(layers), candidate.memory_bytes - own.room_bytes
    away = bytes_away(cost, np.array(needed), np.array(memory))
    return float(seconds_away(away, own.seconds_per_byte, own.ram_bytes, own.seconds_per_ram_byte))


def best_partition(
    cost: ModelCost,
    candidates: Sequence[Candidate],
    links: Links,
    *,
    objective: PartitionObjective,
    kv_tokens: int,
) -> Partition | None:
    """Return the best partition that was found, None if none fits.

    The same candidates give the same answer, in whatever order they come.

    Args:
        cost: of the model.
        candidates: workers with distinct names.
        links: between them.
        objective: "throughput" minimises `slowest_s`, then `total_s`; "latency" minimises
            `total_s`, then the number of stages, then `slowest_s` for these workers in this order.
        kv_tokens: positions of KV cache that every stage must have room for.
    """
    ranked = sorted(candidates, key=lambda candidate: candidate.worker)
    if not ranked:
        return None
    tables = make_tables(cost, ranked, links, kv_tokens)
    if is_uniform(tables):
        layer_map = solve_uniform(tables, objective)
    elif additions_of(len(ranked), cost.num_layers) <= _EXACT_ADDITIONS:
        layer_map = solve_exactly(tables, objective)
    else:
        layer_map = search(tables, objective)
    if not layer_map:
        return None
    if objective == "latency":
        layer_map = _even_out(tables, layer_map)
    return predict(cost, ranked, links, layer_map)


# ------------------------------------------------------------------ the search


def search(tables: Tables, objective: PartitionObjective) -> LayerMap:
    """Return a good layer map for many workers; empty if none was found."""
    starts = relaxed_starts(tables, objective)
    team = shortlist(tables, starts)
    candidates = [team.cuts(start) for start in starts]
    candidates += walks(team, objective, candidates)
    if not candidates:
        return ()
    best = min(candidates, key=lambda cuts: team.minimised(cuts, objective))
    return team.layer_map(resolve_windows(team, best, objective))


def relaxed_starts(tables: Tables, objective: PartitionObjective) -> list[LayerMap]:
    """Return layer maps whose order is best if all layers and links were alike.

    The layers of each order are divided by their true sizes and links. All layers are taken to be
    of mean size, which suits the times, and of the largest size, which suits the memory.
    """
    cost = tables.cost
    fixed = cost.layer_fixed_bytes
    mean = (math.ceil(sum(fixed) / len(fixed)), math.ceil(cost.mean_kv_bytes))
    alike = {mean, (max(fixed), max(cost.layer_kv_bytes))}
    relaxed = [solve_uniform(tables.alike(*sizes), objective) for sizes in sorted(alike)]
    orders = [tables.order(layer_map) for layer_map in relaxed if layer_map]
    starts = [_in_order(tables, order, objective) for order in orders]
    return [start for start in starts if start]


def shortlist(tables: Tables, starts: Sequence[LayerMap]) -> Tables:
    """Return the tables of the workers that the search considers.

    These are the workers of the starts (without any, those with the most memory), and the
    `_SHORTLIST` quickest of all.
    """
    everyone = range(len(tables.names))
    quickest = _by_layer_time(tables, everyone, everyone, tables.num_layers)[:_SHORTLIST]
    chosen = {w for start in starts for w in tables.order(start)}
    largest = np.argsort(-tables.memory, kind="stable")[: tables.num_layers]
    return tables.subset(sorted((chosen or set(largest.tolist())) | set(quickest)))


def walks(tables: Tables, objective: PartitionObjective, known: Sequence[Cuts]) -> list[Cuts]:
    """Return the cuts that walks over all workers find.

    For throughput, further walks are capped: no stage or link takes longer than a bound, which
    bisection lowers from the best time so far.

    Args:
        tables: of the workers.
        objective: of the partition.
        known: cuts that are known already; the best of them is the first bound.
    """
    team = range(len(tables.names))
    cuts = walk(path_times(tables, team, math.inf))[1]
    walked = [cuts] if cuts else []
    if objective == "latency" or not (known or walked):
        return walked
    least, most = 0.0, min(tables.minimised(cuts, objective)[0] for cuts in [*known, *walked])
    for _ in range(_HALVINGS):
        cap_s = (least + most) / 2
        cuts = walk(path_times(tables, team, cap_s))[1]
        if cuts:
            walked.append(cuts)
            most = tables.minimised(cuts, objective)[0]
        else:
            least = cap_s
    return walked


def resolve_windows(tables: Tables, cuts: Cuts, objective: PartitionObjective) -> Cuts:
    """Return cuts improved window by window, until no window improves or the additions are spent.

    A window is some consecutive stages; it is solved exactly for their workers and a few idle ones.
    A round over all windows without success is followed by one with the next idle workers.
    """
    left, skipped = _MAX_ADDITIONS, 0
    while left > 0 and skipped < max(1, len(tables.names) - len(cuts)):
        before = tables.minimised(cuts, objective)
        for at in range(0, max(1, len(cuts) - _WINDOW // 2), _WINDOW // 2):
            if at < len(cuts) and left > 0:
                other, additions = _resolve_window(tables, cuts, at, skipped, objective)
                left -= additions + _WINDOW_ADDITIONS
                if tables.minimised(other, objective) < tables.minimised(cuts, objective):
                    cuts = other
        skipped = 0 if tables.minimised(cuts, objective) < before else skipped + _IDLE
    return cuts


def _resolve_window(
    tables: Tables, cuts: Cuts, at: int, skipped: int, objective: PartitionObjective
) -> tuple[Cuts, int]:
    """Return the cuts with the window from stage `at` on solved again, and the additions of that.

    Args:
        tables: of the workers.
        cuts: all stages.
        at: index of the first stage of the window.
        skipped: number of idle workers, the quickest first, that were tried already.
        objective: of the partition.
    """
    head, window, tail = cuts[:at], cuts[at : at + _WINDOW], cuts[at + _WINDOW :]
    start, stop = window[0][1], window[-1][2]
    workers = [w for w, _, _ in window]
    busy = {w for w, _, _ in cuts}
    ends = [cut[0] for cut in (*head[-1:], *tail[:1])]
    ranked = _by_layer_time(tables, [*workers, *ends], [*workers, *ends], stop - start)
    idle = [w for w in ranked if w not in busy][skipped : skipped + _IDLE]
    count = len(workers) + len(idle)
    before = count if head else None
    after = count + len(ends) - 1 if tail else None
    problem = Window(count, before, after)
    team, cap_s, edges = [*workers, *idle, *ends], math.inf, slice(start, stop + 1)
    if objective == "throughput":
        rest = [tables.minimised(part, objective)[0] for part in (head, tail) if part]
        slowest = held_karp(path_times(tables, team, None, edges), problem)[0]
        cap_s = max([slowest, *rest]) + TIE_S
    solved = held_karp(path_times(tables, team, cap_s, edges), problem)[1]
    middle = [(team[w], start + begin, start + end) for w, begin, end in solved]
    return [*head, *middle, *tail], additions_of(count, stop - start)


def _by_layer_time(
    tables: Tables, senders: Sequence[int], receivers: Sequence[int], most: int
) -> list[int]:
    """Return the workers that can hold a layer, least seconds per layer first.

    The seconds are those of a stage of `most` layers, or of as many as fit, with the quickest hops
    from `senders` and to `receivers`.
    """
    bytes_each = sum(tables.cost.layer_fixed_bytes) / tables.num_layers
    bytes_each += tables.cost.mean_kv_bytes * tables.kv_tokens
    layers = np.clip(tables.memory // max(1.0, bytes_each), 0, most)
    arrive = tables.delays[list(senders)].min(axis=0)
    leave = tables.delays[:, list(receivers)].min(axis=1)
    task, layer = tables.mean_times
    seconds = np.where(layers, (task + arrive + leave) / np.maximum(layers, 1) + layer, np.inf)
    return [int(w) for w in np.argsort(seconds, kind="stable") if math.isfinite(seconds[w])]


# ------------------------------------------------------------------ a given order


def _in_order(tables: Tables, order: Sequence[int], objective: PartitionObjective) -> LayerMap:
    """Return the best layer map that keeps an order and may skip workers; empty if none fits."""
    team = tables.subset(order)
    return team.layer_map(solve(team, range(len(order)), objective, walk_forward))


def _even_out(tables: Tables, layer_map: LayerMap) -> LayerMap:
    """Return the layer map of the same order and total time with the quickest slowest stage.

    Where machines are alike, many partitions have the least sum; this one also serves several
    sequences well.
    """
    team = tables.subset(tables.order(layer_map))
    workers = range(len(layer_map))
    cuts = team.cuts(layer_map)
    total, slowest = team.minimised(cuts, "latency")
    times = np.unique(team.stages[team.stages < slowest])
    least, most = 0, len(times)
    guess = most - 1  # most often nothing is as good
    while least < most:
        seconds, even_cuts = walk_forward(path_times(team, workers, float(times[guess])))
        if seconds <= total + TIE_S:
            cuts, most = even_cuts, guess
        else:
            least = guess + 1
        guess = (least + most) // 2
    return team.layer_map(cuts)
