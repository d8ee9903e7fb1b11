"""Who may send what: every message of the protocol, by every kind of key."""

from typing import get_args

import pytest

from distributed_llm.common.errors import DistributedLLMError, InvalidRequest, NotAllowed
from distributed_llm.common.keys import NOBODY, PublicKey, key_text
from distributed_llm.common.messages import (
    Cancel,
    ClientHello,
    CreateToken,
    DecodeTokens,
    DescribeModel,
    DrainWorker,
    Embed,
    EncodePrompt,
    Enrol,
    Generate,
    GetDigests,
    GetMembers,
    GetModel,
    GetStatus,
    Goodbye,
    HandedOver,
    Heartbeat,
    KVCopied,
    KVFailed,
    Leaving,
    LinkReport,
    ModelSource,
    NotUnderstood,
    Ping,
    ReadChunk,
    ReadmitMachine,
    Remeasured,
    RemoveMachine,
    RevokeToken,
    StageFailed,
    StageReady,
    TaskFailed,
    TaskResult,
    ToCoordinator,
    WeightRequest,
    WorkerHello,
)
from distributed_llm.common.roles import Role
from distributed_llm.common.sampling_params import SamplingParams
from distributed_llm.common.types import Epoch, LayerRange, StepNumber
from distributed_llm.coordinator.trust.access import Access
from distributed_llm.coordinator.trust.members import Members, MembersState
from tests.unit.coordinator_parts import capabilities

NOW = 1_000_000.0
EPOCH = Epoch(1)
STEP = StepNumber(1)


def key(number: int) -> PublicKey:
    return PublicKey(key_text(number.to_bytes(32, "big")))


TOKEN, STRANGER, CLIENT, WORKER, ADMIN = (key(number) for number in range(1, 6))
NEW = key(9)

WORKERS: tuple[ToCoordinator, ...] = (
    WorkerHello(name="spare", instance="one", capabilities=capabilities(1000)),
    Heartbeat(epochs=(), progress_age_s=0.0, tasks_waiting=0, memory_used_bytes=0, kv_bytes=0),
    StageReady(epoch=EPOCH, credits=1, load_s=0.0, weight_bytes=0, kv_tokens=0),
    StageFailed(epoch=EPOCH, code="stage_error", message=""),
    TaskResult(epoch=EPOCH, step=STEP, timings=()),
    TaskFailed(epoch=EPOCH, step=STEP, code="stage_error", message=""),
    NotUnderstood(what="", why=""),
    LinkReport(epoch=EPOCH, up=False),
    Remeasured(memory_bandwidth_bytes_per_s=1e6, flops_per_s=1e9, memory_bytes=1),
    KVCopied(epoch=EPOCH, bytes_sent=0),
    HandedOver(epoch=EPOCH),
    KVFailed(epoch=EPOCH, worker="", code="stage_error", message=""),
    Leaving(),
    Goodbye(),
)
SOURCE = ModelSource(kind="hub", name="org/model")
READERS: tuple[WeightRequest, ...] = (
    GetModel(source=SOURCE),
    GetDigests(source=SOURCE, layers=LayerRange(0, 1)),
    ReadChunk(sha256="0" * 64, offset=0, length=1),
)
CLIENTS: tuple[ToCoordinator, ...] = (
    ClientHello(),
    Generate(request_id="r", prompt="token_ids", params=SamplingParams(), tensors=()),
    Embed(request_id="r", prompt="text", tensors=()),
    EncodePrompt(request_id="r", prompt="text", tensors=()),
    DecodeTokens(request_id="r", tensors=()),
    Cancel(request_id="r"),
    DescribeModel(),
    GetStatus(),
    Ping(),
)
ADMINS: tuple[ToCoordinator, ...] = (
    DrainWorker(worker="worker"),
    GetMembers(),
    CreateToken(key=NEW, role=Role.ADMIN, uses=None, lifetime_s=None),
    RevokeToken(token_id="0000-0000"),
    RemoveMachine(name="worker"),
    ReadmitMachine(name="worker"),
)
ENROL = Enrol(key=NEW, name="new")
ALL = (*WORKERS, *READERS, *CLIENTS, *ADMINS, ENROL)

ALLOWED = {
    TOKEN: (ENROL,),
    STRANGER: (ENROL,),  # connected by a token that was revoked since, and is told
    CLIENT: CLIENTS,
    WORKER: (*WORKERS, *READERS),
    ADMIN: (*WORKERS, *READERS, *CLIENTS, *ADMINS),
}
WHO = {TOKEN: "token", STRANGER: "stranger", CLIENT: "client", WORKER: "worker", ADMIN: "admin"}


def cluster() -> tuple[Access, Members]:
    members = Members(MembersState())
    for number, (one, role) in enumerate(
        {CLIENT: Role.CLIENT, WORKER: Role.WORKER, ADMIN: Role.ADMIN}.items()
    ):
        used = key(100 + number)
        members.create_token(used, role, uses=1, lifetime_s=None, now=NOW)
        members.enrol(used, one, WHO[one], now=NOW)
    members.create_token(TOKEN, Role.WORKER, uses=None, lifetime_s=None, now=NOW)
    return Access(members, wall_clock=lambda: NOW), members


def test_every_message_has_a_row() -> None:
    assert {type(message) for message in ALL} == set(get_args(ToCoordinator | WeightRequest))


