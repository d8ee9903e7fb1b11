"""Weights of integers in the orders that GPUs' kernels read, behind the same seam as the CPU's.

Scales of 4 bits stand beside the value of the middle code, as torch's kernels for GPUs want them:
pairs [groups, out_features, 2], of which weight = (code - 8) * pair[0] + pair[1].
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from distributed_llm.worker.model.kernels.choice import Choice
from distributed_llm.worker.model.kernels.gpu_choice import Gpu, channel_multiple, inner_tiles
from distributed_llm.worker.model.kernels.layout import Kernel, Layout

_MIDDLE = 8
"""Code of 4 bits that kernels take for zero."""

BLOCK_ELEMENTS = 1 << 23
"""Numbers of a weight that become floating-point numbers at a time: 16 MiB in 16 bits."""


class Int8GpuRows:
    """Codes of 8 bits, row by row.

    `_weight_int8pack_mm(states [rows, in], codes int8 [out, in], scales [out])` multiplies by them
    as they are; it takes scales in the dtype of the states.

    Args:
        codes: int8 [out_features, in_features].
        scales: float32 [out_features].
        dtype: of the states.
    """

    def __init__(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> None:
        self._codes = codes
        self._scales = scales[:, None]
        self._own_scales = scales.to(dtype)

    def kernels(self) -> Mapping[str, Kernel]:
        """Return the kernels that read this order."""
        return {"int8pack": self._packed, "blocks": self._blocks}

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self._codes.nbytes + self._scales.nbytes + self._own_scales.nbytes

    def tensors(self) -> list[object]:
        """Return codes and scales."""
        return [self._codes, self._scales, self._own_scales]

    def _packed(self, states: Tensor) -> Tensor:
        states = states.to(self._own_scales.dtype).contiguous()
        output: Tensor = torch.ops.aten._weight_int8pack_mm(states, self._codes, self._own_scales)
        return output

    def _blocks(self, states: Tensor) -> Tensor:
        states = states.to(self._own_scales.dtype)
        return _product_by_blocks(states, self._codes.shape[0], self._fill)

    def _fill(self, start: int, stop: int, block: Tensor) -> None:
        torch.mul(self._codes[start:stop], self._scales[start:stop], out=block)


class Int4GpuRows:
    """Codes of 4 bits, two in each byte, row by row; the earlier column is in the lower half.

    That is the order of `_weight_int4pack_mm` on Apple's GPUs, by what `weight_to_int4pack` in
    `Quantized.metal` writes; it takes it as int32 [out / 8, in / 32, 32, 1], and pairs in the dtype
    of the states.

    Args:
        codes: uint8 [out_features, in_features].
        scales: [out_features, groups].
        offsets: [out_features, groups].
        dtype: of the states.
        multiple: what out_features are padded to.
    """

    def __init__(
        self, codes: Tensor, scales: Tensor, offsets: Tensor, dtype: torch.dtype, multiple: int
    ) -> None:
        self._out_features, self._in_features = codes.shape
        codes = _padded(codes, multiple)
        self._codes = codes[:, ::2] | codes[:, 1::2] << 4
        self._pairs = _pairs(scales, offsets, dtype, multiple)

    def kernels(self) -> Mapping[str, Kernel]:
        """Return the kernels that read this order."""
        return {"int4pack": self._packed, "blocks": self._blocks}

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and offsets."""
        return self._codes.nbytes + self._pairs.nbytes

    def tensors(self) -> list[object]:
        """Return codes, and scales with offsets."""
        return [self._codes, self._pairs]

    @property
    def _group(self) -> int:
        return self._in_features // self._pairs.shape[0]

    def _packed(self, states: Tensor) -> Tensor:
        rows, columns = self._codes.shape
        codes = self._codes.view(torch.int32).view(rows // 8, columns // 16, 32, 1)
        return _int4_product(states, codes, self._group, self._pairs)[:, : self._out_features]

    def _blocks(self, states: Tensor) -> Tensor:
        states = states.to(self._pairs.dtype)
        return _product_by_blocks(states, self._out_features, self._fill)

    def _fill(self, start: int, stop: int, block: Tensor) -> None:
        packed = self._codes[start:stop]
        values = block.view(stop - start, -1, self._group)
        values.copy_(torch.stack((packed & 15, packed >> 4), -1).view(values.shape))
        scales, middles = self._pairs[:, start:stop].transpose(0, 1)[..., None, :].unbind(-1)
        torch.addcmul(middles, values.sub_(_MIDDLE), scales, out=values)


class Int4Tiles:
    """Codes of 4 bits in the order that `_convert_weight_to_int4pack` makes.

    The operation takes uint8 [out, in / 2], two codes in each byte: the earlier column in the upper
    half on CUDA and ROCm, in the lower half on XPU (as torchao calls it). It returns int32, in
    tiles of matrix cores: [out / 8, in / (16 * inner), 32, inner / 2], on XPU [out, in / 8].

    `_weight_int4pack_mm(states [rows, in], codes, group, pairs)` multiplies by it. On CUDA and ROCm
    states, pairs and result are bfloat16; on XPU pairs are in the dtype of the states.

    Args:
        codes: uint8 [out_features, in_features].
        scales: [out_features, groups].
        offsets: [out_features, groups].
        dtype: of the states.
        gpu: that computes.
    """

    def __init__(
        self, codes: Tensor, scales: Tensor, offsets: Tensor, dtype: torch.dtype, gpu: Gpu
    ) -> None:
        self._out_features, inputs = codes.shape
        self._group = inputs // scales.shape[1]
        multiple = channel_multiple(gpu)
        codes = _padded(codes, multiple)
        first, second = codes[:, ::2], codes[:, 1::2]
        upper, lower = (second, first) if gpu.kind == "xpu" else (first, second)
        pack = torch.ops.aten._convert_weight_to_int4pack
        self._codes: Tensor = pack((upper << 4 | lower).contiguous(), inner_tiles(inputs))
        kept = dtype if gpu.kind == "xpu" else torch.bfloat16
        self._pairs = _pairs(scales, offsets, kept, multiple)

    def kernels(self) -> Mapping[str, Kernel]:
        """Return the kernel that reads this order."""
        return {"int4pack": self._packed}

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and offsets."""
        return self._codes.nbytes + self._pairs.nbytes

    def tensors(self) -> list[object]:
        """Return codes, and scales with offsets."""
        return [self._codes, self._pairs]

    def _packed(self, states: Tensor) -> Tensor:
        product = _int4_product(states, self._codes, self._group, self._pairs)
        return product[:, : self._out_features]


def int8_layout(choice: Choice, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Layout:
    """Return a weight of 8 bits in the order of a choice; see `Int8GpuRows`."""
    assert choice.order == "rows"
    return Int8GpuRows(codes, scales, dtype)


def int4_layout(
    choice: Choice, gpu: Gpu, codes: Tensor, scales: Tensor, offsets: Tensor, dtype: torch.dtype
) -> Layout:
    """Return a weight of 4 bits in the order of a choice; see `Int4Tiles`."""
    if choice.order == "tiles":
        return Int4Tiles(codes, scales, offsets, dtype, gpu)
    return Int4GpuRows(codes, scales, offsets, dtype, channel_multiple(gpu))


def _int4_product(states: Tensor, codes: Tensor, group: int, pairs: Tensor) -> Tensor:
    states = states.to(pairs.dtype).contiguous()
    output: Tensor = torch.ops.aten._weight_int4pack_mm(states, codes, group, pairs)
    return output


def _padded(rows: Tensor, multiple: int) -> Tensor:
    """Return rows with zeros below, so that their number is a multiple."""
    return F.pad(rows, (0, 0, 0, -rows.shape[0] % multiple))


def _pairs(scales: Tensor, offsets: Tensor, dtype: torch.dtype, multiple: int) -> Tensor:
    """Return scales and values of the middle code, [groups, out_features, 2]."""
    middles = offsets + scales * _MIDDLE
    pairs = torch.stack((_padded(scales, multiple), _padded(middles, multiple)), -1)
    return pairs.transpose(0, 1).contiguous().to(dtype)


def _product_by_blocks(
    states: Tensor, channels: int, fill: Callable[[int, int, Tensor], None]
) -> Tensor:
    """Return states @ weight.T, with little of the weight as floating-point numbers at a time.

    Args:
        states: [rows, in_features].
        channels: out_features of the weight.
        fill: writes channels [start, stop) into a tensor [stop - start, in_features].
    """
    inputs = states.shape[1]
    step = min(channels, max(1, BLOCK_ELEMENTS // inputs))
    block = states.new_empty(step, inputs)
    output = states.new_empty(states.shape[0], channels)
    for start in range(0, channels, step):
        stop = min(start + step, channels)
        fill(start, stop, block[: stop - start])
        output[:, start:stop] = F.linear(states, block[: stop - start])
    return output
