"""Decides when the workers of a machine's GPUs start, start again and end. Pure.

One that ends within a minute of its start is not started again, for what is wrong then is wrong
from the start; one that worked longer is. The others go on meanwhile. When none is left, all of it
ends as the last one did. A first signal has each of them leave the cluster, a second one ends all
at once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from distributed_llm.child_events import Ended, Fail, Finish, Signalled, TellToEnd
from distributed_llm.child_words import ended_text
from distributed_llm.common.wording import duration_text, list_text
from distributed_llm.gpus.workers import GpuWorker

WELL_S = 60.0
"""Time after which a worker did not fail for what was wrong at its start, seconds."""

PAUSE_S = 2.0
"""Time before it is started again, seconds."""


@dataclass(frozen=True)
class Start:
    """Start the process of a worker."""

    worker: GpuWorker


@dataclass(frozen=True)
class Tell:
    """Tell people what happens."""

    text: str


Event = Ended[str] | Signalled
Action = Start | TellToEnd[str] | Tell | Finish | Fail[str]


class Group:
    """The workers of a machine with several GPUs.

    Args:
        workers: at least two, with different names.
    """

    def __init__(self, workers: Sequence[GpuWorker]) -> None:
        self._workers = {worker.name: worker for worker in workers}
        self._since: dict[str, float] = {}  # of those that run
        self._start_at: dict[str, float] = {}  # of those that are to be started again
        self._code: int | None = None  # of the signal that told to end

    def begin(self, *, now: float) -> list[Action]:
        """Return what is to be done first.

        Args:
            now: clock seconds, as everywhere here.
        """
        self._since = dict.fromkeys(self._workers, now)
        names = list_text(f"{one.name} on {one.device}" for one in self._workers.values())
        told = f"{len(self._workers)} are here, with a worker each: {names}"
        return [Tell(told), *(Start(worker) for worker in self._workers.values())]

    def handle(self, event: Event, *, now: float) -> list[Action]:
        """Return what is to be done about an event."""
        match event:
            case Signalled(code=code):
                return self._told_to_end(code)
            case Ended():
                return self._ended(event, now)

    def next_deadline(self) -> float:
        """Return when `on_timer` has something to do; infinity for never."""
        return min(self._start_at.values(), default=math.inf)

    def on_timer(self, *, now: float) -> list[Action]:
        """Return what is to be done because time has passed."""
        due = [name for name, start_at in self._start_at.items() if start_at <= now]
        for name in due:
            del self._start_at[name]
            self._since[name] = now
        return [Start(self._workers[name]) for name in due]

    def validate(self) -> None:
        """Check what always holds."""
        assert not self._since.keys() & self._start_at.keys()
        assert self._since.keys() | self._start_at.keys() <= self._workers.keys()
        assert self._code is None or not self._start_at

    def _told_to_end(self, code: int) -> list[Action]:
        again, self._code = self._code is not None, code
        self._start_at.clear()
        if again or not self._since:
            return [Finish(code)]
        who = f"{list_text(self._since)} {'has' if len(self._since) == 1 else 'have'}"
        text = f"ending once {who} left the cluster (again: at once)"
        return [Tell(text), *(TellToEnd(name) for name in self._since)]

    def _ended(self, event: Ended[str], now: float) -> list[Action]:
        worked_s = now - self._since.pop(event.child)
        if self._code is not None:
            return [] if self._since else [Finish(self._code)]
        who = f"{event.child} on {self._workers[event.child].device}"
        if event.code and worked_s >= WELL_S:
            self._start_at[event.child] = now + PAUSE_S
            then = f"it is started again in {duration_text(PAUSE_S)}"
            return [Tell(ended_text(who, event.code, then, event.said))]
        others = [*self._since, *self._start_at]
        if not others:
            return [Fail(event.child) if event.code else Finish(0)]
        then = f"{list_text(others)} {'goes' if len(others) == 1 else 'go'} on without it"
        if not event.code:
            return [Tell(f"{who} has left the cluster; {then}")]
        return [Tell(ended_text(who, event.code, then, event.said))]
