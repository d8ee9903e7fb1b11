"""Clients that read too slowly: what is kept for them is bounded, then they are given up."""

import asyncio
from collections.abc import AsyncGenerator, Iterator

import pytest
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from distributed_llm.api import streaming
from distributed_llm.api.app import guarded
from distributed_llm.api.streaming import EventStream, while_connected
from distributed_llm.common.settings import ApiSettings
from tests.api.http_server import FakeCallers, Served
from tests.waiting import eventually

PART = b"x" * 1000


class Endless:
    """Streams for ever, but for /once; counts what it made, and the streams that were closed."""

    def __init__(self) -> None:
        self.made = 0
        self.closed = 0

    async def parts(self, most: float) -> AsyncGenerator[bytes, None]:
        try:
            made = 0
            while made < most:
                made += 1
                self.made += 1
                yield PART
        finally:
            self.closed += 1

    async def work(self) -> None:
        self.made += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.closed += 1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if scope["path"] == "/whole":
                await while_connected(Request(scope, receive), self.work())
            most = 10 if scope["path"] == "/once" else float("inf")
            stream = EventStream(self.parts(most), on_error=lambda _: ())
            await stream(scope, receive, send)


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Served, Endless]]:
    monkeypatch.setattr(streaming, "_SEND_TIMEOUT_S", 0.3)
    monkeypatch.setattr(streaming, "PING_EVERY_S", 0.1)
    app = Endless()
    with Served(guarded(app, FakeCallers(), ApiSettings())) as served:
        yield served, app


def test_who_reads_nothing_is_given_up_and_others_are_served(
    endless: tuple[Served, Endless],
) -> None:
    served, app = endless
    with served.connect() as connection:
        connection.sendall(
            b"GET / HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer key\r\n\r\n"
        )
        eventually(lambda: app.made)
        assert served.ask("GET", "/once").body.count(PART) == 10
        eventually(lambda: app.closed == 2)
        assert app.made * len(PART) < 32 << 20, "sockets hold some of it"


@pytest.mark.parametrize("path", [b"/", b"/whole"])
def test_who_leaves_ends_what_is_made_for_it(endless: tuple[Served, Endless], path: bytes) -> None:
    served, app = endless
    with served.connect() as connection:
        connection.sendall(
            b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer key\r\n\r\n"
        )
        eventually(lambda: app.made)
        assert app.closed == 0
    eventually(lambda: app.closed == 1, limit_s=1.0)
