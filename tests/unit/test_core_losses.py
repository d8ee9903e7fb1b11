"""The core in a simulated cluster: workers that die, hang or fail, one at a time."""

from collections.abc import Sequence
from functools import partial

import pytest

from distributed_llm.common.errors import (
    CheckpointUnavailable,
    DistributedLLMError,
    NotEnoughMemory,
    StageError,
)
from distributed_llm.common.messages import (
    NOT_SERVED,
    Finished,
    Heartbeat,
    LoadStage,
    MissingPositions,
    StageReady,
    Task,
    TaskFailed,
    TaskResult,
)
from distributed_llm.common.sampling_params import SamplingParams
from distributed_llm.common.types import Epoch, LayerRange, SequenceId
from distributed_llm.coordinator import events
from distributed_llm.coordinator.serving.event_log import EventKind
from tests.unit.fake_client import Answer
from tests.unit.fake_model import POISON, Missing
from tests.unit.fake_worker import SimWorker
from tests.unit.simulation import LONG, Fault, Way, World, finish, with_settings

# ------------------------------------------------------------------ workers cannot load


@pytest.mark.parametrize("kind", [NotEnoughMemory, CheckpointUnavailable])
@pytest.mark.parametrize("strategy", ["memory", "speed"])
def test_the_only_worker_is_tried_again_until_it_can_load(
    strategy: str, kind: type[DistributedLLMError]
) -> None:
    """After pauses that double, so that it is mended at no cost; it is said when."""
    world = World(with_settings(strategy=strategy))
    only = world.worker("only", 2000)
    only.load_error = kind("Another program takes the memory.")
    assert world.run(lambda: only.num_loads == 1)
    world.run(for_s=1.0)
    status = world.core.status(now=world.now)
    assert status.state == "waiting"
    assert status.workers[0].state == "unfit"
    assert (
        status.workers[0].note
        == "Another program takes the memory. It may be given layers again in 9 s."
    )
    assert status.note.endswith("Worker only is tried again in 9 s.")
    failed = world.client().submit()
    assert world.run(lambda: failed.end is not None, for_s=1.0)
    assert "is tried again in" in str(failed.end)
    started_at = world.now
    assert world.run(lambda: only.num_loads == 2, for_s=11.0)
    assert world.run(lambda: only.num_loads == 3, for_s=22.0)
    assert world.run(lambda: only.num_loads == 4, for_s=42.0)
    assert world.now > started_at + 60.0
    only.load_error = None
    assert world.run(lambda: world.state == "serving", for_s=82.0)
    finish(world, world.client().submit())


def test_pauses_are_bounded_and_begin_anew_after_a_success() -> None:
    world = World()
    only = world.worker("only", 2000)
    only.load_error = StageError("Its disk does not answer.")
    assert world.run(lambda: only.num_loads == 12, for_s=6000.0)
    assert world.run(lambda: only.num_loads == 13, for_s=602.0)
    only.load_error = None
    assert world.run(lambda: world.state == "serving", for_s=602.0)
    only.load_error = StageError("Its disk does not answer.")
    loads = only.num_loads
    world.worker("late", 2000)  # both are planned for
    assert world.run(lambda: only.num_loads == loads + 1, for_s=5.0)
    assert world.run(lambda: world.core.status(now=world.now).workers[0].state == "unfit")
    note = world.core.status(now=world.now).workers[0].note
    assert note == "Its disk does not answer. It may be given layers again in 10 s."


def test_a_worker_that_has_more_memory_than_when_it_failed_is_tried_at_once() -> None:
    world = World()
    only = world.worker("only", 2000)
    only.load_error = NotEnoughMemory("Another program takes the memory.")
    only.memory_bytes = 1500
    assert world.run(lambda: only.num_loads == 6, for_s=400.0)
    world.run(for_s=15.0)
    status = world.core.status(now=world.now)
    assert status.workers[0].capabilities.memory_bytes == 1500, "it is planned for what there is"
    only.load_error, only.memory_bytes = None, 2000
    assert world.run(lambda: world.state == "serving", for_s=12.0)


