"""A machine that has joined finds its coordinator at a new address, and believes nobody's word."""

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from distributed_llm import AsyncDistributedClient
from distributed_llm.client import finding
from distributed_llm.client.enrolment import enrol
from distributed_llm.client.finding import find_coordinator
from distributed_llm.common import discovery
from distributed_llm.common.discovery import Announced
from distributed_llm.common.errors import CoordinatorUnreachable, NotEnrolled, WrongServerKey
from distributed_llm.common.join_line import parse_join_line
from distributed_llm.common.keyring import Keyring
from distributed_llm.common.keys import fingerprint
from distributed_llm.common.roles import Role
from distributed_llm.common.transport import new_key_pair
from tests.wire.test_coordinator import coordinator
from tests.wire.test_transport import on_loop

pytestmark = pytest.mark.timeout(60)
LIMIT_S = 30.0
STRANGER = Announced("stranger", fingerprint(new_key_pair().public), ("192.0.2.7:5555",))


class Network:
    """What is announced, and what was said to people."""

    def __init__(self, *announced: Announced) -> None:
        self.announced = announced
        self.searched = 0
        self.said: list[str] = []

    def search(self, is_wanted: Callable[[Announced], bool], timeout_s: float) -> list[Announced]:
        self.searched += 1
        wanted = (at for at, one in enumerate(self.announced) if is_wanted(one))
        return list(self.announced[: next(wanted, len(self.announced)) + 1])

    async def find(self, keyring: Keyring, *, wait: bool = False) -> str:
        return await find_coordinator(keyring, self.said.append, wait=wait, search=self.search)


@pytest.fixture
def keyring(tmp_path: Path) -> Keyring:
    return Keyring(tmp_path / "mac")


@pytest.fixture
def nowhere() -> str:
    """An address at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


async def join(keyring: Keyring, address: str) -> str:
    """Enrol at a coordinator; return the fingerprint of its key."""
    async with AsyncDistributedClient(address) as owner:
        line = parse_join_line((await owner.create_token(Role.WORKER)).line)
    await enrol(keyring, line, "mac", LIMIT_S)
    return fingerprint(line.server)


@on_loop
async def test_at_its_address_it_is_found_without_a_search(keyring: Keyring) -> None:
    network = Network(STRANGER)
    async with coordinator() as address:
        await join(keyring, address)
        assert await network.find(keyring) == address
    assert (network.searched, network.said) == (0, [])


@on_loop
async def test_at_another_address_it_is_found_by_its_key_and_kept(
    keyring: Keyring, nowhere: str
) -> None:
    async with coordinator() as address:
        key = await join(keyring, address)
        keyring.move(address, nowhere)
        network = Network(STRANGER, Announced("pc", key, (nowhere, address)))
        assert await network.find(keyring) == address
        assert f"Not found at {nowhere}; searching the local network" in network.said[0]
        assert network.said[-1] == f"The coordinator of pc is at {address} now."
        assert await network.find(keyring) == address
    assert network.searched == 1, "the new address is kept"


@on_loop
async def test_who_only_says_so_is_refused_by_the_handshake(keyring: Keyring, nowhere: str) -> None:
    async with coordinator() as address, coordinator() as other:
        key = await join(keyring, address)
        keyring.move(address, nowhere)
        login = keyring.login(nowhere)
        network = Network(Announced("pc", key, (other,)))
        with pytest.raises(CoordinatorUnreachable):
            await network.find(keyring)
        (said,) = (line for line in network.said if other in line)
        assert f"pc at {other} announces itself as coordinator {key}, but does not hold" in said
        assert keyring.login(nowhere) == login, "nothing is kept of it"
        assert keyring.kept(other) is None or keyring.kept(other) != login
        honest = Announced("pc", key, (address,))
        assert await Network(*network.announced, honest).find(keyring) == address


@on_loop
async def test_another_coordinator_at_its_address_is_none(keyring: Keyring) -> None:
    async with coordinator() as address, coordinator() as other:
        key = await join(keyring, address)
        keyring.move(address, other)
        assert await Network(Announced("pc", key, (address,))).find(keyring) == address
        keyring.move(address, other)
        with pytest.raises(WrongServerKey, match="does not hold the key"):
            await Network().find(keyring)


@on_loop
async def test_strangers_are_listed_with_what_to_do(keyring: Keyring, nowhere: str) -> None:
    with pytest.raises(
        NotEnrolled, match=rf"stranger at 192\.0\.2\.7:5555 .key {STRANGER.key}"
    ) as no:
        await Network(STRANGER).find(keyring)
    assert "`dllm token create`" in str(no.value)
    with pytest.raises(NotEnrolled, match=r"joined no coordinator yet. Run `dllm up`"):
        await Network().find(keyring)
    keyring.save(nowhere, new_key_pair().public, new_key_pair(), name="mac")
    with pytest.raises(CoordinatorUnreachable, match=r"there are: stranger at 192\.0"):
        await Network(STRANGER).find(keyring)
    with pytest.raises(CoordinatorUnreachable, match="Nor does it announce itself"):
        await Network().find(keyring)


@on_loop
async def test_without_zeroconf_it_is_said_what_would_find_it(
    keyring: Keyring, nowhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery, "can_search", lambda: False)
    keyring.save(nowhere, new_key_pair().public, new_key_pair(), name="mac")
    with pytest.raises(CoordinatorUnreachable, match=r"distributedllm\[discovery\]"):
        await Network().find(keyring)


@on_loop
async def test_who_waits_looks_again(
    keyring: Keyring, nowhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finding, "_AGAIN_S", 0.0)
    async with coordinator() as address:
        key = await join(keyring, address)
        keyring.move(address, nowhere)

        class Later(Network):
            def search(
                self, is_wanted: Callable[[Announced], bool], timeout_s: float
            ) -> list[Announced]:
                found = super().search(is_wanted, timeout_s)
                return found if self.searched == 3 else []

        network = Later(Announced("pc", key, (address,)))
        assert await network.find(keyring, wait=True) == address
    assert len(network.said) == 2, "what happens again is said once"


@on_loop
async def test_who_was_removed_there_is_told(keyring: Keyring) -> None:
    async with coordinator() as address:
        await join(keyring, address)
        async with AsyncDistributedClient(address) as owner:
            await owner.remove_machine("mac")
        with pytest.raises(NotEnrolled, match="does not know the key of this machine"):
            await Network().find(keyring, wait=True)
