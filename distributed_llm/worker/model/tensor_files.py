"""Reads tensors out of safetensors and GGUF files, into memory of their own.

The files are read, not mapped. The system ends a process that touches mapped memory behind which
there is no file any more: because it was cut short, or its disk or share fails. Reading gives an
error instead. It also gives tensors that are aligned as vector instructions like it.
"""

import threading
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from distributed_llm.common.errors import UnsupportedModel
from distributed_llm.common.gguf_types import GGUF_BLOCKS
from distributed_llm.common.model_files import TensorInfo, ends_early, unreadable
from distributed_llm.weights.giving.shelf import Place
from distributed_llm.worker.model.kernels.memory import new_memory

_PIECE_BYTES = 16 << 20
"""Bytes that are read at once; progress is told after each piece."""

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
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""Types of numbers that weights may have, by safetensors' names."""


Locate = Callable[[TensorInfo], Place]
"""Returns where the bytes of a tensor are, perhaps once they have arrived."""

OnRead = Callable[[int], None]
"""Is told the bytes of each piece of a tensor when it was read, in any thread."""


class TensorReader:
    """Reads tensors, one at a time; may be used by several threads.

    Args:
        locate: returns where a tensor is; may raise CheckpointError.
        on_read: called with the bytes of each piece when it was read.
    """

    def __init__(self, locate: Locate, on_read: OnRead) -> None:
        self._locate = locate
        self._on_read = on_read
        self._lock = threading.Lock()  # disks read one file after the other faster

    def read(self, info: TensorInfo) -> Tensor:
        """Return a tensor; of one in blocks of GGUF, the bytes of its rows.

        Raises:
            CheckpointUnavailable: its file ends before it does, or cannot be read just now.
            CheckpointError: it cannot be had, or its file cannot be read.
            UnsupportedModel: its numbers are of a type that weights cannot have.
        """
        place = self._locate(info)
        in_blocks = info.dtype in GGUF_BLOCKS
        if info.dtype not in _DTYPES and not in_blocks:
            raise UnsupportedModel(
                f"{place.file}: the numbers of {info.name} are of type {info.dtype}, which cannot "
                "be computed with. Use the original model."
            )
        content = new_memory(place.nbytes)
        with self._lock:
            self._read_into(content.numpy().data, place, info.name)
        if in_blocks:
            return content.reshape(*info.shape[:-1], -1)
        return content.view(_DTYPES[info.dtype]).reshape(info.shape)

    def _read_into(self, memory: memoryview, place: Place, name: str) -> None:
        done = 0
        try:
            with open(place.file, "rb", buffering=0) as file:
                file.seek(place.offset)
                while done < place.nbytes:
                    read = file.readinto(memory[done : done + _PIECE_BYTES])
                    if not read:
                        raise ends_early(place.file, name)
                    self._on_read(read)
                    done += read
        except OSError as exc:
            raise unreadable(place.file, exc) from exc
