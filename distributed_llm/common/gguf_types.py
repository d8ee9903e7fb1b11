"""The types of numbers in GGUF files, and the forms in memory that hold them best.

Blocks of numbers with scales, all but plain floating-point ones. The layouts are llama.cpp's
(`ggml-common.h`). Pure values.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from distributed_llm.common.weight_forms import INT8, WeightForm

GGUF_METHOD = "gguf"
"""`quant_method` in the `quantization_config` of a model that comes from GGUF files."""


_INT4 = WeightForm(4, 32)
_WIDE_INT4 = WeightForm(4, 128)


@dataclass(frozen=True)
class BlockLayout:
    """A type of numbers in blocks.

    Attributes:
        numbers: in a block.
        nbytes: of a block.
        form: in memory that holds them best.
    """

    numbers: int
    nbytes: int
    form: WeightForm


GGUF_BLOCKS: Mapping[str, BlockLayout] = {
    "Q4_0": BlockLayout(32, 18, _INT4),
    "Q4_1": BlockLayout(32, 20, _INT4),
    "Q5_0": BlockLayout(32, 22, INT8),
    "Q5_1": BlockLayout(32, 24, INT8),
    "Q8_0": BlockLayout(32, 34, INT8),
    "Q2_K": BlockLayout(256, 84, INT8),
    "Q3_K": BlockLayout(256, 110, INT8),
    "Q4_K": BlockLayout(256, 144, _INT4),
    "Q5_K": BlockLayout(256, 176, INT8),
    "Q6_K": BlockLayout(256, 210, INT8),
    "IQ4_NL": BlockLayout(32, 18, INT8),
    "IQ4_XS": BlockLayout(256, 136, INT8),
    "MXFP4": BlockLayout(32, 17, INT8),
    "IQ1_S": BlockLayout(256, 50, _INT4),
    "IQ1_M": BlockLayout(256, 56, INT8),
    "IQ2_XXS": BlockLayout(256, 66, INT8),
    "IQ2_XS": BlockLayout(256, 74, INT8),
    "IQ2_S": BlockLayout(256, 82, INT8),
    "IQ3_XXS": BlockLayout(256, 98, INT8),
    "IQ3_S": BlockLayout(256, 110, _INT4),
    "TQ1_0": BlockLayout(256, 54, _WIDE_INT4),
    "TQ2_0": BlockLayout(256, 66, _WIDE_INT4),
}
"""The types that can be read, by their names in llama.cpp."""

GGUF_FLOATS = frozenset({"F32", "F16", "BF16"})
"""Types of plain numbers, which have the same names as in safetensors."""


@dataclass(frozen=True)
class GgufScheme:
    """Numbers in blocks, as a tensor of a GGUF file holds them.

    Attributes:
        kind: of the blocks, a key of `GGUF_BLOCKS`.
    """

    kind: str

    @property
    def label(self) -> str:
        """What people call it."""
        return f"GGUF {self.kind}"

    def form(self, shape: tuple[int, ...]) -> WeightForm | None:
        """Return the form in memory that holds such a weight best; None: floating-point numbers."""
        return GGUF_BLOCKS[self.kind].form if len(shape) > 1 else None

    def is_exact(self, shape: tuple[int, ...]) -> bool:
        """Return whether that form holds the same numbers, but for the rounding of scales."""
        return self.form(shape) != INT8
