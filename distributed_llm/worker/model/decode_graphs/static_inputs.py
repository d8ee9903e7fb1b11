"""Memory of a device that a graph reads what differs from step to step from, filled at once."""

from collections.abc import Mapping

import torch
from torch import Tensor

from distributed_llm.worker.devices import overwritten

_ALIGNMENT = 16
"""Each tensor begins at a multiple of so many bytes, as kernels like it."""


class StaticInputs:
    """Tensors on a device that keep their place.

    Args:
        like: tensors of the CPU, by name, as they will be given each time.
        device: to be on.

    Attributes:
        tensors: of the device, by name; nothing in particular before `fill`.
        nbytes: of device memory.
    """

    def __init__(self, like: Mapping[str, Tensor], device: torch.device) -> None:
        self._places: dict[str, tuple[int, int]] = {}
        stop = 0
        for name, tensor in like.items():
            start = -(-stop // _ALIGNMENT) * _ALIGNMENT
            stop = start + tensor.nbytes
            self._places[name] = start, stop
        self.nbytes = stop
        self._memory = torch.empty(stop, dtype=torch.uint8, device=device)
        self.tensors = {
            name: self._memory[slice(*self._places[name])].view(tensor.dtype).view(tensor.shape)
            for name, tensor in like.items()
        }

    def fill(self, given: Mapping[str, Tensor]) -> None:
        """Send tensors to their places, all in one copy that nobody waits for.

        Args:
            given: of the CPU; names, shapes and dtypes as before.
        """
        memory = torch.empty(self.nbytes, dtype=torch.uint8)
        for name, place in self._places.items():
            there, tensor = self.tensors[name], given[name]
            assert (tensor.shape, tensor.dtype) == (there.shape, there.dtype), name
            memory[slice(*place)] = tensor.contiguous().view(-1).view(torch.uint8)
        overwritten(self._memory, memory)
