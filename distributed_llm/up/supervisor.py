"""Decides when the processes of `dllm up` start, start again and end, and what is told. Pure.

A worker that fails before any worker has joined ends everything: what is wrong is wrong from the
start, such as a device that is not there. From then on others may depend on the coordinator, so it
goes on without the worker, which is started again after a pause that doubles each time; unless it
was drained, or failed for what only a person can mend. The API is started with the worker, and
again as that is; nothing ends because it does.
"""

import math
from enum import Enum, auto
from typing import assert_never

from distributed_llm.child_events import Ended, Fail, Finish, Signalled, TellToEnd
from distributed_llm.child_words import ended_text
from distributed_llm.common.messages import ClusterStatus
from distributed_llm.common.states import StateTable
from distributed_llm.up.events import (
    Action,
    Child,
    Event,
    Listens,
    Logged,
    Progress,
    Seen,
    Serves,
    Show,
    StartApi,
    StartWorker,
)
from distributed_llm.up.pauses import Pauses
from distributed_llm.up.texts import headline

SHOW_AFTER_S = 3.0
"""Time after the first worker joined in which model and API are waited for before it is told."""


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
        self._access: tuple[str, ...] = ()
        self._worker = Pauses()
        self._api = Pauses()

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
            case Serves(access=access):
                return self._serves(access)
            case Seen(status=status):
                return self._seen(status, now)
            case Logged(text=text):
                return [Progress(text)]
            case Ended(child="coordinator"):
                return self._coordinator_ended(event)
            case Ended(child="worker"):
                return self._worker_ended(event, now)
            case Ended():
                return self._api_ended(event, now)
            case Signalled(code=code):
                return self._told_to_end(code)
            case _:
                assert_never(event)

    def next_deadline(self) -> float:
        """Return when `on_timer` has something to do; infinity for never."""
        return min(self._worker.start_at, self._api.start_at)

    def on_timer(self, *, now: float) -> list[Action]:
        """Return what is to be done because time has passed."""
        actions: list[Action] = []
        if now >= self._worker.start_at:
            self._worker.started(now)
            actions.append(StartWorker())
        if now >= self._api.start_at:
            self._api.started(now)
            actions.append(StartApi())
        return actions

    def validate(self) -> None:
        """Check what always holds."""
        for child in (self._worker, self._api):
            assert not child.runs or child.start_at == math.inf
        if self._state is not UpState.RUNNING:
            assert self._worker.start_at == math.inf, "only one that has run is started again"
        if self._state not in (UpState.JOINING, UpState.RUNNING):
            assert self._api.start_at == math.inf

    def _enter(self, cause: UpCause) -> None:
        self._state = UP_STATES.after(self._state, cause)

    def _listens(self, invitation: tuple[str, ...], now: float) -> list[Action]:
        if self._state is not UpState.STARTING:  # told to end meanwhile
            return []
        self._enter(UpCause.LISTENS)
        self._invitation = invitation
        self._worker.started(now)
        self._api.started(now)
        return [StartWorker(), StartApi()]

    def _serves(self, access: tuple[str, ...]) -> list[Action]:
        again, self._access = bool(self._access), access
        if again:
            return [Progress("the API serves again")]
        if not self._shown or self._state is not UpState.RUNNING:
            return []
        return [Show(("The API serves.", *access))]

    def _seen(self, status: ClusterStatus, now: float) -> list[Action]:
        if status.workers and self._state is UpState.JOINING:
            self._enter(UpCause.WORKER_JOINED)
            self._joined_at = now
        if self._state is UpState.RUNNING and self._joined_at is not None:
            return self._show(status, now - self._joined_at)
        return []

    def _show(self, status: ClusterStatus, joined_for_s: float) -> list[Action]:
        serving = status.state == "serving"
        complete = serving and (bool(self._access) or not self._api.runs)
        if not self._shown and (complete or joined_for_s >= SHOW_AFTER_S):
            self._shown, self._served = True, serving
            return [Show((*headline(status), *self._access, *self._invitation))]
        if self._shown and serving and not self._served:
            self._served = True
            return [Show(headline(status))]
        return []

    def _coordinator_ended(self, event: Ended[Child]) -> list[Action]:
        asked = self._state in (UpState.LEAVING, UpState.ENDING)
        self._enter(UpCause.COORDINATOR_GONE)
        self._start_no_more()
        if asked:
            return [Finish(self._code)]
        if event.code == 0:
            return [Progress("the coordinator was told to end, and has ended"), Finish(0)]
        return [Fail("coordinator")]

    def _worker_ended(self, event: Ended[Child], now: float) -> list[Action]:
        since = self._worker.ended()
        match self._state:
            case UpState.LEAVING:
                self._enter(UpCause.WORKER_GONE)
                return [TellToEnd("coordinator")]
            case UpState.JOINING:
                self._enter(UpCause.WORKER_FAILED)
                return [Fail("worker")]
            case UpState.RUNNING:
                return self._without_worker(event, now, since)
            case _:
                return []

    def _without_worker(self, event: Ended[Child], now: float, since: float | None) -> list[Action]:
        if event.code == 0:
            return [
                Progress(
                    "the worker of this machine has left, and the coordinator goes on without it"
                )
            ]
        then = self._worker.again(event.code, now, since)
        return [Progress(ended_text("the worker of this machine", event.code, then, event.said))]

    def _api_ended(self, event: Ended[Child], now: float) -> list[Action]:
        since = self._api.ended()
        if self._state not in (UpState.JOINING, UpState.RUNNING):
            return []
        if event.code == 0:
            return [Progress("the API was told to end, and the cluster goes on without it")]
        then = self._api.again(event.code, now, since)
        said = event.said if event.code > 0 else ""  # else it is what it logged before
        return [Progress(ended_text("the API", event.code, then, said))]

    def _start_no_more(self) -> None:
        self._worker.never()
        self._api.never()

    def _told_to_end(self, code: int) -> list[Action]:
        at_once = self._state in (UpState.LEAVING, UpState.ENDING)
        self._enter(UpCause.TOLD_TO_END)
        self._start_no_more()
        self._code = code
        if at_once:
            return [Finish(code)]
        api: list[Action] = [TellToEnd("api")] if self._api.runs else []
        if not self._worker.runs:
            self._enter(UpCause.WORKER_GONE)
            return [Progress("ending (again: at once)"), *api, TellToEnd("coordinator")]
        return [
            Progress("ending: the worker leaves first (again: at once)"),
            *api,
            TellToEnd("worker"),
        ]
