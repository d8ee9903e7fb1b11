"""The deadlines of requests, nearest first. Pure."""

import heapq
from collections.abc import Iterable

from distributed_llm.coordinator.events import RequestKey

_LEAST_KEPT = 64
"""Entries of the heap, at least, before those of requests that have ended are taken out of it."""


class Deadlines:
    """When requests time out. Those that end before are left in a heap until they are many."""

    def __init__(self) -> None:
        self._open: dict[RequestKey, float] = {}
        self._heap: list[tuple[float, RequestKey]] = []  # some of requests that have ended
        self._most = _LEAST_KEPT

    def __len__(self) -> int:
        """Return how many requests have a deadline."""
        return len(self._open)

    def add(self, key: RequestKey, deadline: float) -> None:
        """Keep the deadline of a request that had none, clock seconds."""
        if len(self._heap) >= self._most:
            self._heap = [entry for entry in self._heap if entry[1] in self._open]
            heapq.heapify(self._heap)
            self._most = max(_LEAST_KEPT, 2 * len(self._heap))
        self._open[key] = deadline
        heapq.heappush(self._heap, (deadline, key))

    def remove(self, key: RequestKey) -> None:
        """Forget the deadline of a request, if it has one; it is never added again."""
        self._open.pop(key, None)

    def next(self) -> float | None:
        """Return the nearest deadline, clock seconds, or None."""
        while self._heap and self._heap[0][1] not in self._open:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def take_due(self, *, now: float) -> list[RequestKey]:
        """Return the requests that have timed out, nearest deadline first, and forget them."""
        due = []
        while (at := self.next()) is not None and at <= now:
            due.append(heapq.heappop(self._heap)[1])
            del self._open[due[-1]]
        return due

    def validate(self, timed: Iterable[RequestKey]) -> None:
        """Assert that these requests have a deadline and no others, and that few are kept.

        Args:
            timed: the requests that have not ended and have a deadline.
        """
        assert set(self._open) == set(timed)
        assert {entry[1]: entry[0] for entry in self._heap if entry[1] in self._open} == self._open
        assert len(self._heap) <= self._most
