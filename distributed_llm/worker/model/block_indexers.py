"""Has indexers that choose blocks tell what they choose by, and choose where all are held.

In transformers, such an indexer returns which positions each token attends to, and its attention
module adds that to a mask. Here it returns queries and keys of a step's tokens
(`BlockMeansChoice`), which take the way of the mask: keys of earlier positions are in the KV cache.

There the last position of each block has the finished key of the block in the place of its own:
nobody needs its own any more, and blocks are chosen by reading one key of each.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distributed_llm.common.block_indexers import BlockSizes
from distributed_llm.common.errors import UnsupportedModel
from distributed_llm.common.workspace import QUERIES_AT_ONCE
from distributed_llm.worker.model.chosen_rows import NOT_CHOSEN
from distributed_llm.worker.model.indexers import index_scores
from distributed_llm.worker.model.packed_step import PackedSlice

_NEEDED = ("index_qk_proj", "q_layernorm", "k_layernorm", "compress_ratio", "block_topk")
"""What indexers have that choose blocks."""

_ROTATION = "apply_rotary_pos_emb"


class BlockMeansChoice:
    """What the tokens of a step choose blocks of positions by: means of their keys.

    Args:
        queries: [tokens, heads, dim].
        keys: [tokens, dim], of the same positions.
        sizes: of the blocks.
        finish: makes the keys of the blocks that the step completes, in order, of the means of
            those of their positions, [blocks, dim].

    Attributes:
        seen: positions that a token attends to at most.
        key_dim: numbers of a key.
        every: positions of a block, whose last one has the key of the block.
    """

    def __init__(
        self,
        queries: Tensor,
        keys: Tensor,
        sizes: BlockSizes,
        finish: Callable[[Tensor], Tensor],
    ) -> None:
        self.seen = sizes.seen
        self.key_dim = sizes.key_dim
        self.every = sizes.block
        self._sizes = sizes
        self._queries = queries
        self._keys = keys
        self._finish = finish

    def keys_to_keep(
        self,
        slices: Sequence[PackedSlice],
        kept_before: Callable[[PackedSlice, int], Tensor],
    ) -> Tensor:
        """Return the keys [tokens, dim] that are kept of a step: of blocks where these end.

        Args:
            slices: all of the step.
            kept_before: returns what is kept of the positions of a slice's sequence from one on and
                before the slice, [positions, dim].
        """
        means, ends = [], []
        for part in slices:
            starts = self._sizes.complete_in(part.start, part.start + part.num_tokens)
            if not starts:
                continue
            own = self._keys[part.row : part.row + part.num_tokens]
            if starts[0] < part.start:
                own = torch.cat((kept_before(part, starts[0]), own))
            blocks = own[: len(starts) * self._sizes.block].view(len(starts), -1, own.shape[1])
            means.append(blocks.float().mean(dim=1).to(own.dtype))
            last = part.row - part.start + self._sizes.block - 1
            ends += [start + last for start in starts]
        if not means:
            return self._keys
        kept = self._keys.clone()
        kept[ends] = self._finish(torch.cat(means))
        return kept

    def choose(self, part: PackedSlice, keys: Sequence[Tensor]) -> Tensor:
        """Return the positions that each token of a slice attends to, int64 [tokens, positions].

        `NOT_CHOSEN` fills up the rows of tokens that choose fewer than others.

        Args:
            part: a slice.
            keys: of all complete blocks in order, [blocks, dim] each.
        """
        found = []
        for first in range(0, part.num_tokens, QUERIES_AT_ONCE):
            stop = min(first + QUERIES_AT_ONCE, part.num_tokens)
            queries = self._queries[part.row + first : part.row + stop]
            weights = queries.new_ones(queries.shape[:2], dtype=torch.float32)
            scores = index_scores(queries, weights, keys, queries.shape[-1] ** -0.5)
            found.append(self._best(scores, part.start + first))
        return found[0] if len(found) == 1 else torch.cat(found)

    def positions(self, chosen: Tensor, first: int) -> Tensor:
        """Return positions that tokens attend to: what they have chosen."""
        return chosen

    def _best(self, scores: Tensor, start: int) -> Tensor:
        """Return the positions that tokens from `start` on choose by the scores of blocks."""
        size, tokens = self._sizes.block, len(scores)
        within = torch.arange(size, device=scores.device)
        own = torch.arange(start, start + tokens, device=scores.device)[:, None]
        rows = within.new_full((tokens, self._sizes.seen), NOT_CHOSEN)
        row = 0
        while row < tokens:  # tokens with as many complete blocks
            complete = (start + row + 1) // size
            there = slice(row, min(tokens, row + size - (start + row + 1) % size))
            # Of no more than are complete: with others, those would differ whose scores are equal.
            best = scores[there, :complete].topk(min(self._sizes.most, complete)).indices
            chosen = (best[:, :, None] * size + within).flatten(1)
            after = complete * size + within[:-1]
            after = torch.where(after <= own[there], after, NOT_CHOSEN)
            rows[there, : chosen.shape[1] + size - 1] = torch.cat((chosen, after), dim=1)
            row = there.stop
        return rows


class ChoosingMask:
    """Stands for the mask of attention that chooses blocks: with what is chosen, it is that."""

    dtype = torch.bool

    def __and__(self, choice: BlockMeansChoice) -> BlockMeansChoice:
        return choice


class PackedBlockIndexer(nn.Module):
    """An indexer that returns a `BlockMeansChoice`.

    Args:
        indexer: of transformers.

    Raises:
        UnsupportedModel: it chooses in another way.
    """

    def __init__(self, indexer: nn.Module) -> None:
        super().__init__()
        forward: Any = inspect.unwrap(type(indexer).forward)
        rotation = forward.__globals__.get(_ROTATION)
        if rotation is None or not all(hasattr(indexer, name) for name in _NEEDED):
            raise UnsupportedModel(
                f"{type(indexer).__name__} of the installed transformers chooses blocks of "
                "positions in another way than this program expects. Install another version (pip "
                "install -U transformers) on every machine, or use another model."
            )
        self.indexer: Any = indexer
        self._rotate = rotation

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        *_: object,
        **__: object,
    ) -> BlockMeansChoice:
        """Return what tokens choose by, of their hidden states [1, tokens, hidden_size].

        Args:
            hidden_states: of the step.
            position_embeddings: cosines and sines, [1, blocks + tokens, dim]: of where the blocks
                begin that the step completes, and of the tokens.
        """
        own = self.indexer
        tokens, dim = hidden_states.shape[1], int(own.index_head_dim)
        both = own.index_qk_proj(hidden_states).unflatten(-1, (-1, dim))
        queries, keys = both[:, :, : own.index_n_heads], both[0, :, own.index_n_heads]
        of_tokens = (each[:, -tokens:] for each in position_embeddings)
        cos, sin = of_tokens
        queries = self._rotate(own.q_layernorm(queries), cos=cos, sin=sin, unsqueeze_dim=2)
        of_starts = [each[0, :-tokens] for each in position_embeddings]

        def finish(means: Tensor) -> Tensor:
            normed = own.k_layernorm(means)[:, None]
            rotated: Tensor = self._rotate(normed, cos=of_starts[0], sin=of_starts[1])
            return rotated[:, 0]

        sizes = BlockSizes(int(own.compress_ratio), int(own.block_topk), dim)
        return BlockMeansChoice(queries[0], keys, sizes, finish)


def use_packed_block_indexers(layer: nn.Module) -> None:
    """Have the indexers of a loaded layer that choose blocks return a `BlockMeansChoice`.

    Raises:
        UnsupportedModel: they choose in another way.
    """
    for module in list(layer.modules()):
        if isinstance(indexer := getattr(module, "indexer", None), nn.Module):
            module.indexer = PackedBlockIndexer(indexer)
            module.register_forward_pre_hook(_with_a_mask, with_kwargs=True)


def block_starts(slices: Sequence[PackedSlice], sizes: BlockSizes) -> list[int]:
    """Return where the blocks begin that a step completes, in the order of its slices."""
    return [
        start
        for part in slices
        for start in sizes.complete_in(part.start, part.start + part.num_tokens)
    ]


def _with_a_mask(
    attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give attention a mask that becomes what its indexer returns."""
    return args, {**kwargs, "attention_mask": ChoosingMask()}
