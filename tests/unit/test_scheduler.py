"""What is computed next and for whom: steps, admission, sharing, preemption, failures."""

from collections.abc import Iterator, Sequence

import pytest

from distributed_llm.common import codec
from distributed_llm.common.messages import (
    MAX_RELEASED,
    MAX_SLICES,
    MAX_STAGES,
    SharedPrefix,
    StageTime,
    Task,
)
from distributed_llm.common.sampling_params import (
    MAX_LOGIT_BIASES,
    MAX_SEED,
    Sampling,
    SamplingParams,
)
from distributed_llm.common.tensors import frame_of_token_ids
from distributed_llm.common.types import KV_BLOCK, PeerId
from distributed_llm.coordinator.requests.lifecycle import RequestState
from distributed_llm.coordinator.requests.parameters import Limits
from distributed_llm.coordinator.requests.request import Request, Ticket
from distributed_llm.coordinator.serving.scheduler import Scheduler, Step

ANSWER = 7
"""Every token of every answer."""

Parts = list[tuple[int, int, int, bool]]


class Desk:
    """A scheduler and a way to fill it."""

    def __init__(
        self, *, sequences: int = 1000, tokens: int = 100, blocks: int = 100, first_id: int = 1
    ) -> None:
        self._next_id = first_id
        self._number = 0
        self.changes = 0
        self.scheduler = Scheduler(
            max_sequences=sequences,
            max_tokens=tokens,
            kv_tokens=blocks * KV_BLOCK,
            new_sequence_id=self._new_sequence_id,
            on_change=self._on_change,
        )

    def _new_sequence_id(self) -> int:
        self._next_id += 1
        return self._next_id - 1

    def _on_change(self) -> None:
        self.changes += 1

    def request(
        self,
        prompt: int | Sequence[int],
        *,
        answer: int = 10,
        client: bytes = b"a",
        sampling: Sampling | None = None,
    ) -> Request:
        """Make a request; a prompt that is a number of tokens begins like no other."""
        number, self._number = self._number, self._number + 1
        ticket = Ticket((PeerId(client), f"r{number}", number), SamplingParams(), arrived_at=0.0)
        if isinstance(prompt, int):
            prompt = range(10_000 * (number + 1), 10_000 * (number + 1) + prompt)
        limits = Limits((sampling or Sampling(seed=number),), answer, ())
        ticket.accept(prompt, limits, number=number)
        return ticket.requests[0]

    def admit(self, request: Request, *, now: float = 1.0) -> bool:
        return self.scheduler.admit(request, now=now)

    def add(
        self,
        prompt: int | Sequence[int],
        *,
        answer: int = 10,
        client: bytes = b"a",
        sampling: Sampling | None = None,
    ) -> Request:
        """Let a new request run."""
        request = self.request(prompt, answer=answer, client=client, sampling=sampling)
        assert self.admit(request)
        return request

    def poll(
        self, *, max_decodes: int = 1000, prompts: bool = True, idle: bool = False
    ) -> Step | None:
        step = self.scheduler.next_step(max_decodes=max_decodes, prompts=prompts, idle=idle)
        self.scheduler.validate()
        return step

    def step(self, *, max_decodes: int = 1000, prompts: bool = True, idle: bool = False) -> Step:
        step = self.poll(max_decodes=max_decodes, prompts=prompts, idle=idle)
        assert step is not None
        return step

    def land(self, step: Step) -> list[bool]:
        """The step ran through all stages."""
        counts = self.scheduler.complete(step)
        samplers = [r for r, p in zip(step.requests, step.slices, strict=True) if p.sample]
        for request, current in zip(samplers, counts, strict=True):
            if current:
                request.append(ANSWER, None, now=1.0)
        self.scheduler.validate()
        return counts

    def run(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.land(self.step(idle=True))

    def keep(self, prompt: int | Sequence[int]) -> Request:
        """Compute a prompt and one token, and keep it as a prefix for others."""
        request = self.add(prompt)
        while not request.num_new_tokens:
            self.run()
        self.scheduler.remove(request, keep=True)
        self.scheduler.validate()
        self.scheduler.take_prefix_hit_tokens()
        return request


def parts(step: Step) -> Parts:
    """Return (request's number, start, tokens, whether it samples) of each slice."""
    return [
        (request.number, part.start, part.num_tokens, part.sample)
        for request, part in zip(step.requests, step.slices, strict=True)
    ]


def prefixes(step: Step) -> list[SharedPrefix | None]:
    return [part.prefix for part in step.slices]


def id_of(request: Request) -> int:
    assert request.sequence_id is not None
    return request.sequence_id


@pytest.fixture
def book() -> Iterator[Desk]:
    made = Desk()
    yield made
    made.scheduler.validate()


# ------------------------------------------------------------------ steps


def test_nothing_to_do(book: Desk) -> None:
    assert book.poll(idle=True) is None


def test_whole_prompt_then_a_token_at_a_time(book: Desk) -> None:
    request = book.add([5, 6, 7, 8])
    step = book.step()
    assert parts(step) == [(0, 0, 4, True)]
    assert step.token_ids == (5, 6, 7, 8)
    assert step.requests == (request,)
    assert step.slices[0].sequence_id == id_of(request)
    assert (step.num_samples, step.decodes) == (1, False)
    book.land(step)
    step = book.step()
    assert parts(step) == [(0, 4, 1, True)]
    assert step.token_ids == (ANSWER,)
    assert (step.num_samples, step.decodes) == (1, True)


def test_answering_sequence_is_in_one_step_at_a_time(book: Desk) -> None:
    book.add(4)
    step = book.step()
    assert book.poll() is None
    book.land(step)
    step = book.step()
    assert book.poll() is None
    book.land(step)
    assert parts(book.step()) == [(0, 5, 1, True)]


def test_newcomer_does_not_wait_for_steps_of_others(book: Desk) -> None:
    book.add(4)
    book.step()
    book.add(3)
    assert parts(book.step()) == [(1, 0, 3, True)]


def test_chunks_of_a_prompt_follow_each_other_and_only_the_last_samples() -> None:
    book = Desk(tokens=8)
    request = book.add(20)
    steps = [book.step() for _ in range(3)]
    assert [parts(step) for step in steps] == [
        [(0, 0, 8, False)],
        [(0, 8, 8, False)],
        [(0, 16, 4, True)],
    ]
    assert [token for step in steps for token in step.token_ids] == request.token_ids
    assert book.poll() is None
    for step, computed, counts in zip(steps, (8, 16, 20), ([], [], [True]), strict=True):
        assert book.land(step) == counts
        assert request.num_computed_tokens == computed


def test_answers_go_before_prompts_within_the_token_budget() -> None:
    book = Desk(tokens=8)
    book.add(3)
    book.add(20)
    book.add(2)
    first = book.step()
    assert parts(first) == [(0, 0, 3, True), (1, 0, 5, False)]
    book.land(first)
    step = book.step()
    assert parts(step) == [(0, 3, 1, True), (1, 5, 7, False)]
    book.land(step)
    assert parts(book.step()) == [(0, 4, 1, True), (1, 12, 7, False)]


def test_long_prompt_stops_no_answer() -> None:
    book = Desk(tokens=8)
    talker = book.add(2)
    book.add(400)
    book.run(5)
    assert talker.num_new_tokens == 5


def test_answers_spread_over_the_steps_in_flight(book: Desk) -> None:
    for _ in range(6):
        book.add(2)
    book.run()
    steps = [book.step(max_decodes=2) for _ in range(3)]
    assert [[p[0] for p in parts(step)] for step in steps] == [[0, 1], [2, 3], [4, 5]]
    assert book.poll(max_decodes=2) is None
    book.land(steps[0])
    assert [p[0] for p in parts(book.step(max_decodes=2))] == [0, 1]


def test_step_without_chunks_of_prompts() -> None:
    book = Desk(tokens=8)
    book.add(2)
    book.run()
    book.add(20)
    assert parts(book.step(prompts=False)) == [(0, 2, 1, True)]
    assert book.poll(prompts=False) is None
    assert parts(book.step(prompts=True)) == [(1, 0, 8, False)]


def test_answers_keep_to_the_token_budget() -> None:
    book = Desk(tokens=3)
    for _ in range(5):
        book.add(1)
    book.run(2)
    steps = [book.step(), book.step()]
    assert [len(step.token_ids) for step in steps] == [3, 2]
    assert book.poll() is None


def test_no_more_slices_than_a_task_may_have() -> None:
    count = MAX_SLICES + 9
    book = Desk(sequences=count, tokens=10_000, blocks=count)
    for _ in range(count):
        book.add(2)
    while book.scheduler.num_decoding < count:
        step = book.scheduler.next_step(max_decodes=0, prompts=True, idle=True)
        assert step is not None
        book.land(step)
    assert len(book.step(max_decodes=count).slices) == MAX_SLICES
    assert len(book.step(max_decodes=count).slices) == 9


# ------------------------------------------------------------------ clients


def test_prompts_of_clients_share_the_budget() -> None:
    book = Desk(tokens=65)
    book.add(100, client=b"a")
    book.add(100, client=b"a")
    book.add(100, client=b"b")
    book.add(5, client=b"c")
    # What c leaves is for a and b; within a, the oldest is first.
    assert sorted(parts(book.step())) == [(0, 0, 30, False), (2, 0, 30, False), (3, 0, 5, True)]


def test_younger_prompt_of_a_client_gets_what_the_oldest_leaves() -> None:
    book = Desk(tokens=60)
    book.add(10, client=b"a")
    book.add(100, client=b"a")
    book.add(100, client=b"b")
    assert sorted(parts(book.step())) == [(0, 0, 10, True), (1, 0, 20, False), (2, 0, 30, False)]


def test_one_client_alone_has_all_of_the_budget() -> None:
    book = Desk(tokens=60)
    book.add(100)
    book.add(100)
    assert parts(book.step()) == [(0, 0, 60, False)]
    assert parts(book.step()) == [(0, 60, 40, True), (1, 0, 20, False)]


def test_many_clients_and_few_tokens() -> None:
    book = Desk(tokens=3)
    for number in range(5):
        book.add(10, client=b"c%d" % number)
    step = book.step()
    assert len(step.token_ids) == 3
    assert [part.num_tokens for part in step.slices] == [1, 1, 1]


# ------------------------------------------------------------------ admission


def test_no_more_sequences_than_allowed() -> None:
    book = Desk(sequences=2)
    first, second = book.add(1), book.add(1)
    third = book.request(1)
    assert not book.scheduler.has_seat
    assert not book.admit(third)
    assert third.state is RequestState.WAITING
    book.scheduler.remove(first)
    assert book.scheduler.has_seat
    assert book.admit(third)
    assert third.state is RequestState.RUNNING
    assert list(book.scheduler.running) == [second, third]


def test_prompt_that_finds_no_room_waits() -> None:
    book = Desk(blocks=3)
    first = book.add(2 * KV_BLOCK - 1)
    second = book.request(KV_BLOCK)  # and its first token: two blocks
    assert not book.admit(second)
    assert (second.state, second.sequence_id) == (RequestState.WAITING, None)
    assert book.admit(book.request(KV_BLOCK - 1))
    book.scheduler.remove(first)
    assert book.admit(second)
    book.scheduler.validate()


@pytest.mark.parametrize(("answer", "fits"), [(64, True), (65, False)])
def test_request_too_long_for_this_pipeline_is_not_admitted(answer: int, fits: bool) -> None:
    book = Desk(blocks=2)
    request = book.request(KV_BLOCK, answer=answer)
    assert book.admit(request) is fits
    assert book.scheduler.num_running == fits


def test_start_is_noted_once() -> None:
    book = Desk()
    request = book.request(3)
    assert book.admit(request, now=5.0)
    book.scheduler.evacuate()
    assert book.admit(request, now=9.0)
    assert request.started_at == 5.0


def test_counts_of_what_runs() -> None:
    book = Desk(tokens=80)
    book.add(70)
    book.add(70)
    book.run()
    assert (book.scheduler.num_running, book.scheduler.num_decoding) == (2, 1)
    assert book.scheduler.kv_tokens_used == 4 * KV_BLOCK
    book.run()
    assert book.scheduler.num_decoding == 2


def test_changes_are_told(book: Desk) -> None:
    request = book.add(3)
    assert book.changes == 1
    step = book.step()
    assert book.changes == 1
    book.land(step)
    assert book.changes == 2
    book.scheduler.abandon(book.step())
    assert book.changes == 3
    book.scheduler.remove(request)
    assert book.changes == 4
    book.scheduler.remove(request)
    assert book.changes == 4


# ------------------------------------------------------------------ what is sent once


def test_sampling_is_sent_with_the_first_slice_that_samples_and_not_again() -> None:
    book = Desk(tokens=8)
    request = book.add(12)
    sent = []
    for _ in range(4):
        step = book.step()
        sent += [part.sampling for part in step.slices]
        book.land(step)
    assert sent == [None, request.sampling, None, None]


def test_sampling_is_sent_again_after_steps_were_abandoned(book: Desk) -> None:
    request = book.add(4)
    step = book.step()
    book.scheduler.abandon(step)
    again = book.step()
    assert again == step
    assert again.slices[0].sampling == request.sampling
    book.land(again)
    book.scheduler.abandon(book.step())
    assert book.step().slices[0].sampling == request.sampling


def test_sampling_is_sent_again_after_a_restart(book: Desk) -> None:
    request = book.add(4)
    book.run(2)
    book.scheduler.restart(request)
    step = book.step()
    assert parts(step) == [(0, 0, 6, True)]
    assert step.slices[0].sampling == request.sampling


def test_prefix_is_sent_until_its_first_slice_is_confirmed() -> None:
    book = Desk(tokens=20)
    book.keep(list(range(100)))
    request = book.add([*range(90), *[1] * 50])
    shared = SharedPrefix(sequence_id=1, length=90)
    steps = [book.step(), book.step()]
    assert [parts(s) for s in steps] == [[(1, 90, 20, False)], [(1, 110, 20, False)]]
    assert [prefixes(s) for s in steps] == [[shared], [None]]
    for step in steps:
        book.scheduler.abandon(step)
    book.scheduler.validate()
    steps = [book.step(), book.step()]
    assert [prefixes(s) for s in steps] == [[shared], [None]]
    book.land(steps[0])
    book.scheduler.abandon(steps[1])
    step = book.step()
    assert parts(step) == [(1, 110, 20, False)]
    assert prefixes(step) == [None]
    assert request.num_computed_tokens == 110


# ------------------------------------------------------------------ prefixes


def test_what_a_request_kept_is_found_by_the_next(book: Desk) -> None:
    old = book.keep(50)
    assert book.scheduler.kv_tokens_used == 0
    assert book.scheduler.kv_tokens_cached == KV_BLOCK
    request = book.request([*old.token_ids, 1, 2])
    assert book.scheduler.hit_length(request) == 50  # the answer's token was not computed
    assert book.admit(request)
    assert (request.num_computed_tokens, request.num_cached_tokens) == (50, 50)
    assert book.scheduler.take_prefix_hit_tokens() == 50
    step = book.step()
    assert parts(step) == [(1, 50, 3, True)]
    assert prefixes(step) == [SharedPrefix(sequence_id=1, length=50, take=True)]
    assert step.token_ids == (ANSWER, 1, 2)
    book.land(step)
    assert book.scheduler.take_freed() == []  # it was taken


def test_last_token_of_a_prompt_is_always_computed(book: Desk) -> None:
    book.keep(range(50))
    book.add(range(50))
    assert parts(book.step()) == [(1, 49, 1, True)]


def test_what_is_not_kept_is_not_found(book: Desk) -> None:
    old = book.add(50)
    book.run()
    book.scheduler.remove(old, keep=False)
    assert book.scheduler.take_freed() == [1]
    assert book.scheduler.take_freed() == []
    assert book.scheduler.hit_length(book.request(range(50))) == 0
    assert (book.scheduler.kv_tokens_used, book.scheduler.kv_tokens_cached) == (0, 0)


def test_prefix_of_a_running_request_is_shared(book: Desk) -> None:
    old = book.add(range(80))
    book.run(2)
    book.add([*range(80), ANSWER, 1, 2])
    step = book.step()
    assert parts(step) == [(0, 81, 1, True), (1, 81, 2, True)]
    assert prefixes(step) == [None, SharedPrefix(sequence_id=id_of(old), length=81)]


def test_prefixes_make_room_for_requests() -> None:
    book = Desk(blocks=2)
    book.keep(100)
    assert book.scheduler.kv_tokens_cached == 2 * KV_BLOCK
    book.add(100)
    assert book.scheduler.take_freed() == [1]
    assert book.scheduler.kv_tokens_cached == 0


# ------------------------------------------------------------------ followers


def leader_and_follower(book: Desk) -> tuple[Request, Request]:
    """Return a request of 200 tokens, and one that has the first 150 and 30 others."""
    leader, follower = book.add(range(200)), book.add([*range(150), *[1] * 30])
    assert follower.waits_for is leader
    assert (follower.state, follower.sequence_id) == (RequestState.RUNNING, None)
    return leader, follower


def test_follower_waits_until_the_common_part_is_computed_and_shares_it() -> None:
    book = Desk(tokens=50)
    leader, follower = leader_and_follower(book)
    under_way = [book.step() for _ in range(4)]
    assert book.poll() is None
    for step in under_way[:2]:
        assert step.requests == (leader,)
        book.land(step)
        assert book.poll() is None
    book.land(under_way[2])  # 150 by now
    assert follower.waits_for is None
    assert follower.num_cached_tokens == 150
    step = book.step()
    assert parts(step) == [(1, 150, 30, True)]
    assert prefixes(step) == [SharedPrefix(sequence_id=id_of(leader), length=150)]
    assert book.scheduler.take_prefix_hit_tokens() == 150


@pytest.mark.parametrize(("keep", "start"), [(False, 0), (True, 50)])
def test_follower_goes_on_when_its_leader_is_removed(keep: bool, start: int) -> None:
    book = Desk(tokens=50)
    leader, follower = leader_and_follower(book)
    book.run()
    book.scheduler.remove(leader, keep=keep)
    assert follower.waits_for is None
    assert parts(book.step()) == [(1, start, 50, False)]


def test_follower_goes_on_when_its_leader_is_preempted() -> None:
    book = Desk(tokens=100, blocks=4)
    old = book.add(KV_BLOCK - 1)
    leader = book.add([*range(190)])
    follower = book.add([*range(65), *[1] * 5])
    assert follower.waits_for is leader
    book.run()
    assert parts(book.step()) == [(0, 63, 1, True), (2, 0, 70, True)]
    assert book.scheduler.take_preempted() == [leader]
    assert follower.waits_for is None
    assert list(book.scheduler.running) == [old, follower]


def test_follower_that_is_removed_leaves_its_leader_alone() -> None:
    book = Desk(tokens=50)
    leader, follower = leader_and_follower(book)
    book.scheduler.remove(follower)
    book.scheduler.validate()
    book.run(4)
    assert leader.num_new_tokens == 1
    assert book.scheduler.num_running == 1


def test_follower_for_whom_there_is_no_room_is_preempted() -> None:
    book = Desk(tokens=100, blocks=4)
    book.add(range(190))
    follower = book.add([*range(100), *[1] * 90])
    book.run(2)
    assert book.scheduler.take_preempted() == [follower]
    assert (follower.state, follower.waits_for) == (RequestState.WAITING, None)


@pytest.mark.parametrize(("common", "waits"), [(63, False), (64, True)])
def test_little_is_not_worth_waiting_for(common: int, waits: bool) -> None:
    book = Desk(tokens=200)
    book.add(range(100))
    other = book.add([*range(common), *[1] * 20])
    assert (other.waits_for is not None) is waits


def test_nobody_waits_for_what_is_there_already() -> None:
    book = Desk(tokens=200)
    book.keep(range(100))
    book.add([*range(80), *[1] * 50])
    other = book.add([*range(80), *[2] * 50])
    assert other.waits_for is None
    assert other.num_cached_tokens == 80


def test_nobody_waits_for_who_waits() -> None:
    book = Desk(tokens=50)
    leader, follower = leader_and_follower(book)
    third = book.add([*follower.token_ids, 9])
    assert third.waits_for is leader
    book.run(3)
    assert not any(request.waits_for for request in (follower, third))


# ------------------------------------------------------------------ preemption


def test_youngest_gives_up_its_room_for_the_oldest() -> None:
    book = Desk(tokens=1000, blocks=3)
    old, middle, young = (book.add(KV_BLOCK - 1, answer=100) for _ in range(3))
    book.run()
    assert parts(book.step()) == [(0, 63, 1, True)]
    assert book.scheduler.take_preempted() == [young]
    assert (young.state, young.sequence_id, young.num_computed_tokens) == (
        RequestState.WAITING,
        None,
        0,
    )
    assert len(young.token_ids) == KV_BLOCK  # its answer so far stays
    assert young.sampling_sent is False
    assert list(book.scheduler.running) == [old, middle]
    assert book.scheduler.take_freed() == [3]


def test_preempted_request_computes_all_its_tokens_again() -> None:
    book = Desk(tokens=1000, blocks=2)
    old, young = book.add(KV_BLOCK - 1), book.add(KV_BLOCK - 1)
    book.run(2)
    assert book.scheduler.take_preempted() == [young]
    assert not book.admit(young)
    book.scheduler.remove(old)
    assert book.admit(young)
    assert parts(book.step()) == [(1, 0, KV_BLOCK, True)]


@pytest.mark.parametrize("oldest_first", [True, False])
def test_oldest_is_not_preempted_for_a_younger_one(oldest_first: bool) -> None:
    book = Desk(tokens=1000, blocks=2)
    old, young = book.request(KV_BLOCK - 1), book.request(KV_BLOCK - 1)
    for request in (old, young) if oldest_first else (young, old):  # it may have been preempted
        assert book.admit(request)
    book.run()
    assert parts(book.step()) == [(0, 63, 1, True)]
    assert book.scheduler.take_preempted() == [young]


def test_who_is_under_way_is_not_preempted() -> None:
    book = Desk(blocks=3)
    book.add(KV_BLOCK - 1)
    young = book.add(120)
    steps = [book.step(), book.step()]
    assert parts(steps[1]) == [(1, 37, 83, True)]
    book.land(steps[0])
    assert book.poll() is None
    assert not book.scheduler.take_preempted()
    book.land(steps[1])
    assert parts(book.step()) == [(0, 63, 1, True)]
    assert book.scheduler.take_preempted() == [young]


def test_kept_prefixes_go_before_requests_are_preempted() -> None:
    book = Desk(blocks=3)
    book.keep(KV_BLOCK - 10)
    book.add(KV_BLOCK - 1)
    book.add(20)
    book.run(2)
    assert not book.scheduler.take_preempted()
    assert book.scheduler.take_freed() == [1]


def test_who_is_alone_and_has_no_room_starts_without_sharing() -> None:
    """What it shares is part of a longer buffer, which stays as long as it is shared."""
    book = Desk(tokens=1000, blocks=5)
    book.keep(range(200))
    request = book.add([*range(100), *[1] * 30], answer=190)
    assert request.num_cached_tokens == 100
    preempted = 0
    while not request.finish_reason:
        step = book.poll(idle=True)
        if step is None:
            assert book.scheduler.take_preempted() == [request]
            assert not request.shares
            preempted += 1
            assert book.admit(request)
            assert request.prefix is None
        else:
            book.land(step)
    assert preempted == 1
    assert request.num_computed_tokens == 5 * KV_BLOCK - 1


# ------------------------------------------------------------------ removal


@pytest.mark.parametrize("lost", [False, True])
def test_removed_while_under_way_is_freed_when_its_last_step_landed(lost: bool) -> None:
    book = Desk(tokens=10)
    request = book.add(20)
    steps = [book.step(), book.step()]
    book.scheduler.remove(request)
    for step, freed in zip(steps, ([], [1]), strict=True):
        assert book.scheduler.take_freed() == []
        assert book.scheduler.kv_tokens_used > 0
        if lost:
            book.scheduler.abandon(step)
        else:
            assert book.land(step) == [False] * step.num_samples
        book.scheduler.validate()
        assert book.scheduler.take_freed() == freed
    assert book.scheduler.kv_tokens_used == 0
    assert book.poll() is None


def test_removed_while_under_way_may_be_kept() -> None:
    book = Desk()
    request = book.add(range(50))
    book.run()
    step = book.step()
    book.scheduler.remove(request, keep=True)
    assert book.land(step) == [False]
    assert book.scheduler.take_freed() == []
    assert book.scheduler.hit_length(book.request(range(60))) == 50


def test_others_of_a_step_go_on_when_one_is_removed(book: Desk) -> None:
    gone, stays = book.add(3), book.add(4)
    step = book.step()
    book.scheduler.remove(gone)
    assert book.land(step) == [False, True]
    assert (gone.num_new_tokens, stays.num_new_tokens) == (0, 1)


# ------------------------------------------------------------------ failures


def test_abandoned_steps_go_back_to_what_is_computed() -> None:
    book = Desk(tokens=8)
    request = book.add(20)
    book.run()
    steps = [book.step(), book.step()]
    for step in steps:
        book.scheduler.abandon(step)
    assert (request.num_computed_tokens, request.num_scheduled_tokens) == (8, 8)
    assert (request.num_in_flight, request.sequence_id) == (0, 1)
    assert parts(book.step()) == [(0, 8, 8, False)]


def test_suspect_runs_alone_and_only_when_idle() -> None:
    book = Desk(tokens=8)
    book.add(2)
    suspect = book.add(5)
    book.add(3)
    suspect.alone = True
    assert book.poll(idle=False) is None
    step = book.step(idle=True)
    assert parts(step) == [(1, 0, 5, True)]
    assert book.poll(idle=False) is None
    book.land(step)
    assert not suspect.alone
    assert parts(book.step()) == [(1, 5, 1, True), (0, 0, 2, True), (2, 0, 3, True)]


def test_suspects_run_one_after_the_other() -> None:
    book = Desk(tokens=8)
    good, bad, worse = book.add(2), book.add(12), book.add(3)
    bad.alone = worse.alone = True
    seen = []
    for _ in range(3):
        step = book.step(idle=True)
        seen.append([p[:3] for p in parts(step)])
        book.land(step)
    assert seen == [[(1, 0, 8)], [(1, 8, 4)], [(2, 0, 3)]]
    assert not any(request.alone for request in (good, bad, worse))


def test_suspicion_ends_with_a_token_and_not_before() -> None:
    """What breaks stages may be in a later part of the prompt."""
    book = Desk(tokens=8)
    request = book.add(12)
    request.alone, request.losses, request.failures = True, 2, 1
    book.run()
    assert (request.alone, request.losses, request.failures) == (True, 2, 1)
    book.run()
    assert (request.alone, request.losses, request.failures) == (False, 0, 0)


def test_suspect_that_waits_for_another_stops_nobody() -> None:
    book = Desk(tokens=50)
    leader, follower = leader_and_follower(book)
    follower.alone = True
    assert book.step().requests == (leader,)


def test_restart_computes_all_tokens_in_a_new_sequence(book: Desk) -> None:
    request = book.add(30)
    book.run(2)
    step = book.step()
    tokens = list(request.token_ids)
    book.scheduler.restart(request)
    book.scheduler.validate()
    assert request.token_ids == tokens
    assert (request.num_computed_tokens, request.num_in_flight) == (0, 0)
    again = book.step()
    assert again.slices[0].sequence_id != step.slices[0].sequence_id
    assert again.token_ids == tuple(tokens)
    assert book.land(step) == [False]
    assert book.scheduler.take_freed() == [step.slices[0].sequence_id]
    assert book.land(again) == [True]


def test_restart_before_the_first_slice_gives_up_what_it_began_as(book: Desk) -> None:
    """A stage lost the prefix, or the sequence: nobody may begin as either again."""
    book.keep(range(80))
    request = book.add([*range(60), 1, 2])
    other = book.request([*range(70), 3])
    assert book.scheduler.hit_length(other) == 70
    step = book.step()
    book.scheduler.restart(request)
    book.scheduler.abandon(step)
    assert book.scheduler.hit_length(other) == 0
    assert sorted(book.scheduler.take_freed()) == [1, 2]
    step = book.step()
    assert parts(step) == [(1, 0, 62, True)]
    assert prefixes(step) == [None]


def test_restart_later_leaves_what_it_began_as_to_others(book: Desk) -> None:
    book.keep(range(80))
    request = book.add([*range(60), 1, 2])
    book.run()
    book.scheduler.restart(request)
    assert book.scheduler.hit_length(book.request([*range(70), 3])) == 70
    assert parts(book.step()) == [(1, 0, 63, True)]  # but it takes no part in that


def test_restart_without_room_waits_for_the_old_sequence_to_land() -> None:
    book = Desk(blocks=1)
    request = book.add(20)
    step = book.step()
    book.scheduler.restart(request)
    book.scheduler.validate()
    assert book.scheduler.take_preempted() == [request]
    assert request.state is RequestState.WAITING
    book.scheduler.abandon(step)
    assert book.admit(request)
    assert parts(book.step()) == [(0, 0, 20, True)]


def test_evacuated_requests_are_ready_to_run_elsewhere() -> None:
    book = Desk(tokens=50)
    talker = book.add(10)
    leader, follower = leader_and_follower(book)
    book.run()
    book.step()
    answered = [list(r.token_ids) for r in (talker, leader, follower)]
    assert book.scheduler.evacuate() == [talker, leader, follower]
    assert book.scheduler.num_running == 0
    elsewhere = Desk(tokens=1000)
    for request in (talker, leader, follower):
        assert request.state is RequestState.WAITING
        assert (request.sequence_id, request.waits_for, request.prefix) == (None, None, None)
        assert (request.num_computed_tokens, request.num_scheduled_tokens) == (0, 0)
        assert (request.num_in_flight, request.sampling_sent) == (0, False)
        assert elsewhere.admit(request)
    assert [list(r.token_ids) for r in (talker, leader, follower)] == answered
    assert [p[0] for p in parts(elsewhere.step())] == [talker.number, leader.number]


# ------------------------------------------------------------------ a message's header


FAR = 2**52

WORST = Sampling(
    temperature=1.5,
    top_k=2**31 - 1,
    top_p=0.9,
    min_p=0.1,
    repetition_penalty=1.1,
    presence_penalty=0.3,
    frequency_penalty=0.3,
    logit_bias=tuple((2**31 - 1 - i, -99.9) for i in range(MAX_LOGIT_BIASES)),
    seed=MAX_SEED,
    prompt_tokens=2**31 - 1,
    suppressed=tuple(range(2**31 - 17, 2**31 - 1)),
    suppressed_before=2**31 - 1,
    logprobs=20,
)


def encodes(step: Step) -> None:
    """Assert that the task of a step fits a message, whatever it has to carry besides."""
    spec, frame = frame_of_token_ids(step.token_ids)
    task = Task(
        epoch=FAR,
        step=FAR,
        oldest=FAR,
        sequences=step.slices,
        tensors=(spec,),
        released=tuple(range(FAR, FAR + MAX_RELEASED)),
        timings=(StageTime(queued_us=2**31, layers_us=2**31, compute_us=2**31),) * MAX_STAGES,
    )
    assert codec.to_worker.decode(codec.encode(task, (frame,)))[0] == task


@pytest.mark.parametrize("sampling", [Sampling(), WORST])
def test_prompts_that_begin_together_fit_a_message(sampling: Sampling) -> None:
    book = Desk(tokens=100_000, blocks=1000, first_id=FAR)
    for _ in range(200):
        book.add(2, sampling=sampling)
    sampled = 0
    while step := book.poll():
        encodes(step)
        sampled += step.num_samples
    assert sampled == 200


def test_prompts_that_share_a_prefix_fit_a_message() -> None:
    book = Desk(tokens=100_000, blocks=1000, first_id=FAR)
    book.keep(range(100))
    for number in range(300):
        book.add([*range(90), 1000 + number, 1, 2], sampling=WORST if number % 2 else Sampling())
    sampled = 0
    while step := book.poll():
        assert all(prefixes(step))
        encodes(step)
        sampled += step.num_samples
    assert sampled == 300


def test_answers_of_full_steps_and_prompts_fit_a_message() -> None:
    book = Desk(sequences=1000, tokens=100_000, blocks=2000, first_id=FAR)
    for _ in range(MAX_SLICES - 5):
        book.add(1)
    while any(not request.num_new_tokens for request in book.scheduler.running):
        book.run()
    for _ in range(20):
        book.add(2, sampling=WORST)
    step = book.step()
    assert len(step.slices) == MAX_SLICES
    encodes(step)


def test_answers_after_steps_were_abandoned_fit_a_message() -> None:
    """The last stage is to be told again how to pick the tokens of all of them."""
    book = Desk(tokens=1000, first_id=FAR)
    requests = [book.add(2, sampling=WORST) for _ in range(40)]
    while any(not request.num_new_tokens for request in requests):
        book.run()
    book.scheduler.abandon(book.step())
    told = 0
    while step := book.poll():
        encodes(step)
        told += sum(part.sampling is not None for part in step.slices)
    assert told == 40


# ------------------------------------------------------------------ other stages


def test_on_other_stages_it_is_told_again_how_to_sample() -> None:
    book = Desk()
    request = book.add(5)
    book.land(book.step())
    book.scheduler.move(100 * KV_BLOCK)
    assert request.num_computed_tokens == 5, "what is computed stays"
    (part,) = book.step().slices
    assert (part.start, part.num_tokens, part.sampling) == (5, 1, Sampling(seed=0))


def test_where_other_stages_have_less_room_prefixes_go_first() -> None:
    book = Desk(blocks=4)
    ended = book.add(2 * KV_BLOCK - 1)
    book.land(book.step())
    book.land(book.step())
    book.scheduler.remove(ended, keep=True)
    running = book.add(KV_BLOCK)
    assert book.scheduler.kv_tokens_cached == 2 * KV_BLOCK
    book.scheduler.move(2 * KV_BLOCK)
    book.scheduler.validate()
    assert book.scheduler.kv_tokens_cached == 0
    assert len(book.scheduler.take_freed()) == 1
    assert (running.state, book.scheduler.take_preempted()) == (RequestState.RUNNING, [])


def test_where_other_stages_have_less_room_the_youngest_gives_way() -> None:
    book = Desk(blocks=4)
    first, second = book.add(KV_BLOCK), book.add(KV_BLOCK)
    book.land(book.step())
    book.scheduler.move(2 * KV_BLOCK)
    book.scheduler.validate()
    assert book.scheduler.take_preempted() == [second]
    assert (first.state, second.state) == (RequestState.RUNNING, RequestState.WAITING)
    assert not book.admit(book.request(2 * KV_BLOCK)), "the new limit counts"
