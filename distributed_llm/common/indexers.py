"""Which layers attend to some of the positions alone, and what they keep to choose them by.

In sparse attention (DeepSeek-AI, 2025) an *indexer* keeps a short key of each position. It scores
them for each token, which attends to as many of the best as config.json says. In some models,
layers take what the indexer of an earlier layer has chosen. Pure.
"""

from collections.abc import Mapping
from typing import Any

from distributed_llm.common.block_indexers import block_sizes
from distributed_llm.common.errors import CheckpointError
from distributed_llm.common.key_blocks import choosing_layers, key_block_sizes

INDEXED: frozenset[str] = frozenset({"axk2", "deepseek_v32", "glm_moe_dsa", "hy_v4"})
"""Model types with indexers; all of them have latent attention."""

_MAY_TAKE: Mapping[str, int] = {"glm_moe_dsa": 1, "hy_v4": 4}
"""Those of them in which layers may take what an earlier one has chosen; every how many layers one
chooses, if nothing is told."""

_KEY_DIM_BY_DEFAULT = 128

_TAKES = ("shared", "S")
"""How config.json calls such layers."""


def index_key_dims(config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """Return the numbers of the indexer's key of a position in each layer; 0: it has no indexer.

    Args:
        config: the content of config.json.
        num_layers: of the model.
    """
    blocks = block_sizes(config)
    if blocks is not None:
        return (blocks.key_dim,) * num_layers
    key_blocks = key_block_sizes(config)
    if key_blocks is not None:
        return tuple(key_blocks.key_dim * one for one in choosing_layers(config, num_layers))
    if config.get("model_type") not in INDEXED:
        return (0,) * num_layers
    dim = config.get("index_head_dim", _KEY_DIM_BY_DEFAULT)
    if type(dim) is not int or dim < 1:
        raise CheckpointError(f"config.json has index_head_dim = {dim!r}; it must be above 0.")
    return tuple(dim * (chooser is None) for chooser in choosers(config, num_layers))


def choosers(config: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """Return of each layer the earlier one that chooses positions for it; None: it does, or all.

    Args:
        config: the content of config.json.
        num_layers: of the model.
    """
    found: list[int | None] = []
    own: int | None = None
    for layer, takes in enumerate(_takes(config, num_layers)):
        found.append(own if takes else None)
        own = own if takes else layer
    return tuple(found)


def _takes(config: Mapping[str, Any], num_layers: int) -> list[bool]:
    """Return whether each layer takes what an earlier one has chosen."""
    if config.get("model_type") not in _MAY_TAKE:
        return [False] * num_layers
    for name in ("indexer_types", "index_topk_pattern"):
        told = config.get(name)
        if isinstance(told, list | str) and len(told) >= num_layers:
            return [kind in _TAKES for kind in told[:num_layers]]
    every = config.get("index_topk_freq", _MAY_TAKE[str(config["model_type"])])
    offset = config.get("index_skip_topk_offset", 2)
    if type(every) is not int or type(offset) is not int or every < 2:
        return [False] * num_layers
    return [max(layer - offset + 1, 0) % every != 0 for layer in range(num_layers)]
