"""A weight in memory in one order, and the kernels that read it in that order."""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Kernel = Callable[[Tensor], Tensor]
"""Returns the product [rows, out_features] with states [rows, in_features]; at least one row."""

_BLOCK_ELEMENTS = 2**20
"""Numbers of a weight that are converted at a time: they stay in the caches until they are used."""

_FEWEST_COLUMNS = 8
"""Rows of states from which on they are faster as the columns of a matrix on the right."""


class Layout(Protocol):
    """A weight [out_features, in_features] that is held once, whichever kernel reads it."""

    def kernels(self) -> Mapping[str, Kernel]:
        """Return the kernels that read this order, by name."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes."""

    def tensors(self) -> list[object]:
        """Return what holds the weight, so that it can be freed piece by piece."""


def product_in_blocks(
    states: Tensor, shape: tuple[int, int], stored: Callable[[int, int], Tensor]
) -> Tensor:
    """Return states @ weight.T for a weight of which a block of channels is converted at a time.

    Blocks stand on the left, because MKL takes twice as long with 16 rows on the left; with 4, it
    is the other way round. All are converted into the same memory: fresh memory costs as much as
    the product with a few rows.

    Args:
        states: [rows, in_features].
        shape: [out_features, in_features] of the weight.
        stored: returns channels [start, stop) of it, in any dtype.
    """
    channels, inputs = shape
    step = min(channels, max(1, _BLOCK_ELEMENTS // inputs))
    block = states.new_empty(step, inputs)
    few = states.shape[0] < _FEWEST_COLUMNS
    right = states.t().contiguous()
    output = states.new_empty(channels, states.shape[0])
    for start in range(0, channels, step):
        stop = min(start + step, channels)
        left = block[: stop - start].copy_(stored(start, stop))
        if few:
            output[start:stop] = F.linear(states, left).t()
        else:
            torch.mm(left, right, out=output[start:stop])
    return output.t().contiguous()


def largest(states: Tensor) -> Tensor:
    """Return the largest magnitude of each row, float32 [rows, 1], never 0."""
    dtype = torch.float32
    norm: Tensor = torch.linalg.vector_norm(states, torch.inf, -1, True, dtype=dtype)
    return norm.clamp_min_(1e-30)
