"""The worker's edge: sockets, timer and compute thread, joined to the agent that decides.

Everything that happens becomes an event for the agent; the actions it returns are carried out here.
"""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable
from typing import assert_never

import psutil

from distributed_llm.common import codec
from distributed_llm.common.alarm import Alarm
from distributed_llm.common.connection import Connection, rejection_error
from distributed_llm.common.errors import (
    DistributedLLMError,
    LocalProtocolError,
    ProtocolMismatch,
    RemoteProtocolError,
    internal_error,
)
from distributed_llm.common.keys import PublicKey
from distributed_llm.common.messages import (
    Capabilities,
    FromWorker,
    Heartbeat,
    LoadStage,
    ReadChunk,
    Task,
    TaskFailed,
)
from distributed_llm.common.stopping import on_signal, on_uncaught
from distributed_llm.common.tensors import Frame
from distributed_llm.common.transport import Login
from distributed_llm.common.types import Epoch, PeerId
from distributed_llm.weights.cache.content_cache import ContentCache
from distributed_llm.weights.fetch import Fetch, Origin
from distributed_llm.weights.giving.giver import Giver
from distributed_llm.weights.giving.shelf import Shelf
from distributed_llm.worker.compute.engine import Engine
from distributed_llm.worker.compute.finding import WeightFinder
from distributed_llm.worker.fetch_display import FetchDisplay
from distributed_llm.worker.links import Links, reachable_at
from distributed_llm.worker.session.agent import Agent
from distributed_llm.worker.session.events import (
    Action,
    AssembleKV,
    Connected,
    Disconnected,
    Drop,
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
    Rejected,
    Release,
    Run,
    Send,
    SendHeartbeat,
    Serve,
    Signalled,
    Stalled,
    Unload,
)
from distributed_llm.worker.session.link_events import (
    CloseLink,
    ForwardTask,
    Greet,
    LinkId,
    OpenLink,
    SendOverLink,
    SendToPeer,
)

logger = logging.getLogger(__name__)

_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_STOP_TIMEOUT_S = 2.0


