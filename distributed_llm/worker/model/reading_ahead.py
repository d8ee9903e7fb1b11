"""Reads tensors of the next layer while one is packed: disks and processors work together."""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from torch import Tensor

from distributed_llm.common.model_files import TensorInfo
from distributed_llm.worker.model.tensor_files import Locate, OnRead, TensorReader

_MOST_BYTES = 256 << 20
"""Tensors that are in memory before they are wanted, bytes."""


class ReadingAhead(TensorReader):
    """Reads tensors, some of them before they are wanted; may be used by several threads.

    It has to be left as a context manager, so that its own thread ends.

    Args:
        locate: see `TensorReader`.
        on_read: likewise.
    """

    def __init__(self, locate: Locate, on_read: OnRead) -> None:
        super().__init__(locate, on_read)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reading-ahead")
        self._ahead: dict[TensorInfo, Future[Tensor]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ahead.clear()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def read_ahead(self, infos: Iterable[TensorInfo]) -> None:
        """Begin to read tensors that will be wanted next, as many as there is room for.

        What was read before and nobody wanted is given up. What goes wrong is raised when a tensor
        is wanted.
        """
        for future in self._ahead.values():
            future.cancel()
        self._ahead.clear()
        room = _MOST_BYTES
        for info in infos:
            room -= info.nbytes
            if room < 0:
                return
            self._ahead[info] = self._thread.submit(super().read, info)

    def read(self, info: TensorInfo) -> Tensor:
        """Return a tensor; see `TensorReader`."""
        future = self._ahead.pop(info, None)
        return super().read(info) if future is None else future.result()
