"""The core in a simulated cluster: how well its stages are used, measured on the virtual clock."""

from collections.abc import Sequence
from itertools import pairwise

import pytest

from distributed_llm.common.sampling_params import SamplingParams
from distributed_llm.common.settings import CoordinatorSettings
from distributed_llm.common.tensors import Frame, TensorSpec
from tests.unit.fake_client import Answer
from tests.unit.fake_worker import SimWorker
from tests.unit.simulation import LONG, World, finish, with_settings

ROOMY = 20_000
"""Memory with which a few workers have room for more than any test needs."""


def tokens(count: int) -> SamplingParams:
    """Return the parameters of an answer of so many tokens."""
    return SamplingParams(max_new_tokens=count, ignore_eos=True)


def cluster(
    stages: int,
    *,
    task_s: float = 0.0,
    token_s: float = 0.0,
    max_batch_tokens: int = 64,
) -> tuple[World, list[SimWorker]]:
    """Return linked workers whose stages take so long, on a quick network."""
    settings: CoordinatorSettings = with_settings(max_batch_tokens=max_batch_tokens)
    world = World(settings, delay_s=(0.0001, 0.0002), text_delay_s=0.0)
    workers = world.linked(stages, ROOMY)
    for worker in workers:
        worker.task_s, worker.token_s = task_s, token_s
    return world, workers


def gaps(answer: Answer) -> list[float]:
    """Return the seconds between its tokens."""
    return [after - before for before, after in pairwise(answer.token_times)]


def steady(world: World, answers: Sequence[Answer], workers: Sequence[SimWorker]) -> list[float]:
    """Run, and return tokens per second and each worker's busy share, once it has settled."""
    world.run(lambda: min(len(a.token_ids) for a in answers) >= 30)
    busy, began = [w.busy_s for w in workers], world.now
    count = sum(len(a.token_ids) for a in answers)
    world.run(lambda: max(len(a.token_ids) for a in answers) >= 65)
    took_s = world.now - began
    made = sum(len(a.token_ids) for a in answers) - count
    return [made / took_s, *((w.busy_s - b) / took_s for w, b in zip(workers, busy, strict=True))]


@pytest.mark.parametrize("stages", [2, 3, 6])
@pytest.mark.parametrize(("task_s", "token_s"), [(0.0, 0.002), (0.005, 0.001)])
def test_many_requests_keep_every_stage_busy(stages: int, task_s: float, token_s: float) -> None:
    world, workers = cluster(stages, task_s=task_s, token_s=token_s)
    client = world.client()
    answers = [client.submit((i,), tokens(70)) for i in range(18)]
    _, *shares = steady(world, answers, workers)
    assert min(shares) > 0.9, shares
    finish(world, *answers)


@pytest.mark.parametrize("stages", [2, 3, 6])
def test_stages_that_only_wait_give_what_they_can(stages: int) -> None:
    """Every task takes 20 ms, whatever is in it: each round trip gives every request a token."""
    world, workers = cluster(stages, task_s=0.02)
    client = world.client()
    answers = [client.submit((i,), tokens(70)) for i in range(16)]
    rate, *_ = steady(world, answers, workers)
    assert rate > 0.9 * 16 / (stages * 0.02)
    finish(world, *answers)


@pytest.mark.parametrize("slow", [0, 1, 2])
def test_slowest_stage_is_always_busy(slow: int) -> None:
    world, workers = cluster(3, token_s=0.001)
    workers[slow].token_s = 0.003
    client = world.client()
    answers = [client.submit((i,), tokens(70)) for i in range(18)]
    _, *shares = steady(world, answers, workers)
    assert shares[slow] > 0.9
    finish(world, *answers)


@pytest.mark.parametrize("stages", [1, 2, 3, 6])
def test_token_of_a_single_request_takes_the_sum_of_the_stages(stages: int) -> None:
    world, _ = cluster(stages, task_s=0.02)
    answer = world.client().submit((1,), tokens(30))
    finish(world, answer)
    sum_s, hops = stages * 0.02, stages + 3
    assert sum_s <= min(gaps(answer)) <= max(gaps(answer)) < sum_s + hops * 0.0002


def test_chunks_of_a_prompt_follow_each_other_through_the_stages() -> None:
    world, _ = cluster(3, token_s=0.01, max_batch_tokens=8)
    client = world.client()
    chunk_s = 8 * 0.01
    for text, trials in enumerate([8, 0, 0]):  # the first one tries whether one at a time is better
        began = world.now
        answer = client.submit([(7 * i + text) % 90 for i in range(96)], tokens(1))
        world.run(lambda answer=answer: answer.end is not None)  # type: ignore[misc]
        assert answer.ended_at - began < (12 + 2 + trials) * chunk_s * 1.05  # not 36
        finish(world, answer)


def test_running_requests_keep_getting_tokens_while_a_long_prompt_is_prefilled() -> None:
    world, _ = cluster(3, token_s=0.005, max_batch_tokens=16)
    client, other = world.client(), world.client()
    running = [client.submit((i,), tokens(70)) for i in range(4)]
    world.run(lambda: min(len(a.token_ids) for a in running) >= 20)
    began = world.now
    long = other.submit([(7 * i) % 90 for i in range(240)], tokens(4))
    world.run(lambda: bool(long.token_ids))
    chunk_s = 3 * 16 * 0.005  # through all stages
    assert long.token_times[0] - began > 5 * chunk_s
    for answer in running:
        during = [t for t in answer.token_times if t >= began]
        worst = max(b - a for a, b in zip([began, *during], during, strict=False))
        assert worst <= 2 * chunk_s
        assert len(during) >= (long.token_times[0] - began) / (2 * chunk_s)
    finish(world, *running, long)


