"""What the coordinator knows of the model it serves."""

from collections.abc import Callable
from dataclasses import dataclass

from distributed_llm.common.messages import ModelSource
from distributed_llm.common.tensors import DtypeName
from distributed_llm.common.types import LayerRange
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.requests import GenerationDefaults


@dataclass(frozen=True)
class ServedModel:
    """The model of a cluster.

    Attributes:
        name: for people.
        dtype: of weights, KV cache and activations.
        digest: names the weights of a layer range.
    """

    name: str
    source: ModelSource
    dtype: DtypeName
    cost: ModelCost
    hidden_size: int
    defaults: GenerationDefaults
    digest: Callable[[LayerRange], str]
