"""Attention of single tokens over keys and values in several places, by the C library.

They are bfloat16, or rows of bytes: codes of 8 bits, and a bfloat16 that is their scale.
"""

import itertools
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distributed_llm.common.kv_dtypes import KVDtype
from distributed_llm.worker.model.kernels.native import library
from distributed_llm.worker.model.kernels.native.calls import AttentionCall, Places, tell
from distributed_llm.worker.model.kernels.native.norms import EIGHT, can_compute

_KEPT: dict[KVDtype, int] = {"auto": 0, "int8": 1, "fp8": 2}
"""The numbers that attention.c has for them."""


class Part(NamedTuple):
    """Consecutive positions that a token attends to, in one place; as attention.c reads it.

    Keys are bfloat16 [kv_heads, positions, dim], and the numbers of a key lie one after another; or
    uint8 [kv_heads, positions, row bytes]. Values likewise.

    Attributes:
        keys: address of the first position's key of the first head.
        values: address of its value.
        positions: how many there are.
        key_head: bytes from one head's keys to those of the next.
        key_position: bytes from a key to that of the next position.
        value_head: as `key_head`.
        value_position: as `key_position`.
    """

    keys: int
    values: int
    positions: int
    key_head: int
    key_position: int
    value_head: int
    value_position: int


def places_of(parts: Sequence[Sequence[Part]]) -> Places:
    """Return the parts of each token, at least its own position, as attention.c reads them."""
    numbers = array("q", itertools.chain.from_iterable(itertools.chain.from_iterable(parts)))
    return Places(numbers, array("q", itertools.accumulate(map(len, parts), initial=0)))


def can_attend(query: Tensor, dim: int, value_dim: int) -> bool:
    """Return whether `attend` takes such queries, keys [..., dim] and values [..., value_dim]."""
    fits = query.shape[-1] in (dim, dim + value_dim)
    return fits and can_compute(query) and dim % EIGHT == value_dim % EIGHT == 0


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    places: Places,
    *,
    kept: KVDtype = "auto",
    rotation: Tensor | None = None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    biases: Tensor | None = None,
) -> Tensor:
    """Keep the keys and values of single tokens, and return their attention.

    Computed in float32 and rounded once.

    Args:
        query: bfloat16 [heads, tokens, dim], or [heads, tokens, dim + value_dim] where values are
            scored too, as behind the keys; see `can_attend`.
        key: bfloat16 [kv_heads, tokens, dim]; becomes the last position of a token's last part.
        value: bfloat16 [kv_heads, tokens, value_dim]; likewise.
        places: of the parts of each token.
        kept: what the codes of rows of bytes are; auto if keys and values are kept as numbers.
        rotation: float32 [dim, dim], by which keys, and what scores them, are turned; or None.
        scale: factor of the scores.
        softcap: scores become softcap * tanh(score / softcap); or None.
        sinks: [heads], logits that take part in softmax without a value; or None.
        biases: float32 [heads, positions], added to the scores of the last positions that a token
            sees, and of no fewer; or None. Not where values are scored too.

    Returns:
        bfloat16 [tokens, heads, value_dim].

    Raises:
        MemoryError: there is no memory for a few rows.
    """
    query, key, value = (_in_rows(states) for states in (query, key, value))
    heads, tokens, width = query.shape
    kv_heads, _, value_dim = value.shape
    if sinks is not None:
        sinks = sinks.float().contiguous()
    strides = [states.stride(way) for states in (query, key, value) for way in (1, 0)]
    shape = tokens, heads, kv_heads, key.shape[2], value_dim, width
    instructions = library.NAMES.index(library.instructions())
    reach = 0 if biases is None else biases.shape[1]
    sizes = array("q", (*shape, *strides, instructions, reach))
    output = query.new_empty(tokens, heads, value_dim)
    settings = scale, softcap or 0.0, _KEPT[kept]
    call = AttentionCall(
        query, key, value, output, sinks, rotation, sizes, *settings, places=places
    )
    _compute((query, key, value, output, sinks, biases, rotation), places, sizes, settings)
    if biases is None:
        tell(call)
    return output


def read(
    query: Tensor,
    places: Places,
    kv_heads: int,
    *,
    kept: KVDtype,
    rotation: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Return the attention of single tokens to what is kept already, as `attend` computes it.

    Args:
        query: bfloat16 [heads, tokens, dim]; values have as many numbers.
        places: of the parts of each token.
        kv_heads: of keys and values.
        kept: as in `attend`, like all that follows.
        rotation: of the same.
        scale: of the same.
        softcap: of the same.

    Raises:
        MemoryError: as there.
    """
    query = _in_rows(query)
    heads, tokens, dim = query.shape
    strides = query.stride(1), query.stride(0), 0, 0, 0, 0
    instructions = library.NAMES.index(library.instructions())
    sizes = array("q", (tokens, heads, kv_heads, dim, dim, dim, *strides, instructions, 0))
    output = query.new_empty(tokens, heads, dim)
    tensors = query, None, None, output, None, None, rotation
    _compute(tensors, places, sizes, (scale, softcap or 0.0, _KEPT[kept]))
    return output


def _compute(
    tensors: Sequence[Tensor | None],
    places: Places,
    sizes: "array[int]",
    settings: tuple[float, float, int],
) -> None:
    if library.loaded().attend_tokens(
        *map(address, tensors),
        *(each.buffer_info()[0] for each in (*places, sizes)),
        *(*settings, torch.get_num_threads()),
    ):
        raise MemoryError("no memory for the rows that attention is computed with")


def _in_rows(states: Tensor) -> Tensor:
    return states if states.stride(2) == 1 else states.contiguous()


def address(tensor: Tensor | None) -> int:
    """Return where a tensor begins in memory; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
