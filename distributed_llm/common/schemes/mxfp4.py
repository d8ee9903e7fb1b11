"""MXFP4: floating-point numbers of 4 bits in blocks of 32, as gpt-oss keeps its experts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distributed_llm.common.schemes.parts import Module, Tensors
from distributed_llm.common.stored_weights import StoredWeight
from distributed_llm.common.weight_forms import INT8, WeightForm

BLOCK = 32
"""Numbers that share a scale."""

_BLOCK_BYTES = BLOCK // 2
_BLOCKS, _SCALES = "_blocks", "_scales"


@dataclass(frozen=True)
class Mxfp4Scheme:
    """Parts "blocks" [.., outputs, inputs / 32, 16], two numbers per byte, and "scales"
    [.., outputs, inputs / 32], exponents of 2 plus 127; all uint8.
    """

    label: str = "MXFP4, groups of 32"

    def form(self, shape: tuple[int, ...]) -> WeightForm | None:
        """Return the form in memory that holds such a weight best."""
        return INT8

    def is_exact(self, shape: tuple[int, ...]) -> bool:
        """Return whether that form holds the same numbers."""
        return False


def mxfp4_weights(settings: Mapping[str, Any], tensors: Tensors) -> list[StoredWeight]:
    """Return the weights in blocks among these tensors.

    Raises:
        CheckpointError: tensors are missing or do not fit each other.
    """
    found = []
    for name, tensor in tensors.items():
        if name.endswith(_BLOCKS):
            weight = name.removesuffix(_BLOCKS)
            scales = tensors.get(weight + _SCALES)
            parts = {"blocks": tensor} | ({"scales": scales} if scales else {})
            found.append(_weight(Module(weight, "MXFP4", parts)))
    return found


def _weight(module: Module) -> StoredWeight:
    shape = module.part("blocks", ("U8",)).shape
    if len(shape) < 3 or shape[-1] != _BLOCK_BYTES:
        raise module.unfit("blocks", f"[.., outputs, blocks, {_BLOCK_BYTES}] is expected")
    module.part("scales", ("U8",))
    module.check("scales", shape[:-1])
    full = (*shape[:-2], shape[-2] * BLOCK)
    return StoredWeight(module.name, full, module.parts, Mxfp4Scheme())
