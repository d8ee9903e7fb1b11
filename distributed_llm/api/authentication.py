"""ASGI middleware that finds out who asks, before anything else of a request is looked at."""

from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from distributed_llm.api import errors
from distributed_llm.api.callers import Callers, Unauthorized
from distributed_llm.api.ending import told
from distributed_llm.api.errors import ApiError
from distributed_llm.common.errors import DistributedLLMError


class Authentication:
    """Serves requests that come with a key, and those that need none; refuses others.

    Who asks is then `scope["state"]["caller"]`.

    Args:
        is_public: whether a request, by method and path, needs no key.
    """

    def __init__(
        self, app: ASGIApp, callers: Callers, is_public: Callable[[str, str], bool]
    ) -> None:
        self._app = app
        self._callers = callers
        self._is_public = is_public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http" or self._is_public(scope["method"], scope["path"]):
            await self._app(scope, receive, send)
            return
        begun = False
        try:
            async with self._callers.caller(key_of(Headers(scope=scope))) as caller:
                scope.setdefault("state", {})["caller"] = caller
                begun = True
                await self._app(scope, receive, send)
        except (Unauthorized, DistributedLLMError) as exc:
            if begun:
                raise
            error = (
                ApiError(401, str(exc), "authentication_error", "invalid_api_key")
                if isinstance(exc, Unauthorized)
                else told(exc, scope)
            )
            await errors.refuse(error, scope, receive, send)


def key_of(headers: Headers) -> str | None:
    """Return the key that a request comes with; None for none.

    OpenAI's clients send `Authorization: Bearer KEY`, Anthropic's `x-api-key: KEY`.
    """
    kind, _, key = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer" and key.strip():
        return key.strip()
    return headers.get("x-api-key") or None
