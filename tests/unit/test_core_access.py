"""The core with keys, in a simulated cluster: who is turned away, and machines that are removed."""

from dataclasses import replace
from typing import Any

import pytest

from distributed_llm.common.keys import NOBODY, PublicKey
from distributed_llm.common.messages import (
    ClientHello,
    ClientWelcome,
    CreateToken,
    DrainWorker,
    Enrol,
    Enrolled,
    Generate,
    GetMembers,
    GetStatus,
    Goodbye,
    MembersReport,
    Refused,
    RemoveMachine,
    RevokeToken,
    TaskResult,
    Welcome,
    WorkerDrained,
    WorkerHello,
)
from distributed_llm.common.roles import Role
from distributed_llm.common.sampling_params import SamplingParams
from distributed_llm.common.tensors import frame_of_token_ids
from distributed_llm.coordinator import events
from tests.unit.coordinator_parts import capabilities
from tests.unit.fake_model import NUM_LAYERS
from tests.unit.keyed_world import KeyedWorld, Raw, among_thieves, key
from tests.unit.simulation import LONG, World, finish


def ids(world: World) -> set[str]:
    return {worker.name for worker in world.core.status(now=world.now).workers}


def generate() -> tuple[Generate, Any]:
    spec, frame = frame_of_token_ids([1, 2, 3])
    params = SamplingParams(max_new_tokens=4)
    message = Generate(request_id="r", prompt="token_ids", params=params, tensors=(spec,))
    return message, frame


# ------------------------------------------------------------------ turned away


def test_a_cluster_with_keys_serves() -> None:
    """The positive control of what follows."""
    world = KeyedWorld()
    world.serving(3)
    finish(world, world.client().submit(LONG))
    assert world.turned_away == 0
    assert world.core.status(now=world.now).insecure is False


def test_a_client_may_not_join_as_a_worker() -> None:
    world = KeyedWorld()
    world.serving(2)
    raw = Raw(world, world.enrolled("pc", Role.CLIENT))
    hello = WorkerHello(name="pc", instance="x", capabilities=capabilities(10_000))
    refused = raw.say(hello)
    assert isinstance(refused, Refused)
    assert refused.code == "not_allowed"
    assert "pc is enrolled as client, and this takes worker." in refused.message
    assert ids(world) == {"w0", "w1"}
    assert world.turned_away == 1


def test_a_worker_may_not_ask_for_answers() -> None:
    world = KeyedWorld()
    world.serving(2)
    raw = Raw(world, world.enrolled("pc", Role.WORKER))
    message, frame = generate()
    for refused in (raw.say(ClientHello()), raw.say(message, frame), raw.say(GetStatus())):
        assert isinstance(refused, Refused)
        assert refused.code == "not_allowed"
        assert "this takes client" in refused.message
    assert world.core.status(now=world.now).answers_running == 0
    assert world.turned_away == 3


@pytest.mark.parametrize("role", [Role.CLIENT, Role.WORKER])
def test_only_an_admin_drains_and_changes_who_may_connect(role: Role) -> None:
    world = KeyedWorld()
    world.serving(2)
    raw = Raw(world, world.enrolled("pc", role))
    raw.say(ClientHello())
    before = world.members.state
    drained = raw.say(DrainWorker(worker="w0"))
    assert isinstance(drained, WorkerDrained)
    assert (drained.worker, drained.code) == ("w0", "not_allowed")
    for message in (
        GetMembers(),
        CreateToken(key=key(900), role=Role.ADMIN, uses=None, lifetime_s=None),
        RemoveMachine(name="admin"),
        RevokeToken(token_id="0000-0000"),
    ):
        report = raw.say(message)
        assert isinstance(report, MembersReport)
        assert report.code == "not_allowed"
        assert raw.heard[-1][1] == ()
        assert "this takes admin" in report.message
    assert world.members.state == before
    world.run(for_s=2.0)
    assert [w.state for w in world.core.status(now=world.now).workers] == ["serving"] * 2


