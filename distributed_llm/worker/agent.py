"""A worker's decisions: hello, heartbeats, epochs, credits. Events in, actions out. Pure.

    connecting --connected--> greeting --Welcome--> joined --connection lost--> connecting

What was asked for in one session is never answered in another: the coordinator may be a new one.
What arrives before the welcome, or after the connection was given up, is of no session.
"""

from dataclasses import dataclass
from typing import Literal, assert_never

from distributed_llm.common.errors import (
    CheckpointError,
    CoordinatorUnreachable,
    DistributedLLMError,
    ProtocolMismatch,
    error_from_wire,
)
from distributed_llm.common.messages import (
    Capabilities,
    DropStage,
    Goodbye,
    LoadStage,
    MissingPositions,
    Pong,
    Refused,
    ReleaseSequences,
    StageFailed,
    StageReady,
    Task,
    TaskFailed,
    TaskResult,
    ToWorker,
    Welcome,
    WorkerHello,
)
from distributed_llm.common.tensors import Frame, TensorSpec

CREDITS = 2
"""One task that runs and one that waits: the device never idles for a round trip."""

_GREETING_TIMEOUT_S = 4.0


# ------------------------------------------------------------------ events


@dataclass(frozen=True)
class Connected:
    """Event: the coordinator's port was reached."""


@dataclass(frozen=True)
class Disconnected:
    """Event: the connection was lost."""


@dataclass(frozen=True)
class Received:
    """Event: the coordinator sent a message."""

    message: ToWorker
    frames: tuple[Frame, ...] = ()


@dataclass(frozen=True)
class Garbage:
    """Event: the coordinator sent what is no message."""

    error: DistributedLLMError


@dataclass(frozen=True)
class Loaded:
    """Event: the layers of `epoch` are in memory."""

    session: int
    epoch: int
    load_s: float
    weight_bytes: int


@dataclass(frozen=True)
class LoadFailed:
    """Event: the layers of `epoch` cannot be loaded."""

    session: int
    epoch: int
    error: DistributedLLMError


@dataclass(frozen=True)
class Computed:
    """Event: a task was run."""

    session: int
    task: Task
    specs: tuple[TensorSpec, ...]
    frames: tuple[Frame, ...]
    compute_s: float
    queued_s: float


@dataclass(frozen=True)
class Broke:
    """Event: a task could not be run."""

    session: int
    task: Task
    error: DistributedLLMError
    missing: tuple[MissingPositions, ...] = ()


Event = Connected | Disconnected | Received | Garbage | Loaded | LoadFailed | Computed | Broke


# ------------------------------------------------------------------ actions


@dataclass(frozen=True)
class Say:
    """Action: send a message."""

    message: WorkerHello | StageReady | StageFailed | TaskResult | TaskFailed | Goodbye
    frames: tuple[Frame, ...] = ()


@dataclass(frozen=True)
class Beat:
    """Action: send a heartbeat with the vitals of the moment."""

    epoch: int


@dataclass(frozen=True)
class Load:
    """Action: load a stage; give up the one that is loaded."""

    session: int
    order: LoadStage


@dataclass(frozen=True)
class Run:
    """Action: run a task."""

    session: int
    task: Task
    frames: tuple[Frame, ...]


@dataclass(frozen=True)
class Release:
    """Action: free the KV cache of sequences."""

    sequence_ids: tuple[int, ...]


@dataclass(frozen=True)
class Drop:
    """Action: give up the stage that is loaded."""


@dataclass(frozen=True)
class Reconnect:
    """Action: close the connection and open a new one."""


@dataclass(frozen=True)
class Log:
    """Action: write a line for the operator."""

    text: str
    level: Literal["info", "warning", "error"] = "info"


@dataclass(frozen=True)
class Exit:
    """Action: end the worker."""

    error: DistributedLLMError


Action = Say | Beat | Load | Run | Release | Drop | Reconnect | Log | Exit


