"""Reads sizes of a model off its config.json: layers, widths, context, KV cache."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

from distributed_llm.common.encoder_decoders import (
    STACK_SIZES,
    as_decoder,
    check_stacks,
    decoder_layers,
    encoder_layers,
    is_encoder_decoder,
    of_decoder,
)
from distributed_llm.common.errors import CheckpointError
from distributed_llm.common.indexers import index_key_dims
from distributed_llm.common.kv_dtypes import KVDtype, kv_row_bytes
from distributed_llm.common.latents import LatentSizes, keeps_latents
from distributed_llm.common.layer_sharing import borrowers, kv_lenders
from distributed_llm.common.layer_types import FULL, SLIDING, layer_types
from distributed_llm.common.layer_windows import window_setting
from distributed_llm.common.per_layer_inputs import per_layer_width
from distributed_llm.common.tensors import ITEM_BYTES, DtypeName

Config = Mapping[str, Any]

_CONTEXTS = (
    *("max_position_embeddings", "n_positions", "seq_length", "max_seq_len"),
    "model_max_length",
)
"""Names of the context."""

_ALIBI_CONTEXT = 2048
"""Context of models with attention that name no limit."""

_CONTEXT_OF_STATES = 2**20
"""The same of models without attention: they have none, but answers should end some time."""

_MAX_POSITIONS = 2**31 - 1

_MAX_LAYERS = 4096
"""Far more than any model has, and few enough to be made and planned in seconds."""

_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_LISTS = ("layers_block_type", "hybrid_override_pattern")
_HEADS = ("num_attention_heads", "n_head", "attention_heads", "num_heads", "n_heads")

_SIZES = (
    *_HEADS,
    *("num_key_value_heads", "num_kv_heads", "head_dim"),
    *("intermediate_size", "moe_intermediate_size"),
)
"""Names of sizes that not all models have; some have one for each layer."""

_ANY_SIZE = re.compile(
    r"(^|_)(size|dim|inner|state|conv|rank|heads?|layers|experts?|n?groups|kernel|expand|ssm"
    r"|channels|multiple|blocks)(_|$)|_topk$"
)
"""What the names of other sizes have in them. They may be 0 where a model has none of something."""

_ROPE = ("rope_parameters", "rope_scaling")
"""Names of parameters of rotary positions."""

_ROTATED = "partial_rotary_factor"
_ROPE_BASES = ("rope_theta", "rope_local_base_freq", _ROTATED)
_ROPE_NUMBERS = frozenset(
    {
        *(*_ROPE_BASES, "factor", "attention_factor", "original_max_position_embeddings"),
        *("beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
        *("low_freq_factor", "high_freq_factor"),
    }
)
"""Names of numbers among them, and beside them."""

_SCALED_BY_FACTOR = frozenset({"yarn", "llama3", "linear", "dynamic"})
"""Types of rotary positions that reach `factor` times as far as the model was first trained.

