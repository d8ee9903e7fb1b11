"""The coordinator's edge: socket, timer, text process, threads for planning. Decides nothing."""

import asyncio
import contextlib
import functools
import logging
import secrets
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, assert_never

from distributed_llm.common import codec
from distributed_llm.common.addresses import addresses_for_others
from distributed_llm.common.alarm import Alarm
from distributed_llm.common.errors import (
    DistributedLLMError,
    LocalProtocolError,
    ProtocolMismatch,
    RemoteProtocolError,
    internal_error,
)
from distributed_llm.common.keys import PublicKey
from distributed_llm.common.messages import ToReader
from distributed_llm.common.sampling_params import MAX_SEED
from distributed_llm.common.settings import CoordinatorSettings
from distributed_llm.common.stopping import on_signal, on_uncaught
from distributed_llm.common.tensors import Frame
from distributed_llm.common.transport import Delivery, Router
from distributed_llm.common.types import PeerId
from distributed_llm.coordinator.core import Core
from distributed_llm.coordinator.events import (
    Action,
    AnswerAboutWeights,
    AskText,
    ConnectionClosed,
    Detokenize,
    Event,
    Forget,
    Garbage,
    KeepMembers,
    Log,
    Received,
    Send,
    Stalled,
    Stop,
    Studied,
    Study,
    StudyFailed,
    Tokenize,
    Unreachable,
)
from distributed_llm.coordinator.model import ServedModel, TokenizerFacts
from distributed_llm.coordinator.text.service import TextAction, TextService
from distributed_llm.coordinator.trust.access import Access
from distributed_llm.coordinator.trust.store import Trust
from distributed_llm.weights.giving.desk import Desk
from distributed_llm.weights.giving.library import Library

logger = logging.getLogger(__name__)

_STUDY_THREADS = 2
"""Threads for planning: a plan after a loss need not wait for a search for better plans."""

