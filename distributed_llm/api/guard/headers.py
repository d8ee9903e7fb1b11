"""ASGI middleware that refuses headers which are too many, or mean two things."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from distributed_llm.api import errors
from distributed_llm.api.errors import ApiError

_MAX_HEADERS = 128
_MAX_BYTES = 64 << 10


class HeaderLimits:
    """Serves requests whose headers are of a reasonable number and size, and clear."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        error = refusal(Headers(scope=scope)) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, receive, send)
        else:
            await errors.refuse(error, scope, receive, send)


def refusal(headers: Headers) -> ApiError | None:
    """Return why a request with such headers is not answered; None if it is."""
    size = sum(len(name) + len(value) for name, value in headers.raw)
    if len(headers.raw) > _MAX_HEADERS or size > _MAX_BYTES:
        return ApiError(
            431,
            f"The request has {len(headers.raw)} headers of {size} bytes; up to {_MAX_HEADERS} "
            f"headers and {_MAX_BYTES} bytes are read.",
        )
    if "content-length" in headers and "transfer-encoding" in headers:
        # Where the next request begins is a matter of opinion, so there is none here.
        close = {"Connection": "close"}
        return ApiError(
            400, "The request has both Content-Length and Transfer-Encoding.", headers=close
        )
    if headers.get("upgrade", "").lower() == "websocket":
        return ApiError(426, "There are no WebSockets here; events come as server-sent events.")
    return None
