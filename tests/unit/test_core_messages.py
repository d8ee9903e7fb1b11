"""The core in a simulated cluster: messages that are lost, repeated or late."""

import pytest

from distributed_llm.common.errors import RemoteProtocolError
from distributed_llm.common.messages import (
    Cancel,
    DrainWorker,
    FromWorker,
    Generate,
    GetStatus,
    Heartbeat,
    LinkReport,
    LoadStage,
    MayLeave,
    NotUnderstood,
    Pong,
    Refused,
    StageFailed,
    StageReady,
    StageTime,
    Task,
    TaskFailed,
    TaskResult,
    Welcome,
    WorkerHello,
    tag_of,
)
from distributed_llm.common.sampling_params import SamplingParams
from distributed_llm.common.types import Epoch, Outline, PeerId, StepNumber
from distributed_llm.coordinator import events
from tests.unit.simulation import LONG, Fault, FaultKind, World, finish, with_settings

# ------------------------------------------------------------------ lost, repeated, late messages


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("kind", [Task, TaskResult])
@pytest.mark.parametrize(
    ("what", "delay_s"), [("drop", 0.0), ("duplicate", 0.0), ("delay", 0.5), ("delay", 3.5)]
)
def test_message_of_a_step_is_lost_repeated_or_late(
    stage: int, kind: type[Task] | type[TaskResult], what: FaultKind, delay_s: float
) -> None:
    world = World()
    worker = world.serving(3)[stage]
    client = world.client()
    answer, other = client.submit(LONG), client.submit((4, 5))
    for count in (1, 3):
        tokens = len(answer.token_ids)
        world.run(lambda tokens=tokens: len(answer.token_ids) >= tokens + 3)  # type: ignore[misc]
        hit = 1 if what == "drop" else count  # the same task lost twice is another matter
        world.faults.append(Fault(kind, what, hit, worker, delay_s))
    finish(world, answer, other)
    if what != "delay":
        assert world.epoch == 1


def test_task_lost_twice_gives_the_worker_up() -> None:
    world = World()
    _, victim, _ = world.serving(3)
    client = world.client()
    answer = client.submit(LONG)
    world.run(lambda: len(answer.token_ids) == 2)
    world.faults.append(Fault(Task, "drop", 2, victim))
    finish(world, answer)
    assert victim.num_sessions == 2
    assert world.epoch >= 2


@pytest.mark.parametrize("kind", [WorkerHello, Welcome, Heartbeat, Pong])
@pytest.mark.parametrize("what", ["drop", "duplicate"])
def test_message_of_a_session_is_lost_or_repeated(kind: type[WorkerHello], what: FaultKind) -> None:
    world = World()
    world.faults += [Fault(kind, what), Fault(kind, what)]
    world.serving(3)
    finish(world, world.client().submit(LONG))


@pytest.mark.parametrize("kind", [LoadStage, StageReady])
def test_message_of_a_plan_is_repeated(kind: type[LoadStage]) -> None:
    world = World()
    world.faults.append(Fault(kind, "duplicate", 3))
    world.serving(3)
    finish(world, world.client().submit(LONG))
    assert world.epoch == 1


def test_that_a_worker_may_leave_is_lost() -> None:
    """It is told again as soon as it says that it is still there."""
    world = World()
    workers = world.serving(3)
    idle = world.worker("idle", 1)
    world.run(for_s=1.0)
    world.faults.append(Fault(MayLeave, "drop"))
    world.client().say(DrainWorker(worker="idle"))
    assert world.run(lambda: idle.ended == 0, for_s=3.0)
    assert not world.faults
    assert all(worker.state == "up" for worker in workers)


def test_duplicate_request_id_is_dropped() -> None:
    world = World()
    world.serving(2)
    client = world.client()
    world.faults.append(Fault(Generate, "duplicate"))
    finish(world, client.submit(LONG))
    assert world.rejected["duplicate_request"] == 1


def test_results_of_an_older_epoch_are_dropped() -> None:
    world = World()
    _, victim, late = world.serving(3)
    client = world.client()
    answer = client.submit(LONG)
    world.run(lambda: len(answer.token_ids) == 2)
    world.faults.append(Fault(TaskResult, "delay", 1, late, 0.02))
    assert world.run(lambda: not world.faults)
    victim.kill()
    finish(world, answer)
    assert world.rejected["stale_epoch"] >= 1


