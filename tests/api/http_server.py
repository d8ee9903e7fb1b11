"""An application behind the API's own server, in a thread; callers that are made up; raw bytes."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncGenerator, Mapping
from types import TracebackType
from typing import Any, Self

from starlette.types import ASGIApp

from distributed_llm.api.callers import Caller, Callers, Unauthorized
from distributed_llm.api.guard.connections import Connection
from distributed_llm.api.observed import ObservedClient
from distributed_llm.api.serve import Server
from distributed_llm.client.loop_thread import LoopThread
from distributed_llm.common.roles import Role
from tests.waiting import eventually

LIMIT_S = 30.0

NOBODY = "127.0.0.1:1"
"""Address at which nothing listens."""


class FakeCallers(Callers):
    """Knows the keys "key", "other" (clients) and "boss" (an admin), and asks no coordinator.

    Args:
        address: of a coordinator for what they ask, if they do.
    """

    def __init__(self, address: str = NOBODY, connect_timeout_s: float = 5.0) -> None:
        super().__init__(
            address, insecure=False, open_to_all=False, connect_timeout_s=connect_timeout_s
        )
        client = ObservedClient(address, connect_timeout_s=connect_timeout_s)
        self._known = {
            "key": Caller("app", Role.CLIENT, client),
            "other": Caller("other-app", Role.CLIENT, client),
            "boss": Caller("boss", Role.ADMIN, client),
        }

    @contextlib.asynccontextmanager
    async def caller(self, key: str | None) -> AsyncGenerator[Caller, None]:
        if key not in self._known:
            raise Unauthorized("nobody knows this key")
        yield self._known[key]

    async def close(self) -> None:
        await self._known["key"].client.close()
        await super().close()


class Served:
    """An application that is served over HTTP.

    Attributes:
        port: on which.
        server: that serves it.
    """

    def __init__(
        self, app: ASGIApp, *, connection: type[Connection] = Connection, grace_s: int = 1
    ) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = Server(app, connection=connection, grace_s=grace_s)
        self._thread = LoopThread()

    def __enter__(self) -> Self:
        self._thread.run(self._open())
        eventually(lambda: self.server.started)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.run(self._close())
        self._thread.stop()
        self._listening.close()

    async def _open(self) -> None:
        loop = asyncio.get_running_loop()
        self._task = loop.create_task(self.server.serve(sockets=[self._listening]))

    async def _close(self) -> None:
        self.server.should_exit = True
        await self._task

    def connect(self) -> socket.socket:
        """Return a connection."""
        return socket.create_connection(("127.0.0.1", self.port), LIMIT_S)

    def ask(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        key: str | None = "key",
        **headers: str,
    ) -> "Answer":
        """Return what a request is answered with; names of headers have _ for -."""
        told = {"host": f"127.0.0.1:{self.port}", "connection": "close"}
        if body:
            told |= {"content-length": str(len(body)), "content-type": "application/json"}
        if key is not None:
            told["authorization"] = f"Bearer {key}"
        told |= {name.replace("_", "-"): value for name, value in headers.items()}
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {told[name]}" for name in told), "", ""]
        return self.say("\r\n".join(lines).encode("latin-1") + body)

    def say(self, data: bytes) -> "Answer":
        """Return what bytes are answered with, until the connection ends."""
        with self.connect() as connection:
            connection.sendall(data)
            return Answer(rest(connection))


def rest(connection: socket.socket) -> bytes:
    """Return what comes until the connection ends."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


class Answer:
    """A response of HTTP/1.1; status 0 for none.

    Attributes:
        status: its number.
        headers: by their names in lower case.
        body: its bytes, maybe in chunks.
    """

    def __init__(self, data: bytes) -> None:
        head, _, self.body = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        self.status = int(first.split()[1]) if first else 0
        pairs = (line.partition(": ") for line in lines)
        self.headers: Mapping[str, str] = {name.lower(): value for name, _, value in pairs}

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str | None:
        """The error's code, in OpenAI's shape, which is checked."""
        error = self.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["message"]
        found: str | None = error["code"]
        return found
