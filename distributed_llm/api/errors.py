"""Errors as HTTP tells them: a status, and a body in the dialect of whoever asked.

Nowhere else are the package's exceptions turned into statuses.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from distributed_llm.common.errors import (
    CapacityError,
    ConnectionFailed,
    ContextLengthExceeded,
    DeadlineExceeded,
    DistributedLLMError,
    InvalidRequest,
    NotAllowed,
    NotEnrolled,
    Overloaded,
    Quarantined,
    RequestCancelled,
    WorkerLost,
    WrongServerKey,
)

CLIENT_CLOSED = 499
"""Status in the log of a request whose client went away; nobody receives it."""


@dataclass(eq=False)
class ApiError(Exception):
    """What a request is answered with instead of what it asked for.

    Attributes:
        status: of HTTP.
        message: what happened, why, and what to do.
        type: kind of the error, in OpenAI's words.
        code: stable name of the reason; None if there is none.
        param: field of the request that is wrong; None if none is.
        retry_after_s: when to ask again, seconds; None if that would not help or is not known.
        headers: further ones of the response.
    """

    status: int
    message: str
    type: str = "invalid_request_error"
    code: str | None = None
    param: str | None = None
    retry_after_s: float | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return the error of a request that is wrong in itself."""
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, why: str) -> ApiError:
    """Return the error of a field that is known, and cannot be done here."""
    return invalid(why, param, "unsupported_parameter")


def unknown_model(name: str, served: str) -> ApiError:
    """Return the error of a request for a model that is not served."""
    return ApiError(
        404,
        f"The model {name!r:.200} is not served here; {served!r} is. Ask for that one.",
        param="model",
        code="model_not_found",
    )


def of_exception(error: DistributedLLMError) -> ApiError:
    """Return how HTTP tells an exception of this package."""
    message, code = str(error), error.code
    match error:
        case ContextLengthExceeded():
            return invalid(message, "messages", code)
        case InvalidRequest():
            return invalid(message)
        case NotEnrolled() | WrongServerKey():
            return ApiError(401, message, "authentication_error", "invalid_api_key")
        case Quarantined():
            return ApiError(403, message, "permission_error", code)
        case NotAllowed():
            return ApiError(403, message, "permission_error", code)
        case Overloaded():
            return ApiError(503, message, "server_error", code, retry_after_s=error.retry_after_s)
        case CapacityError() | ConnectionFailed() | WorkerLost():
            return ApiError(503, message, "server_error", code, retry_after_s=_SOON_S)
        case DeadlineExceeded():
            return ApiError(504, message, "server_error", code)
        case RequestCancelled():
            return ApiError(CLIENT_CLOSED, message, "invalid_request_error", code)
        case _:
            return ApiError(500, message, "server_error", code)


_SOON_S = 2.0
"""After which a cluster that is being set up anew may be asked again, seconds."""


def response(error: ApiError, path: str, request_id: str = "") -> Response:
    """Return the response that tells an error, in the dialect of a path."""
    headers = dict(error.headers)
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, ceil(error.retry_after_s)))
    elif error.status >= 500 or error.status == 429:
        headers["x-should-retry"] = "false"  # the official clients would try twice more
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    status, body = dialect(path)(error, request_id)
    return Response(msgspec.json.encode(body), status, headers, "application/json")


async def refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request with an error, from within middleware."""
    request_id = scope.get("state", {}).get("request_id", "")
    await response(error, scope["path"], request_id)(scope, receive, send)


def openai_body(error: ApiError, request_id: str) -> tuple[int, dict[str, Any]]:
    """Return status and body in OpenAI's shape."""
    told = {
        "message": error.message,
        "type": error.type,
        "param": error.param,
        "code": error.code,
    }
    return error.status, {"error": told}


def ollama_body(error: ApiError, request_id: str) -> tuple[int, dict[str, Any]]:
    """Return status and body in Ollama's shape."""
    return error.status, {"error": error.message}


_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    529: "overloaded_error",
}

_ANTHROPIC_OVERLOADED = 529


def anthropic_body(error: ApiError, request_id: str) -> tuple[int, dict[str, Any]]:
    """Return status and body in Anthropic's shape."""
    status = _ANTHROPIC_OVERLOADED if error.code == Overloaded.code else error.status
    told = {"type": _ANTHROPIC_TYPES.get(status, "api_error"), "message": error.message}
    return status, {"type": "error", "error": told, "request_id": request_id}


Dialect = Callable[[ApiError, str], tuple[int, dict[str, Any]]]

_OLLAMA = tuple(
    f"/api/{name}"
    for name in (
        *("chat", "generate", "embed", "tags", "show", "ps", "version"),
        *("pull", "push", "create", "copy", "delete", "blobs"),
    )
)


def is_ollamas(path: str) -> bool:
    """Return whether Ollama's clients use a path."""
    return path.startswith(_OLLAMA)


def dialect(path: str) -> Dialect:
    """Return how the clients that use a path expect errors."""
    if path.startswith("/v1/messages"):
        return anthropic_body
    if is_ollamas(path):
        return ollama_body
    return openai_body
