"""Cuts the probabilities of rows at top-p and min-p, by the C library and without sorting."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from distributed_llm.worker.model.kernels.native import library


class Cut(ctypes.Structure):
    """What a row is cut by, as in `Sampling`; nuclei.c reads it."""

    _fields_ = (("top_p", ctypes.c_double), ("min_p", ctypes.c_float))


def can_cut() -> bool:
    """Return whether the C library can do so on this machine."""
    return library.instructions() != library.NAMES[0]


def cut_probabilities(probabilities: Tensor, cuts: Sequence[Cut], group: int) -> Tensor:
    """Make zeros of what is cut off; see `can_cut`.

    Args:
        probabilities: float32 [rows, columns], each row with a sum of 1; changed.
        cuts: by row.
        group: columns whose sum is returned.

    Returns:
        The sum of each so many columns afterwards, float64 [rows, groups]; the last group may be
        smaller.
    """
    rows, columns = probabilities.shape
    sums = torch.empty(rows, -(-columns // group), dtype=torch.float64)
    library.loaded().cut_probabilities(
        *(probabilities.data_ptr(), sums.data_ptr(), (Cut * rows)(*cuts)),
        *(rows, columns, group, torch.get_num_threads()),
    )
    return sums
