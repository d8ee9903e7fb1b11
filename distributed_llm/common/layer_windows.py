"""Which layers of a model see a part of the positions only, as its config.json tells.

Some see the last positions (a *window*). Others cut the text into *sections* of the same length
("attention_chunk_size"), and see what stands before a token in its own.
"""

from collections.abc import Mapping
from typing import Any

from distributed_llm.common.layer_types import CHUNKED, SLIDING, layer_types

_WINDOW_NAMES: Mapping[str, str] = {
    "gpt_neo": "window_size",
    "recurrent_gemma": "attention_window_size",
}
"""Under which name model types tell their window, if it is not the usual one."""

_BEFORE = "sliding_window_size"
"""Under which MiMo tells its window, without the token itself."""


def layer_windows(config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """Return how many positions a token sees at most in each layer, itself included; 0: all.

    Where config.json is not understood, all layers count as seeing everything: they take no more
    memory than that. Workers find out by themselves.

    Args:
        config: the content of config.json.
        num_layers: of the model.
    """
    sections = layer_sections(config, num_layers)
    if any(sections):
        return sections
    name = _WINDOW_NAMES.get(str(config.get("model_type")), "sliding_window")
    window = 0 if config.get("use_sliding_window") is False else _positive(config, name)
    if config.get("model_type") == "mimo_v2_flash" and (before := _positive(config, _BEFORE)):
        window = before + 1
    return tuple(window * (kind == SLIDING) for kind in layer_types(config, num_layers))


def layer_sections(config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """Return how long the sections are that each layer cuts the text into; 0: it does not.

    Args:
        config: the content of config.json.
        num_layers: of the model.
    """
    size = _positive(config, "attention_chunk_size")
    return tuple(size * (kind == CHUNKED) for kind in layer_types(config, num_layers))


def _positive(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    return value if type(value) is int and value > 0 else 0
