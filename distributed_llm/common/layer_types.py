"""The type of each layer of a model, as its config.json lists it, or else as its model type has it.

What a type means for windows, states or sizes is for those who ask.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from distributed_llm.common.errors import CheckpointError
from distributed_llm.common.indexers import INDEXED

Config = Mapping[str, Any]

FULL = "full_attention"
SLIDING = "sliding_attention"
CHUNKED = "chunked_attention"
LINEAR = "linear_attention"
CONV = "conv"
HYBRID = "hybrid"
_INDEXED = "indexed_attention"

LISTS_OF_TYPES = ("layer_types", "layers_block_type")
"""Names under which config.json lists the types; the first is that of today."""

_LETTERS: Mapping[str, str] = {"M": LINEAR, "E": "moe", "-": "mlp", "*": FULL}
"""Types of layers of Nemotron-H, by letters of `hybrid_override_pattern`."""

_LAST_IS_FULL = frozenset({"gemma4_text"})
"""Model types whose last layer sees everything, whatever config.json lists."""


class _Every(NamedTuple):
    """Every n-th layer sees everything.

    Attributes:
        number: n, if config.json has no other.
        name: of that number in config.json; empty: it cannot have another.
        others: the type of the layers in between.
        first: the first layer that sees everything; None: layer n - 1.
        own: the type of such layers.
    """

    number: int
    name: str = ""
    others: str = SLIDING
    first: int | None = None
    own: str = FULL


_ALL_BUT_EVERY: Mapping[str, _Every] = {
    "afmoe": _Every(4, "global_attn_every_n_layers"),
    "beam": _Every(6),
    "cohere2": _Every(4, "sliding_window_pattern"),
    "exaone4": _Every(4, "sliding_window_pattern"),
    "exaone_moe": _Every(4, "sliding_window_pattern"),
    "gemma2": _Every(2),
    "gemma3_text": _Every(6, "sliding_window_pattern"),
    "gemma3n_text": _Every(5),
    "gemma4_text": _Every(6),
    "gpt_oss": _Every(2),
    "kolibri1": _Every(5),
    "mimo_v2_flash": _Every(6),
    "olmo3": _Every(4),
    "vaultgemma": _Every(2),
    **dict.fromkeys(("cwm", "granite_swa", "granitemoe_swa"), _Every(4, first=0)),
    "modernbert-decoder": _Every(3, "global_attn_every_n_layers", first=0),
    "llama4_text": _Every(4, "no_rope_layer_interval", CHUNKED),
    **dict.fromkeys(
        ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid"),
        _Every(4, "full_attention_interval", LINEAR),
    ),
    "qwen4_exp_text": _Every(4, "full_attention_interval", LINEAR, own=_INDEXED),
    "kimi_linear": _Every(4, others=LINEAR, first=4),
    "bailing_hybrid": _Every(6, "layer_group_size", LINEAR),
    "minimax": _Every(2, others=LINEAR, first=0),
}

_ALL_LAYERS: Mapping[str, str] = {
    **dict.fromkeys(("ministral", "mistral", "mixtral", "phi3", "phimoe", "starcoder2"), SLIDING),
    **dict.fromkeys(("falcon_h1", "zaya"), HYBRID),
    **dict.fromkeys(INDEXED, _INDEXED),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "granitemoehybrid", "nemotron_h"), LINEAR),
    **dict.fromkeys(("rwkv", "xlstm"), LINEAR),
}
"""Model types whose layers are all of one type."""

_FROM_A_LAYER_ON = frozenset({"qwen2", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3"})
"""Model types in which the first `max_window_layers` see everything."""


def layer_types(config: Config, num_layers: int) -> tuple[str, ...]:
    """Return the type of each layer, by the names that config.json has for them.

    A list in config.json that is too long is cut; one that is too short counts as none. Where
    nothing is known, layers see everything.

    Args:
        config: the content of config.json.
        num_layers: of the model.
    """
    types = _listed(config, num_layers) or tuple(
        _by_default(config, layer, num_layers) for layer in range(num_layers)
    )
    if config.get("model_type") in _LAST_IS_FULL:
        return (*types[: num_layers - 1], FULL)
    return types


def _listed(config: Config, num_layers: int) -> tuple[str, ...]:
    """Return the types that config.json lists; none: it does not, or not of all layers."""
    for name in LISTS_OF_TYPES:
        if found := _of_each(config, name, num_layers):
            return tuple(map(str, found))
    match config.get("model_type"):
        case "gpt_neo":
            words = _of_each(config, "attention_layers", num_layers)
            return tuple(SLIDING if word == "local" else FULL for word in words)
        case "llama4_text":  # 1 where a layer has rotary positions
            rotary = _of_each(config, "no_rope_layers", num_layers)
            return tuple(CHUNKED if has else FULL for has in rotary)
        case "nemotron_h":
            letters = _of_each(config, "hybrid_override_pattern", num_layers)
            return tuple(_LETTERS.get(letter, FULL) for letter in letters)
    return ()


def _of_each(config: Config, name: str, num_layers: int) -> list[Any] | str:
    """Return what config.json lists of each layer under a name; nothing: it does not."""
    found = config.get(name)
    if isinstance(found, list | str) and len(found) >= num_layers:
        return found[:num_layers]
    return []


def _by_default(config: Config, layer: int, num_layers: int) -> str:
    """Return the type of a layer that config.json does not list."""
    model_type = str(config.get("model_type"))
    last = layer == num_layers - 1
    match model_type:
        case "beam" if last:
            return FULL
        case "mimo_v2_flash" if not layer:
            return FULL
        case "olmo_hybrid" if last and num_layers < _whole(config, "full_attention_interval", 4):
            return FULL
        case "flint":
            return FULL if layer < 2 or layer % 4 == 1 or last else SLIDING
        case "cohere2_moe":
            return _of_cohere2_moe(config, layer)
        case "jamba":
            period = max(1, _whole(config, "attn_layer_period", 8))
            offset = _whole(config, "attn_layer_offset", 4)
            return FULL if layer % period == offset else LINEAR
        case "bamba":
            return FULL if layer in (_numbers(config, "attn_layer_indices") or ()) else LINEAR
        case "zamba":
            period = max(1, _whole(config, "attn_layer_period", 6))
            after = layer - 3
            periodic = after >= 0 and after % period == _whole(config, "attn_layer_offset", 4)
            return HYBRID if layer == 2 or periodic else LINEAR
        case "recurrent_gemma":
            blocks = _numbers(config, "block_types") or ["recurrent", "recurrent", "attention"]
            return LINEAR if blocks[layer % len(blocks)] == "recurrent" else SLIDING
        case "lfm2":
            attending = _numbers(config, "full_attn_idxs")
            return FULL if attending is None or layer in attending else CONV
        case "lfm2_moe":
            return CONV
        case "lfm3":
            return FULL if layer % 4 == 2 else SLIDING if layer and layer % 4 == 0 else CONV
        case "kimi_linear" if (attending := _attending_in_kimi(config)) is not None:
            return FULL if layer + 1 in attending else LINEAR
        case "qwen3_moe":
            return SLIDING if config.get("use_sliding_window") else FULL
    if model_type in _FROM_A_LAYER_ON and config.get("use_sliding_window"):
        first = config.get("max_window_layers")
        return SLIDING if type(first) is int and layer >= first else FULL
    if model_type in _ALL_BUT_EVERY:
        return _but_every(config, _ALL_BUT_EVERY[model_type], layer)
    return _ALL_LAYERS.get(model_type, FULL)


def _whole(config: Config, name: str, default: int) -> int:
    """Return a number of layers that config.json need not have.

    Raises:
        CheckpointError: it is no whole number.
    """
    value = config.get(name)
    if value is not None and (type(value) is not int or value < 0):
        raise CheckpointError(f"config.json has {name} = {value!r}; it must be a whole number.")
    return default if value is None else value


def _numbers(config: Config, name: str) -> list[Any] | None:
    """Return a list of layers that config.json need not have.

    Raises:
        CheckpointError: it is no list.
    """
    value = config.get(name)
    if value is not None and not isinstance(value, list):
        raise CheckpointError(f"config.json has {name} = {value!r}; it must be a list of layers.")
    return value


def _but_every(config: Config, rule: _Every, layer: int) -> str:
    number = (rule.name and config.get(rule.name)) or rule.number
    if type(number) is not int or number < 1:
        return rule.own
    first = number - 1 if rule.first is None else rule.first
    return rule.own if layer >= first and (layer - first) % number == 0 else rule.others


def _of_cohere2_moe(config: Config, layer: int) -> str:
    """Return the type of a layer; the dense ones at the beginning have a pattern of their own."""
    dense = config.get("first_k_dense_replace")
    dense = dense if type(dense) is int else 0
    if layer < dense:
        return _but_every(config, _Every(1, "prefix_dense_sliding_window_pattern"), layer)
    return _but_every(config, _Every(4, "sliding_window_pattern"), layer - dense)


def _attending_in_kimi(config: Config) -> Any:
    """Return the numbers, from 1, of layers that see everything; None: they are not told."""
    told = config.get("linear_attn_config")
    return _numbers(told, "full_attn_layers") if isinstance(told, Mapping) else None
