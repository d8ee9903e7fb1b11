"""Decodes matrices of MLX."""

from collections.abc import Mapping

from torch import Tensor

from distributed_llm.common.schemes.mlx import MlxScheme
from distributed_llm.common.stored_weights import StoredWeight
from distributed_llm.worker.model.quantized.affine import AffineWeight
from distributed_llm.worker.model.quantized.packing import affine, unpacked


def decode_mlx(
    weight: StoredWeight, scheme: MlxScheme, parts: Mapping[str, Tensor]
) -> AffineWeight:
    """Return the weight of these parts."""
    codes = unpacked(parts["weight"], scheme.bits)
    form = scheme.form(weight.shape)
    return affine(codes, parts["scales"], parts["biases"], scheme.bits, form)
