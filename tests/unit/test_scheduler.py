"""Admission and steps: what is computed next, and for whom."""

from collections.abc import Iterator

import pytest

from distributed_llm.common import codec
from distributed_llm.common.messages import Task
from distributed_llm.common.sampling_params import MAX_SEED, Sampling, SamplingParams
from distributed_llm.common.tensors import frame_of_token_ids
from distributed_llm.common.types import PeerId
from distributed_llm.coordinator.requests import Limits, Phase, Request
from distributed_llm.coordinator.scheduler import MAX_SLICES, Scheduler, Step

Parts = list[tuple[int, int, int, bool]]


class Desk:
    """A scheduler and a way to fill it."""

    def __init__(self, *, sequences: int = 8, tokens: int = 100, kv_tokens: int = 1000) -> None:
        self.scheduler = Scheduler(max_sequences=sequences, max_tokens=tokens)
        self.scheduler.set_capacity(kv_tokens)
        self.requests: list[Request] = []

    def add(self, prompt: int, answer: int = 10) -> Request:
        """Queue a request with a prompt of this many tokens, and so many in its answer."""
        number = len(self.requests)
        key = (PeerId(b"client"), f"r{number}", number)
        request = Request(key, number, SamplingParams(), arrived_at=0.0)
        request.accept(
            range(100 * number, 100 * number + prompt), Limits(Sampling(), answer, 0, ())
        )
        self.requests.append(request)
        self.scheduler.add(request)
        return request

    def step(self, now: float = 1.0) -> Step:
        step = self.scheduler.next_step(now=now)
        assert step is not None
        return step

    def run(self, steps: int = 1) -> None:
        """Run steps through all stages; every token is 7."""
        for _ in range(steps):
            step = self.step()
            self.scheduler.complete(step)
            for request in step.sampling:
                request.append(7, now=1.0)
            self.scheduler.validate()


def parts(step: Step | None) -> Parts:
    """Return (request, start, tokens, whether it samples) of each slice."""
    assert step is not None
    return [(p.sequence_id, p.start, p.num_tokens, p.sampling is not None) for p in step.slices]


@pytest.fixture
def desk() -> Iterator[Desk]:
    made = Desk()
    yield made
    made.scheduler.validate()


def test_nothing_to_do(desk: Desk) -> None:
    assert desk.scheduler.next_step(now=1.0) is None


def test_whole_prompt_then_a_token_at_a_time(desk: Desk) -> None:
    request = desk.add(4)
    step = desk.step()
    assert parts(step) == [(0, 0, 4, True)]
    assert step.token_ids == (0, 1, 2, 3)
    assert step.sampling == (request,)
    desk.scheduler.complete(step)
    request.append(50, now=1.0)
    step = desk.step()
    assert parts(step) == [(0, 4, 1, True)]
    assert step.token_ids == (50,)


def test_no_second_step_while_one_is_in_flight(desk: Desk) -> None:
    desk.add(4)
    step = desk.step()
    assert desk.scheduler.next_step(now=1.0) is None
    desk.scheduler.complete(step)
    desk.requests[0].append(1, now=1.0)
    assert desk.scheduler.next_step(now=1.0) is not None


def test_newcomer_does_not_wait_for_the_step_of_others(desk: Desk) -> None:
    desk.add(4)
    desk.step()
    desk.add(3)
    assert parts(desk.step()) == [(1, 0, 3, True)]


def test_prompt_goes_in_chunks_and_only_the_last_samples() -> None:
    desk = Desk(tokens=8)
    request = desk.add(20)
    seen: Parts = []
    for _ in range(3):
        step = desk.step()
        seen += parts(step)
        assert step.sampling == ((request,) if len(seen) == 3 else ())
        desk.scheduler.complete(step)
    assert seen == [(0, 0, 8, False), (0, 8, 8, False), (0, 16, 4, True)]


def test_answers_go_before_prompts_and_share_the_budget() -> None:
    desk = Desk(tokens=8)
    desk.add(5)
    desk.add(3)
    desk.run()
    desk.add(20)
    desk.add(2)
    step = desk.step()
    assert parts(step) == [(0, 5, 1, True), (1, 3, 1, True), (2, 0, 6, False)]
    desk.scheduler.complete(step)
    for request in step.sampling:
        request.append(7, now=1.0)
    assert parts(desk.step()) == [(0, 6, 1, True), (1, 4, 1, True), (2, 6, 6, False)]


def test_long_prompt_does_not_stop_those_behind_it_from_answering() -> None:
    desk = Desk(tokens=8)
    desk.add(2)
    desk.add(400)
    before = desk.requests[0].num_new_tokens
    desk.run(5)
    assert desk.requests[0].num_new_tokens == before + 5


def test_budget_is_never_exceeded() -> None:
    desk = Desk(tokens=3)
    for size in (1, 2, 5, 1, 9):
        desk.add(size, answer=3)
    for _ in range(30):
        step = desk.scheduler.next_step(now=1.0)
        if step is None:
            break
        assert 0 < len(step.token_ids) == sum(p.num_tokens for p in step.slices) <= 3
        desk.scheduler.complete(step)
        for request in step.sampling:
            request.append(7, now=1.0)
            if request.finish_reason:
                assert desk.scheduler.remove(request)
    assert all(r.num_new_tokens == 3 for r in desk.requests)


