"""The core and peers that break the protocol: one answer per fault, and quarantine after five."""

from collections.abc import Callable
from typing import Any

import pytest

from distributed_llm.common import codec
from distributed_llm.common.errors import ProtocolMismatch, RemoteProtocolError
from distributed_llm.common.messages import (
    Cancel,
    ClientHello,
    ClientWelcome,
    GetDigests,
    GetMembers,
    GetStatus,
    Heartbeat,
    MembersReport,
    ModelSource,
    Ping,
    Pong,
    ReadChunk,
    ReadmitMachine,
    Refused,
    RemoveMachine,
    StageTime,
    StatusReport,
    TaskFailed,
    TaskResult,
    Welcome,
    WorkerHello,
)
from distributed_llm.common.roles import Role
from distributed_llm.common.sampling_params import SamplingParams
from distributed_llm.common.types import Epoch, LayerRange, PeerId, StepNumber
from distributed_llm.coordinator import events
from distributed_llm.coordinator.trust.conduct import FIRST_QUARANTINE_S, MOST_FAULTS, WITHIN_S
from distributed_llm.coordinator.trust.pace import MOST_PER_S
from tests.unit.coordinator_parts import capabilities
from tests.unit.fake_worker import SimWorker
from tests.unit.keyed_world import KeyedWorld, Raw, among_thieves
from tests.unit.simulation import LONG, World, finish

BEAT = Heartbeat(epochs=(), progress_age_s=0.0, tasks_waiting=0, memory_used_bytes=0, kv_bytes=0)
TIMES = (StageTime(compute_us=1, layers_us=0, queued_us=0),)


def hello(name: str) -> WorkerHello:
    return WorkerHello(name=name, instance=name, capabilities=capabilities(10_000))


def noise() -> RemoteProtocolError:
    return RemoteProtocolError("malformed", "noise")


def send(world: World, worker: SimWorker, message: Any) -> list[events.Action]:
    """Have a worker send a message that its program would not."""
    return world.apply(received(world, worker.link.peer, worker, message))


def received(world: World, peer: Any, owner: object, message: Any) -> events.Event:
    held = world.held[owner] if isinstance(world, KeyedWorld) else ""
    return events.Received(peer, message, (), held)  # type: ignore[arg-type]


def spoil(world: World, worker: SimWorker) -> list[events.Action]:
    held = world.held[worker] if isinstance(world, KeyedWorld) else ""
    return world.apply(events.Garbage(worker.link.peer, "malformed", noise(), held))  # type: ignore[arg-type]


def result(epoch: int, step: int, stages: int) -> TaskResult:
    return TaskResult(epoch=Epoch(epoch), step=StepNumber(step), timings=TIMES * stages)


def left_s(world: KeyedWorld, name: str) -> float | None:
    """Return how long a machine is quarantined, as an admin is told."""
    admin = Raw(world, world.held[world.admin])
    admin.say(ClientHello())
    admin.say(GetMembers())
    members = codec.decode_members(admin.heard[-1][1][0])
    return next(one.quarantined_s for one in members.machines if one.name == name)


def told(actions: list[events.Action]) -> list[Refused]:
    sent = [one.message for one in actions if isinstance(one, events.Send)]
    return [one for one in sent if isinstance(one, Refused)]


# ------------------------------------------------------------------ what is a fault

FAULTS: dict[str, Callable[[KeyedWorld, SimWorker], Any]] = {
    "unreadable": spoil,
    "a second hello": lambda world, worker: send(world, worker, hello("w1")),
    "the hello of a client": lambda world, worker: send(world, worker, hello("w1")),
    "a step that was never begun": lambda world, worker: send(
        world, worker, result(world.epoch, 10**6, 2)
    ),
    "a failure of such a step": lambda world, worker: send(
        world,
        worker,
        TaskFailed(epoch=Epoch(world.epoch), step=StepNumber(10**6), code="x", message="x"),
    ),
    "a result of another stage": lambda world, worker: send(
        world, worker, result(world.epoch, 1, 3)
    ),
}


