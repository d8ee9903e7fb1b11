"""ASGI middleware that is told how each request ended: what the log and the metrics are made of."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
"""Methods that are told by their names; a client may send any word."""

CUT = 499
"""Status of a request that ended without a response."""


class Ends(ABC):
    """Serves requests, and looks at each when it is over.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, app: ASGIApp, clock: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = self._clock(), CUT

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, sending)
        finally:
            self.ended(scope, status, self._clock() - began)

    @abstractmethod
    def ended(self, scope: Scope, status: int, took_s: float) -> None:
        """Look at a request that is over.

        Args:
            status: of its response.
        """
