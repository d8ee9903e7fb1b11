"""Workers and their links, as planning sees them. Pure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from distributed_llm.common.types import WorkerId
from distributed_llm.coordinator.partition.tables import Candidate, Links
from distributed_llm.coordinator.speeds.work import Work
from distributed_llm.coordinator.speeds.worker_speed import WorkerSpeed


@dataclass(frozen=True)
class Machines:
    """Workers, as planning sees them.

    Attributes:
        memory_bytes: of each, for weights and KV cache.
        costs: measured or from the probe.
        links: from a number of tokens in a step to what the hops take.
        overhead_s: that a step takes beside stages and hops: on its way from and to the
            coordinator.
    """

    memory_bytes: Mapping[WorkerId, int]
    costs: Mapping[WorkerId, WorkerSpeed]
    links: Callable[[float], Links]
    overhead_s: float = 0.0

    def candidates(self, load: Work) -> list[Candidate]:
        """Return the workers with what they take under a load.

        One that was not measured is expected to be as far from its prior as the others were at
        first.
        """
        found = (costs.first_scale(load) for costs in self.costs.values())
        scale = median([scale for scale in found if scale is not None] or [1.0])
        return [
            Candidate(worker, size, self.costs[worker].times(load, scale=scale))
            for worker, size in self.memory_bytes.items()
        ]

    def subset(self, workers: Sequence[WorkerId]) -> "Machines":
        """Return some of them."""
        sizes = {worker: self.memory_bytes[worker] for worker in workers}
        return replace(self, memory_bytes=sizes)
