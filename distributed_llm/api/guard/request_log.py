"""ASGI middleware that writes a line of the log for each request.

It has nothing that a client could choose but the id, whose characters are harmless: the route in
place of the path, and the name of the key in place of the key. Prompts and answers are not logged.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

_CUT = 499
"""Status in the log of a request that ended without a response."""


class RequestLog:
    """Writes method, route, status, time, tokens and who asked, when a request is over.

    A route may leave `(prompt, completion)` tokens as `request.state.tokens`.

    Args:
        is_public: whether a request, by method and path, needs no key; such are logged for
            debugging only, for they come every few seconds.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        app: ASGIApp,
        is_public: Callable[[str, str], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._is_public = is_public
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = self._clock(), _CUT

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, sending)
        finally:
            public = self._is_public(scope["method"], scope["path"]) and status < 500
            level = logging.DEBUG if public else logging.INFO
            logger.log(level, "%s", line(scope, status, self._clock() - began))


def line(scope: Scope, status: int, took_s: float) -> str:
    """Return what the log says of a request."""
    state: dict[str, Any] = scope.get("state", {})
    method = scope["method"] if scope["method"] in _METHODS else "?"
    route = getattr(scope.get("route"), "path", "-")
    words = [state.get("request_id", "-"), method, route, str(status), f"{took_s * 1000:.1f} ms"]
    if tokens := state.get("tokens"):
        words.append(f"tokens={tokens[0]}+{tokens[1]}")
    if caller := state.get("caller"):
        words.append(f"key={caller.name or '-'}")
    return " ".join(words)
