"""Layers that embed n-grams of tokens, and what they keep and hold, as config.json tells it.

Such a layer of Qwen4-Exp looks up hashes of the last tokens in a table of its own, which may be the
most of a checkpoint, and adds what it finds to the residual. A dilated convolution keeps a window
of it. The tokens themselves are held with every sequence, so they are no state. Pure.
"""

import re
from collections.abc import Mapping
from typing import Any

from distributed_llm.common.errors import CheckpointError

NGRAM_TYPES: frozenset[str] = frozenset({"qwen4_exp_text"})
"""Model types with such layers."""

_TABLE = re.compile(r"(?P<table>\.ngram_embedding)(\.shard_(?P<part>\d+))?\.weight$")
_DERIVED = re.compile(
    r"\.ple_embedding\.(layer_multipliers|ngram_heads_vocab_sizes|ngram_heads_offsets)$"
)

_BY_DEFAULT = {"hc_count": 4, "ple_conv_kernel_size": 4, "ngram_size": 3}


def ngram_windows(config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """Return the numbers of the window of each layer's convolution; 0: it embeds no n-grams.

    Args:
        config: the content of config.json.
        num_layers: of the model.

    Raises:
        CheckpointError: a size is no possible number.
    """
    found = ngram_layers(config)
    if not found:
        return (0,) * num_layers
    streams, width, tokens = (_size(config, name) for name in _BY_DEFAULT)
    numbers = streams * _size(config, "hidden_size") * (width - 1) * tokens
    return tuple(numbers * (layer in found) for layer in range(num_layers))


def ngram_layers(config: Mapping[str, Any]) -> frozenset[int]:
    """Return the layers that embed n-grams.

    Raises:
        CheckpointError: what should list them does not.
    """
    if config.get("model_type") not in NGRAM_TYPES:
        return frozenset()
    told = config.get("ple_layer_ids") or []
    if not isinstance(told, list) or any(type(one) is not int for one in told):
        raise CheckpointError(
            f"config.json has ple_layer_ids = {told!r:.60}; it must list the numbers of layers, "
            "from 1 on. Copy that of the original model."
        )
    return frozenset(one - 1 for one in told)


def table_part(name: str) -> tuple[str, int] | None:
    """Return the parameter that a tensor is a part of, and which one; None: it is of no table.

    Args:
        name: of the tensor. Parts are numbered from 0; what is no part of several is part 0.
    """
    found = _TABLE.search(name)
    if found is None:
        return None
    return f"{name[: found.end('table')]}.weight", int(found["part"] or 0)


def follows_from_config(name: str) -> bool:
    """Return whether a tensor of the files follows from config.json, so that it is not read."""
    return _DERIVED.search(name) is not None


def _size(config: Mapping[str, Any], name: str) -> int:
    size = config.get(name, _BY_DEFAULT.get(name))
    if type(size) is not int or size < 1:
        raise CheckpointError(
            f"config.json has {name} = {size!r}; it must be above 0. Copy that of the original "
            "model."
        )
    return size
