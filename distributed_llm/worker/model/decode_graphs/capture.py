"""Records what a GPU is asked to compute as a graph, and launches it."""

from collections.abc import Callable
from typing import Any, Protocol

import torch


class Capture(Protocol):
    """Makes graphs on one device; they share memory, so only one may be under way."""

    def rehearse(self, compute: Callable[[], None]) -> None:
        """Have the device compute something as it is recorded later, but at once.

        What is prepared when kernels run for the first time must not be part of a graph.
        """

    def record(self, compute: Callable[[], None]) -> Callable[[], None]:
        """Return what computes again what `compute` asks of the device now, on the same memory.

        Raises:
            torch.OutOfMemoryError: there is no room for it.
            RuntimeError: something cannot be recorded; the device goes on.
            torch.AcceleratorError: the device has failed.
        """

    def free_bytes(self) -> int:
        """Return the bytes of device memory that nobody has taken, not even to have them later."""


class CudaCapture:
    """`Capture` of a GPU of NVIDIA or AMD.

    Args:
        device: the GPU, which need not be torch's current device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def rehearse(self, compute: Callable[[], None]) -> None:
        """Compute on the stream that is recorded; see `Capture`.

        Whatever follows waits for that, for it may get memory that this still reads.
        """
        current: Any = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                compute()
        finally:
            current.wait_stream(self._stream)

    def record(self, compute: Callable[[], None]) -> Callable[[], None]:
        """Record; see `Capture`.

        Other threads may load layers meanwhile. `torch.cuda.graph` would leave its stream the
        current one if a recording fails.
        """
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()  # within a recording no memory can be given back
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    compute()
                finally:
                    graph.capture_end()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as exc:
            torch.cuda.synchronize(self._device)  # raises if it is the device that has failed
            raise RuntimeError(_cause(exc)) from exc
        return graph.replay

    def free_bytes(self) -> int:
        """Return the bytes that nobody has taken; see `Capture`."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self._device)
        return int(free)


def _cause(exc: BaseException) -> str:
    """Return what went wrong first; the end of a recording that failed fails as well."""
    while exc.__context__ is not None:
        exc = exc.__context__
    first, *_ = (str(exc).strip() or type(exc).__name__).splitlines()
    return first[:200]


def capture_of(device: torch.device) -> Capture | None:
    """Return what makes graphs on a device; None: torch makes none there.

    It does on Intel's GPUs, in another form that nobody could try.
    """
    return CudaCapture(device) if device.type == "cuda" else None
