"""A worker's session with the coordinator: hello, heartbeats, silence, leaving. Pure.

`AGENT_STATES` says how a session begins and ends. Everything that belongs to a session is dropped
with it: the next coordinator may be another one, and must not get a result of the old session.
Messages that arrive before the welcome, or after the connection was given up, are ignored. What a
worker does within a session is decided in `stages`.

A signal ends an idle worker at once. A worker that serves asks the coordinator to move its layers
and goes on serving until it is told that it may leave, a time limit has passed, or a second signal
arrives.

A model that it cannot load for a reason that only a person can do away with ends a worker that
serves nothing, so that its terminal and its exit code say so. A reason that may pass (the hub or a
share is away, a file is still being copied) does not: the coordinator lets it try again.
"""

import math
from typing import assert_never

from distributed_llm.common.errors import (
    CheckpointError,
    CheckpointUnavailable,
    CoordinatorUnreachable,
    DistributedLLMError,
    ProtocolMismatch,
    RemoteProtocolError,
    error_from_wire,
)
from distributed_llm.common.keys import PublicKey
from distributed_llm.common.log_limit import LogLimit, left_out_text
from distributed_llm.common.messages import (
    Addresses,
    Capabilities,
    CopyKV,
    DropStage,
    GiveWeights,
    Goodbye,
    HandOver,
    Leaving,
    LoadStage,
    MayLeave,
    Notice,
    Pong,
    Refused,
    ReleaseSequences,
    Renamed,
    Task,
    ToWorker,
    UndoMove,
    Welcome,
    WorkerHello,
)
from distributed_llm.common.tensors import Frame
from distributed_llm.common.wording import layers_text, no_coordinator_text
from distributed_llm.worker.session.agent_states import AGENT_STATES, AgentCause, AgentState
from distributed_llm.worker.session.events import (
    Action,
    Computed,
    ComputeFailed,
    ComputeThreadFailed,
    Connected,
    Disconnected,
    End,
    Event,
    Fail,
    Garbage,
    KVAssembled,
    KVExported,
    KVImported,
    KVOrderFailed,
    Loaded,
    LoadFailed,
    Log,
    Probed,
    Received,
    Reconnect,
    Rejected,
    Send,
    SendHeartbeat,
    Signalled,
    Stalled,
    VoidableOrder,
)
from distributed_llm.worker.session.link_events import (
    LinkDown,
    LinkReached,
    LinkReceived,
    LinkUp,
    PeerGarbage,
    PeerReceived,
)
from distributed_llm.worker.session.notices import Notices
from distributed_llm.worker.session.probing import Probing
from distributed_llm.worker.session.stages import Stages

_GREETING_TIMEOUT_S = 4.0
_DROPPED = "dropped or ignored messages"
_MOST_DROPPED = 5
"""Messages that are not obeyed of which the log tells in a minute; the others are counted."""


_S, _C = AgentState, AgentCause
_IN_SESSION = (_S.JOINED, _S.LEAVING)


