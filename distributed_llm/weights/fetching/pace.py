"""How fast bytes may come, and how fast they do: a token bucket and a meter. Pure."""

import math
from collections import deque

from distributed_llm.common.messages import MAX_CHUNK_BYTES
from distributed_llm.weights.fetching.events import GRAIN_BYTES

_CHUNKS_PER_S = 8
"""Chunks in a second, where a limit is so low that chunks are made smaller for it."""

_METER_S = 3.0
"""Seconds over which the meter averages."""

_SLOT_S = 0.25


class TokenBucket:
    """Keeps to a number of bytes per second. It is full after a pause, with one chunk.

    Args:
        max_bytes_per_s: above 0; None is without limit.

    Attributes:
        chunk_bytes: that a chunk should have at most, a multiple of `GRAIN_BYTES`.
    """

    def __init__(self, max_bytes_per_s: float | None) -> None:
        self._max_bytes_per_s = max_bytes_per_s
        self._tokens = 0.0
        self._at = -math.inf
        self.chunk_bytes = MAX_CHUNK_BYTES
        if max_bytes_per_s is not None:
            grains = int(max_bytes_per_s / _CHUNKS_PER_S) // GRAIN_BYTES
            self.chunk_bytes = min(max(grains, 1) * GRAIN_BYTES, MAX_CHUNK_BYTES)

    def ready_at(self, nbytes: int, now: float) -> float:
        """Return when so many bytes may be asked for, clock seconds; `now` if at once.

        Args:
            nbytes: at most `chunk_bytes`.
            now: clock seconds.
        """
        if self._max_bytes_per_s is None:
            return now
        most = float(self.chunk_bytes)
        self._tokens = min(most, self._tokens + (now - self._at) * self._max_bytes_per_s)
        self._at = now
        missing = nbytes - self._tokens
        return now if missing < 1.0 else now + missing / self._max_bytes_per_s

    def take(self, nbytes: int) -> None:
        """Take so many bytes, which `ready_at` has allowed."""
        if self._max_bytes_per_s is not None:
            self._tokens -= nbytes


class RateMeter:
    """Bytes per second over the last seconds."""

    def __init__(self, now: float) -> None:
        self._began_at = now
        self._slots: deque[tuple[float, int]] = deque(maxlen=int(_METER_S / _SLOT_S) + 2)

    def add(self, nbytes: int, now: float) -> None:
        """Count bytes that came."""
        slot = now // _SLOT_S * _SLOT_S
        if self._slots and self._slots[-1][0] == slot:
            nbytes += self._slots.pop()[1]
        self._slots.append((slot, nbytes))

    def rate(self, now: float) -> float:
        """Return bytes per second."""
        since = now - _METER_S
        counted = sum(nbytes for slot, nbytes in self._slots if slot >= since)
        return counted / min(max(now - self._began_at, _SLOT_S), _METER_S)