def test_what_workers_say_of_older_epochs_is_counted_and_no_more() -> None:
    world = World()
    _, worker, victim = world.serving(3)
    victim.kill()
    assert world.run(lambda: world.epoch == 2 and world.state == "serving")
    answer = world.client().submit(LONG)
    world.run(lambda: len(answer.token_ids) == 2)
    times = (StageTime(compute_us=1, layers_us=0, queued_us=0),)
    messages: list[FromWorker] = [
        TaskResult(epoch=Epoch(1), step=StepNumber(2), timings=times),
        TaskFailed(epoch=Epoch(1), step=StepNumber(2), code="stage_error", message="x"),
        LinkReport(epoch=Epoch(1), up=True),
        StageFailed(epoch=Epoch(1), code="stage_error", message="x"),
        StageReady(epoch=Epoch(1), credits=2, load_s=0.0, kv_tokens=99, weight_bytes=1),
        StageReady(
            epoch=Epoch(2), credits=2, load_s=0.0, kv_tokens=99, weight_bytes=1
        ),  # it is served already
    ]
    before = world.rejected.get("stale_epoch", 0)
    for message in messages:
        assert world.apply(events.Received(worker.link.peer, message)) == []
    assert world.rejected["stale_epoch"] == before + len(messages)
    finish(world, answer)
    assert world.epoch == 2


def test_older_layers_that_are_ready_are_not_the_new_ones() -> None:
    world = World()
    workers = [world.worker(f"w{i}") for i in range(4)]
    for worker in workers:
        worker.load_s = 1.0
    assert world.run(lambda: world.state == "loading")
    workers[0].kill()
    assert world.run(lambda: world.epoch == 2)
    for worker in workers[1:]:
        ready = StageReady(epoch=Epoch(1), credits=2, load_s=0.0, kv_tokens=99, weight_bytes=1)
        world.apply(events.Received(worker.link.peer, ready))
        failed = StageFailed(epoch=Epoch(1), code="stage_error", message="x")
        world.apply(events.Received(worker.link.peer, failed))
    assert world.state == "loading"
    finish(world, world.client().submit(LONG))
    assert world.epoch == 2


# ------------------------------------------------------------------ messages that nobody can read


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("kind", [Task, TaskResult])
def test_a_step_that_cannot_be_read_fails_at_once(
    stage: int, kind: type[Task] | type[TaskResult]
) -> None:
    """Not when its lease runs out: everybody would stand still until then."""
    world = World()
    worker = world.linked(3)[stage]
    client = world.client()
    answer, other = client.submit(LONG), client.submit((4, 5))
    assert world.run(lambda: len(answer.token_ids) == 3)
    if kind is TaskResult and stage < 2:
        world.apart.add((worker, world.plan()[stage + 1]))  # the coordinator relays its results
        worker.cut()
    world.faults.append(Fault(kind, "spoil", 1, worker))
    assert world.run(lambda: not world.faults, for_s=10.0)
    tokens = len(answer.token_ids)
    assert world.run(lambda: len(answer.token_ids) > tokens + 1, for_s=0.3)
    finish(world, answer, other)
    assert world.epoch == 1
    assert any("unheard_of" in line for line in world.logs)


def test_a_task_that_no_worker_can_read_fails_its_request_alone() -> None:
    """As when a worker has a smaller limit than the coordinator."""
    world = World(with_settings(max_batch_tokens=64))
    world.linked(3)
    client = world.client()
    long = SamplingParams(max_new_tokens=40, ignore_eos=True)
    good = [client.submit((number, 5), long) for number in range(6)]
    assert world.run(lambda: all(len(answer.token_ids) > 1 for answer in good))
    world.unreadable = lambda message: (
        isinstance(message, Task)
        and any(part.sampling and part.sampling.seed == 99 for part in message.sequences)
    )
    bad = client.submit(LONG, SamplingParams(seed=99, max_new_tokens=8))
    asked_at = world.now
    assert world.run(lambda: bad.end is not None, for_s=2.0)
    assert bad.code == "stage_error"
    assert "unheard_of" in bad.message
    assert world.now - asked_at < 1.0
    finish(world, *good)
    assert world.epoch == 1


def test_a_request_that_cannot_be_read_is_refused() -> None:
    world = World()
    world.serving(2)
    client = world.client()
    world.faults.append(Fault(Generate, "spoil"))
    bad = client.submit(LONG)
    assert world.run(lambda: bad.end is not None, for_s=1.0)
    assert bad.code == "invalid_request"
    assert "unheard_of" in bad.message
    finish(world, client.submit(LONG))


