"""The coordinator's core in a simulated cluster: every promise under every fault, one at a time."""

from collections.abc import Callable

import pytest

from distributed_llm.common.errors import (
    CheckpointMismatch,
    ProtocolMismatch,
    RemoteProtocolError,
    StageError,
    UnsupportedModel,
)
from distributed_llm.common.messages import (
    Cancel,
    ClientWelcome,
    Finished,
    FromClient,
    FromWorker,
    Generate,
    GetStatus,
    Goodbye,
    Heartbeat,
    LoadStage,
    MissingPositions,
    Ping,
    Pong,
    Refused,
    RequestFailed,
    StageFailed,
    StageReady,
    StatusReport,
    Task,
    TaskFailed,
    TaskResult,
    Welcome,
    WorkerHello,
)
from distributed_llm.common.sampling_params import SamplingParams
from distributed_llm.common.tensors import frame_of_token_ids
from distributed_llm.common.types import LayerRange, PeerId
from distributed_llm.coordinator import events
from tests.unit.fake_model import BIG, CONTEXT, POISON, Missing, reference
from tests.unit.simulation import (
    Answer,
    Fault,
    FaultKind,
    SimClient,
    SimWorker,
    World,
    capabilities,
    text_of,
    with_settings,
)

LONG = tuple(range(20))
"""A prompt of three chunks."""


def finish(world: World, *answers: Answer) -> None:
    """Run until all requests ended; these must be finished, and nothing be left of any."""
    assert world.run(world.all_ended)
    for answer in answers:
        assert isinstance(answer.end, Finished), answer.end
        answer.check()
    world.run(for_s=4.0)  # what is late arrives
    assert world.run(lambda: world.state != "loading")
    world.check_drained()


# ------------------------------------------------------------------ serving


