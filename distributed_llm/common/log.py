"""What the processes write to stderr for their operator."""

import logging
import sys


def configure(level: str) -> None:
    """Send log records of this package from `level` up to stderr, one line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S"))
    root = logging.getLogger("distributed_llm")
    root.handlers = [handler]
    root.setLevel(level.upper())
    root.propagate = False
