"""The core in a simulated cluster: messages that are lost, repeated or late."""

import pytest

from distributed_llm.common.errors import RemoteProtocolError
from distributed_llm.common.messages import (
    DrainWorker,
    FromWorker,
    Generate,
    Heartbeat,
    LinkReport,
    LoadStage,
    Pong,
    StageFailed,
    StageReady,
    StageTime,
    Task,
    TaskFailed,
    TaskResult,
    Welcome,
    WorkerHello,
)
from distributed_llm.common.types import Epoch, StepNumber
from distributed_llm.coordinator import events
from tests.unit.simulation import LONG, Fault, FaultKind, World, finish

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
    assert sum("dropped a message" in line for line in world.logs) == 5
    world.run(for_s=61.0)
    assert "995 more lines were left out in 60 s: dropped messages" in world.logs
    world.apply(garbage)
    assert sum("dropped a message" in line for line in world.logs) == 6


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