def test_who_is_tried_again_takes_nothing_away_from_those_that_serve() -> None:
    world = World()
    world.worker("well", 2000)
    ill = world.worker("ill", 2000)
    ill.load_error = StageError("Its disk does not answer.")
    assert world.run(lambda: ill.num_loads == 1 and world.state == "serving")
    epoch = world.epoch
    world.run(for_s=600.0)
    assert (world.epoch, world.state, ill.num_loads) == (epoch, "serving", 1)
    ill.load_error = None
    world.workers[0].kill()
    assert world.run(lambda: world.state == "serving" and world.epoch > epoch, for_s=5.0)
    assert world.plan() == [ill]


@pytest.mark.parametrize("strategy", ["memory", "speed"])
def test_workers_that_fail_in_turn_do_not_keep_the_others_from_serving(strategy: str) -> None:
    """Loads take longer than pauses after failures, so one of them may always be tried again."""
    world = World(with_settings(strategy=strategy, replicas=1))
    for number in range(5):
        worker = world.worker(f"w{number}", 900)
        worker.load_s = 1000.0 + 10.0 * number
        if number < 3:
            worker.load_error = StageError("Its disk does not answer.")
    assert world.run(lambda: world.state == "serving", for_s=4200.0)
    assert max(worker.num_loads for worker in world.workers[:3]) == 1
    finish(world, world.client().submit(LONG))


# ------------------------------------------------------------------ loads that hang


def test_a_worker_whose_load_hangs_is_passed_over_and_told() -> None:
    """The others serve without it; once its load has ended it may be used again."""
    world = World()
    workers = [world.worker(f"w{i}", 900) for i in range(3)]
    workers[1].load_stalls = True
    assert world.run(lambda: world.state == "loading", for_s=2.0)
    answer = world.client().submit()
    world.run(for_s=115.0)
    assert world.state == "loading"
    assert world.run(lambda: world.state == "serving", for_s=10.0)
    assert workers[1] not in world.plan()
    finish(world, answer)
    status = {worker.name: worker for worker in world.core.status(now=world.now).workers}["w1"]
    assert status.state == "unfit"
    assert "made no progress for 12" in status.note
    assert status.note.endswith("It may be given layers again once that load has ended.")
    assert any(log.startswith("w1: ") and "made no progress" in log for log in world.logs)
    assert workers[1].num_sessions == 1
    world.run(for_s=100.0)
    orders = [type(order).__name__ for order in workers[1].orders]
    assert orders.count("Load") == 1, "nothing is ordered while it hangs"
    workers[1].resume_loads()
    world.run(for_s=2.0)
    epoch = world.epoch
    world.workers[0].kill()
    assert world.run(lambda: world.state == "serving" and world.epoch > epoch, for_s=5.0)
    assert workers[1] in world.plan()
    finish(world, world.client().submit())


def test_a_load_may_take_as_long_as_it_makes_progress() -> None:
    world = World()
    slow = world.worker("slow", 2000)
    slow.load_s = 3000.0
    assert world.run(lambda: world.state == "loading", for_s=2.0)
    answer = world.client().submit()
    assert world.run(lambda: world.state == "serving", for_s=3010.0)
    assert world.epoch == 1
    finish(world, answer)


@pytest.mark.parametrize("kind", [LoadStage, StageReady])
def test_a_load_of_which_nothing_is_heard_ends_as_well(kind: type[LoadStage]) -> None:
    world = World()
    world.faults.append(Fault(kind, "drop"))
    world.worker("only", 2000)
    assert world.run(lambda: world.state == "serving", for_s=140.0)
    finish(world, world.client().submit())


# ------------------------------------------------------------------ nobody listens for a while


