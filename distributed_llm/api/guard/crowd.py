"""ASGI middleware that bounds how many requests are under way, in all and of each key.

Who is over a bound is told so at once: a queue here would only hide the coordinator's, which is
fair.
"""

from collections import Counter
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from distributed_llm.api import errors
from distributed_llm.api.errors import ApiError

_SOON_S = 1.0


class Crowd:
    """Serves so many requests at a time, and refuses further ones with 503.

    Args:
        most: requests at a time.
        is_public: whether a request, by method and path, needs no key; such are served always.
    """

    def __init__(self, app: ASGIApp, most: int, is_public: Callable[[str, str], bool]) -> None:
        self._app = app
        self._most = most
        self._is_public = is_public
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http" or self._is_public(scope["method"], scope["path"]):
            await self._app(scope, receive, send)
            return
        if self._running >= self._most:
            error = ApiError(
                503,
                f"The API is busy with {self._running} requests, which is as many as it takes "
                "(`max_requests` under `api` in the settings). Ask again in a moment.",
                "server_error",
                "overloaded",
                retry_after_s=_SOON_S,
            )
            await errors.refuse(error, scope, receive, send)
            return
        self._running += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._running -= 1


class Share:
    """Serves so many requests of a key at a time, and refuses further ones with 429.

    Args:
        most: requests of a key at a time.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app = app
        self._most = most
        self._running: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        caller = scope.get("state", {}).get("caller")
        if caller is None:
            await self._app(scope, receive, send)
            return
        name = caller.name
        if self._running[name] >= self._most:
            error = ApiError(
                429,
                f"{name or 'Whoever asks without a key'} has {self._running[name]} requests under "
                "way, which is as many as a key may (`max_requests_per_key` under `api` in the "
                "settings). Wait for one to end.",
                "rate_limit_error",
                "too_many_requests",
                retry_after_s=_SOON_S,
            )
            await errors.refuse(error, scope, receive, send)
            return
        self._running[name] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._running[name] -= 1
            if not self._running[name]:
                del self._running[name]