Of longrope ("su"), `max_position_embeddings` is the scaled length by definition.
"""

_SCALED_AS_PUBLISHED = frozenset({"gemma3_text"})
"""Model types whose `max_position_embeddings` is the scaled length though the scaling is linear."""

_TWICE_IN_WINDOWS = frozenset({"mimo_v2_flash"})
"""Model types that have twice as many heads of keys in layers with a window."""

_STREAMS: Mapping[str, str] = {
    "gemma3n_text": "altup_num_inputs",
    "hy_v4": "hc_mult",
    "qwen4_exp_text": "hc_count",
}
"""Model types with several hidden states between layers, and how config.json calls their number."""

_TWICE = frozenset({"longcat_flash"})
"""Model types whose layers attend twice."""

_READS_BOTH = frozenset({"zamba", "zamba2"})
"""Model types whose attention reads hidden states and embedding side by side."""


def check_sizes(config: Config) -> None:
    """Raise if a model of this config cannot be.

    Raises:
        CheckpointError: a size is not there, or no possible number; as in the functions below.
    """
    num_layers(config)
    if is_encoder_decoder(config):
        for name in STACK_SIZES:  # by their own names, before they have the usual ones
            if config.get(name) is not None:
                positive(config, name)
        check_stacks(config)
        encoder = of_decoder(as_decoder(config))
        if encoder.get("vocab_size") is not None:
            positive(encoder, "vocab_size")
        _check_rope(encoder)
    hidden_size(config)
    streams(config)
    source_size(config)
    config = of_decoder(config)
    vocab_size = positive(config, "vocab_size")
    own_table = config.get("vocab_size_per_layer_input")
    counts = config.get("model_type") == "gemma4_text" and per_layer_width(config)
    if counts and type(own_table) is int and own_table < vocab_size:
        raise CheckpointError(
            f"config.json has vocab_size_per_layer_input = {own_table}, but vocab_size = "
            f"{vocab_size}: layers would have no input for tokens beyond the former. Copy that of "
            "the original model."
        )
    for name in _SIZES:
        if config.get(name) is not None and not isinstance(config[name], list):
            positive(config, name)
    for name, value in config.items():
        if type(value) is int and value and is_size(name):
            positive(config, name)
    _check_rope(config)
    told = window_setting(config)
    if told is not None and SLIDING in layer_types(config, num_layers(config)):
        positive(config, told)
    if borrowers(config) >= num_layers(config):
        raise CheckpointError(
            f"config.json has num_kv_shared_layers = {borrowers(config)}; it must be less than the "
            f"number of layers, which is {num_layers(config)}. Copy that of the original model."
        )


def _check_rope(config: Config) -> None:
    """Raise if rotary positions have parameters that are none."""
    for name in _ROPE:
        if not isinstance(config.get(name, {}), Mapping | None):
            raise CheckpointError(
                f"config.json has {name} = {config[name]!r:.60}; it must be an object or null. "
                "Copy that of the original model."
            )
    for parameters in ({name: config.get(name) for name in _ROPE_BASES}, *rope_parameters(config)):
        for name, value in parameters.items():
            is_type, is_number = name in ("rope_type", "type"), name in _ROPE_NUMBERS
            if value is None or not (is_type or is_number):
                continue
            most = 1.0 if name == _ROTATED else math.inf
            right = isinstance(value, str) if is_type else _is_number(value) and value <= most
            if not right:
                wanted = "a name" if is_type else "a number from 0 on"
                wanted = "a number from 0 to 1" if name == _ROTATED else wanted
                raise CheckpointError(
                    f"config.json has {name} = {value!r:.60} among its rotary positions; it must "
                    f"be {wanted}. Copy that of the original model."
                )


def _is_number(value: object) -> bool:
    """Return whether a value is a finite number that is not negative."""
    return type(value) in (int, float) and 0 <= cast(float, value) < math.inf


def is_size(name: str) -> bool:
    """Return whether a name in config.json is that of a size."""
    return _ANY_SIZE.search(name) is not None


def num_layers(config: Config) -> int:
    """Return the number of transformer layers; of an encoder-decoder, of both stacks."""
    if is_encoder_decoder(config):
        return encoder_layers(config) + decoder_layers(config)
    if config.get("model_type") in _TWICE:  # transformers calls twice as many hidden layers
        return positive(config, "num_layers", most=_MAX_LAYERS)
    if config.get("model_type") == "xlstm":
        return positive(config, "num_blocks", *_LAYERS, most=_MAX_LAYERS)
    if config.get("num_hidden_layers") is None:  # Nemotron-H's lists its layers
        name = next((one for one in _LISTS if config.get(one)), _LISTS[0])
        listed = config.get(name)
        if not isinstance(listed, list | str | None):
            raise CheckpointError(
                f"config.json has {name} = {listed!r:.60}; it must tell the type of each layer. "
                "Copy that of the original model."
            )
        if listed and len(listed) <= _MAX_LAYERS:
            return len(listed)
    return positive(config, *_LAYERS, most=_MAX_LAYERS)


def attentions_per_layer(config: Config) -> int:
    """Return how many times a layer attends, each time to keys and values of their own."""
    return 2 if config.get("model_type") in _TWICE else 1


def hidden_size(config: Config) -> int:
    """Return the width of the hidden states between layers, of each of their streams."""
    return positive(of_decoder(config), "hidden_size", "n_embd", "d_model", "embedding_dim")


def source_size(config: Config) -> int:
    """Return the width of hidden states between an encoder's layers, and of what it gives."""
    return hidden_size(as_decoder(config) if is_encoder_decoder(config) else config)