def test_nobody_is_lost_because_the_coordinator_stood_still() -> None:
    world = World()
    world.serving(2)
    silent_at = world.now + 1000.0
    world.core.handle(events.Stalled(1000.0), now=silent_at)
    world.core.on_timer(now=silent_at)
    status = world.core.status(now=silent_at)
    assert [worker.state for worker in status.workers] == ["serving", "serving"]
    assert "the coordinator stood still for 17 min" in status.events[-1].text


# ------------------------------------------------------------------ workers are lost


def kill_nth(worker: SimWorker, number: int, when: str, how: str) -> None:
    """Have `worker` die before or after it computes its `number`th task."""
    left = [number]

    def hook(task: Task) -> None:
        left[0] -= 1
        if left[0] == 0:
            worker.kill(silently=how == "silently")

    if when == "before":
        worker.before_task = hook
    else:
        worker.after_task = hook


@pytest.mark.parametrize("how", ["loudly", "silently"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_killed_at_any_step_gives_the_same_tokens(stage: int, when: str, how: str) -> None:
    steps = 3 + 8 - 1  # chunks of the prompt, and tokens after the first
    for number in range(1, steps + 1):
        world = World()
        victim = world.serving(3)[stage]
        kill_nth(victim, number, when, how)
        client = world.client()
        answers = [client.submit(LONG), client.submit((1, 2, 3))]
        finish(world, *answers)
        assert victim.state == "dead"
        assert world.epoch == 2
        assert len(world.plan()) == 2


def test_all_but_the_last_possible_worker_die_one_after_the_other() -> None:
    world = World()
    workers = world.serving(5, memory_bytes=1500)  # one could do it
    client = world.client()
    params = SamplingParams(max_new_tokens=60, ignore_eos=True)
    answer = client.submit(LONG, params)
    for worker in workers[:4]:
        count = len(answer.token_ids)
        assert world.run(lambda count=count: len(answer.token_ids) >= count + 3)  # type: ignore[misc]
        worker.kill()
    finish(world, answer)
    assert isinstance(answer.end, Finished)
    assert {s.worker for s in answer.end.timings.stages} == {w.name for w in workers}
    assert world.epoch == 5


def test_two_workers_die_at_once() -> None:
    world = World()
    first, second, *_ = world.serving(4)
    client = world.client()
    answer = client.submit(LONG)
    world.run(lambda: len(answer.token_ids) == 2)
    first.kill(silently=True)
    second.kill(silently=True)
    finish(world, answer)


def test_worker_dies_while_it_loads() -> None:
    world = World()
    workers = [world.worker(f"w{i}") for i in range(3)]
    for worker in workers:
        worker.load_s = 1.0
    assert world.run(lambda: world.state == "loading")
    client = world.client()
    answer = client.submit()
    world.run(for_s=0.5)
    workers[1].kill()
    finish(world, answer)


def test_frozen_for_less_than_the_timeout_is_not_lost() -> None:
    world = World()
    _, victim, _ = world.serving(3)
    answer = world.client().submit(LONG)
    world.run(lambda: len(answer.token_ids) == 2)
    victim.freeze()
    world.run(for_s=2.0)
    victim.thaw()
    finish(world, answer)
    assert world.epoch == 1


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_zombie_is_fenced_and_joins_again(stage: int) -> None:
    world = World()
    zombie = world.serving(3)[stage]
    client = world.client()
    answer = client.submit(LONG, SamplingParams(max_new_tokens=40, ignore_eos=True))

    def freeze(task: Task) -> None:
        if task.step >= 5 and zombie.state == "up":
            zombie.freeze()

    zombie.before_task = freeze
    world.run(lambda: zombie.state == "frozen")
    assert world.run(lambda: world.epoch == 2 and world.state == "serving")
    count = len(answer.token_ids)
    assert world.run(lambda: len(answer.token_ids) > count)
    zombie.before_task = lambda task: None
    zombie.thaw()
    finish(world, answer)
    assert zombie.num_sessions == 2
    assert world.run(lambda: len(world.plan()) == 3)
    finish(world, client.submit())


def test_zombie_that_was_not_missed_yet_and_no_spare() -> None:
    """Frozen with a result on its way; the others cannot hold the model; it comes back."""
    world = World()
    _, zombie = world.serving(2)
    client = world.client()
    lost = client.submit(LONG)
    zombie.after_task = lambda task: zombie.freeze()
    world.run(lambda: lost.end is not None)
    assert lost.code == "worker_lost"
    refused = client.submit()
    world.run(lambda: refused.end is not None)
    assert refused.code == "not_ready"
    zombie.after_task = lambda task: None
    zombie.thaw()
    assert world.run(lambda: world.state == "serving")
    assert world.rejected["bad_state"] >= 1
    finish(world, client.submit(LONG))


def test_worker_that_hangs_in_a_task_is_given_up() -> None:
    world = World()
    _, victim, _ = world.serving(3)
    answer = world.client().submit(LONG)
    world.run(lambda: len(answer.token_ids) == 2)
    victim.hung = True  # heartbeats go on
    began = world.now
    world.run(lambda: answer.end is not None)
    assert world.now - began < 2 * 3.0 + 2.0  # two leases
    finish(world, answer)
    assert "no progress" in " ".join(world.logs)


def test_hung_worker_is_given_nothing_until_it_moves_again() -> None:
    world = World()
    _, victim, _ = world.serving(3)
    client = world.client()
    first = client.submit(LONG)
    world.run(lambda: len(first.token_ids) == 2)
    victim.hung = True
    finish(world, first)
    assert victim.num_sessions == 2  # it is there again, and its task still hangs
    world.run(for_s=10.0)
    assert world.state == "serving"
    assert victim not in world.plan()
    finish(world, client.submit(LONG))
    victim.resume()
    assert world.run(lambda: victim in world.plan() and world.state == "serving", for_s=5.0)
    finish(world, client.submit(LONG))


def test_worker_that_hangs_is_not_waited_for_while_layers_load() -> None:
    world = World()
    _, victim, other, _ = world.serving(4)
    answer = world.client().submit(LONG)
    world.run(lambda: len(answer.token_ids) == 2)
    victim.hung = True
    world.run(lambda: bool(victim.orders))
    world.run(for_s=1.0)
    other.kill()  # the new plan counts on the hung worker, which does not load
    finish(world, answer)
    assert victim not in world.plan()


def test_slow_worker_with_progress_keeps_its_lease() -> None:
    world = World()
    _, slow, _ = world.serving(3)
    answer = world.client().submit(LONG)
    world.run(lambda: len(answer.token_ids) == 2)
    slow.hung = True
    for _ in range(20):  # a task of ten seconds, a layer a second
        world.run(for_s=0.5)
        world.apply(
            events.Received(
                slow.link.peer,
                Heartbeat(
                    epochs=(Epoch(1),),
                    progress_age_s=0.1,
                    tasks_waiting=1,
                    memory_used_bytes=0,
                    kv_bytes=0,
                ),
            )
        )
    assert world.epoch == 1
    slow.resume()
    finish(world, answer)


def test_worker_that_says_it_serves_another_plan_is_given_up() -> None:
    world = World()
    astray, *_ = world.serving(3)
    answer = world.client().submit(LONG)
    world.run(lambda: len(answer.token_ids) == 2)
    beat = Heartbeat(
        epochs=(Epoch(99),), progress_age_s=0.0, tasks_waiting=0, memory_used_bytes=0, kv_bytes=0
    )
    world.apply(events.Received(astray.link.peer, beat))
    assert "w0 serves another plan" in " ".join(world.logs)
    finish(world, answer)
    assert world.epoch > 1


def test_graceful_leave_moves_the_work() -> None:
    world = World()
    leaver, *_ = world.serving(3)
    answer = world.client().submit(LONG)
    world.run(lambda: len(answer.token_ids) == 2)
    leaver.leave()
    finish(world, answer)
    assert "w0 said goodbye" in " ".join(world.logs)


def test_spare_worker_dies_unnoticed() -> None:
    world = World(with_settings(strategy="custom", layers={"w0": LayerRange(0, 6)}))
    _, spare = world.worker("w0", 2000), world.worker("w1")
    assert world.run(lambda: world.state == "serving")
    spare.kill()
    finish(world, world.client().submit())
    assert world.epoch == 1
    assert len(world.core.status(now=world.now).workers) == 1


# ------------------------------------------------------------------ stages fail


def test_lonely_request_whose_step_fails_once_is_run_again() -> None:
    world = World()
    _, worker, _ = world.serving(3)
    answer = world.client().submit(LONG)
    world.run(lambda: len(answer.token_ids) == 2)
    for _ in range(2):  # once each, not twice in a row
        worker.fail_tasks = 1
        count = len(answer.token_ids)
        world.run(lambda count=count: len(answer.token_ids) > count + 1)  # type: ignore[misc]
    finish(world, answer)


def test_step_that_fails_once_is_run_again() -> None:
    for stage in range(3):
        world = World()
        worker = world.serving(3)[stage]
        client = world.client()
        answers = [client.submit(LONG), client.submit((1, 2))]
        world.run(lambda answers=answers: len(answers[1].token_ids) == 2)  # type: ignore[misc]
        worker.fail_tasks = 1
        finish(world, *answers)
        assert world.epoch == 1


@pytest.mark.parametrize("at", [0, 7, 8, 15, 16, 19])
def test_poison_request_fails_alone(at: int) -> None:
    world = World()
    world.serving(3)
    client = world.client()
    good = [client.submit(LONG), client.submit((1, 2, 3))]
    poison = list(LONG)
    poison[at] = POISON
    bad = client.submit(poison)
    good += [client.submit((5, 6)), client.submit(LONG[::-1])]
    finish(world, *good)
    assert bad.code == "stage_error"
    assert world.epoch == 1


@pytest.mark.parametrize("at", [0, 7, 8, 15, 16, 19])
def test_request_that_kills_its_workers_is_given_up_after_three(at: int) -> None:
    world = World()
    workers = world.serving(8)
    for worker in workers:
        worker.before_task = lambda task, worker=worker: (  # type: ignore[misc]
            worker.kill() if POISON in poisoned(worker) else None
        )

    def poisoned(worker: SimWorker) -> bytes:
        order = worker.orders[0]
        return bytes(getattr(order, "frames")[0][::4])  # noqa: B009

    client = world.client()
    good = [client.submit(LONG), client.submit((1, 2, 3))]
    poison = list(LONG)
    poison[at] = POISON
    bad = client.submit(poison)
    good += [client.submit((5, 6)), client.submit(LONG[::-1])]
    finish(world, *good)
    assert bad.code == "worker_lost"
    assert sum(w.state == "dead" for w in workers) == 3


def test_lost_kv_cache_is_computed_again() -> None:
    for stage in range(3):
        world = World()
        worker = world.serving(3)[stage]
        client = world.client()
        answers = [client.submit(LONG), client.submit((1, 2))]
        world.run(lambda answers=answers: len(answers[0].token_ids) == 3)  # type: ignore[misc]
        assert worker.stage is not None
        worker.stage.kv.clear()
        finish(world, *answers)
        assert world.epoch == 1


def test_stage_that_always_forgets_fails_the_request() -> None:
    world = World()
    _, worker, _ = world.serving(3)
    worker.after_task = lambda task: worker.stage.kv.clear() if worker.stage else None
    answer = world.client().submit(LONG)
    assert world.run(lambda: answer.end is not None, for_s=5.0)
    assert answer.code == "stage_error"


def test_refusal_that_names_sequences_of_no_step_does_not_go_on_for_ever() -> None:
    world = World()
    _, worker, _ = world.serving(3)
    answer = world.client().submit(LONG)
    count = 0

    def lie(task: Task) -> None:
        nonlocal count
        count += 1
        raise Missing((MissingPositions(sequence_id=SequenceId(999), have=0),))

    worker.before_task = lie
    assert world.run(lambda: answer.end is not None, for_s=5.0)
    assert answer.code == "stage_error"
    assert count < 10


def test_the_story_of_a_request_tells_what_it_went_through() -> None:
    world = World()
    workers = world.serving(3)
    answer = world.client().submit(LONG, request_id="mine")
    world.run(lambda: len(answer.token_ids) == 2)
    workers[1].kill()
    finish(world, answer)
    story = world.core.story(request="mine")
    assert [entry.kind for entry in story] == [
        EventKind.REQUEST_ARRIVED,
        EventKind.REQUEST_QUEUED,
        EventKind.ANSWER_ADMITTED,
        EventKind.STEP_LOST,
        EventKind.ANSWER_ADMITTED,
        EventKind.REQUEST_FINISHED,
    ]
    assert [entry.epoch for entry in story if entry.epoch] == [1, 2]
    assert story[3].worker == workers[1].name
    assert [entry.at for entry in story] == sorted(entry.at for entry in story)


def test_the_story_of_a_worker_tells_why_it_is_gone() -> None:
    world = World()
    workers = world.serving(3)
    workers[1].kill()
    assert world.run(lambda: world.epoch == 2 and world.state == "serving")
    kinds = [entry.kind for entry in world.core.story(worker=workers[1].name)]
    assert kinds[0] is EventKind.WORKER_JOINED
    assert EventKind.PLAN_LOADING in kinds
    assert kinds[-1] is EventKind.WORKER_LOST


# ------------------------------------------------------------------ steps lost among others


def busy(world: World, workers: Sequence[SimWorker]) -> list[Answer]:
    """Return answers of which some are computed at any moment."""
    for worker in workers:
        worker.task_s = 0.2
    client = world.client()
    params = SamplingParams(max_new_tokens=100, ignore_eos=True)
    answers = [client.submit((number, 1, 2), params) for number in range(6)]
    assert world.run(lambda: min(len(answer.token_ids) for answer in answers) > 2)
    return answers


@pytest.mark.parametrize(("kind", "way"), [(Task, "across"), (Task, "down"), (TaskResult, "up")])
def test_a_step_that_is_lost_among_others_is_computed_again(
    kind: type[Task | TaskResult], way: Way
) -> None:
    world = World(with_settings(strategy="memory"))
    workers = world.linked(3, 3000)
    answers = busy(world, workers)
    world.faults.append(Fault(kind, "drop", way=way))
    finish(world, *answers)
    assert all(worker.state == "up" for worker in workers)
    assert any("computed again" in line for line in world.logs)


def test_a_worker_that_swallows_tasks_is_given_up_while_others_make_progress() -> None:
    """It loses every tenth task, and reports progress on the others all the time."""
    world = World(with_settings(strategy="memory"))
    workers = world.linked(3, 3000)
    spare = world.worker("spare", 3000)
    answers = busy(world, workers)
    for at in range(0, 200, 10):
        fault = Fault(Task, "drop", peer_of=workers[1])
        world.at(at * 0.5, partial(world.faults.append, fault))
    finish(world, *answers)
    assert world.core.status(now=world.now).requests_failed == 0
    assert f"worker {workers[1].name} made no progress on a task" in world.logs
    assert spare.stage is not None


def test_a_worker_that_says_that_it_does_not_serve_the_plan_is_given_up() -> None:
    """Its answers run on those that do; to compute the step again would end the same way."""
    world = World(with_settings(strategy="memory"))
    workers = world.linked(3, 3000)
    answers = busy(world, workers)
    (pipeline,) = world.core._pipelines.loaded
    assert pipeline.in_flight
    number = next(iter(pipeline.in_flight._flights))
    said = TaskFailed(epoch=pipeline.epoch, step=number, code=NOT_SERVED, message="not here")
    world.apply(events.Received(workers[1].link.peer, said))
    assert f"worker {workers[1].name} serves another plan" in world.logs
    finish(world, *answers)
