"""Copies from the machine's memory to a GPU, on a stream of their own, while the GPU computes.

A GPU does what one stream asks of it in that order, and what different streams ask at the same
time, unless one waits for what another has reached.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.cuda import _pin_memory_utils

from distributed_llm.common.errors import NotEnoughMemory
from distributed_llm.common.wording import size_text


class Mark(Protocol):
    """A point in a stream."""

    def synchronize(self) -> None:
        """Wait until the GPU has got there."""


class Copies(Protocol):
    """Copies to one device, and the order between them and what it computes."""

    def buffer(self, nbytes: int) -> Tensor:
        """Return new memory of the device, uint8 [nbytes], that copies are written into."""

    def copy(self, source: Tensor, target: Tensor, after: Mark) -> Mark:
        """Ask for a copy once a mark is reached; return the mark that is reached with its end.

        Args:
            source: on the CPU, uint8 [size]; asynchronous if its pages are locked (`lock`).
            target: of `buffer`, as large.
            after: to wait for.
        """

    def reached(self) -> Mark:
        """Return a mark behind all that the device was asked to compute so far."""

    def wait(self, mark: Mark) -> None:
        """Let the device compute what it is asked from now on once it has reached a mark."""

    def lock(self, memory: Tensor) -> None:
        """Lock pages of the machine's memory, so that copies need not wait for the CPU.

        Raises:
            NotEnoughMemory: the system does not let that many pages be locked.
        """

    def unlock(self, memory: Tensor) -> None:
        """Undo `lock`; nothing may be copied from there any more."""


class CudaCopies:
    """`Copies` to a GPU of NVIDIA or AMD.

    Memory is locked where it lies (`cudaHostRegister`). torch's own allocator of locked memory
    would take twice as much for a layer that is a little larger than a power of two.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def buffer(self, nbytes: int) -> Tensor:
        """Return new memory of the device; see `Copies`."""
        memory = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        memory.record_stream(self._stream)  # freed, it is used again only after the last copy
        return memory

    def copy(self, source: Tensor, target: Tensor, after: Mark) -> Mark:
        """Ask for a copy; see `Copies`."""
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(after)
            target.copy_(source, non_blocking=True)
            return _mark_on(self._stream)

    def reached(self) -> Mark:
        """Return a mark behind all that was asked; see `Copies`."""
        return _mark_on(torch.cuda.current_stream(self._device))

    def wait(self, mark: Mark) -> None:
        """Let the device wait; see `Copies`."""
        current: Any = torch.cuda.current_stream(self._device)
        current.wait_event(mark)

    def lock(self, memory: Tensor) -> None:
        """Lock pages; see `Copies`."""
        try:
            _pin_memory_utils.pin_memory(memory.data_ptr(), memory.nbytes)
        except torch.AcceleratorError:
            raise
        except RuntimeError as exc:
            raise NotEnoughMemory(
                f"{size_text(memory.nbytes)} of this machine's memory cannot be locked for "
                f"{self._device} to copy from: {exc} Give this worker a smaller --offload, or "
                "raise the system's limit of locked memory (`ulimit -l`)."
            ) from exc

    def unlock(self, memory: Tensor) -> None:
        """Undo `lock`; see `Copies`."""
        _pin_memory_utils.unpin_memory(memory.data_ptr())


def _mark_on(stream: Any) -> Mark:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(stream)
    mark: Mark = event
    return mark


def copies_to(device: torch.device) -> Copies | None:
    """Return what copies to a GPU of NVIDIA or AMD; None for other devices.

    Apple's use the machine's memory; of Intel's, torch cannot lock memory where it lies.
    """
    return CudaCopies(device) if device.type == "cuda" else None
