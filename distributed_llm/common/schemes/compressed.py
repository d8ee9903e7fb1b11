"""compressed-tensors: what llm-compressor writes, integers and FP8 under several names."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from distributed_llm.common.schemes.affine import (
    FLOATS,
    affine_form,
    affine_label,
    group_of,
    is_exact,
)
from distributed_llm.common.schemes.fp8 import FP8_DTYPES, block_of, fp8_weight
from distributed_llm.common.schemes.parts import Module, NotRead, Tensors, modules
from distributed_llm.common.stored_weights import StoredWeight
from distributed_llm.common.weight_forms import WeightForm

_METHOD = "compressed-tensors"
_WORD_BITS = 32
_PACKED_BITS = (2, 4, 8)
_READ = frozenset(
    {"pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense"}
)
_ZERO, _ORDER = "weight_zero_point", "weight_g_idx"


@dataclass(frozen=True)
class CompressedScheme:
    """Part "weight_packed" int32 [.., outputs, inputs * bits / 32] with "weight_shape", or "weight"
    int8; "weight_scale" and perhaps "weight_zero_point" (packed along the outputs if the codes are
    packed) [.., outputs, groups]; perhaps "weight_g_idx" [inputs], the group of each input.

    Attributes:
        bits: of a code.
        group: inputs that share a scale; 0: all of a channel.
    """

    bits: int
    group: int
    symmetric: bool

    @property
    def label(self) -> str:
        """What people call it."""
        return affine_label(_METHOD, self.bits, self.group)

    def form(self, shape: tuple[int, ...]) -> WeightForm | None:
        """Return the form in memory that holds such a weight best."""
        return affine_form(self.bits, self.group, shape)

    def is_exact(self, shape: tuple[int, ...]) -> bool:
        """Return whether that form holds the same numbers."""
        return is_exact(self.bits, self.group, shape, symmetric=self.symmetric)


def compressed_weights(settings: Mapping[str, Any], tensors: Tensors) -> list[StoredWeight]:
    """Return the quantized weights among these tensors.

    Raises:
        NotRead: one of the formats is not read, or weights are rotated or sparse.
        CheckpointError: tensors are missing or do not fit each other.
    """
    schemes = list(_schemes(settings))
    _refuse_unread(settings, schemes)
    return list(_weights(schemes, tensors))


def _schemes(settings: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield what the groups of layers say of their weights."""
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        if isinstance(group, Mapping) and isinstance(group.get("weights"), Mapping):
            form = group.get("format") or settings.get("format") or "dense"
            yield {**group["weights"], "format": form}


def _refuse_unread(settings: Mapping[str, Any], schemes: list[Mapping[str, Any]]) -> None:
    unread = next((str(s["format"]) for s in schemes if s["format"] not in _READ), None)
    if unread:
        raise NotRead(f"compressed-tensors, in its format {unread!r}")
    transforms = settings.get("transform_config")
    if isinstance(transforms, Mapping) and transforms.get("config_groups"):
        raise NotRead("compressed-tensors, with rotated weights (transform_config)")
    sparse = settings.get("sparsity_config")
    if isinstance(sparse, Mapping) and sparse.get("format", "dense") not in ("dense", None):
        raise NotRead(f"compressed-tensors, sparse ({sparse['format']})")


def _weights(schemes: list[Mapping[str, Any]], tensors: Tensors) -> Iterator[StoredWeight]:
    names = ("weight", "weight_packed", _ZERO, _ORDER, "weight_shape")
    blocks = [block_of(s["block_structure"]) for s in schemes if s.get("block_structure")]
    for module in modules(tensors, _METHOD, "weight_scale", names):
        if "weight_packed" in module.parts:
            yield _packed(module, schemes)
        elif module.part("weight", ("I8", *FP8_DTYPES)).dtype == "I8":
            yield _plain(module, schemes)
        else:
            parts = {"weight": module.parts["weight"], "scale": module.parts["weight_scale"]}
            fp8 = Module(module.name, _METHOD, parts)
            yield fp8_weight(fp8, f"{module.name}.weight", blocks[0] if blocks else block_of(None))


def _packed(module: Module, schemes: list[Mapping[str, Any]]) -> StoredWeight:
    *outputs, words = module.part("weight_packed", ("I32",)).shape
    groups = module.part("weight_scale", FLOATS).shape[-1]
    for scheme in schemes:
        bits, size = scheme.get("num_bits"), scheme.get("group_size")
        if bits not in _PACKED_BITS:
            continue
        inputs = words * _WORD_BITS // bits
        if isinstance(size, int) and size > 0:
            fits = groups * size <= inputs < groups * size + _WORD_BITS // bits
            inputs = groups * size
        else:
            fits = groups == 1
        if fits:
            break
    else:
        said = ", ".join(f"{s.get('num_bits')} bits, {s.get('group_size')}" for s in schemes)
        raise module.unfit(
            "weight_packed", f"2, 4 or 8 bits in groups are expected, as config.json says ({said})"
        )
    module.check("weight_scale", (*outputs, groups))
    *stack, rows = outputs
    module.check(_ZERO, (*stack, -(-rows * bits // _WORD_BITS), groups), (*outputs, groups))
    module.check(_ORDER, (inputs,))
    form = CompressedScheme(
        bits, group_of(inputs, groups, size), symmetric=_ZERO not in module.parts
    )
    if _ZERO in module.parts:
        module.part(_ZERO, ("I32", "I8"))
    names = ("weight_packed", "weight_scale", _ZERO, _ORDER, "weight_shape")
    return module.weight((*outputs, inputs), form, *names)


def _plain(module: Module, schemes: list[Mapping[str, Any]]) -> StoredWeight:
    *outputs, inputs = module.parts["weight"].shape
    scale = module.part("weight_scale", FLOATS).shape
    groups = scale[-1] if len(scale) > 1 else 1
    if scale not in ((), (1,), (1, 1), (*outputs, groups)) or inputs % groups:
        raise module.unfit("weight_scale", f"[1] or {[*outputs, 'groups']} is expected")
    if _ZERO in module.parts:
        module.part(_ZERO, ("I8",))
        module.check(_ZERO, scale)
    module.check(_ORDER, (inputs,))
    widths = [s.get("num_bits") for s in schemes if s.get("type", "int") == "int"]
    bits = 4 if widths and all(width == 4 for width in widths) else 8
    form = CompressedScheme(
        bits, group_of(inputs, groups, None), symmetric=_ZERO not in module.parts
    )
    return module.weight((*outputs, inputs), form, "weight", "weight_scale", _ZERO, _ORDER)
