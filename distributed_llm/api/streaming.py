"""Answers that are sent as they come (server-sent events, JSON lines); clients that leave."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from distributed_llm.api.ending import ending_error, is_ending, told
from distributed_llm.api.errors import CLIENT_CLOSED, ApiError
from distributed_llm.common.errors import DistributedLLMError, RequestCancelled

PING_EVERY_S = 15.0
"""Time without an event after which a comment is sent, so that nobody takes it for dead."""

_BEGIN_AFTER_S = 5.0
"""Time without an event after which a response begins all the same.

Until then an error still has a status of its own.
"""

_SEND_TIMEOUT_S = 60.0
"""Time for which a client may read nothing before it is given up."""

_BURST = 8
"""Parts after which other tasks have their turn, though the next part may be there."""

CANCELLED: Message = {"type": "http.disconnect", "cancelled": True}
"""Says in place of the client's leaving that the request was cancelled: the client still hears."""

_T = TypeVar("_T")


def sse(data: object, event: str = "") -> bytes:
    """Return a server-sent event with JSON as its data."""
    name = f"event: {event}\n" if event else ""
    return name.encode() + b"data: " + msgspec.json.encode(data) + b"\n\n"


DONE = b"data: [DONE]\n\n"
"""The event with which OpenAI's streams end."""


class EventStream(Response):
    """A response whose parts are sent as they come; the client's leaving closes their source.

    Args:
        parts: bytes to send. Closed when the client leaves, or reads nothing for a minute.
        on_error: returns what to send when `parts` fails after the response has begun; before,
            the error is raised.
        ping: sent while nothing comes; empty for never.
    """

    def __init__(
        self,
        parts: AsyncGenerator[bytes, None],
        *,
        on_error: Callable[[ApiError], Iterable[bytes]],
        ping: bytes = b": ping\n\n",
        media_type: str = "text/event-stream",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        sent = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})}
        super().__init__(None, 200, sent, media_type)
        del self.headers["content-length"]
        self._parts = parts
        self._on_error = on_error
        self._ping = ping
        self._begun = False
        self._writing = asyncio.Lock()
        self._wrote_at = 0.0  # or began to write, loop seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        self._wrote_at = asyncio.get_running_loop().time()
        sending = asyncio.ensure_future(self._send(scope, send))
        leaving = asyncio.ensure_future(_left(receive))
        watching = asyncio.ensure_future(self._watch(send))
        tasks = (sending, leaving, watching)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
            elif leaving.done() and leaving.result().code == RequestCancelled.code:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_SEND_TIMEOUT_S):
                        await self._fail(leaving.result(), send)
        except asyncio.CancelledError:  # those under way had their time
            if self._begun and is_ending(scope):
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
                await self._fail(ending_error(), send)
            raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._parts.aclose()

    async def _send(self, scope: Scope, send: Send) -> None:
        """Send all parts; the response begins with the first."""
        try:
            count = 0
            async for part in self._parts:
                await self._write(send, part)
                count += 1
                if count % _BURST == 0:  # neither of them may ever wait
                    await asyncio.sleep(0)
            await self._write(send, b"", more=False)
        except (DistributedLLMError, ApiError) as exc:
            await self._fail(exc if isinstance(exc, ApiError) else told(exc, scope), send)

    async def _watch(self, send: Send) -> None:
        """Send a ping whenever nothing came for a while; return once the client is given up."""
        clock = asyncio.get_running_loop().time
        while True:
            is_stuck = self._writing.locked()
            quiet_s = PING_EVERY_S if self._begun else _BEGIN_AFTER_S
            due = self._wrote_at + (_SEND_TIMEOUT_S if is_stuck else quiet_s)
            if clock() < due:
                await asyncio.sleep(due - clock())
            elif is_stuck:
                return
            elif self._ping:
                try:
                    async with asyncio.timeout(_SEND_TIMEOUT_S):
                        await self._write(send, self._ping)
                except TimeoutError:
                    return
            else:
                await asyncio.sleep(PING_EVERY_S)

    async def _fail(self, error: ApiError, send: Send) -> None:
        """Tell an error in the response.

        Raises:
            ApiError: that error, if the response has not begun.
        """
        if not self._begun:
            raise error
        for part in self._on_error(error):
            await self._write(send, part)
        await self._write(send, b"", more=False)

    async def _write(self, send: Send, data: bytes, *, more: bool = True) -> None:
        async with self._writing:
            self._wrote_at = asyncio.get_running_loop().time()
            if not self._begun:
                self._begun = True
                await send(
                    {
                        "type": "http.response.start",
                        "status": self.status_code,
                        "headers": self.raw_headers,
                    }
                )
            await send({"type": "http.response.body", "body": data, "more_body": more})


async def while_connected(request: Request, work: Awaitable[_T]) -> _T:
    """Return what `work` returns; cancel it when the client leaves.

    Raises:
        ApiError: the client has left, and nobody receives it; or the request was cancelled.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request.receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise leaving.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> ApiError:
    """Return what to say once the client has left, or the request was cancelled."""
    message: Any = {}
    while message.get("type") != "http.disconnect":
        message = await receive()
    if message.get("cancelled"):
        why = "The request was cancelled by its id, as whoever holds its key asked for."
        return ApiError(CLIENT_CLOSED, why, code=RequestCancelled.code)
    return ApiError(CLIENT_CLOSED, "The client has left.")
