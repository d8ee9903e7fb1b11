"""Machines: workers and their links, as planning sees them. Pure values."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from distributed_llm.common.types import WorkerId
from distributed_llm.coordinator.partition.tables import Candidate, Links
from distributed_llm.coordinator.speeds.work import Work
from distributed_llm.coordinator.speeds.worker_speed import WorkerSpeed


@dataclass(frozen=True)
class Machines:
    """Workers and their links, as planning sees them.

    Attributes:
        memory_bytes: of each worker, for weights and KV cache.
        speeds: of each worker, as measured or probed.
        links: returns the hops of a step, given its number of tokens.
        overhead_s: seconds of a step beside stages and hops, such as to and from the coordinator.
        shares: stands for the cores that workers share, by worker; missing or empty: they share
            none.
    """

    memory_bytes: Mapping[WorkerId, int]
    speeds: Mapping[WorkerId, WorkerSpeed]
    links: Callable[[float], Links]
    overhead_s: float = 0.0
    shares: Mapping[WorkerId, str] = field(default_factory=dict)

    def candidates(self, work: Work) -> list[Candidate]:
        """Return the workers with their times for an average step.

        A worker that was not measured is expected to differ from its prior by the same factor as
        the others did at first (median).
        """
        scale = 1.0  # what was measured needs none
        if not all(self.speeds[worker].measured for worker in self.memory_bytes):
            scales = [speed.first_scale(work) for speed in self.speeds.values()]
            scale = median([scale for scale in scales if scale is not None] or [1.0])
        return [
            Candidate(
                worker,
                size,
                self.speeds[worker].times(work, scale=scale),
                self.shares.get(worker, ""),
            )
            for worker, size in self.memory_bytes.items()
        ]

    def subset(self, workers: Sequence[WorkerId]) -> "Machines":
        """Return the machines with only some of the workers."""
        sizes = {worker: self.memory_bytes[worker] for worker in workers}
        return replace(self, memory_bytes=sizes)
