"""ASGI middleware around all else: ids of requests, headers of all responses, faults of our own."""

import asyncio
import logging
import re
import traceback
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from distributed_llm.api import errors
from distributed_llm.api.ending import Ending, ending_error
from distributed_llm.api.errors import ApiError

logger = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
_ANTHROPICS_REQUEST_ID = "request-id"

_HARMLESS_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}
"""Of every response that does not say otherwise: what the API tells is data, never a page."""


class Envelope:
    """Gives each request an id, as `scope["state"]["request_id"]`, and each response its headers.

    Beside the id stands whether the API is `ending`. What is cut off then, for it takes too long,
    is told so.

    An id that the client sends is taken, if it can do no harm in a log. A fault of ours is logged
    with where it happened, not with its message, which may quote a prompt.
    """

    def __init__(self, app: ASGIApp, ending: Ending) -> None:
        self._app = app
        self._ending = ending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _id_of(Headers(scope=scope))
        scope.setdefault("state", {}).update(request_id=request_id, ending=self._ending)
        begun = ended = False

        async def sending(message: Message) -> None:
            nonlocal begun, ended
            if message["type"] == "http.response.start":
                begun = True
                headers = MutableHeaders(raw=message.setdefault("headers", []))
                headers[REQUEST_ID] = request_id
                headers[_ANTHROPICS_REQUEST_ID] = request_id
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            elif message["type"] == "http.response.body":
                ended = not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except asyncio.CancelledError:
            if begun or not self._ending.begun:
                raise
            await errors.refuse(ending_error(), scope, receive, sending)
        except Exception as exc:
            where = "".join(traceback.format_tb(exc.__traceback__))
            logger.error("request %s failed: %s\n%s", request_id, type(exc).__name__, where)
            if not begun:
                await errors.refuse(fault(request_id), scope, receive, sending)
            elif not ended:  # the connection ends before the response does, so it is seen to be cut
                raise ConnectionAbortedError from None


def fault(request_id: str) -> ApiError:
    """Return what a request is told for which the API failed."""
    return ApiError(
        500,
        f"The API failed; its log says where. Please report this, with the request id {request_id}"
        " and what the log says.",
        "server_error",
        "internal",
    )


def _id_of(headers: Headers) -> str:
    asked = headers.get(REQUEST_ID, "")
    return asked if _HARMLESS_ID.fullmatch(asked) else f"req_{uuid.uuid4().hex}"
