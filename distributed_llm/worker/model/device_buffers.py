"""Layers of a GPU that stay in the machine's memory, and are copied to the GPU in every step.

While one of them computes, and those between it and the next one, the next one is copied into
another buffer. Two buffers take turns: one that a layer computes with is never written to.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from distributed_llm.common.offloading import LAYERS_AT_ONCE
from distributed_llm.worker.model.away_layers import AwayLayer, place_of, set_away, set_turn
from distributed_llm.worker.model.device_copies import Copies, Mark
from distributed_llm.worker.model.kernels.memory import new_memory
from distributed_llm.worker.model.offload import LayerFile


class PinnedLayer(AwayLayer):
    """The weights of one layer in locked pages of the machine's memory.

    Args:
        layer: to move there; its tensors lie there afterwards.
        copies: to the device.

    Attributes:
        copied: behind the latest copy into the buffers of each stage, by their `id`.

    Raises:
        NotEnoughMemory: the pages cannot be locked.
    """

    def __init__(self, layer: nn.Module, copies: Copies) -> None:
        self._copies = copies
        self.copied: dict[int, Mark] = {}
        super().__init__(layer)

    def _stored(self, contents: Sequence[Tensor], places: Sequence[int], size: int) -> Tensor:
        memory = new_memory(size)
        for tensor, place in zip(contents, places, strict=True):
            memory[place : place + tensor.nbytes].copy_(tensor.view(torch.uint8))
        self._copies.lock(memory)
        return memory

    def __del__(self) -> None:
        if not hasattr(self, "memory"):
            return  # it could not be made
        with suppress(torch.AcceleratorError, AssertionError):  # of a device that has failed
            for mark in self.copied.values():
                mark.synchronize()
            self._copies.unlock(self.memory)


class DeviceBuffers:
    """Two buffers on a device for the layers of a stage that are away, in the order of a step.

    Only one thread at a time may use them.

    Args:
        places: of these layers; others are not brought.
        copies: to the device.

    Attributes:
        nbytes: of device memory that they take.
    """

    def __init__(self, places: Sequence[AwayLayer], copies: Copies) -> None:
        size = max(place.memory.nbytes for place in places)
        count = min(LAYERS_AT_ONCE, len(places))
        self.nbytes = size * count
        self._copies = copies
        self._buffers = [
            _Buffer(places, copies.buffer(size), copies.reached()) for _ in range(count)
        ]
        self._used: _Buffer | None = None  # that a layer computes with

    def use(self, place: AwayLayer) -> None:
        """Let a layer compute with its weights on the device, once they are there."""
        self.done()  # with what a layer left that failed
        buffer = self._bring(place)
        self._copies.wait(buffer.filled)
        place.lie_in(buffer.views[id(place)])
        self._buffers.sort(key=lambda each: each is buffer)  # the next copy goes to the first
        self._used = buffer

    def done(self) -> None:
        """Note that the layer that computes was asked all that it computes in this step."""
        if self._used is None:
            return
        assert self._used.holds is not None
        self._used.holds.go_home()
        self._used.free = self._copies.reached()
        self._used = None

    def bring(self, place: AwayLayer, then: AwayLayer) -> None:
        """Begin to copy a layer to the device, into the buffer that was used longest ago.

        Args:
            place: of the layer that computes next.
            then: of the one after it, whose file is read meanwhile if it is on the disk.
        """
        self._bring(place)
        is_there = any(buffer.holds is then for buffer in self._buffers)
        if isinstance(then, LayerFile) and not is_there:
            then.read_ahead()

    def _bring(self, place: AwayLayer) -> "_Buffer":
        for buffer in self._buffers:
            if buffer.holds is place:
                return buffer
        buffer = self._buffers[0]
        target = buffer.memory[: place.memory.nbytes]
        buffer.holds = None  # until the copy was asked for
        buffer.filled = self._copies.copy(place.memory, target, buffer.free)
        buffer.holds = place
        if isinstance(place, PinnedLayer):
            place.copied[id(self)] = buffer.filled
        if isinstance(place, LayerFile):
            place.give_back()
        return buffer


class _Buffer:
    """Device memory for one layer at a time.

    Attributes:
        holds: the layer whose weights it has, or will have once `filled` is reached.
        views: the tensors of each layer as they lie in it, by `id` of its place.
        filled: reached when the copy into it is done.
        free: reached when the last layer that used it has computed.
    """

    def __init__(self, places: Sequence[AwayLayer], memory: Tensor, now: Mark) -> None:
        self.memory = memory
        self.views = {id(place): place.views_in(memory) for place in places}
        self.holds: AwayLayer | None = None
        self.filled = self.free = now


def move_to_ram(layer: nn.Module, copies: Copies) -> None:
    """Move a layer's weights from a device to the machine's memory.

    Raises:
        NotEnoughMemory: the system does not let that many pages be locked.
    """
    set_away(layer, PinnedLayer(layer, copies))


def bring_one_ahead(layers: Iterable[nn.Module], copies: Copies) -> int:
    """Hook the layers of a stage on a GPU: after one that is away, the next one is copied there.

    It is asked for once the layer was asked to compute, so a file that has to be read first keeps
    only the CPU waiting. After the last one that is the first one again, for the next step.

    Returns:
        The bytes of device memory that the stage saves because layers are away.
    """
    held = [(layer, place) for layer in layers if (place := place_of(layer)) is not None]
    if not held:
        return 0
    places = [place for _, place in held]
    buffers = DeviceBuffers(places, copies)
    for at, (layer, _) in enumerate(held):
        own = [places[(at + ahead) % len(places)] for ahead in range(3)]
        set_turn(layer, _Bringing(buffers, own))
    return sum(place.nbytes for place in places) - buffers.nbytes


class _Bringing:
    def __init__(self, buffers: DeviceBuffers, places: Sequence[AwayLayer]) -> None:
        self._buffers = buffers
        self._own, self._following, self._then = places

    def begin(self) -> None:
        self._buffers.use(self._own)

    def end(self) -> None:
        self._buffers.done()
        self._buffers.bring(self._following, self._then)
