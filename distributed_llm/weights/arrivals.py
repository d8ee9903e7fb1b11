"""The tensors of one fetch on their way into the cache, and from there to threads that load.

What has come is written in the thread of the event loop, in the order of a tensor's bytes. Whatever
reads or hashes files, and so may take seconds, is done in a thread for that.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar, assert_never

from distributed_llm.common.errors import CheckpointError, FetchFailed, internal_error
from distributed_llm.common.tensors import Frame
from distributed_llm.weights.cache.content_cache import ContentCache
from distributed_llm.weights.cache.partial import Partial
from distributed_llm.weights.fetching.events import (
    Check,
    Claim,
    Forget,
    TensorBusy,
    TensorClaimed,
    TensorHere,
    TensorStored,
    TensorWrong,
    Written,
)
from distributed_llm.weights.giving.shelf import Place, Shelf
from distributed_llm.weights.wrong_bytes import GrainRecord

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

ArrivalEvent = TensorClaimed | TensorBusy | TensorHere | Written | TensorStored | TensorWrong
"""What the state machine of the fetch is told of tensors."""


def not_wanted() -> FetchFailed:
    """Return the error of who waits for weights that nobody wants any more."""
    return FetchFailed("The weights are not wanted any more.")


@dataclass
class _Entry:
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


class Arrivals:
    """The tensors of one fetch; to be used in one event loop, but for `wait_for`.

    Args:
        cache: that gets the tensors.
        shelf: that gets every tensor once it is there, for others to read.
        on_bytes: called with bytes that came or were read, in any thread.
        on_event: called with each event.
        on_error: called with what goes wrong.

    Attributes:
        error: why nothing comes any more; None while something may.
        placed_bytes: of the tensors that are where they can be read.
        fetched_bytes: that came from other machines.
    """

    def __init__(
        self,
        cache: ContentCache,
        shelf: Shelf,
        on_bytes: Callable[[int], None],
        *,
        on_event: Callable[[ArrivalEvent], None],
        on_error: Callable[[CheckpointError], None],
    ) -> None:
        self._cache = cache
        self._shelf = shelf
        self._on_bytes = on_bytes
        self._on_event = on_event
        self._on_error = on_error
        self._entries: dict[str, _Entry] = {}  # by SHA-256
        self._ready = threading.Condition()
        self._places: dict[str, Place] = {}
        self._lost: dict[str, str] = {}  # why, by name
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="cache")
        self._ending = False
        self.error: CheckpointError | None = None
        self.placed_bytes = 0
        self.fetched_bytes = 0

    # -------------------------------------------------------------- for threads that load

    def wait_for(self, name: str) -> Place:
        """Return where a tensor is, as soon as it is there; may be called in any thread.

        Raises:
            FetchFailed: it cannot be had.
            CheckpointError: this machine cannot store it.
        """
        with self._ready:
            self._ready.wait_for(
                lambda: name in self._places or name in self._lost or self.error is not None
            )
            if name in self._places:
                return self._places[name]
            if self.error is None:
                raise FetchFailed(self._lost[name])
            raise type(self.error)(str(self.error)) from self.error  # one for each thread

    def place(self, name: str, place: Place) -> None:
        """Let threads that load have a tensor."""
        with self._ready:
            self._places[name] = place
            self.placed_bytes += place.nbytes
            self._ready.notify_all()

    def lose(self, names: Iterable[str], why: str) -> None:
        """Let nobody wait for tensors that will not come."""
        with self._ready:
            self._lost.update(dict.fromkeys(names, why))
            self._ready.notify_all()

    def fail(self, error: CheckpointError) -> None:
        """Let nobody wait any more; nothing after the first time."""
        with self._ready:
            self.error = self.error or error
            self._ready.notify_all()

    # -------------------------------------------------------------- what is expected

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of all tensors that are expected or here, by SHA-256."""
        return {sha256: entry.nbytes for sha256, entry in self._entries.items()}

    @property
    def stored_bytes(self) -> int:
        """Bytes of those tensors that are in the cache, each once."""
        return sum(entry.nbytes for entry in self._entries.values() if entry.stored)

    def expects(self, sha256: str) -> bool:
        """Return whether a tensor is expected or here."""
        return sha256 in self._entries

    def expect(self, name: str, sha256: str, nbytes: int) -> bool:
        """Note that a tensor of the model has these bytes; return whether that is the first one.

        Raises:
            FetchFailed: another one has the same hash and another size.
        """
        entry = self._entries.get(sha256)
        if entry is None:
            self._entries[sha256] = _Entry(nbytes, [name])
            return True
        if entry.nbytes != nbytes:
            raise FetchFailed(
                f"What the coordinator says of the weights is wrong: {name} and {entry.names[0]} "
                "cannot be the same bytes"
            )
        entry.names.append(name)
        if entry.stored:
            self.place(name, Place(self._cache.path(sha256), 0, nbytes))
        return False

    @property
    def missing(self) -> dict[str, int]:
        """The sizes of those that are not known to be in the cache, by SHA-256."""
        return {sha256: one.nbytes for sha256, one in self._entries.items() if not one.stored}

    # -------------------------------------------------------------- what comes

    def keep(self, source: str, sha256: str, offset: int, data: Frame) -> None:
        """Keep bytes that have just come, until those before them are written."""
        entry = self._entries[sha256]
        self.fetched_bytes += len(data)
        self._on_bytes(len(data))
        entry.early[offset] = data
        entry.record.gave(source, offset, len(data))

    def write(self, sha256: str) -> None:
        """Write what has come of a tensor, as far as nothing is missing before it."""
        entry = self._entries[sha256]
        partial = entry.partial
        if partial is None or partial.done_bytes not in entry.early:
            return
        try:
            while (data := entry.early.pop(partial.done_bytes, None)) is not None:
                partial.write(memoryview(data))
        except CheckpointError as exc:  # the disk is full
            self._on_error(exc)
            return
        self._on_event(Written(sha256, partial.done_bytes))

    def perform(self, action: Claim | Forget | Check) -> None:
        """Do what the state machine orders about a tensor."""
        match action:
            case Claim(sha256=sha256):
                self.disk_job(lambda: self._claimed(sha256), self._done)
            case Check(sha256=sha256):
                self.disk_job(lambda: self._checked(sha256), self._done)
            case Forget(sha256=sha256):
                self._forget(self._entries[sha256])
            case _:
                assert_never(action)

    def _forget(self, entry: _Entry) -> None:
        entry.early.clear()
        entry.record.forget()
        if entry.partial:
            try:
                entry.partial.restart()
            except CheckpointError as exc:
                self._on_error(exc)

    def _done(
        self, event: TensorClaimed | TensorBusy | TensorHere | TensorStored | TensorWrong
    ) -> None:
        if isinstance(event, TensorHere | TensorStored):
            self._stored(event.sha256)
        self._on_event(event)

    def _stored(self, sha256: str) -> None:
        """Let threads that load, and other machines, have a tensor that is in the cache now."""
        entry = self._entries[sha256]
        entry.stored, entry.partial = True, None
        place = Place(self._cache.path(sha256), 0, entry.nbytes)
        self._shelf.put(sha256, place)
        for name in entry.names:
            self.place(name, place)

    # -------------------------------------------------------------- in the thread for the disk

    def disk_job(self, work: Callable[[], _T], done: Callable[[_T], None]) -> None:
        """Do `work` in the thread for the disk, and call `done` here with what it returns."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(RuntimeError):  # it has ended
            job = loop.run_in_executor(self._disk, work)
            job.add_done_callback(lambda job: self._job_done(job, done))

    def _job_done(self, job: asyncio.Future[_T], done: Callable[[_T], None]) -> None:
        if job.cancelled():
            return
        error = job.exception()
        if error is None:
            done(job.result())
        elif isinstance(error, CheckpointError):
            self._on_error(error)
        else:
            logger.error("fetching weights cannot go on", exc_info=error)
            self._on_error(FetchFailed(str(internal_error(error))))

    def _claimed(self, sha256: str) -> TensorClaimed | TensorBusy | TensorHere:
        entry = self._entries[sha256]
        if self._cache.has(sha256, entry.nbytes) and self._cache.check(
            sha256, entry.nbytes, self._read_here
        ):
            return TensorHere(sha256)
        entry.partial = self._cache.begin(sha256, entry.nbytes, self._read_here)
        if entry.partial is None:
            return TensorBusy(sha256)
        return TensorClaimed(sha256, entry.partial.done_bytes)

    def _checked(self, sha256: str) -> TensorStored | TensorWrong:
        entry = self._entries[sha256]
        partial = entry.partial
        assert partial is not None
        if not partial.is_right:
            entry.record.was_wrong(partial.path)
            partial.restart()
            return TensorWrong(sha256)
        partial.finish()
        return TensorStored(sha256, entry.record.suspects(self._cache.path(sha256)))

    def _read_here(self, nbytes: int) -> None:
        """Count bytes that were read from the disk.

        Raises:
            FetchFailed: nobody waits for them any more.
        """
        if self._ending:
            raise not_wanted()
        self._on_bytes(nbytes)

    # -------------------------------------------------------------- the end

    def end(self) -> None:
        """Have the thread for the disk end soon; may be called in any thread."""
        self._ending = True

    def close(self) -> None:
        """Wait for the thread for the disk, and give up the right to what is not complete."""
        self._ending = True
        self._disk.shutdown(wait=True, cancel_futures=True)  # while it can still report here

    def give_up(self) -> None:
        """Give the right to write up; what came is kept."""
        for entry in self._entries.values():
            if entry.partial:
                entry.partial.close()
