"""How a process that serves is stopped: by SIGINT (Ctrl-C) or SIGTERM."""

import asyncio
import contextlib
import signal
from collections.abc import Callable

_INTERRUPTED = 130


def on_signal(stop: Callable[[int], None]) -> None:
    """Have the running loop call `stop` with the number of the signal that arrives."""
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):  # Windows raises KeyboardInterrupt instead
            asyncio.get_running_loop().add_signal_handler(number, stop, int(number))


def exit_code(number: int) -> int:
    """Return what a process exits with that a signal stopped."""
    return _INTERRUPTED if number == signal.SIGINT else 0
