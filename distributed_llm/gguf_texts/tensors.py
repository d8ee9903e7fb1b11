"""Reads which tensors a GGUF file holds, and refuses what cannot be right before it is used.

A file can claim anything: any number of fields, tensors that begin after its end, or overlap.
Nothing is allocated by what it claims.
"""

import math
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType
from gguf.gguf_reader import ReaderField

from distributed_llm.common.errors import CheckpointError, UnsupportedModel
from distributed_llm.common.gguf_types import GGUF_BLOCKS, GGUF_FLOATS
from distributed_llm.common.model_files import TensorInfo, how_to_replace

_VERSIONS = (2, 3)
_HEADER = struct.Struct("<4sIQQ")
"""Magic bytes, version, number of tensors, number of fields."""

_SMALLEST_TENSOR_BYTES = 24
_SMALLEST_FIELD_BYTES = 13
"""What the header takes at least for each of them."""

_MAX_DIMENSIONS = 4
_OTHER_BYTE_ORDER = 0xFFFF
_FLOAT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}

_OTHER_FILE = (
    f"Use another file of the model; those of these types are read: {', '.join(GGUF_BLOCKS)}, "
    "F16, BF16, F32."
)


def read_tensors(file: Path) -> dict[str, TensorInfo]:
    """Return the tensors that a GGUF file holds, by their names.

    Raises:
        CheckpointError: it is not whole, or contradicts itself; without the file's name.
        UnsupportedModel: it is of a version, or has numbers of a type, that is not read.
    """
    size = _checked_size(file)
    try:
        reader = _Reader(file)
    except CheckpointError:
        raise
    except Exception as exc:  # of many types, for what is not as it should be
        raise broken(file, "what it says of itself does not come to an end in it") from exc
    tensors: dict[str, TensorInfo] = {}
    for field in reader.entries:
        tensor = _tensor(file, reader.data_offset, field)
        if tensor.name in tensors:
            raise broken(file, f"it has two tensors {tensor.name}")
        tensors[tensor.name] = tensor
    start, alignment = int(reader.data_offset), int(reader.alignment)
    _check_places(file, size, start, alignment, tensors.values())
    return tensors


def broken(file: Path, why: str) -> CheckpointError:
    """Return the error for a file that is damaged, without the file's name."""
    return CheckpointError(
        f"is not a whole GGUF file: {why}. It was not copied to its end, or is damaged. "
        f"{how_to_replace(file)}"
    )


class _Reader(GGUFReader):
    """Reads no numbers, and does not look at the elements of arrays: a vocabulary has 100,000.

    Attributes:
        entries: what the header says of each tensor.
    """

    entries: Sequence[ReaderField] = ()

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, Any, Any, Any]:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        content: Any = self.data
        kind, count = struct.unpack_from("<IQ", content, orig_offs)
        size = struct.calcsize("<IQ")
        if kind == GGUFValueType.STRING:
            for _ in range(count):
                size += 8 + struct.unpack_from("<Q", content, orig_offs + size)[0]
        else:
            size += count * np.dtype(self.gguf_scalar_to_np[GGUFValueType(kind)]).itemsize
        if orig_offs + size > len(content):
            raise ValueError("an array is longer than the file")
        return size, [], [], [GGUFValueType.ARRAY]

    def _build_tensors(self, start_offs: int, fields: list[ReaderField]) -> None:
        self.entries = fields


def _checked_size(file: Path) -> int:
    """Return the size of a file that begins as one that can be read.

    Raises:
        CheckpointError: it does not.
    """
    size = file.stat().st_size
    with open(file, "rb") as opened:
        beginning = opened.read(_HEADER.size)
    if len(beginning) < _HEADER.size:
        raise broken(file, f"it has {size} bytes")
    _, version, tensors, fields = _HEADER.unpack(beginning)
    if version & _OTHER_BYTE_ORDER == 0:
        raise UnsupportedModel(f"is for machines of the other byte order. {_OTHER_FILE}")
    if version not in _VERSIONS:
        why = (
            "which llama.cpp itself has given up"
            if version < min(_VERSIONS)
            else "which is newer than this program, or the file is damaged"
        )
        raise UnsupportedModel(
            f"is of version {version} of GGUF, {why}; versions 2 and 3 are read. Use another file "
            "of the model."
        )
    if tensors * _SMALLEST_TENSOR_BYTES + fields * _SMALLEST_FIELD_BYTES > size:
        raise broken(
            file, f"it speaks of {tensors} tensors and {fields} fields, and has {size} bytes"
        )
    if not tensors:
        raise CheckpointError(
            "holds no tensors: it is a vocabulary without a model. Use the file of the model."
        )
    return size


def _tensor(file: Path, data_offset: int, field: ReaderField) -> TensorInfo:
    _, name_bytes, _, dims, raw_kind, offset = field.parts
    name, number = bytes(name_bytes).decode(errors="replace"), int(raw_kind[0])
    try:
        kind = GGMLQuantizationType(number).name
    except ValueError:
        raise UnsupportedModel(
            f"holds numbers of a type that is not known (number {number}, {name}): it is newer "
            f"than this program, or damaged. {_OTHER_FILE}"
        ) from None
    if kind not in GGUF_FLOATS and kind not in GGUF_BLOCKS:
        raise UnsupportedModel(
            f"holds numbers of type {kind} ({name}), which are not read. {_OTHER_FILE}"
        )
    shape = tuple(int(size) for size in reversed(dims))
    if not 1 <= len(shape) <= _MAX_DIMENSIONS or min(shape) < 1:
        raise broken(file, f"{name} cannot have the shape {list(shape)}")
    if kind in GGUF_FLOATS:
        nbytes = math.prod(shape) * _FLOAT_BYTES[kind]
    else:
        layout = GGUF_BLOCKS[kind]
        if shape[-1] % layout.numbers:
            raise broken(
                file,
                f"{name} cannot have the shape {list(shape)}: {kind} comes in blocks of "
                f"{layout.numbers} numbers",
            )
        nbytes = math.prod(shape) // layout.numbers * layout.nbytes
    return TensorInfo(name, file.name, kind, shape, data_offset + int(offset[0]), nbytes)


def _check_places(
    file: Path, size: int, start: int, alignment: int, tensors: Iterable[TensorInfo]
) -> None:
    """Raise if tensors do not follow each other from `start` on, or end after the file does.

    Raises:
        CheckpointError: with the tensor.
    """
    end: int | None = None
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.name)):
        expected = start if end is None else -(-end // alignment) * alignment
        if tensor.offset != expected:
            raise broken(
                file,
                f"{tensor.name} begins at byte {tensor.offset}, and the tensors before it end at "
                f"{expected}",
            )
        end = tensor.offset + tensor.nbytes
        if end > size:
            raise broken(file, f"{tensor.name} would end after the file does")
