"""A matrix of integers with scales, on its way from the files to a kernel."""

from dataclasses import dataclass

import torch
from torch import Tensor

from distributed_llm.common.weight_forms import WeightForm

_BLOCK = 1 << 20
"""Numbers that are computed at a time."""


@dataclass(frozen=True)
class AffineWeight:
    """A matrix, or a stack of matrices, of which value = code * scale + offset.

    A code per byte: this is how weights pass from importers to kernels, one layer at a time. It is
    not how they are kept.

    Attributes:
        codes: uint8 [..., out_features, in_features], from 0 to 2**bits - 1.
        scales: float32 [..., out_features, groups]; groups divides in_features.
        offsets: float32, likewise.
        bits: of a code, 1 to 8.
        input_order: int64 [in_features], or None. Column i of the matrix belongs to element
            `input_order[i]` of the input (GPTQ's "act-order", which sorts columns before it groups
            them).
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor
    bits: int
    input_order: Tensor | None = None

    @property
    def group(self) -> int:
        """Consecutive columns that share a scale."""
        return int(self.codes.shape[-1] // self.scales.shape[-1])

    def fits(self, form: WeightForm) -> bool:
        """Return whether `form` holds this weight without other codes."""
        if form.group:
            return self.bits <= form.bits and self.group == form.group
        if self.bits != form.bits or self.scales.shape[-1] != 1:
            return False
        symmetric = self.offsets == -128 * self.scales
        return bool(
            (symmetric | self.scales.isnan()).all()
        )  # of damaged weights, which are told of

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values, [..., out_features, in_features], as the input is ordered.

        Beside the result, it takes a few megabytes.
        """
        values = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
        rows = values.view(-1, values.shape[-1])
        codes = self.codes.reshape(rows.shape)
        groups = self.scales.shape[-1]
        scales, offsets = self.scales.reshape(-1, groups, 1), self.offsets.reshape(-1, groups, 1)
        step = max(1, _BLOCK // max(1, rows.shape[1]))
        for start in range(0, len(rows), step):
            block = slice(start, start + step)
            grouped = codes[block].float().view(-1, groups, self.group)
            grouped.mul_(scales[block]).add_(offsets[block])
            if self.input_order is None:
                rows[block] = grouped.flatten(1)
            else:
                rows[block, self.input_order] = grouped.flatten(1).to(dtype)
        return values