@pytest.mark.parametrize("what", FAULTS)
def test_the_fifth_fault_ends_the_session_and_the_machine_is_quarantined(what: str) -> None:
    world = among_thieves()
    w0, w1, w2 = world.serving(3)
    client = world.client()
    answer = client.submit(LONG, SamplingParams(max_new_tokens=30, ignore_eos=True))
    assert world.run(lambda: len(answer.token_ids) >= 3)
    for _ in range(MOST_FAULTS - 1):
        FAULTS[what](world, w1)
    assert "w1" in {one.name for one in world.core.status(now=world.now).workers}
    (refused,) = told(FAULTS[what](world, w1))
    assert refused.code == "quarantined"
    assert "w1 is quarantined: it broke the protocol 5 times in 60 s; last it " in refused.message
    assert "It may connect again in 5 min." in refused.message
    assert "`dllm machines readmit w1`" in refused.message
    assert any("machine w1 is quarantined for 5 min" in line for line in world.logs)
    status = world.core.status(now=world.now)
    assert status.quarantined == ("w1",)
    assert any("machine w1 is quarantined" in event.text for event in status.events)
    assert world.run(lambda: w1.exit is not None, for_s=1.0)
    assert "w1 is quarantined" in str(w1.exit)
    finish(world, answer)  # its layers went to the others, and no token changed
    assert (w0.num_sessions, w2.num_sessions) == (1, 1)


# ------------------------------------------------------------------ what is none

NO_FAULTS: dict[str, Callable[[KeyedWorld, SimWorker], Any]] = {
    "a late result": lambda world, worker: send(world, worker, result(world.epoch, 1, 2)),
    "a late failure": lambda world, worker: send(
        world,
        worker,
        TaskFailed(epoch=Epoch(world.epoch), step=StepNumber(1), code="x", message="x"),
    ),
    "a result of another plan": lambda world, worker: send(world, worker, result(99, 1, 2)),
    "what its role may not": lambda world, worker: send(world, worker, GetMembers()),
    "another release": lambda world, worker: world.apply(
        events.Garbage(
            worker.link.peer, "unsupported_version", ProtocolMismatch("?"), world.held[worker]
        )
    ),
}


@pytest.mark.parametrize("what", NO_FAULTS)
def test_what_honest_machines_do_is_no_fault(what: str) -> None:
    world = KeyedWorld()
    _, w1, _ = world.serving(3)
    answer = world.client().submit(LONG)
    assert world.run(lambda: len(answer.token_ids) >= 3)
    for _ in range(100):
        NO_FAULTS[what](world, w1)
    assert world.core.status(now=world.now).quarantined == ()
    assert not world.core._access.conduct._faults


def test_a_session_that_was_ended_goes_on_for_a_while_and_that_is_no_fault() -> None:
    """Its machine slept, and all that it had to say comes at once."""
    world = KeyedWorld()
    _, w1, _ = world.serving(3)
    peer = w1.link.peer
    w1.freeze()
    assert world.run(lambda: "w1" not in {w.name for w in world.core.status(now=0).workers})
    for message in [BEAT, result(1, 3, 2)] * 50:
        (refused,) = told(world.apply(received(world, peer, w1, message)))
        assert refused.code == "lost"
    assert world.core.status(now=world.now).quarantined == ()
    w1.thaw()
    assert world.run(lambda: world.state == "serving" and w1.num_sessions == 2, for_s=30.0)


def test_faults_that_are_minutes_apart_lead_to_nothing() -> None:
    world = KeyedWorld()
    _, w1, _ = world.serving(3)
    for _ in range(20):
        spoil(world, w1)
        world.run(for_s=WITHIN_S / (MOST_FAULTS - 1) + 0.1)
    assert world.core.status(now=world.now).quarantined == ()
    assert w1.num_sessions == 1


# ------------------------------------------------------------------ without a session


def test_who_never_says_hello_is_quarantined() -> None:
    world = among_thieves()
    world.serving(2)
    raw = Raw(world, world.enrolled("pc", Role.WORKER), is_worker=True)
    said = [raw.say(BEAT) for _ in range(MOST_FAULTS)]
    assert [one.code for one in said] == ["lost"] * MOST_FAULTS
    world.run(for_s=0.1)
    assert raw.heard[-1][0].code == "quarantined"
    finish(world, world.client().submit())


def test_who_takes_the_name_of_another_machine_is_quarantined_and_that_one_is_not() -> None:
    world = among_thieves()
    w0, _ = world.serving(2)
    raw = Raw(world, world.enrolled("evil", Role.WORKER), is_worker=True)
    said = [raw.say(hello("w0")) for _ in range(MOST_FAULTS)]
    assert [one.code for one in said] == ["not_allowed"] * MOST_FAULTS
    world.run(for_s=0.1)
    assert raw.heard[-1][0].code == "quarantined"
    assert world.core.status(now=world.now).quarantined == ("evil",)
    finish(world, world.client().submit())
    assert w0.num_sessions == 1


