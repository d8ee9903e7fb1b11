"""The disk's side of a fetch: a thread that reads and hashes, and the files that are written."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from distributed_llm.common.errors import CheckpointError, internal_error
from distributed_llm.common.tensors import Frame
from distributed_llm.weights.arrivals import FetchFailed, not_wanted
from distributed_llm.weights.cache.content_cache import ContentCache
from distributed_llm.weights.cache.partial import Partial
from distributed_llm.weights.fetching.events import (
    TensorBusy,
    TensorClaimed,
    TensorHere,
    TensorStored,
    TensorWrong,
)
from distributed_llm.weights.giving.shelf import Place
from distributed_llm.weights.wrong_bytes import GrainRecord

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


@dataclass
class Entry:
    """A tensor that is being fetched.

    Attributes:
        nbytes: its size.
        names: of the tensors of the model that have these bytes.
        partial: its file, once it is claimed.
        early: bytes that came before others that belong in front of them, by offset.
        record: who gave which bytes.
        stored: whether it is in the cache.
    """

    nbytes: int
    names: list[str]
    partial: Partial | None = None
    early: dict[int, Frame] = field(default_factory=dict)
    record: GrainRecord = field(default_factory=GrainRecord)
    stored: bool = False


class FetchDisk:
    """The tensors of one fetch in the cache of this machine; used in one event loop.

    What the disk refuses is told to `fail`.

    Args:
        cache: that gets the tensors.
        on_read: called with bytes that were read, in any thread.
        fail: called with why nothing more can be written.

    Attributes:
        entries: the tensors, by SHA-256.
        ending: whether nobody waits for what is read any more; set in any thread.
    """

    def __init__(
        self,
        cache: ContentCache,
        on_read: Callable[[int], None],
        fail: Callable[[CheckpointError], None],
    ) -> None:
        self.entries: dict[str, Entry] = {}
        self.ending = False
        self._cache = cache
        self._on_read = on_read
        self._fail = fail
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cache")

    @property
    def stored_bytes(self) -> int:
        """Bytes of the tensors that are in the cache."""
        return sum(entry.nbytes for entry in self.entries.values() if entry.stored)

    def place(self, sha256: str) -> Place:
        """Return where a tensor is once it is in the cache."""
        return Place(self._cache.path(sha256), 0, self.entries[sha256].nbytes)

    def close(self) -> None:
        """Wait for what is being done, do no more, and keep what was written."""
        self.ending = True
        self._thread.shutdown(wait=True, cancel_futures=True)
        for entry in self.entries.values():
            if entry.partial:
                entry.partial.close()

    # -------------------------------------------------------------- what comes

    def keep(self, sha256: str, source: str, offset: int, data: Frame) -> None:
        """Keep bytes that a source gave, until `write` writes them."""
        entry = self.entries[sha256]
        entry.early[offset] = data
        entry.record.gave(source, offset, len(data))

    def write(self, sha256: str) -> int | None:
        """Write what has come of a tensor, as far as nothing is missing before it.

        Returns:
            Bytes that its file has now; None if it got none.
        """
        entry = self.entries[sha256]
        partial = entry.partial
        if partial is None or partial.done_bytes not in entry.early:
            return None
        try:
            while (data := entry.early.pop(partial.done_bytes, None)) is not None:
                partial.write(memoryview(data))
        except CheckpointError as exc:  # the disk is full
            self._fail(exc)
            return None
        return partial.done_bytes

    def forget(self, sha256: str) -> None:
        """Drop all that has come of a tensor."""
        entry = self.entries[sha256]
        entry.early.clear()
        entry.record.forget()
        if entry.partial:
            try:
                entry.partial.restart()
            except CheckpointError as exc:
                self._fail(exc)

    # -------------------------------------------------------------- in the thread

    def job(self, work: Callable[[], _T], done: Callable[[_T], None]) -> None:
        """Do `work` in the thread, after what was given before; call `done` with the result."""
        with contextlib.suppress(RuntimeError):  # it is closed
            job = asyncio.get_running_loop().run_in_executor(self._thread, work)
            job.add_done_callback(lambda job: self._job_done(job, done))

    def claim(
        self, sha256: str, done: Callable[[TensorClaimed | TensorBusy | TensorHere], None]
    ) -> None:
        """See whether a tensor is in the cache or written by another process; else take it."""
        self.job(lambda: self._claimed(sha256), done)

    def check(self, sha256: str, done: Callable[[TensorStored | TensorWrong], None]) -> None:
        """Hash a tensor, whose bytes are all in its file, and put it in the cache."""
        self.job(lambda: self._checked(sha256), done)

    def _job_done(self, job: asyncio.Future[_T], done: Callable[[_T], None]) -> None:
        if job.cancelled():
            return
        error = job.exception()
        if error is None:
            done(job.result())
        elif isinstance(error, CheckpointError):
            self._fail(error)
        else:
            logger.error("fetching weights cannot go on", exc_info=error)
            self._fail(FetchFailed(str(internal_error(error))))

    def _claimed(self, sha256: str) -> TensorClaimed | TensorBusy | TensorHere:
        entry = self.entries[sha256]
        is_here = self._cache.has(sha256, entry.nbytes)
        if is_here and self._cache.check(sha256, entry.nbytes, self._read):
            return TensorHere(sha256)
        entry.partial = self._cache.begin(sha256, entry.nbytes, self._read)
        if entry.partial is None:
            return TensorBusy(sha256)
        return TensorClaimed(sha256, entry.partial.done_bytes)

    def _checked(self, sha256: str) -> TensorStored | TensorWrong:
        entry = self.entries[sha256]
        partial = entry.partial
        assert partial is not None
        if not partial.is_right:
            entry.record.was_wrong(partial.path)
            partial.restart()
            return TensorWrong(sha256)
        partial.finish()
        return TensorStored(sha256, entry.record.suspects(self._cache.path(sha256)))

    def _read(self, nbytes: int) -> None:
        """Count bytes that were read.

        Raises:
            FetchFailed: nobody waits for them any more.
        """
        if self.ending:
            raise not_wanted()
        self._on_read(nbytes)
