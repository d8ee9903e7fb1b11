"""What integers with scales, of any number of bits and any group, become in memory."""

from distributed_llm.common.weight_forms import INT4_GROUPS, INT8, WeightForm

FLOATS = frozenset({"F16", "BF16", "F32"})


def affine_form(bits: int, group: int, shape: tuple[int, ...]) -> WeightForm:
    """Return the form that holds codes of `bits` best.

    Args:
        bits: of a code.
        group: inputs that share a scale; 0: all of a channel.
        shape: of the weight.
    """
    fitting = [size for size in INT4_GROUPS if (group or shape[-1]) % size == 0]
    return WeightForm(4, max(fitting)) if bits <= WeightForm(4, 0).bits and fitting else INT8


def is_exact(bits: int, group: int, shape: tuple[int, ...], *, symmetric: bool) -> bool:
    """Return whether that form holds the same codes."""
    if affine_form(bits, group, shape) != INT8:
        return True
    return symmetric and bits == INT8.bits and group in (0, shape[-1])


def group_of(inputs: int, groups: int, named: object) -> int:
    """Return how many inputs share a scale; 0: all of a channel.

    Args:
        inputs: of the weight.
        groups: that they are in.
        named: size of groups in config.json, which tells one group from none.
    """
    return inputs // groups if groups > 1 or named == inputs else 0


def affine_label(method: str, bits: int, group: int) -> str:
    """Return what people call such weights: "GPTQ, 4 bits, groups of 128"."""
    per = f"groups of {group}" if group else "a scale per channel"
    return f"{method}, {bits} bits, {per}"