class Agent:
    """One worker.

    Args:
        name: that it asks for.
        capabilities: of this machine.
        address: of the coordinator, for messages.
        connect_timeout_s: for the first connection; later ones are tried for ever.
        now: when it was made, clock seconds.
    """

    def __init__(
        self,
        name: str,
        capabilities: Capabilities,
        *,
        address: str,
        connect_timeout_s: float,
        now: float,
    ) -> None:
        self._name = name
        self._capabilities = capabilities
        self._address = address
        self._connect_timeout_s = connect_timeout_s
        self._state: Literal["connecting", "greeting", "joined"] = "connecting"
        self._session = 0
        self._epoch = 0
        self._reached = False
        self._heartbeat_interval_s = 0.0
        self._silence_timeout_s = 0.0
        self._heard_at = now
        self._beat_at = now
        self._connect_by: float | None = now + connect_timeout_s

    @property
    def epoch(self) -> int:
        """The newest epoch that was asked for; older work is void."""
        return self._epoch

    def handle(self, event: Event, *, now: float) -> list[Action]:
        """Apply one event at `now` (clock seconds) and return what to do about it."""
        match event:
            case Connected():
                self._state, self._heard_at = "greeting", now
                self._reached = True
                return [Say(WorkerHello(name=self._name, capabilities=self._capabilities))]
            case Disconnected():
                return self._leave_session("The coordinator is gone; trying to find it again.")
            case Received() | Garbage() if self._state == "connecting":
                return []
            case Received(message=message):
                self._heard_at = now
                if self._state == "greeting" and not isinstance(message, Welcome | Refused | Pong):
                    return []
                return self._received(event, now)
            case Garbage(error=error):
                if isinstance(error, ProtocolMismatch):
                    return [Exit(error)]
                return [Log(f"dropped a message: {error}"[:1000], "warning")]
            case Loaded() | LoadFailed() | Computed() | Broke():
                return self._answer(event) if event.session == self._session else []
            case _:
                assert_never(event)

    def next_deadline(self) -> float | None:
        """Return when `on_timer` is next due, clock seconds, or None."""
        if self._state == "joined":
            return min(self._beat_at, self._heard_at + self._silence_timeout_s)
        if self._state == "greeting":
            silent_at = self._heard_at + _GREETING_TIMEOUT_S
            return silent_at if self._connect_by is None else min(silent_at, self._connect_by)
        return self._connect_by

    def on_timer(self, *, reached: bool, now: float) -> list[Action]:
        """Do what is due; `reached` tells whether anything at all listens at the address."""
        if self._connect_by is not None and self._connect_by <= now:
            return [Exit(self._unreachable(reached or self._reached))]
        if self._state == "connecting":
            return []
        timeout_s = self._silence_timeout_s if self._state == "joined" else _GREETING_TIMEOUT_S
        if self._heard_at + timeout_s <= now:
            return self._leave_session("The coordinator is silent; connecting anew.")
        if self._state == "joined" and self._beat_at <= now:
            self._beat_at = now + self._heartbeat_interval_s
            return [Beat(self._epoch)]
        return []

    def _received(self, event: Received, now: float) -> list[Action]:
        match event.message:
            case Welcome() as welcome:
                return self._join(welcome, now)
            case Refused(code="lost", message=why):
                return self._leave_session(why)
            case Refused(code=code, message=why):
                return [Exit(error_from_wire(code, why, 0.0))]
            case LoadStage() as order:
                if order.epoch <= self._epoch:
                    return [Log(f"ignored an order of epoch {order.epoch}", "warning")]
                self._epoch = order.epoch
                return [
                    Log(f"loading layers {order.layers} (plan {order.epoch})"),
                    Load(self._session, order),
                ]
            case DropStage(epoch=epoch):
                if epoch < self._epoch:
                    return [Log(f"ignored an order of epoch {epoch}", "warning")]
                self._epoch = epoch
                return [Log("no layers to serve; waiting"), Drop()]
            case Task() as task:
                if task.epoch != self._epoch:
                    return [Log(f"ignored a task of epoch {task.epoch}", "warning")]
                return [Run(self._session, task, event.frames)]
            case ReleaseSequences(epoch=epoch, sequence_ids=ids):
                return [Release(ids)] if epoch == self._epoch else []
            case Pong():
                return []
            case _:
                assert_never(event.message)

    def _join(self, welcome: Welcome, now: float) -> list[Action]:
        self._state, self._connect_by = "joined", None
        self._heartbeat_interval_s = welcome.heartbeat_interval_s
        self._silence_timeout_s = welcome.silence_timeout_s
        self._beat_at = now
        return [Log(f"joined {self._address} as {welcome.worker_id}")]

    def _leave_session(self, why: str) -> list[Action]:
        self._state = "connecting"
        self._session += 1
        self._epoch = 0
        return [Log(why, "warning"), Reconnect()]

    def _answer(self, event: Loaded | LoadFailed | Computed | Broke) -> list[Action]:
        match event:
            case Loaded(epoch=epoch, load_s=load_s, weight_bytes=weight_bytes):
                ready = StageReady(
                    epoch=epoch, credits=CREDITS, load_s=load_s, weight_bytes=weight_bytes
                )
                return [Say(ready), Log(f"layers are loaded in {load_s:.1f} s")]
            case LoadFailed(epoch=epoch, error=error):
                said = Say(StageFailed(epoch=epoch, code=error.code, message=str(error)[:4096]))
                if isinstance(error, CheckpointError):
                    return [said, Exit(error)]
                return [said, Log(str(error), "error")]
            case Computed() as done:
                result = TaskResult(
                    epoch=done.task.epoch,
                    step=done.task.step,
                    attempt=done.task.attempt,
                    credits=1,
                    compute_s=done.compute_s,
                    queued_s=done.queued_s,
                    tensors=done.specs,
                )
                return [Say(result, done.frames)]
            case Broke() as broke:
                failed = TaskFailed(
                    epoch=broke.task.epoch,
                    step=broke.task.step,
                    attempt=broke.task.attempt,
                    credits=1,
                    code=broke.error.code,
                    message=str(broke.error)[:4096],
                    missing=broke.missing,
                )
                return [Say(failed)]

    def _unreachable(self, reached: bool) -> CoordinatorUnreachable:
        why = (
            "something listens there, but it is no coordinator"
            if reached
            else "nothing listens there"
        )
        return CoordinatorUnreachable(
            f"No coordinator at {self._address} after {self._connect_timeout_s:g} s: {why}. Check "
            "the address and port, that `dllm coordinator` runs there with a --bind that other "
            "machines can reach, and that no firewall is between."
        )
