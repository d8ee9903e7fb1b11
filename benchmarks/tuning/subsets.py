"""Which layers some of the workers would serve, were they alone. Pure."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from benchmarks.tuning.configurations import Configuration
from benchmarks.tuning.figures import WorkerFacts
from distributed_llm.common.types import WorkerId
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.partition.search import best_partition
from distributed_llm.coordinator.partition.tables import Candidate, Hop, Links, WorkerTimes


def subset_configurations(
    start: Configuration,
    sizes: Sequence[int],
    workers: Sequence[WorkerFacts],
    cost: ModelCost,
    kv_tokens: int,
) -> list[Configuration]:
    """Return `start` with all layers on the fastest one, two, ... workers, as `sizes` says.

    The layers go by measured speed, by the production planner; where nothing was measured, by
    memory bandwidth. A number of workers into whose memory the model does not fit is left out.

    Args:
        kv_tokens: positions of KV cache that every stage must have room for.
    """
    seconds = layer_seconds(workers)
    ranked = sorted(workers, key=lambda worker: (seconds[worker.name], worker.name))
    found = []
    for size in sizes:
        candidates = [
            Candidate(
                WorkerId(worker.name),
                worker.capabilities.memory_bytes,
                WorkerTimes(0.0, seconds[worker.name], 0.0),
            )
            for worker in ranked[:size]
        ]
        partition = best_partition(
            cost,
            candidates,
            Links(Hop(0.0, 0.0), {}),
            objective="throughput",
            kv_tokens=kv_tokens,
        )
        if partition:
            layers = tuple((str(worker), str(held)) for worker, held in partition.layer_map)
            found.append(replace(start, strategy="custom", objective="auto", layers=layers))
    return found


def layer_seconds(workers: Sequence[WorkerFacts]) -> dict[str, float]:
    """Return the seconds of one layer for each worker.

    Those that computed nothing are as much slower or faster as their memory bandwidth is.
    """
    measured = {one.name: one.layer_s for one in workers if one.layer_s}
    bandwidth = {one.name: one.capabilities.memory_bandwidth_bytes_per_s for one in workers}
    scale = (
        median(seconds * bandwidth[name] for name, seconds in measured.items()) if measured else 1.0
    )
    return {name: measured.get(name, scale / rate) for name, rate in bandwidth.items()}
