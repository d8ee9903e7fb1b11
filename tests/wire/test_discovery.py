"""Announcements on the local network, by zeroconf over loopback; and what is made of garbage."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import ANY

import pytest
from zeroconf import ServiceInfo, Zeroconf

from distributed_llm.common import discovery
from distributed_llm.common.addresses import machine_name
from distributed_llm.common.discovery import (
    MAX_FOUND,
    SERVICE,
    Announced,
    Announcer,
    Names,
    read_announcement,
    search,
)
from distributed_llm.coordinator import serve as serve_module
from tests.wire.test_coordinator import coordinator
from tests.wire.test_transport import on_loop

pytestmark = pytest.mark.timeout(60)
LOOPBACK = ["127.0.0.1"]
LIMIT_S = 30.0
KEY = "0123-4567-89ab-cdef"
TXT: dict[bytes, bytes | None] = {b"machine": b"pc", b"key": KEY.encode()}


@pytest.mark.parametrize(
    ("port", "hosts", "properties"),
    [
        (None, ["10.0.0.2"], TXT),
        (0, ["10.0.0.2"], TXT),
        (70_000, ["10.0.0.2"], TXT),
        (5555, [], TXT),
        (5555, ["nonsense", "0.0.0.0", "224.0.0.1", "fe80::1"], TXT),
        (5555, ["10.0.0.2"], {}),
        (5555, ["10.0.0.2"], {**TXT, b"key": None}),
        (5555, ["10.0.0.2"], {**TXT, b"key": b"x" * 19}),
        (5555, ["10.0.0.2"], {**TXT, b"key": KEY.encode() + b"\n"}),
        (5555, ["10.0.0.2"], {**TXT, b"machine": b"\xff\xfe"}),
        (5555, ["10.0.0.2"], {**TXT, b"machine": b"\x1b[2J"}),
        (5555, ["10.0.0.2"], {**TXT, b"machine": b"a" * 65}),
        (5555, ["10.0.0.2"], {**TXT, b"machine": b"a" * 100_000}),
    ],
)
def test_garbage_is_nobody(
    port: int | None, hosts: list[str], properties: dict[bytes, bytes | None]
) -> None:
    assert read_announcement(port, hosts, properties) is None


def test_what_is_announced_is_read() -> None:
    hosts = ["fe80::1", "10.0.0.2", "2001:db8::1", "127.0.0.1"]
    assert read_announcement(5555, hosts, {**TXT, b"more": b"\xff"}) == Announced(
        "pc", KEY, ("10.0.0.2:5555", "[2001:db8::1]:5555", "127.0.0.1:5555")
    )
    many = read_announcement(1, [f"10.0.0.{number}" for number in range(100)], TXT)
    assert many is not None
    assert len(many.addresses) == 8


@contextmanager
def strangers(count: int) -> Iterator[None]:
    """Services of the same kind with nonsense in their records."""
    with Zeroconf(LOOPBACK) as zeroconf:
        for number in range(count):
            info = ServiceInfo(
                SERVICE,
                f"stranger {number}.{SERVICE}",
                port=number,
                addresses=[socket.inet_aton("127.0.0.1")],
                properties={"machine": b"\x00" * 40, "key": b"\xff"},
            )
            zeroconf.register_service(info, cooperating_responders=True)
        yield


def test_a_coordinator_is_found_and_so_is_its_next_address() -> None:
    first, second = ("127.0.0.1:1001",), ("127.0.0.1:1002",)
    ours = [first]
    announcer = Announcer("0.0.0.0:1", "pc", KEY, addresses=lambda bound: ours[0], every_s=0.01)
    try:
        with strangers(3):
            found = search(lambda one: one.key == KEY, LIMIT_S, hosts=LOOPBACK)
        assert found == [Announced("pc", KEY, first)]

        def is_second(one: Announced) -> bool:
            ours[0] = second  # while somebody searches, and has read the first one
            return one.addresses == second

        found = search(is_second, LIMIT_S, hosts=LOOPBACK)
        assert found == [Announced("pc", KEY, address) for address in (first, second)]
    finally:
        announcer.close()
    assert not any(thread.name == "announcer" for thread in threading.enumerate())


def test_a_flood_of_names_is_not_read() -> None:
    names = Names()
    names.add("a" * 256)
    for number in range(1000):
        names.add(f"{number}")
        names.add("0")
    read = [names.next(0.0) for _ in range(MAX_FOUND + 1)]
    assert read == [*(f"{number}" for number in range(MAX_FOUND)), None]
    names.again.extend("ab")
    assert [names.next(0.0) for _ in range(3)] == ["a", "b", None]


@on_loop
async def test_who_can_be_reached_from_other_machines_is_announced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    announced: list[tuple[str, ...]] = []

    class Recorder:
        def __init__(self, *what: str) -> None:
            announced.append(what)

        def close(self) -> None:
            announced.append(("closed",))

    monkeypatch.setattr(serve_module, "Announcer", Recorder)
    async with coordinator() as here:
        assert here.startswith("127.0.0.1:")
    assert announced == []
    for insecure in (True, False):
        async with coordinator(bind="0.0.0.0:0", insecure=insecure) as everywhere:
            pass
    assert announced == [(everywhere, machine_name(), ANY), ("closed",)]


@pytest.mark.parametrize("addresses", [(), ("127.0.0.1:1",)])
def test_without_zeroconf_or_a_network_nothing_happens(
    addresses: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery, "can_search", lambda: not addresses)
    announcer = Announcer("0.0.0.0:1", "pc", KEY, addresses=lambda bound: addresses)
    announcer.close()
    assert not any(thread.name == "announcer" for thread in threading.enumerate())
