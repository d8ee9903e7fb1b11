"""The worker's edge: one DEALER socket, one timer, one compute thread. It decides nothing."""

import asyncio
import contextlib
import logging
from typing import assert_never

import psutil

from distributed_llm.common import codec
from distributed_llm.common.errors import (
    DistributedLLMError,
    ProtocolMismatch,
    RemoteProtocolError,
)
from distributed_llm.common.messages import Capabilities, FromWorker, Goodbye, Heartbeat
from distributed_llm.common.stopping import on_signal
from distributed_llm.common.tensors import Frame
from distributed_llm.common.transport import Dealer
from distributed_llm.worker.agent import (
    Action,
    Agent,
    Beat,
    Connected,
    Disconnected,
    Drop,
    Event,
    Exit,
    Garbage,
    Load,
    Log,
    Received,
    Reconnect,
    Release,
    Run,
    Say,
)
from distributed_llm.worker.engine import Engine

logger = logging.getLogger(__name__)

_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_STOP_TIMEOUT_S = 2.0


class Worker:
    """Serves whatever layers one coordinator gives it.

    Args:
        name: that it asks for.
        capabilities: of this machine, with the device to compute on.
        address: "HOST:PORT" of the coordinator.
        slowdown: how many times slower to look.
        local_model: path of the checkpoint on this machine; empty is the coordinator's.
        connect_timeout_s: for the first connection.
    """

    def __init__(
        self,
        name: str,
        capabilities: Capabilities,
        *,
        address: str,
        slowdown: float,
        local_model: str,
        connect_timeout_s: float,
    ) -> None:
        self._name = name
        self._capabilities = capabilities
        self._address = address
        self._slowdown = slowdown
        self._local_model = local_model
        self._connect_timeout_s = connect_timeout_s
        self._timer: asyncio.TimerHandle | None = None
        self._process = psutil.Process()
        self._dealer: Dealer | None = None

    async def run(self) -> int:
        """Work until SIGINT or SIGTERM; return the signal's number, or 0.

        Raises:
            CoordinatorUnreachable: no coordinator answered at the start.
            CheckpointError: this machine cannot load the model.
            ProtocolMismatch: the coordinator speaks another version.
        """
        self._loop = asyncio.get_running_loop()
        self._stopped: asyncio.Future[int] = self._loop.create_future()
        on_signal(self._stop)
        self._agent = Agent(
            self._name,
            self._capabilities,
            address=self._address,
            connect_timeout_s=self._connect_timeout_s,
            now=self._loop.time(),
        )
        self._engine = Engine(
            device=self._capabilities.device,
            threads=self._capabilities.threads,
            slowdown=self._slowdown,
            local_model=self._local_model,
            newest_epoch=lambda: self._agent.epoch,
            post=self._post,
        )
        self._connect()
        self._set_timer()
        try:
            return await self._stopped
        finally:
            self._close()

    def _stop(self, number: int) -> None:
        if not self._stopped.done():
            self._say(Goodbye())
            self._stopped.set_result(number)

    def _close(self) -> None:
        if self._timer:
            self._timer.cancel()
        if self._dealer:
            self._dealer.close()
        self._engine.stop(_STOP_TIMEOUT_S)

    # -------------------------------------------------------------- events

    def _connect(self) -> None:
        self._dealer = Dealer(
            self._address,
            self._on_message,
            lambda: self._apply(Connected()),
            lambda: self._apply(Disconnected()),
        )

    def _on_message(self, frames: list[Frame]) -> None:
        try:
            message, tensors = codec.to_worker.decode(frames)
        except (ProtocolMismatch, RemoteProtocolError) as exc:
            self._apply(Garbage(exc))
        else:
            self._apply(Received(message, tensors))

    def _post(self, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to hear
            self._loop.call_soon_threadsafe(self._apply, event)

    def _apply(self, event: Event) -> None:
        if not self._stopped.done():
            self._perform(self._agent.handle(event, now=self._loop.time()))

    def _on_timer(self) -> None:
        reached = self._dealer is not None and self._dealer.reached
        self._perform(self._agent.on_timer(reached=reached, now=self._loop.time()))

    def _set_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
        deadline = self._agent.next_deadline()
        self._timer = None if deadline is None else self._loop.call_at(deadline, self._on_timer)

    # -------------------------------------------------------------- actions

    def _perform(self, actions: list[Action]) -> None:
        try:
            for action in actions:
                self._perform_one(action)
        except Exception as exc:  # a bug here: end with it rather than be silent and not dead
            logger.exception("the worker cannot go on")
            self._fail(DistributedLLMError(f"Internal error: {exc!r}. Please report it."))
        self._set_timer()

    def _perform_one(self, action: Action) -> None:
        match action:
            case Say(message=message, frames=frames):
                self._say(message, frames)
            case Beat(epoch=epoch):
                self._say(self._heartbeat(epoch))
            case Load() | Run() | Release() | Drop():
                self._engine.put(action)
            case Reconnect():
                self._loop.call_soon(self._reconnect)
            case Log(text=text, level=level):
                logger.log(_LEVELS[level], "%s", text)
            case Exit(error=error):
                self._fail(error)
            case _:
                assert_never(action)

    def _say(self, message: FromWorker, frames: tuple[Frame, ...] = ()) -> None:
        if self._dealer:
            self._dealer.send(codec.encode(message, frames))

    def _heartbeat(self, epoch: int) -> Heartbeat:
        return Heartbeat(
            epoch=epoch,
            progress_age_s=self._engine.progress_age_s(),
            tasks_waiting=max(0, self._engine.vitals.tasks_waiting),
            memory_used_bytes=self._process.memory_info().rss,
            kv_bytes=self._engine.vitals.kv_bytes,
        )

    def _reconnect(self) -> None:
        if self._dealer and not self._stopped.done():
            self._dealer.close()
            self._connect()

    def _fail(self, error: DistributedLLMError) -> None:
        if not self._stopped.done():
            self._stopped.set_exception(error)
