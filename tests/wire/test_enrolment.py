"""Machines that enrol at a real coordinator, in the event loop of the test."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from distributed_llm import AsyncDistributedClient
from distributed_llm.client.enrolment import enrol
from distributed_llm.common.errors import (
    ConfigError,
    CoordinatorUnreachable,
    DistributedLLMError,
    InvalidRequest,
    NotAllowed,
    NotEnrolled,
    Quarantined,
    WrongServerKey,
)
from distributed_llm.common.join_line import JoinLine, parse_join_line
from distributed_llm.common.keyring import KEY_VARIABLE, STATE_VARIABLE, Keyring, text_of_key
from distributed_llm.common.roles import Role
from distributed_llm.common.transport import new_key_pair
from distributed_llm.coordinator.trust.conduct import MOST_FAULTS
from distributed_llm.summary import headline, machine_row
from tests.wire.test_coordinator import coordinator
from tests.wire.test_transport import on_loop

pytestmark = pytest.mark.timeout(60)
LIMIT_S = 30.0
TRIES = 8
"""An end without keys often hangs up before it is heard to have none, as one with another key."""

As = Callable[[str], Any]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> As:
    """A context in which this process has the keys of another machine only."""

    @contextmanager
    def become(name: str) -> Iterator[Keyring]:
        with monkeypatch.context() as patched:
            patched.setenv(STATE_VARIABLE, str(tmp_path / name))
            patched.delenv(KEY_VARIABLE, raising=False)
            yield Keyring(tmp_path / name)

    return become


async def token(owner: AsyncDistributedClient, role: Role, **given: Any) -> JoinLine:
    return parse_join_line((await owner.create_token(role, **given)).line)


async def status_of(address: str) -> str:
    async with AsyncDistributedClient(address) as client:
        return (await client.status()).state


@on_loop
async def test_a_machine_enrols_once_and_is_let_in_from_then_on(machine: As) -> None:
    async with coordinator() as address, AsyncDistributedClient(address) as owner:
        line = await token(owner, Role.CLIENT)
        assert line.address == address
        with machine("pc") as keyring:
            with pytest.raises(NotEnrolled, match="no key for the coordinator"):
                await status_of(address)
            enrolled = await enrol(keyring, line, "pc", LIMIT_S)
            assert (enrolled.name, enrolled.role) == ("pc", Role.CLIENT)
            assert keyring.name(address) == "pc"
            assert keyring.joined()[0].address == address
            assert await status_of(address) == "waiting"
            keys = keyring.login(address).keys
            assert await enrol(keyring, line, "other", LIMIT_S) == enrolled  # it is one already
            assert keyring.login(address).keys == keys
        machines = {one.name: one for one in (await owner.members()).machines}
        assert machines.keys() == {"owner", "pc"}
        assert machines["pc"].key == keys.public


@on_loop
async def test_the_secrets_stay_where_they_are(machine: As) -> None:
    """The coordinator gets public keys only: neither its file nor its answers hold the others."""
    async with coordinator() as address, AsyncDistributedClient(address) as owner:
        new = await owner.create_token(Role.WORKER)
        line = parse_join_line(new.line)
        with machine("pc") as keyring:
            await enrol(keyring, line, "pc", LIMIT_S)
            secret = keyring.login(address).keys.secret
        shown = repr((await owner.members(), new, line))
        assert line.secret not in shown
        assert secret not in shown


@on_loop
async def test_a_token_is_good_for_as_many_machines_as_it_says(machine: As) -> None:
    async with coordinator() as address, AsyncDistributedClient(address) as owner:
        line = await token(owner, Role.CLIENT, uses=2)
        for name, called in (("a", "pc"), ("b", "pc-2")):
            with machine(name) as keyring:
                assert (await enrol(keyring, line, "pc", LIMIT_S)).name == called
                assert await status_of(address) == "waiting"
        with machine("c") as keyring:
            with pytest.raises(NotAllowed, match=r"used up. Ask for a new one"):
                await enrol(keyring, line, "pc", LIMIT_S)
            assert keyring.kept(address) is None
            with pytest.raises(NotEnrolled):
                await status_of(address)


@on_loop
async def test_a_revoked_token_is_good_for_nothing(machine: As) -> None:
    async with coordinator() as address, AsyncDistributedClient(address) as owner:
        line = await token(owner, Role.ADMIN, uses=None, lifetime_s=None)
        (one,) = (await owner.members()).tokens
        await owner.revoke_token(one.id)
        with (
            machine("pc") as keyring,
            pytest.raises(
                NotEnrolled, match="does not know the token in this line: it was revoked"
            ),
        ):
            await enrol(keyring, line, "pc", LIMIT_S)


@on_loop
async def test_a_made_up_token_is_good_for_nothing(machine: As) -> None:
    async with coordinator() as address, AsyncDistributedClient(address) as owner:
        line = await token(owner, Role.CLIENT)
        forged = JoinLine(address, line.server, new_key_pair().secret)
        with machine("pc") as keyring:
            with pytest.raises(NotEnrolled):
                await enrol(keyring, forged, "pc", LIMIT_S)
            assert keyring.kept(address) is None


@on_loop
async def test_a_token_opens_nothing_but_the_enrolment(
    machine: As, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with coordinator() as address, AsyncDistributedClient(address) as owner:
        line = await token(owner, Role.ADMIN)
        with machine("pc"):
            monkeypatch.setenv(KEY_VARIABLE, f"{line.server}.{line.secret}")
            with pytest.raises(NotAllowed, match="good for enrolling a machine only"):
                await status_of(address)
        assert [one.name for one in (await owner.members()).machines] == ["owner"]


@on_loop
async def test_who_is_enrolled_as_a_client_gets_no_further(machine: As) -> None:
    async with coordinator() as address, AsyncDistributedClient(address) as owner:
        line = await token(owner, Role.CLIENT)
        with machine("pc") as keyring:
            await enrol(keyring, line, "pc", LIMIT_S)
            async with AsyncDistributedClient(address) as client:
                for act in (
                    client.members,
                    lambda: client.create_token(Role.ADMIN),
                    lambda: client.remove_machine("owner"),
                    lambda: client.readmit_machine("owner"),
                    lambda: client.revoke_token("0000-0000"),
                    lambda: client.drain_worker("any"),
                ):
                    with pytest.raises(NotAllowed, match="this takes admin"):
                        await act()
                assert (await client.status()).state == "waiting"
        assert {one.name for one in (await owner.members()).machines} == {"owner", "pc"}


@on_loop
async def test_two_coordinators_of_one_machine_do_not_let_in_each_others_machines(
    machine: As,
) -> None:
    async with (
        coordinator() as one,
        coordinator() as other,
        AsyncDistributedClient(one) as owner,
        AsyncDistributedClient(other) as owner_of_other,
    ):
        line = await token(owner, Role.CLIENT)
        await owner_of_other.status()
        with machine("pc") as keyring:
            await enrol(keyring, line, "pc", LIMIT_S)
            assert await status_of(one) == "waiting"
            with pytest.raises(NotEnrolled):
                await status_of(other)
            known = keyring.login(one)
            keyring.save(other, known.server, known.keys)  # as if it were the same
            with pytest.raises(WrongServerKey):
                await status_of(other)
            there = parse_join_line((await owner_of_other.create_token(Role.CLIENT)).line)
            keyring.save(other, there.server, known.keys)  # and with the right one of its own
            with pytest.raises(NotEnrolled):
                await status_of(other)
        assert [one.name for one in (await owner_of_other.members()).machines] == ["owner"]


@on_loop
async def test_a_removed_machine_is_told_at_once_and_kept_out(machine: As) -> None:
    async with coordinator() as address, AsyncDistributedClient(address) as owner:
        line = await token(owner, Role.CLIENT)
        with machine("pc") as keyring:
            await enrol(keyring, line, "pc", LIMIT_S)
            async with AsyncDistributedClient(address) as client:
                await client.status()
                await owner.remove_machine("pc")
                with pytest.raises(NotAllowed):
                    await client.status()
            with pytest.raises(NotEnrolled, match="does not know the key of this machine"):
                await status_of(address)
        with pytest.raises(InvalidRequest, match="'pc'"):
            await owner.remove_machine("pc")
        assert (await owner.status()).state == "waiting"


@on_loop
async def test_a_machine_that_breaks_the_protocol_is_kept_out_until_it_is_readmitted(
    machine: As,
) -> None:
    async with coordinator() as address, AsyncDistributedClient(address) as owner:
        line = await token(owner, Role.CLIENT)
        with machine("pc") as keyring:
            await enrol(keyring, line, "pc", LIMIT_S)
            for _ in range(MOST_FAULTS):
                async with AsyncDistributedClient(address) as client:
                    assert (await client.status()).quarantined == ()  # until now it is let in
                    session = await client._session.get()
                    session._connection.send([b"noise"])
                    with pytest.raises(DistributedLLMError):
                        await client.status()
            with pytest.raises(Quarantined, match="pc is quarantined: it broke the protocol"):
                await status_of(address)
        status = await owner.status()
        assert status.quarantined == ("pc",)
        assert "(quarantined: pc)" in headline(status)
        rows = {one.name: machine_row(one, 0.0) for one in (await owner.members()).machines}
        assert rows["owner"][-1] == "1"
        assert rows["pc"][-1] == "quarantined for 5 min"
        await owner.readmit_machine("pc")
        with machine("pc"):
            assert await status_of(address) == "waiting"
        with pytest.raises(InvalidRequest, match="pc is not quarantined"):
            await owner.readmit_machine("pc")


@on_loop
async def test_a_line_for_another_coordinator_is_refused_and_the_key_stays(machine: As) -> None:
    """As when the address belongs to somebody else now: nothing is sent to it."""
    async with coordinator() as address, AsyncDistributedClient(address) as owner:
        line = await token(owner, Role.CLIENT, uses=None)
        wrong = JoinLine(address, new_key_pair().public, line.secret)
        with machine("pc") as keyring:
            with pytest.raises(WrongServerKey, match="the line is of another coordinator"):
                await enrol(keyring, wrong, "pc", LIMIT_S)
            await enrol(keyring, line, "pc", LIMIT_S)
            login = keyring.login(address)
            with pytest.raises(WrongServerKey, match="was known by the key"):
                await enrol(keyring, wrong, "pc", LIMIT_S)
            assert keyring.login(address) == login


@on_loop
async def test_a_key_in_the_environment_lets_a_machine_in(
    machine: As, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with coordinator() as address, AsyncDistributedClient(address) as owner:
        line = await token(owner, Role.CLIENT)
        with machine("pc") as keyring:
            await enrol(keyring, line, "pc", LIMIT_S)
            text = text_of_key(keyring.login(address))
        with machine("container"):
            with pytest.raises(NotEnrolled):
                await status_of(address)
            monkeypatch.setenv(KEY_VARIABLE, text)
            assert await status_of(address) == "waiting"


@on_loop
async def test_nobody_there_is_told(machine: As) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    line = JoinLine(address, new_key_pair().public, new_key_pair().secret)
    with machine("pc") as keyring:
        with pytest.raises(
            CoordinatorUnreachable, match=f"No coordinator at {address} after 0.2 s"
        ):
            await enrol(keyring, line, "pc", 0.2)
        assert keyring.kept(address) is None


@on_loop
async def test_a_key_that_cannot_be_kept_is_told(machine: As, tmp_path: Path) -> None:
    async with coordinator() as address, AsyncDistributedClient(address) as owner:
        line = await token(owner, Role.CLIENT)
        (tmp_path / "pc").write_text("no folder")
        with (
            machine("pc") as keyring,
            pytest.raises(ConfigError, match=r"cannot be (read|written)"),
        ):
            await enrol(keyring, line, "pc", LIMIT_S)


@on_loop
async def test_a_line_is_of_no_use_where_there_are_no_keys(machine: As) -> None:
    async with coordinator(insecure=True) as address:
        line = JoinLine(address, new_key_pair().public, new_key_pair().secret)
        told: list[NotAllowed] = []
        with machine("pc") as keyring:
            while not told or (isinstance(told[-1], WrongServerKey) and len(told) < TRIES):
                with pytest.raises(NotAllowed) as refused:
                    await enrol(keyring, line, "pc", LIMIT_S)
                told.append(refused.value)
        assert f"dllm worker --insecure --coordinator {address}" in str(told[-1])