class Worker:
    """A worker of one coordinator; `run` runs it.

    Args:
        name: the name to ask the coordinator for.
        capabilities: of this machine, with the device to compute on.
        address: "HOST:PORT" of the coordinator.
        addresses: what that stands for, "HOST:PORT"s with IP addresses.
        login: the keys of both ends; None without keys.
        peer_bind: "HOST:PORT" to listen on for other workers.
        slowdown: see `Engine`.
        local_model: path of the checkpoint on this machine; empty is the coordinator's path.
        connect_timeout_s: to reach the coordinator for the first time; 0 is without limit.
        leave_timeout_s: for others to take its layers after a signal.
        cache: of weights that came from other machines.
        max_transfer_rate: bytes per second of weights from, and to, other machines; None is
            without limit.
    """

    def __init__(
        self,
        name: str,
        capabilities: Capabilities,
        *,
        address: str,
        addresses: tuple[str, ...],
        login: Login | None,
        peer_bind: str,
        slowdown: float,
        local_model: str,
        connect_timeout_s: float,
        leave_timeout_s: float,
        cache: ContentCache,
        max_transfer_rate: int | None = None,
    ) -> None:
        self._name = name
        self._capabilities = capabilities
        self._address = address
        self._addresses = addresses
        self._login = login
        self._peer_bind = peer_bind
        self._slowdown = slowdown
        self._local_model = local_model
        self._connect_timeout_s = connect_timeout_s
        self._leave_timeout_s = leave_timeout_s
        self._cache = cache
        self._max_transfer_rate = max_transfer_rate
        self._process = psutil.Process()
        self._connection: Connection | None = None

    async def run(self) -> int:
        """Work until a signal or until drained; return the signal's number, or 0.

        After SIGINT or SIGTERM a worker that serves waits until others have its layers; a second
        signal ends it at once.

        Raises:
            CoordinatorUnreachable: no coordinator answered at the start.
            CheckpointError: this machine cannot load the model.
            ProtocolMismatch: the coordinator speaks another version.
            AddressInUse: the address for other workers cannot be listened on.
            DistributedLLMError: this program has a bug, and cannot go on.
        """
        self._loop = asyncio.get_running_loop()
        self._stopped: asyncio.Future[int] = self._loop.create_future()
        on_signal(lambda number: self._apply(Signalled(number)))
        on_uncaught(lambda exc: self._fail(internal_error(exc)))
        self._alarm = Alarm(self._on_timer, lambda stall_s: self._apply(Stalled()))
        self._links = Links(
            self._peer_bind,
            self._apply,
            keys=self._login.keys if self._login else None,
            admits=lambda key: self._agent.admits(key),
            on_read=self._on_read,
        )
        self._shelf = Shelf()
        self._giver = Giver(
            self._shelf, self._links.answer, max_bytes_per_s=self._max_transfer_rate
        )
        self._agent = Agent(
            self._name,
            self._capabilities,
            instance=secrets.token_hex(16),
            address=self._address,
            connect_timeout_s=self._connect_timeout_s,
            leave_timeout_s=self._leave_timeout_s,
            now=self._alarm.now(),
        )
        self._engine = Engine(
            self._capabilities,
            slowdown=self._slowdown,
            weights=WeightFinder(self._local_model, self._start_fetch),
            is_void=self._agent.is_void,
            post=self._post,
        )
        self._display = FetchDisplay(lambda: self._engine.fetch_progress)
        self._connect()
        self._alarm.set(self._agent.next_deadline())
        try:
            return await self._stopped
        finally:
            self._close()

    def _close(self) -> None:
        self._alarm.cancel()
        self._display.close()
        self._giver.close()
        self._links.close()
        if self._connection:
            self._connection.close()
        self._engine.stop(_STOP_TIMEOUT_S)

    # -------------------------------------------------------------- events

    def _connect(self) -> None:
        self._connection = Connection(
            self._address,
            self._addresses,
            self._on_message,
            self._on_connect,
            lambda: self._apply(Disconnected()),
            login=self._login,
            on_rejected=lambda why: self._apply(
                Rejected(rejection_error(self._address, self._login, why))
            ),
        )

    def _on_connect(self) -> None:
        assert self._connection is not None
        self._apply(Connected(reachable_at(self._links.address, self._connection.local_host)))

    def _on_message(self, frames: list[Frame]) -> None:
        try:
            message, tensors = codec.to_worker.decode(frames)
        except (ProtocolMismatch, RemoteProtocolError) as exc:
            self._apply(Garbage(exc))
        else:
            self._apply(Received(message, tensors))

    def _on_read(self, peer: PeerId, key: PublicKey, request: ReadChunk) -> None:
        if self._login is None or self._agent.may_read(key):
            self._giver.asked(peer, request)

    def _start_fetch(
        self, order: LoadStage, is_wanted: Callable[[], bool], on_bytes: Callable[[int], None]
    ) -> Fetch:
        keys = self._login.keys if self._login else None
        peers = {
            source.worker: Origin(
                source.addresses, Login(source.key, keys) if keys else None, source.layers
            )
            for source in order.sources
        }
        return Fetch(
            order.source,
            order.layers,
            coordinator=Origin(self._addresses, self._login, ()),
            peers=peers,
            cache=self._cache,
            shelf=self._shelf,
            max_bytes_per_s=self._max_transfer_rate,
            on_bytes=on_bytes,
            is_wanted=is_wanted,
        )

    def _post(self, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to hear
            self._loop.call_soon_threadsafe(self._apply, event)

    def _apply(self, event: Event) -> None:
        self._do(lambda: self._agent.handle(event, now=self._alarm.now()))

    def _on_timer(self) -> None:
        if self._connection:
            self._connection.deliver_waiting()  # before the coordinator is taken for silent
        reached = self._connection is not None and self._connection.reached
        self._do(lambda: self._agent.on_timer(reached=reached, now=self._alarm.now()))

    def _do(self, decide: Callable[[], list[Action]]) -> None:
        """Have the agent decide what to do now, and do it; end if that meets a bug."""
        if self._stopped.done():
            return
        try:
            for action in decide():
                self._perform(action)
            self._alarm.set(self._agent.next_deadline())
        except Exception as exc:
            logger.exception("the worker cannot go on")
            self._fail(internal_error(exc))

    # -------------------------------------------------------------- actions

    def _perform(self, action: Action) -> None:
        match action:
            case Send(message=sent, frames=frames):
                self._send(sent, frames)
            case SendHeartbeat(epochs=epochs):
                self._send(self._heartbeat(epochs))
            case ForwardTask(task=task, frames=frames):
                self._forward(task, frames)
            case (
                Load()
                | Run()
                | Release()
                | Drop()
                | Serve()
                | Unload()
                | ExportKV()
                | ImportKV()
                | AssembleKV()
                | Probe()
            ):
                self._engine.put(action)
            case OpenLink(link=link, addresses=addresses, key=key):
                self._links.open(link, addresses, key)
            case Greet(link=link, hello=hello, addresses=addresses):
                self._links.greet(link, hello, addresses)
            case SendOverLink(link=link, message=over, frames=frames):
                self._links.send(link, over, frames)
            case CloseLink(link=link):
                self._links.close_link(link)
            case SendToPeer(peer=peer, message=answer):
                self._links.answer(peer, answer)
            case Reconnect():
                self._loop.call_soon(self._reconnect)
            case Log(text=text, level=level):
                logger.log(_LEVELS[level], "%s", text)
            case End(signal=signal):
                if not self._stopped.done():
                    self._stopped.set_result(signal)
            case Fail(error=error):
                self._fail(error)
            case _:
                assert_never(action)

    def _send(self, message: FromWorker, frames: tuple[Frame, ...] = ()) -> None:
        if self._connection:
            self._connection.send(codec.encode(message, frames))

    def _forward(self, task: Task, frames: tuple[Frame, ...]) -> None:
        try:
            self._links.send(LinkId(task.epoch), task, frames)
        except LocalProtocolError as exc:  # with the timings, its header is too long
            self._send(
                TaskFailed(epoch=task.epoch, step=task.step, code=exc.code, message=str(exc))
            )

    def _heartbeat(self, epochs: tuple[Epoch, ...]) -> Heartbeat:
        load_progress = self._engine.load_progress
        return Heartbeat(
            epochs=epochs,
            progress_age_s=self._engine.progress_age_s(),
            tasks_waiting=self._engine.vitals.tasks_waiting,
            memory_used_bytes=self._process.memory_info().rss,
            kv_bytes=self._engine.vitals.kv_bytes,
            loading=load_progress is not None,
            load_progress=load_progress or 0,
            fetch=self._engine.fetch_progress,
        )

    def _reconnect(self) -> None:
        if self._connection and not self._stopped.done():
            old = self._connection
            self._connect()
            old.close()  # after the new one is open: closing the last one would wait

    def _fail(self, error: DistributedLLMError) -> None:
        if not self._stopped.done():
            self._stopped.set_exception(error)
