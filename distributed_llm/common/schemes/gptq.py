"""GPTQ: integers packed along the inputs, as AutoGPTQ and its successors write them."""

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

_WORD_BITS = 32
_BITS = (2, 4, 8)


@dataclass(frozen=True)
class GptqScheme:
    """Parts "qweight" [inputs * bits / 32, outputs], "qzeros" [groups, outputs * bits / 32], both
    int32, "scales" [groups, outputs], and perhaps "g_idx" [inputs],
    the group of each input ("act-order").

    Attributes:
        bits: of a code.
        group: inputs that share a scale; 0: all of a channel.
        zeros_less_one: zero points are stored less one (version 1 of the format).
        symmetric: zero points are in the middle.
    """

    bits: int
    group: int
    zeros_less_one: bool
    symmetric: bool

    @property
    def label(self) -> str:
        """What people call it."""
        return affine_label("GPTQ", self.bits, self.group)

    def form(self, shape: tuple[int, ...]) -> WeightForm | None:
        """Return the form in memory that holds such a weight best."""
        return affine_form(self.bits, self.group, shape)

    def is_exact(self, shape: tuple[int, ...]) -> bool:
        """Return whether that form holds the same numbers."""
        return is_exact(self.bits, self.group, shape, symmetric=self.symmetric)


def gptq_weights(settings: Mapping[str, Any], tensors: Tensors) -> list[StoredWeight]:
    """Return the quantized weights among these tensors.

    Bits and groups are told by the tensors' shapes, as they may differ between layers.

    Raises:
        NotRead: codes of 3 bits, or an unknown version.
        CheckpointError: tensors are missing or do not fit each other.
    """
    version = settings.get("checkpoint_format") or "gptq"
    if version not in ("gptq", "gptq_v2"):
        raise NotRead(f"GPTQ, in its checkpoint_format {version!r} ('gptq' and 'gptq_v2' are read)")
    found = modules(tensors, "GPTQ", "qweight", ("qzeros", "scales", "g_idx"))
    return [_weight(module, settings, less_one=version == "gptq") for module in found]


def _weight(module: Module, settings: Mapping[str, Any], *, less_one: bool) -> StoredWeight:
    words, outputs = module.part("qweight", ("I32",), 2).shape
    groups, scaled = module.part("scales", FLOATS, 2).shape
    zero_words = module.part("qzeros", ("I32",), 2).shape[1]
    if scaled != outputs or not outputs or not groups:
        raise module.unfit("scales", f"[groups, {outputs}] is expected")
    bits, rest = divmod(zero_words * _WORD_BITS, outputs)
    if rest or bits not in _BITS:
        if settings.get("bits") not in _BITS:
            raise NotRead(f"GPTQ, {settings.get('bits')!r} bits (2, 4 and 8 are read)")
        raise module.unfit("qzeros", f"2, 4 or 8 bits for each of {outputs} outputs are expected")
    module.check("qzeros", (groups, zero_words))
    inputs = words * _WORD_BITS // bits
    sorted_columns = settings.get("desc_act") is True and groups > 1
    if "g_idx" in module.parts or sorted_columns:  # without it, nobody knows how they were sorted
        module.part("g_idx", ("I32",))
        module.check("g_idx", (inputs,))
    if inputs % groups:
        raise module.unfit("scales", f"a number of groups that divides {inputs} is expected")
    scheme = GptqScheme(
        bits,
        group_of(inputs, groups, settings.get("group_size")),
        less_one,
        settings.get("sym") is True,
    )
    return module.weight((outputs, inputs), scheme, "qweight", "qzeros", "scales", "g_idx")
