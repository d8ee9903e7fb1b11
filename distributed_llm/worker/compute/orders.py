"""The compute thread's queue: first in, first out, but exports and imports may overtake tasks.

An export or import of KV cache takes milliseconds, and the next one is ordered only when the last
one is done on both workers. If each waited behind all queued tasks, a move would take many times as
long. So a few of them may run before each task.
"""

import queue
import time
from collections import deque
from typing import Generic, TypeVar

from distributed_llm.worker.session.events import ExportKV, ImportKV, Run

T = TypeVar("T")

_MAX_OVERTAKING = 4
"""Exports and imports that may run before the next task."""


class OrderQueue(Generic[T]):
    """A queue with one reader; `put` and `end` may be called in any thread."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[float, T] | None] = queue.SimpleQueue()
        self._quick: deque[tuple[float, T]] = deque()  # each has left a None in the queue
        self._ended = False
        self._overtaking = 0  # exports and imports since the last task

    def put(self, order: T) -> None:
        """Queue an order."""
        item = (time.perf_counter(), order)
        if isinstance(order, ExportKV | ImportKV):
            self._quick.append(item)
            self._queue.put(None)
        else:
            self._queue.put(item)

    def end(self) -> None:
        """Have `get` return None after the last queued order."""
        self._ended = True
        self._queue.put(None)

    def get(self, *, block: bool = True) -> tuple[float, T] | None:
        """Return the next order with the `time.perf_counter` at which it was put, or None.

        Raises:
            queue.Empty: no order is queued, and `block` is false.
        """
        while True:
            if self._quick and self._overtaking < _MAX_OVERTAKING:
                self._overtaking += 1
                return self._quick.popleft()
            if self._ended and self._queue.empty() and not self._quick:
                return None  # what `end` has left may have been read before something else
            item = self._queue.get(block)
            if item is not None:
                if isinstance(item[1], Run):
                    self._overtaking = 0
                return item
            if self._quick:
                return self._quick.popleft()
