"""A worker's decisions: hello, heartbeats, silence, and when to leave. Pure.

    connecting --connected--> greeting --Welcome--> joined --connection lost--> connecting

What was asked for in one session is never answered in another: the coordinator may be a new one.
What arrives before the welcome, or after the connection was given up, is of no session. What it
does in a session is decided in `stages`.

While it has no layers it measures its machine again now and then: nobody else would notice that
it has become faster. The first time is right after it lost them, to compare with.

Told to end while it serves, it says so and serves on, so that others can take its layers over;
until it may leave, or that has taken too long, or it is told again.
"""

import math
from typing import Literal

from distributed_llm.common.errors import (
    CoordinatorUnreachable,
    ProtocolMismatch,
    error_from_wire,
)
from distributed_llm.common.messages import (
    Capabilities,
    Goodbye,
    Leaving,
    MayLeave,
    Pong,
    Refused,
    Welcome,
    WorkerHello,
)
from distributed_llm.worker.session.events import (
    Action,
    AssembleKV,
    Connected,
    Disconnected,
    End,
    Event,
    ExportKV,
    Fail,
    Garbage,
    ImportKV,
    Load,
    Log,
    Probe,
    Received,
    Reconnect,
    Run,
    Send,
    SendHeartbeat,
    Signalled,
)
from distributed_llm.worker.session.link_events import (
    LinkDown,
    LinkReached,
    LinkReceived,
    LinkUp,
    PeerGarbage,
    PeerReceived,
)
from distributed_llm.worker.session.stages import Stages

_GREETING_TIMEOUT_S = 4.0
_WARN_EVERY_S = 1.0
_PROBE_EVERY_S = 10.0


