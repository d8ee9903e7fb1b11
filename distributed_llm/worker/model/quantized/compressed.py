"""Decodes matrices of integers of compressed-tensors."""

from collections.abc import Mapping

import torch
from torch import Tensor

from distributed_llm.common.errors import CheckpointError
from distributed_llm.common.schemes.compressed import CompressedScheme
from distributed_llm.common.stored_weights import StoredWeight
from distributed_llm.worker.model.quantized.affine import AffineWeight
from distributed_llm.worker.model.quantized.packing import affine, sorted_by_group, unpacked


def decode_compressed(
    weight: StoredWeight, scheme: CompressedScheme, parts: Mapping[str, Tensor]
) -> AffineWeight | Tensor:
    """Return the weight of these parts.

    Raises:
        CheckpointError: the tensors say something else of its shape, or of the codes' bits.
    """
    outputs, inputs = weight.shape[-2:]
    middle = 1 << scheme.bits - 1
    if "weight_packed" in parts:
        codes = unpacked(parts["weight_packed"], scheme.bits)[..., :inputs].contiguous()
    else:
        codes = (parts["weight"].to(torch.int16) + middle).to(torch.uint8)
    check_compressed(weight, scheme, parts)
    scales = parts["weight_scale"].float()
    scales = (
        scales.expand(*weight.shape[:-1], -1)
        if scales.dim() > 1
        else scales.expand(*weight.shape[:-1], 1)
    )
    zeros = _zeros(parts.get("weight_zero_point"), scheme.bits, outputs) + middle
    found = affine(codes, scales, -(zeros * scales), scheme.bits, scheme.form(weight.shape))
    group_of = parts.get("weight_g_idx")
    if group_of is None or bool((group_of < 0).any()):  # not in use
        return found
    return sorted_by_group(found, group_of, scales.shape[-1])


def _zeros(zeros: Tensor | None, bits: int, outputs: int) -> Tensor:
    """Return the values that stand for 0, [..., outputs, groups]."""
    if zeros is None:
        return torch.zeros(1)
    if zeros.dtype != torch.int32:
        return zeros.float() if zeros.dim() > 1 else zeros.float().reshape(1)
    unsigned = unpacked(zeros.transpose(-1, -2), bits)[..., :outputs].transpose(-1, -2)
    return unsigned.float() - (1 << bits - 1)


def check_compressed(
    weight: StoredWeight, scheme: CompressedScheme, parts: Mapping[str, Tensor]
) -> None:
    """Raise if parts contradict the others; those that are not there are not looked at.

    Raises:
        CheckpointError: with the tensor.
    """
    said = parts.get("weight_shape")
    if said is not None and said.tolist()[-2:] != list(weight.shape[-2:]):
        raise _wrong(weight, "weight_shape", f"the other tensors say {list(weight.shape)}")
    order, scales = parts.get("weight_g_idx"), weight.parts["weight_scale"].shape
    groups = scales[-1] if len(scales) > 1 else 1
    if order is not None and bool((order >= groups).any()) and not bool((order < 0).any()):
        raise _wrong(weight, "weight_g_idx", f"there are {groups} groups")
    middle, codes = 1 << scheme.bits - 1, parts.get("weight")
    if codes is not None and not -middle <= int(codes.min()) <= int(codes.max()) < middle:
        raise _wrong(weight, "weight", f"config.json says that codes have {scheme.bits} bits")


def _wrong(weight: StoredWeight, part: str, why: str) -> CheckpointError:
    tensor = weight.parts[part]
    return CheckpointError(
        f"{tensor.name} in {tensor.file} cannot be right: {why}. Use another copy of the model."
    )
