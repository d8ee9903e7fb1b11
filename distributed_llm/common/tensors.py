"""Tensors on the wire: dtype and shape in the header, the numbers in a raw frame."""

import math
from collections.abc import Sequence
from typing import Annotated, Literal, TypeAlias

import msgspec
import numpy as np

DtypeName = Literal["float32", "bfloat16", "float16", "int32", "uint8"]
ITEM_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "int32": 4, "uint8": 1}

MAX_FRAME_BYTES = 256 * 1024 * 1024
"""Largest tensor on the wire, bytes."""

Frame: TypeAlias = bytes | bytearray | memoryview
"""The raw bytes of one tensor: row-major, little-endian."""

_Size = Annotated[int, msgspec.Meta(ge=1, le=MAX_FRAME_BYTES)]


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """Dtype and shape of the tensor in one raw frame.

    Raises:
        ValueError: the tensor is larger than `MAX_FRAME_BYTES`.
    """

    dtype: DtypeName
    shape: Annotated[tuple[_Size, ...], msgspec.Meta(min_length=1, max_length=4)]

    def __post_init__(self) -> None:
        if self.nbytes > MAX_FRAME_BYTES:
            raise ValueError(f"tensor {self} exceeds {MAX_FRAME_BYTES} bytes")

    @property
    def nbytes(self) -> int:
        """Size of the frame, bytes."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


def frame_of_token_ids(token_ids: Sequence[int]) -> tuple[TensorSpec, Frame]:
    """Return token ids as an int32 tensor of shape [len(token_ids)]."""
    array = np.asarray(token_ids, dtype="<i4")
    return TensorSpec("int32", (len(array),)), array.tobytes()


def frame_of_masks(masks: Sequence[bytes]) -> tuple[TensorSpec, Frame]:
    """Return masks of the same length as a uint8 tensor of shape [len(masks), bytes]."""
    return TensorSpec("uint8", (len(masks), len(masks[0]))), b"".join(masks)


def token_ids_of_frame(frame: Frame) -> list[int]:
    """Return the token ids in an int32 frame."""
    token_ids: list[int] = np.frombuffer(frame, dtype="<i4").tolist()
    return token_ids


def floats_of_frame(frame: Frame) -> list[float]:
    """Return the numbers in a float32 frame."""
    numbers: list[float] = np.frombuffer(frame, dtype="<f4").tolist()
    return numbers


def frame_of_bytes(data: bytes) -> tuple[TensorSpec, Frame]:
    """Return `data`, which is not empty, as a uint8 tensor of shape [len(data)]."""
    return TensorSpec("uint8", (len(data),)), data
