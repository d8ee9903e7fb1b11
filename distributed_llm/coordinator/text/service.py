"""The coordinator's end of its text process: starts it, and starts it again when it dies."""

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from distributed_llm.common.errors import DistributedLLMError, TextError, error_from_wire
from distributed_llm.coordinator.events import AskText, Detokenize, Forget, Tokenize
from distributed_llm.coordinator.text.messages import (
    Answered,
    Begun,
    Encoded,
    Failed,
    Order,
    Ready,
    Reply,
    Texts,
    Unpacker,
    Unusable,
    pack,
)
from distributed_llm.coordinator.text.orders import TextEvent, TextOrders

logger = logging.getLogger(__name__)

_RETRY_S = 1.0
"""Time after which a text process is started again that ended before it was ready, seconds."""

_STEP_S = 30.0
"""Time that the tokens of one step may take to become text, seconds: usually a millisecond."""

_PROMPT_S = 60.0
"""Time that a prompt may take to be tokenized, seconds; and besides, for its length:"""

_PROMPT_BYTES_PER_S = 50_000.0
"""Tokenizing no faster than this, a process has hung; a slow machine does ten times as much."""

_END_S = 1.0
"""Time that a text process which has closed its socket has to end by itself, seconds."""

TextAction = Tokenize | Detokenize | Forget | AskText


class TextService:
    """Has prompts turned into token ids, and tokens into text, by a process beside this one.

    Args:
        folder: folder of the tokenizer.
        context_length: tokens that the model can take.
        tell: called with the events that the text process brings about.
    """

    def __init__(
        self, folder: Path, context_length: int, tell: Callable[[Sequence[TextEvent]], None]
    ) -> None:
        self._folder = folder
        self._context_length = context_length
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self._orders = TextOrders()
        self._started: asyncio.Future[Ready] = self._loop.create_future()
        self._link: _Link | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._watches: dict[int | None, asyncio.TimerHandle] = {}  # by request; None is for steps
        self._closed = False
        self._start()

    async def ready(self) -> Ready:
        """Return what the text process says once its tokenizer is loaded.

        Raises:
            CheckpointError: the tokenizer cannot be read.
            TextError: the process has ended.
        """
        return await self._started

    @property
    def pid(self) -> int | None:
        """Id of the text process; None while there is none."""
        return self._link.process.pid if self._link else None

    def perform(self, actions: Sequence[TextAction]) -> None:
        """Send orders; the tokens of a step go in one, as the way there takes longest."""
        tokens = [action for action in actions if isinstance(action, Detokenize)]
        orders: list[Order | None] = [self._orders.tokens(tokens)] if tokens else []
        for action in actions:
            if isinstance(action, Tokenize):
                orders.append(self._orders.prompt(action))
            elif isinstance(action, AskText):
                orders.append(self._orders.question(action))
            elif isinstance(action, Forget):
                orders.append(self._orders.forget(action))
        if self._link:
            self._link.send([order for order in orders if order])
            if self._link.ready and None not in self._watches:
                self._watch_steps()
        elif any(orders):
            self._loop.call_soon(self._give_up_all, self._unavailable())

    def close(self) -> None:
        """End the text process, and wait until it is gone."""
        self._closed = True
        self._unwatch_all()
        if self._retry:
            self._retry.cancel()
        if self._link:
            self._link.end()

    def _start(self) -> None:
        self._retry = None
        try:
            self._link = _Link(self._folder, self._context_length, self._replied, self._lost)
        except OSError as exc:  # too many processes or open files
            self._failed_to_start(TextError(f"The text process cannot be started: {exc}."))
            return
        self._link.send(self._orders.again())

    def _replied(self, reply: Reply) -> None:
        match reply:
            case Ready():
                assert self._link is not None
                self._link.ready = True
                if not self._started.done():
                    self._started.set_result(reply)
                self._watch_steps()
            case Unusable(code=code, message=message):
                assert self._link is not None
                self._link.error = error_from_wire(code, message, 0.0)
            case _:
                events = self._orders.replied(reply)
                self._watch_progress(reply)
                if events:
                    self._tell(events)

    def _watch_progress(self, reply: Begun | Encoded | Answered | Failed | Texts) -> None:
        match reply:
            case Begun(request=request, num_bytes=num_bytes):
                self._watch(request, _PROMPT_S + num_bytes / _PROMPT_BYTES_PER_S)
            case Encoded(request=request) | Answered(request=request) | Failed(request=request):
                self._unwatch(request)
            case Texts():
                self._unwatch(None)
                self._watch_steps()

    def _watch_steps(self) -> None:
        if self._orders.steps_wait:
            self._watch(None, _STEP_S)

    def _watch(self, what: int | None, limit_s: float) -> None:
        """End the text process unless it has done something within `limit_s`."""
        self._unwatch(what)
        self._watches[what] = self._loop.call_later(limit_s, self._stuck, limit_s)

    def _unwatch(self, what: int | None) -> None:
        if watch := self._watches.pop(what, None):
            watch.cancel()

    def _unwatch_all(self) -> None:
        for what in list(self._watches):
            self._unwatch(what)

    def _stuck(self, limit_s: float) -> None:
        if self._link:
            self._link.stuck = f"made no progress for {limit_s:.0f} s"
            self._link.process.kill()

    def _lost(self) -> None:
        """The text process has closed its end: it is dead, or about to die."""
        link, self._link = self._link, None
        self._unwatch_all()
        if self._closed or link is None:
            return
        how = link.stuck or link.how_it_ended()
        link.end()
        if not link.ready:
            why = TextError(f"The text process {how} before it had loaded the tokenizer.")
            self._failed_to_start(link.error or why)
            return
        logger.error("the text process %s; starting it again", how)
        error = TextError(
            f"The process that turns text into tokens {how} while it worked on this request. It is "
            "started again: send the request once more, and if that fails too, look at the "
            "coordinator's memory and log."
        )
        self._tell(self._orders.died(error))
        self._start()

    def _failed_to_start(self, error: DistributedLLMError) -> None:
        if not self._started.done():
            self._started.set_exception(error)
            return
        logger.error("%s Trying again in %g s.", error, _RETRY_S)
        self._give_up_all(error)
        self._retry = self._loop.call_later(_RETRY_S, self._start)

    def _give_up_all(self, error: DistributedLLMError) -> None:
        self._tell(self._orders.give_up_all(error))

    def _unavailable(self) -> TextError:
        return TextError(
            "The process that turns text into tokens does not start. The coordinator's log says "
            f"why; it is tried again every {_RETRY_S:g} s."
        )


