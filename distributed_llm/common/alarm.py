"""A timer of the event loop that knows when the loop stood still."""

import asyncio
from collections.abc import Callable

STALL_S = 0.25
"""Time by which a timer may be late before the loop is said to have stood still, seconds."""


class Alarm:
    """Calls back at a deadline, by a clock that stands still while the event loop does.

    A loop stands still when something blocks it, or when the machine sleeps. Whatever should have
    happened meanwhile has not been looked at yet, so that nobody else is late for it.

    Args:
        on_due: called when the deadline has come.
        on_stall: called once the loop runs again, before anything else is given the time; with how
            long it stood still, seconds.
    """

    def __init__(self, on_due: Callable[[], None], on_stall: Callable[[float], None]) -> None:
        self._on_due = on_due
        self._on_stall = on_stall
        self._loop = asyncio.get_running_loop()
        self._lost_s = 0.0
        self._asked_at = self._loop.time()  # when `now` was called last, by the loop's clock
        self._deadline: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def now(self) -> float:
        """Return the time, seconds; first report a stall."""
        self._asked_at = self._loop.time()
        now = self._asked_at - self._lost_s
        if self._deadline is None or now - self._deadline <= STALL_S:
            return now
        stall_s, now = now - self._deadline, self._deadline
        self._lost_s += stall_s
        self._on_stall(stall_s)
        return now

    def set(self, deadline: float | None) -> None:
        """Call back at `deadline` instead of what was set before; None is never.

        One that had passed when the time was asked for last is called back at once, and the loop is
        not late for it.
        """
        at = None if deadline is None else deadline + self._lost_s
        self._deadline = None if at is None else max(at, self._asked_at) - self._lost_s
        if self._timer:
            if at == self._timer.when():
                return
            self._timer.cancel()
        self._timer = None if at is None else self._loop.call_at(at, self._ring)

    def cancel(self) -> None:
        """Do not call back any more."""
        self.set(None)

    def _ring(self) -> None:
        self._timer = None
        self._on_due()