class Agent:
    """Decides for one worker: `handle` takes an event, `on_timer` the time; both return actions.

    Args:
        name: the name to ask for; the welcome says which one it got.
        capabilities: of this machine.
        instance: names this process, so that the coordinator knows it again in a later session.
        address: of the coordinator, for messages to the operator.
        connect_timeout_s: to reach the coordinator for the first time; later, and with 0, there is
            no limit.
        leave_timeout_s: for others to take the layers of a worker that was signalled; with 0 it
            ends at once.
        now: clock seconds.
    """

    def __init__(
        self,
        name: str,
        capabilities: Capabilities,
        *,
        instance: str,
        address: str,
        connect_timeout_s: float,
        leave_timeout_s: float = 0.0,
        now: float,
    ) -> None:
        self._name = name
        self._instance = instance
        self._capabilities = capabilities
        self._address = address
        self._connect_timeout_s = connect_timeout_s
        self._leave_timeout_s = leave_timeout_s
        self._state = AGENT_STATES.initial
        self._session = 0
        self._stages = Stages(0, name, self._warn)
        self._notices = Notices()
        self._reached = False
        self._heartbeat_interval_s = 0.0
        self._silence_timeout_s = 0.0
        self._heard_at = now
        self._heartbeat_at = now
        self._probing = Probing(self._session, now=now)
        self._log_limit = LogLimit({_DROPPED: _MOST_DROPPED})
        self._connect_by = now + connect_timeout_s if connect_timeout_s else None
        self._leave_by = math.inf
        self._signal = 0  # the one that it leaves for; 0 is none

    def is_void(self, order: VoidableOrder) -> bool:
        """Return whether the result of an order is no longer wanted; thread-safe."""
        return self._stages.is_void(order)

    def handle(self, event: Event, *, now: float) -> list[Action]:
        """Apply one event at `now` (clock seconds) and return what to do about it."""
        if self._state is _S.ENDED:
            return []
        actions = self._handle(event, now)
        return [action for action in actions if self._is_admitted(action, now)]

    def _is_admitted(self, action: Action, now: float) -> bool:
        """Return whether an action is done: all but lines of which the log has got too many."""
        return not isinstance(action, Log) or self._log_limit.admits(
            f"other {action.level} lines", now=now
        )

    def _handle(self, event: Event, now: float) -> list[Action]:
        match event:
            case Connected(peer_addresses=addresses):
                return self._connected(addresses, now)
            case Rejected(error=error):
                return self._fail(error)
            case Disconnected():
                return self._lose_session("The coordinator is gone; trying to find it again.")
            case Received(message=message, frames=frames):
                return self._received(message, frames, now)
            case Garbage(error=error):
                return self._garbage(error, now)
            case Signalled(signal=signal):
                return self._signalled(signal, now)
            case Stalled():
                self._heard_at = now  # before that, nobody listened
                return []
            case PeerReceived():
                return self._stages.peer_received(event, now)
            case PeerGarbage(error=error):
                told = self._stages.unread_of_peer(event)
                return [*told, *self._warn(f"cannot read a message: {error}"[:1000], now)]
            case LinkReached() | LinkUp() | LinkDown() | LinkReceived():
                return self._stages.link_changed(event, now)
            case Loaded():
                return self._stages.loaded(event)
            case LoadFailed():
                return self._load_failed(event)
            case Computed():
                return self._stages.computed(event)
            case ComputeFailed():
                return self._stages.compute_failed(event)
            case KVExported() | KVImported() | KVAssembled() | KVOrderFailed():
                return self._stages.kv_order_done(event, now)
            case Probed():
                return self._stages.probed(event)
            case ComputeThreadFailed(error=error):
                return self._fail(error)
            case _:
                assert_never(event)

    def admits(self, key: PublicKey) -> bool:
        """Return whether the worker that holds `key` may connect to this one."""
        return self._stages.admits(key)

    def may_read(self, key: PublicKey) -> bool:
        """Return whether the worker that holds `key` may read weights from this one."""
        return self._stages.may_read(key)

    def next_deadline(self) -> float | None:
        """Return when `on_timer` is next due, clock seconds, or None."""
        if self._state is _S.ENDED:
            return None
        deadlines = (self._next_deadline(), self._log_limit.next_deadline())
        return min([at for at in deadlines if at is not None], default=None)

    def _next_deadline(self) -> float | None:
        match self._state:
            case AgentState.CONNECTING:
                return self._connect_by
            case AgentState.GREETING:
                silent_at = self._heard_at + _GREETING_TIMEOUT_S
                return silent_at if self._connect_by is None else min(silent_at, self._connect_by)
            case AgentState.JOINED | AgentState.LEAVING:
                return min(
                    self._heartbeat_at,
                    self._heard_at + self._silence_timeout_s,
                    self._leave_by,
                    self._stages.next_deadline(),
                    self._notices.next_deadline(),
                    math.inf if self._stages.epochs else self._probing.next_deadline(),
                )
            case AgentState.ENDED:
                return None
            case _:
                assert_never(self._state)

    def on_timer(self, *, reached: bool, now: float) -> list[Action]:
        """Do what is due.

        Args:
            reached: anything at all listens at the coordinator's address.
        """
        left_out = self._log_limit.take_left_out(now=now)
        told = [Log(left_out_text(kind, count), "warning") for kind, count in left_out]
        return [*told, *self._on_timer(reached, now)]

    def _on_timer(self, reached: bool, now: float) -> list[Action]:
        match self._state:
            case AgentState.CONNECTING:
                return self._check_connect_timeout(reached, now)
            case AgentState.GREETING:
                if failed := self._check_connect_timeout(reached, now):
                    return failed
                return self._check_silence(_GREETING_TIMEOUT_S, now)
            case AgentState.JOINED | AgentState.LEAVING:
                if lost := self._check_silence(self._silence_timeout_s, now):
                    return lost
                return self._on_timer_in_session(now)
            case AgentState.ENDED:
                return []
            case _:
                assert_never(self._state)

    # -------------------------------------------------------------- time

    def _check_connect_timeout(self, reached: bool, now: float) -> list[Action]:
        if self._connect_by is None or now < self._connect_by:
            return []
        return self._fail(self._unreachable(reached or self._reached))

    def _check_silence(self, timeout_s: float, now: float) -> list[Action]:
        if now < self._heard_at + timeout_s:
            return []
        return self._lose_session("The coordinator is silent; connecting anew.")

    def _on_timer_in_session(self, now: float) -> list[Action]:
        if self._leave_by <= now:
            why = f"no other workers took its layers within {self._leave_timeout_s:g} s; ending"
            return [Log(why, "warning"), *self._end(self._signal)]
        actions = [*self._stages.on_timer(now), *self._notices.on_timer(now)]
        if self._heartbeat_at <= now:
            self._heartbeat_at = now + self._heartbeat_interval_s
            actions.append(SendHeartbeat(self._stages.epochs))
        if not self._stages.epochs:
            actions += self._probing.on_timer(now)
        return actions

    # -------------------------------------------------------------- messages

    def _received(self, message: ToWorker, frames: tuple[Frame, ...], now: float) -> list[Action]:
        if self._state is _S.CONNECTING:
            return []
        self._heard_at = now
        if self._state is _S.GREETING and not isinstance(message, Welcome | Refused | Pong):
            return []
        had_layers = bool(self._stages.epochs)
        actions = self._obey(message, frames, now)
        if had_layers and not self._stages.epochs:
            self._probing.lost_layers(now)
        return actions

    def _obey(self, message: ToWorker, frames: tuple[Frame, ...], now: float) -> list[Action]:
        match message:
            case Welcome():
                return self._welcomed(message, now)
            case Refused():
                return self._refused(message)
            case Renamed(worker_id=name):
                self._stages.rename(name)
                return [Log(f"is called {name} now")]
            case MayLeave(why=why):
                return self._may_leave(why)
            case Notice(text=text):
                return [*self._notices.add(text, now)]
            case Pong():
                return []
            case Task():
                return self._stages.run(message, frames, now)
            case LoadStage():
                return self._stages.load(message, now)
            case GiveWeights():
                self._stages.give_weights(message)
                return []
            case CopyKV():
                return self._stages.copy_kv(message, now)
            case HandOver():
                return self._stages.hand_over(message, now)
            case UndoMove(epoch=epoch):
                return self._stages.undo_move(epoch)
            case DropStage(epoch=epoch):
                return self._stages.drop(epoch)
            case ReleaseSequences():
                return self._stages.release(message)
            case _:
                assert_never(message)

    def _garbage(self, error: DistributedLLMError, now: float) -> list[Action]:
        if self._state is _S.CONNECTING:
            return []
        if isinstance(error, ProtocolMismatch):
            return self._fail(error)
        told = self._stages.unread(error) if isinstance(error, RemoteProtocolError) else []
        return [*told, *self._warn(f"cannot read a message: {error}"[:1000], now)]

    # -------------------------------------------------------------- the session

    def _change(self, cause: AgentCause) -> None:
        self._state = AGENT_STATES.after(self._state, cause)

    def _connected(self, addresses: Addresses, now: float) -> list[Action]:
        self._change(_C.CONNECTED)
        self._heard_at = now
        self._reached = True
        hello = WorkerHello(
            name=self._name,
            instance=self._instance,
            capabilities=self._capabilities,
            peer_addresses=addresses,
        )
        return [Send(hello)]

    def _welcomed(self, welcome: Welcome, now: float) -> list[Action]:
        if self._state in _IN_SESSION:
            return self._warn("ignored a second welcome", now)
        self._change(_C.WELCOMED)
        self._connect_by = None
        self._stages = Stages(self._session, welcome.worker_id, self._warn)
        self._heartbeat_interval_s = welcome.heartbeat_interval_s
        self._silence_timeout_s = welcome.silence_timeout_s
        self._heartbeat_at = now
        self._probing = Probing(self._session, now=now)
        return [Log(f"joined {self._address} as {welcome.worker_id}")]

    def _refused(self, refusal: Refused) -> list[Action]:
        if refusal.code == "lost":
            return self._lose_session(refusal.message)
        return self._fail(error_from_wire(refusal.code, refusal.message, 0.0))

    def _lose_session(self, why: str) -> list[Action]:
        self._change(_C.SESSION_LOST)
        self._session += 1
        lost, self._stages = self._stages, Stages(self._session, self._name, self._warn)
        following = End(self._signal) if self._state is _S.ENDED else Reconnect()
        return [*lost.end(), Log(why, "warning"), following]

    def _load_failed(self, event: LoadFailed) -> list[Action]:
        told = self._stages.load_failed(event)
        if not told:
            return []
        error = event.error
        lasts = isinstance(error, CheckpointError) and not isinstance(error, CheckpointUnavailable)
        if lasts and self._stages.serving is None:
            return [*told, *self._fail(error)]
        return [*told, Log(str(error), "error")]

    # -------------------------------------------------------------- leaving

    def _signalled(self, signal: int, now: float) -> list[Action]:
        serving = self._stages.serving
        if self._state is not _S.JOINED or self._leave_timeout_s <= 0 or serving is None:
            return self._end(signal)
        self._change(_C.ASKED_TO_LEAVE)
        self._leave_by, self._signal = now + self._leave_timeout_s, signal
        when = f"once other workers have {layers_text(serving.layers)}"
        return [Send(Leaving()), Log(f"leaving {when}; a second signal ends at once")]

    def _may_leave(self, why: str) -> list[Action]:
        return [Log(f"leaving: {why}" if why else "leaving"), *self._end(self._signal)]

    def _end(self, signal: int) -> list[Action]:
        self._change(_C.STOPPED)
        return [Send(Goodbye()), End(signal)]

    def _fail(self, error: DistributedLLMError) -> list[Action]:
        self._change(_C.STOPPED)
        return [Fail(error)]

    # -------------------------------------------------------------- for the operator

    def _warn(self, text: str, now: float) -> list[Action]:
        """Return a line for the operator, or nothing if there were many in the last minute."""
        admitted = self._log_limit.admits(_DROPPED, now=now)
        return [Log(text, "warning")] if admitted else []

    def _unreachable(self, reached: bool) -> CoordinatorUnreachable:
        why = no_coordinator_text(reached)
        return CoordinatorUnreachable(
            f"No coordinator at {self._address} after {self._connect_timeout_s:g} s: {why}. Check "
            "the address and port, that `dllm coordinator` runs there with a --bind that other "
            "machines can reach, and that no firewall is between. To wait for it, give --wait."
        )
