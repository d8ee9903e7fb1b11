"""Attention of encoder-decoders over packed sequences, called from within Hugging Face models.

There are four kinds. Tokens of a *source* see all of it, and nothing is kept of that. Tokens of an
*answer* see those before them in the answer, whose keys and values are kept after the positions of
the source. And they look *across*, at the keys and values that were made of the source as the
encoder left it, which are kept at its positions. Some models *merge* the last two: their answers
see both by one softmax.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from distributed_llm.common.workspace import QUERIES_AT_ONCE
from distributed_llm.worker.devices import sent
from distributed_llm.worker.kv.segments import KVBuffers
from distributed_llm.worker.model.chunk_attention import attend_chunk
from distributed_llm.worker.model.decoded_rows import CodedRows
from distributed_llm.worker.model.kernels.native.attention import can_attend
from distributed_llm.worker.model.packed_step import (
    PackedSlice,
    PackedStep,
    Scoring,
    running_step,
)
from distributed_llm.worker.model.stacks.positions import RelativeBias, distances
from distributed_llm.worker.model.token_attention import attend_tokens, read_tokens

STACK_ATTENTION = "distributed_llm_stacks"


def packed_stack_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Compute attention of the packed tokens of a step, all of them of sources or of answers.

    Args:
        module: the model's attention module; it tells what its queries see (`attends`), and which
            biases of relative positions are added (`bias`), if any are.
        query: [1, heads, tokens, head_dim].
        key: [1, kv_heads, tokens, head_dim]; across, the cache is read instead.
        value: [1, kv_heads, tokens, head_dim]; likewise.
        attention_mask: has to be None.
        scaling: factor of the scores; default 1 / sqrt(head_dim).
        sliding_window: how far a token sees; default: everything. In an answer, itself included.
        softcap: scores become softcap * tanh(score / softcap).

    Returns:
        [1, tokens, heads, head_dim], and None for the attention weights.

    Raises:
        NotImplementedError: the model has a mask of its own.
    """
    if attention_mask is not None:
        raise NotImplementedError(f"{type(module).__name__} brings its own mask")
    step = running_step()
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    bias = getattr(module, "bias", None)
    if module.attends == "source":
        seen = Seen(scale, softcap, bias if isinstance(bias, RelativeBias) else None)
        both_ways = (sliding_window, sliding_window) if sliding_window else None
        reach = getattr(module, "reach", both_ways)
        return _within_sources(step, seen, reach, query[0], key[0], value[0])[None], None
    layer = int(module.layer_idx) - step.first_layer
    if module.attends == "across":
        scoring = Scoring(scale, 0, softcap, None, source="alone")
        return _across(step, layer, query[0], scoring)[None], None
    step.appended[layer] += 1
    scoring = Scoring(scale, sliding_window or 0, softcap, None)
    own = (query[0], key[0], value[0])
    if module.attends == "merged":
        both = replace(scoring, source="too")
        return _merged(step, layer, *own, both)[None], None
    if isinstance(bias, RelativeBias):
        return _within_answers_biased(step, layer, *own, scoring, bias)[None], None
    return _within_answers(step, layer, *own, scoring)[None], None


AttentionInterface.register(STACK_ATTENTION, packed_stack_attention)


