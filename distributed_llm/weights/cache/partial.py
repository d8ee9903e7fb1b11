"""An entry of a cache while it is written: by one at a time, resumable, checked in the end."""

import contextlib
import hashlib
import os
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

from filelock import BaseFileLock, FileLock, Timeout

from distributed_llm.common.errors import CheckpointUnavailable, WrongContent
from distributed_llm.common.wording import count_text
from distributed_llm.weights.cache.disk_errors import storing
from distributed_llm.weights.cache.places import Places

_CHUNK_BYTES = 1 << 20


def claim(places: Places, sha256: str) -> BaseFileLock | None:
    """Return the exclusive right to an entry that is not complete; None if somebody else has it.

    The right of a process that ends, however it ends, is free again.

    Raises:
        OSError: the lock cannot be made.
    """
    path = places.lock(sha256)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    return lock


def give_up(lock: BaseFileLock) -> None:
    """Give up the right to an entry, and delete the file that stands for it.

    It is deleted while it is locked: whoever opened it before finds that it has no name any more,
    and that what it locked is nothing. (Windows refuses, and filelock deletes it afterwards.)
    """
    with contextlib.suppress(OSError):
        os.unlink(lock.lock_file)
    lock.release()


def hash_file(file: FileIO, on_read: Callable[[int], None]) -> "hashlib._Hash":
    """Return the SHA-256 of the rest of a file.

    Args:
        file: to read.
        on_read: is told after each piece how many bytes it had.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    piece = memoryview(bytearray(_CHUNK_BYTES))
    while count := file.readinto(piece):
        digest.update(piece[:count])
        on_read(count)
    return digest


class Partial:
    """The exclusive right to write one entry of a cache, for one thread at a time.

    It holds until `finish`, `close` or the end of the process. What was written is kept, to be
    resumed, unless it is wrong.

    Args:
        places: of the cache.
        sha256: name of the entry.
        nbytes: size of the entry.
        lock: the claim to it, which is given up at the end; by the caller if this raises.
        clock: returns seconds since 1970.
        on_read: is told how many bytes of what an earlier attempt left were just read.

    Attributes:
        done_bytes: how many bytes are written; at first, what an earlier attempt left.

    Raises:
        CheckpointError: the file cannot be written.
    """

    def __init__(
        self,
        places: Places,
        sha256: str,
        nbytes: int,
        lock: BaseFileLock,
        clock: Callable[[], float],
        on_read: Callable[[int], None],
    ) -> None:
        self._places = places
        self._sha256 = sha256
        self._nbytes = nbytes
        self._lock = lock
        self._clock = clock
        self._path = places.part(sha256)
        with storing(places.folder, nbytes):
            places.parts.mkdir(parents=True, exist_ok=True)
            self._file = FileIO(self._path, "a+")
            try:
                if os.fstat(self._file.fileno()).st_size > nbytes:
                    self._file.truncate(0)
                self._file.seek(0)
                self._digest = hash_file(self._file, on_read)
                self.done_bytes = self._file.tell()
            except BaseException:
                self._file.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def write(self, data: memoryview | bytes) -> None:
        """Append `data`, which follows the first `done_bytes` bytes of the entry.

        Raises:
            WrongContent: the entry is shorter. What was written is deleted, and the right given up.
            CheckpointUnavailable: the disk is full or fails; `done_bytes` says what was written.
        """
        left = memoryview(data)
        if self.done_bytes + len(left) > self._nbytes:
            self._refuse(f"more than {count_text(self._nbytes, 'byte')} came")
        while left:
            with storing(self._places.folder, self._nbytes - self.done_bytes):
                count = self._file.write(left)
            self._digest.update(left[:count])
            self.done_bytes += count
            left = left[count:]

    @property
    def path(self) -> Path:
        """The file that is written."""
        return self._path

    @property
    def is_right(self) -> bool:
        """Whether all is written, and is what the name of the entry says."""
        return self.done_bytes == self._nbytes and self._digest.hexdigest() == self._sha256

    def restart(self) -> None:
        """Drop what was written; the right to the entry still holds.

        Raises:
            CheckpointError: the file cannot be written.
        """
        with storing(self._places.folder):
            self._file.truncate(0)
        self._digest, self.done_bytes = hashlib.sha256(), 0

    def finish(self) -> None:
        """Make what was written a complete entry, on the disk even if the power fails.

        The right is given up in any case.

        Raises:
            WrongContent: it is not what its name says. It is deleted.
            CheckpointError: it cannot be put in its place.
        """
        if self.done_bytes != self._nbytes:
            self._refuse(f"{self.done_bytes:,} of {count_text(self._nbytes, 'byte')} came")
        if self._digest.hexdigest() != self._sha256:
            self._refuse("its SHA-256 is another")
        entry = self._places.entry(self._sha256)
        try:
            with storing(self._places.folder):
                os.fsync(self._file.fileno())
                self._file.close()  # Windows renames no file that is open
                now = self._clock()
                os.utime(self._path, (now, now))
                entry.parent.mkdir(parents=True, exist_ok=True)
                _move(self._path, entry, self._nbytes)
        finally:
            self.close()

    def close(self) -> None:
        """Give the right up, and keep what was written; nothing after the first time."""
        with contextlib.suppress(OSError):  # of a share: what is missing is found by who resumes
            self._file.close()
        if self._lock.is_locked:
            give_up(self._lock)

    def _refuse(self, why: str) -> NoReturn:
        """Delete what was written, give the right up and raise."""
        with contextlib.suppress(OSError):
            self._file.truncate(0)  # in case that it cannot be deleted, as it can be open elsewhere
        with contextlib.suppress(OSError):
            self._file.close()
            self._path.unlink()
        self.close()
        raise WrongContent(
            f"What came for the weights {self._sha256} is something else: {why}. It was deleted; "
            "fetch it again, from another machine if it comes from the same one each time."
        )


def _move(part: Path, entry: Path, nbytes: int) -> None:
    """Rename `part` to `entry`, in place of what is there.

    Windows refuses while somebody has one of them open. What is there is the same if it is as
    large: a damaged entry has another size once that is found (`ContentCache.check`).

    Raises:
        CheckpointUnavailable: the system refuses.
    """
    try:
        os.replace(part, entry)
    except PermissionError as exc:
        if not entry.is_file() or entry.stat().st_size != nbytes:
            raise CheckpointUnavailable(
                f"{part} cannot be renamed to {entry}: {exc.strerror or exc}. Either another "
                "program has one of them open (try again when it has ended), or they belong to "
                "another user (make them yours). What was fetched is kept."
            ) from exc
        part.unlink()