@pytest.mark.parametrize("kind", [LoadStage, StageReady])
def test_layers_of_which_a_message_cannot_be_read_are_planned_anew(
    kind: type[LoadStage] | type[StageReady],
) -> None:
    world = World()
    world.faults.append(Fault(kind, "spoil"))
    for number in range(4):
        world.worker(f"w{number}")
    assert world.run(lambda: world.state == "serving", for_s=10.0)
    assert any("unheard_of" in line for line in world.logs)
    finish(world, world.client().submit(LONG))


@pytest.mark.parametrize("kind", [Welcome, Heartbeat, Pong, LinkReport])
def test_a_session_outlives_a_message_that_cannot_be_read(kind: type[Welcome]) -> None:
    world = World()
    world.faults.append(Fault(kind, "spoil"))
    world.serving(3)
    finish(world, world.client().submit(LONG))
    assert world.run(lambda: not world.faults, for_s=10.0)
    assert any("unheard_of" in line for line in world.logs)


@pytest.mark.parametrize(
    ("what", "ends"),
    [("drop_stage", True), ("undo_move", True), ("may_leave", True), ("pong", False)],
)
def test_a_worker_that_goes_on_as_before_joins_anew(what: str, ends: bool) -> None:
    world = World()
    worker = world.serving(3)[1]
    said = NotUnderstood(what=what, why="bad_field: unheard_of")
    world.apply(events.Received(worker.link.peer, said))
    assert any(f"cannot read a message to it ({what})" in line for line in world.logs)
    world.run(lambda: worker.num_sessions == 2, for_s=1.0)
    assert worker.num_sessions == (2 if ends else 1)
    assert world.run(lambda: world.state == "serving")
    finish(world, world.client().submit(LONG))


@pytest.mark.parametrize("kind", [Cancel, GetStatus, DrainWorker])
def test_a_client_whose_messages_cannot_be_read_is_told(kind: type[Cancel]) -> None:
    """And its session ends, so that it does not wait for an answer for ever."""
    world = World()
    world.serving(2)
    client = world.client()
    answer = client.submit(LONG)
    assert world.run(lambda: len(answer.token_ids) == 1)
    error = RemoteProtocolError("bad_field", "unheard_of", Outline(type=tag_of(kind)))
    actions = world.apply(events.Garbage(client.link.peer, error.reason, error))
    refused = [a.message for a in actions if isinstance(a, events.Send)]
    assert any(isinstance(one, Refused) and one.code == "remote_protocol" for one in refused)
    assert not world.core._book.busy


def test_a_worker_whose_hello_cannot_be_read_is_told() -> None:
    world = World()
    error = RemoteProtocolError("bad_field", "unheard_of", Outline(type=tag_of(WorkerHello)))
    (_, refused) = world.apply(events.Garbage(PeerId(b"new"), error.reason, error))
    assert isinstance(refused, events.Send)
    assert isinstance(refused.message, Refused)
    assert "unheard_of" in refused.message.message
    noise = RemoteProtocolError("bad_magic", "noise")
    assert len(world.apply(events.Garbage(PeerId(b"new"), noise.reason, noise))) == 1


def test_a_flood_of_bad_messages_does_not_flood_the_log() -> None:
    world = World()
    world.serving(2)
    client = world.client()
    world.run(for_s=1.0)
    for _ in range(1000):
        garbage = events.Garbage(
            client.link.peer, "malformed", RemoteProtocolError("malformed", "?")
        )
        world.apply(garbage)
    assert world.rejected["malformed"] == 1000
    assert sum("cannot read a message" in line for line in world.logs) == 5
    world.run(for_s=61.0)
    assert "995 more lines were left out in 60 s: dropped messages" in world.logs
    world.apply(garbage)
    assert sum("cannot read a message" in line for line in world.logs) == 6


def test_a_flood_of_orders_does_not_flood_the_log() -> None:
    """Any event that a peer can cause is one."""
    world = World()
    world.serving(2)
    client = world.client()
    world.run(for_s=1.0)
    for _ in range(150):
        drain = events.Received(client.link.peer, DrainWorker(worker="w0"))
        world.apply(drain)
    assert sum("wants worker w0 to leave" in line for line in world.logs) == 100
    world.run(for_s=61.0)
    assert "50 more lines were left out in 60 s: drain requested" in world.logs
