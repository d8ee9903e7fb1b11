"""Products with weights, by the kernels that are the fastest on this machine."""

from distributed_llm.worker.model.kernels.opaque import OpaqueWeights, packed_nbytes
from distributed_llm.worker.model.kernels.packed import (
    PackedLinear,
    is_packable,
    kernels_for,
    pack_linear_layers,
)

__all__ = [
    "OpaqueWeights",
    "PackedLinear",
    "is_packable",
    "kernels_for",
    "pack_linear_layers",
    "packed_nbytes",
]
