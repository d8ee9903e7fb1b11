"""Attention to blocks of positions that each token has picked: what is picked is gathered.

As long as a text is no longer than what a token may see, it is attention to all positions. The keys
that blocks are picked by lie behind the keys of attention's heads, a part behind each, in one row
of the KV cache. So queries end in zeros where rows are read whole.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from distributed_llm.common.workspace import EXPANDED_AT_ONCE, SCORES_AT_ONCE
from distributed_llm.worker.devices import sent
from distributed_llm.worker.kv.segments import KVBuffers
from distributed_llm.worker.model.chosen_rows import in_parts, joined
from distributed_llm.worker.model.chunk_attention import attend_chunk, parts_of
from distributed_llm.worker.model.decoded_rows import CodedRows
from distributed_llm.worker.model.key_blocks import NOT_PICKED, KeyBlockChoice
from distributed_llm.worker.model.packed_step import PackedSlice, PackedStep, Scoring
from distributed_llm.worker.model.token_attention import attend_tokens


def attend_picked(
    step: PackedStep,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scoring: Scoring,
    choice: KeyBlockChoice,
) -> Tensor:
    """Append what a step's tokens keep, and compute their attention to what they pick.

    Args:
        step: that runs.
        layer: within the stage.
        query: [heads, tokens, head_dim].
        key: [kv_heads, tokens, head_dim].
        value: [kv_heads, tokens, value_dim].
        scoring: how.
        choice: by what they pick.

    Returns:
        [tokens, heads, value_dim].
    """
    dim, seen = query.shape[-1], choice.sizes.seen
    beside = in_parts(choice.keys, len(key))
    key = torch.cat((key, beside), dim=-1)
    query = pad(query, (0, beside.shape[-1]))
    attended = query.new_empty((query.shape[1], query.shape[0], value.shape[-1]))
    see_all = all(part.start < seen for part in step.single)
    for part in step.chunks if see_all else step.slices:
        rows = slice(part.row, part.row + part.num_tokens)
        own = (key[:, rows], value[:, rows])
        held = step.cache.append(layer, part.sequence_id, part.start, *own)
        queries = query[:, rows]
        if part.start + part.num_tokens > seen:
            kept = _KeptRows(step, held, *own)
            index_keys = kept.index_keys(choice.sizes.key_dim)
            picked = choice.picked(part, index_keys)
            attended[rows] = _attend_to(picked, part, queries, kept, scoring, choice.sizes.block)
            continue
        if step.cache.coding is None:  # fused kernels want keys as wide as values
            queries, held = queries[..., :dim], [one.narrow(dim) for one in held]
        attended[rows] = attend_chunk(step, queries, held, scoring, value.shape[-1])
    if step.single and see_all:
        at = sent(torch.tensor([part.row for part in step.single]), query.device)
        single = (query[:, at], key[:, at], value[:, at])
        attended[at] = attend_tokens(step, layer, *single, scoring)
    return attended


class _KeptRows:
    """Keys and values of all positions of a sequence in one layer.

    Args:
        step: that runs.
        held: as the KV cache keeps them.
        keys: of some positions, for their size and dtype.
        values: likewise.
    """

    def __init__(
        self, step: PackedStep, held: Sequence[KVBuffers], keys: Tensor, values: Tensor
    ) -> None:
        self._parts = parts_of(held)
        self._key_dim = keys.shape[-1]
        self.width = len(keys) * (keys.shape[-1] + values.shape[-1])
        coding = step.cache.coding
        sizes = (keys.shape[-1], values.shape[-1])
        self._coded = CodedRows(coding, *sizes, values.dtype) if coding else None

    def index_keys(self, dim: int) -> Tensor:
        """Return the keys of all positions that blocks are picked by, [positions, dim]."""
        beside = -(-dim // self._parts[0].keys.shape[0])
        found = []
        for part in self._parts:
            if self._coded is None:
                found.append(part.keys[..., -beside:])
                continue
            coding, dtype = self._coded.coding, self._coded.dtype
            for first, stop in self._coded.pieces(part.keys, part.start, part.stop):
                rows = coding.decoded(part.cut(first, stop).keys, self._key_dim, dtype)
                found.append(coding.turned_back(rows)[..., -beside:])
        return joined(torch.cat(found, dim=1), dim)

    def rotated(self, queries: Tensor) -> Tensor:
        """Return queries turned as the keys of `gathered` are."""
        return self._coded.rotated(queries) if self._coded else queries

    def gathered(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of positions, [heads, tokens, positions, dim].

        Args:
            positions: int64 [heads, tokens, positions].
        """
        first = self._parts[0]
        heads = torch.arange(len(positions), device=positions.device)[:, None, None]
        if len(self._parts) == 1:
            keys, values = first.keys[heads, positions], first.values[heads, positions]
        else:
            keys = first.keys.new_empty((*positions.shape, first.keys.shape[-1]))
            values = first.values.new_empty((*positions.shape, first.values.shape[-1]))
            heads = heads.expand(positions.shape)
            for part in self._parts:
                inside = (positions >= part.start) & (positions < part.stop)
                there = heads[inside], positions[inside] - part.start
                keys[inside], values[inside] = part.keys[there], part.values[there]
        return self._coded.decoded(keys, values) if self._coded else (keys, values)


def _attend_to(
    picked: Tensor,
    part: PackedSlice,
    queries: Tensor,
    kept: _KeptRows,
    scoring: Scoring,
    size: int,
) -> Tensor:
    """Compute attention of the last tokens of a sequence to the blocks that they have picked.

    Args:
        picked: int64 [kv_heads, tokens, blocks]; what comes after a token does not count.
        part: of the sequence.
        queries: [heads, tokens, key_dim].
        kept: of all positions.
        scoring: how.
        size: positions of a block.

    Returns:
        [tokens, heads, value_dim].
    """
    (heads, tokens, _), most = queries.shape, picked.shape[-1] * size
    within = torch.arange(size, device=picked.device)
    queries = kept.rotated(queries * scoring.scale)
    per_token = max(heads * most / SCORES_AT_ONCE, kept.width * most / EXPANDED_AT_ONCE)
    at_once = max(1, int(1 / per_token))
    attended = []
    for row in range(0, tokens, at_once):
        some = picked[:, row : row + at_once, :, None]
        positions = (some * size + within).flatten(2)
        first = part.start + row
        own = torch.arange(first, first + positions.shape[1], device=picked.device)[:, None]
        hidden = (positions > own) | (some == NOT_PICKED).expand(-1, -1, -1, size).flatten(2)
        keys, values = kept.gathered(torch.where(hidden, own, positions))
        # [kv_heads, tokens, group, key_dim]
        block = queries[:, row : row + at_once]
        grouped = block.reshape(len(keys), -1, *block.shape[1:]).transpose(1, 2)
        scores = torch.matmul(grouped, keys.transpose(-1, -2)).float()
        scores.masked_fill_(hidden[:, :, None], float("-inf"))
        weights = torch.softmax(scores, dim=-1).to(values.dtype)
        attended.append(torch.matmul(weights, values).transpose(0, 1).flatten(1, 2))
    return attended[0] if len(attended) == 1 else torch.cat(attended)
