"""Brings weights into oneDNN's order, several times as fast as oneDNN does.

oneDNN does not say which order it uses. But weights of the same shape have the same one, and on the
processors we know it differs in one number only. So for each shape that more than one weight has,
oneDNN reorders random numbers once, and if one of the orders that the C library can make gives the
same bytes, later weights are copied straight into copies of an earlier one. Otherwise oneDNN
reorders them.
"""

import ctypes
import functools
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from distributed_llm.worker.model.kernels.native import interleave, library

_TYPICAL_ROWS = 16
"""Number of input rows (tokens) that the order is made for.

It is fast for other numbers too. The order that oneDNN makes for 1 row is slow for more.
"""

_LANES = (64, 48, 32, 16)
"""Rows that a block may have."""

_COLUMNS = 16
"""Units of four bytes that a block has a multiple of, in each row."""

_SMALLEST_BYTES, _LARGEST_BYTES = 1 << 16, 128 << 20
"""Sizes of weights for which the order is found out: that takes memory for two of them."""

_PERIOD = 65_521
"""Random numbers that are repeated: a prime, so that neither rows nor blocks are alike."""

_PIECE_ROWS = 192
"""Rows that are compared at a time: a multiple of all `_LANES`."""

_earlier: WeakValueDictionary[tuple[torch.dtype, torch.Size], Tensor] = WeakValueDictionary()


def reordered(weight: Tensor) -> Tensor:
    """Return a weight in oneDNN's order.

    Args:
        weight: [out_features, in_features].

    Returns:
        An opaque tensor without strides.
    """
    key = weight.dtype, weight.shape
    earlier = _earlier.get(key)
    lanes = 0 if earlier is None else _lanes(weight.dtype, *weight.shape)
    if earlier is None or not lanes:
        made = _by_onednn(weight)
    else:
        made = earlier.clone()
        interleave(weight.contiguous(), _blocks(made, lanes, len(weight)), lanes)
    _earlier[key] = made
    return made


def _by_onednn(weight: Tensor) -> Tensor:
    made: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_ROWS)
    return made


@functools.lru_cache(maxsize=64)
def _lanes(dtype: torch.dtype, channels: int, inputs: int) -> int:
    """Return how many rows a block of oneDNN's order has; 0 if it is no order that we can make."""
    units, rest = divmod(inputs * dtype.itemsize, 4)
    nbytes = channels * inputs * dtype.itemsize
    if (
        rest
        or not _SMALLEST_BYTES <= nbytes <= _LARGEST_BYTES
        or library.instructions() == library.NAMES[0]
    ):
        return 0
    integers = torch.int16 if dtype.itemsize == torch.int16.itemsize else torch.int32
    most = torch.iinfo(integers).max // 4  # the highest bits 00: such numbers are all finite
    period = torch.empty(_PERIOD, dtype=integers)
    period.random_(most, generator=torch.Generator().manual_seed(0))
    numbers = period.repeat(channels * inputs // _PERIOD + 1)[: channels * inputs]
    numbers = numbers.view(channels, inputs)
    made = _by_onednn(numbers.view(dtype))
    block_bytes = -(-units // _COLUMNS) * _COLUMNS * 4
    for lanes in _LANES:
        room = -(-channels // lanes) * lanes * block_bytes
        if room == torch.ops.mkldnn._nbytes(made) and _is_order(made, numbers, lanes):
            return lanes
    return 0


def _is_order(made: Tensor, numbers: Tensor, lanes: int) -> bool:
    """Return whether blocks of so many rows of `numbers` are what oneDNN made."""
    blocks = _blocks(made, lanes, len(numbers))
    step = _PIECE_ROWS // lanes
    for start in range(0, len(blocks), step):
        expected = blocks[start : start + step]
        own = torch.zeros_like(expected)
        interleave(numbers[start * lanes : (start + step) * lanes], own, lanes)
        if not own.equal(expected):
            return False
    return True


def _blocks(made: Tensor, lanes: int, channels: int) -> Tensor:
    """Return the memory of a weight in oneDNN's order, which has to outlive what is returned."""
    nbytes = torch.ops.mkldnn._nbytes(made)
    memory = (ctypes.c_char * nbytes).from_address(torch.ops.mkldnn.data_ptr(made))
    return torch.frombuffer(memory, dtype=torch.int32).view(-(-channels // lanes), -1)
