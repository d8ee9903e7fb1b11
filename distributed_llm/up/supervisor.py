"""Decides when the processes of `dllm up` start, start again and end, and what is told. Pure.

A worker that fails before any worker has joined ends everything: what is wrong is wrong from the
start, such as a device that is not there. From then on others may depend on the coordinator, so it
goes on without the worker, which is started again after a pause that doubles each time; unless it
was drained, or failed for what only a person can mend.
"""

import math
from enum import Enum, auto
from typing import assert_never

from distributed_llm.common.errors import ConfigError
from distributed_llm.common.messages import ClusterStatus
from distributed_llm.common.states import StateTable
from distributed_llm.common.wording import duration_text
from distributed_llm.up.events import (
    Action,
    Ended,
    Event,
    Fail,
    Finish,
    Listens,
    Logged,
    Progress,
    Seen,
    Show,
    Signalled,
    StartWorker,
    TellToEnd,
)
from distributed_llm.up.texts import ended_text, headline

SHOW_AFTER_S = 3.0
"""Time after the first worker joined in which the model is waited for before people are told."""

_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0

_WELL_S = 60.0
"""A worker that ran for this long did not fail at its start, so pauses begin anew, seconds."""


class UpState(Enum):
    """How far `dllm up` is.

    Attributes:
        STARTING: the coordinator reads the model.
        JOINING: it listens; no worker has joined yet.
        RUNNING: a worker has joined; the one here may be between two starts, or gone.
        LEAVING: told to end; the worker here was told to leave.
        ENDING: the worker here is gone, and the coordinator was told to end.
        ENDED: nothing runs any more, or will in a moment.
    """

    STARTING = auto()
    JOINING = auto()
    RUNNING = auto()
    LEAVING = auto()
    ENDING = auto()
    ENDED = auto()


class UpCause(Enum):
    """What changes the state of `dllm up`."""

    LISTENS = auto()
    WORKER_JOINED = auto()
    WORKER_FAILED = auto()
    TOLD_TO_END = auto()
    WORKER_GONE = auto()
    COORDINATOR_GONE = auto()


UP_STATES = StateTable(
    "dllm up",
    UpState.STARTING,
    {
        (UpState.STARTING, UpCause.LISTENS): UpState.JOINING,
        (UpState.STARTING, UpCause.TOLD_TO_END): UpState.LEAVING,
        (UpState.STARTING, UpCause.COORDINATOR_GONE): UpState.ENDED,
        (UpState.JOINING, UpCause.WORKER_JOINED): UpState.RUNNING,
        (UpState.JOINING, UpCause.WORKER_FAILED): UpState.ENDED,
        (UpState.JOINING, UpCause.TOLD_TO_END): UpState.LEAVING,
        (UpState.JOINING, UpCause.COORDINATOR_GONE): UpState.ENDED,
        (UpState.RUNNING, UpCause.TOLD_TO_END): UpState.LEAVING,
        (UpState.RUNNING, UpCause.COORDINATOR_GONE): UpState.ENDED,
        (UpState.LEAVING, UpCause.WORKER_GONE): UpState.ENDING,
        (UpState.LEAVING, UpCause.TOLD_TO_END): UpState.ENDED,
        (UpState.LEAVING, UpCause.COORDINATOR_GONE): UpState.ENDED,
        (UpState.ENDING, UpCause.TOLD_TO_END): UpState.ENDED,
        (UpState.ENDING, UpCause.COORDINATOR_GONE): UpState.ENDED,
    },
)


