"""The book of KV caches: what is charged, what is shared, what goes first when room is needed."""

from copy import deepcopy
from dataclasses import dataclass, field

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from distributed_llm.common.messages import SharedPrefix
from distributed_llm.common.types import KV_BLOCK, SequenceId
from distributed_llm.coordinator.kv_windows import KVWindows
from distributed_llm.coordinator.serving.kv_ledger import KVLedger
from distributed_llm.coordinator.serving.prefix_index import prefix_key
from distributed_llm.coordinator.serving.prefixes import Match
from tests.unit.test_prefixes import naive_common

TEXT = list(range(1000))
STRIDE = 16


def ledger(blocks: int = 100) -> KVLedger:
    return KVLedger(blocks * KV_BLOCK)


def compute(book: KVLedger, sequence_id: int, tokens: list[int], *, then: str = "") -> None:
    """Open a sequence, sharing what it can, and compute all of it; end it then, or free it."""
    match = book.match(tokens, len(tokens) - 1)
    assert book.open(SequenceId(sequence_id), tokens, len(tokens) + 1, match)
    book.computed(SequenceId(sequence_id), len(tokens))
    if then:
        book.end(SequenceId(sequence_id), keep=then == "keep")
    book.validate()


def blocks(book: KVLedger) -> int:
    return book.used_tokens // KV_BLOCK


# ------------------------------------------------------------------ charging


@pytest.mark.parametrize(
    ("length", "charged"),
    [(1, 1), (KV_BLOCK, 1), (KV_BLOCK + 1, 2), (3 * KV_BLOCK, 3), (3 * KV_BLOCK + 1, 4)],
)
def test_whole_blocks_are_charged(length: int, charged: int) -> None:
    book = ledger()
    assert book.open(SequenceId(1), TEXT, length, None)
    assert blocks(book) == charged
    assert book.used_tokens == charged * KV_BLOCK
    book.validate()


def test_growing_charges_a_block_when_one_is_full() -> None:
    book = ledger()
    assert book.open(SequenceId(1), TEXT, KV_BLOCK - 1, None)
    charged = []
    for length in (KV_BLOCK, KV_BLOCK + 1, KV_BLOCK + 2, 2 * KV_BLOCK, 2 * KV_BLOCK + 1):
        assert book.extend(SequenceId(1), length)
        charged.append(blocks(book))
    assert charged == [1, 2, 2, 2, 3]
    assert book.extend(SequenceId(1), 5)  # it never shrinks
    assert blocks(book) == 3


def test_capacity_counts_in_whole_blocks() -> None:
    book = KVLedger(3 * KV_BLOCK - 1)
    assert not book.open(SequenceId(1), TEXT, 2 * KV_BLOCK + 1, None)
    assert book.sequence_ids == []
    assert book.used_tokens == 0
    assert book.open(SequenceId(2), TEXT, 2 * KV_BLOCK, None)
    assert not book.extend(SequenceId(2), 2 * KV_BLOCK + 1)
    assert blocks(book) == 2
    book.validate()


def test_what_does_not_grow_leaves_no_trace() -> None:
    book = ledger(2)
    assert book.open(SequenceId(1), TEXT, KV_BLOCK, None)
    assert book.open(SequenceId(2), TEXT[7:], KV_BLOCK, None)
    assert not book.extend(SequenceId(1), KV_BLOCK + 1)
    assert blocks(book) == 2
    book.end(SequenceId(2), keep=False)
    assert book.extend(SequenceId(1), KV_BLOCK + 1)
    book.validate()


def test_end_without_keeping_frees_at_once() -> None:
    book = ledger()
    compute(book, 1, TEXT[:200])
    compute(book, 2, TEXT[500:600])
    book.end(SequenceId(1), keep=False)
    assert book.take_freed() == [1]
    assert blocks(book) == 2
    assert book.match(TEXT[:200], 199) is None
    book.end(SequenceId(2), keep=False)
    assert book.take_freed() == [2]
    assert (book.used_tokens, book.sequence_ids) == (0, [])


# ------------------------------------------------------------------ finding what is alike


def test_only_what_is_computed_is_found() -> None:
    book = ledger()
    assert book.open(SequenceId(1), TEXT[:200], 201, None)
    assert book.match(TEXT[:200], 199) is None
    book.computed(SequenceId(1), 70)
    assert book.match(TEXT[:200], 199) == Match(SequenceId(1), 70)
    book.computed(SequenceId(1), 200)
    assert book.match(TEXT[:200], 199) == Match(SequenceId(1), 199)
    assert book.match(TEXT[:200], 33) == Match(SequenceId(1), 33)


