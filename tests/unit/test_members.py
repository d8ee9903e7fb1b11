"""Who may connect: tokens that let machines enrol, machines that are enrolled, and their names."""

import msgspec
import pytest

from distributed_llm.common.errors import InvalidRequest, NotAllowed
from distributed_llm.common.keys import PublicKey, fingerprint, key_text
from distributed_llm.common.roles import Role
from distributed_llm.coordinator.trust.members import (
    MAX_MACHINES,
    MAX_TOKENS,
    Machine,
    Members,
    MembersState,
)

NOW = 1_000_000.0
DAY = 86_400.0


def key(number: int) -> PublicKey:
    return PublicKey(key_text(number.to_bytes(32, "big")))


TOKEN, MAC, PC = key(1), key(2), key(3)


def members_with_token(
    role: Role = Role.WORKER, uses: int | None = None, lifetime_s: float | None = None
) -> Members:
    members = Members(MembersState())
    members.create_token(TOKEN, role, uses=uses, lifetime_s=lifetime_s, now=NOW)
    return members


def test_nobody_is_admitted_at_first() -> None:
    members = Members(MembersState())
    assert not members.admits(MAC)
    assert members.machine(MAC) is None
    assert members.machines == ()
    assert members.tokens(now=NOW) == ()


def test_a_token_lets_its_holder_connect_but_makes_him_no_machine() -> None:
    members = members_with_token()
    assert members.admits(TOKEN)
    assert members.machine(TOKEN) is None


@pytest.mark.parametrize("role", Role)
def test_a_machine_that_enrols_gets_the_role_of_the_token(role: Role) -> None:
    members = members_with_token(role)
    machine = members.enrol(TOKEN, MAC, "mac", now=NOW + 5)
    assert machine == Machine("mac", MAC, role, NOW + 5)
    assert members.admits(MAC)
    assert members.machine(MAC) == machine
    assert members.machines == (machine,)


def test_a_token_is_used_up_and_the_one_who_comes_late_is_told() -> None:
    members = members_with_token(uses=2)
    for number in (5, 6):
        members.enrol(TOKEN, key(number), "mac", now=NOW)
    assert members.admits(TOKEN)  # to be told
    assert members.tokens(now=NOW) == ()
    with pytest.raises(NotAllowed, match=r"used up.*dllm token create"):
        members.enrol(TOKEN, PC, "pc", now=NOW)
    assert not members.admits(PC)


def test_a_token_expires() -> None:
    members = members_with_token(lifetime_s=60.0)
    members.enrol(TOKEN, MAC, "mac", now=NOW + 59.9)
    with pytest.raises(NotAllowed, match=r"expired 2 h ago"):
        members.enrol(TOKEN, PC, "pc", now=NOW + 60 + 7200)
    assert not members.admits(PC)
    assert members.admits(MAC)


def test_a_revoked_token_is_not_even_admitted_and_its_machines_stay() -> None:
    members = members_with_token()
    members.enrol(TOKEN, MAC, "mac", now=NOW)
    (token,) = members.tokens(now=NOW)
    assert token.id in fingerprint(TOKEN)
    assert members.revoke_token(token.id, now=NOW) == token
    assert not members.admits(TOKEN)
    assert members.admits(MAC)
    with pytest.raises(NotAllowed, match="revoked"):
        members.enrol(TOKEN, PC, "pc", now=NOW)  # connected before
    with pytest.raises(InvalidRequest, match=token.id):
        members.revoke_token(token.id, now=NOW)


def test_the_same_key_enrols_again_without_using_the_token() -> None:
    members = members_with_token(uses=1)
    machine = members.enrol(TOKEN, MAC, "mac", now=NOW)
    assert members.enrol(TOKEN, MAC, "other", now=NOW + 1) == machine
    assert members.machines == (machine,)


