"""Says how the weights of a checkpoint stand in its files and in memory, for people. Pure."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from distributed_llm.common.checkpoint import Checkpoint
from distributed_llm.common.tensors import DtypeName
from distributed_llm.common.weight_forms import Quantize
from distributed_llm.common.wording import list_text

_MAX_NAMED = 3
"""Formats that are named, those with the most numbers first."""


@dataclass(frozen=True)
class WeightFormats:
    """The formats of the weights of a model.

    Attributes:
        files: in the files ("GPTQ (4 bits, groups of 128)").
        memory: in memory ("int4 (groups of 128)").
        exact: whether they are the same numbers in both.
    """

    files: str
    memory: str
    exact: bool


def formats_of(checkpoint: Checkpoint, dtype: DtypeName, quantize: Quantize) -> WeightFormats:
    """Return the formats of a checkpoint's weights.

    What is outside the layers is named only if the layers have no matrices.

    Args:
        checkpoint: with names and shapes of tensors.
        dtype: of floating-point numbers in memory.
        quantize: what those of the files become.
    """
    files: Counter[str] = Counter()
    memory: Counter[str] = Counter()
    exact = True
    weights = list(checkpoint.weights.values())
    inside = [w for w in weights if checkpoint.layer_of(w.name) is not None and len(w.shape) > 1]
    for weight in inside or weights:
        form, scheme = checkpoint.form_of(weight, quantize), weight.scheme
        nbytes = sum(part.nbytes for part in weight.parts.values())
        files[scheme.label if scheme else _PLAIN.get(weight.parts[""].dtype, "")] += nbytes
        memory[str(form or dtype)] += nbytes
        if form is not None:
            own = scheme.form(weight.shape) if scheme else None
            exact &= scheme is not None and own == form and scheme.is_exact(weight.shape)
    return WeightFormats(_text(files), _text(memory), exact)


_PLAIN = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"F8_E4M3": "float8", "F8_E5M2": "float8"},
}


def _text(names: Counter[str]) -> str:
    ranked = [_with_details(name) for name, _ in names.most_common() if name]
    shown: Iterable[str] = ranked[:_MAX_NAMED]
    if not ranked:
        return "integers"
    return list_text(shown) + (" and others" if len(ranked) > _MAX_NAMED else "")


def _with_details(name: str) -> str:
    """Return the name of a format with what follows it in parentheses, so that it may be listed."""
    kind, _, details = name.partition(", ")
    return f"{kind} ({details})" if details else kind
