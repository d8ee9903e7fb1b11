"""What is computed next and for whom: steps, admission, sharing, preemption, failures."""

from collections.abc import Hashable, Iterator, Sequence

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
from distributed_llm.common.types import KV_BLOCK, Epoch, PeerId, SequenceId, StepNumber
from distributed_llm.coordinator.kv_windows import KVWindows
from distributed_llm.coordinator.requests.answer_states import AnswerState
from distributed_llm.coordinator.requests.parameters import Limits
from distributed_llm.coordinator.requests.request import Answer, Request, Suspects
from distributed_llm.coordinator.serving.kv_ledger import KVLedger
from distributed_llm.coordinator.serving.prefixes import Match
from distributed_llm.coordinator.serving.scheduler import Scheduler
from distributed_llm.coordinator.serving.step import Step

TOKEN = 7
"""Every token of every answer."""

Parts = list[tuple[int, int, int, bool]]


class Bench:
    """A scheduler and a way to fill it."""

    def __init__(
        self,
        *,
        sequences: int = 1000,
        tokens: int = 100,
        blocks: int = 100,
        first_id: int = 1,
        windows: KVWindows | None = None,
    ) -> None:
        self._next_id = first_id
        self._number = 0
        self.changes = 0
        self.scheduler = Scheduler(
            max_sequences=sequences,
            max_tokens=tokens,
            kv_tokens=blocks * KV_BLOCK,
            windows=windows,
            new_sequence_id=self._new_sequence_id,
            on_change=self._on_change,
        )

    def _new_sequence_id(self) -> SequenceId:
        self._next_id += 1
        return SequenceId(self._next_id - 1)

    def _on_change(self) -> None:
        self.changes += 1

    def answer(
        self,
        prompt: int | Sequence[int],
        *,
        new_tokens: int = 10,
        client: bytes = b"a",
        sampling: Sampling | None = None,
    ) -> Answer:
        """Make an answer; a prompt that is a number of tokens begins like no other."""
        number, self._number = self._number, self._number + 1
        request = Request(
            (PeerId(client), f"r{number}", number), SamplingParams(), arrived_at=0.0, client=client
        )
        if isinstance(prompt, int):
            prompt = range(10_000 * (number + 1), 10_000 * (number + 1) + prompt)
        limits = Limits((sampling or Sampling(seed=number),), new_tokens, ())
        request.accept(prompt, limits, number=number)
        return request.answers[0]

    def admit(self, answer: Answer, *, now: float = 1.0) -> bool:
        return self.scheduler.admit(answer, now=now)

    def add(
        self,
        prompt: int | Sequence[int],
        *,
        new_tokens: int = 10,
        client: bytes = b"a",
        sampling: Sampling | None = None,
    ) -> Answer:
        """Let a new answer run."""
        answer = self.answer(prompt, new_tokens=new_tokens, client=client, sampling=sampling)
        assert self.admit(answer)
        return answer

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
        are_current = self.scheduler.complete(step)
        for answer, is_current in zip(step.samplers, are_current, strict=True):
            if is_current:
                answer.append(TOKEN, None, now=1.0)
        self.scheduler.validate()
        return are_current

    def run(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.land(self.step(idle=True))

    def keep(self, prompt: int | Sequence[int]) -> Answer:
        """Compute a prompt and one token, and keep it as a prefix for others."""
        answer = self.add(prompt)
        while not answer.num_new_tokens:
            self.run()
        self.scheduler.remove(answer, keep=True)
        self.scheduler.validate()
        self.scheduler.take_prefix_tokens()
        return answer


def parts(step: Step) -> Parts:
    """Return (answer's number, start, tokens, whether it samples) of each slice."""
    return [
        (answer.number, part.start, part.num_tokens, part.sample)
        for answer, part in zip(step.answers, step.slices, strict=True)
    ]


def prefixes(step: Step) -> list[SharedPrefix | None]:
    return [part.prefix for part in step.slices]


def id_of(answer: Answer) -> int:
    assert answer.sequence_id is not None
    return answer.sequence_id


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.scheduler.validate()


# ------------------------------------------------------------------ steps


def test_nothing_to_do(bench: Bench) -> None:
    assert bench.poll(idle=True) is None


def test_whole_prompt_then_a_token_at_a_time(bench: Bench) -> None:
    answer = bench.add([5, 6, 7, 8])
    step = bench.step()
    assert parts(step) == [(0, 0, 4, True)]
    assert step.token_ids == (5, 6, 7, 8)
    assert step.answers == (answer,)
    assert step.slices[0].sequence_id == id_of(answer)
    assert (step.num_samples, step.decodes) == (1, False)
    bench.land(step)
    step = bench.step()
    assert parts(step) == [(0, 4, 1, True)]
    assert step.token_ids == (TOKEN,)
    assert (step.num_samples, step.decodes) == (1, True)


def test_answering_sequence_is_in_one_step_at_a_time(bench: Bench) -> None:
    bench.add(4)
    step = bench.step()
    assert bench.poll() is None
    bench.land(step)
    step = bench.step()
    assert bench.poll() is None
    bench.land(step)
    assert parts(bench.step()) == [(0, 5, 1, True)]


def test_newcomer_does_not_wait_for_steps_of_others(bench: Bench) -> None:
    bench.add(4)
    bench.step()
    bench.add(3)
    assert parts(bench.step()) == [(1, 0, 3, True)]


def test_chunks_of_a_prompt_follow_each_other_and_only_the_last_samples() -> None:
    bench = Bench(tokens=8)
    answer = bench.add(20)
    steps = [bench.step() for _ in range(3)]
    assert [parts(step) for step in steps] == [
        [(0, 0, 8, False)],
        [(0, 8, 8, False)],
        [(0, 16, 4, True)],
    ]
    assert [token for step in steps for token in step.token_ids] == answer.token_ids
    assert bench.poll() is None
    for step, computed, are_current in zip(steps, (8, 16, 20), ([], [], [True]), strict=True):
        assert bench.land(step) == are_current
        assert answer.num_computed_tokens == computed


def test_answers_go_before_prompts_within_the_token_budget() -> None:
    bench = Bench(tokens=8)
    bench.add(3)
    bench.add(20)
    bench.add(2)
    first = bench.step()
    assert parts(first) == [(0, 0, 3, True), (1, 0, 5, False)]
    bench.land(first)
    step = bench.step()
    assert parts(step) == [(0, 3, 1, True), (1, 5, 7, False)]
    bench.land(step)
    assert parts(bench.step()) == [(0, 4, 1, True), (1, 12, 7, False)]


def test_long_prompt_stops_no_answer() -> None:
    bench = Bench(tokens=8)
    talker = bench.add(2)
    bench.add(400)
    bench.run(5)
    assert talker.num_new_tokens == 5


def test_answers_spread_over_the_steps_in_flight(bench: Bench) -> None:
    for _ in range(6):
        bench.add(2)
    bench.run()
    steps = [bench.step(max_decodes=2) for _ in range(3)]
    assert [[p[0] for p in parts(step)] for step in steps] == [[0, 1], [2, 3], [4, 5]]
    assert bench.poll(max_decodes=2) is None
    bench.land(steps[0])
    assert [p[0] for p in parts(bench.step(max_decodes=2))] == [0, 1]


def test_step_without_chunks_of_prompts() -> None:
    bench = Bench(tokens=8)
    bench.add(2)
    bench.run()
    bench.add(20)
    assert parts(bench.step(prompts=False)) == [(0, 2, 1, True)]
    assert bench.poll(prompts=False) is None
    assert parts(bench.step(prompts=True)) == [(1, 0, 8, False)]


def test_answers_keep_to_the_token_budget() -> None:
    bench = Bench(tokens=3)
    for _ in range(5):
        bench.add(1)
    bench.run(2)
    steps = [bench.step(), bench.step()]
    assert [len(step.token_ids) for step in steps] == [3, 2]
    assert bench.poll() is None


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("prompt", [1, 4])
def test_who_got_a_token_least_recently_goes_first(depth: int, prompt: int) -> None:
    """24 answers, and 16 tokens in a step: nobody is left behind."""
    bench = Bench(tokens=16)
    answers = [bench.add(prompt, new_tokens=1000) for _ in range(24)]
    while not all(answer.num_new_tokens for answer in answers):
        bench.run()
    before = [answer.num_new_tokens for answer in answers]
    in_flight: list[Step] = []
    for _ in range(150):
        share = -(-bench.scheduler.num_decoding // depth)
        while len(in_flight) < depth:
            step = bench.poll(max_decodes=share)
            if step is None:
                break
            in_flight.append(step)
        bench.land(in_flight.pop(0))
    counts = [a.num_new_tokens - had for a, had in zip(answers, before, strict=True)]
    assert max(counts) - min(counts) <= 1, counts


def test_newcomer_does_not_go_before_those_that_wait() -> None:
    bench = Bench(tokens=2)
    for _ in range(3):
        bench.add(1)
    first = bench.step()
    bench.land(first)
    assert [p[0] for p in parts(first)] == [0, 1]
    bench.add(1)
    assert [p[0] for p in parts(bench.step())] == [2, 3]
    assert [p[0] for p in parts(bench.step())] == [0, 1]


def test_prompts_go_on_where_answers_would_fill_every_step() -> None:
    bench = Bench(tokens=8)
    for _ in range(8):
        bench.add(1, new_tokens=1000)
    bench.run()
    newcomer = bench.add(10)
    counts = []
    while newcomer.num_uncomputed_tokens > 1:
        step = bench.step()
        counts.append([size for _, _, size, _ in parts(step)])
        bench.land(step)
    assert counts == [[1] * 6 + [2]] * 5


@pytest.mark.parametrize("tokens", [2, 3])
def test_prompts_go_on_however_small_the_steps_are(tokens: int) -> None:
    """A quarter of such a step is less than one token."""
    bench = Bench(tokens=tokens)
    for _ in range(tokens):
        bench.add(1, new_tokens=1000)
    bench.run()
    newcomer = bench.add(10)
    bench.run(9)
    assert newcomer.num_uncomputed_tokens == 1
    assert len(bench.step().slices) == tokens


def test_no_more_slices_than_a_task_may_have() -> None:
    count = MAX_SLICES + 9
    bench = Bench(sequences=count, tokens=10_000, blocks=count)
    for _ in range(count):
        bench.add(2)
    while bench.scheduler.num_decoding < count:
        step = bench.scheduler.next_step(max_decodes=0, prompts=True, idle=True)
        assert step is not None
        bench.land(step)
    assert len(bench.step(max_decodes=count).slices) == MAX_SLICES
    assert len(bench.step(max_decodes=count).slices) == 9


# ------------------------------------------------------------------ clients


def test_prompts_of_clients_share_the_budget() -> None:
    bench = Bench(tokens=65)
    bench.add(100, client=b"a")
    bench.add(100, client=b"a")
    bench.add(100, client=b"b")
    bench.add(5, client=b"c")
    # What c leaves is for a and b; within a, the oldest is first.
    assert sorted(parts(bench.step())) == [(0, 0, 30, False), (2, 0, 30, False), (3, 0, 5, True)]


def test_younger_prompt_of_a_client_gets_what_the_oldest_leaves() -> None:
    bench = Bench(tokens=60)
    bench.add(10, client=b"a")
    bench.add(100, client=b"a")
    bench.add(100, client=b"b")
    assert sorted(parts(bench.step())) == [(0, 0, 10, True), (1, 0, 20, False), (2, 0, 30, False)]


def test_one_client_alone_has_all_of_the_budget() -> None:
    bench = Bench(tokens=60)
    bench.add(100)
    bench.add(100)
    assert parts(bench.step()) == [(0, 0, 60, False)]
    assert parts(bench.step()) == [(0, 60, 40, True), (1, 0, 20, False)]


def test_many_clients_and_few_tokens() -> None:
    bench = Bench(tokens=3)
    for number in range(5):
        bench.add(10, client=b"c%d" % number)
    step = bench.step()
    assert len(step.token_ids) == 3
    assert [part.num_tokens for part in step.slices] == [1, 1, 1]


# ------------------------------------------------------------------ admission


def test_no_more_sequences_than_allowed() -> None:
    bench = Bench(sequences=2)
    first, second = bench.add(1), bench.add(1)
    third = bench.answer(1)
    assert not bench.scheduler.has_seat
    assert not bench.admit(third)
    assert third.state is AnswerState.WAITING
    bench.scheduler.remove(first)
    assert bench.scheduler.has_seat
    assert bench.admit(third)
    assert third.state is AnswerState.RUNNING
    assert list(bench.scheduler.running) == [second, third]


def test_prompt_that_finds_no_room_waits() -> None:
    bench = Bench(blocks=3)
    first = bench.add(2 * KV_BLOCK - 1)
    second = bench.answer(KV_BLOCK)  # and its first token: two blocks
    assert not bench.admit(second)
    assert (second.state, second.sequence_id) == (AnswerState.WAITING, None)
    assert bench.admit(bench.answer(KV_BLOCK - 1))
    bench.scheduler.remove(first)
    assert bench.admit(second)
    bench.scheduler.validate()


def test_who_found_no_room_is_asked_about_again_only_when_there_is_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Looking for prefixes of a long prompt costs milliseconds, and is done after every step."""
    bench = Bench(blocks=4)
    running, waiting = bench.answer(100), bench.answer(150)
    assert bench.admit(running)
    looks: list[int] = []
    match = KVLedger.match

    def counted(
        ledger: KVLedger, tokens: Sequence[int], limit: int, shares_with: Hashable
    ) -> Match | None:
        looks.append(limit)
        return match(ledger, tokens, limit, shares_with)

    monkeypatch.setattr(KVLedger, "match", counted)
    assert not bench.admit(waiting)
    assert len(looks) >= 1
    looks.clear()
    assert not bench.admit(waiting)
    assert looks == []
    bench.scheduler.remove(running)
    assert bench.admit(waiting)


@pytest.mark.parametrize(("new_tokens", "fits"), [(64, True), (65, False)])
def test_answer_too_long_for_this_pipeline_is_not_admitted(new_tokens: int, fits: bool) -> None:
    bench = Bench(blocks=2)
    answer = bench.answer(KV_BLOCK, new_tokens=new_tokens)
    assert bench.admit(answer) is fits
    assert bench.scheduler.num_running == fits


def test_start_is_noted_once() -> None:
    bench = Bench()
    answer = bench.answer(3)
    assert bench.admit(answer, now=5.0)
    bench.scheduler.evacuate()
    assert bench.admit(answer, now=9.0)
    assert answer.started_at == 5.0


def test_counts_of_what_runs() -> None:
    bench = Bench(tokens=80)
    bench.add(70)
    bench.add(70)
    bench.run()
    assert (bench.scheduler.num_running, bench.scheduler.num_decoding) == (2, 1)
    assert bench.scheduler.kv_tokens_used == 4 * KV_BLOCK
    bench.run()
    assert bench.scheduler.num_decoding == 2


def test_changes_are_told(bench: Bench) -> None:
    answer = bench.add(3)
    assert bench.changes == 1
    step = bench.step()
    assert bench.changes == 1
    bench.land(step)
    assert bench.changes == 2
    bench.scheduler.abandon(bench.step())
    assert bench.changes == 3
    bench.scheduler.remove(answer)
    assert bench.changes == 4
    bench.scheduler.remove(answer)
    assert bench.changes == 4


# ------------------------------------------------------------------ what is sent once


def test_sampling_is_sent_with_the_first_slice_that_samples_and_not_again() -> None:
    bench = Bench(tokens=8)
    answer = bench.add(12)
    sent = []
    for _ in range(4):
        step = bench.step()
        sent += [part.sampling for part in step.slices]
        bench.land(step)
    assert sent == [None, answer.sampling, None, None]


def test_sampling_is_sent_again_after_steps_were_abandoned(bench: Bench) -> None:
    answer = bench.add(4)
    step = bench.step()
    bench.scheduler.abandon(step)
    again = bench.step()
    assert again == step
    assert again.slices[0].sampling == answer.sampling
    bench.land(again)
    bench.scheduler.abandon(bench.step())
    assert bench.step().slices[0].sampling == answer.sampling


def test_sampling_is_sent_again_after_a_restart(bench: Bench) -> None:
    answer = bench.add(4)
    bench.run(2)
    bench.scheduler.restart(answer)
    step = bench.step()
    assert parts(step) == [(0, 0, 6, True)]
    assert step.slices[0].sampling == answer.sampling


def test_prefix_is_sent_until_its_first_slice_is_confirmed() -> None:
    bench = Bench(tokens=20)
    bench.keep(list(range(100)))
    answer = bench.add([*range(90), *[1] * 50])
    shared = SharedPrefix(sequence_id=SequenceId(1), length=90)
    steps = [bench.step(), bench.step()]
    assert [parts(s) for s in steps] == [[(1, 90, 20, False)], [(1, 110, 20, False)]]
    assert [prefixes(s) for s in steps] == [[shared], [None]]
    for step in steps:
        bench.scheduler.abandon(step)
    bench.scheduler.validate()
    steps = [bench.step(), bench.step()]
    assert [prefixes(s) for s in steps] == [[shared], [None]]
    bench.land(steps[0])
    bench.scheduler.abandon(steps[1])
    step = bench.step()
    assert parts(step) == [(1, 110, 20, False)]
    assert prefixes(step) == [None]
    assert answer.num_computed_tokens == 110


# ------------------------------------------------------------------ prefixes


def test_what_an_answer_kept_is_found_by_the_next(bench: Bench) -> None:
    old = bench.keep(50)
    assert bench.scheduler.kv_tokens_used == 0
    assert bench.scheduler.kv_tokens_cached == KV_BLOCK
    answer = bench.answer([*old.token_ids, 1, 2])
    assert bench.scheduler.hit_length(answer) == 50  # its last token was not computed
    assert bench.admit(answer)
    assert (answer.num_computed_tokens, answer.num_cached_tokens) == (50, 50)
    assert bench.scheduler.take_prefix_tokens()[1] == 50
    step = bench.step()
    assert parts(step) == [(1, 50, 3, True)]
    assert prefixes(step) == [SharedPrefix(sequence_id=SequenceId(1), length=50, take=True)]
    assert step.token_ids == (TOKEN, 1, 2)
    bench.land(step)
    assert bench.scheduler.take_freed() == []  # it was taken


def test_last_token_of_a_prompt_is_always_computed(bench: Bench) -> None:
    bench.keep(range(50))
    bench.add(range(50))
    assert parts(bench.step()) == [(1, 49, 1, True)]


def test_what_is_not_kept_is_not_found(bench: Bench) -> None:
    old = bench.add(50)
    bench.run()
    bench.scheduler.remove(old, keep=False)
    assert bench.scheduler.take_freed() == [1]
    assert bench.scheduler.take_freed() == []
    assert bench.scheduler.hit_length(bench.answer(range(50))) == 0
    assert (bench.scheduler.kv_tokens_used, bench.scheduler.kv_tokens_cached) == (0, 0)


def test_prefix_of_a_running_answer_is_shared(bench: Bench) -> None:
    old = bench.add(range(80))
    bench.run(2)
    bench.add([*range(80), TOKEN, 1, 2])
    step = bench.step()
    assert parts(step) == [(0, 81, 1, True), (1, 81, 2, True)]
    assert prefixes(step) == [None, SharedPrefix(sequence_id=SequenceId(id_of(old)), length=81)]


def test_prefixes_make_room_for_answers() -> None:
    bench = Bench(blocks=2)
    bench.keep(100)
    assert bench.scheduler.kv_tokens_cached == 2 * KV_BLOCK
    bench.add(100)
    assert bench.scheduler.take_freed() == [1]
    assert bench.scheduler.kv_tokens_cached == 0


# ------------------------------------------------------------------ followers


def leader_and_follower(bench: Bench) -> tuple[Answer, Answer]:
    """Return an answer of 200 tokens, and one that has the first 150 and 30 others."""
    leader, follower = bench.add(range(200)), bench.add([*range(150), *[1] * 30])
    assert follower.waits_for is leader
    assert (follower.state, follower.sequence_id) == (AnswerState.RUNNING, None)
    return leader, follower


def test_follower_waits_until_the_common_part_is_computed_and_shares_it() -> None:
    bench = Bench(tokens=50)
    leader, follower = leader_and_follower(bench)
    under_way = [bench.step() for _ in range(4)]
    assert bench.poll() is None
    for step in under_way[:2]:
        assert step.answers == (leader,)
        bench.land(step)
        assert bench.poll() is None
    bench.land(under_way[2])  # 150 by now
    assert follower.waits_for is None
    assert follower.num_cached_tokens == 150
    step = bench.step()
    assert parts(step) == [(1, 150, 30, True)]
    assert prefixes(step) == [SharedPrefix(sequence_id=SequenceId(id_of(leader)), length=150)]
    assert bench.scheduler.take_prefix_tokens()[1] == 150


@pytest.mark.parametrize(("keep", "start"), [(False, 0), (True, 50)])
def test_follower_goes_on_when_its_leader_is_removed(keep: bool, start: int) -> None:
    bench = Bench(tokens=50)
    leader, follower = leader_and_follower(bench)
    bench.run()
    bench.scheduler.remove(leader, keep=keep)
    assert follower.waits_for is None
    assert parts(bench.step()) == [(1, start, 50, False)]


def test_follower_goes_on_when_its_leader_is_preempted() -> None:
    bench = Bench(tokens=100, blocks=4)
    old = bench.add(KV_BLOCK - 1)
    leader = bench.add([*range(190)])
    follower = bench.add([*range(65), *[1] * 5])
    assert follower.waits_for is leader
    bench.run()
    assert parts(bench.step()) == [(0, 63, 1, True), (2, 0, 70, True)]
    assert bench.scheduler.take_preempted() == [leader]
    assert follower.waits_for is None
    assert list(bench.scheduler.running) == [old, follower]


def test_follower_that_is_removed_leaves_its_leader_alone() -> None:
    bench = Bench(tokens=50)
    leader, follower = leader_and_follower(bench)
    bench.scheduler.remove(follower)
    bench.scheduler.validate()
    bench.run(4)
    assert leader.num_new_tokens == 1
    assert bench.scheduler.num_running == 1


def test_follower_for_whom_there_is_no_room_is_preempted() -> None:
    bench = Bench(tokens=100, blocks=4)
    bench.add(range(190))
    follower = bench.add([*range(100), *[1] * 90])
    bench.run(2)
    assert bench.scheduler.take_preempted() == [follower]
    assert (follower.state, follower.waits_for) == (AnswerState.WAITING, None)


@pytest.mark.parametrize(("common", "waits"), [(63, False), (64, True)])
def test_little_is_not_worth_waiting_for(common: int, waits: bool) -> None:
    bench = Bench(tokens=200)
    bench.add(range(100))
    other = bench.add([*range(common), *[1] * 20])
    assert (other.waits_for is not None) is waits


def test_nobody_waits_for_what_is_there_already() -> None:
    bench = Bench(tokens=200)
    bench.keep(range(100))
    bench.add([*range(80), *[1] * 50])
    other = bench.add([*range(80), *[2] * 50])
    assert other.waits_for is None
    assert other.num_cached_tokens == 80


def test_nobody_waits_for_who_waits() -> None:
    bench = Bench(tokens=50)
    leader, follower = leader_and_follower(bench)
    third = bench.add([*follower.token_ids, 9])
    assert third.waits_for is leader
    bench.run(3)
    assert not any(answer.waits_for for answer in (follower, third))


# ------------------------------------------------------------------ preemption


def test_youngest_gives_up_its_room_for_the_oldest() -> None:
    bench = Bench(tokens=1000, blocks=3)
    old, middle, young = (bench.add(KV_BLOCK - 1, new_tokens=100) for _ in range(3))
    bench.run()
    assert parts(bench.step()) == [(0, 63, 1, True)]
    assert bench.scheduler.take_preempted() == [young]
    assert (young.state, young.sequence_id, young.num_computed_tokens) == (
        AnswerState.WAITING,
        None,
        0,
    )
    assert len(young.token_ids) == KV_BLOCK  # its tokens so far stay
    assert young.sampling_sent is False
    assert list(bench.scheduler.running) == [old, middle]
    assert bench.scheduler.take_freed() == [3]


def test_preempted_answer_computes_all_its_tokens_again() -> None:
    bench = Bench(tokens=1000, blocks=2)
    old, young = bench.add(KV_BLOCK - 1), bench.add(KV_BLOCK - 1)
    bench.run(2)
    assert bench.scheduler.take_preempted() == [young]
    assert not bench.admit(young)
    bench.scheduler.remove(old)
    assert bench.admit(young)
    assert parts(bench.step()) == [(1, 0, KV_BLOCK, True)]


@pytest.mark.parametrize("oldest_first", [True, False])
def test_oldest_is_not_preempted_for_a_younger_one(oldest_first: bool) -> None:
    bench = Bench(tokens=1000, blocks=2)
    old, young = bench.answer(KV_BLOCK - 1), bench.answer(KV_BLOCK - 1)
    for answer in (old, young) if oldest_first else (young, old):  # it may have been preempted
        assert bench.admit(answer)
    bench.run()
    assert parts(bench.step()) == [(0, 63, 1, True)]
    assert bench.scheduler.take_preempted() == [young]


def test_who_is_under_way_is_not_preempted() -> None:
    bench = Bench(blocks=3)
    bench.add(KV_BLOCK - 1)
    young = bench.add(120)
    steps = [bench.step(), bench.step()]
    assert parts(steps[1]) == [(1, 37, 83, True)]
    bench.land(steps[0])
    assert bench.poll() is None
    assert not bench.scheduler.take_preempted()
    bench.land(steps[1])
    assert parts(bench.step()) == [(0, 63, 1, True)]
    assert bench.scheduler.take_preempted() == [young]


def test_kept_prefixes_go_before_answers_are_preempted() -> None:
    bench = Bench(blocks=3)
    bench.keep(KV_BLOCK - 10)
    bench.add(KV_BLOCK - 1)
    bench.add(20)
    bench.run(2)
    assert not bench.scheduler.take_preempted()
    assert bench.scheduler.take_freed() == [1]


def test_who_is_alone_and_has_no_room_starts_without_sharing() -> None:
    """What it shares is part of a longer buffer, which stays as long as it is shared."""
    bench = Bench(tokens=1000, blocks=5)
    bench.keep(range(200))
    answer = bench.add([*range(100), *[1] * 30], new_tokens=190)
    assert answer.num_cached_tokens == 100
    preempted = 0
    while not answer.finish_reason:
        step = bench.poll(idle=True)
        if step is None:
            assert bench.scheduler.take_preempted() == [answer]
            assert not answer.shares
            preempted += 1
            assert bench.admit(answer)
            assert answer.prefix is None
        else:
            bench.land(step)
    assert preempted == 1
    assert answer.num_computed_tokens == 5 * KV_BLOCK - 1


# ------------------------------------------------------------------ removal


@pytest.mark.parametrize("lost", [False, True])
def test_removed_while_under_way_is_freed_when_its_last_step_landed(lost: bool) -> None:
    bench = Bench(tokens=10)
    answer = bench.add(20)
    steps = [bench.step(), bench.step()]
    bench.scheduler.remove(answer)
    for step, freed in zip(steps, ([], [1]), strict=True):
        assert bench.scheduler.take_freed() == []
        assert bench.scheduler.kv_tokens_used > 0
        if lost:
            bench.scheduler.abandon(step)
        else:
            assert bench.land(step) == [False] * step.num_samples
        bench.scheduler.validate()
        assert bench.scheduler.take_freed() == freed
    assert bench.scheduler.kv_tokens_used == 0
    assert bench.poll() is None


def test_removed_while_under_way_may_be_kept() -> None:
    bench = Bench()
    answer = bench.add(range(50))
    bench.run()
    step = bench.step()
    bench.scheduler.remove(answer, keep=True)
    assert bench.land(step) == [False]
    assert bench.scheduler.take_freed() == []
    assert bench.scheduler.hit_length(bench.answer(range(60))) == 50


def test_others_of_a_step_go_on_when_one_is_removed(bench: Bench) -> None:
    gone, stays = bench.add(3), bench.add(4)
    step = bench.step()
    bench.scheduler.remove(gone)
    assert bench.land(step) == [False, True]
    assert (gone.num_new_tokens, stays.num_new_tokens) == (0, 1)


# ------------------------------------------------------------------ failures


def test_abandoned_steps_go_back_to_what_is_computed() -> None:
    bench = Bench(tokens=8)
    answer = bench.add(20)
    bench.run()
    steps = [bench.step(), bench.step()]
    for step in steps:
        bench.scheduler.abandon(step)
    assert (answer.num_computed_tokens, answer.num_scheduled_tokens) == (8, 8)
    assert (answer.num_in_flight, answer.sequence_id) == (0, 1)
    assert parts(bench.step()) == [(0, 8, 8, False)]


def test_suspect_runs_alone_and_only_when_idle() -> None:
    bench = Bench(tokens=8)
    bench.add(2)
    suspect = bench.add(5)
    bench.add(3)
    suspect.suspects = Suspects()
    assert bench.poll(idle=False) is None
    step = bench.step(idle=True)
    assert parts(step) == [(1, 0, 5, True)]
    assert bench.poll(idle=False) is None
    bench.land(step)
    assert suspect.suspects is None
    assert parts(bench.step()) == [(1, 5, 1, True), (0, 0, 2, True), (2, 0, 3, True)]


def test_groups_of_suspects_run_one_after_the_other() -> None:
    bench = Bench(tokens=8)
    good, bad, worse = bench.add(2), bench.add(12), bench.add(3)
    bad.suspects, worse.suspects = Suspects(), Suspects()
    seen = []
    for _ in range(3):
        step = bench.step(idle=True)
        seen.append([p[:3] for p in parts(step)])
        bench.land(step)
    assert seen == [[(1, 0, 8)], [(1, 8, 4)], [(2, 0, 3)]]
    assert not any(answer.suspects for answer in (good, bad, worse))


def test_suspects_of_a_group_run_together_until_each_has_a_token() -> None:
    bench = Bench(tokens=8)
    good, long, short = bench.add(2), bench.add(12), bench.add(3)
    bench.run()
    long.suspects = short.suspects = Suspects()
    seen = []
    while long.suspects or short.suspects:
        step = bench.step(idle=True)
        seen.append({answer.number for answer in step.answers})
        bench.land(step)
    assert seen[0] == {1, 2}
    assert all(good.number not in group for group in seen)
    assert len(seen) == 2


def test_suspicion_ends_with_a_token_and_not_before() -> None:
    """What breaks stages may be in a later part of the prompt."""
    bench = Bench(tokens=8)
    answer = bench.add(12)
    group = answer.suspects = Suspects()
    answer.losses, answer.failures = 2, 1
    bench.run()
    assert (answer.suspects, answer.losses, answer.failures) == (group, 2, 1)
    bench.run()
    assert answer.suspects is None
    assert (answer.losses, answer.failures) == (0, 0)


def test_suspect_that_waits_for_another_stops_nobody() -> None:
    bench = Bench(tokens=50)
    leader, follower = leader_and_follower(bench)
    follower.suspects = Suspects()
    assert bench.step().answers == (leader,)


def test_restart_computes_all_tokens_in_a_new_sequence(bench: Bench) -> None:
    answer = bench.add(30)
    bench.run(2)
    step = bench.step()
    tokens = list(answer.token_ids)
    bench.scheduler.restart(answer)
    bench.scheduler.validate()
    assert answer.token_ids == tokens
    assert (answer.num_computed_tokens, answer.num_in_flight) == (0, 0)
    again = bench.step()
    assert again.slices[0].sequence_id != step.slices[0].sequence_id
    assert again.token_ids == tuple(tokens)
    assert bench.land(step) == [False]
    assert bench.scheduler.take_freed() == [step.slices[0].sequence_id]
    assert bench.land(again) == [True]


def test_restart_before_the_first_slice_gives_up_what_it_began_as(bench: Bench) -> None:
    """A stage lost the prefix, or the sequence: nobody may begin as either again."""
    bench.keep(range(80))
    answer = bench.add([*range(60), 1, 2])
    other = bench.answer([*range(70), 3])
    assert bench.scheduler.hit_length(other) == 70
    step = bench.step()
    bench.scheduler.restart(answer)
    bench.scheduler.abandon(step)
    assert bench.scheduler.hit_length(other) == 0
    assert sorted(bench.scheduler.take_freed()) == [1, 2]
    step = bench.step()
    assert parts(step) == [(1, 0, 62, True)]
    assert prefixes(step) == [None]


def test_restart_later_leaves_what_it_began_as_to_others(bench: Bench) -> None:
    bench.keep(range(80))
    answer = bench.add([*range(60), 1, 2])
    bench.run()
    bench.scheduler.restart(answer)
    assert bench.scheduler.hit_length(bench.answer([*range(70), 3])) == 70
    assert parts(bench.step()) == [(1, 0, 63, True)]  # but it takes no part in that


def test_restart_without_room_waits_for_the_old_sequence_to_land() -> None:
    bench = Bench(blocks=1)
    answer = bench.add(20)
    step = bench.step()
    bench.scheduler.restart(answer)
    bench.scheduler.validate()
    assert bench.scheduler.take_preempted() == [answer]
    assert answer.state is AnswerState.WAITING
    bench.scheduler.abandon(step)
    assert bench.admit(answer)
    assert parts(bench.step()) == [(0, 0, 20, True)]


def test_evacuated_answers_are_ready_to_run_elsewhere() -> None:
    bench = Bench(tokens=50)
    talker = bench.add(10)
    leader, follower = leader_and_follower(bench)
    bench.run()
    bench.step()
    answered = [list(answer.token_ids) for answer in (talker, leader, follower)]
    assert bench.scheduler.evacuate() == [talker, leader, follower]
    assert bench.scheduler.num_running == 0
    elsewhere = Bench(tokens=1000)
    for answer in (talker, leader, follower):
        assert answer.state is AnswerState.WAITING
        assert (answer.sequence_id, answer.waits_for, answer.prefix) == (None, None, None)
        assert (answer.num_computed_tokens, answer.num_scheduled_tokens) == (0, 0)
        assert (answer.num_in_flight, answer.sampling_sent) == (0, False)
        assert elsewhere.admit(answer)
    assert [list(answer.token_ids) for answer in (talker, leader, follower)] == answered
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
    eos_token_ids=tuple(range(2**31 - 17, 2**31 - 1)),
    eos_from=2**31 - 1,
    logprobs=20,
)


def encodes(step: Step) -> None:
    """Assert that the task of a step fits a message, whatever it has to carry besides."""
    spec, frame = frame_of_token_ids(step.token_ids)
    task = Task(
        epoch=Epoch(FAR),
        step=StepNumber(FAR),
        oldest=StepNumber(FAR),
        sequences=step.slices,
        tensors=(spec,),
        released=tuple(map(SequenceId, range(FAR, FAR + MAX_RELEASED))),
        timings=(StageTime(queued_us=2**31, layers_us=2**31, compute_us=2**31),) * MAX_STAGES,
    )
    assert codec.to_worker.decode(codec.encode(task, (frame,)))[0] == task


@pytest.mark.parametrize("sampling", [Sampling(), WORST])
def test_prompts_that_begin_together_fit_a_message(sampling: Sampling) -> None:
    bench = Bench(tokens=100_000, blocks=1000, first_id=FAR)
    for _ in range(200):
        bench.add(2, sampling=sampling)
    sampled = 0
    while step := bench.poll():
        encodes(step)
        sampled += step.num_samples
    assert sampled == 200


def test_prompts_that_share_a_prefix_fit_a_message() -> None:
    bench = Bench(tokens=100_000, blocks=1000, first_id=FAR)
    bench.keep(range(100))
    for number in range(300):
        bench.add([*range(90), 1000 + number, 1, 2], sampling=WORST if number % 2 else Sampling())
    sampled = 0
    while step := bench.poll():
        assert all(prefixes(step))
        encodes(step)
        sampled += step.num_samples
    assert sampled == 300


def test_answers_of_full_steps_and_prompts_fit_a_message() -> None:
    bench = Bench(sequences=1000, tokens=100_000, blocks=2000, first_id=FAR)
    for _ in range(MAX_SLICES - 5):
        bench.add(1)
    while any(not answer.num_new_tokens for answer in bench.scheduler.running):
        bench.run()
    for _ in range(20):
        bench.add(2, sampling=WORST)
    step = bench.step()
    assert len(step.slices) == MAX_SLICES
    encodes(step)


def test_answers_after_steps_were_abandoned_fit_a_message() -> None:
    """The last stage is to be told again how to pick the tokens of all of them."""
    bench = Bench(tokens=1000, first_id=FAR)
    answers = [bench.add(2, sampling=WORST) for _ in range(40)]
    while any(not answer.num_new_tokens for answer in answers):
        bench.run()
    bench.scheduler.abandon(bench.step())
    told = 0
    while step := bench.poll():
        encodes(step)
        told += sum(part.sampling is not None for part in step.slices)
    assert told == 40


# ------------------------------------------------------------------ other stages


def test_on_other_stages_it_is_told_again_how_to_sample() -> None:
    bench = Bench()
    answer = bench.add(5)
    bench.land(bench.step())
    bench.scheduler.move(100 * KV_BLOCK)
    assert answer.num_computed_tokens == 5, "what is computed stays"
    (part,) = bench.step().slices
    assert (part.start, part.num_tokens, part.sampling) == (5, 1, Sampling(seed=0))


def test_where_other_stages_have_less_room_prefixes_go_first() -> None:
    bench = Bench(blocks=4)
    ended = bench.add(2 * KV_BLOCK - 1)
    bench.land(bench.step())
    bench.land(bench.step())
    bench.scheduler.remove(ended, keep=True)
    running = bench.add(KV_BLOCK)
    assert bench.scheduler.kv_tokens_cached == 2 * KV_BLOCK
    bench.scheduler.move(2 * KV_BLOCK)
    bench.scheduler.validate()
    assert bench.scheduler.kv_tokens_cached == 0
    assert len(bench.scheduler.take_freed()) == 1
    assert (running.state, bench.scheduler.take_preempted()) == (AnswerState.RUNNING, [])


def test_where_other_stages_have_less_room_the_youngest_gives_way() -> None:
    bench = Bench(blocks=4)
    first, second = bench.add(KV_BLOCK), bench.add(KV_BLOCK)
    bench.land(bench.step())
    bench.scheduler.move(2 * KV_BLOCK)
    bench.scheduler.validate()
    assert bench.scheduler.take_preempted() == [second]
    assert (first.state, second.state) == (AnswerState.RUNNING, AnswerState.WAITING)
    assert not bench.admit(bench.answer(2 * KV_BLOCK)), "the new limit are_current"
