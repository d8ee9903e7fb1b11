"""MLX: integers of 2 to 8 bits with scales and biases, as Macs keep them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distributed_llm.common.schemes.affine import FLOATS, affine_form, affine_label, is_exact
from distributed_llm.common.schemes.parts import Module, NotRead, Tensors, modules
from distributed_llm.common.stored_weights import StoredWeight
from distributed_llm.common.weight_forms import WeightForm

_WORD_BITS = 32
_BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class MlxScheme:
    """Parts "weight", uint32 with codes one after the other from the lowest bit, and "scales" and
    "biases" [.., outputs, groups]; value = code * scale + bias.

    Attributes:
        bits: of a code.
        group: inputs that share a scale.
    """

    bits: int
    group: int

    @property
    def label(self) -> str:
        """What people call it."""
        return affine_label("MLX", self.bits, self.group)

    def form(self, shape: tuple[int, ...]) -> WeightForm | None:
        """Return the form in memory that holds such a weight best."""
        return affine_form(self.bits, self.group, shape)

    def is_exact(self, shape: tuple[int, ...]) -> bool:
        """Return whether that form holds the same numbers."""
        return is_exact(self.bits, self.group, shape, symmetric=False)


def mlx_weights(settings: Mapping[str, Any], tensors: Tensors) -> list[StoredWeight]:
    """Return the quantized weights among these tensors.

    Raises:
        NotRead: they are quantized in another mode than "affine".
        CheckpointError: tensors are missing or do not fit each other.
    """
    guessed = "quant_method" not in settings and "qweight" in _endings(tensors)
    if guessed:
        raise NotRead(
            "config.json has bits and group_size and names no quant_method, which would mean MLX; "
            "its tensors are not MLX's (add the quant_method: 'gptq' or 'awq')"
        )
    found = modules(tensors, "MLX", "scales", ("weight", "biases"))
    return [_weight(module, _settings_of(module.name, settings)) for module in found]


def _endings(tensors: Tensors) -> set[str]:
    return {name.rpartition(".")[2] for name in tensors}


def _settings_of(module: str, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of one layer, which may differ from those of the model."""
    own = settings.get(module)
    chosen = {**settings, **own} if isinstance(own, Mapping) else settings
    mode = chosen.get("mode", "affine")
    if mode != "affine":
        raise NotRead(f"MLX, in its mode {mode!r} ('affine' is read)")
    return chosen


def _weight(module: Module, settings: Mapping[str, Any]) -> StoredWeight:
    bits, group = settings.get("bits"), settings.get("group_size")
    if bits not in _BITS or not isinstance(group, int) or group < 1:
        raise NotRead(f"MLX, {bits!r} bits in groups of {group!r} (2 to 6 and 8 bits are read)")
    *outputs, groups = module.part("scales", FLOATS).shape
    inputs = groups * group
    module.part("weight", ("U32",))
    module.part("biases", FLOATS)
    if inputs * bits % _WORD_BITS:
        raise module.unfit("scales", f"groups of {group} cannot fill the words of a row")
    module.check("weight", (*outputs, inputs * bits // _WORD_BITS))
    module.check("biases", (*outputs, groups))
    return module.weight((*outputs, inputs), MlxScheme(bits, group), "weight", "scales", "biases")
