"""A worker's decisions: hello, heartbeats, epochs, tasks and their way on. Pure.

    connecting --connected--> greeting --Welcome--> joined --connection lost--> connecting

What was asked for in one session is never answered in another: the coordinator may be a new one.
What arrives before the welcome, or after the connection was given up, is of no session.

A task is run if its epoch is the one that is served and its step is not void. It may come from the
coordinator or from the worker of the stage before, and its result goes where its route says.
"""

import math
from typing import Literal, assert_never

import msgspec

from distributed_llm.common.errors import (
    CheckpointError,
    CoordinatorUnreachable,
    ProtocolMismatch,
    error_from_wire,
)
from distributed_llm.common.messages import (
    Capabilities,
    DropStage,
    LoadStage,
    PeerHello,
    Pong,
    Refused,
    ReleaseSequences,
    StageFailed,
    StageReady,
    StageTime,
    Task,
    TaskFailed,
    TaskResult,
    Welcome,
    WorkerHello,
)
from distributed_llm.common.tensors import Frame
from distributed_llm.worker.events import (
    Action,
    Beat,
    Broke,
    Computed,
    Connected,
    Disconnected,
    Drop,
    Event,
    Exit,
    Garbage,
    HandOn,
    LinkDown,
    LinkUp,
    Load,
    Loaded,
    LoadFailed,
    Log,
    NextReached,
    PeerGarbage,
    PeerReceived,
    Received,
    Reconnect,
    Release,
    Run,
    Say,
)
from distributed_llm.worker.peers import Peers

CREDITS = 32
"""Tasks that may wait or run: so many steps fill a pipeline of that many stages."""

