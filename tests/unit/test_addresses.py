"""Addresses that are printed for others, and names that become addresses."""

import asyncio
import socket
import threading

import pytest

from distributed_llm.common import addresses
from distributed_llm.common.addresses import addresses_of
from distributed_llm.common.errors import CoordinatorUnreachable
from distributed_llm.common.units import split_address
from distributed_llm.coordinator.serve import how_to_join

HERE = ["127.0.0.1", "172.17.0.1", "192.168.1.5", "::1", "fe80::1%eth0", "2001:db8::7", "02:42:ac"]


def commands(text: str) -> list[str]:
    """Return the addresses in a text that one can join, all of which can be read."""
    words = [word.strip("(),;") for word in text.split()]
    found = [word for word in words if word.endswith(":5604") and "bind" not in word]
    for word in found:
        split_address(word)
    return found


@pytest.mark.parametrize(
    ("bound", "outward", "told"),
    [
        ("0.0.0.0:5604", ["192.168.1.5"], ["192.168.1.5:5604", "172.17.0.1:5604"]),
        ("0.0.0.0:5604", [], ["172.17.0.1:5604", "192.168.1.5:5604"]),
        ("[::]:5604", ["192.168.1.5", "2001:db8::7"],
         ["192.168.1.5:5604", "[2001:db8::7]:5604", "172.17.0.1:5604"]),
        ("[::]:5604", ["2001:db8::7"],
         ["[2001:db8::7]:5604", "172.17.0.1:5604", "192.168.1.5:5604"]),
        ("192.168.1.5:5604", ["192.168.1.5"], ["192.168.1.5:5604"]),
        ("[2001:db8::7]:5604", ["192.168.1.5"], ["[2001:db8::7]:5604"]),
    ],
)  # fmt: skip
def test_others_are_told_addresses_that_they_can_use(
    monkeypatch: pytest.MonkeyPatch, bound: str, outward: list[str], told: list[str]
) -> None:
    monkeypatch.setattr(addresses, "interface_hosts", lambda: HERE)
    monkeypatch.setattr(addresses, "outward_hosts", lambda: outward)
    text = how_to_join(bound, insecure=True)
    assert f"dllm worker --insecure --coordinator {told[0]}" in text
    assert commands(text) == told


@pytest.mark.parametrize(
    ("bound", "here"),
    [
        ("0.0.0.0:5604", "127.0.0.1:5604"),
        ("[::]:5604", "127.0.0.1:5604"),
        ("192.168.1.5:5604", "192.168.1.5:5604"),
    ],
)
def test_with_keys_others_are_told_how_to_enrol(
    monkeypatch: pytest.MonkeyPatch, bound: str, here: str
) -> None:
    monkeypatch.setattr(addresses, "interface_hosts", lambda: HERE)
    text = how_to_join(bound, insecure=False)
    assert commands(text) == [here]
    assert "for another machine, `dllm token create`" in text


@pytest.mark.parametrize("bound", ["127.0.0.1:5604", "[::1]:5604", "127.0.0.2:5604"])
def test_loopback_is_said_as_such(bound: str) -> None:
    for insecure, flag in ((False, ""), (True, "--insecure ")):
        text = how_to_join(bound, insecure=insecure)
        assert text.startswith(f"only this machine can reach {bound}; ")
        assert f"dllm worker {flag}--coordinator {bound} " in text
        assert "--bind 0.0.0.0:5604" in text


def test_a_machine_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "interface_hosts", lambda: ["127.0.0.1", "::1"])
    monkeypatch.setattr(addresses, "outward_hosts", lambda: [])
    text = how_to_join("0.0.0.0:5604", insecure=False)
    assert "dllm worker --coordinator 127.0.0.1:5604" in text


NAMES = {
    "both.lan": ["2001:db8::7", "192.168.1.5"],
    "old.lan": ["192.168.1.5"],
    "new.lan": ["2001:db8::7", "2001:db8::8"],
    "empty.lan": [],
}


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let these be all names that there are."""

    def getaddrinfo(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        if host not in NAMES:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [
            (socket.AF_INET6 if ":" in ip else socket.AF_INET, 0, 0, "", (ip, port))
            for ip in NAMES[host]
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


@pytest.mark.parametrize(
    ("address", "dialled"),
    [
        ("both.lan:5555", ("[2001:db8::7]:5555", "192.168.1.5:5555")),
        ("old.lan:5555", ("192.168.1.5:5555",)),
        ("new.lan:5555", ("[2001:db8::7]:5555", "[2001:db8::8]:5555")),
        ("10.0.0.1:5555", ("10.0.0.1:5555",)),
        ("[::1]:5555", ("[::1]:5555",)),
    ],
)
@pytest.mark.usefixtures("names")
def test_a_name_stands_for_all_of_its_addresses(address: str, dialled: tuple[str, ...]) -> None:
    assert asyncio.run(addresses_of(address)) == dialled


@pytest.mark.usefixtures("names")
@pytest.mark.parametrize("name", ["nobody.lan", "empty.lan"])
def test_a_name_that_nobody_knows(name: str) -> None:
    with pytest.raises(CoordinatorUnreachable, match=rf"'{name}' of {name}:5555 is not known"):
        asyncio.run(addresses_of(f"{name}:5555"))


def test_a_program_ends_while_a_name_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the name server goes away with the coordinator that a worker looks for."""
    begun, answered = threading.Event(), threading.Event()

    def getaddrinfo(*_: object, **__: object) -> list[tuple[object, ...]]:
        begun.set()
        answered.wait(20.0)
        return []

    async def program() -> None:
        looking = asyncio.create_task(addresses_of("both.lan:5555"))
        await asyncio.to_thread(begun.wait)
        looking.cancel()

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    thread = threading.Thread(target=asyncio.run, args=(program(),))
    thread.start()
    thread.join(10.0)
    ended = not thread.is_alive()
    answered.set()
    thread.join()
    assert ended, "it waits for the name server"