def test_tokens_that_a_sequence_gets_later_are_found() -> None:
    book = ledger()
    tokens = TEXT[:40]
    compute(book, 1, tokens)
    tokens += TEXT[40:80]
    assert book.extend(SequenceId(1), 81)
    book.computed(SequenceId(1), 80)
    assert book.match(TEXT[:100], 99) == Match(SequenceId(1), 80)


# ------------------------------------------------------------------ sharing


def test_a_running_sequence_is_shared_and_charged_once() -> None:
    book = ledger()
    compute(book, 1, TEXT[:256])
    before = blocks(book)
    child = TEXT[:200] + [7777] * 20
    match = book.match(child, len(child) - 1)
    assert match == Match(SequenceId(1), 200)
    assert book.open(SequenceId(2), child, 221, match)
    assert book.prefix_of(SequenceId(2)) == SharedPrefix(sequence_id=SequenceId(1), length=200)
    assert blocks(book) <= before + 2  # its own 21, and where the other goes on now
    book.computed(SequenceId(2), 220)
    book.validate()
    book.end(SequenceId(1), keep=False)
    assert book.take_freed() == [1]
    assert blocks(book) >= 4 + 1, "the 200 positions are still there, and with them the rest"
    book.end(SequenceId(2), keep=False)
    assert book.used_tokens == 0


def test_both_go_on_in_blocks_of_their_own() -> None:
    book = ledger()
    parent = TEXT[:KV_BLOCK]
    compute(book, 1, parent)
    child = [*parent[:-1], 7777]
    assert book.open(SequenceId(2), child, KV_BLOCK + 1, book.match(child, KV_BLOCK - 1))
    before = blocks(book)
    assert book.extend(SequenceId(1), 4 * KV_BLOCK)
    assert book.extend(SequenceId(2), 4 * KV_BLOCK)
    assert blocks(book) - before >= 2 + 3, "what they write from here is not shared"
    book.validate()


def test_an_ended_sequence_is_shared_and_stays() -> None:
    book = ledger()
    compute(book, 1, TEXT[:200], then="keep")
    child = TEXT[:128] + [7777] * 20
    assert book.open(SequenceId(2), child, 149, book.match(child, 147))
    assert book.prefix_of(SequenceId(2)) == SharedPrefix(sequence_id=SequenceId(1), length=128)
    assert blocks(book) == 4 + 1
    assert book.sequence_ids == [1, 2]
    assert book.match(TEXT[:200], 199) == Match(SequenceId(1), 199)


def test_an_ended_sequence_that_is_covered_is_taken() -> None:
    book = ledger()
    compute(book, 1, TEXT[:200], then="keep")
    assert blocks(book) == 4
    assert book.open(SequenceId(2), TEXT[:240], 241, book.match(TEXT[:240], 239))
    assert book.prefix_of(SequenceId(2)) == SharedPrefix(
        sequence_id=SequenceId(1), length=200, take=True
    )
    assert blocks(book) == 4, "it goes on where the other ended"
    assert book.sequence_ids == [2]
    assert book.take_freed() == [], "the stages end it themselves"
    book.computed(SequenceId(2), 240)
    assert book.match(TEXT[:300], 299) == Match(SequenceId(2), 240)
    book.end(SequenceId(2), keep=False)
    assert book.used_tokens == 0


def test_a_running_sequence_is_never_taken() -> None:
    book = ledger()
    compute(book, 1, TEXT[:64])
    assert book.open(SequenceId(2), TEXT[:100], 101, book.match(TEXT[:100], 99))
    prefix = book.prefix_of(SequenceId(2))
    assert prefix is not None
    assert (prefix.length, prefix.take) == (64, False)


def test_what_others_have_beyond_is_given_back() -> None:
    """The second goes on in a segment of its own, and the third shares nothing of that."""
    book = ledger()
    compute(book, 1, TEXT[:64])
    compute(book, 2, TEXT[:64] + [5000] * 640)
    before = blocks(book)
    child = TEXT[:64] + [7777] * 10
    assert book.open(SequenceId(3), child, 75, Match(SequenceId(2), 64))
    book.computed(SequenceId(3), 74)
    book.end(SequenceId(2), keep=False)
    assert blocks(book) <= before - 10 + 1
    book.end(SequenceId(1), keep=False)
    assert blocks(book) <= 2 + 2
    book.validate()


def test_a_sequence_that_shares_nothing_has_no_prefix() -> None:
    book = ledger()
    compute(book, 1, TEXT[:64])
    assert book.open(SequenceId(2), TEXT[:100], 101, None)
    assert book.prefix_of(SequenceId(2)) is None
    assert blocks(book) == 2 + 2


