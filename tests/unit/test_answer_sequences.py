"""The sequences of answers: what they begin with, and when they end."""

import itertools
from collections.abc import Sequence

from distributed_llm.common.sampling_params import Sampling, SamplingParams
from distributed_llm.common.types import KV_BLOCK, PeerId, SequenceId
from distributed_llm.coordinator.kv_windows import KVWindows
from distributed_llm.coordinator.requests.parameters import Limits
from distributed_llm.coordinator.requests.request import Answer, Request
from distributed_llm.coordinator.serving.answer_sequences import AnswerSequences
from distributed_llm.coordinator.serving.followers import Followers
from distributed_llm.coordinator.serving.kv_ledger import KVLedger

LONG = range(200)
OTHER = range(1000, 1200)


class Bench:
    """Sequences in a KV cache with room for so many blocks."""

    def __init__(self, blocks: int = 100, windows: KVWindows | None = None) -> None:
        self.ledger = KVLedger(blocks * KV_BLOCK, windows)
        self.sequences = AnswerSequences(self.ledger, map(SequenceId, itertools.count(1)).__next__)

    def answer(self, prompt: Sequence[int], number: int = 0, shares_with: str = "") -> Answer:
        key = (PeerId(b"client"), f"r{number}", number)
        request = Request(
            key, SamplingParams(), arrived_at=0.0, client="c", shares_with=shares_with
        )
        request.accept(prompt, Limits((Sampling(seed=1),), 10, ()), number=number)
        return request.answers[0]

    def opened(self, prompt: Sequence[int], number: int = 0) -> Answer:
        answer = self.answer(prompt, number)
        assert self.sequences.open(answer)
        return answer

    def compute(self, answer: Answer, length: int) -> None:
        assert answer.sequence_id is not None
        answer.num_computed_tokens = answer.num_scheduled_tokens = length
        self.ledger.computed(answer.sequence_id, length)

    def kept(self, prompt: Sequence[int]) -> SequenceId:
        """Compute all of a prompt and keep it as a prefix for others."""
        answer = self.opened(prompt)
        sequence_id = answer.sequence_id
        assert sequence_id is not None
        self.compute(answer, len(prompt))
        self.sequences.close(answer, keep=True)
        return sequence_id


def test_an_answer_begins_with_what_another_has_computed() -> None:
    bench = Bench()
    parent = bench.kept(LONG)
    answer = bench.answer([*LONG, 7, 8], number=1)
    assert bench.sequences.hit_length(answer) == 200
    assert bench.sequences.open(answer)
    assert answer.prefix is not None
    assert (answer.prefix.sequence_id, answer.prefix.length) == (parent, 200)
    assert answer.num_computed_tokens == answer.num_scheduled_tokens == 200
    assert answer.num_cached_tokens == 200
    assert bench.sequences.take_prefix_tokens() == (402, 200)
    assert bench.sequences.take_prefix_tokens() == (0, 0)


def test_one_token_at_least_is_left_to_compute() -> None:
    bench = Bench()
    bench.kept(LONG)
    assert bench.sequences.hit_length(bench.answer(LONG, number=1)) == 199


def test_an_answer_that_shares_none_begins_without_a_prefix() -> None:
    bench = Bench()
    bench.kept(LONG)
    answer = bench.answer([*LONG, 7], number=1)
    answer.shares = False
    assert bench.sequences.open(answer)
    assert answer.prefix is None
    assert answer.num_computed_tokens == 0


def test_without_room_for_what_it_shares_an_answer_computes_all_itself() -> None:
    """What it would share keeps a block more in memory than it needs."""
    bench = Bench(blocks=4)
    bench.kept(range(256 - 1))
    answer = bench.answer([*range(100), *[7] * 140], number=1)
    assert bench.sequences.hit_length(answer) == 100
    assert bench.sequences.open(answer)
    assert answer.prefix is None


def test_without_any_room_an_answer_gets_no_sequence() -> None:
    bench = Bench(blocks=3)
    answer = bench.answer(LONG)
    assert not bench.sequences.open(answer)
    assert answer.sequence_id is None
    assert bench.sequences.take_prefix_tokens() == (0, 0)


def test_a_sequence_ends_when_the_last_step_that_computes_it_has() -> None:
    bench = Bench()
    answer = bench.opened(LONG)
    sequence_id = answer.sequence_id
    assert sequence_id is not None
    bench.sequences.step_began(sequence_id)
    bench.sequences.step_began(sequence_id)
    answer.num_in_flight = 2
    bench.sequences.validate([answer])
    bench.sequences.close(answer, keep=False)
    assert answer.sequence_id is None
    bench.sequences.step_ended(sequence_id)
    bench.sequences.validate([answer])
    assert bench.ledger.take_freed() == []
    assert bench.sequences.are_computed
    bench.sequences.step_ended(sequence_id)
    assert bench.ledger.take_freed() == [sequence_id]
    assert not bench.sequences.are_computed
    bench.sequences.close(answer, keep=False)  # it has none any more
    assert bench.ledger.take_freed() == []


