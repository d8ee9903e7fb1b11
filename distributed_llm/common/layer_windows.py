"""Which layers of a model see a part of the positions only, as its config.json tells.

Some see the last positions (a *window*). Others cut the text into *sections* of the same length
("attention_chunk_size"), and see what stands before a token in its own.
"""

from collections.abc import Mapping
from typing import Any

_SLIDING = "sliding_attention"
_SECTIONS = "chunked_attention"

_ALL_LAYERS = frozenset({"ministral", "mistral", "mixtral", "phi3", "phimoe", "starcoder2"})
"""Model types in which a window is that of all layers, if nothing else is told."""

_FROM_A_LAYER_ON = frozenset({"qwen2", "qwen2_moe", "qwen3", "qwen3_moe"})
"""Model types in which the first `max_window_layers` see everything."""

_ALL_BUT_EVERY: Mapping[str, int] = {"cohere2": 4, "exaone4": 4, "gemma2": 2, "gemma3_text": 6}
"""Model types in which every n-th layer sees everything; n, if config.json has no other number.

Files of today tell the type of each layer.
"""


_SECTIONS_BUT_EVERY: Mapping[str, int] = {"llama4_text": 4}
"""Model types with sections in which every n-th layer sees everything, as in `_ALL_BUT_EVERY`."""


def layer_windows(config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """Return how many positions a token sees at most in each layer, itself included; 0: all.

    Where config.json is not understood, all layers count as seeing everything: they take no more
    memory than that. Workers find out by themselves.

    Args:
        config: the content of config.json.
        num_layers: of the model.
    """
    sections = layer_sections(config, num_layers)
    return sections if any(sections) else _sliding_windows(config, num_layers)


def layer_sections(config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """Return how long the sections are that each layer cuts the text into; 0: it does not.

    Args:
        config: the content of config.json.
        num_layers: of the model.
    """
    size = config.get("attention_chunk_size")
    if type(size) is not int or size < 1:
        return (0,) * num_layers
    types = config.get("layer_types")
    if isinstance(types, list) and len(types) >= num_layers:
        return tuple(size * (kind == _SECTIONS) for kind in types[:num_layers])
    every = _SECTIONS_BUT_EVERY.get(str(config.get("model_type")))
    if every is None:
        return (0,) * num_layers
    with_positions = config.get("no_rope_layers")  # 1 where a layer has rotary positions
    if isinstance(with_positions, list) and len(with_positions) >= num_layers:
        return tuple(size * bool(has) for has in with_positions[:num_layers])
    own_every = config.get("no_rope_layer_interval")
    every = own_every if type(own_every) is int and own_every > 0 else every
    return tuple(size * bool((layer + 1) % every) for layer in range(num_layers))


def _sliding_windows(config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    if config.get("model_type") == "gpt_neo":
        return _of_gpt_neo(config, num_layers)
    window = config.get("sliding_window")
    if type(window) is not int or window < 1 or config.get("use_sliding_window") is False:
        return (0,) * num_layers
    types = config.get("layer_types")
    if isinstance(types, list) and len(types) >= num_layers:
        return tuple(window * (kind == _SLIDING) for kind in types[:num_layers])
    model_type = config.get("model_type")
    if model_type in _ALL_LAYERS:
        return (window,) * num_layers
    if model_type in _FROM_A_LAYER_ON and config.get("use_sliding_window"):
        first = config.get("max_window_layers")
        first = first if type(first) is int else num_layers
        return tuple(window * (layer >= first) for layer in range(num_layers))
    every = config.get("sliding_window_pattern") or _ALL_BUT_EVERY.get(str(model_type))
    if model_type in _ALL_BUT_EVERY and type(every) is int:
        return tuple(window * bool((layer + 1) % every) for layer in range(num_layers))
    return (0,) * num_layers


def _of_gpt_neo(config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    window, types = config.get("window_size"), config.get("attention_layers")
    if type(window) is not int or not isinstance(types, list) or len(types) < num_layers:
        return (0,) * num_layers
    return tuple(window * (kind == "local") for kind in types[:num_layers])
