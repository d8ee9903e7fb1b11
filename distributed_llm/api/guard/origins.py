"""ASGI middleware that refuses what web pages of others make a browser send here.

A page may point a name of its own at this machine (DNS rebinding), so only our names are answered,
and addresses, for nobody can point those elsewhere. And it may send requests whose answers it
cannot read, so nothing with the `Origin` of another page is answered.
"""

import socket
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from distributed_llm.api import errors
from distributed_llm.api.errors import ApiError
from distributed_llm.common.addresses import ip_of

CONTAINER_HOSTS = ("host.docker.internal", "host.containers.internal")
"""Names by which containers reach the machine that they run on."""


def own_names() -> frozenset[str]:
    """Return the names of this machine."""
    name = socket.gethostname().lower()
    short = name.partition(".")[0]
    return frozenset({"localhost", name, short, f"{short}.local", *CONTAINER_HOSTS})


class Origins:
    """Answers only requests to a name of this API, and from no page but its own.

    Args:
        names: by which it may be asked, in lower case, besides addresses.
    """

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self._app = app
        self._names = frozenset(names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            error = refusal(headers, self._names)
            if error is not None:
                await errors.refuse(error, scope, receive, send)
                return
        await self._app(scope, receive, send)


def refusal(headers: Headers, names: Collection[str]) -> ApiError | None:
    """Return why a request with such headers is not answered; None if it is."""
    host = headers.get("host")
    if host is not None and not _is_ours(host, names):  # HTTP/1.0, no browser's, may have none
        return ApiError(
            403,
            f"This API does not answer to the name {host!r:.100}. If that is a name of it, add it "
            "to `allowed_hosts` under `api` in the settings.",
            "permission_error",
            "host_not_allowed",
        )
    origin = headers.get("origin")
    if origin is not None and not _is_same(origin, host):
        return ApiError(
            403,
            f"This API does not answer pages of {origin!r:.100}. Ask it from a program, or from "
            "the page that it serves itself.",
            "permission_error",
            "origin_not_allowed",
        )
    return None


def _is_ours(host: str, names: Collection[str]) -> bool:
    name = _host_of(f"//{host}")
    return name is not None and (name in names or ip_of(name) is not None)


def _is_same(origin: str, host: str | None) -> bool:
    try:
        return host is not None and urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:
        return False


def _host_of(url: str) -> str | None:
    """Return the host that a URL names, in lower case; None if it names none, or a user."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises what is wrong with it
    except ValueError:
        return None
    if parts.username is not None or parts.path or parts.query or parts.fragment:
        return None
    return (parts.hostname or "").rstrip(".") or None
