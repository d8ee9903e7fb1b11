"""Measure how long it takes to find the best partition, by workers and layers.

    python -m benchmarks.planning

Workers differ in speed and memory. "alike" has equal layers and links; "mixed" has some links that
are known and a first layer that is larger, as mixture-of-experts models do.
"""

import argparse
import random
import statistics
import time

from distributed_llm.common.types import WorkerId
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.partition.search import best_partition
from distributed_llm.coordinator.partition.tables import Candidate, Hop, Links, Objective, Speed

WORKERS = (4, 8, 16, 100, 1000)
LAYERS = (32, 126)
OBJECTIVES: tuple[Objective, ...] = ("throughput", "latency")
_LAYER_BYTES = 400_000_000
_KNOWN_LINKS = 300


def cluster(
    draw: random.Random, workers: int, layers: int, *, mixed: bool
) -> tuple[ModelCost, list[Candidate], Links]:
    """Return a model of `layers` layers, workers into which it fits, and their links."""
    sizes = [_LAYER_BYTES] * layers
    sizes[0] += _LAYER_BYTES // 2 * mixed
    cost = ModelCost(tuple(sizes), 500_000_000, 500_000_000, 0, 4096)
    least = 2 * sum(sizes) // workers + 1_500_000_000
    candidates = [
        Candidate(
            WorkerId(f"worker-{w}"),
            int(least * draw.uniform(1, 4)),
            Speed(draw.uniform(1e-4, 2e-3), draw.lognormvariate(-6, 0.8), draw.uniform(1e-4, 5e-3)),
        )
        for w in range(workers)
    ]
    names = [candidate.worker for candidate in candidates]
    known = {
        (draw.choice(names), draw.choice(names)): Hop(draw.uniform(0, 0.03), draw.uniform(0, 0.02))
        for _ in range(_KNOWN_LINKS * mixed)
    }
    return cost, candidates, Links(Hop(0.001, 0.0005), known)


def measure(workers: int, layers: int, objective: Objective, rounds: int, *, mixed: bool) -> float:
    """Return the median seconds of finding the best partition."""
    taken = []
    for seed in range(rounds):
        cost, candidates, links = cluster(random.Random(seed), workers, layers, mixed=mixed)
        started = time.perf_counter()
        found = best_partition(cost, candidates, links, objective=objective, kv_tokens=1024)
        taken.append(time.perf_counter() - started)
        assert found is not None
    return statistics.median(taken)


def run(rounds: int) -> None:
    """Measure and print."""
    print("| workers | layers | objective | alike, ms | mixed, ms |")
    print("|---|---|---|---|---|")
    for workers in WORKERS:
        for layers in LAYERS:
            for objective in OBJECTIVES:
                times = (
                    measure(workers, layers, objective, rounds, mixed=mixed)
                    for mixed in (False, True)
                )
                cells = [str(each) for each in (workers, layers, objective)]
                cells += [f"{taken * 1e3:.0f}" for taken in times]
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    run(parser.parse_args().rounds)
