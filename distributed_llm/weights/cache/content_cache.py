"""Weights on this machine's disk by their content: each tensor in a file named by its SHA-256."""

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from distributed_llm.common.errors import CheckpointUnavailable, ConfigError
from distributed_llm.common.model_files import unreadable
from distributed_llm.common.wording import size_text
from distributed_llm.weights.cache.contents import Contents, contents_of
from distributed_llm.weights.cache.disk_errors import storing
from distributed_llm.weights.cache.eviction import ABANDONED_S, Kept, Room, in_order
from distributed_llm.weights.cache.notes import Note, Notes
from distributed_llm.weights.cache.partial import Partial, claim, give_up, hash_file
from distributed_llm.weights.cache.places import Places, is_digest

logger = logging.getLogger(__name__)

_NOTES_WAIT_S = 2.0
"""Time for which another process may keep this one from writing a note, seconds."""


def _unheard(nbytes: int) -> None:
    """Take no notice of bytes that were read."""


@dataclass(frozen=True)
class Pruned:
    """What was deleted.

    Attributes:
        freed_bytes: of the files that are gone.
        left_bytes: of files that should have gone: they are written or read, or this user may not.
    """

    freed_bytes: int
    left_bytes: int


class ContentCache:
    """The weights that a user's workers keep on this machine, all in one folder.

    Any number of processes and threads may use it at the same time. An entry is there whole or not
    at all, but another process may delete it at any time to make room: whoever opens the file at
    `path` has it from then on (Windows does not delete it meanwhile).

    All names of entries are SHA-256s in hexadecimal; others raise ValueError.

    Args:
        folder: of the cache; made when something is written.
        limit_bytes: what its files may take together; None is as much as the disk has room for.
        clock: returns seconds since 1970.
    """

    def __init__(
        self, folder: Path, limit_bytes: int | None, *, clock: Callable[[], float] = time.time
    ) -> None:
        self.folder = folder
        self._limit_bytes = limit_bytes
        self._clock = clock
        self._places = Places(folder)
        self._notes = Notes(self._places.notes)

    # ------------------------------------------------------------------ entries

    def path(self, sha256: str) -> Path:
        """Return where an entry is once it is complete."""
        return self._places.entry(sha256)

    def has(self, sha256: str, nbytes: int) -> bool:
        """Return whether a complete entry of this size is there. `check` says if it is right."""
        path = self.path(sha256)
        try:
            return path.is_file() and path.stat().st_size == nbytes
        except OSError:
            return False

    def check(self, sha256: str, nbytes: int, on_read: Callable[[int], None] = _unheard) -> bool:
        """Return whether an entry is there and is what its name says; it counts as used then.

        Reads all of it. An entry that is damaged is deleted.

        Args:
            sha256: name of the entry.
            nbytes: its size.
            on_read: is told after each piece how many bytes were read.

        Raises:
            CheckpointError: it cannot be read; or it is damaged, and cannot be deleted.
        """
        path = self.path(sha256)
        try:
            with path.open("rb", buffering=0) as file:
                right = os.fstat(file.fileno()).st_size == nbytes
                right = right and hash_file(file, on_read).hexdigest() == sha256
        except FileNotFoundError:
            return False
        except OSError as exc:
            raise unreadable(path, exc) from exc
        if right:
            with contextlib.suppress(OSError):  # in a folder that is only read, it need not count
                now = self._clock()
                os.utime(path, (now, now))
            return True
        logger.warning("%s is damaged and is deleted; it is fetched again when it is needed", path)
        with storing(self.folder):
            try:
                path.unlink(missing_ok=True)
            except PermissionError:  # Windows, while somebody has it open
                os.truncate(path, 0)
        return False

    def begin(
        self, sha256: str, nbytes: int, on_read: Callable[[int], None] = _unheard
    ) -> Partial | None:
        """Take the exclusive right to write an entry, and read what an earlier attempt left of it.

        Args:
            sha256: name of the entry.
            nbytes: its size.
            on_read: is told after each piece how many bytes were read.

        Returns:
            None if somebody on this machine writes it now, or it is complete meanwhile: look with
            `has`, and try again.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        with storing(self.folder, nbytes):
            lock = claim(self._places, sha256)
        if lock is None:
            return None
        try:
            if not self.has(sha256, nbytes):
                return Partial(self._places, sha256, nbytes, lock, self._clock, on_read)
        except BaseException:
            give_up(lock)
            raise
        give_up(lock)
        return None

    # ------------------------------------------------------------------ room

    def make_room(self, nbytes: int, keep: Collection[str]) -> None:
        """Delete entries until `nbytes` more fit the limit and the disk.

        Least lately used ones go first; before them what was begun and abandoned. It looks at every
        file, so call it once for many entries. What other processes are about to write is not
        known, so together they may go beyond the limit.

        Args:
            nbytes: what is to be written, besides what is there.
            keep: names of entries that stay, begun ones among them.

        Raises:
            CheckpointUnavailable: there is too little room in any case. Unless files turn out to be
                in use only then, nothing is deleted.
            CheckpointError: the folder cannot be read.
        """
        with storing(self.folder):
            kept = list(self._kept())
            disk = shutil.disk_usage(_nearest(self.folder))
            used = sum(one.nbytes for one in kept)
            room = Room(used, self._limit_bytes, disk.free, disk.total)
            may_go = in_order(kept, keep, self._clock())
        lacking = room.lacking_bytes(nbytes)
        if (deletable := sum(one.nbytes for one in may_go)) >= lacking:
            deletable = self._delete(may_go, lacking).freed_bytes
            if deletable:
                logger.info("deleted %s of weights to make room", size_text(deletable))
        if deletable < lacking:
            raise CheckpointUnavailable(f"{self.folder}: {room.refusal(nbytes, deletable)}")

    def clear(self) -> Pruned:
        """Delete everything but what a living process writes.

        Raises:
            CheckpointError: the folder cannot be read.
        """
        with storing(self.folder):
            pruned = self._delete(self._kept())
            self._forget_what_is_gone(noted_before=self._clock())
        return pruned

    def shrink_to(self, nbytes: int) -> Pruned:
        """Delete entries, least lately used first, until all files take `nbytes` at most.

        What a living process writes stays.

        Raises:
            CheckpointError: the folder cannot be read.
        """
        with storing(self.folder):
            kept = list(self._kept())
            beyond = sum(one.nbytes for one in kept) - nbytes
            pruned = self._delete(in_order(kept, (), self._clock()), beyond)
            self._forget_what_is_gone(noted_before=self._clock())
        return pruned

    def forget_model(self, name: str) -> Pruned:
        """Delete the entries of a model that belong to no other one.

        What a living process writes stays.

        Raises:
            ConfigError: no such model was noted.
            CheckpointError: the folder cannot be read.
        """
        with storing(self.folder):
            models = {note.name: note.tensors for note in self._notes.read()}
            if name not in models:
                raise ConfigError(
                    f"No weights of a model {name!r} are kept in {self.folder}; `dllm cache list` "
                    "shows of which there are."
                )
            own = models.pop(name).keys() - {key for tensors in models.values() for key in tensors}
            pruned = self._delete(one for one in self._kept() if one.sha256 in own)
            self._notes.delete(name)
        return pruned

    def _delete(self, files: Iterable[Kept], nbytes: int | None = None) -> Pruned:
        """Delete files in their order until `nbytes` of them are gone; None is all of them."""
        freed = left = 0
        for one in files:
            if nbytes is not None and freed >= nbytes:
                break
            if self._delete_one(one):
                freed += one.nbytes
            else:
                left += one.nbytes
        return Pruned(freed, left)

    def _delete_one(self, file: Kept) -> bool:
        """Return whether a file is gone; one that is written, or that Windows protects, is not."""
        try:
            if not file.is_part:
                self.path(file.sha256).unlink(missing_ok=True)
                return True
            lock = claim(self._places, file.sha256)
            if lock is None:
                return False
            try:
                self._places.part(file.sha256).unlink(missing_ok=True)
            finally:
                give_up(lock)
        except OSError as exc:
            logger.debug("%s stays: %s", file.sha256, exc)
            return False
        return True

    def _kept(self) -> Iterator[Kept]:
        """Yield all files that are entries or parts of entries, in no order."""
        for shelf in _listed(self._places.entries):
            if shelf.is_dir():  # file managers leave files of their own
                yield from _files_in(Path(shelf.path), is_part=False)
        yield from _files_in(self._places.parts, is_part=True)

    # ------------------------------------------------------------------ models

    def note_model(self, name: str, tensors: Mapping[str, int]) -> None:
        """Remember for people which entries belong to a model.

        What was remembered of it before stays as far as it is here: of other layers, or of an
        earlier version.

        Args:
            name: of the model, as people know it.
            tensors: sizes of those of its tensors that are kept or about to be, by their names.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        now = self._clock()
        with storing(self.folder), self._noting():
            here = {one.sha256 for one in self._kept()}
            noted = {note.name: note for note in self._notes.read()}
            self._forget_what_is_gone(noted_before=now - ABANDONED_S)
            before = noted[name].tensors if name in noted else {}
            still_here = {sha256: size for sha256, size in before.items() if sha256 in here}
            self._notes.write(Note(name, still_here | dict(tensors), now))

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        """Let nobody else change notes meanwhile, unless they take too long."""
        path = self._places.lock_of_notes
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, thread_local=False)
        with contextlib.suppress(Timeout):  # a stopped process has it; notes are for people only
            lock.acquire(timeout=_NOTES_WAIT_S)
        try:
            yield
        finally:
            if lock.is_locked:
                give_up(lock)

    def contents(self) -> Contents:
        """Return what is kept, by model.

        Raises:
            CheckpointError: the folder cannot be read.
        """
        with storing(self.folder):
            kept = list(self._kept())
            notes = list(self._notes.read())
        return contents_of(kept, notes)

    def _forget_what_is_gone(self, *, noted_before: float) -> None:
        """Forget the models of which nothing is here, unless they were noted since."""
        here = {one.sha256 for one in self._kept()}
        for note in self._notes.read():
            if note.noted_at < noted_before and here.isdisjoint(note.tensors):
                self._notes.delete(note.name)


def _listed(folder: Path) -> list[os.DirEntry[str]]:
    """Return what is in a folder; nothing if it is not there."""
    try:
        with os.scandir(folder) as found:
            return list(found)
    except FileNotFoundError:
        return []


def _files_in(folder: Path, *, is_part: bool) -> Iterator[Kept]:
    """Yield the files in a folder that are named as entries are."""
    for file in _listed(folder):
        if not is_digest(file.name):
            continue
        with contextlib.suppress(FileNotFoundError):  # deleted just now
            about = os.stat(file.path)
            yield Kept(file.name, about.st_size, about.st_mtime, is_part)


def _nearest(folder: Path) -> Path:
    """Return the folder, or if it is not there the nearest one above it that is."""
    return next((one for one in (folder, *folder.absolute().parents) if one.exists()), folder)
