"""bitsandbytes: 4 bits by a table (NF4, FP4) in blocks, or 8 bits with a scale per channel."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distributed_llm.common.schemes.parts import Module, Tensors, modules
from distributed_llm.common.stored_weights import StoredWeight
from distributed_llm.common.weight_forms import INT8, WeightForm

_STATE = "weight.quant_state.bitsandbytes__"
_TABLES = ("nf4", "fp4")
_NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
_ORDER = "weight_format"
_OUT_PROJECTION = re.compile(r"\.(o_proj|out_proj|down_proj|c_proj|dense|dense_4h_to_h|fc2|w2|wo)$")


@dataclass(frozen=True)
class BnbTableScheme:
    """Parts "weight" uint8 [.., 1], two numbers per byte, "weight.absmax" (scales of blocks, or
    their own codes), "weight.quant_map" (the table), `state` (JSON: shape, sizes of blocks) and, if
    the scales are quantized, "weight.nested_absmax" and "weight.nested_quant_map".

    The shape of such a weight stands in "state" alone, so that a `StoredWeight` has one by guess:
    right in the number of numbers.

    Attributes:
        table: "nf4" or "fp4".
    """

    table: str

    @property
    def state(self) -> str:
        """The name of the part that is JSON."""
        return _STATE + self.table

    @property
    def label(self) -> str:
        """What people call it."""
        return f"bitsandbytes {self.table.upper()}"

    def form(self, shape: tuple[int, ...]) -> WeightForm | None:
        """Return the form in memory that holds such a weight best."""
        return INT8

    def is_exact(self, shape: tuple[int, ...]) -> bool:
        """Return whether that form holds the same numbers."""
        return False


@dataclass(frozen=True)
class BnbInt8Scheme:
    """Parts "weight" int8 [outputs, inputs], "SCB" [outputs], scales times 127, and perhaps
    "weight_format", 0 if rows follow each other.
    """

    label: str = "bitsandbytes, 8 bits"

    def form(self, shape: tuple[int, ...]) -> WeightForm | None:
        """Return the form in memory that holds such a weight best."""
        return INT8

    def is_exact(self, shape: tuple[int, ...]) -> bool:
        """Return whether that form holds the same numbers."""
        return True


def bnb_weights(settings: Mapping[str, Any], tensors: Tensors) -> list[StoredWeight]:
    """Return the quantized weights among these tensors.

    Args:
        settings: with the model's hidden_size.
        tensors: of the model.

    Raises:
        CheckpointError: tensors are missing or do not fit each other.
    """
    table_parts = ("weight", "weight.quant_map", *_NESTED, *(_STATE + table for table in _TABLES))
    kind = "bitsandbytes"
    return [
        *(_by_table(m, settings) for m in modules(tensors, kind, "weight.absmax", table_parts)),
        *(_by_channel(m) for m in modules(tensors, kind, "SCB", ("weight", _ORDER))),
    ]


def _by_channel(module: Module) -> StoredWeight:
    outputs, inputs = module.part("weight", ("I8",), 2).shape
    module.part("SCB", ("F32",))
    module.check("SCB", (outputs,))
    if _ORDER in module.parts:
        module.part(_ORDER, ("U8",), 0)
    return module.weight((outputs, inputs), BnbInt8Scheme(), "weight", "SCB", _ORDER)


def _by_table(module: Module, settings: Mapping[str, Any]) -> StoredWeight:
    packed = module.part("weight", ("U8",))
    table = next((table for table in _TABLES if _STATE + table in module.parts), _TABLES[0])
    scheme = BnbTableScheme(table)
    module.part(scheme.state, ("U8",), 1)
    module.part("weight.quant_map", ("F32",))
    module.check("weight.quant_map", (16,))
    if module.part("weight.absmax", ("F32", "U8"), 1).dtype == "U8":
        module.part(_NESTED[0], ("F32",), 1)
        module.part(_NESTED[1], ("F32",))
        module.check(_NESTED[1], (256,))
    shape = _likely_shape(module.name, 2 * math.prod(packed.shape), settings.get("hidden_size"))
    names = ("weight", "weight.absmax", "weight.quant_map", scheme.state, *_NESTED)
    return module.weight(shape, scheme, *names)


def _likely_shape(module: str, numbers: int, hidden_size: object) -> tuple[int, int]:
    width = hidden_size if isinstance(hidden_size, int) and hidden_size > 0 else 1
    if numbers % width:
        return 1, numbers
    others = numbers // width
    return (width, others) if _OUT_PROJECTION.search(module) else (others, width)
