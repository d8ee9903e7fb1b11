"""Stopping coordinator and worker: by SIGINT (Ctrl-C) or SIGTERM, or because of a bug in them."""

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

_INTERRUPTED = 130


def on_signal(stop: Callable[[int], None]) -> None:
    """Have the running event loop call `stop` with the number of each signal that arrives."""
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):  # Windows raises KeyboardInterrupt instead
            asyncio.get_running_loop().add_signal_handler(number, stop, int(number))


def on_uncaught(fail: Callable[[Exception], None]) -> None:
    """Have the running event loop call `fail` with each exception that a callback did not catch.

    It is a bug. The loop would log it and go on, with whatever the callback left undone.
    """

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        exc = context.get("exception")
        if not isinstance(exc, Exception):
            loop.default_exception_handler(context)
            return
        logger.error("%s", context["message"], exc_info=exc)
        fail(exc)

    asyncio.get_running_loop().set_exception_handler(handle)


def exit_code(number: int) -> int:
    """Return the exit code of a process that was stopped by the signal `number`."""
    return _INTERRUPTED if number == signal.SIGINT else 0
