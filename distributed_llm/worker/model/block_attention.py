"""Attention to blocks of positions that each token has chosen: what is chosen is gathered.

As long as a text is no longer than what a token may see, it is attention to all positions. The keys
that blocks are chosen by lie behind the keys of the heads, a part behind each, in one row of the KV
cache. So queries end in zeros where rows are read whole.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from distributed_llm.common.workspace import EXPANDED_AT_ONCE, SCORES_AT_ONCE
from distributed_llm.worker.devices import sent
from distributed_llm.worker.model.chosen_rows import NOT_CHOSEN, ChosenRows, in_parts, joined
from distributed_llm.worker.model.chunk_attention import attend_chunk
from distributed_llm.worker.model.kernels import kernels_for_many_rows
from distributed_llm.worker.model.packed_step import PackedSlice, PackedStep, Scoring
from distributed_llm.worker.model.token_attention import attend_tokens


class BlockChoice(Protocol):
    """By what the tokens of a step choose blocks of positions."""

    @property
    def seen(self) -> int:
        """Positions that a token attends to at most; in texts no longer than that, to all."""

    @property
    def key_dim(self) -> int:
        """Numbers of an index key."""

    @property
    def every(self) -> int:
        """Positions of which the last one's index key alone is read when tokens choose."""

    def keys_to_keep(
        self,
        slices: Sequence[PackedSlice],
        kept_before: Callable[[PackedSlice, int], Tensor],
    ) -> Tensor:
        """Return the index keys [tokens, dim] that are kept of a step.

        Args:
            slices: all of the step.
            kept_before: returns what is kept of the positions of a slice's sequence from one on and
                before the slice, [positions, dim].
        """

    def choose(self, part: PackedSlice, keys: Sequence[Tensor]) -> Tensor:
        """Return what each token of a slice chooses, alike for all heads or for each.

        Args:
            part: a slice.
            keys: that are read, of all positions in order, [positions, dim] each.

        Returns:
            int64 [tokens, any] or [kv_heads, tokens, any].
        """

    def positions(self, chosen: Tensor, first: int) -> Tensor:
        """Return the positions that tokens attend to.

        Args:
            chosen: of these tokens, by `choose`.
            first: position of the first of them.

        Returns:
            int64 [tokens, any] or [kv_heads, tokens, any]; where a token attends to fewer than
            others, `NOT_CHOSEN` fills up its row.
        """


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
    index_dim, seen = choice.key_dim, choice.seen
    beside = -(-index_dim // len(key))  # the part of an index key that is behind a key
    width = key.shape[-1] + beside

    def kept_before(part: PackedSlice, first: int) -> Tensor:
        rows = _held_keys(step, layer, part, first, (width, key.dtype))
        return joined(rows[..., -beside:], index_dim)

    index_keys = choice.keys_to_keep(step.slices, kept_before)
    key = torch.cat((key, in_parts(index_keys, len(key))), dim=-1)
    wide = F.pad(query, (0, beside))
    attended = query.new_empty((query.shape[1], query.shape[0], value.shape[-1]))
    see_all = all(part.start < seen for part in step.single)
    for part in step.chunks if see_all else step.slices:
        rows = slice(part.row, part.row + part.num_tokens)
        own = (key[:, rows], value[:, rows])
        held = step.cache.append(layer, part.sequence_id, part.start, *own)
        if part.start + part.num_tokens <= seen:
            queries = wide[:, rows]
            if step.cache.coding is None:  # fused kernels want keys as wide as values
                queries, held = query[:, rows], [one.narrow(query.shape[-1]) for one in held]
            attended[rows] = attend_chunk(step, queries, held, scoring, value.shape[-1])
            continue
        kept = ChosenRows(step, held, *own)
        with kernels_for_many_rows():
            read = [joined(some, index_dim) for some in kept.index_keys(beside, choice.every)]
            chosen = choice.choose(part, read)
            attended[rows] = _attend_to(choice, chosen, part.start, wide[:, rows], kept, scoring)
    if step.single and see_all:
        at = sent(torch.tensor([part.row for part in step.single]), query.device)
        single = (wide[:, at], key[:, at], value[:, at])
        attended[at] = attend_tokens(step, layer, *single, scoring)
    return attended


def _attend_to(
    choice: BlockChoice,
    chosen: Tensor,
    start: int,
    queries: Tensor,
    kept: ChosenRows,
    scoring: Scoring,
) -> Tensor:
    """Compute attention of tokens over what they have chosen.

    Args:
        choice: by what they have.
        chosen: by it.
        start: position of the first token.
        queries: [heads, tokens, key_dim].
        kept: of all positions.
        scoring: how.

    Returns:
        [tokens, heads, value_dim].
    """
    heads, tokens, _ = queries.shape
    queries = kept.rotated(queries * scoring.scale)
    per_token = kept.heads * choice.seen * kept.width
    at_once = min(SCORES_AT_ONCE // (heads * choice.seen), EXPANDED_AT_ONCE // per_token)
    at_once = max(1, at_once)
    attended = []
    for row in range(0, tokens, at_once):
        some = slice(row, row + at_once)
        positions = choice.positions(chosen[..., some, :], start + row)
        attended.append(_attended(queries[:, some], positions, kept))
    return attended[0] if len(attended) == 1 else torch.cat(attended)


def _attended(queries: Tensor, positions: Tensor, kept: ChosenRows) -> Tensor:
    """Compute attention of so few tokens that what they have chosen is gathered at once."""
    keys, values = kept.gathered(positions.clamp(min=0))
    # [kv_heads, tokens, group, key_dim]
    grouped = queries.reshape(len(keys), -1, *queries.shape[1:]).transpose(1, 2)
    scores = torch.matmul(grouped, keys.transpose(-1, -2)).float()
    scores.masked_fill_((positions == NOT_CHOSEN).unsqueeze(-2), float("-inf"))
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
        low = max(first, segment.start) - segment.start
        keys = step.cache.read(layer, segment, low, stop - segment.start).keys
        found.append(coding.turned_back(coding.decoded(keys, *kind)) if coding else keys)
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)
