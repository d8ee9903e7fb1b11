"""Layers that stay on the disk: their weights are mapped from a file, and read in every step.

The file has no name. Its pages belong to the operating system, which drops them when memory is
needed. On a CPU, the system is asked to read the next such layer while one computes; afterwards its
pages are given back.
"""

import logging
import mmap
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from distributed_llm.common.errors import NotEnoughMemory
from distributed_llm.common.offloading import LAYERS_AT_ONCE
from distributed_llm.common.wording import size_text
from distributed_llm.worker.model.away_layers import AwayLayer, place_of, set_away, set_turn

logger = logging.getLogger(__name__)


class LayerFile(AwayLayer):
    """The weights of one layer in a file that nobody else sees, and that ends with the process.

    Args:
        layer: to move to the disk; its tensors lie in the file afterwards.
        folder: for the file.

    Raises:
        NotEnoughMemory: the disk is full, or cannot be written to.
    """

    def __init__(self, layer: nn.Module, folder: Path) -> None:
        self._folder = folder
        super().__init__(layer)
        self.give_back()

    def _stored(self, contents: Sequence[Tensor], places: Sequence[int], size: int) -> Tensor:
        self._mapped = _written(contents, places, size, self._folder)
        return torch.frombuffer(self._mapped, dtype=torch.uint8)

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
    set_away(layer, LayerFile(layer, folder))


def file_of(layer: nn.Module) -> LayerFile | None:
    """Return the file that a layer's weights lie in; None if they are in memory."""
    place = place_of(layer)
    return place if isinstance(place, LayerFile) else None


def read_one_ahead(layers: Iterable[nn.Module]) -> int:
    """Hook the layers of a stage on a CPU: while one from the disk computes, the next one is read.

    After the last one that is the first one again, for the next step.

    Returns:
        The bytes of memory that the stage saves because layers stay on the disk. As many layers as
        are in memory at once are not saved.
    """
    held = [(layer, file) for layer in layers if (file := file_of(layer)) is not None]
    files = [file for _, file in held]
    for (layer, file), following in zip(held, [*files[1:], *files[:1]], strict=True):
        set_turn(layer, _Reading(file, following))
    return sum(sorted(file.nbytes for file in files)[:-LAYERS_AT_ONCE])


class _Reading:
    def __init__(self, file: LayerFile, following: LayerFile) -> None:
        self._file, self._following = file, following

    def begin(self) -> None:
        self._following.read_ahead()

    def end(self) -> None:
        self._file.give_back()


def _written(
    contents: Sequence[Tensor], places: Sequence[int], size: int, folder: Path
) -> mmap.mmap:
    """Return a mapping of a new file with these tensors."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.truncate(size)
            for tensor, place in zip(contents, places, strict=True):
                file.seek(place)
                file.write(tensor.cpu().view(torch.uint8).numpy().data)
            file.flush()
            return mmap.mmap(file.fileno(), size)
    except OSError as exc:
        raise NotEnoughMemory(
            f"A layer of {size_text(size)} that does not fit into memory cannot be written to "
            f"{folder}: {exc.strerror or exc}. Make room there, name another folder by "
            "DLLM_CACHE, or give this worker a smaller --offload."
        ) from exc