def test_a_sequence_is_kept_after_its_steps_as_it_was_said() -> None:
    bench = Bench()
    answer = bench.opened(LONG)
    sequence_id = answer.sequence_id
    assert sequence_id is not None
    bench.compute(answer, 200)
    bench.sequences.step_began(sequence_id)
    bench.sequences.close(answer, keep=True)
    bench.sequences.step_ended(sequence_id)
    assert bench.ledger.take_freed() == []
    assert bench.sequences.hit_length(bench.answer([*LONG, 7], number=1)) == 200


def test_a_prefix_that_a_stage_may_have_lost_is_no_longer_kept() -> None:
    bench = Bench()
    parent = bench.kept(LONG)
    answer = bench.opened([*LONG[:150], 7], number=1)
    child = answer.sequence_id
    bench.sequences.close_lost(answer)
    assert set(bench.ledger.take_freed()) == {parent, child}


def test_a_prefix_that_all_stages_went_on_from_is_kept() -> None:
    bench = Bench()
    parent = bench.kept(LONG)
    answer = bench.opened([*LONG[:150], *OTHER], number=1)
    bench.compute(answer, 160)
    bench.sequences.close_lost(answer)
    assert parent not in bench.ledger.take_freed()


def test_others_go_on_from_a_position_at_which_a_state_can_be_kept() -> None:
    bench = Bench(windows=KVWindows(state=1))
    answer = bench.opened(LONG)
    answer.num_scheduled_tokens = 100
    assert not bench.sequences.may_go_on_from(answer, 80)
    assert bench.sequences.may_go_on_from(answer, 101)
    assert bench.sequences.keep_snapshot(answer, 80, {80})
    assert bench.sequences.may_go_on_from(answer, 80)
    assert Bench().sequences.may_go_on_from(answer, 80), "positions are enough without states"


def test_steps_end_where_a_state_is_to_be_kept() -> None:
    bench = Bench(windows=KVWindows(state=1))
    answer = bench.opened(LONG)
    assert bench.sequences.until_snapshot(answer, 200, ()) == 199
    assert bench.sequences.until_snapshot(answer, 200, {120}) == 120
    assert Bench().sequences.until_snapshot(answer, 200, {120}) == 200
    assert not bench.sequences.keep_snapshot(answer, 100, ())
    assert not Bench().sequences.keep_snapshot(answer, 199, ())


# ------------------------------------------------------------------ who waits for whom


def test_an_answer_follows_who_computes_the_most_of_its_beginning() -> None:
    bench = Bench()
    followers = Followers(bench.sequences)
    short, long = bench.opened([*LONG[:80], *OTHER]), bench.opened([*LONG[:90], *OTHER], number=1)
    running = [short, long, bench.opened(OTHER, number=2)]
    assert followers.leader_for(bench.answer(LONG, number=3), running) == (long, 90)
    stranger = bench.answer(LONG, number=3, shares_with="somebody")
    assert followers.leader_for(stranger, running)[0] is None
    alone = bench.answer(LONG, number=3)
    alone.shares = False
    assert followers.leader_for(alone, running)[0] is None
    bench.compute(long, len(long.token_ids) - 1)
    assert followers.leader_for(bench.answer(LONG, number=3), running)[0] is None, "it is there"


def test_a_short_beginning_is_not_worth_waiting_for() -> None:
    bench = Bench()
    followers = Followers(bench.sequences)
    running = [bench.opened([*LONG[:63], *OTHER])]
    assert followers.leader_for(bench.answer(LONG, number=1), running)[0] is None


def test_nobody_follows_who_waits_itself() -> None:
    bench = Bench()
    followers = Followers(bench.sequences)
    leader, waits = bench.opened(LONG), bench.answer([*LONG, 1, 2], number=1)
    followers.add(waits, leader, 199)
    assert followers.awaited(leader) == {199}
    third = bench.answer([*LONG, 1, 3], number=2)
    assert followers.leader_for(third, [waits, leader]) == (leader, 200)
    bench.compute(leader, 198)
    assert followers.take_ready(leader, everyone=False) == []
    bench.compute(leader, 199)
    assert followers.take_ready(leader, everyone=False) == [waits]
    assert waits.waits_for is None
