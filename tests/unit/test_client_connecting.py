"""Many calls of a client that has no connection yet."""

import asyncio
from typing import Any

import pytest

from distributed_llm.client.async_client import AsyncDistributedClient
from distributed_llm.client.session import Session
from distributed_llm.common.errors import CoordinatorUnreachable, DistributedLLMError


class Door:
    """Stands for `Session.open`: each try waits until it is let go on, and fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tries = 0
        self.opened = asyncio.Event()
        self.tried = asyncio.Event()
        monkeypatch.setattr(Session, "open", self._open)

    async def _open(self, *_: Any) -> Session:
        self.tries += 1
        self.tried.set()
        await self.opened.wait()
        raise CoordinatorUnreachable(f"try {self.tries}")


async def told(client: AsyncDistributedClient) -> str:
    try:
        await client.identity()
    except DistributedLLMError as exc:
        return str(exc)
    return "connected"


def test_who_waits_for_a_connection_shares_its_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        door, client = Door(monkeypatch), AsyncDistributedClient("127.0.0.1:1", insecure=True)
        asking = [asyncio.create_task(told(client)) for _ in range(100)]
        await door.tried.wait()
        door.opened.set()
        assert set(await asyncio.gather(*asking)) == {"try 1"}
        assert await told(client) == "try 2"  # who comes later tries again

    asyncio.run(main())


def test_a_try_that_was_given_up_is_made_again_by_who_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        door, client = Door(monkeypatch), AsyncDistributedClient("127.0.0.1:1", insecure=True)
        first = asyncio.create_task(told(client))
        await door.tried.wait()
        second = asyncio.create_task(told(client))
        await asyncio.sleep(0)
        first.cancel()
        door.opened.set()
        assert await second == "try 2"

    asyncio.run(main())
