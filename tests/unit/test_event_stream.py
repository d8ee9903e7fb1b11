"""Responses whose parts are sent as they come, and clients that are slow, or leave."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from distributed_llm.api import streaming
from distributed_llm.api.errors import ApiError
from distributed_llm.api.streaming import EventStream
from distributed_llm.common.errors import DeadlineExceeded, DistributedLLMError

LIMIT_S = 30.0


class Client:
    """Reads what is sent, as far as it wants to; notes whether the parts were closed."""

    def __init__(self) -> None:
        self.status = 0
        self.read: list[bytes] = []
        self.left = asyncio.Event()
        self.told = asyncio.Condition()
        self.blocked: bytes | None = None
        self.closed = False

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            assert not self.status
            self.status = message["status"]
            return
        assert self.status
        if message["body"] == self.blocked:
            await asyncio.Event().wait()
        self.read.append(message["body"] if message["more_body"] else b"END")
        async with self.told:
            self.told.notify_all()

    async def receive(self) -> Any:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def has_read(self, data: bytes) -> None:
        async with self.told:
            await self.told.wait_for(lambda: data in self.read)

    async def parts(
        self, *waiting: bytes, error: DistributedLLMError | None = None
    ) -> AsyncGenerator[bytes, None]:
        """Yield "a", and "b" once these were read; then fail, if there is an error."""
        try:
            for data in waiting:
                await self.has_read(data)
            if not error or waiting:
                yield b"a"
            if error:
                raise error
            yield b"b"
        finally:
            self.closed = True

    async def get(self, parts: AsyncGenerator[bytes, None], ping: bytes = b"PING") -> None:
        stream = EventStream(parts, on_error=lambda error: [error.message.encode()], ping=ping)
        async with asyncio.timeout(LIMIT_S):
            await stream({}, self.receive, self.send)
        assert self.closed


def quick(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:
        monkeypatch.setattr(streaming, name, 0.001)


def test_parts_are_sent_as_they_are() -> None:
    async def run() -> None:
        client = Client()
        await client.get(client.parts())
        assert client.read == [b"a", b"b", b"END"]

    asyncio.run(run())


def test_a_response_begins_when_nothing_comes_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch, "_BEGIN_AFTER_S")
    monkeypatch.setattr(streaming, "PING_EVERY_S", 1e6)

    async def run() -> None:
        client = Client()
        await client.get(client.parts(b"PING"))
        assert client.read == [b"PING", b"a", b"b", b"END"]

    asyncio.run(run())


def test_pings_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch, "PING_EVERY_S")

    async def run() -> None:
        client = Client()

        async def parts() -> AsyncGenerator[bytes, None]:
            yield b"a"
            async for part in client.parts(b"PING"):
                yield part

        await client.get(parts())
        assert client.read[0] == b"a"
        assert set(client.read[1:-3]) == {b"PING"}
        assert client.read[-3:] == [b"a", b"b", b"END"]

    asyncio.run(run())


def test_an_error_is_raised_before_the_response_and_told_within() -> None:
    async def run() -> None:
        client = Client()
        with pytest.raises(ApiError, match="late"):
            await client.get(client.parts(error=DeadlineExceeded("late")))
        assert client.closed
        assert not client.status

        async def parts() -> AsyncGenerator[bytes, None]:
            yield b"x"
            async for part in client.parts(error=DeadlineExceeded("late")):
                yield part

        await client.get(parts())
        assert client.read == [b"x", b"late", b"END"]

    asyncio.run(run())


def test_a_refusal_of_the_api_is_an_error_too() -> None:
    async def run() -> None:
        client = Client()

        async def parts() -> AsyncGenerator[bytes, None]:
            client.closed = True
            yield b"x"
            raise ApiError(400, "no")

        await client.get(parts())
        assert client.read == [b"x", b"no", b"END"]

    asyncio.run(run())


def test_who_leaves_closes_the_parts() -> None:
    async def run() -> None:
        client = Client()
        getting = asyncio.ensure_future(client.get(client.parts(b"never")))
        await asyncio.sleep(0)
        client.left.set()
        await getting
        assert client.read == []

    asyncio.run(run())


def test_a_source_that_never_waits_lets_others_have_their_turn() -> None:
    async def run() -> None:
        client = Client()
        most, made = 10_000, 0

        async def parts() -> AsyncGenerator[bytes, None]:
            nonlocal made
            try:
                for made in range(most):  # noqa: B007 - it is looked at in the end
                    yield b"x"
            finally:
                client.closed = True

        client.left.set()
        await client.get(parts())
        assert made < 1000

    asyncio.run(run())


@pytest.mark.parametrize("blocked", [b"b", b"PING"])
def test_who_reads_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch, blocked: bytes) -> None:
    quick(monkeypatch, "_SEND_TIMEOUT_S", "PING_EVERY_S", "_BEGIN_AFTER_S")

    async def run() -> None:
        client = Client()
        client.blocked = blocked
        await client.get(client.parts(*([b"never"] if blocked == b"PING" else [])))
        assert b"END" not in client.read

    asyncio.run(run())