# ------------------------------------------------------------------ admission


def test_admission_by_what_prompt_and_longest_answer_may_take() -> None:
    desk = Desk(kv_tokens=50)
    first, second, third = desk.add(10, 10), desk.add(10, 20), desk.add(1, 1)
    assert [p[0] for p in parts(desk.step())] == [0, 1]
    assert [r.phase for r in (first, second, third)] == [
        Phase.RUNNING,
        Phase.RUNNING,
        Phase.WAITING,
    ]
    desk.scheduler.validate()


def test_who_came_first_is_not_overtaken() -> None:
    desk = Desk(kv_tokens=30)
    desk.add(10, 10)
    desk.add(10, 10)
    desk.add(1, 1)  # would fit beside the first
    assert [p[0] for p in parts(desk.step())] == [0]
    assert desk.scheduler.remove(desk.requests[0])
    assert sorted(p[0] for p in parts(desk.step())) == [1, 2]


def test_no_more_sequences_than_allowed() -> None:
    desk = Desk(sequences=2)
    for _ in range(3):
        desk.add(1)
    assert len(desk.step().slices) == 2
    assert len(desk.scheduler.waiting) == 1


def test_start_is_noted_once() -> None:
    desk = Desk()
    request = desk.add(3)
    desk.step(now=5.0)
    desk.scheduler.set_capacity(1000)
    desk.step(now=9.0)
    assert request.started_at == 5.0


def test_task_of_the_most_and_longest_slices_fits_a_message() -> None:
    desk = Desk(sequences=10**6, tokens=10**6, kv_tokens=2**60)
    far = 2**52
    longest = Sampling(1.5, 2**31 - 1, 0.9, 0.1, 1.1, MAX_SEED, tuple(range(2**31 - 17, 2**31 - 1)))
    for _ in range(MAX_SLICES + 5):
        request = desk.add(1)
        request.limits = Limits(longest, 10, 0, ())
        request.sequence_id += far
    step = desk.step()
    assert len(step.slices) == MAX_SLICES
    spec, frame = frame_of_token_ids(step.token_ids)
    task = Task(epoch=far, step=far, attempt=1, sequences=step.slices, tensors=(spec, spec))
    assert codec.to_worker.decode(codec.encode(task, (frame, frame)))[0] == task


# ------------------------------------------------------------------ removal


def test_remove_tells_whether_there_is_kv_cache() -> None:
    desk = Desk(sequences=1)
    running, waiting, other = desk.add(1), desk.add(1), desk.add(1)
    desk.step()
    assert desk.scheduler.remove(running)
    assert not desk.scheduler.remove(running)
    assert not desk.scheduler.remove(waiting)
    assert desk.scheduler.waiting == [other]


# ------------------------------------------------------------------ failures


def test_complete_moves_on_and_abandon_does_not(desk: Desk) -> None:
    request = desk.add(4)
    step = desk.step()
    desk.scheduler.abandon(step)
    assert request.num_computed_tokens == 0
    again = desk.step()
    assert parts(again) == parts(step)
    desk.scheduler.complete(again)
    assert request.num_computed_tokens == 4
    request.append(7, now=1.0)


def test_suspects_run_alone_one_after_the_other() -> None:
    desk = Desk(tokens=8)
    good, bad, worse = desk.add(2), desk.add(12), desk.add(3)
    desk.scheduler.abandon(desk.step())
    bad.alone = worse.alone = True
    seen = []
    for _ in range(4):
        step = desk.step()
        seen.append([p[:3] for p in parts(step)])
        desk.scheduler.complete(step)
        for request in step.sampling:
            request.append(7, now=1.0)
    assert seen == [[(1, 0, 8)], [(1, 8, 4)], [(2, 0, 3)], [(1, 12, 1), (2, 3, 1), (0, 0, 2)]]
    assert not bad.alone
    assert not worse.alone
    assert good.num_new_tokens == 1


def test_suspicion_ends_with_a_token_and_not_before() -> None:
    """What breaks stages may be in a later part of the prompt."""
    desk = Desk(tokens=8)
    request = desk.add(12)
    request.alone, request.losses, request.failures = True, 2, 1
    desk.scheduler.complete(desk.step())
    assert (request.alone, request.losses, request.failures) == (True, 2, 1)
    desk.run()
    assert (request.alone, request.losses, request.failures) == (False, 0, 0)


def test_new_plan_starts_everyone_again_in_order_of_arrival() -> None:
    desk = Desk(sequences=2, tokens=8)
    for size in (3, 12, 2, 1):
        desk.add(size, 5)
    desk.run(3)
    answered = [list(r.token_ids) for r in desk.requests]
    desk.step()
    desk.scheduler.set_capacity(17)
    desk.scheduler.validate()
    assert [r.sequence_id for r in desk.scheduler.waiting] == [0, 1, 2, 3]
    assert not desk.scheduler.running
    for request in desk.requests:
        assert request.phase is Phase.WAITING
        assert (request.num_computed_tokens, request.in_flight) == (0, False)
    assert [r.token_ids for r in desk.requests] == answered
    step = desk.step()
    assert parts(step) == [(0, 0, len(answered[0]), True)]  # the second would need 17 more
    assert step.token_ids == tuple(answered[0])
