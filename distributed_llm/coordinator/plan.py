"""Which worker serves which layers, in three forms. Pure values.

- A `LayerMap` says who serves what and nothing else: (worker, layer range) pairs in the order of
  the layers. Decisions compare, remember and pass on this form.
- A `Plan` is a layer map with the memory that it takes: each `PlannedStage` knows its weights and
  the room they leave for KV cache. Planning makes it, and `cluster` has it loaded.
- `PipelineStage`s are the stages of a running pipeline: each knows the peer (the connection) at
  which its worker is reached.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from distributed_llm.common.errors import NotEnoughMemory
from distributed_llm.common.layer_states import HELD_STATES
from distributed_llm.common.offloading import away, layers_away, most_in_ram
from distributed_llm.common.types import LayerRange, PeerId, WorkerId
from distributed_llm.common.weight_forms import Quantize
from distributed_llm.common.wording import layers_text, size_text
from distributed_llm.coordinator.kv_windows import KVWindows, margin_tokens
from distributed_llm.coordinator.model_cost import ModelCost

ANY_TOKENS = 2**31 - 1
"""Positions of KV cache that a stage has room for if it keeps none."""

LayerMap = tuple[tuple[WorkerId, LayerRange], ...]
"""The layers of each worker, in the order of the layers; they cover every layer exactly once."""


@dataclass(frozen=True)
class PlannedStage:
    """One layer range on one worker, and its memory.

    Attributes:
        kv_tokens: positions of KV cache that fit into the memory left by the weights; `ANY_TOKENS`
            if all layers are an encoder's, which keep nothing of sequences.
        weight_bytes: that are in the memory of the worker's device.
        quantize: what floating-point weights become while they are loaded; the same on all stages.
        from_disk: number of layers that do not fit, and stay on the worker's disk.
        disk_bytes: of these layers, which are read in every step.
        from_ram: of those that stay in the machine's memory, beside a GPU.
        ram_bytes: of these, which are copied in every step.
    """

    worker: WorkerId
    layers: LayerRange
    weight_bytes: int
    kv_tokens: int
    quantize: Quantize = "none"
    from_disk: int = 0
    disk_bytes: int = 0
    from_ram: int = 0
    ram_bytes: int = 0

    @property
    def is_away(self) -> bool:
        """Whether layers have no room on the worker's device."""
        return bool(self.from_disk or self.from_ram)


Plan = tuple[PlannedStage, ...]
"""The stages in the order of the layers; they cover every layer exactly once."""


@dataclass(frozen=True)
class PipelineStage:
    """A stage of a running pipeline: a worker, its connection and its layers.

    Attributes:
        shares: stands for the cores that the worker shares with others; empty: it shares none.
        away_s: seconds that a step is expected to take for weights that are not on its device.
    """

    peer: PeerId
    worker: WorkerId
    layers: LayerRange
    shares: str = ""
    away_s: float = 0.0


def num_machines(stages: Sequence[PipelineStage]) -> int:
    """Return how many stages can compute at the same time without taking others' cores."""
    return len({stage.shares or stage.worker for stage in stages})


def kv_tokens_of(plan: Plan) -> int:
    """Return the positions of KV cache, of all sequences together, that every stage can hold."""
    return min(stage.kv_tokens for stage in plan)


def has_room(plan: Plan, cost: ModelCost, kv_tokens: int) -> bool:
    """Return whether every stage has room for a sequence and so many positions of KV cache."""
    return all(
        stage.kv_tokens * max(1, cost.kv_bytes(stage.layers))
        >= kv_tokens * cost.kv_bytes(stage.layers) + HELD_STATES * cost.state_bytes(stage.layers)
        for stage in plan
    )


def longest_tokens_of(plan: Plan, cost: ModelCost, step_tokens: int) -> int:
    """Return the positions of the longest sequence that every stage can hold if it is alone.

    Args:
        plan: of the pipeline.
        cost: of the model.
        step_tokens: tokens per step at most.
    """
    return windows_of(plan, cost, step_tokens).longest(kv_tokens_of(plan))


def windows_of(plan: Plan, cost: ModelCost, step_tokens: int) -> KVWindows:
    """Return the windows and states of the layers of a plan; as for `longest_tokens_of`."""
    told = [cost.kept_by(stage.layers, stage.kv_tokens) for stage in plan]
    return KVWindows.of_stages(told, margin_tokens(step_tokens, len(plan)))