def streams(config: Config) -> int:
    """Return how many hidden states of a token there are between layers; in most models, one."""
    name = _STREAMS.get(str(config.get("model_type")))
    return 1 if name is None else positive({name: 4, **config}, name)


def width_beside(config: Config) -> int:
    """Return how many numbers layers hand on for each token beside its hidden state.

    In ZAYA, each layer's router goes on from what that of the layer before made of the token.
    """
    if config.get("model_type") != "zaya":
        return 0
    return positive({"router_hidden_size": 256, **config}, "router_hidden_size")


def context_length(config: Config, *, attends: bool = True) -> int:
    """Return how many positions a text may have in the model.

    Scaled rotary positions reach `factor` times as far as the model was first trained, and many
    publishers leave `max_position_embeddings` at that first length. Where the configuration names
    that length by itself, `max_position_embeddings` may be the scaled one; the larger counts. Of an
    encoder-decoder, source and answer may have so many each.

    Args:
        config: the content of config.json.
        attends: whether any layer is attention; without it, a state takes up any number.
    """
    config = of_decoder(config)
    if not any(name in config for name in _CONTEXTS):
        return _ALIBI_CONTEXT if attends else _CONTEXT_OF_STATES
    unscaled = positive(config, *_CONTEXTS)
    return min(max((unscaled, *_scaled_lengths(config, unscaled))), _MAX_POSITIONS)


