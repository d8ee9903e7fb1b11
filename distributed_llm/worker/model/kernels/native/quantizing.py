"""Integers made of floating-point weights by the C library, to the last bit as torch makes them."""

import torch
from torch import Tensor

from distributed_llm.worker.model.kernels.native import library

GROUPS = (32, 64, 128)
"""Sizes of groups that it knows."""

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def can_quantize(values: Tensor, group: int) -> bool:
    """Return whether the C library makes integers of these values.

    Args:
        values: of any dtype, anywhere.
        group: weights that share a scale; 0: a row of `values`.
    """
    return (
        values.dtype in _DTYPES
        and values.device.type == "cpu"
        and (not group or group in GROUPS)
        and library.instructions() != library.NAMES[0]
    )


def quantize(rows: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor, bits: int) -> None:
    """Fill in the codes of some rows, and scales and offsets; see `quantized.quantize`.

    Args:
        rows: [rows, columns], of which `can_quantize` is true.
        codes: uint8 [rows, columns].
        scales: float32 [rows, groups].
        offsets: likewise; those of 8 bits are left as they are.
        bits: of a code, 8 or 4.
    """
    rows = rows.contiguous()
    function = getattr(library.loaded(), f"quantize_int{bits}")
    function(
        *(rows.data_ptr(), _DTYPES[rows.dtype], scales.numel(), rows.numel() // scales.numel()),
        *(codes.data_ptr(), scales.data_ptr(), offsets.data_ptr(), torch.get_num_threads()),
    )
