"""The log of a process, on stderr."""

import logging
import sys
from typing import TextIO


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is at the moment: a progress bar takes its place for a while."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        """The stream to write to."""
        return sys.stderr


def configure(level: str) -> None:
    """Write this package's log records of at least `level` to stderr, one line each."""
    handler = _Stderr()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S"))
    root = logging.getLogger("distributed_llm")
    root.handlers = [handler]
    root.setLevel(level.upper())
    root.propagate = False
