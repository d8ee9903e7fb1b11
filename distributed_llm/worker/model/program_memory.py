"""Where a layer's program has the tensors that its recording had: fixed memory, or constants."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distributed_llm.worker.model.kernels import OpaqueWeights
from distributed_llm.worker.model.kernels.native.calls import NativeCall
from distributed_llm.worker.model.recording import TorchCall, changed_by, made_by, tensors_in

_ALIGNMENT = 64

_MOST_FOLDED = 1 << 14
"""Bytes that a call may make of constants to be carried out once: each program keeps them."""


class Unrecordable(Exception):
    """A step cannot be made a program of."""


class Workspace:
    """Memory that all layers of a stage compute in, one after another.

    Args:
        most_rows: for which there is room.
    """

    def __init__(self, most_rows: int) -> None:
        self._most_rows = most_rows
        self._memory = torch.empty(0, dtype=torch.uint8)

    def of(self, nbytes: int, rows: int) -> Tensor:
        """Return memory for a step of so many rows, uint8 [at least nbytes]."""
        if self._memory.nbytes < nbytes:
            room = -(-nbytes // rows) * self._most_rows
            self._memory = torch.empty(room, dtype=torch.uint8)
        return self._memory


@dataclass(slots=True)
class _Region:
    """Where the recorded step had something, and where the program has it, as addresses."""

    start: int
    stop: int
    moved: int
    used: bool = False


class ProgramMemory:
    """Finds what the program has for a tensor of the recording.

    Args:
        tensors: that were given to the layer; they and `made` get places of their own.
        made: tensors that it made. Those that share memory go on to do so.
        constants: that stay as they are.
        workspace: to compute in.
        rows: of the step.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        made: Iterable[Tensor],
        constants: "Constants",
        workspace: Workspace,
        rows: int,
    ) -> None:
        self._constants = constants
        spans = {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
        storages = (tensor.untyped_storage() for tensor in made)
        spans |= {storage.data_ptr(): storage.nbytes() for storage in storages}
        sizes = [-(-nbytes // _ALIGNMENT) * _ALIGNMENT for nbytes in spans.values()]
        self._memory = workspace.of(sum(sizes), rows)
        base = self._memory.data_ptr()
        self._regions = {
            start: _Region(start, start + nbytes, base + offset)
            for (start, nbytes), offset in zip(
                spans.items(), itertools.accumulate(sizes, initial=0), strict=False
            )
        }

    def is_read(self, tensor: Tensor) -> bool:
        """Return whether anything was looked up in a tensor that was given to the layer."""
        region = self._regions.get(tensor.data_ptr())
        return region is not None and region.used

    def _region(self, tensor: Tensor) -> _Region | None:
        address = tensor.data_ptr()
        for region in self._regions.values():
            if region.start <= address < region.stop:
                region.used = True
                return region
        return None

    def is_moved(self, tensor: Tensor) -> bool:
        """Return whether a tensor lies in what was given or made."""
        return tensor.layout == torch.strided and self._region(tensor) is not None

    def address(self, tensor: Tensor | None) -> int:
        """Return where the program has a tensor; 0 for None."""
        if tensor is None:
            return 0
        region = self._region(tensor)
        if region is not None:
            return region.moved + tensor.data_ptr() - region.start
        return self._constants.checked(tensor).data_ptr()

    def moved(self, tensor: Tensor) -> Tensor:
        """Return the program's own tensor for one that was recorded."""
        if not self.is_moved(tensor):
            return self._constants.checked(tensor)
        start = self.address(tensor) - self._memory.data_ptr()
        numbers = self._memory[start - start % _ALIGNMENT :]
        itemsize = tensor.element_size()
        whole = numbers[: numbers.nbytes // itemsize * itemsize].view(tensor.dtype)
        offset = whole.storage_offset() + start % _ALIGNMENT // itemsize
        return whole.as_strided(tensor.shape, tensor.stride(), offset)


class Constants:
    """Tensors that stay as they are.

    Args:
        tensors: all of them.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._ids: set[int] = set()
        self._places: set[int] = set()
        self._made: list[Tensor] = []
        for tensor in tensors:
            self._ids.add(id(tensor))
            if tensor.layout == torch.strided:
                self._places.add(_place(tensor))

    def folded(self, calls: Sequence[TorchCall | NativeCall]) -> list[TorchCall | NativeCall]:
        """Return the calls without those that make few numbers of constants alone.

        What these have made is a constant too from now on.
        """
        changed = {_place(tensor) for call in calls for tensor in changed_by(call)}
        rest: list[TorchCall | NativeCall] = []
        for call in calls:
            made = made_by(call)
            if (
                isinstance(call, TorchCall)
                and sum(tensor.nbytes for tensor in made) <= _MOST_FOLDED
                and changed.isdisjoint(map(_place, made))
                and all(map(self._has, tensors_in([call.args, list(call.kwargs.values())])))
            ):
                self._made.extend(made)
                self._places.update(map(_place, made))
            else:
                rest.append(call)
        return rest

    def _has(self, tensor: Tensor) -> bool:
        is_strided = tensor.layout == torch.strided
        return id(tensor) in self._ids or (is_strided and _place(tensor) in self._places)

    def checked(self, tensor: Tensor) -> Tensor:
        """Return a tensor that is one of them, or a view of one.

        Raises:
            Unrecordable: it is not.
        """
        if self._has(tensor):
            return tensor
        raise Unrecordable(
            f"it reads a tensor {list(tensor.shape)} that it neither has nor is given"
        )


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def constants_of(layer: nn.Module) -> Iterable[Tensor]:
    """Yield the tensors that a layer's modules hold."""
    for module in layer.modules():
        yield from module.parameters(recurse=False)
        yield from module.buffers(recurse=False)
        if isinstance(module, OpaqueWeights):
            yield from tensors_in(module.tensors())
