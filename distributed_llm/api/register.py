"""The requests for answers that are under way, or ended lately: who asked, and how far they are.

Dialects need not know of it: the clients that they ask tell it what they ask and get.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from distributed_llm.api.callers import Caller
from distributed_llm.api.observed import observer
from distributed_llm.api.streaming import CANCELLED
from distributed_llm.client.answers import Chunk, Generation
from distributed_llm.common.errors import DistributedLLMError
from distributed_llm.common.sampling_params import SamplingParams

_KEPT = 256
"""Requests that ended and are still known."""

State = Literal["waiting", "running", "finished", "failed", "cancelled"]


@dataclass(eq=False)
class Entry:
    """A request that asks the model.

    Attributes:
        id: as the response tells it; a client may choose it, so it need not be unique.
        path: that it asked.
        caller: name of its key.
        model: name of the model that is served.
        parent: `traceparent` header of whoever traces it; empty if nobody does.
        started_at: when it was first sent to the coordinator, seconds since 1970.
        started: the same, and the following, in monotonic seconds.
        first: when the first token came; None if none did.
        last: when the last one came.
        ended: when it was over; None while it is not.
        prompt_tokens: of its prompts, of those that were answered.
        cached_tokens: those of them that needed no computing.
        completion_tokens: of all answers so far.
        params: of its prompts, which all have the same; None once it is over.
        generations: the answers that are complete; none once it is over.
        error: `code` of what ended it; empty if nothing did.
        cancelled: set by whoever cancels it.
    """

    id: str
    path: str
    caller: str
    model: str = ""
    parent: str = ""
    started_at: float = 0.0
    started: float = 0.0
    first: float | None = None
    last: float = 0.0
    ended: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    params: SamplingParams | None = None
    generations: list[Generation] = field(default_factory=list)
    error: str = ""
    left: bool = False
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def state(self) -> State:
        """How far it is."""
        if self.error:
            return "failed"
        if self.left or self.cancelled.is_set():
            return "cancelled"
        if self.ended is not None:
            return "finished"
        return "waiting" if self.first is None else "running"

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens of all answers per second since the first; None before the second token."""
        if self.first is None or self.last <= self.first:
            return None
        return (self.completion_tokens - 1) / (self.last - self.first)


class _Watch:
    """Writes into an entry what is asked and comes.

    Args:
        begin: called with the entry when it first asks the model.
    """

    def __init__(
        self, entry: Entry, begin: Callable[[Entry], None], clock: Callable[[], float]
    ) -> None:
        self._entry = entry
        self._begin = begin
        self._clock = clock

    def asked(self, params: SamplingParams) -> None:
        entry = self._entry
        if entry.params is None:
            entry.params = params
            entry.started_at, entry.started = time.time(), self._clock()
            self._begin(entry)

    def came(self, chunk: Chunk) -> None:
        entry = self._entry
        if chunk.token_ids:
            entry.last = self._clock()
            if entry.first is None:
                entry.first = entry.last
            entry.completion_tokens += len(chunk.token_ids)
        if chunk.generation is not None:
            entry.generations.append(chunk.generation)
            if chunk.choice == 0:  # the answers to one prompt share it
                entry.prompt_tokens += chunk.generation.usage.prompt_tokens
                entry.cached_tokens += chunk.generation.usage.cached_tokens

    def ended(self, error: BaseException | None) -> None:
        if isinstance(error, DistributedLLMError):
            self._entry.error = self._entry.error or error.code or "error"
        elif error is not None:
            self._entry.left = True


class Register:
    """Requests for answers: those under way, and the latest that ended.

    Args:
        on_end: called with each request that ended.
    """

    def __init__(self, *on_end: Callable[[Entry], None]) -> None:
        self._on_end = on_end
        self._running: dict[Entry, None] = {}
        self._ended: deque[Entry] = deque(maxlen=_KEPT)

    def begin(self, entry: Entry) -> None:
        """Add a request that is under way."""
        self._running[entry] = None

    def end(self, entry: Entry, now: float) -> None:
        """Let a request be over; nothing is done about one that never began."""
        if entry in self._running:
            del self._running[entry]
            entry.ended = now
            self._ended.append(entry)
            for hear in self._on_end:
                hear(entry)
            entry.params = None
            entry.generations.clear()  # they have texts, which are kept for nobody

    def entries(self, caller: Caller) -> Iterator[Entry]:
        """Yield the requests that a caller may see, newest first: its own; all if it is admin."""
        for entry in (*reversed(self._running), *reversed(self._ended)):
            if caller.is_admin or entry.caller == caller.name:
                yield entry

    def cancel(self, caller: Caller, request_id: str) -> bool:
        """Cancel requests that have an id and are a caller's own; return whether there are any."""
        own = [entry for entry in self._running if entry.caller == caller.name]
        found = [entry for entry in own if entry.id == request_id]
        for entry in found:
            entry.cancelled.set()
        return bool(found)


class Registration:
    """ASGI middleware that keeps the register of requests.

    It is inside of what finds out who asks: `scope["state"]["caller"]`. Of a request that is
    cancelled, the application is told that its client has left (`CANCELLED`).
    """

    def __init__(
        self, app: ASGIApp, register: Register, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._app = app
        self._register = register
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        state = scope.get("state", {})
        caller: Caller | None = state.get("caller")
        if caller is None or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        entry = Entry(
            id=state.get("request_id", ""),
            path=scope["path"][:200],
            caller=caller.name,
            model=caller.model,
            parent=Headers(scope=scope).get("traceparent", "")[:64],
        )
        token = observer.set(_Watch(entry, self._register.begin, self._clock))
        try:
            await self._app(scope, _cancellable(receive, entry.cancelled), send)
        finally:
            observer.reset(token)
            if entry.params is not None:
                state["tokens"] = (entry.prompt_tokens, entry.completion_tokens)
                self._register.end(entry, self._clock())


def _cancellable(receive: Receive, cancelled: asyncio.Event) -> Receive:
    async def receiving() -> Message:
        coming = asyncio.ensure_future(receive())
        stopping = asyncio.ensure_future(cancelled.wait())
        try:
            await asyncio.wait((coming, stopping), return_when=asyncio.FIRST_COMPLETED)
            return dict(CANCELLED) if cancelled.is_set() else coming.result()
        finally:
            coming.cancel()
            stopping.cancel()
            await asyncio.gather(coming, stopping, return_exceptions=True)

    return receiving
