"""Decides what each weight of a model becomes in memory: integers, or floating-point numbers.

The coordinator plans by it, and the workers load by it. Pure.
"""

import math
import re

from distributed_llm.common.stored_weights import StoredWeight
from distributed_llm.common.tensors import ITEM_BYTES, DtypeName
from distributed_llm.common.weight_forms import INT4_GROUPS, INT8, Quantize, WeightForm

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_MIN_NUMBERS = 1024
"""Numbers of a matrix that is worth the computing of integers, at least."""

_GROUP = 64
"""Inputs that share a scale in codes of 4 bits: 4.5 bits per number with their scales."""

_KEPT = re.compile(
    r"(^|[._])(router|(\w+_)?layer_?norm\w*|\w*norm|ln(_\w+)?|embed\w*)(\.|$)"
    r"|(^|[._])(dt_proj|conv\w*(?!\.(in|out)_proj\.))(\.|$)"
    r"|(^|\.)(gate|\w*expert_gate|ffn_gate_inp\w*|kv_b_proj|attn_(k|v|kv)_b|weights_proj)(\.|$)"
    r"|(^|\.)block_inject_weight(\.|$)"
    r"|rotary|\bssm_(?!(in|out)\.)|_bias$|\.bias$"
)
"""Names of what is no matrix of a linear layer, decides where tokens go (routers), what they attend
to (indexers), which residual streams a layer adds to or how fast a state fades, or is multiplied by
in several ways (`kv_b_proj`: latent attention multiplies queries by a part of it, and attended
latents by the rest)."""


def form_in_memory(
    weight: StoredWeight, *, in_layers: bool, quantize: Quantize
) -> WeightForm | None:
    """Return the form that a weight has in memory; None: floating-point numbers.

    Integers are matrices of linear layers and stacks of them, one per expert. The embedding and
    the head are floating-point numbers, like all that is outside the layers.

    Args:
        weight: as its files hold it.
        in_layers: whether it belongs to a transformer layer.
        quantize: what floating-point numbers become. What no form holds as the files do becomes
            that, too, if it is smaller.
    """
    if not in_layers or not _is_matrix(weight):
        return None
    if weight.scheme is None:
        if quantize == "none" or any(part.dtype not in _FLOATS for part in weight.parts.values()):
            return None
        return INT8 if quantize == "int8" else int4_form(weight.shape)
    form = weight.scheme.form(weight.shape)
    if quantize == "int4" and form == INT8 and not weight.scheme.is_exact(weight.shape):
        return int4_form(weight.shape)
    return form


def int4_form(shape: tuple[int, ...]) -> WeightForm:
    """Return the form of 4 bits for floating-point numbers of this shape; INT8 if none fits it."""
    groups = (_GROUP, *(group for group in INT4_GROUPS if group < _GROUP))
    return next((WeightForm(4, group) for group in groups if shape[-1] % group == 0), INT8)


def bytes_in_memory(weight: StoredWeight, form: WeightForm | None, dtype: DtypeName) -> int:
    """Return the bytes of a weight in this form, of which floating-point numbers are `dtype`."""
    if form is not None:
        return form.nbytes(weight.shape, dtype)
    parts = weight.parts.values()
    if weight.scheme is None and any(not part.dtype.startswith(("F", "BF")) for part in parts):
        return sum(part.nbytes for part in parts)  # a buffer of integers stays what it is
    return math.prod(weight.shape) * ITEM_BYTES[dtype]


def _is_matrix(weight: StoredWeight) -> bool:
    is_stack = len(weight.shape) == 3 and "experts" in weight.name
    named = weight.name.endswith(".weight") or is_stack
    return (
        named
        and len(weight.shape) in (2, 3)
        and math.prod(weight.shape[-2:]) >= _MIN_NUMBERS
        and min(weight.shape[-2:]) > 1
        and not _KEPT.search(weight.name)
    )
