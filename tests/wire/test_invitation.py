"""How `dllm up` invites: by one line for several machines, which is good for a day."""

import pytest

from distributed_llm import AsyncDistributedClient
from distributed_llm.common.join_line import parse_join_line
from distributed_llm.common.roles import Role
from distributed_llm.coordinator.trust import members
from distributed_llm.up.invitation import TOKEN_LIFETIME_S, TOKEN_USES, invitation
from tests.wire.test_coordinator import coordinator
from tests.wire.test_transport import on_loop

pytestmark = pytest.mark.timeout(60)
OUTSIDE = ("192.168.1.20:5555", "10.0.0.2:5555")


@on_loop
async def test_the_line_is_good_for_several_machines_and_a_day() -> None:
    async with coordinator() as address, AsyncDistributedClient(address) as owner:
        said = "\n".join(await invitation(owner, address, OUTSIDE, insecure=False))
        (token,) = (await owner.members()).tokens
        assert (token.uses_left, token.role) == (TOKEN_USES, Role.WORKER)
        assert token.expires_at is not None
        assert token.expires_at - token.created_at == TOKEN_LIFETIME_S
        assert f"`dllm token revoke --coordinator {address} {token.id}` ends it" in said
        line = next(word for word in said.split() if word.startswith("dllm://"))
        assert parse_join_line(line).address == address  # it listens on loopback only
        assert "(in other networks with 10.0.0.2:5555 as its address)" in said


@on_loop
async def test_who_can_be_reached_from_here_only_invites_nobody() -> None:
    async with coordinator() as address, AsyncDistributedClient(address) as owner:
        said = "\n".join(await invitation(owner, address, (), insecure=False))
        assert "Only this machine can reach it." in said
        assert "dllm://" not in said
        assert (await owner.members()).tokens == ()


@on_loop
async def test_without_keys_there_is_no_token_and_a_warning() -> None:
    async with coordinator() as address, AsyncDistributedClient(address) as owner:
        said = "\n".join(await invitation(owner, address, OUTSIDE, insecure=True))
        assert "dllm worker --insecure --coordinator 192.168.1.20:5555" in said
        assert "NO KEYS" in said
        assert (await owner.members()).tokens == ()


@on_loop
async def test_where_no_token_can_be_made_the_rest_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with coordinator() as address, AsyncDistributedClient(address) as owner:
        monkeypatch.setattr(members, "MAX_TOKENS", 0)
        said = "\n".join(await invitation(owner, address, OUTSIDE, insecure=False))
        assert "dllm generate" in said
        assert "There is no line for other machines: There are 0 tokens" in said