@pytest.mark.parametrize("who", WHO, ids=WHO.values())
@pytest.mark.parametrize("message", ALL, ids=lambda message: type(message).__name__)
def test_who_may_send_what(who: PublicKey, message: ToCoordinator | WeightRequest) -> None:
    access, _ = cluster()
    fault = access.fault(who, message)
    assert (fault is None) == (message in ALLOWED[who])
    if who in (TOKEN, STRANGER) and fault:
        assert "A token is good for enrolling a machine only" in str(fault)
    elif fault and message == ENROL:
        assert str(fault) == f"{WHO[who]} is enrolled already, and needs no token for that."
    elif fault:
        needed = "admin" if message in ADMINS else "client" if message in CLIENTS else "worker"
        assert f"{WHO[who]} is enrolled as {WHO[who]}, and this takes {needed}." in str(fault)
        assert f"dllm token create --role {needed}" in str(fault)
        assert fault.exit_code == 3


@pytest.mark.parametrize("message", ALL, ids=lambda message: type(message).__name__)
def test_without_keys_everybody_may_send_everything(
    message: ToCoordinator | WeightRequest,
) -> None:
    assert Access(None, wall_clock=lambda: NOW).fault(NOBODY, message) is None


@pytest.mark.parametrize("who", [WORKER, ADMIN], ids=["worker", "admin"])
def test_a_worker_may_not_take_the_name_of_another_machine(who: PublicKey) -> None:
    access, members = cluster()

    def hello(name: str) -> WorkerHello:
        return WorkerHello(name=name, instance="one", capabilities=capabilities(1000))

    fault = access.fault(who, hello("client"))
    assert isinstance(fault, NotAllowed)
    assert "The name client belongs to another machine" in str(fault)
    assert "--name" in str(fault)
    assert access.fault(who, hello(WHO[who])) is None  # its own
    assert access.fault(who, hello("anything else")) is None
    members.remove_machine("client")
    assert access.fault(who, hello("client")) is None


@pytest.mark.parametrize("who", [TOKEN, CLIENT, WORKER, ADMIN], ids=lambda who: WHO[who])
def test_rights_end_when_the_machine_or_the_token_is_removed(who: PublicKey) -> None:
    access, members = cluster()
    if who == TOKEN:
        (token,) = members.tokens(now=NOW)
        members.revoke_token(token.id, now=NOW)
        with pytest.raises(NotAllowed, match="revoked"):
            access.enrol(who, ENROL)
    else:
        members.remove_machine(WHO[who])
    assert not members.admits(who)
    for message in (*CLIENTS, *WORKERS, *READERS, *ADMINS):
        assert access.fault(who, message) is not None
    assert not members.admits(NEW)


@pytest.mark.parametrize("who", [STRANGER, CLIENT, WORKER, ADMIN], ids=lambda who: WHO[who])
def test_only_a_token_enrols(who: PublicKey) -> None:
    """What gets past the table of roles still makes nobody a member."""
    access, members = cluster()
    before = members.state
    with pytest.raises(NotAllowed):
        access.enrol(who, ENROL)
    assert members.state == before


def test_a_token_enrols_for_its_role_only() -> None:
    access, members = cluster()
    machine = access.enrol(TOKEN, ENROL)
    assert (machine.name, machine.role, machine.enrolled_at) == ("new", Role.WORKER, NOW)
    assert access.fault(NEW, ClientHello())
    assert access.fault(NEW, CreateToken(key=NEW, role=Role.ADMIN, uses=1, lifetime_s=None))
    assert members.machine(NEW) == machine


def test_without_keys_nobody_enrols_and_there_is_nothing_to_administer() -> None:
    access = Access(None, wall_clock=lambda: NOW)
    asked = [lambda: access.enrol(NOBODY, ENROL), *(_administered(access, one) for one in ADMINS)]
    for ask in asked[:1] + asked[2:]:  # draining takes no keys
        with pytest.raises(InvalidRequest, match="--insecure"):
            ask()
    report = access.report(lambda _: 0, now=0.0)
    assert (report.machines, report.tokens) == ((), ())


def _administered(access: Access, message: ToCoordinator):  # type: ignore[no-untyped-def]
    return lambda: access.administer(ADMIN, message)  # type: ignore[arg-type]


def test_the_report_holds_no_secret_and_no_key_of_a_token() -> None:
    access, members = cluster()
    report = access.report(lambda who: 2 if who == WORKER else 0, now=0.0)
    assert [(one.name, one.role, one.sessions) for one in report.machines] == [
        ("client", Role.CLIENT, 0),
        ("worker", Role.WORKER, 2),
        ("admin", Role.ADMIN, 0),
    ]
    (token,) = report.tokens
    assert token.id == members.tokens(now=NOW)[0].id
    assert TOKEN not in repr(report)


def test_what_cannot_be_done_is_told_to_the_admin() -> None:
    access, members = cluster()
    for message in (RemoveMachine(name="nobody"), RevokeToken(token_id="0000-0000")):
        with pytest.raises(DistributedLLMError, match=r"shows them"):
            access.administer(ADMIN, message)
    removed = access.administer(ADMIN, RemoveMachine(name="worker"))
    assert removed is not None
    assert removed.key == WORKER
    assert not members.admits(WORKER)


def test_an_admin_does_not_lock_itself_out() -> None:
    access, members = cluster()
    with pytest.raises(InvalidRequest, match="admin is the machine that asks"):
        access.administer(ADMIN, RemoveMachine(name="admin"))
    assert members.admits(ADMIN)
