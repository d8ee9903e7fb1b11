"""Layers with a state of their own: where computing goes on, what is shared, and what it costs."""

from distributed_llm.common.types import KV_BLOCK, SequenceId
from distributed_llm.coordinator.kv_windows import KVWindows
from distributed_llm.coordinator.serving.kv_ledger import KVLedger
from distributed_llm.coordinator.serving.prefixes import Match
from distributed_llm.coordinator.serving.snapshots import is_wanted, stop_before
from distributed_llm.coordinator.serving.state_counts import StateCounts
from tests.unit.test_scheduler import Bench

STATE = KVWindows(state=3)
"""A state costs as much as three blocks of positions."""

PROMPT = list(range(200))
A, B, C = SequenceId(1), SequenceId(2), SequenceId(3)


def ledger(blocks: int = 100) -> KVLedger:
    return KVLedger(blocks * KV_BLOCK, STATE)


def test_a_slice_ends_where_somebody_will_go_on() -> None:
    assert stop_before(0, 512, 200, ()) == 199, "one token before the prompt ends"
    assert stop_before(0, 512, 200, {150, 40}) == 40
    assert stop_before(40, 512, 200, {150, 40}) == 150
    assert stop_before(0, 100, 200, ()) == 100, "it does not come that far"
    assert stop_before(0, 64, 64, ()) == 64, "a short prompt is computed at once"
    assert stop_before(199, 200, 200, ()) == 200


def test_snapshots_are_few() -> None:
    assert is_wanted(199, 200, (), 0)
    assert is_wanted(40, 200, {40}, 0)
    assert not is_wanted(100, 200, (), 0)
    assert not is_wanted(200, 200, (), 0), "what was computed last is kept anyway"
    assert [at for at in range(512, 4000, 512) if is_wanted(at, 4000, (), at - 512)] == []
    assert is_wanted(1024, 4000, (), 0)
    assert not is_wanted(1024, 100_000, (), 0), "eight at most, however long the prompt is"
    assert is_wanted(12_500, 100_000, (), 0)


def test_states_are_charged_from_beginning_to_end() -> None:
    book = ledger(blocks=18)
    assert book.room_tokens == (18 - 2 * 3) * KV_BLOCK, "what a new sequence could have"
    assert book.open(A, PROMPT, 200, None)
    assert book.used_tokens == (4 + 2 * 3) * KV_BLOCK
    assert book.keep_snapshot(A, 199)
    assert book.keep_snapshot(A, 199), "a step that is computed again"
    assert book.used_tokens == (4 + 3 * 3) * KV_BLOCK
    assert book.latest_snapshot(A) == 199
    assert book.keep_snapshot(A, 200)
    assert not book.keep_snapshot(A, 201), "there is room for two blocks, and a state takes three"
    book.computed(A, 200)
    book.end(A, keep=True)
    assert book.cached_tokens == book.used_tokens == (4 + 4 * 3) * KV_BLOCK
    book.validate()
    assert book.open(B, list(range(1000, 1200)), 200, None), "which takes its room"
    assert book.take_freed() == [A]
    assert book.used_tokens == (4 + 2 * 3) * KV_BLOCK
    book.validate()


def test_a_sequence_does_not_begin_without_room_for_its_states() -> None:
    assert not ledger(blocks=9).open(A, PROMPT, 200, None)
    assert ledger(blocks=10).open(A, PROMPT, 200, None)


def test_prefixes_end_where_a_state_is_kept() -> None:
    book = ledger()
    assert book.open(A, PROMPT, 200, None)
    assert book.keep_snapshot(A, 80)
    assert book.match(PROMPT, 199) is None, "nothing is computed yet"
    book.computed(A, 80)
    book.computed(A, 150)
    assert book.match(PROMPT, 199) == Match(A, 80), "it runs, and will not stay at 150"
    assert book.match(PROMPT, 79) is None
    book.end(A, keep=True)
    assert book.match(PROMPT, 199) == Match(A, 150), "it has ended there"
    assert book.match(PROMPT, 149) == Match(A, 80)
    assert book.open(B, PROMPT, 200, Match(A, 80))
    assert not book.take_freed()
    book.validate()


def test_of_several_sequences_the_one_with_the_last_state_is_shared() -> None:
    """A has more tokens in common, and B a state further on."""
    book = ledger()
    for sequence, at in ((A, 40), (B, 120)):
        tokens = PROMPT if sequence == A else [*PROMPT[:130], *range(900, 970)]
        assert book.open(sequence, tokens, 200, None)
        assert book.keep_snapshot(sequence, at)
        book.computed(sequence, 200)
    assert book.match(PROMPT, 199) == Match(B, 120)


def test_new_prices_of_states_count_for_those_there_are() -> None:
    book = ledger()
    assert book.open(A, PROMPT, 200, None)
    book.computed(A, 200)
    book.end(A, keep=True)
    assert book.open(B, list(range(1000, 1200)), 200, None)
    assert book.resize(100 * KV_BLOCK, KVWindows(state=5))
    assert book.used_tokens == 2 * (4 + 2 * 5) * KV_BLOCK
    book.validate()


