"""Products, orders and making of integers, attention, norms, cutoffs: in C, where built."""

from distributed_llm.worker.model.kernels.native.layouts import (
    Blocks,
    Int4Blocks,
    Int8Blocks,
    JointProduct,
)
from distributed_llm.worker.model.kernels.native.library import instructions

__all__ = ["Blocks", "Int4Blocks", "Int8Blocks", "JointProduct", "instructions"]
