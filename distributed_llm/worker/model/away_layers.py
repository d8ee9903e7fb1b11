"""Layers without room on their device: all weights of one lie together, somewhere else.

A layer is loaded as any other, with all that becomes of its weights meanwhile, and then moved. Its
tensors lie in that place from then on, unless they are brought to the device.
"""

import mmap
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from distributed_llm.worker.model.kernels import OpaqueWeights
from distributed_llm.worker.model.shared_blocks import block_of

_SMALLEST = 4096
"""Tensors with fewer bytes stay where they are."""

_ALIGNMENT = 64
"""Each tensor begins at a multiple of so many bytes, as kernels like it."""

_NAME, _TURN = "weights_away", "turn_of_weights"
"""Attributes of a layer's module."""


class AwayLayer(ABC):
    """The weights of one layer in a place that is not the memory of its device.

    Args:
        layer: whose tensors lie in that place afterwards.

    Attributes:
        nbytes: that were moved.
        memory: the place, as the CPU sees it, uint8 [size].
    """

    def __init__(self, layer: nn.Module) -> None:
        self._tensors = list(_movable(layer))
        self._places: list[int] = []
        size = 0
        for tensor in self._tensors:
            self._places.append(size)
            size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        self.nbytes = sum(tensor.nbytes for tensor in self._tensors)
        contents = [tensor.detach().as_strided((tensor.numel(),), (1,)) for tensor in self._tensors]
        self.memory = self._stored(contents, self._places, max(size, mmap.PAGESIZE))
        self._home = self.views_in(self.memory)
        self.go_home()

    @abstractmethod
    def _stored(self, contents: Sequence[Tensor], places: Sequence[int], size: int) -> Tensor:
        """Return a place of `size` bytes with these tensors, each [numbers], at `places`."""

    def views_in(self, memory: Tensor) -> list[Tensor]:
        """Return the tensors of the layer as they lie in a copy of `self.memory`."""
        return [
            memory[place : place + tensor.nbytes]
            .view(tensor.dtype)
            .as_strided(tensor.shape, tensor.stride())
            for tensor, place in zip(self._tensors, self._places, strict=True)
        ]

    def lie_in(self, views: Sequence[Tensor]) -> None:
        """Have the layer compute with these tensors, of `views_in`."""
        for tensor, view in zip(self._tensors, views, strict=True):
            tensor.data = view

    def go_home(self) -> None:
        """Have the tensors of the layer lie in their place again."""
        self.lie_in(self._home)


def set_away(layer: nn.Module, place: AwayLayer) -> None:
    """Note where the weights of a layer are."""
    setattr(layer, _NAME, place)


def place_of(layer: nn.Module) -> AwayLayer | None:
    """Return where a layer's weights are; None if they are in its device's memory."""
    return getattr(layer, _NAME, None)


class Turn(Protocol):
    """What is done about the weights of a layer that are away, around its part of a step."""

    def begin(self) -> None:
        """Let the layer compute."""

    def end(self) -> None:
        """Note that it has; see to the next one."""


def set_turn(layer: nn.Module, turn: Turn) -> None:
    """Have a layer take its turn whenever it is called."""
    setattr(layer, _TURN, turn)
    layer.register_forward_pre_hook(lambda layer, args: turn.begin())
    layer.register_forward_hook(lambda layer, args, output: turn.end())


@contextmanager
def turn_of(layer: nn.Module) -> Iterator[None]:
    """Compute with modules of a layer, without calling the layer, in this context."""
    turn: Turn | None = getattr(layer, _TURN, None)
    if turn is None:
        yield
        return
    turn.begin()
    yield
    turn.end()


def away_nbytes(layers: Iterable[nn.Module]) -> int:
    """Return the bytes of weights that are brought to the device in every step."""
    return sum(place.nbytes for layer in layers if (place := place_of(layer)) is not None)


def _movable(layer: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors of a layer that are worth moving, each once.

    Those of a block that other layers may call as well stay. So do tables: a step reads some rows
    of one, and would bring all of it.
    """
    seen = {id(tensor) for tensor in _tensors(block)} if (block := block_of(layer)) else set()
    seen.update(id(module.weight) for module in layer.modules() if isinstance(module, nn.Embedding))
    for tensor in _tensors(layer):
        if not isinstance(tensor, Tensor) or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if tensor.layout == torch.strided and tensor.nbytes >= _SMALLEST and _is_dense(tensor):
            yield tensor


def _tensors(module: nn.Module) -> Iterator[object]:
    opaque = [m for m in module.modules() if isinstance(m, OpaqueWeights)]
    packed = [held for each in opaque for held in each.tensors()]
    yield from (*module.parameters(), *module.buffers(), *packed)


def _is_dense(tensor: Tensor) -> bool:
    """Return whether a tensor fills its part of the storage, in whatever order."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in steps) == tensor.numel()
