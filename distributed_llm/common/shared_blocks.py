"""Blocks that several layers have in common, as in Zamba: the files hold those of the first layers.

Such a block reads the embedding of the tokens beside the hidden states. So every stage embeds the
tokens again, and has the blocks of its layers. Plans count all blocks for every stage. Pure.
"""

import re
from collections.abc import Mapping
from typing import Any

from distributed_llm.common.layer_types import HYBRID, layer_types
from distributed_llm.common.per_layer_inputs import is_of_every_stage, per_layer_width

_SHARE = frozenset({"zamba", "zamba2"})
"""Model types with such blocks."""

_IN_BLOCK = re.compile(r"(^|\.)(?P<layer>\d+)\.shared_transf(ormer)?\.")
_OF_ALL: Mapping[str, re.Pattern[str]] = {"zaya": re.compile(r"(^|\.)input_hidden_states_")}
"""Parameters that model types have outside of any module that one stage alone would have."""

_EMBEDDING = re.compile(r"(^|\.)embed_tokens\.")


def block_sources(config: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """Return of each layer the one under whose name the files hold its block; None: it has none.

    Args:
        config: the content of config.json.
        num_layers: of the model.
    """
    sources: list[int | None] = [None] * num_layers
    if config.get("model_type") not in _SHARE:
        return tuple(sources)
    blocks = config.get("num_mem_blocks")
    blocks = blocks if type(blocks) is int and blocks > 0 else 1
    with_block = [n for n, kind in enumerate(layer_types(config, num_layers)) if kind == HYBRID]
    for number, layer in enumerate(with_block):
        sources[layer] = with_block[number % blocks]
    return tuple(sources)


def layer_of_block(config: Mapping[str, Any], name: str) -> int | None:
    """Return under which layer's name a parameter of a shared block stands; None: it is of none."""
    match = _IN_BLOCK.search(name) if config.get("model_type") in _SHARE else None
    return int(match["layer"]) if match else None


def every_stage_has(config: Mapping[str, Any], name: str) -> bool:
    """Return whether every stage has a parameter, or the part of it for its layers."""
    if (of_all := _OF_ALL.get(str(config.get("model_type")))) is not None:
        return bool(of_all.search(name))
    if config.get("model_type") in _SHARE:
        return bool(_EMBEDDING.search(name) or _IN_BLOCK.search(name))
    return per_layer_width(config) > 0 and is_of_every_stage(name)