def test_a_token_may_do_nothing_but_enrol() -> None:
    world = KeyedWorld()
    token, new = key(900), key(901)
    create = CreateToken(key=token, role=Role.CLIENT, uses=1, lifetime_s=60.0)
    assert world.admin.say(create).code == ""
    raw = Raw(world, token)
    message, frame = generate()
    hello = WorkerHello(name="pc", instance="x", capabilities=capabilities(10_000))
    for refused in (raw.say(ClientHello()), raw.say(message, frame), raw.say(hello)):
        assert isinstance(refused, Refused)
        assert refused.message == "A token is good for enrolling a machine only: `dllm join`."
    assert raw.say(GetMembers()).code == "not_allowed"
    world.kept.clear()
    assert raw.say(Enrol(key=new, name="pc")) == Enrolled(name="pc", role=Role.CLIENT)
    assert world.kept == [world.members.state]  # it is kept for the next process
    again = raw.say(Enrol(key=key(902), name="other"))
    assert isinstance(again, Refused)
    assert "used up" in again.message
    assert isinstance(Raw(world, new).say(ClientHello()), ClientWelcome)


def test_a_worker_may_not_say_that_it_is_another_machine() -> None:
    world = among_thieves()
    world.serving(2)
    raw = Raw(world, world.enrolled("evil", Role.WORKER))
    hello = WorkerHello(name="w0", instance="x", capabilities=capabilities(10_000))
    refused = raw.say(hello)
    assert isinstance(refused, Refused)
    assert "The name w0 belongs to another machine." in refused.message
    finish(world, world.client().submit())


def test_a_second_worker_of_a_machine_is_not_called_as_another_machine() -> None:
    world = KeyedWorld()
    world.serving(2)
    world.enrolled("w0-2", Role.WORKER)
    raw = Raw(world, world.held[world.workers[0]], is_worker=True)
    hello = WorkerHello(name="w0", instance="x", capabilities=capabilities(10_000))
    welcome = raw.say(hello)
    assert isinstance(welcome, Welcome)
    assert welcome.worker_id == "w0-3"


def test_a_worker_may_not_end_the_session_of_another_process() -> None:
    """A hello with the instance of a worker ends that one's session: only its own machine may."""
    world = KeyedWorld()
    first, _ = world.serving(2)
    raw = Raw(world, world.enrolled("evil", Role.WORKER), is_worker=True)
    hello = WorkerHello(
        name="evil", instance=first.agent._instance, capabilities=capabilities(10_000)
    )
    raw.say(hello)
    world.run(for_s=0.5)
    assert first.num_sessions == 1
    assert {"w0", "w1"} <= ids(world)


def test_a_peer_that_was_turned_away_has_no_session() -> None:
    world = KeyedWorld()
    world.serving(2)
    raw = Raw(world, world.enrolled("pc", Role.WORKER))
    raw.say(ClientHello())
    assert not world.core._registry.knows(raw.link.peer)
    raw.say(Goodbye())
    finish(world, world.client().submit())


# ------------------------------------------------------------------ removed


def test_the_layers_of_a_removed_worker_go_to_others_and_no_answer_changes() -> None:
    world = KeyedWorld()
    workers = world.serving(3)
    client = world.client()
    answer = client.submit(LONG, SamplingParams(max_new_tokens=30, ignore_eos=True))
    assert world.run(lambda: len(answer.token_ids) >= 3)
    sessions = {one.name: one.sessions for one in world.report().machines}
    assert sessions["w1"] == 1
    assert world.admin.say(RemoveMachine(name="w1")).code == ""
    assert world.kept[-1] == world.members.state
    assert "w1" not in ids(world)
    assert world.run(lambda: workers[1].exit is not None, for_s=1.0)
    assert "w1 was removed" in str(workers[1].exit)
    assert not world.run(lambda: "w1" in ids(world), for_s=5.0)  # and does not come back
    assert "w1" not in {one.name for one in world.report().machines}
    finish(world, answer)


def test_the_requests_of_a_removed_client_end_and_those_of_others_go_on() -> None:
    world = KeyedWorld()
    world.serving(2, memory_bytes=2000)
    client, other = world.client(), world.client()
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    answer, kept = client.submit((1, 2, 3), params), other.submit((4, 5, 6), params)
    assert world.run(lambda: min(len(answer.token_ids), len(kept.token_ids)) >= 2)
    assert world.core.status(now=world.now).answers_running == 2
    machine = world.members.machine(world.held[client])
    assert machine is not None
    world.admin.say(RemoveMachine(name=machine.name))
    world.run(for_s=0.01)
    assert world.core.status(now=world.now).answers_running == 1
    assert world.run(lambda: client.gone, for_s=1.0)
    (refused,) = [one for one in client.others if isinstance(one, Refused)]
    assert refused.code == "not_enrolled"
    assert "was removed" in refused.message
    count = len(answer.token_ids)
    assert world.run(lambda: kept.end is not None)
    assert len(answer.token_ids) == count
    kept.check()