_GREETING_TIMEOUT_S = 4.0
_WARN_EVERY_S = 1.0


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
        instance: str,
        address: str,
        connect_timeout_s: float,
        now: float,
    ) -> None:
        self._name = name
        self._instance = instance
        self._worker_id = name
        self._capabilities = capabilities
        self._address = address
        self._connect_timeout_s = connect_timeout_s
        self._state: Literal["connecting", "greeting", "joined"] = "connecting"
        self._session = 0
        self._epoch = 0
        self._oldest = 0
        self._held: set[int] = set()
        self._peers = Peers()
        self._reached = False
        self._heartbeat_interval_s = 0.0
        self._silence_timeout_s = 0.0
        self._heard_at = now
        self._beat_at = now
        self._warned_at = -math.inf
        self._connect_by: float | None = now + connect_timeout_s

    @property
    def epoch(self) -> int:
        """The newest epoch that was asked for; older work is void."""
        return self._epoch

    def is_void(self, order: Load | Run) -> bool:
        """Return whether nobody waits for this any more; may be called from any thread."""
        if isinstance(order, Load):
            return order.session != self._session or order.order.epoch != self._epoch
        task = order.task
        return (
            order.session != self._session or task.epoch != self._epoch or task.step < self._oldest
        )

    def handle(self, event: Event, *, now: float) -> list[Action]:
        """Apply one event at `now` (clock seconds) and return what to do about it."""
        match event:
            case Computed():
                return self._computed(event)
            case Broke():
                return self._broke(event)
            case Received() | Garbage() if self._state == "connecting":
                return []
            case Received(message=message):
                self._heard_at = now
                if self._state == "greeting" and not isinstance(message, Welcome | Refused | Pong):
                    return []
                return self._received(event, now)
            case PeerReceived():
                return self._peer_received(event, now)
            case NextReached(epoch=epoch, address=address):
                return self._peers.reached(epoch, address, now)
            case LinkUp(epoch=epoch, rtt_s=rtt_s):
                return self._peers.welcomed(epoch, rtt_s)
            case LinkDown(epoch=epoch):
                return self._peers.lost(epoch, now)
            case Connected(peer_addresses=addresses):
                self._state, self._heard_at = "greeting", now
                self._reached = True
                return [Say(self._hello(addresses))]
            case Disconnected():
                return self._leave_session("The coordinator is gone; trying to find it again.")
            case Garbage(error=error) if isinstance(error, ProtocolMismatch):
                return [Exit(error)]
            case Garbage(error=error) | PeerGarbage(error=error):
                return self._warn(f"dropped a message: {error}"[:1000], now)
            case Loaded() | LoadFailed():
                return self._loaded(event) if event.session == self._session else []
            case _:
                assert_never(event)

    def next_deadline(self) -> float | None:
        """Return when `on_timer` is next due, clock seconds, or None."""
        if self._state == "joined":
            silent_at = self._heard_at + self._silence_timeout_s
            return min(self._beat_at, silent_at, self._peers.next_deadline())
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
        if self._state == "greeting":
            return []
        actions = self._peers.on_timer(now)
        if self._beat_at <= now:
            self._beat_at = now + self._heartbeat_interval_s
            actions.append(Beat(self._epoch))
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
            case Task() as task:
                return self._task(task, event.frames, now)
            case Welcome() as welcome:
                return self._join(welcome, now)
            case Refused(code="lost", message=why):
                return self._leave_session(why)
            case Refused(code=code, message=why):
                return [Exit(error_from_wire(code, why, 0.0))]
            case LoadStage() as order:
                return self._load(order, now)
            case DropStage(epoch=epoch):
                if epoch < self._epoch:
                    return [Log(f"ignored an order of epoch {epoch}", "warning")]
                self._begin_epoch(epoch)
                return [*self._peers.end(), Log("no layers to serve; waiting"), Drop()]
            case ReleaseSequences(epoch=epoch, sequence_ids=ids):
                return [Release(ids)] if epoch == self._epoch else []
            case Pong():
                return []
            case _:
                assert_never(event.message)

    def _join(self, welcome: Welcome, now: float) -> list[Action]:
        self._state, self._connect_by = "joined", None
        self._worker_id = welcome.worker_id
        self._heartbeat_interval_s = welcome.heartbeat_interval_s
        self._silence_timeout_s = welcome.silence_timeout_s
        self._beat_at = now
        return [Log(f"joined {self._address} as {welcome.worker_id}")]

    def _leave_session(self, why: str) -> list[Action]:
        self._state = "connecting"
        self._session += 1
        self._begin_epoch(0)
        return [*self._peers.end(), Log(why, "warning"), Reconnect()]

    def _begin_epoch(self, epoch: int) -> None:
        self._epoch, self._oldest = epoch, 0
        self._held.clear()

    def _load(self, order: LoadStage, now: float) -> list[Action]:
        if order.epoch <= self._epoch:
            return [Log(f"ignored an order of epoch {order.epoch}", "warning")]
        self._begin_epoch(order.epoch)
        return [
            *self._peers.begin(order, self._worker_id, now),
            Log(f"loading layers {order.layers} (plan {order.epoch})"),
            Load(self._session, order),
        ]

    def _loaded(self, event: Loaded | LoadFailed) -> list[Action]:
        if isinstance(event, Loaded):
            ready = StageReady(
                epoch=event.epoch,
                credits=CREDITS,
                load_s=event.load_s,
                weight_bytes=event.weight_bytes,
                kv_tokens=event.kv_tokens,
            )
            return [Say(ready), Log(f"layers are loaded in {event.load_s:.1f} s")]
        error = event.error
        said = Say(StageFailed(epoch=event.epoch, code=error.code, message=str(error)[:4096]))
        if isinstance(error, CheckpointError):
            return [said, Exit(error)]
        return [said, Log(str(error), "error")]

    # -------------------------------------------------------------- tasks

    def _peer_received(self, event: PeerReceived, now: float) -> list[Action]:
        match event.message:
            case Task() as task:
                if self._peers.may_hand_tasks(event.peer):
                    return self._task(task, event.frames, now)
                return self._warn("dropped a task of somebody who said no hello", now)
            case PeerHello() as hello:
                if self._peers.is_forged(hello):
                    return self._warn("dropped a hello with a wrong key", now)
                return self._peers.greeted(event.peer, hello)
            case _:
                assert_never(event.message)

    def _task(self, task: Task, frames: tuple[Frame, ...], now: float) -> list[Action]:
        if task.epoch != self._epoch:
            return self._warn(f"ignored a task of epoch {task.epoch}", now)
        if task.oldest > self._oldest:
            self._oldest = task.oldest
            self._held = {step for step in self._held if step >= task.oldest}
        if task.step < self._oldest or task.step in self._held:
            return []
        if len(self._held) >= CREDITS:
            return [Say(_failed(task, "too_many_tasks", f"{CREDITS} tasks wait here already"))]
        self._held.add(task.step)
        return [Run(self._session, task, frames)]

    def _computed(self, done: Computed) -> list[Action]:
        if self.is_void(done.run):
            return []
        task = done.run.task
        self._held.discard(task.step)
        own = StageTime(compute_us=done.compute_us, queued_us=done.queued_us)
        timings = (*task.timings, own)
        if task.route and task.route[0] and self._peers.link_up:
            onward = msgspec.structs.replace(
                task,
                oldest=self._oldest,
                route=task.route[1:],
                timings=timings,
                tensors=(task.tensors[0], *done.specs),
            )
            return [HandOn(onward, (done.run.frames[0], *done.frames))]
        result = TaskResult(epoch=task.epoch, step=task.step, timings=timings, tensors=done.specs)
        return [Say(result, done.frames)]

    def _broke(self, broke: Broke) -> list[Action]:
        if self.is_void(broke.run):
            return []
        task = broke.run.task
        self._held.discard(task.step)
        failed = _failed(task, broke.error.code, str(broke.error)[:4096])
        return [Say(msgspec.structs.replace(failed, missing=broke.missing))]

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


def _failed(task: Task, code: str, message: str) -> TaskFailed:
    return TaskFailed(epoch=task.epoch, step=task.step, code=code, message=message)
