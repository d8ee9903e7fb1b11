"""How weights stand in the memory of a worker: floating-point numbers, or integers with scales.

Integers are affine: a weight is `code * scale + offset`, with a scale and an offset for each group
of consecutive inputs of an output channel. There are few forms, those that kernels compute with;
whatever else the files of a model hold becomes one of them. Pure values.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from distributed_llm.common.tensors import DtypeName

Quantize = Literal["none", "int8", "int4"]
"""What floating-point weights become while they are loaded; "none" leaves them as they are."""

QUANTIZE_LEVELS: tuple[Quantize, ...] = ("none", "int8", "int4")
"""From the most bits to the fewest."""

SMALLEST = 256 * 256
"""Numbers of the smallest matrix that is worth a special order; with fewer, calls dominate."""

_SCALE_BYTES = 4
"""Bytes that each group takes beside its codes: a scale and an offset of two bytes each."""

_SCALE_BYTES_OF_SMALL: Mapping[int, int] = {8: 6, 4: 8}
"""Likewise by the bits of codes, in small matrices: scales of four and of two bytes; and scale and
offset in float32."""


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

    def nbytes(self, shape: Sequence[int], dtype: DtypeName) -> int:
        """Return the bytes of a weight [..., out_features, in_features] in this form.

        Args:
            shape: of the weight.
            dtype: that it is multiplied in.
        """
        is_plain = math.prod(shape[-2:]) < SMALLEST and (self.bits == 8 or dtype == "float32")
        scale_bytes = _SCALE_BYTES_OF_SMALL[self.bits] if is_plain else _SCALE_BYTES
        groups = math.prod(shape[:-1]) * (-(-shape[-1] // self.group) if self.group else 1)
        return math.prod(shape) * self.bits // 8 + groups * scale_bytes

    def __str__(self) -> str:
        return f"int{self.bits}" + (f", groups of {self.group}" if self.group else "")


INT8 = WeightForm(8, 0)

INT4_GROUPS = (32, 64, 128)
"""Sizes of groups that kernels know for codes of 4 bits."""
