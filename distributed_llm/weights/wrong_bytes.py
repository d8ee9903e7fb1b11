"""Finds who gave wrong bytes of a tensor, once the right ones are known."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from distributed_llm.common.model_files import unreadable
from distributed_llm.weights.fetching.events import GRAIN_BYTES


class GrainRecord:
    """Who gave which bytes of one tensor, and what they were when its hash was wrong.

    Bytes are compared in grains of `GRAIN_BYTES`.
    """

    def __init__(self) -> None:
        self._givers: dict[int, str] = {}  # by the offset of the grain
        self._wrong: dict[int, tuple[str, bytes]] = {}  # giver and digest

    def gave(self, source: str, offset: int, nbytes: int) -> None:
        """Note that `source` gave bytes from `offset`."""
        first = offset // GRAIN_BYTES * GRAIN_BYTES
        for grain in range(first, offset + nbytes, GRAIN_BYTES):
            self._givers[grain] = source

    def forget(self) -> None:
        """Note that the bytes so far are dropped."""
        self._givers.clear()

    def was_wrong(self, file: Path) -> None:
        """Note what the bytes in a file are, whose hash is wrong, and that they are dropped.

        Raises:
            CheckpointError: the file cannot be read.
        """
        for grain, digest in _grains(file):
            if giver := self._givers.get(grain):
                self._wrong[grain] = (giver, digest)
        self.forget()

    def suspects(self, file: Path) -> tuple[str, ...]:
        """Return who had given other bytes than are in a file, whose hash is right.

        Raises:
            CheckpointError: the file cannot be read.
        """
        if not self._wrong:
            return ()
        right = dict(_grains(file))
        wrong = (giver for grain, (giver, digest) in self._wrong.items() if digest != right[grain])
        return tuple(dict.fromkeys(wrong))


def _grains(file: Path) -> Iterator[tuple[int, bytes]]:
    offset = 0
    try:
        with open(file, "rb") as content:
            while grain := content.read(GRAIN_BYTES):
                yield offset, hashlib.sha256(grain).digest()
                offset += len(grain)
    except OSError as exc:
        raise unreadable(file, exc) from exc
