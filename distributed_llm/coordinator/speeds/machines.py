"""Machines: workers and their links, as planning sees them. Pure values."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from distributed_llm.common.messages import Capabilities
from distributed_llm.common.offloading import LAYERS_AT_ONCE
from distributed_llm.common.types import WorkerId
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.partition.tables import Candidate, Links, Offload
from distributed_llm.coordinator.speeds.work import Work
from distributed_llm.coordinator.speeds.worker_speed import WorkerSpeed


@dataclass(frozen=True)
class Overflow:
    """Where layers of a worker may stay that have no room in the memory of its device.

    Attributes:
        room_bytes: for such layers, in all.
        bytes_per_s: at which they are brought in every step, from the disk.
        ram_bytes: the part of `room_bytes`, taken first, in the memory of a GPU's machine.
        ram_bytes_per_s: at which they are brought from there.
    """

    room_bytes: int
    bytes_per_s: float
    ram_bytes: int = 0
    ram_bytes_per_s: float = math.inf

    @classmethod
    def of(cls, machine: Capabilities) -> "Overflow | None":
        """Return what a machine offers; None if that is nothing."""
        disk, ram = machine.disk_bytes_per_s, machine.ram_bytes_per_s
        if not machine.offload_bytes or (rate := disk or ram) is None:
            return None
        if not machine.ram_bytes or ram is None:
            return cls(machine.offload_bytes, rate)
        return cls(machine.offload_bytes, rate, machine.ram_bytes, ram)


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
        overflows: of the workers that offer some, by worker.
        offloads: whether `memory_bytes` counts that room as well.
    """

    memory_bytes: Mapping[WorkerId, int]
    speeds: Mapping[WorkerId, WorkerSpeed]
    links: Callable[[float], Links]
    overhead_s: float = 0.0
    shares: Mapping[WorkerId, str] = field(default_factory=dict)
    overflows: Mapping[WorkerId, Overflow] = field(default_factory=dict)
    offloads: bool = False

    def links_for(self, work: Work) -> Links:
        """Return the hops of an average step."""
        tokens = work.all_tokens
        share = work.prompt_tokens / tokens if tokens else 0.0
        return replace(self.links(tokens), source_steps=work.prompts, source_tokens=share)

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
                self._offload(worker),
            )
            for worker, size in self.memory_bytes.items()
        ]

    def _offload(self, worker: WorkerId) -> Offload | None:
        own = self.overflows.get(worker)
        if not self.offloads or own is None:
            return None
        return Offload(own.room_bytes, 1 / own.bytes_per_s, own.ram_bytes, 1 / own.ram_bytes_per_s)

    def offloading(self, cost: ModelCost, kv_tokens: int) -> "Machines | None":
        """Return the machines with their overflows counted as memory for layers; None if none help.

        What cannot be there is left room for: embedding, head, the layers that are on the device at
        a time, and KV cache. Those layers have their place in the machine's memory beside a GPU,
        too, so that has room for as much less; and for one less, as only whole ones are moved.

        Args:
            cost: of the model.
            kv_tokens: positions of KV cache that every stage must have room for.
        """
        layer_bytes = sum(cost.read_bytes) // cost.num_layers
        kv_bytes = max(1, int(cost.mean_kv_bytes * kv_tokens))
        ends = cost.all_weight_bytes - cost.all_layer_bytes
        fixed_bytes = ends + LAYERS_AT_ONCE * max(cost.read_bytes)
        memory, overflows = dict(self.memory_bytes), {}
        for worker, own in self.overflows.items():
            if (size := memory.get(worker)) is None:
                continue
            layers = max(0, size - fixed_bytes) // kv_bytes
            most = ends + layers * (layer_bytes + kv_bytes)
            lost = (LAYERS_AT_ONCE + 1) * max(cost.read_bytes) if own.ram_bytes else 0
            if (room := min(own.room_bytes - lost, most - size)) > 0:
                memory[worker] = size + room
                overflows[worker] = replace(own, room_bytes=room)
        if not overflows:
            return None
        return replace(self, memory_bytes=memory, overflows=overflows, offloads=True)

    def subset(self, workers: Sequence[WorkerId]) -> "Machines":
        """Return the machines with only some of the workers."""
        sizes = {worker: self.memory_bytes[worker] for worker in workers}
        return replace(self, memory_bytes=sizes)
