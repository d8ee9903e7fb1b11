"""Stopping: by SIGINT (Ctrl-C), SIGTERM, SIGHUP when the terminal goes away, or for a bug."""

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

logger = logging.getLogger(__name__)

_INTERRUPTED = 130


def on_signal(stop: Callable[[int], None]) -> None:
    """Have the running event loop call `stop` with the number of each signal that arrives.

    A signal that this process was started to ignore, as `nohup` does, stays ignored.
    """
    numbers = [signal.SIGINT, signal.SIGTERM]
    if sys.platform != "win32":
        numbers.append(signal.SIGHUP)
    for number in numbers:
        if signal.getsignal(number) is signal.SIG_IGN:
            continue
        with contextlib.suppress(NotImplementedError):  # Windows: Ctrl-C ends the process at once
            asyncio.get_running_loop().add_signal_handler(number, stop, int(number))


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Have the first Ctrl-C raise KeyboardInterrupt within, and a second one end the process.

    That exception may be lost while an object is being deleted; the second Ctrl-C is not.
    """

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGINT, lambda *_: os._exit(_INTERRUPTED))
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


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
