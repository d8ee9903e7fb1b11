"""RMS norms of bfloat16 states, by the C library in one pass."""

from enum import Enum

import torch
from torch import Tensor

from distributed_llm.worker.model.kernels.native import library
from distributed_llm.worker.model.kernels.native.calls import NormCall, tell

EIGHT = 8
"""Columns have to be a multiple of this."""


class NormKind(Enum):
    """What is rounded to bfloat16 when, in the order of norms.c."""

    ROUNDED_BEFORE = 0
    """weight * round(x / rms), as in Llama."""
    ROUNDED_AFTER = 1
    """round(weight * x / rms), as in OLMo 2."""
    PLUS_ONE = 2
    """round((1 + weight) * x / rms), as in Gemma."""


def can_compute(states: Tensor) -> bool:
    """Return whether the C library's functions take these states."""
    return (
        states.dtype == torch.bfloat16
        and states.device.type == "cpu"
        and states.shape[-1] % EIGHT == 0
        and library.instructions() != library.NAMES[0]
    )


def rms_norm(states: Tensor, weight: Tensor, epsilon: float, kind: NormKind) -> Tensor:
    """Return the RMS norm of each row, as transformers' modules round it.

    Args:
        states: bfloat16 [..., columns]; see `can_compute`.
        weight: bfloat16 [columns].
        epsilon: added to the mean of squares.
        kind: what is computed.

    Raises:
        ValueError: the weight has another number of columns.
    """
    library.check_width(states, len(weight))
    states = states.contiguous()
    output = torch.empty_like(states)
    columns = states.shape[-1]
    library.loaded().rms_norm(
        *(states.data_ptr(), output.data_ptr(), weight.data_ptr()),
        *(states.numel() // columns, columns),
        *(epsilon, kind.value, torch.get_num_threads()),
    )
    tell(NormCall(states, output, weight, epsilon, kind.value))
    return output
