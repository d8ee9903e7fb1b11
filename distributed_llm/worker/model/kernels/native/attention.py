"""Attention of single tokens over keys and values in several places, by the C library.

They are bfloat16, or rows of bytes: codes of 8 bits, and a bfloat16 that is their scale.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distributed_llm.common.kv_dtypes import SCALE_BYTES, KVDtype
from distributed_llm.worker.model.kernels.native import library
from distributed_llm.worker.model.kernels.native.norms import can_compute

_KEPT: dict[KVDtype, int] = {"auto": 0, "int8": 1, "fp8": 2}
"""The numbers that attention.c has for them."""


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive positions that a token attends to, in one place.

    Attributes:
        keys: bfloat16 [kv_heads, room, dim]; the numbers of a key lie one after another. Or uint8
            [kv_heads, room, row bytes].
        values: bfloat16 [kv_heads, room, value_dim], likewise; or uint8.
        first: of the positions, in the room.
        stop: where they end.
    """

    keys: Tensor
    values: Tensor
    first: int
    stop: int


def can_attend(query: Tensor, value_dim: int) -> bool:
    """Return whether `attend` takes queries [..., dim] and values [..., value_dim] like these."""
    return can_compute(query) and value_dim % 8 == 0


def attend(
    query: Tensor,
    parts: Sequence[Sequence[Part]],
    *,
    kept: KVDtype = "auto",
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Return the attention of single tokens, [tokens, heads, value_dim].

    Computed in float32 and rounded once.

    Args:
        query: bfloat16 [heads, tokens, dim]; see `can_attend`.
        parts: of each token; at least one position each.
        kept: what the codes of rows of bytes are; auto if keys and values are numbers.
        scale: factor of the scores.
        softcap: scores become softcap * tanh(score / softcap); or None.
        sinks: [heads], logits that take part in softmax without a value; or None.

    Raises:
        MemoryError: there is no memory for a few rows.
    """
    heads, tokens, dim = query.shape
    kv_heads, _, value_dim = parts[0][0].values.shape
    if kept != "auto":
        value_dim -= SCALE_BYTES
    if query.stride(2) != 1:
        query = query.contiguous()
    if sinks is not None:
        sinks = sinks.float().contiguous()
    numbers = [number for of_one in parts for part in of_one for number in _numbers(part)]
    starts = [0, *itertools.accumulate(map(len, parts))]
    places, where = torch.tensor(numbers), torch.tensor(starts)
    output = query.new_empty(tokens, heads, value_dim)
    failed = library.loaded().attend_tokens(
        *(query.data_ptr(), output.data_ptr(), 0 if sinks is None else sinks.data_ptr()),
        *(places.data_ptr(), where.data_ptr()),
        *(tokens, heads, kv_heads, dim, value_dim, query.stride(1), query.stride(0)),
        *(scale, softcap or 0.0, _KEPT[kept], torch.get_num_threads()),
    )
    if failed:
        raise MemoryError("no memory for the rows that attention is computed with")
    return output


def _numbers(part: Part) -> tuple[int, ...]:
    """Return a `Part` of attention.c."""
    keys, values = part.keys, part.values
    size = keys.element_size()
    key_head, key_position = (size * stride for stride in keys.stride()[:2])
    value_head, value_position = (size * stride for stride in values.stride()[:2])
    return (
        keys.data_ptr() + part.first * key_position,
        values.data_ptr() + part.first * value_position,
        part.stop - part.first,
        *(key_head, key_position, value_head, value_position),
    )
