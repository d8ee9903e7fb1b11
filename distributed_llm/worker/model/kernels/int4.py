"""Weights of 4 bits with scale and offset for each group of inputs, in orders that kernels read."""

import functools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from distributed_llm.worker.model.kernels.layout import Kernel, product_in_blocks

_CHANNELS = 64
"""Output channels are padded to a multiple of this, the largest block of any torch."""

_MIDDLE = 8
"""Code that torch's kernels take for zero."""

_UNPACKED_ELEMENTS = 2**19
"""Half of the numbers that are unpacked at a time: they stay in the caches."""


class Int4Rows:
    """Two codes in each byte, row by row; dequantised for each product.

    Args:
        codes: uint8 [out_features, in_features].
        scales: [out_features, groups].
        offsets: [out_features, groups].
        dtype: to keep these in.
    """

    def __init__(self, codes: Tensor, scales: Tensor, offsets: Tensor, dtype: torch.dtype) -> None:
        self._codes = codes[:, ::2] | codes[:, 1::2] << 4
        self._scales = scales.to(dtype)
        self._offsets = offsets.to(dtype)
        self._shape = (codes.shape[0], codes.shape[1])

    def kernels(self) -> Mapping[str, Kernel]:
        """Return the kernel that reads this order."""
        return {"upcast": self._product}

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and offsets."""
        return self._codes.nbytes + self._scales.nbytes + self._offsets.nbytes

    def tensors(self) -> list[object]:
        """Return codes, scales and offsets."""
        return [self._codes, self._scales, self._offsets]

    def _product(self, states: Tensor) -> Tensor:
        return product_in_blocks(states, self._shape, self._block)

    def _block(self, start: int, stop: int) -> Tensor:
        packed = self._codes[start:stop]
        codes = torch.stack((packed & 15, packed >> 4), -1).float()
        grouped = codes.view(*self._scales[start:stop].shape, -1)
        scales, offsets = self._scales[start:stop, :, None], self._offsets[start:stop, :, None]
        return grouped.mul_(scales).add_(offsets).view(stop - start, -1)


class Int4Pack:
    """Codes in the order of `_weight_int4pack_mm_for_cpu`, which is fast for few rows.

    For many rows they are unpacked, some channels at a time, for one product of floating-point
    numbers. In the order, a block of channels is a matrix [in_features, channels / 2]; a byte holds
    the codes of two channels, half a block apart. Scales and offsets have 16 bits.

    Args:
        codes: uint8 [out_features, in_features].
        scales: [out_features, groups].
        offsets: [out_features, groups].
    """

    def __init__(self, codes: Tensor, scales: Tensor, offsets: Tensor) -> None:
        self._out_features, self._in_features = codes.shape
        self._groups = scales.shape[1]
        self._group = self._in_features // self._groups
        padding = (0, 0, 0, -self._out_features % _CHANNELS)
        pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
        self._codes: Tensor = pack(F.pad(codes, padding).int(), 2)
        zeros = offsets + scales * _MIDDLE  # what the middle code stands for
        pairs = torch.stack((F.pad(scales, padding), F.pad(zeros, padding)), -1)
        self._pairs = pairs.transpose(0, 1).contiguous().to(torch.bfloat16)

    def kernels(self) -> Mapping[str, Kernel]:
        """Return the kernels that read this order."""
        kernels: dict[str, Kernel] = {"native": self._native}
        if (block := channels_of_block()) is not None:
            kernels["unpacked"] = lambda states: self._unpacked(states, block, torch.float32)
            kernels["unpacked bfloat16"] = lambda states: self._unpacked(
                states, block, torch.bfloat16
            )
        return kernels

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and offsets."""
        return self._codes.nbytes + self._pairs.nbytes

    def tensors(self) -> list[object]:
        """Return codes, and scales with offsets."""
        return [self._codes, self._pairs]

    def _native(self, states: Tensor) -> Tensor:
        output: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            states.to(torch.bfloat16).contiguous(), self._codes, self._group, self._pairs
        )
        return output[:, : self._out_features]

    def _unpacked(self, states: Tensor, block: int, dtype: torch.dtype) -> Tensor:
        states = states.to(dtype)
        blocks = self._codes.view(torch.uint8).view(-1, self._in_features, block // 2)
        step = max(1, _UNPACKED_ELEMENTS // (self._in_features * block // 2))
        output = states.new_empty(states.shape[0], len(blocks) * block)
        channels = step * block  # unpacked into the same memory: fresh memory costs time
        values = torch.empty(self._in_features * channels // 2)
        memory = torch.empty(self._in_features * channels, dtype=dtype)
        for start in range(0, len(blocks), step):
            packed = blocks[start : start + step]
            stop = start + len(packed)
            weight = self._weight(packed, slice(start * block, stop * block), values, memory)
            output[:, start * block : stop * block] = states @ weight
        return output[:, : self._out_features]

    def _weight(self, packed: Tensor, channels: slice, space: Tensor, memory: Tensor) -> Tensor:
        """Return the weight [in_features, channels] of some blocks of codes, in `memory`."""
        count, inputs, half = packed.shape
        pairs = self._pairs[:, channels].float().view(self._groups, count, 2, half, 2)
        scales = pairs[..., 0].contiguous()
        offsets = pairs[..., 1] - scales * _MIDDLE
        values = space[: packed.numel()].view(count, self._groups, self._group, half)
        weight = memory[: 2 * packed.numel()].view(inputs, count, 2, half)
        for side, codes in enumerate((packed & 15, packed >> 4)):
            values.copy_(codes.view(values.shape))
            # [groups, count, half] -> [count, groups, 1, half], as the values are
            scale = scales[:, :, side].transpose(0, 1)[:, :, None]
            offset = offsets[:, :, side].transpose(0, 1)[:, :, None]
            torch.addcmul(offset, values, scale, out=values)
            weight[:, :, side].copy_(values.view(count, inputs, half).transpose(0, 1))
        return weight.view(inputs, count * 2 * half)


@functools.cache
def channels_of_block() -> int | None:
    """Return how many channels this torch packs together on this machine; None: in another order.

    The order is not documented, and depends on the processor, so it is tried.
    """
    codes = torch.arange(_CHANNELS)[:, None] // 4 * 5 + torch.arange(_CHANNELS)[:, None] * 3
    codes = (codes + torch.arange(32) * 7) % 16
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 2).view(torch.uint8)
    for block in (64, 32):
        matrices = packed.reshape(-1, 32, block // 2)
        both = torch.stack((matrices & 15, matrices >> 4), 1)  # [blocks, 2, 32, half]
        if torch.equal(both.transpose(2, 3).reshape(_CHANNELS, 32).long(), codes):
            return block
    return None
