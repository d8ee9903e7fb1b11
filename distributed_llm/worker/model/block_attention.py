"""Attention to blocks of positions that each token has picked: what is picked is gathered.

As long as a text is no longer than what a token may see, it is attention to all positions. The keys
that blocks are picked by lie behind the keys of the heads, a part behind each, in one row of the KV
cache. So queries end in zeros where rows are read whole.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from distributed_llm.common.workspace import EXPANDED_AT_ONCE, SCORES_AT_ONCE
from distributed_llm.worker.devices import sent
from distributed_llm.worker.model.block_indexers import NOT_CHOSEN, BlockChoice
from distributed_llm.worker.model.chosen_rows import ChosenRows, in_parts, joined
from distributed_llm.worker.model.chunk_attention import attend_chunk
from distributed_llm.worker.model.kernels import kernels_for_many_rows
from distributed_llm.worker.model.packed_step import PackedSlice, PackedStep, Scoring
from distributed_llm.worker.model.token_attention import attend_tokens


def attend_blocks(
    step: PackedStep,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scoring: Scoring,
    choice: BlockChoice,
) -> Tensor:
    """Append what a step's tokens keep, and compute their attention to what they choose.

    Args:
        step: that runs.
        layer: within the stage.
        query: [heads, tokens, head_dim].
        key: [kv_heads, tokens, head_dim].
        value: [kv_heads, tokens, value_dim].
        scoring: how.
        choice: by what they choose.

    Returns:
        [tokens, heads, value_dim].
    """
    index_dim = choice.sizes.key_dim
    beside = -(-index_dim // len(key))  # the part of an index key that is behind a key
    width = key.shape[-1] + beside

    def kept_before(part: PackedSlice, first: int) -> Tensor:
        rows = _held_keys(step, layer, part, first, (width, key.dtype))
        return joined(rows[..., -beside:], index_dim)

    index_keys = choice.keys_to_keep(step.slices, kept_before)
    key = torch.cat((key, in_parts(index_keys, len(key))), dim=-1)
    wide = F.pad(query, (0, beside))
    attended = query.new_empty((query.shape[1], query.shape[0], value.shape[-1]))
    see_all = all(part.start < choice.sizes.seen for part in step.single)
    for part in step.chunks if see_all else step.slices:
        rows = slice(part.row, part.row + part.num_tokens)
        own = (key[:, rows], value[:, rows])
        held = step.cache.append(layer, part.sequence_id, part.start, *own)
        if part.start + part.num_tokens <= choice.sizes.seen:
            seen = (query[:, rows], [one.narrow(query.shape[-1]) for one in held])
            if step.cache.coding:
                seen = (wide[:, rows], held)
            attended[rows] = attend_chunk(step, *seen, scoring, value.shape[-1])
            continue
        kept = ChosenRows(step, held, *own)
        with kernels_for_many_rows():
            blocks = kept.index_keys(beside, every=choice.sizes.block)
            chosen = choice.choose(part, [joined(some, index_dim) for some in blocks])
            attended[rows] = _attend_to(chosen, wide[:, rows], kept, scoring)
    if step.single and see_all:
        at = sent(torch.tensor([part.row for part in step.single]), query.device)
        single = (wide[:, at], key[:, at], value[:, at])
        attended[at] = attend_tokens(step, layer, *single, scoring)
    return attended


def _attend_to(chosen: Tensor, queries: Tensor, kept: ChosenRows, scoring: Scoring) -> Tensor:
    """Compute attention of tokens over what they have chosen.

    Args:
        chosen: positions, int64 [tokens, positions]; `NOT_CHOSEN` does not count.
        queries: [heads, tokens, key_dim].
        kept: of all positions.
        scoring: how.

    Returns:
        [tokens, heads, value_dim].
    """
    (heads, tokens, _), most = queries.shape, chosen.shape[1]
    queries = kept.rotated(queries * scoring.scale)
    per_token = kept.heads * most * kept.width
    at_once = max(1, min(SCORES_AT_ONCE // (heads * most), EXPANDED_AT_ONCE // per_token))
    rows = range(0, tokens, at_once)
    some = [(queries[:, row : row + at_once], chosen[row : row + at_once]) for row in rows]
    attended = [_attended(*each, kept) for each in some]
    return attended[0] if len(attended) == 1 else torch.cat(attended)


def _attended(queries: Tensor, chosen: Tensor, kept: ChosenRows) -> Tensor:
    """Compute attention of so few tokens that what they have chosen is gathered at once."""
    keys, values = kept.gathered(chosen.clamp(min=0))
    # [kv_heads, tokens, group, key_dim]
    grouped = queries.reshape(len(keys), -1, *queries.shape[1:]).transpose(1, 2)
    scores = torch.matmul(grouped, keys.transpose(-1, -2)).float()
    scores.masked_fill_((chosen == NOT_CHOSEN)[:, None], float("-inf"))
    weights = torch.softmax(scores, dim=-1).to(values.dtype)
    return torch.matmul(weights, values).transpose(0, 1).flatten(1, 2)


def _held_keys(
    step: PackedStep, layer: int, part: PackedSlice, first: int, kind: tuple[int, torch.dtype]
) -> Tensor:
    """Return the keys [heads, positions, dim] that are kept of positions [first, part.start).

    Args:
        step: that runs.
        layer: within the stage.
        part: of the sequence.
        first: position.
        kind: numbers of a key, and their dtype.
    """
    found, coding = [], step.cache.coding
    segments = step.cache.segments(part.sequence_id)
    for segment, following in itertools.pairwise((*segments, None)):
        stop = min(part.start, following.start) if following else part.start
        if segment is None or stop <= max(first, segment.start):
            continue
        buffers = segment.layers[layer]
        assert buffers is not None
        keys = buffers.cut(max(first, segment.start) - segment.start, stop - segment.start).keys
        found.append(coding.turned_back(coding.decoded(keys, *kind)) if coding else keys)
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)
