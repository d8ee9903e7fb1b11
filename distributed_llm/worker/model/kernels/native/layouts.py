"""Weights of integers in the orders that the C library reads; products.h describes them."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from distributed_llm.worker.model.kernels.layout import Kernel
from distributed_llm.worker.model.kernels.native import library

_LANES = 16
"""Output channels of a block."""

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


class Int8Blocks:
    """Codes of 8 bits with a scale for each channel, in blocks of 16 channels.

    States are rounded to 8 bits, 64 of them at a time by their largest magnitude.

    Args:
        codes: int8 [out_features, in_features].
        scales: float32 [out_features].
        instructions: of the processor, see `library.NAMES`; None: the best it has.

    Raises:
        library.Missing: this machine cannot compute so.
    """

    def __init__(self, codes: Tensor, scales: Tensor, instructions: str | None = None) -> None:
        self._function = library.function("int8_product", instructions or library.instructions())
        self._channels, self._inputs = codes.shape
        padded = F.pad(codes, (0, -self._inputs % 4, 0, -self._channels % _LANES))
        fours = (padded.view(torch.uint8) ^ 128).view(torch.int32)  # a byte is code + 128
        self._codes = fours.view(-1, _LANES, fours.shape[1]).transpose(1, 2).contiguous()
        self._scales = scales.contiguous()

    def kernels(self) -> Mapping[str, Kernel]:
        """Return the kernel that reads this order."""
        return {"native": self._product}

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self._codes.nbytes + self._scales.nbytes

    def tensors(self) -> list[object]:
        """Return codes and scales."""
        return [self._codes, self._scales]

    def _product(self, states: Tensor) -> Tensor:
        states, output = _ready(states, self._inputs % 4, self._channels)
        self._function(
            *(states.data_ptr(), output.data_ptr()),
            *(self._codes.data_ptr(), self._scales.data_ptr()),
            *(*states.shape, self._channels),
            *(_DTYPES[states.dtype], torch.get_num_threads()),
        )
        return output


class Int4Blocks:
    """Codes of 4 bits with scale and offset for each group of inputs, in blocks of 16 channels.

    States are rounded to 8 bits, a group at a time by their largest magnitude. Scales and offsets
    are float16, times one power of two for the whole weight that brings them into its range.

    Args:
        codes: uint8 [out_features, in_features], from 0 to 15.
        scales: [out_features, groups]; groups are of 8 inputs or a multiple.
        offsets: [out_features, groups].
        instructions: of the processor, see `library.NAMES`; None: the best it has.

    Raises:
        library.Missing: this machine cannot compute so.
    """

    def __init__(
        self, codes: Tensor, scales: Tensor, offsets: Tensor, instructions: str | None = None
    ) -> None:
        self._function = library.function("int4_product", instructions or library.instructions())
        self._channels, self._inputs = codes.shape
        groups = scales.shape[1]
        self._group = self._inputs // groups
        rows = (0, 0, 0, -self._channels % _LANES)
        fours = F.pad(codes, rows).view(torch.int32)
        fours = fours.view(-1, _LANES, groups, self._group // 8, 2).permute(0, 2, 3, 4, 1)
        pairs = fours[..., 0, :] | fours[..., 1, :] << 4  # [blocks, groups, group / 8, 16]
        self._factor = torch.tensor([_power_of_two(scales, offsets)])
        blocks = pairs.shape[0]
        numbers = [
            (F.pad(each.float() / self._factor, rows).view(blocks, _LANES, groups).transpose(1, 2))
            for each in (scales, offsets)
        ]
        halves = torch.cat(numbers, -1).half()  # [blocks, groups, 32]
        parts = halves.view(torch.int32), pairs.flatten(2)
        self._weight = torch.cat(parts, -1).contiguous()

    def kernels(self) -> Mapping[str, Kernel]:
        """Return the kernel that reads this order."""
        return {"native": self._product}

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and offsets."""
        return self._weight.nbytes

    def tensors(self) -> list[object]:
        """Return what holds codes, scales and offsets."""
        return [self._weight]

    def _product(self, states: Tensor) -> Tensor:
        states, output = _ready(states, 0, self._channels)
        self._function(
            *(states.data_ptr(), output.data_ptr()),
            *(self._weight.data_ptr(), self._factor.data_ptr()),
            *(*states.shape, self._channels, self._group),
            *(_DTYPES[states.dtype], torch.get_num_threads()),
        )
        return output


def _ready(states: Tensor, padding: int, channels: int) -> tuple[Tensor, Tensor]:
    """Return states as the library reads them, and memory for its output, of the same dtype."""
    if states.dtype not in _DTYPES:
        states = states.float()
    if padding:
        states = F.pad(states, (0, 4 - padding))
    states = states.contiguous()
    return states, states.new_empty(states.shape[0], channels)


def _power_of_two(scales: Tensor, offsets: Tensor) -> float:
    """Return 2**n such that float16 has room for both, divided by it, with bits to spare."""
    largest = max(float(scales.abs().max()), float(offsets.abs().max()), 1e-30)
    _, exponent = torch.frexp(torch.tensor(largest))
    return float(2.0 ** int(exponent)) / 2**12
