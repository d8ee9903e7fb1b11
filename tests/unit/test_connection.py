"""A host with several addresses is reached by the first one that answers. Sockets are played."""

import asyncio
import functools
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from distributed_llm.common import connection as connection_module
from distributed_llm.common.connection import Connection
from distributed_llm.common.errors import ConnectionFailed, CoordinatorUnreachable
from distributed_llm.common.transport import Login, Rejection

NAME = "boss.lan:5555"
SIX, FOUR, LATER = "[2001:db8::7]:5555", "192.168.1.5:5555", "192.168.1.6:5555"


class FakeDealer:
    """A socket to one address, which answers when the test says so."""

    def __init__(
        self,
        address: str,
        on_message: Callable[[list[Any]], None],
        on_connect: Callable[[], None],
        on_disconnect: Callable[[], None],
        *,
        login: Login | None,
        on_rejected: Callable[[Rejection], None],
    ) -> None:
        if "bad" in address:
            raise ConnectionFailed(f"{address!r} is not an address to connect to.")
        self.answer, self.lose = on_connect, on_disconnect
        self.reached = False
        self.local_host = f"beside {address}"
        self.sent: list[Any] = []
        self.closed = False

    def send(self, frames: Sequence[Any]) -> None:
        self.sent.append(list(frames))

    def close(self, **_: int) -> None:
        self.closed = True


class Host:
    """A name that stands for addresses, and the sockets that were opened to them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.dealers: dict[str, FakeDealer] = {}
        self.addresses: tuple[str, ...] = ()
        self.asked = 0
        self.told: list[str] = []
        self._looked_up = asyncio.Event()
        monkeypatch.setattr(connection_module, "Dealer", self._open)

    def _open(self, address: str, *callbacks: Any, **keys: Any) -> FakeDealer:
        dealer = self.dealers[address] = FakeDealer(address, *callbacks, **keys)
        return dealer

    def connect(self, *addresses: str, name: str = NAME) -> Connection:
        return Connection(
            name,
            addresses,
            lambda frames: None,
            lambda: self.told.append("connected"),
            lambda: self.told.append("lost"),
            login=None,
            on_rejected=lambda why: self.told.append(why.name),
            look_up=self._look_up,
            every_s=0.0,
        )

    async def _look_up(self, address: str) -> tuple[str, ...]:
        assert address == NAME
        self.asked += 1
        self._looked_up.set()
        if not self.addresses:
            raise CoordinatorUnreachable("not known just now")
        return self.addresses

    async def looked_up_again(self) -> None:
        """Return once what the name stands for now was looked up, and acted on."""
        for _ in range(2):  # the second time, the first one's outcome is there
            self._looked_up.clear()
            await self._looked_up.wait()

    def open(self) -> list[str]:
        return [address for address, dealer in self.dealers.items() if not dealer.closed]


def on_loop(
    test: Callable[[Host], Awaitable[None]],
) -> Callable[[pytest.MonkeyPatch], None]:
    @functools.wraps(test)
    def run(monkeypatch: pytest.MonkeyPatch) -> None:
        async def main() -> None:
            await asyncio.wait_for(test(Host(monkeypatch)), 30)

        asyncio.run(main())

    del run.__wrapped__  # pytest would ask for its arguments
    return run


@on_loop
async def test_the_address_that_answers_is_used(host: Host) -> None:
    connection = host.connect(SIX, FOUR)
    assert host.open() == [SIX, FOUR]
    assert connection.local_host == ""
    host.dealers[FOUR].answer()
    assert host.told == ["connected"]
    assert host.open() == [FOUR]
    assert connection.local_host == f"beside {FOUR}"
    connection.send([b"hello"])
    assert host.dealers[FOUR].sent == [[b"hello"]]
    assert host.dealers[SIX].sent == []
    host.dealers[FOUR].lose()
    assert host.told == ["connected", "lost"]
    connection.close()
    assert host.open() == []


@on_loop
async def test_a_name_whose_addresses_do_not_answer_is_looked_up_again(host: Host) -> None:
    connection = host.connect(SIX, FOUR)
    first = host.dealers[FOUR]
    await host.looked_up_again()
    assert host.open() == [SIX, FOUR]  # they are kept while the name is not known
    host.addresses = (FOUR, LATER)
    await host.looked_up_again()
    assert host.open() == [FOUR, LATER]
    assert host.dealers[FOUR] is first  # its dialling goes on
    host.dealers[LATER].answer()
    assert host.open() == [LATER]
    asked = host.asked
    for _ in range(5):
        await asyncio.sleep(0)
    assert host.asked == asked
    connection.close()


@on_loop
async def test_an_address_stands_for_itself(host: Host) -> None:
    connection = host.connect(FOUR, name=FOUR)
    for _ in range(5):
        await asyncio.sleep(0)
    assert host.asked == 0
    connection.close()


@on_loop
async def test_whether_anything_listens_is_known_of_addresses_that_were_given_up(
    host: Host,
) -> None:
    connection = host.connect(SIX, FOUR)
    assert not connection.reached
    host.dealers[SIX].reached = True
    assert connection.reached
    host.addresses = (LATER,)
    await host.looked_up_again()
    assert host.open() == [LATER]
    assert connection.reached
    connection.close()
    await asyncio.sleep(0)


@on_loop
async def test_addresses_that_cannot_be_dialled_are_passed_over(host: Host) -> None:
    connection = host.connect("bad:1", FOUR)
    assert host.open() == [FOUR]
    connection.close()
    with pytest.raises(ConnectionFailed, match="bad:1"):
        host.connect("bad:1")
