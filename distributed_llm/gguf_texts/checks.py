"""Checks what a GGUF file says of its model, before a configuration is made of it."""

import math
from collections.abc import Mapping
from typing import Any

from distributed_llm.common.errors import CheckpointError
from distributed_llm.gguf_texts.header import Header

_NEEDED = ("embedding_length", "block_count", "attention.head_count")
_WITHOUT_ATTENTION = frozenset({"mamba", "mamba2"})
"""Architectures that say 0 where others say how many heads they have."""

_SIZES = (
    *("context_length", "feed_forward_length", "attention.head_count_kv", "expert_count"),
    *("expert_used_count", "expert_feed_forward_length", "expert_shared_feed_forward_length"),
    *("attention.key_length", "attention.value_length", "rope.dimension_count"),
    *("attention.sliding_window", "rope.scaling.original_context_length"),
)
_NUMBERS: Mapping[str, tuple[float, float]] = {
    "attention.layer_norm_rms_epsilon": (0.0, 0.1),
    "attention.layer_norm_epsilon": (0.0, 0.1),
    "rope.freq_base": (1.0, math.inf),
    "rope.scaling.factor": (0.0, math.inf),
    "attn_logit_softcapping": (0.0, math.inf),
    "final_logit_softcapping": (0.0, math.inf),
}
"""Fields with the least and the largest number that they may be; 0 may stand for none."""

_MAX_SIZE = 2**31 - 1
_MAX_LAYERS = 4096
_EMBEDDING = "token_embd.weight"
_SHOWN_CHARS = 60


def check_metadata(header: Header) -> None:
    """Raise if a file does not say how large its model is, or says what cannot be.

    Raises:
        CheckpointError: with the field; without the file's name.
    """
    if not isinstance(header.metadata.get("general.architecture"), str):
        raise _wrong("general.architecture", header.metadata.get("general.architecture"))
    name = header.architecture
    for field in _NEEDED:
        value = header.get(field)
        if field == "attention.head_count" and name in _WITHOUT_ATTENTION:
            continue
        if not _is_size(value) or (field == "block_count" and value > _MAX_LAYERS):
            raise _wrong(f"{name}.{field}", value)
    for field in _SIZES:
        value = header.get(field)
        values = value if isinstance(value, list) and value else [value]
        if value is not None and not all(v == 0 or _is_size(v) for v in values):
            raise _wrong(f"{name}.{field}", value)
    for field, (least, most) in _NUMBERS.items():
        value = header.get(field)
        if value is not None and not (_is_number(value) and (value == 0 or least <= value <= most)):
            raise _wrong(f"{name}.{field}", value)
    heads, kv_heads = header.get("attention.head_count"), header.get("attention.head_count_kv")
    if isinstance(kv_heads, int) and kv_heads and heads % kv_heads:
        raise _wrong(f"{name}.attention.head_count_kv", kv_heads)
    if _EMBEDDING not in header.tensors:
        raise CheckpointError(
            f"has no tensor {_EMBEDDING}: it holds no language model, or only a part of one. Use "
            "the file of the whole model."
        )


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value <= _MAX_SIZE


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def _wrong(field: str, value: Any) -> CheckpointError:
    said = "is not there" if value is None else f"is {repr(value)[:_SHOWN_CHARS]}"
    return CheckpointError(
        f"is damaged, or was not made by llama.cpp's converter: {field} {said}, which no model "
        "has. Download it again, or use another file of the model."
    )