def plan_of(cost: ModelCost, memory: Mapping[WorkerId, int], layer_map: LayerMap) -> Plan:
    """Return the plan of a layer map, without checking that it fits.

    Args:
        cost: of the model.
        memory: bytes of each worker, for weights and KV cache.
        layer_map: of the plan.
    """
    return tuple(_stage(cost, worker, held, memory[worker]) for worker, held in layer_map)


def offloaded(
    plan: Plan,
    cost: ModelCost,
    memory: Mapping[WorkerId, int],
    ram: Mapping[WorkerId, int],
    kv_tokens: int,
) -> Plan:
    """Return a plan in which as few layers as possible are away, so that the rest fits.

    Args:
        plan: with more on a worker than its memory has room for.
        cost: of the model.
        memory: bytes of each worker, for weights and KV cache.
        ram: bytes beside the GPUs of some, for layers that are away; others are on disks.
        kv_tokens: positions of KV cache that every stage must have room for.

    Raises:
        NotEnoughMemory: a worker has no room for what has to be in memory.
    """
    return tuple(
        _offloaded(stage, cost, memory[stage.worker], ram.get(stage.worker, 0), kv_tokens)
        for stage in plan
    )


def _offloaded(
    stage: PlannedStage, cost: ModelCost, memory_bytes: int, ram_bytes: int, kv_tokens: int
) -> PlannedStage:
    layers, kv_bytes = stage.layers, cost.kv_bytes(stage.layers)
    wanted = kv_bytes * kv_tokens + HELD_STATES * cost.state_bytes(layers)
    for count in range(len(layers) + 1):
        held = cost.bytes_on_device(layers, count)
        if held + wanted <= memory_bytes:
            from_ram = most_in_ram(cost.sizes_away(layers_away(layers, count)), ram_bytes)
            gone = away(layers, from_ram, count - from_ram)
            return replace(
                stage,
                weight_bytes=held,
                kv_tokens=_kv_tokens(cost, layers, memory_bytes - held),
                from_disk=len(gone.on_disk),
                disk_bytes=sum(cost.sizes_away(gone.on_disk)),
                from_ram=len(gone.in_ram),
                ram_bytes=sum(cost.sizes_away(gone.in_ram)),
            )
    raise NotEnoughMemory(
        f"Worker {stage.worker} has {size_text(memory_bytes)}, but {layers_text(layers)} take "
        f"{size_text(held + wanted)} even if all of them are away and brought in every step. "
        "Raise its --max-memory."
    )


def seconds_from(nbytes: int, bytes_per_s: float | None) -> float:
    """Return the seconds that bytes take to come from a place, 0 if its rate is unknown."""
    return nbytes / bytes_per_s if bytes_per_s else 0.0


def layer_map_of(plan: Plan) -> LayerMap:
    """Return the layer map of a plan."""
    return tuple((stage.worker, stage.layers) for stage in plan)


def describe(plan: Plan, cost: ModelCost) -> list[dict[str, Any]]:
    """Return the plan as values that msgspec writes as JSON."""
    return [
        {
            "worker": stage.worker,
            "layers": stage.layers,
            "weight_bytes": stage.weight_bytes,
            "kv_tokens": stage.kv_tokens,
            "kv_bytes_per_token": cost.kv_bytes(stage.layers),
            "quantize": stage.quantize,
            "disk_bytes": stage.disk_bytes,
            "ram_bytes": stage.ram_bytes,
        }
        for stage in plan
    ]


def _stage(
    cost: ModelCost, worker: WorkerId, layers: LayerRange, memory_bytes: int
) -> PlannedStage:
    weights = cost.weight_bytes(layers)
    kv_tokens = _kv_tokens(cost, layers, max(0, memory_bytes - weights))
    return PlannedStage(worker, layers, weights, kv_tokens, cost.quantize)


def _kv_tokens(cost: ModelCost, layers: LayerRange, room_bytes: int) -> int:
    """Return the positions of KV cache of these layers that fit into so many bytes."""
    if cost.only_encodes(layers):
        return ANY_TOKENS
    return room_bytes // max(1, cost.kv_bytes(layers))
