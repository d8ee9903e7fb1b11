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
    states: Tensor,
    shape: tuple[int, int],
    block_of: Callable[[int, int], Tensor],
) -> Tensor:
    """Return states @ weight.T for a weight of which a block of channels at a time is at hand.

    Args:
        states: [rows, in_features].
        shape: [out_features, in_features] of the weight.
        block_of: returns channels [start, stop) of it, in the dtype of `states`.
    """
    channels, inputs = shape
    step = max(1, _BLOCK_ELEMENTS // inputs)
    output = states.new_empty(states.shape[0], channels)
    for start in range(0, channels, step):
        stop = min(start + step, channels)
        output[:, start:stop] = F.linear(states, block_of(start, stop))
    return output


def largest(states: Tensor) -> Tensor:
    """Return the largest magnitude of each row, float32 [rows, 1], never 0."""
    dtype = torch.float32
    norm: Tensor = torch.linalg.vector_norm(states, torch.inf, -1, True, dtype=dtype)
    return norm.clamp_min_(1e-30)
