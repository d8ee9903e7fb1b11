"""The served model, as the coordinator knows it. Pure values."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from distributed_llm.common.messages import ModelSource
from distributed_llm.common.sampling_params import CheckpointParams, SamplingParams
from distributed_llm.common.tensors import ITEM_BYTES, DtypeName
from distributed_llm.common.types import LayerRange
from distributed_llm.coordinator.model_cost import ModelCost


@dataclass(frozen=True)
class GenerationDefaults:
    """Limits and defaults of generation, from the checkpoint.

    Attributes:
        context_length: positions of prompt and answer together.
        vocab_size: token ids are below it.
        eos_token_ids: tokens that end an answer.
        params: values of the parameters that a request does not set.
        checkpoint: what else generation_config.json says.
        not_followed: names in generation_config.json that would change answers if they were
            followed.
    """

    context_length: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    params: SamplingParams
    checkpoint: CheckpointParams = field(default_factory=CheckpointParams)
    not_followed: tuple[str, ...] = ()


@dataclass(frozen=True)
class ServedModel:
    """The model of a cluster.

    Attributes:
        name: shown to users.
        source: where workers find the checkpoint.
        dtype: of weights and KV cache.
        wire_dtype: of activations between stages.
        cost: memory of its parts.
        hidden_size: numbers per token between stages.
        defaults: of generation.
        digest: returns a digest of the weights of a layer range.
    """

    name: str
    source: ModelSource
    dtype: DtypeName
    wire_dtype: DtypeName
    cost: ModelCost
    hidden_size: int
    defaults: GenerationDefaults
    digest: Callable[[LayerRange], str]

    def ending_with(self, token_id: int | None) -> "ServedModel":
        """Return the model with one more token that ends an answer.

        The files of some chat models name the token that ends a turn only in those of the
        tokenizer.

        Args:
            token_id: None, or what is no token of the model, adds nothing.
        """
        known, vocab_size = self.defaults.eos_token_ids, self.defaults.vocab_size
        if token_id is None or token_id in known or not 0 <= token_id < vocab_size:
            return self
        defaults = replace(self.defaults, eos_token_ids=(*known, token_id))
        return replace(self, defaults=defaults)

    @property
    def activation_bytes(self) -> int:
        """Bytes that one token takes between stages."""
        return self.hidden_size * ITEM_BYTES[self.wire_dtype]
