"""Lists of operations that the C library carries out in one call, on fixed memory."""

import ctypes
from collections.abc import Sequence
from enum import IntEnum

import torch

from distributed_llm.worker.model.kernels.native import library
from distributed_llm.worker.model.kernels.native.calls import Places

DIMENSIONS = 4
"""Dimensions that elements of an operation may have."""


class Kind(IntEnum):
    """What an operation does, in the order of replay.c."""

    INPUT = 0
    COPY = 1
    ADD = 2
    MULTIPLY = 3
    LOOK_UP = 4
    NORM = 5
    INT8_PRODUCTS = 6
    INT4_PRODUCTS = 7
    ROW_PRODUCTS = 8
    ATTENTION = 9
    EXPERT_PRODUCTS = 10
    CONVOLUTION = 11
    DELTA_RULE = 12
    SELECTIVE_UPDATE = 13
    ABSORB_QUERIES = 14
    LATENT_VALUES = 15


_Strides = ctypes.c_int64 * DIMENSIONS


class Operation(ctypes.Structure):
    """An operation, as replay.c reads it. Addresses are those of memory that has to stay."""

    _fields_ = (
        ("kind", ctypes.c_int64),
        ("output", ctypes.c_void_p),
        ("first", ctypes.c_void_p),
        ("second", ctypes.c_void_p),
        ("sizes", ctypes.c_int64 * (DIMENSIONS + 1)),
        ("strides", _Strides * 3),
        ("places", ctypes.c_void_p * 4),
        ("number", ctypes.c_double),
        ("other", ctypes.c_double),
    )


class Operations:
    """Some operations, in order.

    Args:
        operations: not empty.
    """

    def __init__(self, operations: Sequence[Operation]) -> None:
        self._count = len(operations)
        self._held = (Operation * self._count)(*operations)
        self._address = ctypes.addressof(self._held)
        self._function = library.loaded().replay

    def run(self, given: int, places: Places) -> None:
        """Carry them out.

        Args:
            given: address of the addresses of what lies elsewhere in each run.
            places: of what attention reads.

        Raises:
            MemoryError: there is none for what is made on the way.
        """
        numbers, starts = places
        if self._function(
            *(self._address, self._count, given),
            *(numbers.buffer_info()[0], starts.buffer_info()[0], torch.get_num_threads()),
        ):
            raise MemoryError("no memory for a part of a step")
