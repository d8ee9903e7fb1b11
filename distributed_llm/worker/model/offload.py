"""Layers that stay on the disk: their weights are mapped from a file, and read in every step.

A layer is loaded as any other, with all that becomes of its weights meanwhile, and then written to
a file without a name. Its tensors lie in a mapping of that file from then on. So its pages belong
to the operating system, which drops them when memory is needed. While a layer from the disk
computes, the system is asked to read the next one; afterwards its pages are given back.
"""

import logging
import mmap
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distributed_llm.common.errors import NotEnoughMemory
from distributed_llm.common.offloading import LAYERS_AT_ONCE
from distributed_llm.common.wording import size_text
from distributed_llm.worker.model.kernels import OpaqueWeights

logger = logging.getLogger(__name__)

_SMALLEST = 4096
"""Tensors with fewer bytes stay in memory."""

_ALIGNMENT = 64
"""Each tensor begins at a multiple of so many bytes, as kernels like it."""

_NAME = "weights_on_disk"
"""Attribute of a layer's module."""


class LayerFile:
    """The weights of one layer in a file that nobody else sees, and that ends with the process.

    Args:
        layer: to move to the disk; its tensors lie in the file afterwards.
        folder: for the file.

    Attributes:
        nbytes: that were moved.

    Raises:
        NotEnoughMemory: the disk is full, or cannot be written to.
    """

    def __init__(self, layer: nn.Module, folder: Path) -> None:
        tensors = list(_movable(layer))
        places: list[int] = []
        size = 0
        for tensor in tensors:
            places.append(size)
            size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        self.nbytes = sum(tensor.nbytes for tensor in tensors)
        self._mapped = _written(tensors, places, max(size, mmap.PAGESIZE), folder)
        for tensor, place in zip(tensors, places, strict=True):
            flat = torch.frombuffer(
                self._mapped, dtype=tensor.dtype, count=tensor.numel(), offset=place
            )
            tensor.data = flat.as_strided(tensor.shape, tensor.stride())
        self.give_back()

    def read_ahead(self) -> None:
        """Have the operating system read the file; returns before it has."""
        self._advise("MADV_WILLNEED")

    def give_back(self) -> None:
        """Give the memory of the file's pages back; they are read again when they are used."""
        self._advise("MADV_DONTNEED")

    def _advise(self, name: str) -> None:
        advice = getattr(mmap, name, None)  # Windows has none, and decides by itself
        if advice is not None:
            self._mapped.madvise(advice)


def move_to_disk(layer: nn.Module, folder: Path) -> None:
    """Move a layer's weights to a file on the disk.

    Raises:
        NotEnoughMemory: the disk is full, or cannot be written to.
    """
    setattr(layer, _NAME, LayerFile(layer, folder))


def file_of(layer: nn.Module) -> LayerFile | None:
    """Return the file that a layer's weights lie in; None if they are in memory."""
    return getattr(layer, _NAME, None)


def read_one_ahead(layers: Iterable[nn.Module]) -> None:
    """Hook the layers of a stage: while one from the disk computes, the next one is read.

    After the last one that is the first one again, for the next step.
    """
    held = [(layer, file) for layer in layers if (file := file_of(layer)) is not None]
    files = [file for _, file in held]
    for (layer, file), following in zip(held, [*files[1:], *files[:1]], strict=True):
        layer.register_forward_pre_hook(_Reading(following))
        layer.register_forward_hook(_GivingBack(file))


def saved_nbytes(layers: Iterable[nn.Module]) -> int:
    """Return the bytes of memory that a stage saves because layers stay on the disk.

    As many layers as are in memory at once are not saved.
    """
    sizes = sorted(file.nbytes for layer in layers if (file := file_of(layer)) is not None)
    return sum(sizes[:-LAYERS_AT_ONCE])


def read_nbytes(layers: Iterable[nn.Module]) -> int:
    """Return the bytes that are read from the disk in every step."""
    return sum(file.nbytes for layer in layers if (file := file_of(layer)) is not None)


class _Reading:
    def __init__(self, file: LayerFile) -> None:
        self._file = file

    def __call__(self, layer: nn.Module, args: Any) -> None:
        self._file.read_ahead()


class _GivingBack:
    def __init__(self, file: LayerFile) -> None:
        self._file = file

    def __call__(self, layer: nn.Module, args: Any, output: Any) -> None:
        self._file.give_back()


def _movable(layer: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors of a layer that are worth a place in a file, each once; no tables."""
    opaque = [m for m in layer.modules() if isinstance(m, OpaqueWeights)]
    packed = [held for module in opaque for held in module.tensors()]
    # Of a table, a step reads some rows alone; so it would be read for nothing.
    seen = {id(m.weight) for m in layer.modules() if isinstance(m, nn.Embedding)}
    for tensor in (*layer.parameters(), *layer.buffers(), *packed):
        if not isinstance(tensor, Tensor) or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if tensor.layout == torch.strided and tensor.nbytes >= _SMALLEST and _is_dense(tensor):
            yield tensor


def _is_dense(tensor: Tensor) -> bool:
    """Return whether a tensor fills its part of the storage, in whatever order."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in steps) == tensor.numel()


def _written(
    tensors: Sequence[Tensor], places: Sequence[int], size: int, folder: Path
) -> mmap.mmap:
    """Return a mapping of a new file with these tensors, in the order of their storage."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.truncate(size)
            for tensor, place in zip(tensors, places, strict=True):
                flat = tensor.detach().as_strided((tensor.numel(),), (1,))
                file.seek(place)
                file.write(flat.view(torch.uint8).numpy().data)
            file.flush()
            return mmap.mmap(file.fileno(), size)
    except OSError as exc:
        raise NotEnoughMemory(
            f"A layer of {size_text(size)} that does not fit into memory cannot be written to "
            f"{folder}: {exc.strerror or exc}. Make room there, name another folder by "
            "DLLM_CACHE, or give this worker a smaller --offload."
        ) from exc
