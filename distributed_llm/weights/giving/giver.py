"""Answers workers that read weights: reads files in threads of its own, and paces what it sends.

The sockets are those of the coordinator and of workers, which go on with their work meanwhile:
their event loops only pass requests on, and send what was read. No more than `_MOST_READ` chunks
are in memory between a file and a socket; what sockets hold is bounded by the credits of readers.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from distributed_llm.common.errors import CheckpointError
from distributed_llm.common.messages import Chunk, NoChunk, ReadChunk, ToReader
from distributed_llm.common.tensors import Frame, frame_of_bytes
from distributed_llm.common.types import PeerId
from distributed_llm.weights.giving.shelf import Shelf

logger = logging.getLogger(__name__)

_THREADS = 2
_MOST_READ = 8
"""Chunks that are in memory here at most, before a socket has them."""

_MOST_ASKED = 64
"""Chunks that one peer may have asked for and not got; it is refused more."""

Answer = Callable[[PeerId, ToReader, tuple[Frame, ...]], None]
"""Sends an answer to a peer; called in the event loop's thread."""


class Giver:
    """Gives chunks of the tensors on a shelf; to be made and used in a running event loop.

    Args:
        shelf: what is given.
        answer: sends an answer to who asked.
        max_bytes_per_s: that are sent to all readers together; None is without limit.
    """

    def __init__(self, shelf: Shelf, answer: Answer, *, max_bytes_per_s: int | None) -> None:
        self._shelf = shelf
        self._answer = answer
        self._pace = Pace(max_bytes_per_s)
        self._loop = asyncio.get_running_loop()
        self._asked: Counter[PeerId] = Counter()
        self._room = threading.Semaphore(_MOST_READ)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="give")
        self._closed = False

    def asked(self, peer: PeerId, request: ReadChunk) -> None:
        """Answer a request, soon."""
        if self._closed:
            return
        if self._asked[peer] >= _MOST_ASKED:
            why = f"{_MOST_ASKED} chunks are on their way to this worker already."
            self._answer(peer, _none(request, "failed", why), ())
            return
        self._asked[peer] += 1
        self._threads.submit(self._read, peer, request)

    def close(self) -> None:
        """Answer nothing any more."""
        self._closed = True
        self._pace.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        for _ in range(_THREADS):
            self._room.release()

    def _read(self, peer: PeerId, request: ReadChunk) -> None:
        self._room.acquire()
        message, frames = self._chunk(request)
        if frames:
            self._pace.wait(request.length)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to answer
            self._loop.call_soon_threadsafe(self._send, peer, message, frames)

    def _chunk(self, request: ReadChunk) -> tuple[ToReader, tuple[Frame, ...]]:
        try:
            data = self._shelf.read(request.sha256, request.offset, request.length)
        except CheckpointError as exc:
            logger.warning("cannot give weights: %s", exc)
            return _none(request, "failed", str(exc)), ()
        if data is None:
            return _none(request, "absent", ""), ()
        spec, frame = frame_of_bytes(data)
        return Chunk(sha256=request.sha256, offset=request.offset, tensors=(spec,)), (frame,)

    def _send(self, peer: PeerId, message: ToReader, frames: tuple[Frame, ...]) -> None:
        self._room.release()
        self._asked[peer] -= 1
        if not self._asked[peer]:
            del self._asked[peer]
        if not self._closed:
            self._answer(peer, message, frames)


def _none(request: ReadChunk, reason: Literal["absent", "failed"], message: str) -> NoChunk:
    return NoChunk(sha256=request.sha256, offset=request.offset, reason=reason, message=message)


class Pace:
    """Keeps threads that send to a number of bytes per second together.

    Args:
        max_bytes_per_s: None is without limit.
    """

    def __init__(self, max_bytes_per_s: int | None) -> None:
        self._max_bytes_per_s = max_bytes_per_s
        self._lock = threading.Lock()
        self._free_at = 0.0
        self._closed = threading.Event()

    def wait(self, nbytes: int) -> None:
        """Return when so many bytes may be sent."""
        if self._max_bytes_per_s is None:
            return
        with self._lock:
            now = time.monotonic()
            start = max(now, self._free_at)
            self._free_at = start + nbytes / self._max_bytes_per_s
        self._closed.wait(start - now)

    def close(self) -> None:
        """Let nobody wait any more."""
        self._closed.set()
