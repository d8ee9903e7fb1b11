"""Which worker serves which layers: a map, a plan, stages of a pipeline."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distributed_llm.common.types import LayerRange, PeerId, WorkerId
from distributed_llm.coordinator.model_cost import ModelCost

LayerMap = tuple[tuple[WorkerId, LayerRange], ...]


@dataclass(frozen=True)
class PlannedStage:
    """One layer range served by one worker.

    Attributes:
        kv_tokens: positions that fit into the memory which the weights leave.
    """

    worker: WorkerId
    layers: LayerRange
    weight_bytes: int
    kv_tokens: int


Plan = tuple[PlannedStage, ...]
"""The stages in the order of their layers; they cover every layer exactly once."""


@dataclass(frozen=True)
class PipelineStage:
    """A worker and the layers that it serves."""

    peer: PeerId
    worker: WorkerId
    layers: LayerRange


def kv_tokens_of(plan: Plan) -> int:
    """Return how many positions, of all sequences together, every stage has room for."""
    return min(stage.kv_tokens for stage in plan)


def plan_of(cost: ModelCost, memory: Mapping[WorkerId, int], ranges: LayerMap) -> Plan:
    """Return the stages of these ranges; whether they fit is not looked at.

    Args:
        cost: of the model.
        memory: of each worker, bytes.
        ranges: of layers, in order.
    """
    return tuple(_stage(cost, worker, held, memory[worker]) for worker, held in ranges)


def layer_map_of(plan: Plan) -> LayerMap:
    """Return the ranges of a plan."""
    return tuple((stage.worker, stage.layers) for stage in plan)


def describe(plan: Plan, cost: ModelCost) -> list[dict[str, Any]]:
    """Return the plan as plain values, for people and for JSON."""
    return [
        {
            "worker": stage.worker,
            "layers": [stage.layers.start, stage.layers.stop],
            "weight_bytes": stage.weight_bytes,
            "kv_tokens": stage.kv_tokens,
            "kv_bytes_per_token": cost.kv_bytes_per_token * len(stage.layers),
        }
        for stage in plan
    ]


def _stage(
    cost: ModelCost, worker: WorkerId, layers: LayerRange, memory_bytes: int
) -> PlannedStage:
    weights = cost.weight_bytes(layers)
    room = max(0, memory_bytes - weights)
    return PlannedStage(
        worker, layers, weights, room // max(1, cost.kv_bytes_per_token * len(layers))
    )
