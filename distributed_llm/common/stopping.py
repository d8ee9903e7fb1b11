"""Stopping coordinator and worker by SIGINT (Ctrl-C) or SIGTERM."""

import asyncio
import contextlib
import signal
from collections.abc import Callable

_INTERRUPTED = 130


def on_signal(stop: Callable[[int], None]) -> None:
    """Have the running event loop call `stop` with the number of each signal that arrives."""
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):  # Windows raises KeyboardInterrupt instead
            asyncio.get_running_loop().add_signal_handler(number, stop, int(number))


def exit_code(number: int) -> int:
    """Return the exit code of a process that was stopped by the signal `number`."""
    return _INTERRUPTED if number == signal.SIGINT else 0
