"""How the attention of some models chooses blocks of positions, as config.json tells it.

In Qwen4-Exp each position has a short key of its own beside those of the attention's heads. Where a
block of positions is complete, the mean of their keys stands for it. A token attends to the blocks
that it scores best, as many as config.json says, and to the positions after the last complete
block. Pure.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from distributed_llm.common.errors import CheckpointError

BLOCK_INDEXED: frozenset[str] = frozenset({"qwen4_exp_text"})
"""Model types with such attention."""


class BlockSizes(NamedTuple):
    """What attention that chooses blocks consists of.

    Attributes:
        block: positions of a block.
        most: blocks that a token attends to.
        key_dim: numbers of the key of a position that blocks are chosen by.
    """

    block: int
    most: int
    key_dim: int

    @property
    def seen(self) -> int:
        """Positions that a token attends to at most; in texts no longer than that, to all."""
        return (self.most + 1) * self.block - 1

    def complete_in(self, start: int, stop: int) -> range:
        """Return where the blocks begin whose last positions are among [start, stop)."""
        size = self.block
        return range(start // size * size, stop // size * size, size)


def block_sizes(config: Mapping[str, Any]) -> BlockSizes | None:
    """Return what attention that chooses blocks consists of; None: the model has no such attention.

    Args:
        config: the content of config.json.

    Raises:
        CheckpointError: a size is not there, or no possible number.
    """
    if config.get("model_type") not in BLOCK_INDEXED:
        return None
    block = _size(config, "indexer_compress_ratio")
    return BlockSizes(
        block, _size(config, "indexer_budget") // block, _size(config, "indexer_head_dim")
    )


def _size(config: Mapping[str, Any], name: str) -> int:
    size = config.get(name)
    if type(size) is not int or size < 1:
        raise CheckpointError(
            f"config.json has {name} = {size!r}; it must be above 0, for attention chooses "
            "positions by it. Copy that of the original model."
        )
    return size
