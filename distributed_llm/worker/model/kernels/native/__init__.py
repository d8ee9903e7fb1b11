"""Products of integers that torch has no fast kernels for, in C; missing where it was not built."""

from distributed_llm.worker.model.kernels.native.layouts import Int4Blocks, Int8Blocks
from distributed_llm.worker.model.kernels.native.library import instructions

__all__ = ["Int4Blocks", "Int8Blocks", "instructions"]