def test_what_does_not_fit_takes_nothing() -> None:
    book = ledger(4)
    compute(book, 1, TEXT[:64], then="keep")
    match = book.match(TEXT[:320], 319)
    assert not book.open(SequenceId(2), TEXT[:320], 321, match)
    assert book.take_freed() == []
    assert book.match(TEXT[:320], 319) == match


def test_sharing_without_room_shares_nothing() -> None:
    book = ledger(3)
    compute(book, 1, TEXT[: 2 * KV_BLOCK])  # 129 positions are charged: all three
    match = book.match(TEXT[:100], 99)
    assert match is not None
    assert not book.open(SequenceId(2), TEXT[:100], 101, match)
    assert book.sequence_ids == [1]
    assert blocks(book) == 3
    book.validate()


# ------------------------------------------------------------------ until stages know


def test_a_sequence_is_found_once_all_stages_have_it() -> None:
    """Before, only what it begins as could be shared, and stages may not know it yet."""
    book = ledger()
    compute(book, 1, TEXT[:100])
    for sequence_id in (2, 3, 4):
        match = book.match(TEXT[:100], 99)
        assert match == Match(SequenceId(1), 99)
        assert book.open(SequenceId(sequence_id), TEXT[:100], 101, match)
    book.computed(SequenceId(3), 100)
    assert book.prefix_of(SequenceId(3)) is None
    assert book.match(TEXT[:100], 99) == Match(SequenceId(3), 99)
    book.validate()


@pytest.mark.parametrize("keep", [False, True])
def test_a_prefix_is_held_until_the_other_has_begun(keep: bool) -> None:
    book = ledger(5)
    compute(book, 1, TEXT[:128])  # three blocks
    child = TEXT[:100] + [7777] * 20
    assert book.open(SequenceId(2), child, 121, book.match(child, 119))
    book.end(SequenceId(1), keep=keep)
    book.validate()
    assert book.take_freed() == []
    assert not book.resize(KV_BLOCK)
    assert book.take_freed() == [], "it may not go"
    book.computed(SequenceId(2), 101)
    assert not book.resize(KV_BLOCK)
    assert book.take_freed() == [1]
    book.validate()


def test_a_prefix_is_held_no_longer_if_the_other_never_begins() -> None:
    book = ledger(4)
    compute(book, 1, TEXT[:128], then="keep")
    child = TEXT[:100] + [7777] * 20
    assert book.open(SequenceId(2), child, 121, book.match(child, 119))
    book.end(SequenceId(2), keep=True)
    assert book.take_freed() == [2], "nothing was computed"
    book.validate()
    assert book.open(SequenceId(3), TEXT[500:], 4 * KV_BLOCK, None)
    assert book.take_freed() == [1]


def test_what_was_taken_in_vain_by_one_that_ends_is_freed() -> None:
    book = ledger()
    compute(book, 1, TEXT[:128], then="keep")
    assert book.open(SequenceId(2), TEXT[:200], 201, book.match(TEXT[:200], 199))
    book.end(SequenceId(2), keep=False)
    assert sorted(book.take_freed()) == [1, 2]
    assert book.used_tokens == 0


def test_discard_frees_what_is_only_kept() -> None:
    book = ledger()
    compute(book, 1, TEXT[:100], then="keep")
    compute(book, 2, TEXT[500:600])
    for sequence_id in (1, 2, 3):
        book.discard(SequenceId(sequence_id))
    assert book.take_freed() == [1]
    assert book.sequence_ids == [2]
    book.validate()


def test_discard_waits_for_who_is_about_to_begin() -> None:
    book = ledger()
    compute(book, 1, TEXT[:100], then="keep")
    child = TEXT[:50] + [7777] * 20
    assert book.open(SequenceId(2), child, 71, book.match(child, 69))
    book.discard(SequenceId(1))
    assert book.take_freed() == []
    assert book.match(child, 69) is None, "nobody else begins with it"
    book.validate()
    book.computed(SequenceId(2), 51)
    assert book.take_freed() == [1]
    book.validate()


# ------------------------------------------------------------------ what is kept, and what goes


def test_what_is_not_worth_keeping_is_freed() -> None:
    book = ledger()
    compute(book, 1, TEXT[: STRIDE - 1], then="keep")
    assert book.take_freed() == [1]
    assert book.open(SequenceId(2), TEXT[:100], 101, None)
    book.computed(SequenceId(2), STRIDE)
    book.end(SequenceId(2), keep=True)
    assert book.match(TEXT[:100], 99) == Match(SequenceId(2), STRIDE)


