"""Which layers attend to some blocks of positions alone, as config.json of MiniMax-M3 tells it.

Each position has a short key beside those of attention's heads. A token scores all of them for each
head, a block of positions by the best in it, and attends to as many of the best blocks as
config.json says, of which some are always the latest. Pure.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from distributed_llm.common.errors import CheckpointError

CHOOSES_BLOCKS: frozenset[str] = frozenset({"minimax_m3_vl_text"})
"""Model types that have such layers."""

_CHOOSING = "minimax_m3_sparse"
"""How config.json calls these layers."""

_LEGACY, _LEGACY_LAYERS = "sparse_attention_config", "sparse_attention_freq"
"""Where files as they were published tell of all this, and of the layers in it."""

_LEGACY_NAMES: Mapping[str, str] = {
    "index_head_dim": "sparse_index_dim",
    "index_block_size": "sparse_block_size",
    "index_topk_blocks": "sparse_topk_blocks",
}
_DEFAULTS: Mapping[str, int] = {
    "index_head_dim": 128,
    "index_block_size": 128,
    "index_topk_blocks": 16,
}

_LARGEST = 2**31 - 1


class KeyBlockSizes(NamedTuple):
    """What attention to some blocks consists of.

    Attributes:
        key_dim: numbers of the key of a position that blocks are chosen by.
        block: positions of a block.
        most: blocks that a token attends to.
    """

    key_dim: int
    block: int
    most: int

    @property
    def seen(self) -> int:
        """Positions that a token attends to at most; in texts no longer than that, to all."""
        return self.block * self.most


def key_block_sizes(config: Mapping[str, Any]) -> KeyBlockSizes | None:
    """Return what attention to some blocks consists of; None: no layer of the model has it.

    Args:
        config: the content of config.json.

    Raises:
        CheckpointError: a size is no possible number.
    """
    if config.get("model_type") not in CHOOSES_BLOCKS:
        return None
    return KeyBlockSizes(*(_size(config, name) for name in _DEFAULTS))


def choosing_layers(config: Mapping[str, Any], num_layers: int) -> tuple[bool, ...]:
    """Return whether each layer attends to some blocks alone.

    Args:
        config: the content of config.json.
        num_layers: of the model.
    """
    if config.get("model_type") in CHOOSES_BLOCKS:
        listed = config.get("layer_types")
        if isinstance(listed, list) and len(listed) >= num_layers:
            return tuple(kind == _CHOOSING for kind in listed[:num_layers])
        listed = _legacy(config).get(_LEGACY_LAYERS)
        if isinstance(listed, list) and len(listed) >= num_layers:
            return tuple(map(bool, listed[:num_layers]))
    return (False,) * num_layers


def _size(config: Mapping[str, Any], name: str) -> int:
    """Return a size; what stands under the legacy name goes before the other, as in transformers.

    Raises:
        CheckpointError: it is no possible number.
    """
    size = _legacy(config).get(_LEGACY_NAMES[name], config.get(name, _DEFAULTS[name]))
    if type(size) is not int or not 0 < size <= _LARGEST:
        raise CheckpointError(
            f"config.json has {name} = {size!r}; it must be a number from 1 to {_LARGEST:,}, for "
            "attention chooses positions by it. Copy that of the original model."
        )
    return size


def _legacy(config: Mapping[str, Any]) -> Mapping[str, Any]:
    told = config.get(_LEGACY)
    return told if isinstance(told, Mapping) else {}
