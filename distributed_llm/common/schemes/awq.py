"""AWQ: integers of 4 bits packed along the outputs, as AutoAWQ writes them ("gemm")."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distributed_llm.common.schemes.affine import (
    FLOATS,
    affine_form,
    affine_label,
    group_of,
    is_exact,
)
from distributed_llm.common.schemes.parts import Module, NotRead, Tensors, modules
from distributed_llm.common.stored_weights import StoredWeight
from distributed_llm.common.weight_forms import WeightForm

_BITS = 4
_CODES = 8
"""Codes in a word of 32 bits."""


@dataclass(frozen=True)
class AwqScheme:
    """Parts "qweight" [inputs, outputs / 8] and "qzeros" [groups, outputs / 8], both int32 with
    the codes of eight outputs in the order 0 2 4 6 1 3 5 7, and "scales" [groups, outputs].

    Attributes:
        group: inputs that share a scale; 0: all of a channel.
    """

    group: int

    @property
    def label(self) -> str:
        """What people call it."""
        return affine_label("AWQ", _BITS, self.group)

    def form(self, shape: tuple[int, ...]) -> WeightForm | None:
        """Return the form in memory that holds such a weight best."""
        return affine_form(_BITS, self.group, shape)

    def is_exact(self, shape: tuple[int, ...]) -> bool:
        """Return whether that form holds the same numbers."""
        return is_exact(_BITS, self.group, shape, symmetric=False)


def awq_weights(settings: Mapping[str, Any], tensors: Tensors) -> list[StoredWeight]:
    """Return the quantized weights among these tensors.

    Raises:
        NotRead: they are packed for another kernel than "gemm", or not of 4 bits.
        CheckpointError: tensors are missing or do not fit each other.
    """
    version = str(settings.get("version") or "gemm").lower()
    bits = settings.get("bits", settings.get("w_bit", _BITS))
    if version != "gemm" or bits != _BITS:
        raise NotRead(
            f"AWQ, {bits} bits in its version {version!r} (4 bits in its version 'gemm' are read)"
        )
    size = settings.get("group_size", settings.get("q_group_size"))
    found = modules(tensors, "AWQ", "qweight", ("qzeros", "scales"))
    return [_weight(module, size) for module in found]


def _weight(module: Module, size: object) -> StoredWeight:
    inputs, words = module.part("qweight", ("I32",), 2).shape
    groups = module.part("scales", FLOATS, 2).shape[0]
    module.part("qzeros", ("I32",), 2)
    module.check("scales", (groups, words * _CODES))
    module.check("qzeros", (groups, words))
    if not groups or inputs % groups:
        raise module.unfit("scales", f"a number of groups that divides {inputs} is expected")
    scheme = AwqScheme(group_of(inputs, groups, size))
    return module.weight((words * _CODES, inputs), scheme, "qweight", "qzeros", "scales")
