"""Matrices of integers as rows of bytes, which is how transformers' conversions carry them.

What checkpoints store otherwise than models hold it, transformers stacks, joins, splits and
reorders by rows. A row of bytes has all that belongs to an output channel: its codes, then scales,
then offsets. So whatever becomes of rows of numbers becomes of rows of bytes.
"""

import torch
from torch import Tensor

from distributed_llm.common.weight_forms import INT8, WeightForm
from distributed_llm.worker.model.quantized.affine import AffineWeight

_FLOAT_BYTES = 4


def row_bytes(form: WeightForm, in_features: int) -> int:
    """Return the bytes of a row with this many numbers."""
    if form == INT8:
        return in_features + _FLOAT_BYTES
    return in_features // 2 + in_features // form.group * 2 * _FLOAT_BYTES


def to_rows(weight: AffineWeight, form: WeightForm) -> Tensor:
    """Return a weight that fits `form`, without its `input_order`, as uint8 [.., out, row_bytes].

    Nothing is rounded.
    """
    codes, scales = weight.codes, weight.scales.contiguous().view(torch.uint8)
    if form == INT8:
        return torch.cat([codes, scales], dim=-1)
    packed = codes[..., 0::2] | codes[..., 1::2] << 4
    offsets = weight.offsets.contiguous().view(torch.uint8)
    return torch.cat([packed, scales, offsets], dim=-1)


def from_rows(rows: Tensor, form: WeightForm, input_order: Tensor | None = None) -> AffineWeight:
    """Return the weight of which `to_rows` made these rows."""
    if form == INT8:
        codes = rows[..., :-_FLOAT_BYTES].contiguous()
        scales = _floats(rows[..., -_FLOAT_BYTES:])
        return AffineWeight(codes, scales, scales * -128, form.bits, input_order)
    groups = rows.shape[-1] // (form.group // 2 + 2 * _FLOAT_BYTES)
    width, scaled = groups * form.group // 2, groups * _FLOAT_BYTES
    packed, scales, offsets = rows.split_with_sizes([width, scaled, scaled], dim=-1)
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    return AffineWeight(codes, _floats(scales), _floats(offsets), form.bits, input_order)


def _floats(content: Tensor) -> Tensor:
    return content.contiguous().view(torch.float32)
