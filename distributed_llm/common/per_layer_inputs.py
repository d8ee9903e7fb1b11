"""Inputs that each layer gets of the token ids themselves, as in Gemma 3n and 4.

An embedding with columns for every layer, and a projection of the usual embedding with rows for
every layer, make them. So every stage embeds the tokens again, and has the columns and rows of its
own layers.
"""

import re
from collections.abc import Mapping
from typing import Any

_DEFAULT_WIDTH: Mapping[str, int] = {"gemma3n_text": 256, "gemma4_text": 256}

_OF_EVERY_STAGE = re.compile(
    r"(^|\.)(embed_tokens|embed_tokens_per_layer|per_layer_model_projection"
    r"|per_layer_projection_norm|token_embd|per_layer_token_embd|per_layer_model_proj"
    r"|per_layer_proj_norm)(\.|$)"
)
"""Names in a model of transformers, and in GGUF files."""

_LIES_ALONG: Mapping[str, int] = {
    **{"embed_tokens_per_layer": 1, "per_layer_model_projection": 0},
    **{"per_layer_token_embd": 1, "per_layer_model_proj": 0},
}


def per_layer_width(config: Mapping[str, Any]) -> int:
    """Return the numbers that a layer gets of each token; 0: the model has no such inputs."""
    default = _DEFAULT_WIDTH.get(str(config.get("model_type")))
    if default is None:
        return 0
    width = config.get("hidden_size_per_layer_input", default)
    return width if type(width) is int else 0


def is_of_every_stage(name: str) -> bool:
    """Return whether a module or parameter of a model with such inputs is of every stage."""
    return _OF_EVERY_STAGE.search(name) is not None


def lies_along(name: str) -> int | None:
    """Return along which dimension the layers lie in a matrix; None: it is no matrix of layers."""
    found = _OF_EVERY_STAGE.search(name)
    return _LIES_ALONG.get(found[2]) if found else None