def test_a_client_that_sends_noise_is_quarantined_however_often_it_connects() -> None:
    world = KeyedWorld()
    world.serving(2)
    held = world.enrolled("pc", Role.CLIENT)
    for number in range(MOST_FAULTS):
        raw = Raw(world, held)
        assert isinstance(raw.say(ClientHello()), ClientWelcome)
        world.apply(events.Garbage(raw.link.peer, "malformed", noise(), held))
        world.run(for_s=0.1)
        last = raw.heard[-1][0]
        assert last.code == ("quarantined" if number == MOST_FAULTS - 1 else "remote_protocol")
    finish(world, world.client().submit())


# ------------------------------------------------------------------ while it lasts, and after


def struck_out(world: KeyedWorld, name: str, role: Role = Role.CLIENT) -> Raw:
    """Return a peer that was quarantined just now."""
    raw = Raw(world, world.enrolled(name, role))
    for _ in range(MOST_FAULTS):
        world.apply(events.Garbage(raw.link.peer, "malformed", noise(), world.held[raw]))
    world.run(for_s=0.1)
    raw.heard.clear()
    return raw


def test_who_is_quarantined_is_told_at_its_hello_and_answered_nothing_else() -> None:
    world = KeyedWorld()
    world.serving(2)
    raw = struck_out(world, "pc")
    for message in (GetStatus(), Ping(), Cancel(request_id="r"), BEAT):
        assert raw.say(message) is None
    refused = raw.say(ClientHello())
    assert isinstance(refused, Refused)
    assert refused.code == "quarantined"
    assert world.apply(events.Garbage(raw.link.peer, "malformed", noise(), world.held[raw])) == []
    assert left_s(world, "pc") == pytest.approx(FIRST_QUARANTINE_S, abs=10.0)
    assert left_s(world, "admin") is None


def test_a_quarantine_ends_after_some_minutes_and_the_next_one_is_longer() -> None:
    world = KeyedWorld()
    world.serving(2)
    raw = struck_out(world, "pc")
    world.run(for_s=FIRST_QUARANTINE_S - 1.0)
    assert isinstance(raw.say(ClientHello()), Refused)
    world.run(for_s=1.0)
    assert "machine pc may connect again after its quarantine" in world.logs
    assert isinstance(Raw(world, world.held[raw]).say(ClientHello()), ClientWelcome)
    for _ in range(MOST_FAULTS):
        world.apply(events.Garbage(raw.link.peer, "malformed", noise(), world.held[raw]))
    assert left_s(world, "pc") == pytest.approx(2 * FIRST_QUARANTINE_S, abs=10.0)


def test_an_admin_readmits_a_machine() -> None:
    world = KeyedWorld()
    world.serving(2)
    raw = struck_out(world, "pc")
    report = world.admin.say(ReadmitMachine(name="pc"))
    assert isinstance(report, MembersReport)
    assert report.code == ""
    world.run(for_s=0.1)
    assert "machine pc may connect again after its quarantine" in world.logs
    assert world.core.status(now=world.now).quarantined == ()
    assert isinstance(raw.say(ClientHello()), ClientWelcome)
    again = world.admin.say(ReadmitMachine(name="pc"))
    assert again.message == "pc is not quarantined: it may connect."
    nobody = world.admin.say(ReadmitMachine(name="nobody"))
    assert "No machine is called 'nobody'" in nobody.message


def test_a_machine_that_is_removed_and_enrolled_again_is_not_quarantined() -> None:
    world = KeyedWorld()
    raw = struck_out(world, "pc")
    world.admin.say(RemoveMachine(name="pc"))
    token = world.enrolled("other", Role.CLIENT)  # another machine is not concerned
    assert isinstance(Raw(world, token).say(ClientHello()), ClientWelcome)
    held = world.held[raw]
    assert world.core._access.conduct.quarantined_s(held, now=world.now) is None


# ------------------------------------------------------------------ who is not quarantined


def test_an_admin_loses_its_session_only() -> None:
    """It could readmit itself, and who runs the coordinator has to see what is wrong."""
    world = among_thieves()
    world.serving(2)
    held = world.held[world.admin]
    for _ in range(3):
        admin = Raw(world, held)
        assert isinstance(admin.say(ClientHello()), ClientWelcome)
        assert isinstance(admin.say(GetStatus()), StatusReport)
        for _ in range(MOST_FAULTS):
            admin.say(ClientHello())
        (refused,) = [one for one, _ in admin.heard if isinstance(one, Refused)]
        assert refused.code == "remote_protocol"
        assert "it broke the protocol 5 times in 60 s" in refused.message
        assert not world.core._registry.knows(admin.link.peer)
    assert any("the session of a peer was ended" in line for line in world.logs)
    assert world.core.status(now=world.now).quarantined == ()


