"""How keys and values stand in the KV cache: as they are computed, or in 8 bits."""

from typing import Literal

KVDtype = Literal["auto", "int8", "fp8"]
"""auto: in the dtype of the computation."""

SCALE_BYTES = 2
"""Of the scale that a position's keys of one head, or its values, have in 8 bits."""


def kv_row_bytes(dim: int, item_bytes: int, kv_dtype: KVDtype) -> int:
    """Return the bytes that one position's keys of one head, or its values, take.

    Args:
        dim: how many numbers they are.
        item_bytes: of one of them as it is computed.
        kv_dtype: how they are kept.
    """
    if kv_dtype == "auto":
        return dim * item_bytes
    return dim + dim % 2 + SCALE_BYTES  # scales lie at even addresses
