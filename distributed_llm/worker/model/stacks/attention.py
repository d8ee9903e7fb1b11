"""Attention of encoder-decoders over packed sequences, called from within Hugging Face models.

There are three kinds. Tokens of a *source* see all of it, and nothing is kept of that. Tokens of an
*answer* see those before them in the answer, whose keys and values are kept after the positions of
the source. And they look *across*, at the keys and values that were made of the source as the
encoder left it, which are kept at its positions.
"""

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from distributed_llm.common.workspace import QUERIES_AT_ONCE
from distributed_llm.worker.devices import sent
from distributed_llm.worker.kv.segments import KVBuffers
from distributed_llm.worker.model.chunk_attention import attend_chunk
from distributed_llm.worker.model.decoded_rows import CodedRows
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
        return _within_sources(step, seen, sliding_window, query[0], key[0], value[0])[None], None
    layer = int(module.layer_idx) - step.first_layer
    if module.attends == "across":
        scoring = Scoring(scale, 0, softcap, None, across=True)
        return _across(step, layer, query[0], scoring)[None], None
    step.appended[layer] += 1
    scoring = Scoring(scale, sliding_window or 0, softcap, None)
    own = (query[0], key[0], value[0])
    if isinstance(bias, RelativeBias):
        return _within_answers_biased(step, layer, *own, Seen(scale, softcap, bias))[None], None
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
        heads = queries.shape[0]
        if heads != keys.shape[0]:
            keys = keys.repeat_interleave(heads // keys.shape[0], dim=0)
            values = values.repeat_interleave(heads // values.shape[0], dim=0)
        blocks = []
        for row in range(0, queries.shape[1], QUERIES_AT_ONCE):
            block = queries[:, row : row + QUERIES_AT_ONCE]
            seen_by = range(first + row, first + row + block.shape[1])
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
        return torch.cat(blocks, dim=1).transpose(0, 1)

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
    step: PackedStep, seen: Seen, window: int | None, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """Compute attention of whole sources, [tokens, heads, dim]."""

    def too_far(queries: range, keys: range) -> Tensor:
        return distances(queries, keys).abs() > (window or 0)

    attended = []
    for part in step.slices:
        rows = slice(part.row, part.row + part.num_tokens)
        hidden = too_far if window and part.num_tokens > window else None
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
    step: PackedStep, layer: int, query: Tensor, key: Tensor, value: Tensor, seen: Seen
) -> Tensor:
    """Compute what `_within_answers` does, where scores depend on how far a key is."""
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
    keys = torch.cat([buffers.keys for buffers in held], dim=1)
    values = torch.cat([buffers.values for buffers in held], dim=1)
    if step.cache.coding is None:
        return queries, keys, values
    dim = queries.shape[-1]
    rows = CodedRows(step.cache.coding, dim, dim, queries.dtype)
    return rows.rotated(queries), *rows.decoded(keys, values)


# ------------------------------------------------------------------ modules


def replace_attention(model: PreTrainedModel) -> None:
    """Replace the forward passes of attention that would not do for packed steps.

    That of T5 and its kin makes biases for one text alone; across, any makes keys and values again.
    The MLPs of T5 ask their matrix for its dtype, which one of integers does not have.
    """
    for module in model.modules():
        if type(module).__name__ in _MLPS_OF_T5:
            setattr(module, "forward", MethodType(_forward_mlp, module))  # noqa: B010
        attends = getattr(module, "attends", None)
        if attends == "across":
            setattr(module, "forward", MethodType(_forward_across, module))  # noqa: B010
        elif attends is not None and type(module).__name__ in _OF_T5:
            setattr(module, "forward", MethodType(_forward_t5, module))  # noqa: B010


_OF_T5 = frozenset({"MT5Attention", "T5Attention", "UMT5Attention"})
_MLPS_OF_T5 = frozenset(
    f"{kind}{form}ActDense" for kind in ("MT5", "T5", "UMT5") for form in ("Dense", "DenseGated")
)


def _forward_mlp(module: Any, hidden_states: Tensor) -> Tensor:
    """Compute the MLP of T5, whose second matrix is float32 in a model of float16."""
    if hasattr(module, "wi"):
        inner = module.act(module.wi(hidden_states))
    else:
        inner = module.act(module.wi_0(hidden_states)) * module.wi_1(hidden_states)
    weight = getattr(module.wo, "weight", None)  # integers have none
    made: Tensor = module.wo(inner if weight is None else inner.to(weight.dtype))
    return made


def _forward_t5(
    module: Any, hidden_states: Tensor, *_: object, **__: object
) -> tuple[Tensor | None, ...]:
    """Compute the attention of T5: without a scale, and with biases of relative positions."""
    query, key, value = (
        _in_heads(projection(hidden_states), module.key_value_proj_dim)
        for projection in (module.q, module.k, module.v)
    )
    attended, _weights = packed_stack_attention(module, query, key, value, None, scaling=1.0)
    return _given(module, module.o(attended.flatten(2)))


def _forward_across(
    module: Any, hidden_states: Tensor, *_: object, **__: object
) -> tuple[Tensor | None, ...]:
    """Compute attention across, of which keys and values are in the cache."""
    if type(module).__name__ in _OF_T5:
        query = _in_heads(module.q(hidden_states), module.key_value_proj_dim)
        leave = module.o
    else:
        query = _in_heads(module.q_proj(hidden_states), module.head_dim)
        leave = module.out_proj if hasattr(module, "out_proj") else module.o_proj
    attended, _weights = packed_stack_attention(
        *(module, query, query, query, None),
        scaling=module.scaling,
        softcap=getattr(module, "attn_logit_softcapping", None),
    )
    return _given(module, leave(attended.flatten(2)))


def _in_heads(states: Tensor, dim: int) -> Tensor:
    """Return [1, tokens, heads * dim] as [1, heads, tokens, dim]."""
    return states.view(*states.shape[:-1], -1, dim).transpose(1, 2)


def _given(module: nn.Module, output: Tensor) -> tuple[Tensor | None, ...]:
    """Return what transformers' own forward pass of an attention module does."""
    beside = 2 if type(module).__name__ in {"MT5Attention", "T5Attention"} else 1
    return (output, *(None,) * beside)


def buckets_of(module: Any) -> Callable[[Tensor], Tensor]:
    """Return a function from distances to buckets of T5's biases."""
    if type(module).__name__ == "UMT5Attention":
        return module._relative_position_bucket  # type: ignore[no-any-return]

    def bucket_of(distances: Tensor) -> Tensor:
        buckets: Tensor = module._relative_position_bucket(
            distances,
            bidirectional=not module.is_decoder,
            num_buckets=module.relative_attention_num_buckets,
            max_distance=module.relative_attention_max_distance,
        )
        return buckets

    return bucket_of


def projected_source(module: Any, states: Tensor) -> tuple[Tensor, Tensor]:
    """Return the keys and values that attention across makes of a source.

    Args:
        module: the attention.
        states: of the encoder, [1, tokens, hidden_size].

    Returns:
        Each [kv_heads, tokens, head_dim].
    """
    if type(module).__name__ in _OF_T5:
        projections, dim = (module.k, module.v), module.key_value_proj_dim
    else:
        projections, dim = (module.k_proj, module.v_proj), module.head_dim
    keys, values = (_in_heads(projection(states), dim)[0] for projection in projections)
    return keys, values
