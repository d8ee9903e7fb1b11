"""Attention of a chunk of one sequence: several tokens at once.

Queries are taken in blocks, and positions segment by segment. A block needs a mask only where it
sees a part of the positions; one mask of the widest block serves all blocks and layers, for it
depends on the distance from a block's last position alone.

Positions that are kept in 8 bits are decoded piece by piece, each once for all blocks.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from distributed_llm.common.workspace import QUERIES_AT_ONCE, SCORES_AT_ONCE
from distributed_llm.worker.kv.segments import KVBuffers
from distributed_llm.worker.model.decoded_rows import CodedRows
from distributed_llm.worker.model.kernels.native.attention import Part
from distributed_llm.worker.model.kernels.native.chunks import attend_rows, can_attend_chunk
from distributed_llm.worker.model.packed_step import PackedStep, Scoring
from distributed_llm.worker.model.partial_attention import (
    Partial,
    fused,
    merged,
    row_scores,
    with_sinks,
)


class ChunkPart(NamedTuple):
    """Keys and values of the positions from `start` on, [kv_heads, positions, dim]."""

    start: int
    keys: Tensor
    values: Tensor

    @property
    def stop(self) -> int:
        """Where the positions end."""
        return self.start + self.keys.shape[1]

    def cut(self, start: int, stop: int) -> "ChunkPart":
        """Return the positions [start, stop)."""
        there = slice(start - self.start, stop - self.start)
        return ChunkPart(start, self.keys[:, there], self.values[:, there])


def attend_chunk(
    step: PackedStep,
    queries: Tensor,
    held: Sequence[KVBuffers],
    scoring: Scoring,
    value_dim: int,
) -> Tensor:
    """Compute attention of the last tokens of a sequence.

    Args:
        step: that runs.
        queries: [heads, tokens, head_dim].
        held: keys and values of all positions, the chunk's own at the end, in order.
        scoring: how.
        value_dim: numbers of a value.

    Returns:
        [tokens, heads, value_dim].
    """
    coding = step.cache.coding
    plain = coding is None and step.cache.pages is None and scoring.slopes is None
    if plain and can_attend_chunk(queries, value_dim):
        return attend_rows(
            *(queries, [_place_of(one) for one in held], held[0].keys.shape[0], value_dim),
            scale=scoring.scale,
            softcap=scoring.softcap,
            window=scoring.window,
            sinks=scoring.sinks,
        )
    same_dims = queries.shape[-1] == value_dim
    by_hand = scoring.softcap is not None or scoring.slopes is not None or not same_dims
    in_blocks = not by_hand and queries.device.type == "cpu"
    if coding is not None:
        queries = coding.rotated(queries)
        rows = CodedRows(coding, queries.shape[-1], value_dim, queries.dtype)
        if in_blocks or by_hand:
            attend = attend_part_by_hand if by_hand else attend_part
            heads = held[0].keys.shape[0]
            return in_pieces(step, queries, parts_of(held), scoring, rows, attend, heads)
        held = [KVBuffers(*rows.decoded(one.keys, one.values)) for one in held]
    if in_blocks:
        return _in_blocks(step, queries, parts_of(held), scoring)
    if by_hand or scoring.sinks is not None:
        return _by_hand(step, queries, _joined(held), scoring)
    return _by_one_kernel(queries, _joined(held), scoring)


def _place_of(held: KVBuffers) -> Part:
    return Part(*held.addresses, held.keys.shape[1], *held.strides)


def parts_of(held: Sequence[KVBuffers]) -> list[ChunkPart]:
    """Return the parts of all positions, in order."""
    parts: list[ChunkPart] = []
    for buffers in held:
        start = parts[-1].stop if parts else 0
        parts.append(ChunkPart(start, buffers.keys, buffers.values))
    return parts


def _joined(held: Sequence[KVBuffers]) -> ChunkPart:
    if len(held) == 1:
        return ChunkPart(0, held[0].keys, held[0].values)
    keys, values = (one.keys for one in held), (one.values for one in held)
    return ChunkPart(0, torch.cat(list(keys), dim=1), torch.cat(list(values), dim=1))


def _in_blocks(
    step: PackedStep, queries: Tensor, parts: Sequence[ChunkPart], scoring: Scoring
) -> Tensor:
    start = parts[-1].stop - queries.shape[1]
    blocks = []
    for row, block in _blocks(queries, parts[0].keys.shape[0], QUERIES_AT_ONCE):
        seen = [attend_part(step, block, start + row, part, scoring) for part in parts]
        blocks.append(_sum_of([one for one in seen if one is not None]))
    return _put_together(blocks, scoring)


class PartRows(Protocol):
    """Makes keys and values of what is kept."""

    def pieces(self, keys: Tensor, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield positions [start, stop) of a part in pieces to make at once."""

    def decoded(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values, [kv_heads, positions, dim], of what is kept as these."""


def in_pieces(
    step: PackedStep,
    queries: Tensor,
    parts: Sequence[ChunkPart],
    scoring: Scoring,
    rows: PartRows,
    attend: "AttendPart",
    kv_heads: int,
) -> Tensor:
    """Compute attention of parts that have to be decoded, with little memory for their numbers.

    Args:
        step: that runs.
        queries: [heads, tokens, head_dim].
        parts: as they are kept.
        scoring: how.
        rows: decodes them.
        attend: computes attention of a block of queries over one piece.
        kv_heads: of what is decoded.

    Returns:
        [tokens, heads, value_dim].
    """
    start = parts[-1].stop - queries.shape[1]
    blocks = list(_blocks(queries, kv_heads, QUERIES_AT_ONCE))
    sums: list[list[Partial]] = [[] for _ in blocks]
    lowest = max(0, start - scoring.window + 1) if scoring.window else 0
    for part in parts:
        for first, stop in rows.pieces(part.keys, max(part.start, lowest), part.stop):
            cut = part.cut(first, stop)
            piece = ChunkPart(first, *rows.decoded(cut.keys, cut.values))
            for (row, block), total in zip(blocks, sums, strict=True):
                seen = attend(step, block, start + row, piece, scoring)
                if seen is not None:  # rounded once, at the end
                    seen = Partial(seen.attended.float(), seen.lse)
                    total[:] = [_sum_of([*total, seen])]
    return _put_together([total for (total,) in sums], scoring).to(queries.dtype)


def _blocks(queries: Tensor, kv_heads: int, size: int) -> Iterator[tuple[int, Tensor]]:
    """Yield blocks of `size` queries, [kv_heads, group, size, dim], and where they begin."""
    heads, tokens, _ = queries.shape
    # Heads that share keys are one batch of the kernel, which reads the keys where they are.
    grouped = queries.view(kv_heads, heads // kv_heads, tokens, -1)
    for row in range(0, tokens, size):
        yield row, grouped[:, :, row : row + size]


def _put_together(blocks: Sequence[Partial], scoring: Scoring) -> Tensor:
    """Return the attention of all blocks, [tokens, heads, value_dim], with sinks."""
    if scoring.sinks is None:
        attended = [block.attended for block in blocks]
    else:
        sinks = scoring.sinks.view(blocks[0].attended.shape[0], -1, 1)
        attended = [with_sinks(block, sinks) for block in blocks]
    whole = attended[0] if len(attended) == 1 else torch.cat(attended, dim=2)
    return whole.flatten(0, 1).transpose(0, 1)


def attend_part(
    step: PackedStep, queries: Tensor, start: int, part: ChunkPart, scoring: Scoring
) -> Partial | None:
    """Compute attention of the queries of positions from `start` on; None if they see nothing."""
    kv_heads, group, tokens, _ = queries.shape
    stop = start + tokens
    cut = _seen(part, start, stop, scoring.window)
    if cut is None:
        return None
    first, last = cut.start, cut.stop
    plain = not scoring.window or first >= stop - scoring.window  # the last query sees it all
    is_causal = plain and first == start and last == stop
    mask = None
    if not is_causal and not (plain and last <= start + 1):
        mask = _mask(step, tokens, scoring.window, stop - first, queries)
        mask = mask[:, mask.shape[1] - (stop - first) : mask.shape[1] - (stop - last)]
    shape = (kv_heads, group, last - first, -1)
    keys, values = cut.keys[:, None].expand(shape), cut.values[:, None].expand(shape)
    return fused(queries, keys, values, scoring.scale, mask, is_causal=is_causal)


def _seen(part: ChunkPart, start: int, stop: int, window: int) -> ChunkPart | None:
    """Return what queries of the positions `[start, stop)` see of a part; None if nothing."""
    first = max(part.start, start - window + 1) if window else part.start
    last = min(part.stop, stop)
    return part.cut(first, last) if first < last else None


AttendPart: TypeAlias = Callable[[PackedStep, Tensor, int, ChunkPart, Scoring], Partial | None]


def attend_part_by_hand(
    step: PackedStep, queries: Tensor, start: int, part: ChunkPart, scoring: Scoring
) -> Partial | None:
    """Compute what `attend_part` does, with what fused kernels lack."""
    kv_heads, group, tokens, dim = queries.shape
    stop = start + tokens
    cut = _seen(part, start, stop, scoring.window)
    if cut is None:
        return None
    rows = queries.reshape(kv_heads, group * tokens, dim)
    scores = row_scores(rows, cut.keys, cut.values).mul_(scoring.scale)
    scores = scores.view(kv_heads, group, tokens, -1).float()
    if scoring.softcap is not None:
        scores = scores.div_(scoring.softcap).tanh_().mul_(scoring.softcap)
    if scoring.slopes is not None:
        positions = torch.arange(cut.start, cut.stop, device=queries.device)
        added = scoring.slopes[:, None] * positions  # [heads, positions]
        scores += added.view(kv_heads, group, 1, -1)
    visible = _visible(tokens, stop - cut.start, scoring.window, queries.device)
    visible = visible[:, : cut.stop - cut.start]
    # Finite, for a query may see nothing of a part.
    scores.masked_fill_(~visible, torch.finfo(torch.float32).min / 2)
    lse = torch.logsumexp(scores, dim=-1)
    weights = scores.sub_(lse[..., None]).exp_().to(queries.dtype)
    attended = torch.matmul(weights.view(kv_heads, group * tokens, -1), cut.values)
    return Partial(attended.view(kv_heads, group, tokens, -1), lse)


def _sum_of(seen: Sequence[Partial]) -> Partial:
    if len(seen) == 1:
        return seen[0]
    lses = [part.lse for part in seen if part.lse is not None]
    return merged(torch.stack([part.attended for part in seen]), torch.stack(lses))


def _mask(step: PackedStep, tokens: int, window: int, width: int, like: Tensor) -> Tensor:
    """Return what hides positions from queries when it is added to the scores.

    Returns:
        [tokens, width or more]: the last column is the position of the last query.
    """
    made_from = "mask", tokens, window, like.dtype
    mask = step.made.get(made_from)
    if not isinstance(mask, Tensor) or mask.shape[1] < width:
        # Finite, for the kernel has no right lse for a query that sees nothing of a part.
        mask = like.new_full((tokens, width), torch.finfo(like.dtype).min / 2)
        mask.masked_fill_(_visible(tokens, width, window, like.device), 0.0)
        step.made[made_from] = mask
    return mask


def _visible(tokens: int, positions: int, window: int, device: torch.device) -> Tensor:
    """Return the positions that each of the last tokens attends to, bool [tokens, positions]."""
    visible = torch.ones((tokens, positions), dtype=torch.bool, device=device)
    visible = visible.tril_(positions - tokens)
    return visible.triu_(positions - tokens - window + 1) if window else visible


def _by_one_kernel(queries: Tensor, part: ChunkPart, scoring: Scoring) -> Tensor:
    """Compute attention by whatever kernel torch has for the device."""
    heads, tokens, _ = queries.shape
    kv_heads = part.keys.shape[0]
    if scoring.window:  # earlier positions are outside every token's window
        part = part.cut(max(0, part.stop - tokens - scoring.window + 1), part.stop)
    positions = part.keys.shape[1]
    plain = positions == tokens and (not scoring.window or tokens <= scoring.window)
    keys, values = part.keys, part.values
    mask: object = None
    if not plain:
        if scoring.window and positions > scoring.window:
            mask = _visible(tokens, positions, scoring.window, queries.device)
        else:
            mask = causal_lower_right(tokens, positions)
    if mask is not None and heads != kv_heads:  # fused kernels take no mask for groups of heads
        keys = keys.repeat_interleave(heads // kv_heads, dim=0)
        values = values.repeat_interleave(heads // kv_heads, dim=0)
    attended = F.scaled_dot_product_attention(
        queries[None],
        keys[None],
        values[None],
        attn_mask=mask,  # type: ignore[arg-type]
        is_causal=plain,
        scale=scoring.scale,
        enable_gqa=heads != kv_heads and mask is None,
    )
    return attended[0].transpose(0, 1)


def _by_hand(step: PackedStep, queries: Tensor, part: ChunkPart, scoring: Scoring) -> Tensor:
    """Compute attention with what fused kernels lack, in blocks of queries."""
    heads, tokens, _ = queries.shape
    kv_heads, positions, _ = part.keys.shape
    size = max(1, SCORES_AT_ONCE // (heads * positions))
    blocks = []
    for row, block in _blocks(queries, kv_heads, size):
        attended = attend_part_by_hand(step, block, positions - tokens + row, part, scoring)
        assert attended is not None  # a token sees itself
        blocks.append(attended)
    return _put_together(blocks, scoring)
