"""Weights have fewer bits while the workers that are there cannot hold them otherwise."""

from collections.abc import Callable

import pytest

from distributed_llm.common.errors import NotEnoughMemory
from distributed_llm.common.messages import DrainWorker, WorkerDrained
from distributed_llm.common.sampling_params import SamplingParams
from tests.unit.fake_client import SimClient
from tests.unit.fake_model import AUTO_MODEL
from tests.unit.fake_worker import SimWorker
from tests.unit.simulation import World, finish, with_settings

THIRD = 400
"""Memory with which three workers hold all bits, two of them 8, and one none at all."""

LONG = SamplingParams(max_new_tokens=60, ignore_eos=True)
STRATEGIES = pytest.mark.parametrize("strategy", ["memory", "speed"])


def world_of(strategy: str, count: int, replicas: int = 1) -> tuple[World, list[SimWorker]]:
    """Return a cluster that serves, with so many workers."""
    settings = with_settings(strategy=strategy, replicas=replicas)
    world = World(settings, model=AUTO_MODEL)
    return world, world.serving(count, THIRD)


def drain(world: World, worker: SimWorker) -> Callable[[], list[WorkerDrained]]:
    """Have a worker drained; return what tells the answers."""
    client = world.client()
    world.run(for_s=0.1)
    client.say(DrainWorker(worker=worker.worker_id))
    return lambda: drained(client)


def drained(client: SimClient) -> list[WorkerDrained]:
    return [message for message in client.others if isinstance(message, WorkerDrained)]


def events_of(world: World) -> str:
    return "\n".join(entry.text for entry in world.core._event_log.entries)


@STRATEGIES
@pytest.mark.parametrize("how", ["drained", "signalled", "killed"])
def test_who_goes_may_leave_fewer_bits_to_the_others_and_answers_go_on(
    strategy: str, how: str
) -> None:
    world, workers = world_of(strategy, 3)
    answer = world.client().submit((1, 2, 3), LONG)
    assert world.run(lambda: len(answer.token_ids) >= 10)
    match how:
        case "drained":
            told = drain(world, workers[1])
            assert world.run(lambda: bool(told()))
            assert [(one.worker, one.code) for one in told()] == [("w1", "")]
            assert "w1 is to leave" in events_of(world)
        case "signalled":
            workers[1].leave_kindly()
            assert world.run(lambda: workers[1].ended is not None)
        case _:
            workers[1].kill()
    finish(world, answer)
    assert world.checker.forms == ["none", "int8"]
    assert "weights of plan 2 are int8 (400 bytes), until now int32 (700 bytes)" in events_of(world)
    assert "keep their tokens so far" in events_of(world)
    assert len({*answer._forms_of_tokens()}) == 2, "the answer shows both"
    assert world.core.status(now=world.now).preemptions == 0


@STRATEGIES
def test_who_leaves_too_little_for_the_fewest_bits_stays(strategy: str) -> None:
    world, workers = world_of(strategy, 2)
    assert world.checker.forms == ["none", "int8"]
    answer = world.client().submit((1, 2, 3), LONG)
    told = drain(world, workers[0])
    assert world.run(lambda: bool(told()))
    assert told()[0].code == NotEnoughMemory.code
    finish(world, answer)
    assert (world.epoch, len(world.plan())) == (1, 2)


def test_bits_stay_where_requests_can_go_on_in_another_pipeline() -> None:
    world, workers = world_of("memory", 6, replicas=2)
    answer = world.client().submit((1, 2, 3), LONG)
    assert world.run(lambda: len(answer.token_ids) >= 5)
    told = drain(world, workers[0])
    assert world.run(lambda: bool(told()))
    finish(world, answer)
    assert world.checker.forms == ["none"]


@STRATEGIES
def test_bits_come_back_once_no_request_runs(strategy: str) -> None:
    world, _ = world_of(strategy, 2)
    answer = world.client().submit((1, 2, 3), LONG)
    assert world.run(lambda: len(answer.token_ids) >= 1)
    slow = world.workers[0]
    slow.task_s = 0.3
    world.worker("w2", THIRD)
    world.run(for_s=8.0)
    assert answer.end is None
    assert world.checker.forms == ["none", "int8"], "not while an answer is written"
    finish(world, answer)
    assert world.run(lambda: world.state == "serving" and len(world.plan()) == 3)
    assert world.checker.forms == ["none", "int8", "none"]
    assert "are int32 (700 bytes), until now int8 (400 bytes)" in events_of(world)
    finish(world, world.client().submit())


def test_who_brings_no_bits_has_nothing_loaded_anew() -> None:
    """With strategy speed; else joiners are given layers as soon as no request runs."""
    world, _ = world_of("speed", 2)
    world.worker("w2", 100)
    world.run(for_s=30.0)
    assert (world.epoch, world.checker.forms) == (1, ["none", "int8"])