def test_workers_join_load_and_serve() -> None:
    world = World()
    workers = world.serving(3)
    status = world.core.status(now=world.now)
    assert [w.name for w in status.workers] == ["w0", "w1", "w2"]
    assert [w.layers for w in status.workers] == [
        LayerRange(0, 2),
        LayerRange(2, 4),
        LayerRange(4, 6),
    ]
    assert all(w.state == "serving" and w.weight_bytes for w in status.workers)
    assert (status.epoch, status.kv_tokens) == (1, (BIG - 250) // 2)
    client = world.client()
    answers = [client.submit(LONG), client.submit((5,)), client.submit((9, 9, 9))]
    finish(world, *answers)
    status = world.core.status(now=world.now)
    assert (status.requests_finished, status.requests_failed) == (3, 0)
    assert status.tokens_generated == sum(len(a.token_ids) for a in answers)
    assert all(w.tasks_done and w.seconds_per_token for w in status.workers)
    assert [w.name for w in world.plan()] == [w.name for w in workers]


def test_batches_share_steps_and_prompts_come_in_chunks() -> None:
    world = World()
    first, *_ = world.serving(3)
    tasks: list[Task] = []
    first.before_task = tasks.append
    client = world.client()
    finish(world, client.submit(LONG), client.submit((1, 2)), client.submit((3, 4)))
    assert all(sum(part.num_tokens for part in task.sequences) <= 8 for task in tasks)
    assert max(len(task.sequences) for task in tasks) == 3
    long = [part for task in tasks for part in task.sequences if part.sequence_id == 0]
    assert sum(part.num_tokens for part in long if part.start < len(LONG)) == len(LONG)
    assert sum(part.sampling is None for part in long) >= 2


def test_timings_and_usage_are_reported() -> None:
    world = World()
    world.serving(3)
    answer = world.client().submit(LONG)
    finish(world, answer)
    assert isinstance(answer.end, Finished)
    timings = answer.end.timings
    assert [s.layers for s in timings.stages] == [
        LayerRange(0, 2),
        LayerRange(2, 4),
        LayerRange(4, 6),
    ]
    assert all(s.tasks == 3 + len(answer.token_ids) - 1 for s in timings.stages)
    assert timings.first_token_s > 0 < timings.decode_s


def test_same_seed_same_answer_in_any_company() -> None:
    params = SamplingParams(max_new_tokens=12, temperature=0.8, seed=5)
    world = World()
    world.serving(2)
    client = world.client()
    alone = client.submit((7, 8), params)
    finish(world, alone)
    together = [client.submit((7, 8), params), client.submit(LONG), client.submit((1,))]
    finish(world, *together)
    assert together[0].token_ids == alone.token_ids


def test_min_new_tokens_and_ignore_eos() -> None:
    prompt = next(
        (a, b)
        for a in range(90)
        for b in range(90)
        if len(reference((a, b), SamplingParams(max_new_tokens=9))) < 4
    )
    world = World()
    world.serving(2)
    client = world.client()
    plain = client.submit(prompt, SamplingParams(max_new_tokens=9))
    longer = client.submit(prompt, SamplingParams(max_new_tokens=9, min_new_tokens=6))
    through = client.submit(prompt, SamplingParams(max_new_tokens=9, ignore_eos=True))
    finish(world, plain, longer, through)
    assert plain.finish_reason == "stop"
    assert len(longer.token_ids) >= 6
    assert through.finish_reason == "length"


# ------------------------------------------------------------------ stop strings


@pytest.mark.parametrize("text_delay_s", [0.0, 0.02])
@pytest.mark.parametrize("span", [(3, 4), (2, 5), (0, 2)])
def test_stop_string_ends_the_answer_before_it(span: tuple[int, int], text_delay_s: float) -> None:
    whole = reference((1, 2, 3), SamplingParams(max_new_tokens=8, ignore_eos=True))
    stop = text_of(whole[span[0] : span[1]])
    world = World(text_delay_s=text_delay_s)
    world.serving(3)
    client = world.client()
    params = SamplingParams(max_new_tokens=8, stop_strings=(stop,), ignore_eos=True)
    answer, other = client.submit((1, 2, 3), params), client.submit(LONG)
    finish(world, answer, other)
    assert answer.finish_reason == "stop"
    assert answer.text == text_of(whole[: span[0]])
    assert len(answer.token_ids) == span[1]


def test_unfinished_stop_string_is_given_out_at_the_end() -> None:
    whole = reference((1, 2, 3), SamplingParams(max_new_tokens=8, ignore_eos=True))
    params = SamplingParams(
        max_new_tokens=8, stop_strings=(text_of([whole[-1], 1, 2]),), ignore_eos=True
    )
    world = World()
    world.serving(2)
    answer = world.client().submit((1, 2, 3), params)
    finish(world, answer)
    assert (answer.text, answer.finish_reason) == (text_of(whole), "length")


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
    workers = world.serving(5, memory_bytes=1200)  # one could do it
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
    answer = client.submit(LONG, SamplingParams(max_new_tokens=60, ignore_eos=True))

    def freeze(task: Task) -> None:
        if task.step >= 5 and zombie.state == "up":
            zombie.freeze()

    zombie.before_task = freeze
    world.run(lambda: zombie.state == "frozen")
    count = len(answer.token_ids)
    assert world.run(lambda: len(answer.token_ids) > count)
    assert world.epoch == 2
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
                    epoch=1,
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
    beat = Heartbeat(epoch=99, progress_age_s=0.0, tasks_waiting=0, memory_used_bytes=0, kv_bytes=0)
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


# ------------------------------------------------------------------ no capacity


def test_nobody_there_is_not_ready() -> None:
    world = World()
    answer = world.client().submit()
    world.run(lambda: answer.end is not None)
    assert answer.code == "not_ready"
    assert world.state == "waiting"


def test_too_little_memory_is_not_ready_and_says_why() -> None:
    world = World()
    world.worker("w0")
    world.run(for_s=2.0)
    assert world.state == "waiting"
    assert "are missing" in world.core.status(now=world.now).note
    answer = world.client().submit()
    world.run(lambda: answer.end is not None)
    assert answer.code == "not_ready"


def test_loss_without_spare_fails_what_runs_and_a_joiner_mends_it() -> None:
    world = World()
    survivor, victim = world.serving(2)
    client = world.client()
    answers = [client.submit(LONG), client.submit()]
    world.run(lambda: len(answers[0].token_ids) == 2)
    victim.kill()
    assert world.run(lambda: all(a.end is not None for a in answers), for_s=1.0)
    assert {a.code for a in answers} == {"worker_lost"}
    world.run(for_s=0.1)
    assert survivor.stage is None
    assert world.state == "waiting"
    world.worker("w2")
    assert world.run(lambda: world.state == "serving", for_s=2.0)
    finish(world, client.submit(LONG))


def test_answer_whose_last_token_is_known_survives_the_loss_of_all_workers() -> None:
    world = World(text_delay_s=0.05)
    workers = world.serving(2)
    answer = world.client().submit((1, 2, 3), SamplingParams(max_new_tokens=2, ignore_eos=True))
    world.run(lambda: world.core.status(now=world.now).tokens_generated == 2)
    assert answer.end is None
    for worker in workers:
        worker.kill()
    world.run(for_s=0.01)
    assert world.state == "waiting"
    world.run(lambda: answer.end is not None)
    assert isinstance(answer.end, Finished)
    answer.check()


def test_request_that_no_longer_fits_after_a_loss_fails_alone() -> None:
    world = World()
    *_, victim = world.serving(3)
    client = world.client()
    big = client.submit((1,), SamplingParams(max_new_tokens=120, ignore_eos=True))
    small = client.submit((2,), SamplingParams(max_new_tokens=30, ignore_eos=True))
    world.run(lambda: len(small.token_ids) == 3)
    victim.kill()
    finish(world, small)
    assert big.code == "not_enough_memory"
    assert big.token_ids == big.expected()[: len(big.token_ids)]


def test_min_workers_are_waited_for() -> None:
    world = World(with_settings(min_workers=3))
    for i in range(2):
        world.worker(f"w{i}")
    world.run(for_s=3.0)
    assert world.state == "waiting"
    assert "2 of 3 workers have joined" in world.core.status(now=world.now).note
    world.worker("w2")
    assert world.run(lambda: world.state == "serving", for_s=2.0)
    world.workers[0].kill()  # it counts at the start only
    finish(world, world.client().submit())


# ------------------------------------------------------------------ workers join


def test_joiner_is_used_once_nothing_runs() -> None:
    world = World(with_settings(settle_s=0.01))
    world.serving(2)
    client = world.client()
    answer = client.submit(LONG, SamplingParams(max_new_tokens=60, ignore_eos=True))
    world.run(lambda: len(answer.token_ids) == 2)
    world.worker("w2")
    world.run(lambda: len(answer.token_ids) == 30)
    world.faults.append(Fault(Task, "drop"))  # timers run
    world.run(lambda: len(answer.token_ids) == 58)
    assert world.epoch == 1
    finish(world, answer)
    assert world.run(lambda: world.epoch == 2 and world.state == "serving", for_s=2.0)
    assert len(world.plan()) == 3
    finish(world, client.submit(LONG))


def test_workers_that_settle_together_are_planned_once() -> None:
    world = World()
    for i in range(4):
        world.worker(f"w{i}")
        world.run(for_s=0.3)
    assert world.run(lambda: world.state == "serving")
    assert world.epoch == 1
    assert len(world.plan()) == 4


def test_joiner_that_changes_nothing_leaves_the_plan() -> None:
    world = World(with_settings(strategy="custom", layers={"w0": LayerRange(0, 6)}))
    world.worker("w0", 2000)
    assert world.run(lambda: world.state == "serving")
    world.worker("w1")
    world.run(for_s=3.0)
    assert world.epoch == 1


def test_same_name_twice_gets_a_number() -> None:
    world = World()
    twins = [world.worker("pc", 600), world.worker("pc", 600)]
    assert world.run(lambda: world.state == "serving")
    assert sorted(w.worker_id for w in twins) == ["pc", "pc-2"]


def test_requests_wait_while_layers_load() -> None:
    world = World()
    workers = [world.worker(f"w{i}") for i in range(2)]
    for worker in workers:
        worker.load_s = 20.0
    assert world.run(lambda: world.state == "loading")
    client = world.client()
    answer = client.submit()
    world.run(for_s=10.0)
    assert answer.end is None
    finish(world, answer)


# ------------------------------------------------------------------ admission


def test_full_queue_is_overloaded() -> None:
    world = World(with_settings(max_waiting_requests=3))
    workers = [world.worker(f"w{i}") for i in range(2)]
    workers[0].load_s = 5.0
    assert world.run(lambda: world.state == "loading")
    client = world.client()
    answers = [client.submit() for _ in range(5)]
    world.run(lambda: answers[4].end is not None, for_s=0.1)
    assert [a.code for a in answers] == ["", "", "", "overloaded", "overloaded"]
    assert answers[4].end is not None
    assert getattr(answers[4].end, "retry_after_s") >= 1.0  # noqa: B009
    finish(world, *answers[:3])


def test_requests_beyond_the_kv_cache_wait_in_order() -> None:
    world = World()
    world.serving(2)  # room for 83 positions
    client = world.client()
    params = SamplingParams(max_new_tokens=38, ignore_eos=True)
    answers = [client.submit((i,), params) for i in range(6)]
    most = 0

    def done() -> bool:
        nonlocal most
        most = max(most, world.core.status(now=world.now).requests_running)
        return world.all_ended()

    assert world.run(done)
    assert most == 2
    finish(world, *answers)


def test_too_long_requests_are_refused_with_both_numbers() -> None:
    world = World()
    world.serving(2)
    client = world.client()
    context = client.submit((1, 2), SamplingParams(max_new_tokens=CONTEXT))
    memory = client.submit((1, 2), SamplingParams(max_new_tokens=100))
    empty_range = client.submit((1,), SamplingParams(max_new_tokens=2, min_new_tokens=3))
    strange = client.submit((1, 97))
    world.run(world.all_ended)
    assert [a.code for a in (context, memory, empty_range, strange)] == [
        "context_length_exceeded",
        "not_enough_memory",
        "invalid_request",
        "invalid_request",
    ]
    finish(world, client.submit())


# ------------------------------------------------------------------ cancel, vanish


def submitted_and(
    world: World, act: Callable[[SimClient], None], *, at_token: int
) -> tuple[Answer, Answer]:
    """Return a request on which `act` was done at some token, and another one of another client."""
    client, bystander = world.client(), world.client()
    answer = client.submit(LONG)
    other = bystander.submit((4, 5))
    assert world.run(lambda: len(answer.token_ids) >= at_token)
    act(client)
    return answer, other


@pytest.mark.parametrize("at_token", range(8))
@pytest.mark.parametrize("wait_s", [0.0, 0.001, 0.003, 0.0055, 0.008, 0.012])
def test_cancel_frees_every_stage(at_token: int, wait_s: float) -> None:
    world = World()
    world.serving(3)

    def cancel(client: SimClient) -> None:
        world.run(for_s=wait_s)
        client.cancel("r0")

    answer, other = submitted_and(world, cancel, at_token=at_token)
    finish(world, other)
    if answer.code:
        assert answer.code == "cancelled"
    answer.check()
    assert not any("failed a step" in line for line in world.logs)  # freed too early


@pytest.mark.parametrize("at_token", [0, 3])
@pytest.mark.parametrize("silently", [False, True])
def test_vanished_client_frees_every_stage(at_token: int, silently: bool) -> None:
    world = World()
    world.serving(3)
    params = SamplingParams(max_new_tokens=60, ignore_eos=True)
    client, bystander = world.client(), world.client()
    answer, other = client.submit(LONG, params), bystander.submit((4, 5))
    assert world.run(lambda: world.num_arrived == 2 and len(answer.token_ids) >= at_token)
    client.vanish(silently=silently)
    finish(world, other)
    world.run(for_s=40.0)
    world.check_drained()
    assert world.core.status(now=world.now).requests_failed == (not silently)


def test_cancel_while_waiting_and_of_nothing() -> None:
    world = World()
    workers = [world.worker("w0"), world.worker("w1")]
    workers[0].load_s = 5.0
    world.run(lambda: world.state == "loading")
    client = world.client()
    answer = client.submit()
    world.run(for_s=0.5)
    client.cancel("r0")
    client.say(Cancel(request_id="unknown"))
    world.run(lambda: answer.end is not None, for_s=0.5)
    assert answer.code == "cancelled"
    finish(world)


def test_id_of_a_cancelled_request_is_used_again_at_once() -> None:
    """What is still under way for the first must not end up in the second."""
    world = World(text_delay_s=0.01)
    world.serving(2)
    client = world.client()
    first = client.submit((1, 2, 3), request_id="again")
    client.cancel("again")
    second = Answer((4, 5, 6, 7), SamplingParams(max_new_tokens=8))
    spec, frame = frame_of_token_ids(second.prompt)
    client.say(
        Generate(request_id="again", prompt="token_ids", params=second.params, tensors=(spec,)),
        (frame,),
    )
    world.run(lambda: first.end is not None)
    assert first.code == "cancelled"
    client.answers["again"] = second
    finish(world, second)


@pytest.mark.parametrize("at_token", range(1, 7))
def test_id_is_used_again_while_text_is_under_way(at_token: int) -> None:
    world = World(text_delay_s=0.004)
    world.serving(2)
    client = world.client()
    first = client.submit(LONG, request_id="again")
    world.run(lambda: len(first.token_ids) == at_token)
    client.cancel("again")
    world.run(lambda: first.end is not None)
    second = client.submit((4, 5, 6, 7), request_id="again")
    finish(world, second)


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


def test_credits_do_not_grow_by_repeated_answers() -> None:
    """A stage never has more tasks than it granted credits for, whatever is repeated or late."""
    world = World()
    first, *_ = world.serving(2)
    client = world.client()
    client.submit(LONG, SamplingParams(max_new_tokens=40, ignore_eos=True))
    world.faults.append(Fault(TaskResult, "duplicate", 20))
    world.run(world.all_ended)
    assert world.core._placement.pipeline is not None
    assert [stage.credits for stage in world.core._placement.pipeline._stages] == [2, 2]
    assert first.state == "up"


def test_duplicate_request_id_is_dropped() -> None:
    world = World()
    world.serving(2)
    client = world.client()
    world.faults.append(Fault(Generate, "duplicate"))
    finish(world, client.submit(LONG))
    assert world.rejected["duplicate_request"] == 1


def test_results_of_an_older_epoch_are_dropped() -> None:
    world = World()
    late, _, victim = world.serving(3)
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
    result = TaskResult(
        epoch=1, step=2, attempt=0, credits=1, compute_s=0.0, queued_s=0.0, tensors=()
    )
    messages: list[FromWorker] = [
        result,
        TaskFailed(epoch=1, step=2, attempt=0, credits=1, code="stage_error", message="x"),
        StageFailed(epoch=1, code="stage_error", message="x"),
        StageReady(epoch=1, credits=2, load_s=0.0, kv_tokens=99, weight_bytes=1),
        StageReady(epoch=2, credits=2, load_s=0.0, kv_tokens=99, weight_bytes=1),  # it is served already
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
        ready = StageReady(epoch=1, credits=2, load_s=0.0, kv_tokens=99, weight_bytes=1)
        world.apply(events.Received(worker.link.peer, ready))
        failed = StageFailed(epoch=1, code="stage_error", message="x")
        world.apply(events.Received(worker.link.peer, failed))
    assert world.state == "loading"
    finish(world, world.client().submit(LONG))
    assert world.epoch == 2


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
        raise Missing((MissingPositions(sequence_id=999, have=0),))

    worker.before_task = lie
    assert world.run(lambda: answer.end is not None, for_s=5.0)
    assert answer.code == "stage_error"
    assert count < 10


# ------------------------------------------------------------------ layers cannot be loaded


def test_worker_that_cannot_load_is_left_out() -> None:
    world = World()
    workers = [world.worker(f"w{i}") for i in range(3)]
    workers[1].load_error = StageError("out of memory")
    assert world.run(lambda: world.state == "serving")
    by_name = {w.name: w for w in world.core.status(now=world.now).workers}
    assert by_name["w1"].state == "unfit"
    assert by_name["w1"].note == "out of memory"
    assert [w.name for w in world.plan()] == ["w0", "w2"]
    finish(world, world.client().submit())


def test_worker_with_other_weights_leaves_and_the_rest_serve() -> None:
    world = World()
    workers = [world.worker(f"w{i}") for i in range(3)]
    workers[1].load_error = CheckpointMismatch("other weights")
    assert world.run(lambda: world.state == "serving")
    assert isinstance(workers[1].exit, CheckpointMismatch)
    finish(world, world.client().submit())


def test_nobody_can_load_is_not_ready() -> None:
    world = World()
    for i in range(2):
        world.worker(f"w{i}").load_error = StageError("out of memory")
    world.run(for_s=5.0)
    assert world.state == "waiting"
    answer = world.client().submit()
    world.run(lambda: answer.end is not None)
    assert answer.code == "not_ready"


def test_model_that_cannot_be_split_stops_the_coordinator() -> None:
    world = World()
    for i in range(2):
        world.worker(f"w{i}").load_error = UnsupportedModel("no such attention")
    world.run(lambda: world.stopped is not None, for_s=5.0)
    assert isinstance(world.stopped, UnsupportedModel)
    assert "no such attention" in str(world.stopped)


# ------------------------------------------------------------------ strangers


def test_strangers_are_told_to_connect_again() -> None:
    world = World()
    world.serving(2)
    messages: list[FromWorker | FromClient] = [
        Ping(),
        Cancel(request_id="x"),
        GetStatus(),
        Heartbeat(epoch=1, progress_age_s=0.0, tasks_waiting=0, memory_used_bytes=0, kv_bytes=0),
        StageReady(epoch=1, credits=2, load_s=0.0, kv_tokens=99, weight_bytes=0),
        TaskResult(epoch=1, step=0, attempt=0, credits=1, compute_s=0.0, queued_s=0.0, tensors=()),
        TaskFailed(epoch=1, step=0, attempt=0, credits=1, code="x", message="x"),
    ]
    for message in messages:
        actions = world.core.handle(events.Received(PeerId(b"?"), message), now=world.now)
        (send,) = [a for a in actions if isinstance(a, events.Send)]
        assert send.peer == b"?"
        assert isinstance(send.message, Refused)
        assert send.message.code == "lost"
    assert world.rejected["bad_state"] == len(messages)
    assert world.core.handle(events.Received(PeerId(b"?"), Goodbye()), now=world.now) == []
    world.core.validate()


def test_workers_may_not_ask_and_clients_may_not_work() -> None:
    world = World()
    worker, _ = world.serving(2)
    client = world.client()
    world.run(for_s=0.1)
    questions: list[tuple[PeerId, FromWorker | FromClient]] = [
        (worker.link.peer, GetStatus()),
        (client.link.peer, StageReady(epoch=1, credits=2, load_s=0.0, kv_tokens=99, weight_bytes=0)),
    ]
    for peer, message in questions:
        (send,) = world.core.handle(events.Received(peer, message), now=world.now)
        assert isinstance(send, events.Send)
        assert isinstance(send.message, Refused)
    hello = WorkerHello(name="x", capabilities=capabilities())
    assert world.core.handle(events.Received(client.link.peer, hello), now=world.now) == []


def test_garbage_is_counted_and_harms_nobody() -> None:
    world = World()
    worker, _ = world.serving(2)
    answer = world.client().submit(LONG)
    world.run(lambda: len(answer.token_ids) == 2)
    error = RemoteProtocolError("malformed", "noise")
    for peer in (worker.link.peer, PeerId(b"?")):
        actions = world.apply(events.Garbage(peer, "malformed", error))
        assert [type(a) for a in actions] == [events.Log]
    assert world.rejected["malformed"] == 2
    finish(world, answer)


def test_other_protocol_version_is_refused_by_name() -> None:
    world = World()
    error = ProtocolMismatch("version 2")
    actions = world.core.handle(events.Garbage(PeerId(b"?"), error.code, error), now=world.now)
    (send,) = [a for a in actions if isinstance(a, events.Send)]
    assert isinstance(send.message, Refused)
    assert send.message.code == "unsupported_version"
    assert world.rejected["unsupported_version"] == 1


def test_client_is_welcomed_and_answered() -> None:
    world = World()
    client = world.client()
    client.say(GetStatus())
    world.run(for_s=1.0)
    assert [type(m) for m in client.others] == [ClientWelcome, Pong, StatusReport]


def test_silent_client_is_forgotten_and_told_so_when_it_speaks() -> None:
    world = World()
    client = world.client()
    world.run(for_s=1.0)
    peer = client.link.peer
    client.vanish(silently=True)
    world.run(for_s=31.0)
    (send,) = world.core.handle(events.Received(peer, Ping()), now=world.now)
    assert isinstance(send, events.Send)
    assert isinstance(send.message, Refused)
    assert send.message.code == "lost"


def test_a_prompt_that_no_context_can_hold_is_not_even_tokenized() -> None:
    world = World()
    world.serving(3)
    client = world.client()
    world.run(for_s=1.0)
    spec, frame = frame_of_token_ids([1] * 20_000)
    ask = Generate(request_id="big", prompt="token_ids", params=SamplingParams(), tensors=(spec,))
    actions = world.apply(events.Received(client.link.peer, ask, (frame,)))
    (refusal,) = [a.message for a in actions if isinstance(a, events.Send)]
    assert isinstance(refusal, RequestFailed)
    assert refusal.code == "context_length_exceeded"
    assert not any(isinstance(a, events.Tokenize) for a in actions)
