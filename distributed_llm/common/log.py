"""The log of a process, on stderr."""

import logging
import sys


def configure(level: str) -> None:
    """Write this package's log records of at least `level` to stderr, one line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S"))
    root = logging.getLogger("distributed_llm")
    root.handlers = [handler]
    root.setLevel(level.upper())
    root.propagate = False
