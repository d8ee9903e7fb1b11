"""A linear layer whose weight is integers with scales."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distributed_llm.common.weight_forms import INT4_GROUPS, INT8, WeightForm
from distributed_llm.worker.model.kernels.opaque import OpaqueWeights
from distributed_llm.worker.model.quantized.affine import AffineWeight


class QuantLinear(OpaqueWeights):
    """A linear layer with a weight of 8 bits per channel, or of 4 bits in groups.

    Attributes:
        in_features: of the weight.
        out_features: of the weight.
        bias: [out_features], or None.
    """

    def __init__(self, weight: AffineWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.codes.shape
        self.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)
        self._weight = weight
        self._dtype = dtype

    @classmethod
    def of(cls, weight: AffineWeight, bias: Tensor | None, dtype: torch.dtype) -> "QuantLinear":
        """Return the layer that multiplies by `weight`.

        Args:
            weight: a matrix that `INT8` or a form of 4 bits fits.
            bias: [out_features], or None.
            dtype: of input and output.

        Raises:
            ValueError: it fits no form.
        """
        if not any(map(weight.fits, (INT8, *(WeightForm(4, group) for group in INT4_GROUPS)))):
            raise ValueError(f"no kernel has {weight.bits} bits in groups of {weight.group}")
        return cls(weight, bias, dtype)

    @property
    def weight_bytes(self) -> int:
        """Bytes of memory that codes, scales and offsets take."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> list[Tensor]:
        """Return codes, scales and offsets."""
        weight = self._weight
        order = [] if weight.input_order is None else [weight.input_order]
        return [weight.codes, weight.scales, weight.offsets, *order]

    def forward(self, states: Tensor) -> Tensor:
        """Return [..., out_features] for states [..., in_features]."""
        return F.linear(states, self._weight.dequantized().to(self._dtype), self.bias)
