"""Products of integers, attention of single tokens and norms, in C; missing where not built."""

from distributed_llm.worker.model.kernels.native.layouts import Int4Blocks, Int8Blocks
from distributed_llm.worker.model.kernels.native.library import instructions

__all__ = ["Int4Blocks", "Int8Blocks", "instructions"]