def test_what_another_covers_is_freed() -> None:
    book = ledger()
    compute(book, 1, TEXT[:200], then="keep")
    assert book.open(SequenceId(2), TEXT[:100], 101, None)
    book.computed(SequenceId(2), 100)
    book.end(SequenceId(2), keep=True)
    assert book.take_freed() == [2]
    assert book.match(TEXT[:150], 149) == Match(SequenceId(1), 149)
    book.validate()


def test_tokens_that_the_owner_dropped_are_not_found() -> None:
    """A stop string ends the answer before its last tokens."""
    book = ledger()
    tokens = TEXT[:100]
    compute(book, 1, tokens)
    del tokens[50:]
    book.end(SequenceId(1), keep=True)
    book.validate()
    assert book.match(TEXT[:200], 199) == Match(SequenceId(1), 50)
    tokens += [3] * 50
    assert book.match(tokens, 100) == Match(SequenceId(1), 50)


def test_the_least_lately_used_goes_first() -> None:
    book = ledger(6)
    for sequence_id in (1, 2, 3):
        start = 100 * sequence_id
        compute(book, sequence_id, TEXT[start : start + 64], then="keep")  # two blocks each
    child = TEXT[100:132] + [7777] * 20
    assert book.open(
        SequenceId(4), child, 53, book.match(child, 51)
    )  # of the first, which is used by that
    assert book.take_freed() == [2]
    book.end(SequenceId(4), keep=False)
    assert book.open(SequenceId(5), TEXT[500:], 3 * KV_BLOCK, None)
    assert book.take_freed() == [4, 3]
    assert book.sequence_ids == [1, 5]
    book.validate()


def test_no_more_goes_than_must() -> None:
    book = ledger(6)
    for sequence_id in (1, 2, 3):
        start = 100 * sequence_id
        compute(book, sequence_id, TEXT[start : start + 64], then="keep")
    assert book.open(SequenceId(4), TEXT[500:], 1, None)
    assert book.take_freed() == [1]
    assert book.extend(SequenceId(4), 2 * KV_BLOCK)
    assert book.take_freed() == []
    assert book.extend(SequenceId(4), 2 * KV_BLOCK + 1)
    assert book.take_freed() == [2]


def test_running_sequences_never_go() -> None:
    book = ledger(4)
    compute(book, 1, TEXT[:64])
    compute(book, 2, TEXT[100:164], then="keep")
    assert not book.open(SequenceId(3), TEXT[500:], 3 * KV_BLOCK, None)
    assert not book.resize(KV_BLOCK)
    assert book.take_freed() == [2]
    assert book.sequence_ids == [1]


def test_what_does_not_fit_costs_no_prefix() -> None:
    book = ledger(7)
    compute(book, 1, TEXT[:128])  # three blocks
    for sequence_id in (2, 3):
        start = 100 * sequence_id
        compute(book, sequence_id, TEXT[start : start + 64], then="keep")  # two each
    assert not book.open(SequenceId(4), TEXT[600:], 5 * KV_BLOCK, None)
    assert not book.extend(SequenceId(1), 8 * KV_BLOCK)
    assert book.take_freed() == []
    assert book.sequence_ids == [1, 2, 3]
    assert book.open(SequenceId(4), TEXT[600:], 4 * KV_BLOCK, None)


@pytest.mark.parametrize("common", [64, 32])
def test_a_prefix_that_is_shared_makes_no_room(common: int) -> None:
    """It is counted as kept when one asks whether the rest fits, although nobody uses it yet."""
    book = ledger(3)
    compute(book, 1, TEXT[:64], then="keep")
    prompt = TEXT[:common] + TEXT[700:900]
    match = book.match(prompt, 199)
    assert match is not None
    assert not book.open(SequenceId(2), prompt, common + 2 * KV_BLOCK + 65, match)
    assert book.take_freed() == []
    assert book.match(prompt, 199) == match


class CountingLedger(KVLedger):
    """Counts how often all that is kept is looked at."""

    looks = 0

    @property
    def cached_tokens(self) -> int:
        self.looks += 1
        return super().cached_tokens


def test_prefixes_are_trimmed_in_one_look() -> None:
    """Looking at all of them for each one that goes takes seconds for some thousands."""
    book = CountingLedger(50 * KV_BLOCK)
    for sequence_id in range(1, 51):
        compute(book, sequence_id, [sequence_id] * 40, then="keep")
    book.trim(10 * KV_BLOCK)
    assert book.take_freed() == list(range(1, 41))
    assert book.looks == 1


