"""What the coordinator knows of the model it serves."""

from collections.abc import Callable
from dataclasses import dataclass

from distributed_llm.common.messages import ModelSource
from distributed_llm.common.sampling_params import SamplingParams
from distributed_llm.common.tensors import ITEM_BYTES, DtypeName
from distributed_llm.common.types import LayerRange
from distributed_llm.coordinator.model_cost import ModelCost


@dataclass(frozen=True)
class GenerationDefaults:
    """What the checkpoint says about generation.

    Attributes:
        context_length: positions that prompt and answer may take together.
        eos_token_ids: tokens that end an answer.
        params: values for what a request leaves open.
    """

    context_length: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True)
class ServedModel:
    """The model of a cluster.

    Attributes:
        name: for people.
        dtype: of weights and KV cache.
        wire_dtype: of activations between stages.
        hidden_size: numbers per token between stages.
        digest: names the weights of a layer range.
    """

    name: str
    source: ModelSource
    dtype: DtypeName
    wire_dtype: DtypeName
    cost: ModelCost
    hidden_size: int
    defaults: GenerationDefaults
    digest: Callable[[LayerRange], str]

    @property
    def activation_bytes(self) -> int:
        """Bytes that one token takes between stages."""
        return self.hidden_size * ITEM_BYTES[self.wire_dtype]
