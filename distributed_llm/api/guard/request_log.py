"""ASGI middleware that writes a line of the log for each request.

It has nothing that a client could choose but the id, whose characters are harmless: the route in
place of the path, and the name of the key in place of the key. Prompts and answers are not logged.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Scope

from distributed_llm.api.guard.ends import METHODS, Ends

logger = logging.getLogger(__name__)


class RequestLog(Ends):
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
        super().__init__(app, clock)
        self._is_public = is_public

    def ended(self, scope: Scope, status: int, took_s: float) -> None:
        """Write a line."""
        public = self._is_public(scope["method"], scope["path"]) and status < 500
        level = logging.DEBUG if public else logging.INFO
        logger.log(level, "%s", line(scope, status, took_s))


def line(scope: Scope, status: int, took_s: float) -> str:
    """Return what the log says of a request."""
    state: dict[str, Any] = scope.get("state", {})
    method = scope["method"] if scope["method"] in METHODS else "?"
    route = getattr(scope.get("route"), "path", "-")
    words = [state.get("request_id", "-"), method, route, str(status), f"{took_s * 1000:.1f} ms"]
    if tokens := state.get("tokens"):
        words.append(f"tokens={tokens[0]}+{tokens[1]}")
    if caller := state.get("caller"):
        words.append(f"key={caller.name or '-'}")
    return " ".join(words)
