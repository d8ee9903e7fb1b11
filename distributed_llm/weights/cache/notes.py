"""Notes of a cache: for people, which entries belong to which model."""

import contextlib
import hashlib
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

logger = logging.getLogger(__name__)

_MAX_NOTE_BYTES = 64 << 20


class Note(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is remembered of a model.

    Attributes:
        name: of the model, as people know it.
        tensors: sizes of its entries by their names, bytes.
        noted_at: seconds since 1970.
    """

    name: str
    tensors: dict[str, int]
    noted_at: float


class Notes:
    """The notes of one cache, each in a file of its own.

    Args:
        folder: of the files; made when the first one is written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, note: Note) -> None:
        """Remember the entries of a model, in place of what was remembered of it.

        Raises:
            OSError: the file cannot be written.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        handle, written = tempfile.mkstemp(dir=self._folder, prefix=".new-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(msgspec.json.encode(note))
            with contextlib.suppress(PermissionError):  # Windows, while it is read: the next time
                os.replace(written, self._path(note.name))
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(written)

    def read(self) -> Iterator[Note]:
        """Yield each note; damaged ones are deleted, and what cannot be read is passed over."""
        for path in sorted(self._folder.glob("*.json")):
            try:
                with path.open("rb") as file:
                    yield msgspec.json.decode(file.read(_MAX_NOTE_BYTES), type=Note)
            except OSError as exc:  # deleted just now, or of another user
                logger.debug("%s is passed over: %s", path, exc)
            except msgspec.DecodeError as exc:
                logger.warning("%s is damaged (%s) and is deleted", path, exc)
                with contextlib.suppress(OSError):
                    path.unlink()

    def delete(self, name: str) -> None:
        """Forget what was remembered of a model."""
        with contextlib.suppress(OSError):
            self._path(name).unlink()

    def _path(self, name: str) -> Path:
        plain = re.sub(r"[^A-Za-z0-9.-]+", "_", name)[-80:]
        return self._folder / f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:12]}.json"
