"""What child processes say: reads what is new in their logs, and tells how they ended."""

import os
import re
import signal
from pathlib import Path

_MOST_BYTES = 1 << 16
"""Read at a time; of a log that grows faster the end is read."""

_LINE = re.compile(r"\d\d:\d\d:\d\d [A-Z]+ +(.+)")
"""A line of the log as `common.log` writes it."""

GROUP_MARK = "GPUs: "
"""How texts about the workers of single GPUs begin, in the log of the process that runs them."""


def text_of(line: str) -> str | None:
    """Return what a line of a log says, without time and level; None for any other line."""
    match = _LINE.fullmatch(line)
    return match[1] if match else None


def ended_text(who: str, code: int, then: str, said: str) -> str:
    """Return why a child ended, and what follows.

    Args:
        who: which child.
        code: exit code, or minus the number of the signal that ended it.
        then: what follows.
        said: its last words; maybe none.
    """
    words = f". It said: {said}" if said else ""
    return f"{who} ended ({_code_text(code)}); {then}{words}"


def _code_text(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = "; if the memory of this machine ran out, give the worker less with --max-memory"
    return f"{name}{hint if name == 'SIGKILL' else ''}"


class LogReader:
    """Reads the lines that are added to a log.

    Args:
        path: of a file that is written to, and may be emptied.
        start: bytes of it that are not read.
    """

    def __init__(self, path: Path, start: int = 0) -> None:
        self._path = path
        self._at = start

    def new_lines(self) -> list[str]:
        """Return the new whole lines."""
        with self._path.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            if size < self._at:  # it was emptied
                self._at = 0
            self._at = max(self._at, size - _MOST_BYTES)
            log.seek(self._at)
            whole, end, _ = log.read(_MOST_BYTES).rpartition(b"\n")
        self._at += len(whole) + len(end)
        return whole.decode(errors="replace").splitlines()
