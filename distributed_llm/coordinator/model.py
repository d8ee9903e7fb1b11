"""The served model, as the coordinator knows it. Pure values."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import msgspec

from distributed_llm.common.formats import WeightFormats
from distributed_llm.common.kv_dtypes import KVDtype
from distributed_llm.common.messages import Capabilities, ModelInfo, ModelSource
from distributed_llm.common.sampling_params import CheckpointParams, SamplingParams
from distributed_llm.common.tensors import ITEM_BYTES, DtypeName
from distributed_llm.common.types import LayerRange, TokenId
from distributed_llm.common.weight_forms import Quantize
from distributed_llm.common.workspace import graphs_bytes
from distributed_llm.coordinator.model_cost import ModelCost


@dataclass(frozen=True)
class GenerationDefaults:
    """Limits and defaults of generation, from the checkpoint.

    Attributes:
        context_length: positions of prompt and answer together; of an encoder-decoder, those of
            its source, and those of its answer.
        vocab_size: token ids are below it.
        eos_token_ids: tokens that end an answer.
        params: values of the parameters that a request does not set.
        checkpoint: what else generation_config.json says.
        not_followed: names in generation_config.json that would change answers if they were
            followed.
        decoder_start: token ids before the answers of an encoder-decoder; empty: the model is none.
    """

    context_length: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    params: SamplingParams
    checkpoint: CheckpointParams = field(default_factory=CheckpointParams)
    not_followed: tuple[str, ...] = ()
    decoder_start: tuple[int, ...] = ()


@dataclass(frozen=True)
class TokenizerFacts:
    """What the files of a tokenizer say of it.

    Attributes:
        available: whether there is one; without it there are only token ids.
        end_token: token id with which its texts end; None if it has none.
        special_tokens: how special tokens are written, by their names in transformers.
        chat_template: which it uses for conversations without tools; None if it has none.
        tool_template: which it uses for those with tools, if that is another one.
    """

    available: bool = False
    end_token: TokenId | None = None
    special_tokens: dict[str, str] = field(default_factory=dict)
    chat_template: str | None = None
    tool_template: str | None = None


@dataclass(frozen=True)
class ServedModel:
    """The model of a cluster.

    Attributes:
        name: shown to users.
        source: where workers find the checkpoint.
        dtype: of weights, and of KV cache if `kv_dtype` is auto; some machines have another one.
        wire_dtype: of activations between stages.
        kv_dtype: how keys and values are kept.
        cost: memory of its parts.
        smaller: the same with fewer bits per weight, most bits first.
        may_shrink: `smaller` may be planned with, where the workers cannot hold `cost`.
        exceeds_float16: whether numbers in it are known to be larger than any of float16.
        formats: how its weights stand in files and memory, by what they are quantized to.
        hidden_size: numbers per token between stages.
        source_size: likewise of what an encoder reads; 0: there is none.
        defaults: of generation.
        digest: returns a digest of the weights of a layer range.
        model_type: the architecture's name in transformers.
        architecture: the model's class in transformers; empty if its files name none.
        num_parameters: numbers in its weights.
        tokenizer: what is known of it.
    """

    name: str
    source: ModelSource
    dtype: DtypeName
    wire_dtype: DtypeName
    cost: ModelCost
    hidden_size: int
    defaults: GenerationDefaults
    digest: Callable[[LayerRange], str]
    model_type: str = ""
    architecture: str = ""
    num_parameters: int = 0
    tokenizer: TokenizerFacts = field(default_factory=TokenizerFacts)
    smaller: tuple[ModelCost, ...] = ()
    may_shrink: bool = False
    kv_dtype: KVDtype = "auto"
    source_size: int = 0
    exceeds_float16: bool = False
    formats: Mapping[Quantize, WeightFormats] = field(default_factory=dict)

    def cost_at(self, quantize: Quantize) -> ModelCost:
        """Return the memory that its parts take if floating-point weights become this."""
        return next((cost for cost in self.smaller if cost.quantize == quantize), self.cost)

    def dtype_on(self, machine: Capabilities) -> DtypeName:
        """Return the dtype that a machine computes in: the model's, unless it has no bfloat16."""
        if self.dtype != "bfloat16" or machine.bfloat16:
            return self.dtype
        return "float32" if self.exceeds_float16 else "float16"

    def workspace_on(self, machine: Capabilities) -> int:
        """Return the bytes that a step takes on a machine beside weights and KV cache."""
        computing = self.cost.workspace_bytes * self._widening(machine)
        return computing + graphs_bytes(machine.device)

    def planned(self, machine: Capabilities) -> Capabilities:
        """Return a machine as plans count it: room for weights and KV cache in the model's dtype.

        One that computes in a dtype of twice as many bytes is a machine with half the room, half as
        quickly read. For integers that is too little: their bytes stay the same.
        """
        wider = self._widening(machine)
        room_bytes = max(0, machine.memory_bytes - self.workspace_on(machine)) // wider
        if wider == 1:
            return msgspec.structs.replace(machine, memory_bytes=room_bytes)
        disk, ram = machine.disk_bytes_per_s, machine.ram_bytes_per_s
        return msgspec.structs.replace(
            machine,
            memory_bytes=room_bytes,
            memory_bandwidth_bytes_per_s=machine.memory_bandwidth_bytes_per_s / wider,
            offload_bytes=machine.offload_bytes // wider,
            disk_bytes_per_s=disk and disk / wider,
            ram_bytes=machine.ram_bytes // wider,
            ram_bytes_per_s=ram and ram / wider,
        )

    def _widening(self, machine: Capabilities) -> int:
        return ITEM_BYTES[self.dtype_on(machine)] // ITEM_BYTES[self.dtype]

    def with_tokenizer(self, facts: TokenizerFacts) -> "ServedModel":
        """Return the model with what its tokenizer says.

        The files of some chat models name the token that ends a turn only in those of the
        tokenizer; it ends an answer as well, if it is a token of the model.
        """
        model = replace(self, tokenizer=facts)
        known, vocab_size = self.defaults.eos_token_ids, self.defaults.vocab_size
        token_id = facts.end_token
        if token_id is None or token_id in known or not 0 <= token_id < vocab_size:
            return model
        return replace(model, defaults=replace(self.defaults, eos_token_ids=(*known, token_id)))

    def info(self) -> ModelInfo:
        """Return what clients are told of it."""
        defaults, cost = self.defaults, self.cost
        return ModelInfo(
            name=self.name,
            model_type=self.model_type,
            architecture=self.architecture,
            num_layers=cost.num_layers,
            hidden_size=self.hidden_size,
            vocab_size=defaults.vocab_size,
            context_length=defaults.context_length,
            dtype=self.dtype,
            num_parameters=self.num_parameters,
            weight_bytes=cost.all_weight_bytes,
            eos_token_ids=defaults.eos_token_ids,
            has_tokenizer=self.tokenizer.available,
            special_tokens=self.tokenizer.special_tokens,
            chat_template=self.tokenizer.chat_template,
            tool_template=self.tokenizer.tool_template,
        )

    def width(self, *, source: bool) -> int:
        """Return the numbers of a token between stages.

        Args:
            source: whether it is of what an encoder reads.
        """
        return self.source_size if source else self.hidden_size

    @property
    def activation_bytes(self) -> int:
        """Bytes that one token takes between stages; of an encoder-decoder, one of an answer."""
        return self.hidden_size * ITEM_BYTES[self.wire_dtype]

    @property
    def source_bytes(self) -> int:
        """Bytes that one token of a source takes between stages."""
        return self.source_size * ITEM_BYTES[self.wire_dtype]
