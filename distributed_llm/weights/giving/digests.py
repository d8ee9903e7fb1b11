"""The SHA-256 of every tensor of a file, computed once and remembered as long as the file stays.

Hashing takes seconds per 10 GB. What was computed is kept in a file of JSON per file of weights,
and is used again while size, time of change and inode of that are the same.
"""

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec

from distributed_llm.common.messages import Sha256
from distributed_llm.common.model_files import ends_early, unreadable
from distributed_llm.weights.giving.shelf import Place

logger = logging.getLogger(__name__)

_PIECE_BYTES = 4 << 20
_MAX_KEPT_BYTES = 64 << 20

_Number = Annotated[int, msgspec.Meta(ge=0)]


class _Stamp(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What tells that a file is still the one that was hashed."""

    size: _Number
    changed_ns: _Number
    inode: _Number


class _Kept(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is remembered of a file.

    Attributes:
        sha256: of its tensors, by "OFFSET+NBYTES".
    """

    file: str
    stamp: _Stamp
    sha256: dict[str, Sha256]


class FileDigests:
    """The digests of the tensors in one file of weights.

    Args:
        file: of weights.
        folder: that keeps what was computed.

    Raises:
        CheckpointError: there is no such file, or it cannot be read.
    """

    def __init__(self, file: Path, folder: Path) -> None:
        self._file = file.resolve()
        name = hashlib.sha256(os.fsencode(self._file)).hexdigest()[:32]
        self._path = folder / f"{name}.json"
        self._stamp = self._stamp_now()
        self._sha256 = self._kept()
        self._changed = False

    def of(self, name: str, place: Place, on_read: Callable[[int], None]) -> str:
        """Return the SHA-256 of a tensor's bytes in the file, in hexadecimal.

        Args:
            name: of the tensor, for messages.
            place: of the tensor.
            on_read: called with the bytes of each piece that was read.

        Raises:
            CheckpointError: the file cannot be read, or ends before the tensor does.
        """
        key = f"{place.offset}+{place.nbytes}"
        if key not in self._sha256:
            self._sha256[key] = self._hashed(name, place, on_read)
            self._changed = True
        return self._sha256[key]

    def keep(self) -> None:
        """Remember what was computed, if the file has not changed meanwhile."""
        if not self._changed or self._stamp_now() != self._stamp:
            return
        content = msgspec.json.encode(_Kept(str(self._file), self._stamp, self._sha256))
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._path.parent, delete=False) as new:
                new.write(content)
            os.replace(new.name, self._path)
        except OSError as exc:  # it is computed again next time
            logger.warning("cannot remember the digests of %s: %s", self._file, exc)
        self._changed = False

    def _stamp_now(self) -> _Stamp:
        try:
            now = self._file.stat()
        except OSError as exc:
            raise unreadable(self._file, exc) from exc
        return _Stamp(now.st_size, max(0, now.st_mtime_ns), now.st_ino)

    def _kept(self) -> dict[str, str]:
        try:
            if self._path.stat().st_size > _MAX_KEPT_BYTES:
                return {}
            kept = msgspec.json.decode(self._path.read_bytes(), type=_Kept)
        except (OSError, ValueError, RecursionError):  # none yet, or a broken one
            return {}
        if kept.file != str(self._file) or kept.stamp != self._stamp:
            return {}
        return dict(kept.sha256)

    def _hashed(self, name: str, place: Place, on_read: Callable[[int], None]) -> str:
        digest = hashlib.sha256()
        left = place.nbytes
        try:
            with open(self._file, "rb", buffering=0) as file:
                file.seek(place.offset)
                while left:
                    piece = file.read(min(left, _PIECE_BYTES))
                    if not piece:
                        raise ends_early(self._file, name)
                    digest.update(piece)
                    on_read(len(piece))
                    left -= len(piece)
        except OSError as exc:
            raise unreadable(self._file, exc) from exc
        return digest.hexdigest()
