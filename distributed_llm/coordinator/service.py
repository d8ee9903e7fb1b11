"""The coordinator's edge: its socket, timer, and threads for text and planning. Decides nothing."""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, assert_never

from distributed_llm.common import codec
from distributed_llm.common.errors import (
    DistributedLLMError,
    ProtocolMismatch,
    RemoteProtocolError,
)
from distributed_llm.common.sampling_params import MAX_SEED
from distributed_llm.common.settings import CoordinatorSettings
from distributed_llm.common.stopping import on_signal
from distributed_llm.common.tensors import Frame, token_ids_of_frame
from distributed_llm.common.transport import Delivery, Router
from distributed_llm.common.types import PeerId
from distributed_llm.coordinator.core import Core
from distributed_llm.coordinator.events import (
    Action,
    ConnectionClosed,
    Detokenize,
    Detokenized,
    Event,
    Forget,
    Garbage,
    Log,
    Received,
    RequestKey,
    Send,
    Stop,
    Studied,
    Study,
    StudyFailed,
    Tokenize,
    Tokenized,
    TokenizeFailed,
    Unreachable,
)
from distributed_llm.coordinator.model import ServedModel
from distributed_llm.coordinator.tokenizer import Detokenizer, Tokenizer

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
    """

    def __init__(
        self,
        model: ServedModel,
        folder: Path,
        settings: CoordinatorSettings,
        *,
        bind: str,
        on_listening: Callable[[str], None],
    ) -> None:
        self._core = Core(model, settings, draw_seed=lambda: secrets.randbelow(MAX_SEED))
        self._tokenizer = Tokenizer.open(folder)
        self._bind = bind
        self._on_listening = on_listening
        self._texts: dict[RequestKey, list[Detokenizer]] = {}  # touched by the text thread only
        self._timer: asyncio.TimerHandle | None = None

    async def run(self) -> int:
        """Serve until SIGINT or SIGTERM; return the signal's number.

        Raises:
            AddressInUse: the address cannot be listened on.
            UnsupportedModel: a worker found that the model cannot be split.
        """
        self._loop = asyncio.get_running_loop()
        self._stopped: asyncio.Future[int] = self._loop.create_future()
        on_signal(self._stop)
        self._router = Router(self._bind, self._on_message, lambda: self._apply(ConnectionClosed()))
        self._text_thread = ThreadPoolExecutor(1, thread_name_prefix="text")
        self._study_threads = ThreadPoolExecutor(_STUDY_THREADS, thread_name_prefix="study")
        try:
            self._on_listening(self._router.address)
            self._perform(self._core.start(now=self._loop.time()))
            return await self._stopped
        finally:
            if self._timer:
                self._timer.cancel()
            self._text_thread.shutdown(cancel_futures=True)
            self._study_threads.shutdown(cancel_futures=True)
            self._router.close()

    def _stop(self, number: int) -> None:
        if not self._stopped.done():
            self._stopped.set_result(number)

    def _fail(self, error: DistributedLLMError) -> None:
        if not self._stopped.done():
            self._stopped.set_exception(error)

    # -------------------------------------------------------------- events

    def _on_message(self, peer: PeerId, frames: list[Frame]) -> None:
        try:
            message, tensors = codec.to_coordinator.decode(frames)
        except ProtocolMismatch as exc:
            self._apply(Garbage(peer, exc.code, exc))
        except RemoteProtocolError as exc:
            self._apply(Garbage(peer, exc.reason, exc))
        else:
            self._apply(Received(peer, message, tensors))

    def _apply(self, *events: Event) -> None:
        for event in events:
            if not self._stopped.done():
                self._perform(self._core.handle(event, now=self._loop.time()))

    def _on_timer(self) -> None:
        self._timer = None
        self._perform(self._core.on_timer(now=self._loop.time()))

    def _set_timer(self) -> None:
        deadline = self._core.next_deadline()
        if self._timer:
            if deadline == self._timer.when():
                return
            self._timer.cancel()
        self._timer = None if deadline is None else self._loop.call_at(deadline, self._on_timer)

    # -------------------------------------------------------------- actions

    def _perform(self, actions: list[Action]) -> None:
        texts = [action for action in actions if isinstance(action, Detokenize)]
        try:
            if texts:  # all of a step at once, as going from thread to thread takes longest
                self._text_thread.submit(self._detokenize, texts)
            for action in actions:
                self._perform_one(action)
        except Exception as exc:  # a bug here: end with it rather than serve in an unknown state
            logger.exception("the coordinator cannot go on")
            self._fail(DistributedLLMError(f"Internal error: {exc!r}. Please report it."))
        self._set_timer()

    def _perform_one(self, action: Action) -> None:
        match action:
            case Send():
                self._send(action)
            case Tokenize():
                self._text_thread.submit(self._tokenize, action)
            case Detokenize():
                pass  # submitted with the others above
            case Forget(key=key):
                self._text_thread.submit(self._texts.pop, key, None)
            case Log(text=text, level=level):
                logger.log(_LEVELS[level], "%s", text)
            case Study():
                self._study_threads.submit(self._study, action)
            case Stop(error=error):
                self._fail(error)
            case _:
                assert_never(action)

    def _send(self, action: Send) -> None:
        delivery = self._router.send(action.peer, codec.encode(action.message, action.frames))
        if delivery is not Delivery.SENT:
            why = "is gone" if delivery is Delivery.GONE else "reads too slowly"
            self._loop.call_soon(self._apply, Unreachable(action.peer, why))

    # -------------------------------------------------------------- the study threads

    def _study(self, study: Study) -> None:
        try:
            self._tell(Studied(study.question.answer()))
        except Exception as exc:
            logger.exception("planning failed")
            self._tell(StudyFailed(study.question, repr(exc)))

    # -------------------------------------------------------------- the text thread

    def _tokenize(self, action: Tokenize) -> None:
        event: Event
        try:
            self._texts[action.key] = [
                Detokenizer(self._tokenizer, action.stop_strings) for _ in range(action.num_choices)
            ]
            event = Tokenized(action.key, self._token_ids(action.kind, action.payload))
        except DistributedLLMError as exc:
            event = TokenizeFailed(action.key, exc)
        except Exception as exc:
            logger.exception("tokenizing failed")
            event = TokenizeFailed(action.key, DistributedLLMError(f"Tokenizing failed: {exc!r}."))
        self._tell(event)

    def _token_ids(self, kind: Literal["text", "token_ids", "chat"], payload: bytes) -> list[int]:
        if kind == "token_ids":
            return token_ids_of_frame(payload)
        if kind == "chat":
            return self._tokenizer.encode_chat(codec.decode_chat(payload))
        try:
            return self._tokenizer.encode(payload.decode())
        except UnicodeDecodeError as exc:
            raise RemoteProtocolError("malformed", f"prompt is not UTF-8: {exc}") from exc

    def _detokenize(self, actions: list[Detokenize]) -> None:
        # A request that is not in `_texts` has ended.
        events = [self._text_of(action) for action in actions if action.key in self._texts]
        self._tell(*events)

    def _text_of(self, action: Detokenize) -> Event:
        text = self._texts[action.key][action.choice]
        try:
            piece = text.feed(action.token_ids)
            parts, stopped = [piece.text], piece.stopped
            if action.last and not stopped:
                piece = text.finish()
                parts.append(piece.text)
                stopped = piece.stopped
        except Exception as exc:
            logger.exception("detokenizing failed")
            error = DistributedLLMError(f"The text of the answer cannot be made: {exc!r}.")
            return TokenizeFailed(action.key, error)
        return Detokenized(
            action.key, action.choice, "".join(parts), piece.token_count, stopped, action.last
        )

    def _tell(self, *events: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to hear
            self._loop.call_soon_threadsafe(self._apply, *events)


def raise_file_limit() -> None:
    """Let this process open as many connections as the system allows."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # no such limit on Windows
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
