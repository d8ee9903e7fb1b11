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

_WITH_WINDOW = (SLIDING, "hybrid_sliding")
"""Types of layers that have it."""

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
    name = window_setting(config)
    window = 0 if name is None else _positive(config, name) + (name == _BEFORE)
    return tuple(window * (kind in _WITH_WINDOW) for kind in layer_types(config, num_layers))


def window_setting(config: Mapping[str, Any]) -> str | None:
    """Return the name under which config.json tells of a window; None: it tells of none."""
    model_type = config.get("model_type")
    name = _WINDOW_NAMES.get(str(model_type), "sliding_window")
    if model_type == "mimo_v2_flash" and config.get(_BEFORE) is not None:
        name = _BEFORE
    unused = config.get("use_sliding_window") is False or config.get(name) is None
    return None if unused else name


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
