"""Making integers of floating-point weights, without any data to try them on.

Codes of 8 bits are as fine as need be: the largest weight of an output channel sets its scale.
Codes of 4 bits are chosen for the least squared error of each group: from a few starting scales,
weights are rounded and then scale and offset fitted to the codes by least squares, and the best fit
is kept. That is the search of llama.cpp's `make_qkx2_quants`, with equal importance for all
weights. Scales and offsets are rounded to what kernels keep of them before the codes are final.

It works on a block of rows at a time, so it takes a few megabytes beside its result. Where the C
library was built, that computes the same, many times as fast (`kernels/native/quantize.c`).
"""

import torch
from torch import Tensor

from distributed_llm.common.weight_forms import WeightForm
from distributed_llm.worker.model.kernels.memory import new_bytes
from distributed_llm.worker.model.kernels.native import quantizing
from distributed_llm.worker.model.quantized.affine import AffineWeight

_BLOCK = 1 << 19
"""Weights that are computed at a time: two megabytes in float32."""

_SPREADS = (1.0, 0.9)
"""Starting scales of the search, as shares of the one that reaches both ends of a group.

Smaller ones cut the ends off and are finer in the middle.
"""

_SMALLEST = 1e-30
"""The smallest scale: of a group, or a channel, whose weights are all the same."""


_Fit = tuple[Tensor, Tensor, Tensor]
"""Scales and offsets of groups, and by how much they lessen the sum of squares; all [groups, 1]."""


def quantized(values: Tensor, form: WeightForm) -> AffineWeight:
    """Return the integers of `form` that come closest to `values`.

    Args:
        values: floating point [..., out_features, in_features].
        form: INT8, or 4 bits in groups that divide in_features.

    Raises:
        ValueError: groups of this size do not divide in_features.
    """
    if form.group and values.shape[-1] % form.group:
        raise ValueError(f"{values.shape[-1]} inputs do not fall into groups of {form.group}")
    rows = values.reshape(-1, values.shape[-1])
    groups = rows.shape[1] // (form.group or rows.shape[1])
    codes = new_bytes(rows.shape, rows.device)
    scales = torch.empty(len(rows), groups, device=rows.device)
    offsets = torch.empty_like(scales)
    if rows.numel() and quantizing.can_quantize(rows, form.group):
        quantizing.quantize(rows, codes, scales, offsets, form.bits)
    else:
        _fit_in_blocks(rows, codes, scales, offsets, form)
    if not form.group:
        torch.mul(scales, -128, out=offsets)
    lead = values.shape[:-1]
    return AffineWeight(
        codes.view(values.shape),
        scales.view(*lead, groups),
        offsets.view(*lead, groups),
        form.bits,
    )


def _fit_in_blocks(
    rows: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor, form: WeightForm
) -> None:
    """Fill in codes and scales, and offsets of groups."""
    step = max(1, _BLOCK // rows.shape[1])
    for start in range(0, len(rows), step):
        block = slice(start, start + step)
        if form.group:
            _fit_groups(rows[block], codes[block], scales[block], offsets[block])
        else:
            _fit_channels(rows[block], codes[block], scales[block])


def _fit_channels(rows: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Fill in codes of 8 bits and scales, symmetric about 0."""
    rows = rows.float()
    lowest, highest = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    scale = torch.maximum(-lowest, highest).div_(127).clamp_(min=_SMALLEST)
    codes.copy_((rows / scale).round_().add_(128))
    scales.copy_(scale)


def _fit_groups(rows: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor) -> None:
    """Fill in codes of 4 bits, scales and offsets of groups."""
    weights = rows.reshape(scales.numel(), -1).float()
    scale, offset = _as_kept(*_best_fit(weights))
    codes.view(weights.shape).copy_(_rounded(weights, scale, offset))
    scales.copy_(scale.view_as(scales))
    offsets.copy_(offset.view_as(offsets))


def _best_fit(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return scales and offsets [groups, 1] for float32 weights [groups, group]."""
    total = weights.sum(1, keepdim=True)
    # torch.aminmax takes ten times as long as both of these.
    lowest, highest = weights.amin(1, keepdim=True), weights.amax(1, keepdim=True)
    middle, width = (lowest + highest) / 2, (highest - lowest) / 15
    best, *others = (
        _least_squares(weights, total, middle, (width * spread).clamp_(min=_SMALLEST))
        for spread in _SPREADS
    )
    for other in others:
        best = _better(best, other)
    return best[0], best[1]


def _better(old: _Fit, new: _Fit) -> _Fit:
    """Return for each group the fit that gains more."""
    won = new[2] > old[2]
    scale, offset, gain = (torch.where(won, *pair) for pair in zip(new, old, strict=True))
    return scale, offset, gain


def _least_squares(weights: Tensor, total: Tensor, middle: Tensor, scale: Tensor) -> _Fit:
    """Round, then fit scale and offset to the codes.

    Args:
        weights: float32 [groups, group].
        total: the sum of each group, [groups, 1]; also the shape of all that follows.
        middle: the value in the middle of the codes.
        scale: to begin with.
    """
    offset = middle - 7.5 * scale
    codes = _rounded(weights, scale, offset)
    linear = codes.sum(1, keepdim=True)
    product = torch.mul(codes, weights).sum(1, keepdim=True)
    square = codes.square_().sum(1, keepdim=True)
    count = weights.shape[1]
    spread = count * square - linear * linear
    fitted = (count * product - linear * total) / spread
    scale = torch.where(spread > 0, fitted, scale)  # one code for all: any scale fits
    offset = (total - scale * linear) / count
    return scale, offset, scale * product + offset * total


def _rounded(weights: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Return the nearest codes of 4 bits, as float32."""
    inverse = 1 / scale
    return torch.mul(weights, inverse).sub_(offset * inverse).round_().clamp_(0, 15)


def _as_kept(scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and offset as kernels keep them: bfloat16 scales and values of the middle code.

    The middle code, 8, is the one whose value is near 0, so that little is lost by rounding it.
    """
    scale = scale.bfloat16().float()
    middle = (offset + 8 * scale).bfloat16().float()
    return scale, middle - 8 * scale