def test_a_machine_gets_more_rights_by_another_token_and_keeps_its_name() -> None:
    members = members_with_token(Role.CLIENT)
    members.enrol(TOKEN, MAC, "mac", now=NOW)
    members.create_token(key(9), Role.ADMIN, uses=1, lifetime_s=None, now=NOW)
    machine = members.enrol(key(9), MAC, "other", now=NOW)
    assert (machine.name, machine.role) == ("mac", Role.ADMIN)
    assert members.enrol(TOKEN, MAC, "mac", now=NOW) == machine  # and loses none by the first


def test_names_of_machines_differ() -> None:
    members = members_with_token()
    names = [members.enrol(TOKEN, key(n), "mac", now=NOW).name for n in range(10, 13)]
    assert names == ["mac", "mac-2", "mac-3"]
    long = [members.enrol(TOKEN, key(n), "x" * 64, now=NOW).name for n in range(20, 22)]
    assert long == ["x" * 64, "x" * 58 + "-2"]
    assert members.owner_of("mac-2") == members.machine(key(11))
    assert members.owner_of("mac-4") is None


def test_a_removed_machine_is_a_stranger_and_its_name_is_free() -> None:
    members = members_with_token()
    machine = members.enrol(TOKEN, MAC, "mac", now=NOW)
    assert members.remove_machine("mac") == machine
    assert not members.admits(MAC)
    assert members.enrol(TOKEN, PC, "mac", now=NOW).name == "mac"
    with pytest.raises(InvalidRequest, match="'pc'"):
        members.remove_machine("pc")


def test_the_key_of_a_token_is_nobody_elses() -> None:
    members = members_with_token()
    with pytest.raises(NotAllowed, match="of its own"):
        members.enrol(TOKEN, TOKEN, "mac", now=NOW)
    members.enrol(TOKEN, MAC, "mac", now=NOW)
    for taken in (TOKEN, MAC):
        with pytest.raises(InvalidRequest, match="in use"):
            members.create_token(taken, Role.CLIENT, uses=1, lifetime_s=None, now=NOW)


def test_tokens_and_machines_are_bounded() -> None:
    members = members_with_token()
    for number in range(2, MAX_TOKENS + 1):
        members.create_token(key(number), Role.CLIENT, uses=1, lifetime_s=9.0, now=NOW)
    with pytest.raises(InvalidRequest, match="dllm token list"):
        members.create_token(key(0), Role.CLIENT, uses=1, lifetime_s=None, now=NOW)
    members.create_token(key(0), Role.CLIENT, uses=1, lifetime_s=None, now=NOW + 9 + 7 * DAY)
    for number in range(MAX_MACHINES):
        members.enrol(TOKEN, key(1000 + number), f"mac{number}", now=NOW)
    with pytest.raises(InvalidRequest, match="dllm machines list"):
        members.enrol(TOKEN, MAC, "mac", now=NOW)


@pytest.mark.parametrize(("uses", "lifetime_s"), [(0, None), (None, 5.0)])
def test_useless_tokens_are_forgotten_after_a_week(
    uses: int | None, lifetime_s: float | None
) -> None:
    members = members_with_token(uses=uses, lifetime_s=lifetime_s)
    members.create_token(key(8), Role.CLIENT, uses=1, lifetime_s=None, now=NOW + 6 * DAY)
    assert members.admits(TOKEN)
    members.create_token(key(9), Role.CLIENT, uses=1, lifetime_s=None, now=NOW + 5 + 7 * DAY)
    assert not members.admits(TOKEN)
    assert members.admits(key(8))


def test_the_state_outlives_the_process() -> None:
    members = members_with_token(uses=2)
    members.enrol(TOKEN, MAC, "mac", now=NOW)
    kept = msgspec.json.decode(msgspec.json.encode(members.state), type=MembersState)
    assert kept == members.state
    again = Members(kept)
    assert again.machine(MAC) == members.machine(MAC)
    again.enrol(TOKEN, PC, "pc", now=NOW)
    with pytest.raises(NotAllowed, match="used up"):
        again.enrol(TOKEN, key(4), "third", now=NOW)
