"""Has indexers tell what they choose positions by, and choose where all positions are held.

In transformers, an indexer scores all positions and returns the best ones, and its attention module
hands these to its attention function. Here it returns queries, weights and keys of a step's tokens
(`Choice`), which go the same way: keys of earlier positions are in the KV cache.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distributed_llm.common.errors import UnsupportedModel
from distributed_llm.common.workspace import QUERIES_AT_ONCE, SCORES_AT_ONCE
from distributed_llm.worker.model.packed_step import PackedSlice
from distributed_llm.worker.model.state_layers import PlainLinear

_ROTATIONS = ("apply_rotary_pos_emb_interleave", "apply_rotary_pos_emb")
"""Functions by which the indexers of transformers turn queries and keys; each calls one of them."""

_TURNED_LAST = frozenset({"HYV4Indexer"})
"""Classes of indexers that turn the end of queries and keys; others turn the beginning."""

_WEIGHTS = "weights_proj"


class Choice:
    """What the tokens of a step choose positions by, and what they chose.

    Args:
        queries: [tokens, heads, dim].
        weights: of the heads, float32 [tokens, heads].
        keys: [1, tokens, dim], of the same positions.
        scale: factor of the scores.
        most: positions that a token attends to.

    Attributes:
        keys: as given.
        most: as given.
    """

    def __init__(
        self, queries: Tensor, weights: Tensor, keys: Tensor, scale: float, most: int
    ) -> None:
        self.keys = keys
        self.most = most
        self._queries = queries
        self._weights = weights
        self._scale = scale
        self._chosen: dict[int, Tensor] = {}

    def of(self, part: PackedSlice) -> Tensor:
        """Return the positions that each token of a slice attends to, int64 [tokens, most].

        Positions after that of the token are there to fill up a row, and do not count.
        """
        return self._chosen[part.row]

    def choose(self, part: PackedSlice, keys: Sequence[Tensor]) -> None:
        """Choose the positions for `of`, more than which there are.

        Args:
            part: a slice.
            keys: of all positions in order, [positions, dim] each, those of the slice at the end.
        """
        chosen = []
        for row in range(0, part.num_tokens, QUERIES_AT_ONCE):
            count = min(QUERIES_AT_ONCE, part.num_tokens - row)
            scores = self._scores(slice(part.row + row, part.row + row + count), keys)
            positions = torch.arange(scores.shape[1], device=scores.device)
            own = torch.arange(part.start + row, part.start + row + count, device=scores.device)
            scores.masked_fill_(positions > own[:, None], float("-inf"))
            chosen.append(scores.topk(self.most, dim=-1).indices)
        self._chosen[part.row] = chosen[0] if len(chosen) == 1 else torch.cat(chosen)

    def _scores(self, rows: slice, keys: Sequence[Tensor]) -> Tensor:
        """Return the scores of all positions, float32 [tokens, positions]."""
        return index_scores(self._queries[rows], self._weights[rows], keys, self._scale)


def index_scores(queries: Tensor, weights: Tensor, keys: Sequence[Tensor], scale: float) -> Tensor:
    """Return the scores of all keys, float32 [tokens, keys]: of each head, not below 0, weighted.

    Args:
        queries: [tokens, heads, dim].
        weights: of the heads, float32 [tokens, heads].
        keys: [n, dim] each.
        scale: factor of the products.
    """
    queries = queries.float()
    at_once = max(1, SCORES_AT_ONCE // (queries.shape[0] * queries.shape[1]))
    scores = []
    for some in (piece for one in keys for piece in torch.split(one, at_once)):
        of_heads = torch.matmul(queries, some.float().T).mul_(scale).relu_()
        scores.append(torch.matmul(weights[:, None], of_heads)[:, 0])
    return scores[0] if len(scores) == 1 else torch.cat(scores, dim=1)


class PackedIndexer(nn.Module):
    """An indexer that returns a `Choice`.

    Args:
        indexer: of transformers.

    Raises:
        UnsupportedModel: it chooses in another way.
    """

    def __init__(self, indexer: nn.Module) -> None:
        super().__init__()
        self.indexer: Any = indexer
        forward: Any = inspect.unwrap(type(indexer).forward)
        names, found = forward.__code__.co_names, forward.__globals__
        rotations = [found[name] for name in _ROTATIONS if name in names]
        if len(rotations) != 1:
            raise UnsupportedModel(
                f"{type(indexer).__name__} of the installed transformers chooses positions in "
                "another way than this program expects. Install another version (pip install -U "
                "transformers) on every machine, or use another model."
            )
        self._rotate = rotations[0]
        self._turns_last = type(indexer).__name__ in _TURNED_LAST

    def forward(
        self,
        hidden_states: Tensor,
        query_latents: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        *_: object,
        **__: object,
    ) -> Choice:
        """Return what tokens choose by, of their hidden states [1, tokens, hidden_size].

        Args:
            hidden_states: of the step.
            query_latents: [1, tokens, rank], which queries are made of.
            position_embeddings: cosines and sines of their positions.
        """
        own = self.indexer
        queries = own.wq_b(query_latents).unflatten(-1, (own.n_heads, own.head_dim))
        keys = own.k_norm(own.wk(hidden_states).to(own.k_norm.weight.dtype))[:, :, None]
        queries, keys = self._rotated(queries, keys.to(hidden_states.dtype), position_embeddings)
        weights = getattr(own, _WEIGHTS)
        of_heads = weights(hidden_states.to(weights.weight.dtype)).float() * own.n_heads**-0.5
        return Choice(
            *(queries[0], of_heads[0], keys[:, :, 0]),
            scale=own.softmax_scale,
            most=own.index_topk,
        )

    def _rotated(
        self, queries: Tensor, keys: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return queries and keys, [1, tokens, heads, dim], turned by their positions."""
        turned, dim = self.indexer.qk_rope_head_dim, self.indexer.head_dim
        there = slice(dim - turned, dim) if self._turns_last else slice(0, turned)
        both = queries[..., there], keys[..., there]
        rotated = self._rotate(*both, *position_embeddings, unsqueeze_dim=2)
        made = queries.clone(), keys.clone()
        for whole, part in zip(made, rotated, strict=True):
            whole[..., there] = part
        return made


def keep_weights_plain(layer: nn.Module) -> None:
    """Have linear layers stay as they are whose dtype indexers ask; before weights are loaded."""
    for attention in _with_indexers(layer):
        getattr(attention.indexer, _WEIGHTS).__class__ = PlainLinear


def use_packed_indexers(layer: nn.Module) -> None:
    """Have the indexers of a loaded layer return a `Choice`.

    Raises:
        UnsupportedModel: they choose in another way.
    """
    for attention in _with_indexers(layer):
        attention.indexer = PackedIndexer(attention.indexer)
        attention.register_forward_pre_hook(_with_a_mask, with_kwargs=True)


def _with_indexers(layer: nn.Module) -> list[Any]:
    """Return the attention modules with an indexer of their own."""
    return [
        module
        for module in layer.modules()
        if isinstance(getattr(module, "indexer", None), nn.Module)
    ]


def _with_a_mask(
    attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give attention a mask to hand a part of to its indexer; neither makes use of it."""
    return args, {**kwargs, "attention_mask": torch.empty((1, 1, 1, 1))}
