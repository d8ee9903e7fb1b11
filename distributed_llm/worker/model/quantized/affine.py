"""A matrix of integers with scales, on its way from the files to a kernel."""

from dataclasses import dataclass

import torch
from torch import Tensor

from distributed_llm.common.weight_forms import WeightForm


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
        symmetric = bool((self.offsets == -128 * self.scales).all())
        return self.bits == form.bits and self.scales.shape[-1] == 1 and symmetric

    def dequantized(self) -> Tensor:
        """Return the values, float32 [..., out_features, in_features], as the input is ordered."""
        values = self.codes.float()
        grouped = values.view(*self.scales.shape, self.group)
        grouped.mul_(self.scales[..., None]).add_(self.offsets[..., None])
        if self.input_order is None:
            return values
        ordered = torch.empty_like(values)
        ordered[..., self.input_order] = values
        return ordered