class Agent:
    """One worker.

    Args:
        name: that it asks for.
        capabilities: of this machine.
        address: of the coordinator, for messages.
        connect_timeout_s: for the first connection; later ones are tried for ever.
        leave_timeout_s: how long others may take its layers over before it ends; 0 is not at all.
        now: when it was made, clock seconds.
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
        self._state: Literal["connecting", "greeting", "joined"] = "connecting"
        self._session = 0
        self._stages = Stages(0, name, self._warn)
        self._reached = False
        self._heartbeat_interval_s = 0.0
        self._silence_timeout_s = 0.0
        self._heard_at = now
        self._beat_at = now
        self._probe_at = now  # while it has no layers
        self._warned_at = -math.inf
        self._connect_by: float | None = now + connect_timeout_s
        self._leave_by = math.inf
        self._signal = 0  # that it leaves for

    @property
    def epoch(self) -> int:
        """The newest epoch that was ordered or dropped in this session."""
        return self._stages.newest

    def is_void(self, order: Load | Run | ExportKV | ImportKV | AssembleKV | Probe) -> bool:
        """Return whether nobody waits for this any more; may be called from any thread."""
        return self._stages.is_void(order)

    def handle(self, event: Event, *, now: float) -> list[Action]:
        """Apply one event at `now` (clock seconds) and return what to do about it."""
        match event:
            case Received() | Garbage() if self._state == "connecting":
                return []
            case Received(message=message):
                self._heard_at = now
                if self._state == "greeting" and not isinstance(message, Welcome | Refused | Pong):
                    return []
                return self._received(event, now)
            case PeerReceived():
                return self._stages.peer_received(event, now)
            case LinkReached() | LinkUp() | LinkDown() | LinkReceived():
                return self._stages.linked(event, now)
            case Connected(peer_addresses=addresses):
                self._state, self._heard_at = "greeting", now
                self._reached = True
                return [Send(self._hello(addresses))]
            case Disconnected():
                return self._leave_session("The coordinator is gone; trying to find it again.")
            case Garbage(error=error) if isinstance(error, ProtocolMismatch):
                return [Fail(error)]
            case Garbage(error=error) | PeerGarbage(error=error):
                return self._warn(f"dropped a message: {error}"[:1000], now)
            case Signalled(number=number):
                return self._signalled(number, now)
            case _:
                return self._stages.done(event, now)

    def next_deadline(self) -> float | None:
        """Return when `on_timer` is next due, clock seconds, or None."""
        if self._state == "joined":
            silent_at = self._heard_at + self._silence_timeout_s
            probe_at = math.inf if self._stages.epochs else self._probe_at
            stages_at = self._stages.next_deadline()
            return min(self._beat_at, silent_at, self._leave_by, stages_at, probe_at)
        if self._state == "greeting":
            silent_at = self._heard_at + _GREETING_TIMEOUT_S
            return silent_at if self._connect_by is None else min(silent_at, self._connect_by)
        return self._connect_by

    def on_timer(self, *, reached: bool, now: float) -> list[Action]:
        """Do what is due; `reached` tells whether anything at all listens at the address."""
        if self._connect_by is not None and self._connect_by <= now:
            return [Fail(self._unreachable(reached or self._reached))]
        if self._state == "connecting":
            return []
        timeout_s = self._silence_timeout_s if self._state == "joined" else _GREETING_TIMEOUT_S
        if self._heard_at + timeout_s <= now:
            return self._leave_session("The coordinator is silent; connecting anew.")
        if self._state == "greeting":
            return []
        if self._leave_by <= now:
            why = f"nobody took the layers over within {self._leave_timeout_s:g} s; ends"
            return [Log(why, "warning"), *self._end(self._signal)]
        actions = self._stages.on_timer(now)
        if self._beat_at <= now:
            self._beat_at = now + self._heartbeat_interval_s
            actions.append(SendHeartbeat(self._stages.epochs))
        if self._probe_at <= now and not self._stages.epochs:
            self._probe_at = now + _PROBE_EVERY_S
            actions.append(Probe(self._session))
        return actions

    # -------------------------------------------------------------- the session

    def _hello(self, addresses: tuple[str, ...]) -> WorkerHello:
        return WorkerHello(
            name=self._name,
            instance=self._instance,
            capabilities=self._capabilities,
            peer_addresses=addresses,
        )

    def _received(self, event: Received, now: float) -> list[Action]:
        match event.message:
            case Welcome() as welcome:
                return self._join(welcome, now)
            case Refused(code="lost", message=why):
                return self._leave_session(why)
            case Refused(code=code, message=why):
                return [Fail(error_from_wire(code, why, 0.0))]
            case MayLeave(why=why):
                return self._may_leave(why)
            case Pong():
                return []
            case message:
                held = self._stages.epochs
                actions = self._stages.obey(message, event.frames, now)
                if held and not self._stages.epochs:
                    self._probe_at = now
                return actions

    def _join(self, welcome: Welcome, now: float) -> list[Action]:
        self._state, self._connect_by = "joined", None
        self._stages = Stages(self._session, welcome.worker_id, self._warn)
        self._heartbeat_interval_s = welcome.heartbeat_interval_s
        self._silence_timeout_s = welcome.silence_timeout_s
        self._beat_at = now
        self._probe_at = now + _PROBE_EVERY_S
        return [Log(f"joined {self._address} as {welcome.worker_id}")]

    def _leave_session(self, why: str) -> list[Action]:
        self._state = "connecting"
        self._session += 1
        ended, self._stages = self._stages, Stages(self._session, self._name, self._warn)
        actions = [*ended.end(), Log(why, "warning")]
        if self._leave_by < math.inf:
            return [*actions, End(self._signal)]
        return [*actions, Reconnect()]

    # -------------------------------------------------------------- leaving

    def _signalled(self, number: int, now: float) -> list[Action]:
        serving = self._stages.serving if self._state == "joined" else None
        if self._leave_by < math.inf or self._leave_timeout_s <= 0 or serving is None:
            return self._end(number)
        self._leave_by, self._signal = now + self._leave_timeout_s, number
        layers = f"handing layers {serving.layers} over to other workers"
        return [Send(Leaving()), Log(f"{layers}; a second signal ends at once")]

    def _may_leave(self, why: str) -> list[Action]:
        told = f": {why}" if why else ""
        return [Log(f"may leave{told}"), *self._end(self._signal)]

    def _end(self, number: int) -> list[Action]:
        return [Send(Goodbye()), End(number)]

    # -------------------------------------------------------------- for the operator

    def _warn(self, text: str, now: float) -> list[Action]:
        """Return a line for the operator, unless there was one a moment ago."""
        if now < self._warned_at + _WARN_EVERY_S:
            return []
        self._warned_at = now
        return [Log(text, "warning")]

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