def test_cached_tokens_are_those_that_only_ended_sequences_hold() -> None:
    book = ledger()
    compute(book, 1, TEXT[:128])  # three blocks
    assert book.cached_tokens == 0
    book.end(SequenceId(1), keep=True)
    assert book.cached_tokens == book.used_tokens == 3 * KV_BLOCK
    child = TEXT[:100] + [7777] * 10
    assert book.open(SequenceId(2), child, 111, book.match(child, 109))
    assert book.cached_tokens == 0, "it would not be free if the ended one went"
    assert book.used_tokens == 4 * KV_BLOCK
    book.end(SequenceId(2), keep=False)
    assert book.cached_tokens == 3 * KV_BLOCK


# ------------------------------------------------------------------ against a stage


@dataclass(eq=False)
class Buffer:
    """Memory of a stage for positions from `start` on, as `worker.kv_cache` has it."""

    start: int
    owner: int
    readers: dict[int, int] = field(default_factory=dict)  # others, and where they stop reading
    capacity: int = 0
    unseen: int = 0  # first positions that layers with a window have dropped


@dataclass(eq=False)
class Kept:
    """A sequence on a stage."""

    tokens: list[int]
    buffers: list[Buffer] = field(default_factory=list)
    length: int = 0  # positions that the stage has
    computed: int = 0  # of them, positions that the coordinator knows of
    begins_at: int = 0
    room: int = 0
    ended: bool = False
    seen_from: int = 0