def test_what_a_removed_machine_sends_later_is_not_heard() -> None:
    world = KeyedWorld()
    world.serving(2)
    raw = Raw(world, world.enrolled("pc", Role.CLIENT))
    assert isinstance(raw.say(ClientHello()), ClientWelcome)
    world.admin.say(RemoveMachine(name="pc"))
    world.run(for_s=0.5)
    raw.heard.clear()
    message, frame = generate()
    assert raw.say(message, frame) is None
    # Even were it heard, as by a message that was read before the removal:
    world.apply(events.Received(raw.link.peer, message, (frame,), world.held[raw]))
    world.run(for_s=0.5)
    assert world.core.status(now=world.now).answers_running == 0
    assert isinstance(raw.heard[0][0], Refused)


def test_an_admin_cannot_lock_itself_out() -> None:
    world = KeyedWorld()
    report = world.admin.say(RemoveMachine(name="admin"))
    assert isinstance(report, MembersReport)
    assert "lock itself out" in report.message
    report = world.admin.say(GetMembers())
    assert isinstance(report, MembersReport)
    assert not report.code


# ------------------------------------------------------------------ between workers


def test_a_worker_admits_those_only_that_send_it_something() -> None:
    world = KeyedWorld()
    workers = world.linked(3)
    keys = [world.held[worker] for worker in workers]
    order = sorted(workers, key=lambda worker: worker.loaded[-1].layers.start)
    before: dict[object, PublicKey | None] = {
        worker: world.held[earlier] if earlier else None
        for earlier, worker in zip([None, *order], order, strict=False)
    }
    strangers = [world.held[world.admin], world.enrolled("other", Role.WORKER), key(999), NOBODY]
    for worker in workers:
        admitted = [held for held in (*keys, *strangers) if worker.agent.admits(held)]
        assert admitted == [held for held in keys if held == before[worker]]


def test_a_worker_that_is_removed_is_not_admitted_by_its_neighbours_any_more() -> None:
    world = KeyedWorld()
    workers = world.linked(3)
    removed = world.held[workers[0]]
    assert any(worker.agent.admits(removed) for worker in workers)
    world.admin.say(RemoveMachine(name="w0"))
    assert world.run(lambda: world.state == "serving", for_s=10.0)
    assert world.run(lambda: not any(worker.agent.admits(removed) for worker in workers[1:]))


# ------------------------------------------------------------------ forged answers


@pytest.mark.parametrize("role", [Role.WORKER, Role.CLIENT], ids=lambda role: role.value)
def test_tokens_that_another_machine_makes_up_are_not_taken(role: Role) -> None:
    """Whoever has heard which step runs, and when; the machine that runs it is believed."""
    world = among_thieves()
    workers = world.serving(2)
    last = next(w for w in workers if w.loaded[-1].layers.stop == NUM_LAYERS)
    evil = Raw(world, world.enrolled("evil", role), is_worker=role is Role.WORKER)
    if role is Role.WORKER:
        hello = WorkerHello(name="evil", instance="x", capabilities=capabilities(10_000))
        assert isinstance(evil.say(hello), Welcome)
    answer = world.client().submit(LONG, SamplingParams(max_new_tokens=8, ignore_eos=True))
    heard: list[bool] = []

    def forge(event: events.Event) -> None:
        if (
            isinstance(event, events.Received)
            and isinstance(event.message, TaskResult)
            and event.peer == last.link.peer
        ):
            wrong = tuple(bytes(len(frame)) for frame in event.frames)
            forged = replace(event, peer=evil.link.peer, key=world.held[evil], frames=wrong)
            actions = world.core.handle(forged, now=world.now)
            heard.append(any(isinstance(one, events.Detokenize) for one in actions))
        do(event)

    do, world._do = world._do, forge  # type: ignore[method-assign]
    finish(world, answer)  # it checks the tokens
    assert heard
    assert not any(heard)