class Seen:
    """Computes attention of some queries over keys that all of them see, but for what a mask hides.

    Args:
        scale: factor of the scores.
        softcap: see `Scoring`.
        bias: of relative positions; None: there is none.
    """

    def __init__(
        self, scale: float, softcap: float | None = None, bias: RelativeBias | None = None
    ) -> None:
        self._scale = scale
        self._softcap = softcap
        self._bias = bias

    def attend(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        first: int,
        hidden: Callable[[range, range], Tensor] | None = None,
    ) -> Tensor:
        """Return the attended values, [tokens, heads, dim].

        Args:
            queries: [heads, tokens, dim].
            keys: [kv_heads, positions, dim].
            values: [kv_heads, positions, dim].
            first: position of the first query; that of the first key is 0.
            hidden: returns which keys queries do not see, bool [queries, keys]; None: they see all.
        """
        heads, kv_heads = queries.shape[0], keys.shape[0]
        grouped = heads != kv_heads and queries.shape[1] == 1 and self._bias is None
        if grouped:  # heads with the same keys are rows of one product, and nothing is copied
            queries = queries.reshape(kv_heads, heads // kv_heads, -1)
        elif heads != kv_heads:
            keys = keys.repeat_interleave(heads // kv_heads, dim=0)
            values = values.repeat_interleave(heads // kv_heads, dim=0)
        blocks = []
        for row in range(0, queries.shape[1], QUERIES_AT_ONCE):
            block = queries[:, row : row + QUERIES_AT_ONCE]
            at = range(first + row, first + row + block.shape[1])
            seen_by = range(first, first + 1) if grouped else at
            mask = self._mask(seen_by, range(keys.shape[1]), hidden, queries)
            if self._softcap is None:
                blocks.append(
                    F.scaled_dot_product_attention(
                        block[None], keys[None], values[None], attn_mask=mask, scale=self._scale
                    )[0]
                )
                continue
            scores = torch.matmul(block, keys.transpose(1, 2)) * self._scale
            scores = torch.tanh(scores / self._softcap) * self._softcap
            scores = scores if mask is None else scores + mask
            weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype)
            blocks.append(torch.matmul(weights, values))
        attended = torch.cat(blocks, dim=1)
        return (attended.reshape(heads, 1, -1) if grouped else attended).transpose(0, 1)

    def _mask(
        self,
        queries: range,
        keys: range,
        hidden: Callable[[range, range], Tensor] | None,
        like: Tensor,
    ) -> Tensor | None:
        """Return what is added to scores, [heads or 1, queries, keys]; None: nothing is."""
        added = None if self._bias is None else self._bias.between(queries, keys).to(like.dtype)
        if hidden is None:
            return added
        there = hidden(queries, keys)  # on the CPU: to look at it waits for no device
        if not bool(there.any()):
            return added
        if added is None:
            added = like.new_zeros((1, len(queries), len(keys)))
        return added.masked_fill(sent(there, like.device), float("-inf"))


def _within_sources(
    step: PackedStep,
    seen: Seen,
    reach: tuple[int, int] | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
) -> Tensor:
    """Compute attention of whole sources, [tokens, heads, dim].

    Args:
        reach: how many tokens before itself a token sees, and how many after it; None: all.
    """

    def too_far(queries: range, keys: range) -> Tensor:
        assert reach is not None
        far = distances(queries, keys)
        return (far < -reach[0]) | (far > reach[1])

    attended = []
    for part in step.slices:
        rows = slice(part.row, part.row + part.num_tokens)
        hidden = too_far if reach and part.num_tokens > min(reach) else None
        attended.append(seen.attend(query[:, rows], key[:, rows], value[:, rows], 0, hidden))
    return torch.cat(attended)


def _within_answers(
    step: PackedStep, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring
) -> Tensor:
    """Append keys and values of answers, and compute their attention, [tokens, heads, dim]."""
    if not step.chunks:
        return attend_tokens(step, layer, query, key, value, scoring)
    attended = []
    for part in step.slices:
        rows = slice(part.row, part.row + part.num_tokens)
        held = step.cache.append(layer, part.sequence_id, part.start, key[:, rows], value[:, rows])
        own = _positions(held, part.source, part.start + part.num_tokens)
        attended.append(attend_chunk(step, query[:, rows], own, scoring, value.shape[-1]))
    return torch.cat(attended)


def _within_answers_biased(
    step: PackedStep,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scoring: Scoring,
    bias: RelativeBias,
) -> Tensor:
    """Compute what `_within_answers` does, where scores depend on how far a key is."""
    dims = key.shape[-1], value.shape[-1]
    if not step.chunks and can_attend(query, *dims) and query.shape[-1] == dims[0]:
        longest = max(part.start - part.source for part in step.slices)
        biased = replace(scoring, biases=bias.until(longest))
        return attend_tokens(step, layer, query, key, value, biased)
    seen = Seen(scoring.scale, scoring.softcap, bias)
    attended = []
    for part in step.slices:
        rows = slice(part.row, part.row + part.num_tokens)
        held = step.cache.append(layer, part.sequence_id, part.start, key[:, rows], value[:, rows])
        own = _positions(held, part.source, part.start + part.num_tokens)
        queries, keys, values = _numbers(step, query[:, rows], own)
        first = part.start - part.source
        hidden = _later if part.num_tokens > 1 else None
        attended.append(seen.attend(queries, keys, values, first, hidden))
    return torch.cat(attended)


def _later(queries: range, keys: range) -> Tensor:
    """Return which keys come after each query."""
    return distances(queries, keys) > 0


def _merged(
    step: PackedStep, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring
) -> Tensor:
    """Append keys and values of answers, whose tokens see all of their source beside them.

    Returns:
        [tokens, heads, dim].
    """
    if not step.chunks:
        return attend_tokens(step, layer, query, key, value, scoring)
    seen, window = Seen(scoring.scale, scoring.softcap), scoring.window
    attended = []
    for part in step.slices:

        def hidden(queries: range, keys: range, source: int = part.source) -> Tensor:
            far = distances(queries, keys)
            unseen = far > 0
            if window:
                unseen |= far <= -window
                unseen[:, :source] = False
            return unseen

        rows = slice(part.row, part.row + part.num_tokens)
        held = step.cache.append(layer, part.sequence_id, part.start, key[:, rows], value[:, rows])
        every = _positions(held, 0, part.start + part.num_tokens)
        attended.append(seen.attend(*_numbers(step, query[:, rows], every), part.start, hidden))
    return torch.cat(attended)


def _across(step: PackedStep, layer: int, query: Tensor, scoring: Scoring) -> Tensor:
    """Compute attention of answers over their sources, [tokens, heads, dim]."""
    dim = query.shape[-1]
    if not step.chunks:
        return read_tokens(step, layer, query, scoring, dim, dim)
    seen = Seen(scoring.scale, scoring.softcap)
    attended = []
    for part in step.slices:
        rows = slice(part.row, part.row + part.num_tokens)
        held = _positions(_held(step, layer, part), 0, part.source)
        attended.append(seen.attend(*_numbers(step, query[:, rows], held), 0))
    return torch.cat(attended)


def _held(step: PackedStep, layer: int, part: PackedSlice) -> list[KVBuffers]:
    """Return the keys and values that a layer has of a sequence, in order."""
    segments = step.cache.segments(part.sequence_id)
    ends = [*(segment.start for segment in segments[1:]), part.start]
    held = []
    for segment, end in zip(segments, ends, strict=True):
        buffers = segment.layers[layer]
        if buffers is not None and end > segment.start:
            held.append(buffers.cut(0, end - segment.start))
    return held


def _positions(held: Sequence[KVBuffers], first: int, stop: int) -> list[KVBuffers]:
    """Return views of the positions [first, stop) of a sequence.

    Args:
        held: of all its positions, in order.
        first: of these.
        stop: where they end.
    """
    cut, before = [], 0
    for buffers in held:
        count = buffers.keys.shape[1]
        low, high = max(first - before, 0), min(stop - before, count)
        if low < high:
            cut.append(KVBuffers(buffers.keys[:, low:high], buffers.values[:, low:high]))
        before += count
    return cut


def _numbers(
    step: PackedStep, queries: Tensor, held: Sequence[KVBuffers]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values as numbers that can be multiplied."""
    keys = _joined([buffers.keys for buffers in held])
    values = _joined([buffers.values for buffers in held])
    if step.cache.coding is None:
        return queries, keys, values
    dim = queries.shape[-1]
    rows = CodedRows(step.cache.coding, dim, dim, queries.dtype)
    return rows.rotated(queries), *rows.decoded(keys, values)


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    """Return pieces [kv_heads, positions, dim] one after another; one alone is not copied."""
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim=1)
