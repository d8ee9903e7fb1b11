"""How weights stand in the memory of a worker: floating-point numbers, or integers with scales.

Integers are affine: a weight is `code * scale + offset`, with a scale and an offset for each group
of consecutive inputs of an output channel. There are few forms, those that kernels compute with;
whatever else the files of a model hold becomes one of them. Pure values.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Quantize = Literal["none", "int8", "int4"]
"""What floating-point weights become while they are loaded; "none" leaves them as they are."""

QUANTIZE_LEVELS: tuple[Quantize, ...] = ("none", "int8", "int4")
"""From the most bits to the fewest."""

_SCALE_BYTES = 4
"""Bytes that each group takes beside its codes: a scale and an offset of two bytes each."""


@dataclass(frozen=True)
class WeightForm:
    """Integers with scales.

    Attributes:
        bits: of a code.
        group: consecutive inputs that share a scale and an offset; 0: all inputs of an output
            channel share a scale, and the offset is 0.
    """

    bits: Literal[4, 8]
    group: int

    def nbytes(self, shape: Sequence[int]) -> int:
        """Return the bytes of a weight [..., out_features, in_features] in this form."""
        groups = math.prod(shape[:-1]) * (-(-shape[-1] // self.group) if self.group else 1)
        return math.prod(shape) * self.bits // 8 + groups * _SCALE_BYTES

    def __str__(self) -> str:
        return f"int{self.bits}" + (f", groups of {self.group}" if self.group else "")


INT8 = WeightForm(8, 0)

INT4_GROUPS = (32, 64, 128)
"""Sizes of groups that kernels know for codes of 4 bits."""