def test_where_a_text_was_cut_no_state_is_kept() -> None:
    """A stop string was seen late: what came after it is not of the answer."""
    book, tokens = ledger(), list(PROMPT)
    assert book.open(A, tokens, 200, None)
    assert book.keep_snapshot(A, 120)
    book.computed(A, 200)
    del tokens[190:]
    book.end(A, keep=True)
    assert book.match(PROMPT, 199) == Match(A, 120)


# ------------------------------------------------------------------ steps


def test_one_step_at_a_time_computes_a_sequence() -> None:
    """So that what one of the steps loses can be computed again from where a state is kept."""
    bench = Bench(tokens=100, windows=STATE)
    bench.add(PROMPT)
    first = bench.step()
    assert [(part.start, part.num_tokens) for part in first.slices] == [(0, 100)]
    assert bench.poll() is None
    bench.scheduler.abandon(first)
    again = bench.step()
    assert again.slices == first.slices
    bench.land(again)
    assert [(part.start, part.num_tokens) for part in bench.step().slices] == [(100, 99)]
    plain = Bench(tokens=100)
    plain.add(PROMPT)
    plain.step()
    assert plain.poll() is not None, "chunks of other models follow each other"


def test_snapshots_of_an_abandoned_step_are_forgotten() -> None:
    """The next steps may end elsewhere, and then no stage has that state."""
    bench = Bench(tokens=500, windows=STATE)
    answer = bench.add(PROMPT)
    before = bench.scheduler.kv_tokens_used
    step = bench.step()
    assert bench.scheduler.kv_tokens_used == before + 3 * KV_BLOCK
    bench.scheduler.abandon(step)
    bench.scheduler.validate()
    assert bench.scheduler.kv_tokens_used == before
    bench.land(bench.step())
    assert bench.scheduler.hit_length(bench.answer(PROMPT)) == 199
    assert answer.num_computed_tokens == 199


def test_who_was_set_back_is_known_until_it_has_computed_more() -> None:
    """Stages may differ then: some have a state at the end of a step that others never ran."""
    bench = Bench(tokens=500, windows=STATE)
    answer = bench.add(PROMPT)
    number = answer.sequence_id
    bench.scheduler.abandon(bench.step())
    assert bench.scheduler.were_set_back == [number]
    bench.land(bench.step())
    assert bench.scheduler.were_set_back == []
    step = bench.step()
    bench.scheduler.remove(answer, keep=True)
    bench.scheduler.abandon(step)
    assert bench.scheduler.were_set_back == [number], "others may go on from where it ends"
    plain = Bench(tokens=500)
    plain.add(PROMPT)
    plain.scheduler.abandon(plain.step())
    assert plain.scheduler.were_set_back == []


def test_states_are_counted_by_when_they_can_be_sent() -> None:
    book = ledger()
    assert book.open(A, PROMPT, 200, None)
    assert book.keep_snapshot(A, 120)
    assert book.keep_snapshot(A, 199)
    assert book.open(B, [*PROMPT[:50], 1], 60, None)
    assert book.states == StateCounts(latest=2, snapshots=2, charged=6)
    book.computed(A, 200)
    book.end(A, keep=True)
    assert book.states == StateCounts(latest=1, ended=3, charged=2, charged_ended=4)
    assert KVLedger(640).states == StateCounts()


def test_who_asks_the_same_again_computes_one_token() -> None:
    bench = Bench(tokens=500, windows=STATE)
    first = bench.add(PROMPT)
    (part,) = (step := bench.step()).slices
    assert (part.num_tokens, part.snapshot, part.sample) == (199, True, False)
    bench.land(step)
    (part,) = (step := bench.step()).slices
    assert (part.start, part.num_tokens, part.snapshot, part.sample) == (199, 1, False, True)
    bench.land(step)
    second = bench.add(PROMPT)
    assert second.num_cached_tokens == 199
    bench.scheduler.remove(first, keep=True)
    bench.run()
    goes_on = bench.add([*first.token_ids, 5, 6])
    assert goes_on.num_cached_tokens == first.num_computed_tokens == 200


def test_followers_share_where_they_part() -> None:
    bench = Bench(tokens=500, windows=STATE)
    leader = bench.add(PROMPT)
    follower = bench.add([*PROMPT[:120], 7, 8, 9])
    assert follower.waits_for is leader
    (part,) = (step := bench.step()).slices
    assert (part.num_tokens, part.snapshot) == (120, True)
    bench.land(step)
    assert follower.num_cached_tokens == 120
    late = bench.add([*PROMPT[:100], 7, 8, 9])
    assert late.waits_for is None, "no state will be kept where it parts"
    assert late.num_cached_tokens == 0
    bench.step()
    same = bench.add([*PROMPT[:199], 8, 8])
    assert same.waits_for is leader, "a state is about to be kept there"
