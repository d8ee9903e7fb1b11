"""Memory that the system gets back as soon as it is freed."""

import math
import mmap
import sys
from collections.abc import Sequence
from contextlib import suppress
from weakref import WeakValueDictionary

import torch
from torch import Tensor

_SMALLEST_MAPPING_BYTES = 1 << 20
"""Size of a tensor from which on it gets a mapping of its own, bytes."""

_PRIVATE = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
"""Arguments for memory that is no file and not shared; Windows has no other."""

_mappings: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()
"""Those that are in use, by their addresses."""


def new_memory(nbytes: int) -> Tensor:
    """Return memory for a tensor, uint8 [nbytes].

    Weights are freed when they are packed or converted. What threads get of malloc, it would keep:
    almost twice the memory of the stage. And packed weights, which stay, would lie between what is
    freed, so that nothing as large fits there any more.
    """
    if nbytes < _SMALLEST_MAPPING_BYTES:
        return torch.empty(nbytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, nbytes, **_PRIVATE)
    if sys.platform == "linux":  # reading is three times as fast with large pages
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    content = torch.frombuffer(memory, dtype=torch.uint8)
    _mappings[content.data_ptr()] = memory
    return content


def in_own_mapping(tensor: Tensor) -> bool:
    """Return whether a tensor is all of a mapping that `new_memory` has made."""
    storage = tensor.untyped_storage()
    return storage.data_ptr() in _mappings and storage.nbytes() == tensor.nbytes


def new_bytes(shape: Sequence[int], device: torch.device) -> Tensor:
    """Return memory for uint8 numbers on a device; see `new_memory`."""
    if device.type != "cpu":
        return torch.empty(*shape, dtype=torch.uint8, device=device)
    return new_memory(math.prod(shape)).view(*shape)
