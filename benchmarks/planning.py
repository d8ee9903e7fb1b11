"""Measure how good partitions are, and how long it takes to find them.

    python -m benchmarks.planning               # both tables, about two minutes
    python -m benchmarks.planning quality       # what each part of the search buys
    python -m benchmarks.planning time --rounds 5

Workers differ in speed and memory. "alike" has equal layers and links; "mixed" has 300 links that
are known, with 0 to 50 ms, and a first layer that is half as large again.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable

from distributed_llm.common.types import WorkerId
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.partition.exact import additions_of, solve_exactly, solve_uniform
from distributed_llm.coordinator.partition.search import (
    best_partition,
    relaxed_starts,
    resolve_windows,
    search,
    shortlist,
    walks,
)
from distributed_llm.coordinator.partition.tables import (
    Candidate,
    Hop,
    Links,
    PartitionObjective,
    Tables,
    WorkerTimes,
    make_tables,
)
from distributed_llm.coordinator.plan import LayerMap

OBJECTIVES: tuple[PartitionObjective, ...] = ("throughput", "latency")
_LAYER_BYTES = 400_000_000
_KNOWN_LINKS = 300
_KV_TOKENS = 1024

_TIMED = [(workers, layers) for workers in (4, 8, 16, 100, 1000) for layers in (32, 126)]
_COMPARED = ((8, 32, 12), (12, 32, 6), (16, 32, 8), (64, 32, 4), (64, 126, 3), (300, 126, 2))
"""Workers, layers, and problems of that size."""

Solver = Callable[[Tables, PartitionObjective], LayerMap]

_HELD_KARP = 50_000_000
"""Additions up to which the search is compared with the exact solver."""


def cluster(
    draw: random.Random, workers: int, layers: int, *, mixed: bool
) -> tuple[ModelCost, list[Candidate], Links]:
    """Return a model of `layers` layers, workers into which it fits, and their links."""
    sizes = [_LAYER_BYTES] * layers
    sizes[0] += _LAYER_BYTES // 2 * mixed
    cost = ModelCost(tuple(sizes), 500_000_000, 500_000_000, 0, (4096,) * len(sizes))
    least = 2 * sum(sizes) // workers + 1_500_000_000
    candidates = [
        Candidate(
            WorkerId(f"worker-{w}"),
            int(least * draw.uniform(1, 4)),
            WorkerTimes(
                draw.uniform(1e-4, 2e-3), draw.lognormvariate(-6, 0.8), draw.uniform(1e-4, 5e-3)
            ),
        )
        for w in range(workers)
    ]
    names = [candidate.worker for candidate in candidates]
    known = {
        (draw.choice(names), draw.choice(names)): Hop(draw.uniform(0, 0.03), draw.uniform(0, 0.02))
        for _ in range(_KNOWN_LINKS * mixed)
    }
    return cost, candidates, Links(Hop(0.001, 0.0005), known)


def _rows(head: str, rows: list[list[str]]) -> str:
    columns = len(head.split("|"))
    lines = [f"| {head} |", "|" + "---|" * columns, *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


# ------------------------------------------------------------------ quality


def _part(*, starts: bool, walked: bool, windows: bool) -> Solver:
    """Return `search` with only some of its parts."""

    def solver(tables: Tables, objective: PartitionObjective) -> LayerMap:
        relaxed = relaxed_starts(tables, objective) if starts else []
        team = shortlist(tables, relaxed)
        candidates = [team.cuts(start) for start in relaxed]
        if walked:
            candidates += walks(team, objective, candidates)
        best = min(candidates, key=lambda cuts: team.minimised(cuts, objective), default=[])
        if best and windows:
            best = resolve_windows(team, best, objective)
        return team.layer_map(best)

    return solver


_PARTS: dict[str, Solver] = {
    "starts": _part(starts=True, walked=False, windows=False),
    "walks": _part(starts=False, walked=True, windows=False),
    "starts, windows": _part(starts=True, walked=False, windows=True),
    "walks, windows": _part(starts=False, walked=True, windows=True),
    "search": search,
}


def value(tables: Tables, layer_map: LayerMap, objective: PartitionObjective) -> float:
    """Return the seconds that the objective minimises; infinite for an empty layer map."""
    return tables.minimised(tables.cuts(layer_map), objective)[0] if layer_map else float("inf")


def compare(
    workers: int, layers: int, objective: PartitionObjective, number: int, *, mixed: bool
) -> str:
    """Return one cell per way: mean and worst excess over the best known, and median time."""
    exactly = solve_exactly if mixed else solve_uniform
    ways = dict(_PARTS)
    if not mixed or additions_of(workers, layers) <= _HELD_KARP:
        ways["exact"] = exactly
    excess: dict[str, list[float]] = {way: [] for way in ways}
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for seed in range(number):
        cost, candidates, links = cluster(random.Random(seed), workers, layers, mixed=mixed)
        tables = make_tables(cost, candidates, links, _KV_TOKENS)
        found = {}
        for way, solver in ways.items():
            started = time.perf_counter()
            found[way] = value(tables, solver(tables, objective), objective)
            taken[way].append(time.perf_counter() - started)
        least = min(found.values())
        for way, seconds in found.items():
            excess[way].append(100 * (seconds / least - 1))
    cells = [
        f"{statistics.mean(excess[way]):.1f} / {max(excess[way]):.1f} "
        f"({1e3 * statistics.median(taken[way]):.0f})"
        if way in ways
        else "-"
        for way in (*_PARTS, "exact")
    ]
    return " | ".join(cells)


def quality() -> None:
    """Print how far parts of the search end above the best that is known."""
    print("Excess over the best known, %: mean / worst (median ms)\n")
    rows = [
        [
            str(workers),
            str(layers),
            "mixed" if mixed else "alike",
            objective,
            compare(workers, layers, objective, number, mixed=mixed),
        ]
        for workers, layers, number in _COMPARED
        for mixed in (False, True)
        for objective in OBJECTIVES
    ]
    print(_rows(f"workers | layers | links | objective | {' | '.join(_PARTS)} | exact", rows))


# ------------------------------------------------------------------ time


def measure(
    workers: int, layers: int, objective: PartitionObjective, rounds: int, *, mixed: bool
) -> float:
    """Return the median seconds of finding the best partition."""
    taken = []
    for seed in range(rounds):
        cost, candidates, links = cluster(random.Random(seed), workers, layers, mixed=mixed)
        started = time.perf_counter()
        found = best_partition(cost, candidates, links, objective=objective, kv_tokens=_KV_TOKENS)
        taken.append(time.perf_counter() - started)
        assert found is not None
    return statistics.median(taken)


def times(rounds: int) -> None:
    """Print how long it takes to find the best partition."""
    rows = [
        [
            str(workers),
            str(layers),
            *(
                f"{1e3 * measure(workers, layers, objective, rounds, mixed=mixed):.0f}"
                for objective in OBJECTIVES
                for mixed in (False, True)
            ),
        ]
        for workers, layers in _TIMED
    ]
    head = [f"{objective}, {kind}, ms" for objective in OBJECTIVES for kind in ("alike", "mixed")]
    print(_rows(f"workers | layers | {' | '.join(head)}", rows))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", nargs="?", choices=("quality", "time"))
    parser.add_argument("--rounds", type=int, default=5, help="problems of each size")
    arguments = parser.parse_args()
    if arguments.what != "quality":
        times(arguments.rounds)
    if arguments.what != "time":
        quality()


if __name__ == "__main__":
    main()