_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class Coordinator:
    """Serves one model at one address.

    Args:
        folder: folder of the model's tokenizer.
        bind: "HOST:PORT" to listen on.
        on_listening: called with the address once it is open.
        trust: the coordinator's keys and who may connect; None lets everybody in, unencrypted.
        library: the weights of the model, for workers that lack them.
    """

    def __init__(
        self,
        model: ServedModel,
        folder: Path,
        settings: CoordinatorSettings,
        *,
        bind: str,
        on_listening: Callable[[str], None],
        trust: Trust | None,
        library: Library,
    ) -> None:
        self._trust = trust
        self._library = library
        self._model = model
        self._folder = folder
        self._settings = settings
        self._bind = bind
        self._on_listening = on_listening

    async def run(self) -> int:
        """Serve until SIGINT or SIGTERM; return the signal's number.

        Raises:
            AddressInUse: the address cannot be listened on.
            CheckpointError: the tokenizer cannot be read.
            UnsupportedModel: a worker found that the model cannot be split.
            DistributedLLMError: this program has a bug, and cannot go on.
        """
        self._loop = asyncio.get_running_loop()
        self._stopped: asyncio.Future[int] = self._loop.create_future()
        on_signal(self._stop)
        on_uncaught(lambda exc: self._fail(internal_error(exc)))
        context_length = self._model.defaults.context_length
        self._text = TextService(self._folder, context_length, self._apply_all)
        try:
            ready = asyncio.create_task(self._text.ready())
            either: tuple[asyncio.Future[Any], ...] = (ready, self._stopped)
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if self._stopped.done():
                ready.cancel()
                return self._stopped.result()
            return await self._serve(ready.result().facts)
        finally:
            self._text.close()

    async def _serve(self, tokenizer: TokenizerFacts) -> int:
        model = self._model.with_tokenizer(tokenizer)
        members = self._trust.members if self._trust else None
        access = Access(members, wall_clock=time.time)
        self._core = Core(
            model, self._settings, draw_seed=lambda: secrets.randbelow(MAX_SEED), access=access
        )
        self._alarm = Alarm(self._on_timer, lambda stall_s: self._apply(Stalled(stall_s)))
        self._router = Router(
            self._bind,
            self._on_message,
            lambda: self._apply(ConnectionClosed()),
            door=self._trust.door if self._trust else None,
        )
        self._desk = Desk(
            self._library,
            self._answer,
            max_bytes_per_s=self._settings.max_transfer_rate,
        )
        self._study_threads = ThreadPoolExecutor(_STUDY_THREADS, thread_name_prefix="study")
        try:
            access.addresses = addresses_for_others(self._router.address)
            self._on_listening(self._router.address)
            self._perform(self._core.start(now=self._loop.time()))
            return await self._stopped
        finally:
            self._alarm.cancel()
            self._desk.close()
            self._study_threads.shutdown(cancel_futures=True)
            self._router.close()

    def _stop(self, number: int) -> None:
        if not self._stopped.done():
            self._stopped.set_result(number)

    def _fail(self, error: DistributedLLMError) -> None:
        if not self._stopped.done():
            self._stopped.set_exception(error)

    # -------------------------------------------------------------- events

    def _on_message(self, peer: PeerId, key: PublicKey, frames: list[Frame]) -> None:
        try:
            message, tensors = codec.to_coordinator.decode(frames)
        except ProtocolMismatch as exc:
            self._apply(Garbage(peer, exc.code, exc, key))
        except RemoteProtocolError as exc:
            self._apply(Garbage(peer, exc.reason, exc, key))
        else:
            self._apply(Received(peer, message, tensors, key))

    def _answer(self, peer: PeerId, message: ToReader, frames: tuple[Frame, ...]) -> None:
        self._router.send(peer, codec.encode(message, frames))  # who is gone or stuck asks again

    def _apply(self, *events: Event) -> None:
        self._apply_all(events)

    def _apply_all(self, events: Iterable[Event]) -> None:
        for event in events:
            self._do(functools.partial(self._core.handle, event))

    def _on_timer(self) -> None:
        self._router.deliver_waiting()  # before anybody is taken for silent
        self._do(self._core.on_timer)

    def _do(self, decide: Callable[..., list[Action]]) -> None:
        """Have the core decide what to do now, and do it; end if that meets a bug.

        Whoever went on would serve in a state that nobody knows, or without a timer.
        """
        if self._stopped.done():
            return
        try:
            self._perform(decide(now=self._alarm.now()))
            self._alarm.set(self._core.next_deadline())
        except Exception as exc:
            logger.exception("the coordinator cannot go on")
            self._fail(internal_error(exc))

    # -------------------------------------------------------------- actions

    def _perform(self, actions: list[Action]) -> None:
        texts = [one for one in actions if isinstance(one, TextAction)]
        if texts:  # all of a step at once
            self._text.perform(texts)
        for action in actions:
            self._perform_one(action)

    def _perform_one(self, action: Action) -> None:
        match action:
            case Send():
                self._send(action)
            case Tokenize() | Detokenize() | Forget() | AskText():
                pass  # performed with the others above
            case Log(text=text, level=level):
                logger.log(_LEVELS[level], "%s", text)
            case AnswerAboutWeights(peer=peer, request=request):
                self._desk.asked(peer, request)
            case KeepMembers(state=state):
                if self._trust:
                    self._trust.keep(state)
            case Study():
                self._study_threads.submit(self._study, action)
            case Stop(error=error):
                self._fail(error)
            case _:
                assert_never(action)

    def _send(self, action: Send) -> None:
        try:
            frames = codec.encode(action.message, action.frames)
        except LocalProtocolError as exc:  # a bug here, but of one message: the others are served
            logger.exception("a message cannot be sent")
            self._loop.call_soon(self._apply, Unreachable(action.peer, f"cannot be told: {exc}"))
            return
        delivery = self._router.send(action.peer, frames)
        if delivery is not Delivery.SENT:
            why = "is gone" if delivery is Delivery.GONE else "reads too slowly"
            self._loop.call_soon(self._apply, Unreachable(action.peer, why))

    # -------------------------------------------------------------- the study threads

    def _study(self, study: Study) -> None:
        try:
            self._tell(Studied(study.question.reply()))
        except Exception as exc:
            self._tell(StudyFailed(study.question, repr(exc), traceback.format_exc()))

    def _tell(self, *events: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to hear
            self._loop.call_soon_threadsafe(self._apply, *events)
