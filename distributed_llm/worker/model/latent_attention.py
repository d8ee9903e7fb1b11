"""Attention over latents: queries attend to them as they are, or they become keys and values.

Queries are multiplied by what would make the keys of every head (`LatentExpansion.absorbed`), and
attend to the latents themselves. Or latents become keys and values of every head, piece by piece.
The first takes longer products for each pair of query and position, the second a product for each
position; so the second is faster for chunks of many tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from distributed_llm.common.latents import LatentSizes, absorbing_is_faster
from distributed_llm.common.workspace import EXPANDED_AT_ONCE, QUERIES_AT_ONCE, SCORES_AT_ONCE
from distributed_llm.worker.devices import sent
from distributed_llm.worker.kv.segments import KVBuffers
from distributed_llm.worker.model.chunk_attention import (
    attend_part,
    attend_part_by_hand,
    in_pieces,
    parts_of,
)
from distributed_llm.worker.model.decoded_rows import CodedRows
from distributed_llm.worker.model.kernels import kernels_for_many_rows
from distributed_llm.worker.model.latents import LatentExpansion
from distributed_llm.worker.model.packed_step import PackedStep, Scoring
from distributed_llm.worker.model.token_attention import attend_tokens


def attend_latents(
    step: PackedStep,
    layer: int,
    query: Tensor,
    shared: Tensor,
    latents: Tensor,
    scoring: Scoring,
    expansion: LatentExpansion,
) -> Tensor:
    """Append what a step's tokens keep, and compute their attention.

    Args:
        step: that runs.
        layer: within the stage.
        query: [heads, tokens, head_dim].
        shared: the part of the keys that all heads share, [1, tokens, shared_dim]; perhaps with
            numbers behind it that are kept for others (`sparse_attention`).
        latents: [1, tokens, rank].
        scoring: how.
        expansion: makes keys and values of latents.

    Returns:
        [tokens, heads, value_dim].
    """
    if not step.chunks:
        return _attend_tokens(step, layer, query, shared, latents, scoring, expansion)
    heads, tokens, _ = query.shape
    attended = query.new_empty((tokens, heads, expansion.value_dim))
    for part in step.chunks:
        rows = slice(part.row, part.row + part.num_tokens)
        own = (shared[:, rows], latents[:, rows])
        held = step.cache.append(layer, part.sequence_id, part.start, *own)
        inputs = (query[:, rows], held, shared.shape[-1], scoring, expansion)
        attended[rows] = attend_chunk_of_latents(step, *inputs)
    if step.single:
        chosen = sent(torch.tensor([part.row for part in step.single]), query.device)
        single = (query[:, chosen], shared[:, chosen], latents[:, chosen])
        attended[chosen] = _attend_tokens(step, layer, *single, scoring, expansion)
    return attended


def _attend_tokens(
    step: PackedStep,
    layer: int,
    query: Tensor,
    shared: Tensor,
    latents: Tensor,
    scoring: Scoring,
    expansion: LatentExpansion,
) -> Tensor:
    """Compute attention of the step's single tokens."""
    query = widened(query, expansion, shared.shape[-1])
    with kernels_for_many_rows():
        absorbed = expansion.absorbed(query)
        return expansion.values_of(attend_tokens(step, layer, absorbed, shared, latents, scoring))


def attend_chunk_of_latents(
    step: PackedStep,
    queries: Tensor,
    held: Sequence[KVBuffers],
    width: int,
    scoring: Scoring,
    expansion: LatentExpansion,
) -> Tensor:
    """Compute attention of the last tokens of a sequence.

    Args:
        step: that runs.
        queries: [heads, tokens, head_dim].
        held: shared keys and latents of all positions, the chunk's own at the end, in order.
        width: numbers that are kept of the keys, of which the first are the shared part.
        scoring: how.
        expansion: makes keys and values of latents.

    Returns:
        [tokens, heads, value_dim].
    """
    parts = parts_of(held)
    coded, coding = None, step.cache.coding
    if coding is not None:
        queries = widened(queries, expansion, width)
    heads, tokens, key_dim = queries.shape
    shared_dim = key_dim - expansion.key_dim
    if coding is None:
        parts = [part._replace(keys=part.keys[..., :shared_dim]) for part in parts]
    else:
        coded = CodedRows(coding, shared_dim, expansion.rank, queries.dtype)
        own, shared = queries.tensor_split((expansion.key_dim,), dim=-1)
        queries = torch.cat((own, coding.rotated(shared)), dim=-1)
    sizes = LatentSizes(expansion.rank, shared_dim, expansion.key_dim, expansion.value_dim)
    if absorbing_is_faster(sizes, tokens, parts[-1].stop):
        absorbed = expansion.absorbed(queries) * scoring.scale
        scoring = replace(scoring, scale=1.0)
        rows = _Latents(coded, max(1, SCORES_AT_ONCE // (heads * min(tokens, QUERIES_AT_ONCE))))
        attended = in_pieces(step, absorbed, parts, scoring, rows, attend_part_by_hand, 1)
        return expansion.values_of(attended)
    dim = max(key_dim, expansion.value_dim)
    queries = F.pad(queries, (0, dim - key_dim)) if dim > key_dim else queries
    numbers = heads * (2 * dim + expansion.key_dim + expansion.value_dim)
    expanded = _Expanded(coded, max(1, EXPANDED_AT_ONCE // numbers), expansion, dim)
    attend = attend_part if queries.device.type == "cpu" else attend_part_by_hand
    attended = in_pieces(step, queries, parts, scoring, expanded, attend, heads)
    return attended[..., : expansion.value_dim]


def widened(queries: Tensor, expansion: LatentExpansion, width: int) -> Tensor:
    """Return queries [heads, tokens, head_dim] with zeros for what is kept behind shared keys.

    Args:
        queries: as the model made them.
        expansion: makes keys and values of latents.
        width: numbers that are kept of the keys.
    """
    zeros = width - (queries.shape[-1] - expansion.key_dim)
    return F.pad(queries, (0, zeros)) if zeros else queries


@dataclass(frozen=True, slots=True)
class _Latents:
    """Latents as they are, or decoded.

    Attributes:
        coded: decodes them, if they are rows of bytes.
        at_once: positions of a piece at most.
    """

    coded: CodedRows | None
    at_once: int

    def pieces(self, keys: Tensor, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield positions [start, stop) in pieces to attend to at once."""
        for first in range(start, stop, self.at_once):
            yield first, min(first + self.at_once, stop)

    def decoded(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return shared keys and latents, as numbers, of what is kept."""
        return self.coded.decoded(keys, values) if self.coded else (keys, values)


@dataclass(frozen=True, slots=True)
class _Expanded(_Latents):
    """Keys and values of every head, made of latents.

    Attributes:
        expansion: makes them.
        dim: numbers that keys and values of a head get.
    """

    expansion: LatentExpansion
    dim: int

    def decoded(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of every head."""
        shared, latents = _Latents.decoded(self, keys, values)
        return self.expansion.expanded(shared, latents, self.dim)
