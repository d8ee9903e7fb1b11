"""Attention of a chunk of one sequence, by the C library on processors that multiply bfloat16."""

import functools
import itertools
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from distributed_llm.worker.model.kernels.native import library
from distributed_llm.worker.model.kernels.native.attention import Part, address, can_attend


def can_attend_chunk(queries: Tensor, value_dim: int) -> bool:
    """Return whether `attend_rows` takes queries [..., dim] and values [..., value_dim]."""
    return can_attend(queries, queries.shape[-1], value_dim) and _has_products()


@functools.cache
def _has_products() -> bool:
    is_allowed = library.instructions() == library.NAMES[-1]
    return is_allowed and bool(library.loaded().can_attend_chunks())


def attend_rows(
    queries: Tensor,
    parts: Sequence[Part],
    kv_heads: int,
    value_dim: int,
    *,
    scale: float,
    softcap: float | None,
    window: int,
    sinks: Tensor | None,
) -> Tensor:
    """Return the attention of the last tokens of a sequence.

    Scores, softmax and sums are float32; weights are rounded to bfloat16, as values are.

    Args:
        queries: bfloat16 [heads, tokens, dim]; see `can_attend_chunk`.
        parts: bfloat16 keys and values of all positions, in order, those of the tokens at the end.
        kv_heads: heads of keys and values.
        value_dim: numbers of a value.
        scale: factor of the scores.
        softcap: scores become softcap * tanh(score / softcap); or None.
        window: positions that a token attends to, itself included; 0 is all.
        sinks: [heads], logits that take part in softmax without a value; or None.

    Returns:
        bfloat16 [tokens, heads, value_dim].

    Raises:
        MemoryError: there is no memory for some rows.
    """
    if queries.stride(2) != 1:
        queries = queries.contiguous()
    if sinks is not None:
        sinks = sinks.float().contiguous()
    heads, tokens, dim = queries.shape
    output = queries.new_empty(tokens, heads, value_dim)
    table = array("q", itertools.chain.from_iterable(parts))
    positions = sum(part.positions for part in parts)
    shape = tokens, heads, kv_heads, dim, value_dim
    strides = queries.stride(0), queries.stride(1)
    sizes = array("q", (len(parts), positions, *shape, *strides, window))
    failed = library.loaded().attend_chunk(
        *(queries.data_ptr(), output.data_ptr(), address(sinks)),
        *(table.buffer_info()[0], sizes.buffer_info()[0]),
        *(scale, softcap or 0.0, torch.get_num_threads()),
    )
    if failed:
        raise MemoryError("no memory for the rows that attention is computed with")
    return output