def test_all_sessions_of_a_quarantined_machine_end() -> None:
    world = KeyedWorld()
    first, _ = world.serving(2)
    held = world.held[first]
    second, client = Raw(world, held, is_worker=True), Raw(world, held)
    assert isinstance(second.say(hello("w0")), Welcome)
    for _ in range(MOST_FAULTS):
        world.apply(events.Garbage(client.link.peer, "malformed", noise(), held))
    world.run(for_s=0.1)
    for raw in (second, client):
        assert raw.heard[-1][0].code == "quarantined"
    assert "w0 is quarantined" in str(first.exit)
    assert {one.name for one in world.core.status(now=world.now).workers} == {"w1"}


def test_without_keys_the_session_ends_and_the_worker_joins_anew() -> None:
    world = World()
    _, w1, _ = world.serving(3)
    for _ in range(MOST_FAULTS):
        spoil(world, w1)
    assert any("the session of a peer was ended" in line for line in world.logs)
    assert world.run(lambda: w1.num_sessions == 2 and world.state == "serving", for_s=10.0)
    assert world.core.status(now=world.now).quarantined == ()
    finish(world, world.client().submit(LONG))


# ------------------------------------------------------------------ too many messages


DIGESTS = GetDigests(source=ModelSource(kind="builtin", name=""), layers=LayerRange(0, 1))
CHUNK = ReadChunk(sha256="0" * 64, offset=0, length=1)
SERVING = Heartbeat(
    epochs=(Epoch(1),), progress_age_s=0.0, tasks_waiting=0, memory_used_bytes=0, kv_bytes=0
)


@pytest.mark.parametrize(
    "message", [SERVING, result(99, 1, 2)], ids=["heartbeats", "stale results"]
)
def test_a_flood_from_one_worker_is_bounded_and_quarantines_it(message: Any) -> None:
    world = KeyedWorld()
    _, w1, _ = world.serving(3)
    answer = world.client().submit(LONG, SamplingParams(max_new_tokens=30, ignore_eos=True))
    assert world.run(lambda: len(answer.token_ids) >= 3)
    event = received(world, w1.link.peer, w1, message)
    answers = 0
    for second in range(1, MOST_FAULTS + 1):
        for _ in range(2 * MOST_PER_S):
            answers += bool(world.core.handle(event, now=world.now + second))
    assert answers <= MOST_FAULTS * MOST_PER_S + 1  # the last of them tells it
    assert world.rejected["too_many"] >= (MOST_FAULTS - 1) * MOST_PER_S
    status = world.core.status(now=world.now + MOST_FAULTS)
    assert status.quarantined == ("w1",)
    assert {one.name for one in status.workers} == {"w0", "w2"}


def test_one_that_beats_as_fast_as_it_may_is_no_flood() -> None:
    world = KeyedWorld()
    _, w1, _ = world.serving(3)
    event = received(world, w1.link.peer, w1, SERVING)
    for second in range(10):
        for _ in range(MOST_PER_S):
            actions = world.core.handle(event, now=world.now + 1.0 + second)
    assert any(isinstance(a, events.Send) and isinstance(a.message, Pong) for a in actions)
    assert not world.rejected.get("too_many")
    assert isinstance(Raw(world, world.held[w1], is_worker=True).say(hello("w1")), Welcome)


# ------------------------------------------------------------------ weights


def asked_about(world: KeyedWorld, worker: SimWorker, message: Any, after_s: float) -> Any:
    """Return what the core does about a message on a worker's connection for weights."""
    event = events.Received(PeerId(b"reader"), message, (), world.held[worker])
    return world.core.handle(event, now=world.now + after_s)


def test_who_asks_about_weights_without_end_is_quarantined_and_gets_none() -> None:
    world = KeyedWorld()
    _, w1, _ = world.serving(3)
    answers = 0
    for second in range(1, MOST_FAULTS + 1):
        for _ in range(1000):
            actions = asked_about(world, w1, DIGESTS, second)
            answers += any(isinstance(one, events.AnswerAboutWeights) for one in actions)
    assert 0 < answers <= 50 * MOST_FAULTS
    assert world.core.status(now=world.now + MOST_FAULTS).quarantined == ("w1",)
    for message in (DIGESTS, CHUNK):
        assert asked_about(world, w1, message, MOST_FAULTS + 2.0) == []


def test_who_reads_weights_as_fast_as_they_come_floods_nobody() -> None:
    world = KeyedWorld()
    _, w1, _ = world.serving(3)
    reader = PeerId(b"reader")
    for _ in range(2 * MOST_PER_S):
        assert asked_about(world, w1, CHUNK, 1.0) == [events.AnswerAboutWeights(reader, CHUNK)]
    assert asked_about(world, w1, DIGESTS, 1.0) == [events.AnswerAboutWeights(reader, DIGESTS)]
    assert not world.rejected.get("too_many")