class Supervisor:
    """What `dllm up` does about what happens.

    Args:
        now: clock seconds, as everywhere here.
    """

    def __init__(self) -> None:
        self._state = UP_STATES.initial
        self._code = 0
        self._invitation: tuple[str, ...] = ()
        self._joined_at: float | None = None
        self._shown = False
        self._served = False
        self._worker_since: float | None = None  # None while it does not run
        self._pause_s = _FIRST_PAUSE_S
        self._start_at = math.inf

    @property
    def state(self) -> UpState:
        """How far it is."""
        return self._state

    def handle(self, event: Event, *, now: float) -> list[Action]:
        """Return what is to be done about an event."""
        if self._state is UpState.ENDED:
            return []
        match event:
            case Listens(invitation=invitation):
                return self._listens(invitation, now)
            case Seen(status=status):
                return self._seen(status, now)
            case Logged(text=text):
                return [Progress(text)]
            case Ended(child="coordinator"):
                return self._coordinator_ended(event)
            case Ended():
                return self._worker_ended(event, now)
            case Signalled(code=code):
                return self._told_to_end(code)
            case _:
                assert_never(event)

    def next_deadline(self) -> float:
        """Return when `on_timer` has something to do; infinity for never."""
        return self._start_at

    def on_timer(self, *, now: float) -> list[Action]:
        """Return what is to be done because time has passed."""
        if now < self._start_at:
            return []
        self._start_at = math.inf
        self._worker_since = now
        return [StartWorker()]

    def validate(self) -> None:
        """Check what always holds."""
        assert self._worker_since is None or self._start_at == math.inf
        if self._state is not UpState.RUNNING:
            assert self._start_at == math.inf, "only a worker that has run is started again"

    def _enter(self, cause: UpCause) -> None:
        self._state = UP_STATES.after(self._state, cause)

    def _listens(self, invitation: tuple[str, ...], now: float) -> list[Action]:
        if self._state is not UpState.STARTING:  # told to end meanwhile
            return []
        self._enter(UpCause.LISTENS)
        self._invitation = invitation
        self._worker_since = now
        return [StartWorker()]

    def _seen(self, status: ClusterStatus, now: float) -> list[Action]:
        if status.workers and self._state is UpState.JOINING:
            self._enter(UpCause.WORKER_JOINED)
            self._joined_at = now
        if self._state is UpState.RUNNING and self._joined_at is not None:
            return self._show(status, now - self._joined_at)
        return []

    def _show(self, status: ClusterStatus, joined_for_s: float) -> list[Action]:
        serving = status.state == "serving"
        if not self._shown and (serving or joined_for_s >= SHOW_AFTER_S):
            self._shown, self._served = True, serving
            return [Show((*headline(status), *self._invitation))]
        if serving and not self._served:
            self._served = True
            return [Show(headline(status))]
        return []

    def _coordinator_ended(self, event: Ended) -> list[Action]:
        asked = self._state in (UpState.LEAVING, UpState.ENDING)
        self._enter(UpCause.COORDINATOR_GONE)
        self._start_at = math.inf
        if asked:
            return [Finish(self._code)]
        if event.code == 0:
            return [Progress("the coordinator was told to end, and has ended"), Finish(0)]
        return [Fail("coordinator")]

    def _worker_ended(self, event: Ended, now: float) -> list[Action]:
        since, self._worker_since = self._worker_since, None
        match self._state:
            case UpState.LEAVING:
                self._enter(UpCause.WORKER_GONE)
                return [TellToEnd("coordinator")]
            case UpState.JOINING:
                self._enter(UpCause.WORKER_FAILED)
                return [Fail("worker")]
            case UpState.RUNNING:
                return self._without_worker(event, now, now - since if since is not None else 0.0)
            case _:
                return []

    def _without_worker(self, event: Ended, now: float, ran_s: float) -> list[Action]:
        if event.code == 0:
            return [
                Progress(
                    "the worker of this machine has left, and the coordinator goes on without it"
                )
            ]
        if event.code == ConfigError.exit_code:
            then = "the coordinator goes on without it"
            return [Progress(ended_text(event.code, then, event.said))]
        if ran_s >= _WELL_S:
            self._pause_s = _FIRST_PAUSE_S
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, _LONGEST_PAUSE_S)
        self._start_at = now + pause_s
        then = f"it is started again in {duration_text(pause_s)}"
        return [Progress(ended_text(event.code, then, event.said))]

    def _told_to_end(self, code: int) -> list[Action]:
        at_once = self._state in (UpState.LEAVING, UpState.ENDING)
        self._enter(UpCause.TOLD_TO_END)
        self._start_at = math.inf
        self._code = code
        if at_once:
            return [Finish(code)]
        if self._worker_since is None:
            self._enter(UpCause.WORKER_GONE)
            return [Progress("ending (again: at once)"), TellToEnd("coordinator")]
        return [
            Progress("ending: the worker leaves first (again: at once)"),
            TellToEnd("worker"),
        ]
