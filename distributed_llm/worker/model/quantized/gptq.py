"""Decodes matrices of GPTQ and AWQ, which pack codes along different dimensions."""

from collections.abc import Mapping

import torch
from torch import Tensor

from distributed_llm.common.errors import CheckpointError
from distributed_llm.common.schemes.awq import AwqScheme
from distributed_llm.common.schemes.gptq import GptqScheme
from distributed_llm.common.stored_weights import StoredWeight
from distributed_llm.worker.model.quantized.affine import AffineWeight
from distributed_llm.worker.model.quantized.packing import affine, sorted_by_group, unpacked

_AWQ_BITS = 4
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where the codes of eight outputs stand in a word."""


def decode_gptq(
    weight: StoredWeight, scheme: GptqScheme, parts: Mapping[str, Tensor]
) -> AffineWeight | Tensor:
    """Return the weight of these parts.

    Raises:
        CheckpointError: an input is in a group that there is not.
    """
    codes = unpacked(parts["qweight"].t(), scheme.bits)
    zeros = unpacked(parts["qzeros"], scheme.bits).t().float() + scheme.zeros_less_one
    scales = parts["scales"].t().float()
    form = scheme.form(weight.shape)
    found = affine(codes, scales, -(zeros * scales), scheme.bits, form)
    if "g_idx" not in parts:
        return found
    check_gptq(weight, parts["g_idx"])
    return sorted_by_group(found, parts["g_idx"], scales.shape[-1])


def check_gptq(weight: StoredWeight, group_of: Tensor) -> None:
    """Raise if an input is in a group that there is not.

    Raises:
        CheckpointError: with the tensor.
    """
    part, groups = weight.parts["g_idx"], weight.parts["scales"].shape[0]
    if bool(((group_of < 0) | (group_of >= groups)).any()):
        raise CheckpointError(
            f"{part.name} in {part.file} names groups from {int(group_of.min())} to "
            f"{int(group_of.max())}, and there are {groups}. Use another copy of the model."
        )


def decode_awq(
    weight: StoredWeight, scheme: AwqScheme, parts: Mapping[str, Tensor]
) -> AffineWeight:
    """Return the weight of these parts."""
    codes, zeros = (_awq_codes(parts[name]).t() for name in ("qweight", "qzeros"))
    scales = parts["scales"].t().float()
    form = scheme.form(weight.shape)
    return affine(codes.contiguous(), scales, -(zeros * scales), _AWQ_BITS, form)


def _awq_codes(words: Tensor) -> Tensor:
    """Return the codes in words [rows, outputs / 8], uint8 [rows, outputs]."""
    codes = unpacked(words, _AWQ_BITS).view(words.shape[0], -1, len(_AWQ_PLACES))
    return codes[..., torch.tensor(_AWQ_PLACES)].flatten(1)
