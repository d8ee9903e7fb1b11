"""What waits for the compute thread: first come first served, but KV cache does not wait for tasks.

Orders to export and import KV cache take milliseconds, and the next one follows only when the last
was carried out, at two workers. Behind the tasks that wait on both sides a move would take a task's
time for each; so a few of them go first, between any two tasks.
"""

import queue
import time
from collections import deque
from typing import Generic, TypeVar

from distributed_llm.worker.session.events import ExportKV, ImportKV, Run

T = TypeVar("T")

_BETWEEN_TASKS = 4


class Orders(Generic[T]):
    """A queue with one reader. `put` may be called in any thread."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[float, T] | None] = queue.SimpleQueue()
        self._quick: deque[tuple[float, T]] = deque()  # each has left a None in the queue
        self._ended = False
        self._overtakes = 0  # since the last task

    def put(self, order: T) -> None:
        """Queue an order."""
        item = (time.perf_counter(), order)
        if isinstance(order, ExportKV | ImportKV):
            self._quick.append(item)
            self._queue.put(None)
        else:
            self._queue.put(item)

    def end(self) -> None:
        """Have `get` return None after what is queued."""
        self._ended = True
        self._queue.put(None)

    def get(self, *, block: bool = True) -> tuple[float, T] | None:
        """Return when an order was put, and the order; None after the last one.

        Raises:
            queue.Empty: nothing is there, and it shall not block.
        """
        while True:
            if self._quick and self._overtakes < _BETWEEN_TASKS:
                self._overtakes += 1
                return self._quick.popleft()
            item = self._queue.get(block)
            if item is not None:
                if isinstance(item[1], Run):
                    self._overtakes = 0
                return item
            if self._quick:
                return self._quick.popleft()
            if self._ended and self._queue.empty():
                return None