class _Link(asyncio.Protocol):
    """A text process and the connection to it.

    Attributes:
        ready: whether it has loaded its tokenizer.
        error: why it cannot; None if it did not say.
        stuck: what it failed to do, so that it was ended; empty if it was not.
    """

    def __init__(
        self,
        folder: Path,
        context_length: int,
        on_reply: Callable[[Reply], None],
        on_lost: Callable[[], None],
    ) -> None:
        self.ready = False
        self.error: DistributedLLMError | None = None
        self.stuck = ""
        self._on_reply = on_reply
        self._on_lost = on_lost
        self._unpacker = Unpacker(Reply)
        self._outbox: list[bytes] = []
        self._transport: asyncio.Transport | None = None
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self.process = _spawn(theirs, folder, context_length)
        except BaseException:
            ours.close()
            raise
        ours.setblocking(False)
        loop = asyncio.get_running_loop()
        self._connecting = loop.create_task(loop.create_connection(lambda: self, sock=ours))

    def send(self, orders: Sequence[Order]) -> None:
        """Queue orders; never blocks."""
        data = b"".join(map(pack, orders))
        if self._transport:
            self._transport.write(data)
        elif data:
            self._outbox.append(data)

    def end(self) -> None:
        """End the process, and wait until it is gone."""
        if self._transport:
            self._transport.abort()
        self.process.kill()
        self.process.wait()

    def how_it_ended(self) -> str:
        """Return how the process ended, which has closed its socket ("was killed by ...")."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_END_S)
        self.process.kill()
        code = self.process.wait()
        return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send what has waited."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        for data in self._outbox:
            transport.write(data)
        self._outbox.clear()

    def data_received(self, data: bytes) -> None:
        """Take the replies that are complete."""
        for reply in self._unpacker.feed(data):
            self._on_reply(reply)

    def connection_lost(self, exc: Exception | None) -> None:
        """Say that it is gone."""
        self._on_lost()


def _spawn(link: socket.socket, folder: Path, context_length: int) -> "subprocess.Popen[bytes]":
    """Start a text process with one end of a connection.

    It is not part of the terminal's group of processes, so that Ctrl-C does not end it before the
    coordinator has ended.
    """
    module = "distributed_llm.coordinator.text.process"
    handle = "" if sys.platform == "win32" else str(link.fileno())
    command = [sys.executable, "-m", module, handle, str(folder), str(context_length)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}  # one text is one thread's work
    if sys.platform == "win32":
        process = subprocess.Popen(  # noqa: S603
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            creationflags=subprocess.CREATE_NEW_PROCESS_GROUP,
        )
        assert process.stdin is not None
        with process.stdin as stdin:
            stdin.write(link.share(process.pid).hex().encode() + b"\n")
        return process
    return subprocess.Popen(  # noqa: S603
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=[link.fileno()],
        start_new_session=True,
    )
