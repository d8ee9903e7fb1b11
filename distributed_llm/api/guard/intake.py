"""ASGI middleware that reads the bodies of requests: so much, of JSON, within so much time."""

import asyncio
from collections.abc import AsyncGenerator

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from distributed_llm.api import errors
from distributed_llm.api.errors import ApiError, invalid, is_ollamas

BODY_TIMEOUT_S = 30.0
"""Time within which a body has to be here, seconds."""

_ALL_BODIES = 16
"""All bodies that are held at a time have so many times the size that one may have."""

_TYPE = b"content-type"

_UNSAID = ("", "application/x-www-form-urlencoded")
"""Types with which curl and some libraries send JSON to Ollama, which does not look."""

_FROM_PAGES = frozenset({"origin", "sec-fetch-site"})
"""Headers that browsers send with what pages ask for; programs have none."""


class Intake:
    """Reads a request's body whole, and hands it on; refuses what is too much, too slow, no JSON.

    Args:
        max_bytes: of a body.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http" or not _has_body(headers := Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        held = 0
        try:
            try:
                self._check(scope, headers)
                body = bytearray()
                async with asyncio.timeout(BODY_TIMEOUT_S):
                    async for chunk in _chunks(receive):
                        body += chunk
                        held += len(chunk)
                        self._held += len(chunk)
                        self._check_size(len(body))
            except ClientDisconnect:
                return
            except TimeoutError:
                error = ApiError(408, f"The body did not come within {BODY_TIMEOUT_S:g} s.")
                await errors.refuse(error, scope, receive, send)
                return
            except ApiError as exc:
                await errors.refuse(exc, scope, receive, send)
                return
            await self._app(scope, _replay(bytes(body), receive), send)
        finally:
            self._held -= held

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Check what is known before the body is read."""
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind in _UNSAID and is_ollamas(scope["path"]) and not _FROM_PAGES & {*headers}:
            others = [(name, value) for name, value in scope["headers"] if name != _TYPE]
            scope["headers"] = [*others, (_TYPE, b"application/json")]
            kind = "application/json"
        if kind != "application/json" and not (
            kind.startswith("application/") and kind.endswith("+json")
        ):
            raise ApiError(
                415,
                f"The body is said to be {kind or 'of no type'!r:.100}. Send JSON, with "
                "`Content-Type: application/json`.",
                code="unsupported_media_type",
            )
        encoding = headers.get("content-encoding", "identity").lower()
        if encoding != "identity":
            raise ApiError(415, f"Bodies are not unpacked here ({encoding!r:.40}). Send it plain.")
        try:
            length = int(headers.get("content-length", "0"))
        except ValueError:
            raise invalid("Content-Length is no number.") from None
        self._check_size(length)

    def _check_size(self, size: int) -> None:
        if size > self._max_bytes:
            raise ApiError(
                413,
                f"The body is larger than {self._max_bytes} bytes, which is `max_body` under `api` "
                "in the settings. Send less, or have it raised.",
                code="request_too_large",
            )
        if self._held > _ALL_BODIES * self._max_bytes:
            raise ApiError(
                503,
                "The API holds as many bodies of requests as it may. Ask again in a moment.",
                "server_error",
                "overloaded",
                retry_after_s=1.0,
            )


def _has_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


async def _chunks(receive: Receive) -> AsyncGenerator[bytes, None]:
    """Yield a body as it comes.

    Raises:
        ClientDisconnect: the client has left.
    """
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        more = message.get("more_body", False)
        yield message.get("body", b"")


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return what gives a body that was read, and then whatever else comes."""
    given = False

    async def receiving() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receiving
