"""The session that the calls of a client share, opened by whoever needs it first."""

import asyncio
from typing import Any

import pytest

from distributed_llm.client.session import Session
from distributed_llm.client.shared_session import SharedSession
from distributed_llm.common.errors import (
    CoordinatorLost,
    CoordinatorUnreachable,
    DistributedLLMError,
)
from distributed_llm.common.keyring import no_login


class Opened:
    """Stands for a session that lasts until a test says why it is over."""

    def __init__(self) -> None:
        self.error: DistributedLLMError | None = None
        self.closed = False
        self.here = True

    def is_here(self) -> bool:
        return self.here

    def close(self) -> None:
        self.closed = True


class Door:
    """Stands for `Session.open`: each try waits until it is let go on, and fails unless told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, fails: bool = True) -> None:
        self.tries = 0
        self.fails = fails
        self.opened = asyncio.Event()
        self.tried = asyncio.Event()
        monkeypatch.setattr(Session, "open", self._open)

    async def _open(self, *_: Any) -> Opened:
        self.tries += 1
        self.tried.set()
        await self.opened.wait()
        if self.fails:
            raise CoordinatorUnreachable(f"try {self.tries}")
        return Opened()


def shared() -> SharedSession:
    return SharedSession("127.0.0.1:1", no_login, 1.0)


async def opened(session: SharedSession) -> Opened:
    found: Any = await session.get()
    assert isinstance(found, Opened)
    return found


async def told(session: SharedSession) -> str:
    try:
        await session.get()
    except DistributedLLMError as exc:
        return str(exc)
    return "connected"


def test_who_waits_for_a_connection_shares_its_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        door, session = Door(monkeypatch), shared()
        asking = [asyncio.create_task(told(session)) for _ in range(100)]
        await door.tried.wait()
        door.opened.set()
        assert set(await asyncio.gather(*asking)) == {"try 1"}
        assert await told(session) == "try 2"  # who comes later tries again

    asyncio.run(main())


def test_a_try_that_was_given_up_is_made_again_by_who_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        door, session = Door(monkeypatch), shared()
        first = asyncio.create_task(told(session))
        await door.tried.wait()
        second = asyncio.create_task(told(session))
        await asyncio.sleep(0)
        first.cancel()
        door.opened.set()
        assert await second == "try 2"

    asyncio.run(main())


def test_all_calls_have_one_session_until_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        door, session = Door(monkeypatch, fails=False), shared()
        door.opened.set()
        first, same = await asyncio.gather(opened(session), opened(session))
        assert first is same
        assert door.tries == 1
        first.error = CoordinatorLost("It fell silent.")
        second = await opened(session)
        assert second is not first
        assert first.closed
        assert not second.closed

    asyncio.run(main())


def test_a_session_of_another_loop_is_neither_used_nor_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        door, session = Door(monkeypatch, fails=False), shared()
        door.opened.set()
        elsewhere = await opened(session)
        elsewhere.here = False
        with pytest.raises(CoordinatorLost, match="Make a new client here"):
            await session.get()
        session.close()
        assert not elsewhere.closed
        mine = await opened(session)
        session.close()
        assert mine.closed

    asyncio.run(main())