def test_long_prompt_gets_on_while_many_answer() -> None:
    world, _ = cluster(3, token_s=0.001, max_batch_tokens=16)
    client, other = world.client(), world.client()
    running = [client.submit((i,), tokens(200)) for i in range(10)]
    world.run(lambda: min(len(a.token_ids) for a in running) >= 10)
    long = other.submit([(7 * i) % 90 for i in range(160)], tokens(4))
    world.run(lambda: bool(long.token_ids))
    assert max(len(a.token_ids) for a in running) < 100
    finish(world, *running, long)


def test_steps_and_latency_do_not_grow_with_the_waiting_queue() -> None:
    """Those that run are no slower because others wait."""
    worst = []
    for waiting in (0, 100):
        settings = with_settings(max_batch_sequences=4, max_waiting_requests=200)
        world = World(settings, delay_s=(0.0001, 0.0002), text_delay_s=0.0)
        for worker in world.linked(3, ROOMY):
            worker.task_s = 0.005
        client = world.client()
        running = [client.submit((i,), tokens(40)) for i in range(4)]
        others = [client.submit((50,), tokens(2)) for _ in range(waiting)]
        world.run(lambda running=running: all(a.end for a in running))  # type: ignore[misc]
        worst.append(max(max(gaps(answer)) for answer in running))
        finish(world, *running, *others)
    assert worst[1] < 1.2 * worst[0]


# ------------------------------------------------------------------ what the last stage answers


def test_each_gets_the_log_probabilities_that_it_asked_for() -> None:
    world = World()
    world.linked(3)
    client = world.client()
    answers = [
        client.submit((i,), SamplingParams(max_new_tokens=6, logprobs=number))
        for i, number in enumerate([None, 0, 2, 5])
    ]
    finish(world, *answers)
    for answer, number in zip(answers, [None, 0, 2, 5], strict=True):
        found = {len(one.top) for one in answer.logprobs}
        assert found == (set() if number is None else {number})


Answered = tuple[tuple[TensorSpec, ...], tuple[Frame, ...]]


def without(specs: Sequence[TensorSpec], frames: Sequence[Frame]) -> Answered:
    """Leave the log-probabilities out."""
    return tuple(specs[:1]), tuple(frames[:1])


def narrow(specs: Sequence[TensorSpec], frames: Sequence[Frame]) -> Answered:
    """Report one likely token too few."""
    count, width = specs[1].shape
    cut = [bytes(frames[i])[: 4 * count * (width - 1)] for i in (1, 2)]
    shape = (count, width - 1)
    return (specs[0], TensorSpec("float32", shape), TensorSpec("int32", shape)), (frames[0], *cut)


def swapped(specs: Sequence[TensorSpec], frames: Sequence[Frame]) -> Answered:
    """Report ids before values."""
    return (specs[0], specs[2], specs[1]), (frames[0], frames[2], frames[1])


def positive(specs: Sequence[TensorSpec], frames: Sequence[Frame]) -> Answered:
    """Report a probability above one."""
    wrong = b"\x00\x00\x00\x3f" + bytes(frames[1])[4:]
    return tuple(specs), (frames[0], wrong, frames[2])


def not_a_number(specs: Sequence[TensorSpec], frames: Sequence[Frame]) -> Answered:
    """Report what is no number."""
    wrong = b"\x00\x00\xc0\x7f" + bytes(frames[1])[4:]
    return tuple(specs), (frames[0], wrong, frames[2])


def unknown_token(specs: Sequence[TensorSpec], frames: Sequence[Frame]) -> Answered:
    """Report a likely token that the vocabulary does not have."""
    wrong = bytes(frames[2])[:-4] + b"\xff\x00\x00\x00"
    return tuple(specs), (frames[0], frames[1], wrong)


@pytest.mark.parametrize("spoil", [without, narrow, swapped, positive, not_a_number, unknown_token])
@pytest.mark.parametrize("times", [1, 9])
def test_wrong_log_probabilities_break_the_step(spoil: object, times: int) -> None:
    assert callable(spoil)
    world = World()
    last = world.linked(3)[2]
    answer = world.client().submit(LONG, SamplingParams(max_new_tokens=9, logprobs=2))
    world.run(lambda: len(answer.token_ids) == 3)
    last.spoil(times, spoil)
    assert world.run(world.all_ended)
    answer.check()
    assert [line for line in world.logs if "shape_mismatch" in line]
    assert answer.code == ("" if times == 1 else "stage_error")


def test_log_probabilities_that_nobody_asked_for_break_the_step() -> None:
    world = World()
    last = world.linked(3)[2]
    answer = world.client().submit(LONG)
    world.run(lambda: len(answer.token_ids) == 3)
    shape = (1, 1)
    more = (TensorSpec("float32", shape), TensorSpec("int32", shape))
    last.spoil(1, lambda specs, frames: ((*specs, *more), (*frames, b"\0" * 4, b"\0" * 4)))
    finish(world, answer)
    assert [line for line in world.logs if "shape_mismatch" in line]
