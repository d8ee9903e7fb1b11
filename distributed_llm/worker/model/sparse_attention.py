"""Attention over latents of which each token has chosen some: what is chosen is gathered.

As long as a text has no more positions than a token may choose, it is attention over all latents.
The indexer's keys lie behind the part of the keys that all heads share, in one row of the KV cache.
So queries end in zeros where rows are read whole.
"""

import torch
from torch import Tensor

from distributed_llm.common.workspace import EXPANDED_AT_ONCE, SCORES_AT_ONCE
from distributed_llm.worker.model.chosen_rows import ChosenRows
from distributed_llm.worker.model.indexers import Choice
from distributed_llm.worker.model.kernels import kernels_for_many_rows
from distributed_llm.worker.model.latent_attention import (
    attend_chunk_of_latents,
    attend_latents,
    widened,
)
from distributed_llm.worker.model.latents import LatentExpansion
from distributed_llm.worker.model.packed_step import PackedSlice, PackedStep, Scoring
from distributed_llm.worker.model.partial_attention import row_scores


def attend_chosen(
    step: PackedStep,
    layer: int,
    query: Tensor,
    shared: Tensor,
    latents: Tensor,
    scoring: Scoring,
    expansion: LatentExpansion,
    choice: Choice,
    chooses: bool,
) -> Tensor:
    """Append what a step's tokens keep, and compute their attention over what they choose.

    Args:
        step: that runs.
        layer: within the stage.
        query: [heads, tokens, head_dim].
        shared: the part of the keys that all heads share, [1, tokens, shared_dim].
        latents: [1, tokens, rank].
        scoring: how.
        expansion: makes keys and values of latents.
        choice: by what they choose, or what an earlier layer has chosen for this one.
        chooses: whether this layer does.

    Returns:
        [tokens, heads, value_dim].
    """
    if chooses:
        shared = torch.cat((shared, choice.keys), dim=-1)
    if all(part.start + part.num_tokens <= choice.most for part in step.slices):
        return attend_latents(step, layer, query, shared, latents, scoring, expansion)
    attended = query.new_empty((query.shape[1], query.shape[0], expansion.value_dim))
    for part in step.slices:
        rows = slice(part.row, part.row + part.num_tokens)
        own = (shared[:, rows], latents[:, rows])
        held = step.cache.append(layer, part.sequence_id, part.start, *own)
        with kernels_for_many_rows():
            if part.start + part.num_tokens <= choice.most:
                inputs = (query[:, rows], held, shared.shape[-1], scoring, expansion)
                attended[rows] = attend_chunk_of_latents(step, *inputs)
                continue
            latent_rows = ChosenRows(step, held, shared, latents)
            if chooses:
                index_keys = latent_rows.index_keys(choice.keys.shape[-1])
                choice.choose(part, [keys[0] for keys in index_keys])
            chosen = choice.of(part)
            attended[rows] = _attend_to(
                chosen, part, query[:, rows], latent_rows, scoring, expansion
            )
    return attended


def _attend_to(
    chosen: Tensor,
    part: PackedSlice,
    queries: Tensor,
    rows: ChosenRows,
    scoring: Scoring,
    expansion: LatentExpansion,
) -> Tensor:
    """Compute attention of the last tokens of a sequence over what they have chosen.

    Args:
        chosen: positions, int64 [tokens, positions]; those after a token do not count.
        part: of the sequence.
        queries: [heads, tokens, head_dim].
        rows: latents of all positions.
        scoring: how.
        expansion: makes keys and values of latents.

    Returns:
        [tokens, heads, value_dim].
    """
    heads, most = queries.shape[0], chosen.shape[1]
    queries = widened(queries, expansion, rows.key_dim)
    absorbed = rows.rotated(expansion.absorbed(queries) * scoring.scale).transpose(0, 1)
    at_once = max(1, min(SCORES_AT_ONCE // (heads * most), EXPANDED_AT_ONCE // (most * rows.width)))
    attended = []
    for row in range(0, part.num_tokens, at_once):
        some = chosen[row : row + at_once]
        keys, latents = (kept[0] for kept in rows.gathered(some))
        scores = row_scores(absorbed[row : row + at_once], keys, latents).float()
        first = part.start + row
        own = torch.arange(first, first + len(some), device=some.device)
        scores.masked_fill_((some > own[:, None])[:, None], float("-inf"))
        weights = torch.softmax(scores, dim=-1)
        if scoring.sinks is not None:
            lse = torch.logsumexp(scores, dim=-1, keepdim=True)
            weights *= torch.sigmoid(lse - scoring.sinks.float()[:, None])
        attended.append(torch.bmm(weights.to(latents.dtype), latents))
    return expansion.values_of(attended[0] if len(attended) == 1 else torch.cat(attended))
