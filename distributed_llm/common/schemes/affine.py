"""What integers with scales, of any number of bits and any group, become in memory."""

from distributed_llm.common.weight_forms import INT4_GROUPS, INT8, WeightForm

FLOATS = frozenset({"F16", "BF16", "F32"})


def affine_form(bits: int, group: int) -> WeightForm:
    """Return the form that holds codes of `bits` with a scale for each `group` inputs best."""
    fitting = [size for size in INT4_GROUPS if group % size == 0]
    return WeightForm(4, max(fitting)) if bits <= WeightForm(4, 0).bits and fitting else INT8


def is_exact(bits: int, group: int, shape: tuple[int, ...], *, symmetric: bool) -> bool:
    """Return whether that form holds the same codes."""
    if affine_form(bits, group) != INT8:
        return True
    return symmetric and bits == INT8.bits and group == shape[-1]


def affine_label(method: str, bits: int, group: int, shape: tuple[int, ...] | None = None) -> str:
    """Return what people call such weights: "GPTQ, 4 bits, groups of 128"."""
    per = f"groups of {group}" if group else "one scale per channel"
    return f"{method}, {bits} bits, {per}"
