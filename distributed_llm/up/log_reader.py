"""Reads what is new in the log of a child process."""

import os
import re
from pathlib import Path

_MOST_BYTES = 1 << 16
"""Read at a time; of a log that grows faster the end is read."""

_LINE = re.compile(r"\d\d:\d\d:\d\d [A-Z]+ +(.+)")
"""A line of the log as `common.log` writes it; what else is there is for the file only."""


class LogReader:
    """Reads the lines that are added to a log from now on.

    Args:
        path: of a file that is written to, and may be emptied.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = path.stat().st_size

    def new_lines(self) -> list[str]:
        """Return the texts of new whole lines, without time and level."""
        with self._path.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            if size < self._at:  # it was emptied
                self._at = 0
            self._at = max(self._at, size - _MOST_BYTES)
            log.seek(self._at)
            whole, end, _ = log.read(_MOST_BYTES).rpartition(b"\n")
        self._at += len(whole) + len(end)
        lines = whole.decode(errors="replace").splitlines()
        return [match[1] for line in lines if (match := _LINE.fullmatch(line))]