class Stage:
    """What a stage allocates, told in the plainest way."""

    def __init__(self, windows: KVWindows | None = None) -> None:
        self.held: dict[int, Kept] = {}
        self.windows = windows or KVWindows()

    @property
    def price(self) -> int:
        """What it would be charged if all were known."""
        buffers = {buffer: None for kept in self.held.values() for buffer in kept.buffers}
        windowed, total = self.windows.windowed, self.windows.total
        price = sum(total * buffer.capacity - windowed * buffer.unseen for buffer in buffers)
        return price // KV_BLOCK

    def drop(self, seen_from: dict[SequenceId, int]) -> None:
        for sequence_id, position in seen_from.items():
            if kept := self.held.get(sequence_id):
                kept.seen_from = max(kept.seen_from, position)
                self._drop_unseen(kept.buffers)

    def _drop_unseen(self, buffers: list[Buffer]) -> None:
        for buffer in buffers:
            seen = [kept.seen_from for kept in self.held.values() if buffer in kept.buffers]
            unseen = max(0, min(seen, default=0) - buffer.start) // KV_BLOCK * KV_BLOCK
            buffer.unseen = max(buffer.unseen, min(unseen, buffer.capacity))

    @property
    def num_blocks(self) -> int:
        buffers = {buffer: None for kept in self.held.values() for buffer in kept.buffers}
        return sum(buffer.capacity for buffer in buffers) // KV_BLOCK

    def begin(self, sequence_id: int, tokens: list[int], prefix: SharedPrefix | None) -> None:
        kept = self.held[sequence_id] = Kept(tokens)
        if prefix is not None:
            parent = self.held[prefix.sequence_id]
            assert parent.length >= prefix.length
            assert self.windows.sees(parent.seen_from, prefix.length)
            kept.seen_from = parent.seen_from
            kept.buffers = [b for b in parent.buffers if b.start < prefix.length]
            kept.length = kept.begins_at = kept.computed = prefix.length
            for buffer, following in zip(kept.buffers, [*kept.buffers[1:], None], strict=True):
                buffer.readers[sequence_id] = following.start if following else prefix.length
            if prefix.take:
                for buffer in kept.buffers:
                    if buffer.owner == prefix.sequence_id:
                        buffer.owner = sequence_id
                        del buffer.readers[sequence_id]
                self.free(prefix.sequence_id)

    def write(self, sequence_id: int, start: int, stop: int) -> None:
        kept = self.held[sequence_id]
        assert start <= kept.length
        assert self.windows.sees(kept.seen_from, start)
        chain = [b for b in kept.buffers if b.start <= start]
        last = chain[-1] if chain else None
        if last and last.owner == sequence_id and max(last.readers.values(), default=0) <= start:
            own = last
        else:
            own = Buffer(start, sequence_id)
            chain = [*(b for b in chain if b.start < start), own]
        for buffer in kept.buffers:
            if buffer not in chain:
                buffer.readers.pop(sequence_id, None)
        own.capacity = max(own.capacity, -(-(stop - own.start) // KV_BLOCK) * KV_BLOCK)
        kept.buffers, kept.length = chain, stop

    def free(self, sequence_id: int) -> None:
        buffers = self.held.pop(sequence_id).buffers
        for buffer in buffers:
            buffer.readers.pop(sequence_id, None)
        self._drop_unseen(buffers)


def begin(book: KVLedger, stage: Stage, sequence_id: int, tokens: list[int], stop: int) -> None:
    """Open a sequence, sharing what it can, and compute it up to `stop`."""
    match = book.match(tokens, len(tokens) - 1)
    assert book.open(SequenceId(sequence_id), tokens, len(tokens) + 1, match)
    prefix = book.prefix_of(SequenceId(sequence_id))
    stage.begin(sequence_id, tokens, prefix)
    run(book, stage, sequence_id, prefix.length if prefix else 0, stop)


def run(book: KVLedger, stage: Stage, sequence_id: int, start: int, stop: int) -> None:
    stage.write(sequence_id, start, stop)
    book.computed(SequenceId(sequence_id), stop)
    assert stage.num_blocks <= blocks(book)


def test_a_prompt_that_is_shared_piece_by_piece() -> None:
    """It goes on in the same buffer, whatever others read of it."""
    book, stage = ledger(), Stage()
    tokens = TEXT[:261]
    begin(book, stage, 1, tokens, 65)
    for stop in (65, 130, 195):
        begin(book, stage, stop, [*tokens[:stop], 7777, 7777], stop + 2)
        run(book, stage, 1, stop, min(stop + 65, 261))
    run(book, stage, 1, 260, 261)
    assert stage.num_blocks == blocks(book) == 5 + 3


def test_steps_abandoned_behind_a_share() -> None:
    """The stage is ahead of what is known, and computes that again once another shares it."""
    book, stage = ledger(20), Stage()
    tokens = TEXT[:272]
    begin(book, stage, 1, tokens, 16)
    stage.write(1, 16, 65)
    begin(book, stage, 2, TEXT[:16] + [7777] * 10, 26)
    for stop in range(17, 273):
        run(book, stage, 1, stop - 1, stop)
    assert stage.num_blocks == blocks(book)


def test_what_a_later_one_shares_stays_charged() -> None:
    """One shares the beginning of a long prompt that is being computed, a later one more of it."""
    book, stage = ledger(), Stage()
    tokens = TEXT[:193]
    begin(book, stage, 1, tokens, 64)
    begin(book, stage, 2, TEXT[:48] + [7777] * 10, 58)
    run(book, stage, 1, 64, 193)
    tokens += [5000] * 600
    assert book.extend(SequenceId(1), 794)
    run(book, stage, 1, 193, 793)
    begin(book, stage, 3, TEXT[:150] + [8888] * 10, 160)
    for ended in (1, 2, 3):
        book.end(SequenceId(ended), keep=False)
        stage.free(ended)
        assert stage.num_blocks <= blocks(book)
    assert book.used_tokens == 0


def test_what_goes_on_where_it_was_shared_stays_charged() -> None:
    """Who shared it is gone, so the stage goes on in the same buffer; the next one shares all."""
    book, stage = ledger(), Stage()
    tokens = TEXT[:65]
    begin(book, stage, 1, tokens, 65)
    begin(book, stage, 2, TEXT[:65] + [7777] * 5, 70)
    book.end(SequenceId(2), keep=False)
    stage.free(2)
    tokens += [5000] * 600
    assert book.extend(SequenceId(1), 666)
    run(book, stage, 1, 65, 665)
    begin(book, stage, 3, TEXT[:60] + [8888] * 10, 70)
    book.end(SequenceId(1), keep=False)
    stage.free(1)
    assert stage.num_blocks <= blocks(book)


def test_what_others_read_of_dropped_tokens_stays_charged() -> None:
    """A stop string took the last token of an answer that another one had begun with; kept as a
    prefix it is taken over whole, and the stage cannot go on where the other one reads."""
    book, stage = ledger(), Stage()
    tokens = TEXT[:19]
    begin(book, stage, 1, tokens, 19)
    begin(book, stage, 2, [*TEXT[:19], 7777, 7777], 21)
    begin(book, stage, 9, [*TEXT[:16], 9999, 9999], 18)
    del tokens[18:]
    book.end(SequenceId(1), keep=True)
    begin(book, stage, 3, [*TEXT[:18], 8888, 8888], 20)
    assert 1 not in book.sequence_ids, "it was taken"
    assert stage.num_blocks <= blocks(book)


_INDEX = st.integers(0, 1000)


class Ledger(RuleBasedStateMachine):
    """Sequences that begin alike come, are computed in pieces, and go, in any order."""

    windows = KVWindows()

    @initialize(capacity=st.sampled_from([4, 10, 20, 60, 100]))
    def start(self, capacity: int) -> None:
        self.capacity = capacity
        self.book = KVLedger(capacity * KV_BLOCK, self.windows)
        self.stage = Stage(self.windows)
        self.next_id = 1

    @property
    def running(self) -> list[int]:
        return [i for i, kept in self.stage.held.items() if not kept.ended]

    @rule(
        like=_INDEX,
        common=st.none() | st.integers(0, 300),
        length=st.integers(1, 300),
        first=st.integers(1, 150),
        shares=st.integers(0, 9).map(bool),
    )
    def open(self, like: int, common: int | None, length: int, first: int, shares: bool) -> None:
        """Begin like another one, or like all that is known to be computed of it."""
        tokens = [1000 + self.next_id] * length
        if self.stage.held:
            other = list(self.stage.held.values())[like % len(self.stage.held)]
            tokens = other.tokens[: other.computed if common is None else common] + tokens
        self._open(tokens[:600], first, shares=shares)

    @precondition(lambda self: self.running)
    @rule(index=_INDEX, count=st.integers(16, 100), back=st.sampled_from([0, 0, 0, 1, 20, 70]))
    def branch_off(self, index: int, count: int, back: int) -> None:
        """Share what was computed just now of a sequence that runs."""
        kept, sequence_id = self._pick(index)
        self._run(kept, sequence_id, count)
        self._arrive(kept, sequence_id)
        tokens = kept.tokens[: max(1, kept.computed - back)]
        self._open([*tokens, 3000 + self.next_id, 3000 + self.next_id], 1, shares=True)

    @precondition(lambda self: any(kept.ended for kept in self.stage.held.values()))
    @rule(index=_INDEX, length=st.integers(1, 100))
    def go_on(self, index: int, length: int) -> None:
        """The next turn of a conversation: mostly, what ended is taken."""
        ended = [kept for kept in self.stage.held.values() if kept.ended]
        tokens = ended[index % len(ended)].tokens[:400]
        self._open([*tokens, *[2000 + self.next_id] * length], 1, shares=True)

    def _open(self, tokens: list[int], first: int, *, shares: bool) -> None:
        match = self.book.match(tokens, len(tokens) - 1) if shares else None
        if shares:
            self._check_match(tokens, match)
        sequence_id, self.next_id = self.next_id, self.next_id + 1
        if self.book.open(SequenceId(sequence_id), tokens, len(tokens) + 1, match):
            self._free()
            prefix = self.book.prefix_of(SequenceId(sequence_id))
            self.stage.begin(sequence_id, tokens, prefix)
            kept = self.stage.held[sequence_id]
            kept.room = len(tokens) + 1
            self._run(kept, sequence_id, first)
            self._arrive(kept, sequence_id)
        else:
            used = len(tokens) // KV_BLOCK + 1 + self._blocks_of_running()
            assert match or used > self.capacity or self.windows.window, "there was room"
        self._free()

    def _blocks_of_running(self) -> int:
        return (self.book.used_tokens - self.book.cached_tokens) // KV_BLOCK

    def _check_match(self, tokens: list[int], match: Match | None) -> None:
        limit = len(tokens) - 1
        lengths = {
            i: naive_common(kept.tokens[: kept.computed], tokens[:limit])
            for i, kept in self.stage.held.items()
        }
        if self.windows.window:
            assert match is None or match.length == lengths[match.sequence_id]
            return
        best = max(lengths.values(), default=0)
        if match is None:
            assert best < STRIDE
        else:
            assert match.length == lengths[match.sequence_id]
            assert match.length >= best // STRIDE * STRIDE

    @precondition(lambda self: self.running)
    @rule(index=_INDEX, count=st.integers(1, 300), arrives=st.booleans())
    def run_a_chunk(self, index: int, count: int, arrives: bool) -> None:
        """The stage may be ahead of what the coordinator knows."""
        kept, sequence_id = self._pick(index)
        self._run(kept, sequence_id, count)
        if arrives:
            self._arrive(kept, sequence_id)

    @precondition(lambda self: self.running)
    @rule(index=_INDEX, count=st.integers(0, 300))
    def steps_are_abandoned(self, index: int, count: int) -> None:
        """The stage computes again what it was ahead of what is known, as far as it gets."""
        kept, sequence_id = self._pick(index)
        stop = min(kept.computed + count, len(kept.tokens))
        stop = self.book.reach(SequenceId(sequence_id), kept.computed, stop)
        self._free()
        if stop > kept.computed:
            self.stage.write(sequence_id, kept.computed, stop)

    @precondition(lambda self: self.running)
    @rule(index=_INDEX, count=st.integers(1, 200))
    def answer(self, index: int, count: int) -> None:
        """Compute the rest of the prompt, and tokens of the answer one by one."""
        kept, sequence_id = self._pick(index)
        before = -1
        while before < kept.length:  # in pieces, where layers with a window have little room
            before = kept.length
            self._run(kept, sequence_id, len(kept.tokens))
            self._arrive(kept, sequence_id)
        alone = len(self.running) == 1
        assert kept.length == len(kept.tokens) or not alone, "it does not get on"
        for _ in range(count if kept.length == len(kept.tokens) else 0):
            grown = self.book.extend(SequenceId(sequence_id), kept.room + 1)
            self._free()
            if not grown:
                break
            kept.room += 1
            kept.tokens.append(sequence_id)
            self._run(kept, sequence_id, 1)
            self._arrive(kept, sequence_id)

    def _pick(self, index: int) -> tuple[Kept, int]:
        sequence_id = self.running[index % len(self.running)]
        return self.stage.held[sequence_id], sequence_id

    def _run(self, kept: Kept, sequence_id: int, count: int) -> None:
        stop = min(kept.length + count, len(kept.tokens))
        stop = self.book.reach(SequenceId(sequence_id), kept.length, stop)
        self._free()
        if stop > kept.length:
            self.stage.write(sequence_id, kept.length, stop)

    def _arrive(self, kept: Kept, sequence_id: int) -> None:
        """The coordinator hears of all that was computed."""
        kept.computed = kept.length
        self.book.computed(SequenceId(sequence_id), kept.length)
        self._free()

    @precondition(lambda self: self.running)
    @rule(index=_INDEX, keep=st.integers(0, 3).map(bool), dropped=st.integers(0, 5))
    def end(self, index: int, keep: bool, dropped: int) -> None:
        kept, sequence_id = self._pick(index)
        kept.ended = True
        del kept.tokens[max(1, len(kept.tokens) - dropped) :]
        kept.tokens = kept.tokens[: kept.computed]
        kept.computed = len(kept.tokens)
        self.book.end(SequenceId(sequence_id), keep=keep)
        freed = self._free()
        assert keep or sequence_id in freed

    def _free(self) -> list[SequenceId]:
        freed = self.book.take_freed()
        for sequence_id in freed:
            assert self.stage.held[sequence_id].ended, "it runs"
            self.stage.free(sequence_id)
        self.stage.drop(self.book.take_dropped())
        return freed

    @invariant()
    def books_are_right(self) -> None:
        self.book.validate()
        assert set(self.book.sequence_ids) == set(self.stage.held)
        assert self.stage.price <= self.book._charges.used
        assert self.book.used_tokens <= self.capacity * KV_BLOCK

    @precondition(lambda self: not self.windows.window)
    @rule()
    def cached_is_what_would_be_free(self) -> None:
        rest = deepcopy(self.book)
        for sequence_id in list(rest._ended):
            rest._free(sequence_id)
        assert self.book.cached_tokens == self.book.used_tokens - rest.used_tokens

    def teardown(self) -> None:
        for sequence_id in self.running:
            self.book.end(SequenceId(sequence_id), keep=False)
        while self.book._ended:
            self.book._free(next(iter(self.book._ended)))
        assert self.book.used_tokens == 0
        self.book._prefixes.validate(())
        assert not self.book.sequence_ids


TestLedgerAndStage = Ledger.TestCase
TestLedgerAndStage.settings = settings(
    max_examples=200,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.generate, Phase.shrink),
)


class WindowedLedger(Ledger):
    """Two of three parts of the memory are in layers with a window."""

    windows = KVWindows(window=100, margin=90, windowed=2, total=3)


TestLedgerAndStageWithWindows = WindowedLedger.TestCase
TestLedgerAndStageWithWindows.settings = settings(TestLedgerAndStage.settings, max_examples=60)


def test_only_who_shares_with_each_other_shares_prefixes() -> None:
    ledger = KVLedger(1024)
    tokens = list(range(128))
    assert ledger.open(SequenceId(1), tokens, 129, None, shares_with="ann")
    ledger.computed(SequenceId(1), 128)
    ledger.end(SequenceId(1), keep=True)
    match = ledger.match(tokens, 127, "ann")
    assert match is not None
    assert match.sequence_id == 1
    for other in ("bob", None):
        assert ledger.match(tokens, 127, other) is None
        assert not ledger.may_match(prefix_key(tokens, other))
    assert ledger.may_match(prefix_key(tokens, "ann"))
