"""Has indexers that choose blocks tell what they choose by, and choose where all are held.

In transformers, the indexer of MiniMax-M3 returns the blocks that each token attends to, for each
head of keys, and its attention module hands these to its attention function. Here it returns
queries and keys of a step's tokens (`KeyBlockChoice`), which go the same way: keys of earlier
positions are in the KV cache.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from distributed_llm.common.errors import UnsupportedModel
from distributed_llm.common.key_blocks import KeyBlockSizes
from distributed_llm.common.workspace import QUERIES_AT_ONCE, SCORES_AT_ONCE
from distributed_llm.worker.model.chosen_rows import NOT_CHOSEN
from distributed_llm.worker.model.packed_step import PackedSlice

_NEEDED = ("q_proj", "k_proj", "q_norm", "k_norm", "block_size", "topk_blocks", "local_blocks")
"""What indexers have that choose blocks in this way."""

_ROTATION = "apply_rotary_pos_emb"


class KeyBlockChoice:
    """What the tokens of a step choose blocks of positions by: the best key of each.

    Args:
        queries: [heads, tokens, dim], of as many heads as keys and values have.
        keys: [tokens, dim], of the same positions.
        sizes: of the blocks.
        local: blocks that every token chooses, its own one and those before it.

    Attributes:
        seen: positions that a token attends to at most.
        key_dim: numbers of a key.
        every: 1, for the key of each position counts.
    """

    every = 1

    def __init__(self, queries: Tensor, keys: Tensor, sizes: KeyBlockSizes, local: int) -> None:
        self.seen = sizes.seen
        self.key_dim = sizes.key_dim
        self._keys = keys
        self._sizes = sizes
        self._queries = queries
        self._local = local

    def keys_to_keep(
        self,
        slices: Sequence[PackedSlice],
        kept_before: Callable[[PackedSlice, int], Tensor],
    ) -> Tensor:
        """Return the keys [tokens, dim] that are kept of a step: those of its tokens."""
        return self._keys

    def choose(self, part: PackedSlice, keys: Sequence[Tensor]) -> Tensor:
        """Return the blocks that each token of a slice chooses, int64 [heads, tokens, blocks].

        Args:
            part: a slice.
            keys: of all positions in order, [positions, dim] each, those of the slice at the end.
        """
        held = torch.cat([some.float() for some in keys])
        held = pad(held, (0, 0, 0, -len(held) % self._sizes.block))
        found = []
        for first in range(0, part.num_tokens, QUERIES_AT_ONCE):
            stop = min(first + QUERIES_AT_ONCE, part.num_tokens)
            queries = self._queries[:, part.row + first : part.row + stop].float()
            own = torch.arange(part.start + first, part.start + stop, device=held.device)
            found.append(self._best(self._scores(queries, held, own), own // self._sizes.block))
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)

    def positions(self, chosen: Tensor, first: int) -> Tensor:
        """Return the positions that tokens attend to, int64 [heads, tokens, positions].

        Args:
            chosen: blocks, [heads, tokens, blocks]; of the last one, what comes later is left out.
            first: position of the first token.
        """
        size = self._sizes.block
        within = torch.arange(size, device=chosen.device)
        own = torch.arange(first, first + chosen.shape[1], device=chosen.device)[:, None, None]
        places = chosen[..., None] * size + within
        hidden = (places > own) | (chosen == NOT_CHOSEN)[..., None]
        return places.masked_fill_(hidden, NOT_CHOSEN).flatten(2)

    def _scores(self, queries: Tensor, keys: Tensor, own: Tensor) -> Tensor:
        """Return the scores of all blocks, float32 [heads, tokens, blocks].

        Args:
            queries: float32 [heads, tokens, dim].
            keys: float32 [positions, dim], of whole blocks.
            own: positions of the tokens, after which nothing counts.
        """
        size = self._sizes.block
        blocks = max(1, SCORES_AT_ONCE // (queries.shape[0] * queries.shape[1] * size))
        best = []
        for first in range(0, len(keys), blocks * size):
            some = keys[first : first + blocks * size]
            scores = torch.matmul(queries, some.T)
            positions = torch.arange(first, first + len(some), device=keys.device)
            scores.masked_fill_(positions > own[:, None], float("-inf"))
            best.append(scores.view(*scores.shape[:-1], -1, size).amax(dim=-1))
        return best[0] if len(best) == 1 else torch.cat(best, dim=-1)

    def _best(self, scores: Tensor, own: Tensor) -> Tensor:
        """Return the best blocks by their scores, which are changed.

        Args:
            scores: of all blocks, [heads, tokens, blocks].
            own: blocks of the tokens.
        """
        count = max(0, min(self._local, scores.shape[-1]))
        local = own[:, None] - torch.arange(count, device=own.device)
        local = local.clamp_(min=0).expand(len(scores), -1, -1)
        scores.scatter_(-1, local, float("inf"))
        best, blocks = scores.topk(min(self._sizes.most, scores.shape[-1]), dim=-1)
        return blocks.masked_fill_(best == float("-inf"), NOT_CHOSEN)


class KeyBlockIndexer(nn.Module):
    """An indexer that returns a `KeyBlockChoice`.

    Args:
        indexer: of transformers.
        kv_heads: heads of keys of its attention.

    Raises:
        UnsupportedModel: it chooses in another way.
    """

    def __init__(self, indexer: nn.Module, kv_heads: int) -> None:
        super().__init__()
        rotation = inspect.unwrap(type(indexer).forward).__globals__.get(_ROTATION)
        known = all(hasattr(indexer, name) for name in _NEEDED)
        if rotation is None or not known or getattr(indexer, "num_heads", 0) != kv_heads:
            raise UnsupportedModel(
                f"{type(indexer).__name__} of the installed transformers chooses blocks of "
                "positions in another way than this program expects, which is once for each head "
                "of keys. Install another version (pip install -U transformers) on every machine, "
                "or use another model."
            )
        self.indexer: Any = indexer
        self._rotate: Any = rotation

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        *_: object,
    ) -> KeyBlockChoice:
        """Return what tokens choose by, of their hidden states [1, tokens, hidden_size].

        Args:
            hidden_states: of the step.
            position_embeddings: cosines and sines of their positions.
        """
        own = self.indexer
        dim = int(own.head_dim)
        queries = own.q_norm(own.q_proj(hidden_states).unflatten(-1, (-1, dim))).transpose(1, 2)
        keys = own.k_norm(own.k_proj(hidden_states)[:, :, None]).transpose(1, 2)
        turns = (each[..., :dim] for each in position_embeddings)
        queries, keys = self._rotate(queries, keys, *turns)
        sizes = KeyBlockSizes(dim, int(own.block_size), int(own.topk_blocks))
        return KeyBlockChoice(queries[0], keys[0, 0], sizes, int(own.local_blocks))


def use_key_block_indexers(layer: nn.Module) -> None:
    """Have the indexers of a loaded layer that choose blocks return a `KeyBlockChoice`.

    Raises:
        UnsupportedModel: they choose in another way.
    """
    for module in list(layer.modules()):
        if isinstance(indexer := getattr(module, "indexer", None), nn.Module):
            attention: Any = module
            kv_heads = attention.config.num_key_value_heads
            attention.indexer = KeyBlockIndexer(indexer, kv_heads)
