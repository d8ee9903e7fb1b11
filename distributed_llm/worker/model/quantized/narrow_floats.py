"""Decodes narrow floating-point numbers with scales: FP8, MXFP4."""

from collections.abc import Mapping

import torch
from torch import Tensor

from distributed_llm.common.schemes.fp8 import Fp8Scheme
from distributed_llm.worker.model.quantized.packing import unpacked

_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the codes of 4 bits stand for; those above are the negative ones."""

_FP4_BITS = 4
_EXPONENT_OF_ONE = 127


def decode_fp8(scheme: Fp8Scheme, parts: Mapping[str, Tensor]) -> Tensor:
    """Return the numbers of a weight, float32."""
    values, scale = parts["weight"].float(), parts["scale"].float()
    if scheme.block == (1, 0) and scale.dim() == 1:
        scale = scale[:, None]
    block_outputs, block_inputs = scheme.block
    if block_inputs:
        outputs, inputs = values.shape[-2:]
        scale = scale.repeat_interleave(block_outputs, -2)[..., :outputs, :]
        scale = scale.repeat_interleave(block_inputs, -1)[..., :inputs]
    return values.mul_(scale)


def decode_mxfp4(parts: Mapping[str, Tensor]) -> Tensor:
    """Return the numbers of a weight, float32 [.., outputs, inputs]."""
    table = torch.tensor([*_FP4, *(-value for value in _FP4)])
    exponents = parts["scales"].to(torch.int32) - _EXPONENT_OF_ONE
    values = table[unpacked(parts["blocks"], _FP4_BITS).int()]
    return torch.ldexp(values, exponents[..., None]).flatten(-2)