def layer_kv_bytes(config: Config, dtype: DtypeName, kv_dtype: KVDtype = "auto") -> tuple[int, ...]:
    """Return the bytes of KV cache that one position takes in each layer.

    Of latent attention (DeepSeek) that is the latent, and the part of the keys that all heads
    share, with an indexer's key behind it; such a key lies behind the keys of heads as well, in
    parts. Of model types whose attention keeps its latents for itself, keys and values for every
    head of the queries. Layers that read the keys and values of others keep none.
    """
    usual, item_bytes = head_sizes(config), ITEM_BYTES[dtype]
    if is_encoder_decoder(config):
        dims = (usual.key_dim, usual.value_dim)
        one = usual.kv_heads * sum(kv_row_bytes(dim, item_bytes, kv_dtype) for dim in dims)
        return (0,) * encoder_layers(config) + (one,) * decoder_layers(config)
    if keeps_latents(config):
        latent = latent_sizes(config)
        usual = HeadSizes(usual.heads, 1, latent.shared_dim, latent.rank)
    count = num_layers(config)
    kinds, index_dims, sizes = layer_types(config, count), index_key_dims(config, count), []
    for layer, lender in enumerate(kv_lenders(config, count)):
        heads = _heads_of_layer(config, usual, layer, kinds[layer])
        beside = -(-index_dims[layer] // heads.kv_heads)  # the heads have a part of it each
        dims = (heads.key_dim + beside, heads.value_dim)
        one = heads.kv_heads * sum(kv_row_bytes(dim, item_bytes, kv_dtype) for dim in dims)
        sizes.append(one * attentions_per_layer(config) if lender is None else 0)
    return tuple(sizes)


def latent_sizes(config: Config) -> LatentSizes:
    """Return what latent attention consists of."""
    names = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    return LatentSizes(*(positive(config, name) for name in names))


class HeadSizes(NamedTuple):
    """What the attention of a layer consists of.

    Attributes:
        heads: of queries.
        kv_heads: of keys and values, as they are kept.
        key_dim: numbers of a query or key of one head.
        value_dim: numbers of a value of one head.
    """

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int


def head_sizes(config: Config) -> HeadSizes:
    """Return the heads of attention; of latent attention, as they are when it is expanded."""
    if config.get("model_type") == "jetmoe":  # each expert of a token has queries for all keys
        kv_heads = positive(config, "num_key_value_heads")
        heads = kv_heads * positive(config, "num_experts_per_tok")
        return HeadSizes(heads, kv_heads, *[positive(config, "kv_channels")] * 2)
    config = of_decoder(config)
    heads = positive(config, *_HEADS)
    if config.get("kv_lora_rank") is not None:
        key_dim = positive(config, "qk_nope_head_dim") + positive(config, "qk_rope_head_dim")
        return HeadSizes(heads, heads, key_dim, positive(config, "v_head_dim"))
    kv_heads = int(_kv_heads(config) or heads)
    if config.get("multi_query") is True and not config.get("new_decoder_architecture"):
        kv_heads = 1  # GPT BigCode, and the first Falcons
    dim = int(config.get("head_dim") or hidden_size(config) // heads)
    if config.get("model_type") in _READS_BOTH:
        dim = int(config.get("attention_head_dim") or 2 * hidden_size(config) // heads)
    if config.get("model_type") == "diffllama":  # two heads of keys and values are kept as one
        return HeadSizes(heads, kv_heads // 2, 2 * dim, 2 * dim)
    return HeadSizes(heads, kv_heads, dim, int(config.get("v_head_dim") or dim))


def _kv_heads(config: Config) -> Any:
    """Return how many heads of keys a configuration names, if it does."""
    attention = config.get("attn_config")  # DBRX, MPT
    inner = attention.get("kv_n_heads") if isinstance(attention, Mapping) else None
    return config.get("num_key_value_heads") or config.get("num_kv_heads") or inner


def _heads_of_layer(config: Config, usual: HeadSizes, layer: int, kind: str) -> HeadSizes:
    """Return the heads of one layer; those of Gemma 4 that see everything have others."""
    if config.get("model_type") in _TWICE_IN_WINDOWS and kind == SLIDING:
        return usual._replace(kv_heads=2 * usual.kv_heads)
    if config.get("model_type") != "gemma4_text":
        return usual
    if isinstance(by_layer := config.get("per_layer_config"), Mapping):
        own = by_layer.get(str(layer), {})
        dim, kv_heads = own.get("head_dim"), own.get("num_key_value_heads")
    elif kind == FULL:
        dim = config.get("global_head_dim", 512)
        kv_heads = config.get("num_global_key_value_heads") if config.get("attention_k_eq_v") else 0
    else:
        return usual
    dim = dim or usual.key_dim
    return HeadSizes(usual.heads, kv_heads or usual.kv_heads, dim, dim)


def rope_parameters(config: Config) -> Iterator[Mapping[str, Any]]:
    """Yield the parameters of rotary positions: one set for all layers, or one by layer type."""
    for name in _ROPE:
        parameters = config.get(name)
        if isinstance(parameters, Mapping):
            for inner in (parameters, *parameters.values()):
                if isinstance(inner, Mapping):
                    yield inner


def rope_type(parameters: Mapping[str, Any]) -> str:
    """Return the type that parameters of rotary positions name."""
    return str(parameters.get("rope_type", parameters.get("type")))


def short_context(config: Config) -> int | None:
    """Return the longest text for which a model has rotary positions of its own for short texts.

    None if they are the same for all texts.
    """
    for parameters in rope_parameters(config):
        if rope_type(parameters) in {"longrope", "su"}:
            original = parameters.get("original_max_position_embeddings")
            original = config.get("original_max_position_embeddings") or original
            return original if isinstance(original, int) else None
        if rope_type(parameters) == "dynamic" and not parameters.get("alpha"):
            return positive(config, *_CONTEXTS)
    return None


def positive(config: Config, *names: str, most: int = _MAX_POSITIONS) -> int:
    """Return the first of these values that `config` has.

    Raises:
        CheckpointError: it has none of them, or it is no number from 1 to `most`.
    """
    for name in names:
        value = config.get(name)
        if value is not None:
            if type(value) is not int or not 0 < value <= most:
                bound = f"at most {most:,}" if type(value) is int and value > most else "above 0"
                raise CheckpointError(f"config.json has {name} = {value!r}; it must be {bound}.")
            return value
    raise CheckpointError(
        f"config.json of the {config.get('model_type')!r} model has none of {', '.join(names)}; "
        "it is not the configuration of a decoder language model. Copy that of the original model."
    )


def _scaled_lengths(config: Config, unscaled: int) -> Iterator[int]:
    if config.get("model_type") in _SCALED_AS_PUBLISHED:
        return
    for parameters in rope_parameters(config):
        if rope_type(parameters) not in _SCALED_BY_FACTOR:
            continue
        original = config.get("original_max_position_embeddings") or parameters.get(
            "original_max_position_embeddings"
        )
        factor = parameters.get("factor")
        if isinstance(factor, int | float) and 1 <= factor <= _MAX_POSITIONS:
            length = original if isinstance(original, int | float) else unscaled
            yield int(min(factor * length, _MAX_POSITIONS))
