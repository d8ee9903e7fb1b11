"""`dllm key create`, and who is served with what it prints."""

import asyncio
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner, Result

from distributed_llm import DistributedClient
from distributed_llm.api import callers as callers_module
from distributed_llm.api.callers import Callers, Unauthorized
from distributed_llm.api.observed import ObservedClient
from distributed_llm.cli import app
from distributed_llm.client.enrolment import enrol
from distributed_llm.common.errors import ConnectionFailed, NotAllowed, Overloaded
from distributed_llm.common.join_line import parse_join_line
from distributed_llm.common.keyring import STATE_VARIABLE, Keyring, state_folder, text_of_key
from distributed_llm.common.roles import Role
from distributed_llm.common.transport import new_key_pair
from tests.api.conftest import LIMIT_S, Api
from tests.api.http_server import NOBODY
from tests.fake_coordinator import FakeCoordinator


def key_create(address: str, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["key", "create", "--coordinator", address, *arguments])


def models(api: Api, key: str) -> int:

    return httpx.get(f"{api.url}/v1/models", headers={"x-api-key": key}).status_code


def test_a_key_is_printed_alone_and_serves_until_it_is_removed(api: Api) -> None:
    made = key_create(api.cluster.address, "--name", "notes")
    assert made.exit_code == 0, made.output
    (key,) = made.stdout.split()
    assert key not in made.stderr
    remove = f"dllm machines remove --coordinator {api.cluster.address} notes"
    assert remove in made.stderr
    assert models(api, key) == 200
    with DistributedClient(api.cluster.address, key=key) as client:
        assert client.status().model == api.model
        with pytest.raises(NotAllowed):
            client.members()
    removed = CliRunner().invoke(app, remove.split()[1:])
    assert removed.exit_code == 0, removed.output
    assert models(api, key) == 401
    assert models(api, api.key) == 200


def test_a_key_may_be_of_an_admin(api: Api) -> None:
    made = key_create(api.cluster.address, "--name", "chief", "--role", "admin")
    assert "may change the cluster as well, as chief" in made.stderr
    with DistributedClient(api.cluster.address, key=made.stdout.strip()) as client:
        members = {one.name: one.role for one in client.members().machines}
        assert members["chief"] is Role.ADMIN
    with DistributedClient(api.cluster.address) as client:
        client.remove_machine("chief")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [(("--role", "worker"), "none of client, admin"), (("--name", "no name!"), "letters, digits")],
)
def test_what_no_key_can_be_is_refused(api: Api, arguments: tuple[str, ...], why: str) -> None:
    refused = key_create(api.cluster.address, *arguments)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert why in refused.stderr


@pytest.mark.parametrize("role", [Role.ADMIN, Role.CLIENT])
def test_machines_that_are_admins_make_keys_and_others_do_not(
    api: Api, role: Role, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DistributedClient(api.cluster.address) as client:
        line = parse_join_line(client.create_token(role).line)
    there = asyncio.run(enrol(Keyring(tmp_path), line, f"there-{role.value}", LIMIT_S))
    with monkeypatch.context() as patched:
        patched.setenv(STATE_VARIABLE, str(tmp_path))
        made = key_create(api.cluster.address, "--name", "from-there")
    if role is Role.ADMIN:
        assert models(api, made.stdout.strip()) == 200
    else:
        assert isinstance(made.exception, NotAllowed)
        assert f"{there.name} is enrolled as client" in str(made.exception)


# ------------------------------------------------------------------------ who asks


async def ask(callers: Callers, key: str | None) -> str:
    async with callers.caller(key) as caller:
        return caller.name + caller.role.value


def callers_of(address: str, *, open_to_all: bool = False) -> Callers:
    return Callers(address, insecure=False, open_to_all=open_to_all, connect_timeout_s=0.5)


def test_who_asks_is_known_by_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        made: list[str] = []
        real = ObservedClient

        def counted(address: str, **given: object) -> object:
            made.append(address)
            return real(address, **given)  # type: ignore[arg-type]

        monkeypatch.setattr(callers_module, "ObservedClient", counted)
        with FakeCoordinator() as fake:
            key = text_of_key(Keyring(state_folder()).login(fake.address))
            callers = callers_of(fake.address)
            try:
                made.clear()
                assert {*await asyncio.gather(*(ask(callers, key) for _ in range(40)))} == {"admin"}
                assert len(made) == 1, "a key has one connection"
                wrong = f"{key.partition('.')[0]}.{new_key_pair().secret}"
                for other in (
                    None,
                    "",
                    wrong,
                    "sk-none",
                    "ä.ö",
                    "\ud800",
                    "\0",
                    "x" * 10_000,
                    key + "\n.",
                ):
                    with pytest.raises(Unauthorized):
                        await ask(callers, other)
                made.clear()
                with pytest.raises(Unauthorized):
                    await ask(callers, wrong)
                assert made == [], "it was refused a moment ago"
                assert await ask(callers, key) == "admin"
            finally:
                await callers.close()

    asyncio.run(check())


def test_without_a_key_an_open_api_serves_as_a_client() -> None:
    async def check() -> None:
        with FakeCoordinator() as fake:
            callers = callers_of(fake.address, open_to_all=True)
            own = text_of_key(Keyring(state_folder()).login(fake.address))
            unknown = f"{own.partition('.')[0]}.{new_key_pair().secret}"
            for key in (None, "sk-none", "ollama", "a.b", "ä"):
                assert await ask(callers, key) == "client"
            with pytest.raises(Unauthorized):  # who has a key means it
                await ask(callers, unknown)
            await callers.close()

    asyncio.run(check())


def test_while_no_coordinator_is_there_nobody_waits_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def check() -> None:
        monkeypatch.setattr(callers_module, "_MAX_CONNECTING", 1)
        with FakeCoordinator() as fake:
            key = text_of_key(Keyring(state_folder()).login(fake.address))
            server, _, _ = key.partition(".")

        callers = callers_of(NOBODY)
        keys = [f"{server}.{new_key_pair().secret}" for _ in range(4)]
        done = await asyncio.gather(*(ask(callers, one) for one in keys), return_exceptions=True)
        assert all(isinstance(one, ConnectionFailed | Overloaded) for one in done), done
        assert any(isinstance(one, Overloaded) for one in done)
        assert callers._trying == {}
        await callers.close()

    asyncio.run(check())
