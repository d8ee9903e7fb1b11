"""Where a cache of weights keeps what: entries, parts of them, locks and notes."""

import re
from dataclasses import dataclass
from pathlib import Path

_DIGEST = re.compile(r"[0-9a-f]{64}")


def is_digest(name: str) -> bool:
    """Return whether `name` is a SHA-256 as this package writes it: 64 digits, small letters."""
    return _DIGEST.fullmatch(name) is not None


@dataclass(frozen=True)
class Places:
    """The folders and files of one cache. Every name of a file is checked before it is made.

    Attributes:
        folder: of the cache.
    """

    folder: Path

    @property
    def entries(self) -> Path:
        """The folder of complete entries, in folders by the first byte of their names."""
        return self.folder / "tensors"

    @property
    def parts(self) -> Path:
        """The folder of entries that are being written, or were begun."""
        return self.folder / "partial"

    @property
    def notes(self) -> Path:
        """The folder of what is remembered of models."""
        return self.folder / "models"

    def entry(self, sha256: str) -> Path:
        """Return where an entry is once it is complete."""
        return self.entries / _checked(sha256)[:2] / sha256

    def part(self, sha256: str) -> Path:
        """Return where an entry is while it is written."""
        return self.parts / _checked(sha256)

    def lock(self, sha256: str) -> Path:
        """Return the file that whoever writes an entry has locked."""
        return self.folder / "locks" / f"{_checked(sha256)}.lock"

    @property
    def lock_of_notes(self) -> Path:
        """The file that whoever changes what is remembered of models has locked."""
        return self.folder / "locks" / "models.lock"


def _checked(sha256: str) -> str:
    """Return `sha256`, which may come from another machine and becomes the name of a file.

    Raises:
        ValueError: it is something else.
    """
    if not is_digest(sha256):
        raise ValueError(f"{sha256!r:.80} is not a SHA-256 in 64 small hexadecimal digits")
    return sha256
