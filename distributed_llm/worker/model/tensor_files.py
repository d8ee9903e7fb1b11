"""Reads tensors out of safetensors files, into memory of their own.

The files are read, not mapped. The system ends a process that touches mapped memory behind which
there is no file any more: because it was cut short, or its disk or share fails. Reading gives an
error instead. It also gives tensors that are aligned as vector instructions like it.
"""

import mmap
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from distributed_llm.common.errors import UnsupportedModel
from distributed_llm.common.model_files import TensorInfo, ends_early, unreadable

_PIECE_BYTES = 16 << 20
"""Bytes that are read at once; progress is told after each piece."""

_SMALLEST_MAPPING_BYTES = 1 << 20
"""Size of a tensor from which on it gets a mapping of its own, bytes."""

_PRIVATE = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
"""Arguments for memory that is no file and not shared; Windows has no other."""

_DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""Types of numbers that weights may have, by safetensors' names."""


class TensorFile:
    """A safetensors file, open while tensors are read from it; may be used by several threads.

    Args:
        path: of the file, whose header was read before.
        on_read: called with the bytes of each piece when it was read.

    Raises:
        CheckpointError: it cannot be opened.
    """

    def __init__(self, path: Path, on_read: Callable[[int], None]) -> None:
        self._path = path
        self._on_read = on_read
        self._lock = threading.Lock()  # of the position in the file
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115  closed by `__exit__`
        except OSError as exc:
            raise unreadable(path, exc) from exc

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            self._file.close()

    def read(self, info: TensorInfo) -> Tensor:
        """Return a tensor of the file.

        Raises:
            CheckpointUnavailable: the file ends before it does, or cannot be read just now.
            UnsupportedModel: its numbers are of a type that weights cannot have.
        """
        if info.dtype not in _DTYPES:
            raise UnsupportedModel(
                f"{self._path}: the numbers of {info.name} are of type {info.dtype}, which cannot "
                "be computed with. Use the original model."
            )
        content = _new_memory(info.nbytes)
        with self._lock:
            self._read_into(content.numpy().data, info)
        return content.view(_DTYPES[info.dtype]).reshape(info.shape)

    def _read_into(self, memory: memoryview, info: TensorInfo) -> None:
        done = 0
        try:
            self._file.seek(info.offset)
            while done < info.nbytes:
                read = self._file.readinto(memory[done : done + _PIECE_BYTES])
                if not read:
                    raise ends_early(self._path, info.name)
                self._on_read(read)
                done += read
        except OSError as exc:
            raise unreadable(self._path, exc) from exc


def _new_memory(nbytes: int) -> Tensor:
    """Return memory for a tensor, uint8 [nbytes], which the system gets back once it is freed.

    Weights are freed when they are packed or converted. What threads get of malloc, it would keep:
    almost twice the memory of the stage.
    """
    if nbytes < _SMALLEST_MAPPING_BYTES:
        return torch.empty(nbytes, dtype=torch.uint8)
    return torch.frombuffer(mmap.mmap(-1, nbytes, **_PRIVATE), dtype=torch.uint8)


class TensorInFile:
    """A tensor that is read when transformers' loader slices it."""

    def __init__(self, file: TensorFile, info: TensorInfo) -> None:
        self._file = file
        self._info = info

    def __getitem__(self, index: Any) -> Tensor:
        return self._file.read(self._info)[index]
