"""Products with weights, by the kernels that are the fastest on this machine."""

from distributed_llm.worker.model.kernels.chosen import (
    fastest_linear,
    only_plain,
    pack_linear_layers,
)
from distributed_llm.worker.model.kernels.opaque import OpaqueWeights, packed_nbytes
from distributed_llm.worker.model.kernels.packed import (
    PackedLinear,
    kernels_for,
    kernels_for_many_rows,
)

__all__ = [
    "OpaqueWeights",
    "PackedLinear",
    "fastest_linear",
    "kernels_for",
    "kernels_for_many_rows",
    "only_plain",
    "pack_linear_layers",
    "packed_nbytes",
]
