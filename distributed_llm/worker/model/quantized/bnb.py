"""Decodes matrices of bitsandbytes."""

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distributed_llm.common.errors import CheckpointError
from distributed_llm.common.schemes.bnb import BnbTableScheme
from distributed_llm.common.stored_weights import StoredWeight
from distributed_llm.worker.model.quantized.affine import AffineWeight

_MOST = 127
"""The code of int8 that stands for the scale."""


def decode_bnb_int8(weight: StoredWeight, parts: Mapping[str, Tensor]) -> AffineWeight:
    """Return the weight of these parts.

    Raises:
        CheckpointError: its numbers are in the order of a kernel for some GPU.
    """
    if "weight_format" in parts:
        check_bnb_order(weight, parts["weight_format"])
    scales = parts["SCB"].float()[:, None] / _MOST
    return AffineWeight(parts["weight"].view(torch.uint8) ^ 0x80, scales, scales * -128, 8)


def check_bnb_order(weight: StoredWeight, order: Tensor) -> None:
    """Raise if numbers are in the order of a kernel for some GPU.

    Raises:
        CheckpointError: with the weight.
    """
    if int(order):
        raise CheckpointError(
            f"{weight.name} is stored in the order of a kernel for one kind of GPU (weight_format "
            f"{int(order)}), which only old versions of bitsandbytes wrote. Use "
            "another copy of the model."
        )


def bnb_table_shape(weight: StoredWeight, scheme: BnbTableScheme, state: Tensor) -> tuple[int, ...]:
    """Return the shape of a weight, which its part `scheme.state` tells.

    Raises:
        CheckpointError: it does not, or tells another number of numbers.
    """
    told = _state(weight, scheme, {scheme.state: state}).get("shape")
    shape = tuple(told) if isinstance(told, list) else ()
    whole = bool(shape) and all(type(size) is int and size > 0 for size in shape)
    packed = math.prod(weight.parts["weight"].shape)
    if not whole or -(-math.prod(shape) // 2) != packed:
        raise _contradict(weight, f"its shape is {told!r:.60}, and it has {packed} bytes")
    return shape


def decode_bnb_table(
    weight: StoredWeight, scheme: BnbTableScheme, parts: Mapping[str, Tensor]
) -> Tensor:
    """Return the numbers of a weight, float32.

    Raises:
        CheckpointError: its tensors contradict one another.
    """
    shape = bnb_table_shape(weight, scheme, parts[scheme.state])
    state = _state(weight, scheme, parts)
    try:
        block = int(state["blocksize"])
        scales = parts["weight.absmax"]
        if scales.dtype == torch.uint8:
            nested = parts["weight.nested_quant_map"].float()[scales.long()]
            nested = _scaled(nested, parts["weight.nested_absmax"], int(state["nested_blocksize"]))
            scales = nested + float(state["nested_offset"])
        packed = parts["weight"].flatten()
        codes = torch.stack([packed >> 4, packed & 0xF], dim=-1).flatten()[: math.prod(shape)]
        values = parts["weight.quant_map"].float()[codes.int()]
        return _scaled(values, scales, block).reshape(shape)
    except (KeyError, TypeError, ValueError, RuntimeError) as exc:
        raise _contradict(weight, "sizes of blocks and scales do not fit its numbers") from exc


def _state(
    weight: StoredWeight, scheme: BnbTableScheme, parts: Mapping[str, Tensor]
) -> dict[str, Any]:
    name = scheme.state
    try:
        state = json.loads(bytes(parts[name].tolist()))
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(
            f"{weight.parts[name].name} in {weight.parts[name].file} is not JSON. Use another copy "
            "of the model."
        ) from exc
    return state if isinstance(state, dict) else {}


def _contradict(weight: StoredWeight, how: str) -> CheckpointError:
    files = ", ".join(sorted({part.file for part in weight.parts.values()}))
    return CheckpointError(
        f"The tensors of {weight.name} in {files} contradict one another: {how}. Use another copy "
        "of the model."
    )


def _scaled(values: Tensor, scales: Tensor, block: int) -> Tensor:
    """Return numbers, of which `block` at a time share a scale."""
    if block < 1 or scales.numel() != -(-values.numel() // block):
        raise ValueError(f"{scales.numel()} scales for {values.numel()} numbers, {block} each")
    return values * scales.float().repeat_interleave(block)[: values.numel()]
