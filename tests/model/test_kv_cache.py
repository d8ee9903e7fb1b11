"""The KV cache against lists of numbers, under any order of steps, failures, shares, releases."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from distributed_llm.common.messages import SequenceSlice, SharedPrefix
from distributed_llm.common.types import KV_BLOCK, SequenceId
from distributed_llm.worker.kv.cache import KVCache, KVCacheFull, as_token_ids

LAYERS, HEADS, KEY_DIM, VALUE_DIM = 3, 2, 4, 6
TOKEN_BYTES = LAYERS * HEADS * (KEY_DIM + VALUE_DIM) * 4
BLOCK_BYTES = KV_BLOCK * TOKEN_BYTES
IDS = st.integers(0, 4)
MAX_BLOCKS = 14


def blocks(positions: int) -> int:
    return math.ceil(positions / KV_BLOCK)


class Charges:
    """What a bookkeeper charges, in positions: segments of sequences and who reads them how far.

    A sequence goes on in its last segment if that is its own, beyond what others read of it; else
    in a new one.
    """

    def __init__(self) -> None:
        self.chains: dict[int, list[int]] = {}  # segments by sequence
        self.starts: dict[int, int] = {}  # by segment
        self.owners: dict[int, int] = {}  # by segment
        self.lengths: dict[int, int] = {}  # the most that there ever was, by segment
        self.reads: dict[tuple[int, int], int] = {}  # by sequence and segment, of what it shares
        self.next_segment = 0

    def step(self, sequence_id: int, start: int, stop: int) -> None:
        before = self.chains.get(sequence_id, [])
        chain = [s for s in before if self.starts[s] <= start]
        if not chain or not self.may_write(chain[-1], sequence_id, start):
            self.next_segment += 1
            chain = [*(s for s in chain if self.starts[s] < start), self.next_segment]
            self.starts[self.next_segment] = start
            self.owners[self.next_segment] = sequence_id
            self.lengths[self.next_segment] = 0
        for segment in before:
            if segment not in chain:
                self.leave(segment, sequence_id)
        last = chain[-1]
        self.lengths[last] = max(self.lengths[last], stop - self.starts[last])
        self.chains[sequence_id] = chain

    def may_write(self, segment: int, sequence_id: int, start: int) -> bool:
        others = [i for i, chain in self.chains.items() if segment in chain and i != sequence_id]
        owns = self.owners.get(segment) == sequence_id
        return owns and all(self.reads[i, segment] <= start for i in others)

    def share(self, child: int, parent: int, length: int) -> None:
        chain = [s for s in self.chains[parent] if self.starts[s] < length]
        for segment, stop in zip(
            chain, [*(self.starts[s] for s in chain[1:]), length], strict=True
        ):
            self.reads[child, segment] = stop
        self.chains[child] = chain

    def take(self, child: int, parent: int) -> None:
        for segment in self.chains[child] if parent in self.chains else ():
            if self.owners.get(segment) == parent:
                self.owners[segment] = child
        self.free(parent)

    def free(self, sequence_id: int) -> None:
        for segment in self.chains.pop(sequence_id, ()):
            self.leave(segment, sequence_id)

    def leave(self, segment: int, sequence_id: int) -> None:
        if self.owners.get(segment) == sequence_id:
            del self.owners[segment]

    def blocks(self) -> int:
        held = {segment for chain in self.chains.values() for segment in chain}
        return sum(blocks(self.lengths[segment]) for segment in held)


class Driver:
    """A cache, and what it should hold: each position's key is a fresh number, so mix-ups show."""

    in_pages = False

    def __init__(self, max_blocks: int | None = None, *, in_pages: bool | None = None) -> None:
        self.cache = KVCache(
            LAYERS,
            None if max_blocks is None else max_blocks * BLOCK_BYTES,
            in_pages=self.in_pages if in_pages is None else in_pages,
        )
        self.model: dict[int, list[int]] = {}
        self.charges = Charges()
        self.next_number = 0

    def fresh(self, count: int) -> list[int]:
        self.next_number += count
        return list(range(self.next_number - count, self.next_number))

    def begin(self, sequence_id: int, start: int, numbers: list[int]) -> None:
        self.cache.begin(SequenceId(sequence_id), start, as_token_ids(numbers))
        self.model[sequence_id] = self.model.get(sequence_id, [])[:start]
        self.charges.step(sequence_id, start, start + len(numbers))

    def append(self, layer: int, sequence_id: int, start: int, numbers: list[int]) -> list[Any]:
        column = torch.tensor(numbers, dtype=torch.float32)[None, :, None] + layer / 8
        segments = self.cache.append(
            layer,
            SequenceId(sequence_id),
            start,
            column.expand(HEADS, -1, KEY_DIM),
            -column.expand(HEADS, -1, VALUE_DIM),
        )
        assert segments[-1].keys.shape[1] >= len(numbers)
        keys = torch.cat([segment.keys for segment in segments], dim=1)
        values = torch.cat([segment.values for segment in segments], dim=1)
        assert keys.shape == (HEADS, start + len(numbers), KEY_DIM)
        assert values.shape == (HEADS, start + len(numbers), VALUE_DIM)
        assert torch.equal(values[..., :KEY_DIM], -keys)
        assert bool((keys == keys[:1, :, :1]).all())
        return (keys[0, :, 0] - layer / 8).tolist()

    def step(self, sequence_id: int, count: int, start: int | None = None) -> None:
        """Compute `count` positions from `start` on; default: from where the sequence ends."""
        if start is None:
            start = self.cache.length(SequenceId(sequence_id))
        numbers = self.fresh(count)
        self.begin(sequence_id, start, numbers)
        self.finish(sequence_id, start, numbers)

    def finish(self, sequence_id: int, start: int, numbers: list[int]) -> None:
        for layer in range(LAYERS):
            seen = self.append(layer, sequence_id, start, numbers)
            assert seen == self.model[sequence_id] + numbers
        self.cache.commit(SequenceId(sequence_id), start + len(numbers))
        self.model[sequence_id] += numbers

    def share(self, child: int, parent: int, length: int) -> None:
        self.cache.share(SequenceId(child), SequenceId(parent), length)
        self.model[child] = self.model[parent][:length]
        self.charges.share(child, parent, length)

    def take(self, child: int, parent: int, length: int) -> None:
        self.cache.admit([slice_of(child, length, 1, parent, take=True)])
        self.model[child] = self.model.pop(parent)[:length]
        self.charges.share(child, parent, length)
        self.charges.take(child, parent)

    def free(self, *sequence_ids: int) -> None:
        self.cache.free(map(SequenceId, sequence_ids))
        for sequence_id in sequence_ids:
            self.model.pop(sequence_id, None)
            self.charges.free(sequence_id)


@pytest.fixture(params=["buffers", "pages"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every test with both kinds of memory."""
    monkeypatch.setattr(Driver, "in_pages", request.param == "pages")


both = pytest.mark.usefixtures("memory")  # not for all: machines take no parameters


class CacheMachine(RuleBasedStateMachine):
    """Any order of what a stage does, one sequence or several at a time."""

    in_pages = False

    def __init__(self) -> None:
        super().__init__()
        self.driver = Driver(MAX_BLOCKS, in_pages=self.in_pages)
        self.cache, self.model = self.driver.cache, self.driver.model
        self.driver.step(0, 1)  # as a stage warms up: the limit counts from here on
        self.driver.free(0)

    def admit(self, *step: SequenceSlice) -> bool:
        """Admit a step; when refused, rightly so, and nothing has changed."""
        charges = self.driver.charges
        before = (self.cache.nbytes, self.cache.capacity, dict(self.model))
        try:
            self.cache.admit(step)
        except KVCacheFull:
            assert (self.cache.nbytes, self.cache.capacity, self.model) == before
            cut = [part for part in step if part.start < self.cache.length(part.sequence_id)]
            assert self.would_charge(step) > MAX_BLOCKS or len(cut) > 1
            return False
        for part in step:
            if part.prefix and part.sequence_id not in self.model:
                parent, length = part.prefix.sequence_id, part.prefix.length
                self.model[part.sequence_id] = self.model[parent][:length]
                charges.share(part.sequence_id, parent, length)
        for part in step:
            if part.prefix and part.prefix.take:
                self.model.pop(part.prefix.sequence_id, None)
                charges.take(part.sequence_id, part.prefix.sequence_id)
        return True

    def would_charge(self, step: Iterable[SequenceSlice]) -> int:
        charges = Charges()
        charges.chains = dict(self.driver.charges.chains)
        charges.starts = dict(self.driver.charges.starts)
        charges.owners = dict(self.driver.charges.owners)
        charges.lengths = dict(self.driver.charges.lengths)
        charges.reads = dict(self.driver.charges.reads)
        charges.next_segment = self.driver.charges.next_segment
        step = list(step)
        for part in step:
            if part.prefix and part.sequence_id not in charges.chains:
                charges.share(part.sequence_id, part.prefix.sequence_id, part.prefix.length)
        for part in step:
            if part.prefix and part.prefix.take:
                charges.take(part.sequence_id, part.prefix.sequence_id)
        for part in step:
            charges.step(part.sequence_id, part.start, part.start + part.num_tokens)
        return charges.blocks()

    def run(self, parts: list[SequenceSlice], layers: int) -> None:
        """Run a step; it fails after `layers` of them, or succeeds if that is all."""
        if not self.admit(*parts):
            return
        numbers = [self.driver.fresh(part.num_tokens) for part in parts]
        for part, own in zip(parts, numbers, strict=True):
            self.driver.begin(part.sequence_id, part.start, own)
        for part, own in zip(parts, numbers, strict=True):
            if layers == LAYERS:
                self.driver.finish(part.sequence_id, part.start, own)
            else:
                for layer in range(layers):
                    self.driver.append(layer, part.sequence_id, part.start, own)

    @rule(
        sequence_ids=st.lists(IDS, min_size=1, max_size=3, unique=True),
        count=st.integers(1, 150),
        back=st.integers(0, 80),
        layers=st.sampled_from([LAYERS, LAYERS, *range(LAYERS)]),
    )
    def step(self, sequence_ids: list[int], count: int, back: int, layers: int) -> None:
        parts = [
            SequenceSlice(
                sequence_id=SequenceId(sequence_id),
                start=max(0, self.cache.length(SequenceId(sequence_id)) - back),
                num_tokens=count,
            )
            for sequence_id in sequence_ids
        ]
        self.run(parts, layers)

    @precondition(lambda self: any(self.model.values()) and len(self.model) < 5)
    @rule(
        data=st.data(),
        count=st.integers(1, 150),
        take=st.booleans(),
        layers=st.sampled_from([LAYERS, LAYERS, *range(LAYERS)]),
    )
    def share(self, data: st.DataObject, count: int, take: bool, layers: int) -> None:
        parents = sorted(i for i, numbers in self.model.items() if numbers)
        parent = data.draw(st.sampled_from(parents))
        held = len(self.model[parent])
        length = data.draw(st.integers(1, held) | st.just(held))
        child = data.draw(st.sampled_from([i for i in range(5) if i not in self.model]))
        prefix = SharedPrefix(sequence_id=SequenceId(parent), length=length, take=take)
        part = SequenceSlice(
            sequence_id=SequenceId(child), start=length, num_tokens=count, prefix=prefix
        )
        self.run([part], layers)
        if child in self.model:
            again = SequenceSlice(
                sequence_id=SequenceId(child), start=length, num_tokens=count, prefix=prefix
            )
            self.run([again], layers)

    @rule(sequence_ids=st.lists(IDS))
    def free(self, sequence_ids: list[int]) -> None:
        self.driver.free(*sequence_ids)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def start_beyond_what_is_held(self, data: st.DataObject) -> None:
        sequence_id = data.draw(st.sampled_from(sorted(self.model)))
        with pytest.raises(ValueError, match="has no position"):
            self.cache.begin(
                SequenceId(sequence_id), len(self.model[sequence_id]) + 1, as_token_ids([1])
            )

    @invariant()
    def counts_and_tokens_are_those_of_finished_steps(self) -> None:
        assert set(self.cache.sequence_ids) == set(self.model)
        for sequence_id, numbers in self.model.items():
            assert self.cache.length(SequenceId(sequence_id)) == len(numbers)
            assert self.cache.tokens(SequenceId(sequence_id), len(numbers)).tolist() == numbers

    @invariant()
    def memory_is_what_is_charged(self) -> None:
        charged = self.driver.charges.blocks()
        assert self.cache.capacity == charged * KV_BLOCK
        assert self.cache.nbytes <= charged * BLOCK_BYTES <= MAX_BLOCKS * BLOCK_BYTES
        assert self.cache.bytes_per_token == TOKEN_BYTES

    @invariant()
    def blocks_have_one_owner_and_take_no_more_than_the_limit(self) -> None:
        taken = [number for s in self.cache._segments for both in s.blocks for number in both]
        assert len(set(taken)) == len(taken)
        if self.in_pages:
            assert len(taken) * KV_BLOCK == self.cache.capacity
            assert 0 not in taken
            assert self.cache.memory_bytes <= (MAX_BLOCKS + 1) * BLOCK_BYTES
        else:
            assert not taken
            assert self.cache.memory_bytes == self.cache.nbytes

    def teardown(self) -> None:
        for sequence_id in sorted(self.model):
            # What every sequence holds is right to the end, whatever became of the others.
            start = len(self.model[sequence_id])
            self.driver.step(sequence_id, 1, start)
            self.driver.free(sequence_id)
        assert (self.cache.nbytes, self.cache.capacity, self.cache.sequence_ids) == (0, 0, ())


CacheMachine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=25, deadline=None, derandomize=True
)
TestCache = CacheMachine.TestCase


class PagesMachine(CacheMachine):
    """The same, in pages."""

    in_pages = True


PagesMachine.TestCase.settings = settings(CacheMachine.TestCase.settings, max_examples=50)
TestPages = PagesMachine.TestCase


@both
def test_sequences_of_one_prefix_hold_it_once() -> None:
    driver = Driver()
    driver.step(0, 5 * KV_BLOCK)
    for child in (1, 2, 3):
        driver.share(child, 0, 5 * KV_BLOCK)
    assert driver.cache.nbytes == 5 * BLOCK_BYTES
    for child in (1, 2, 3):
        driver.step(child, 1)
    assert driver.cache.nbytes == 8 * BLOCK_BYTES
    driver.free(0, 1)
    assert driver.cache.nbytes == 7 * BLOCK_BYTES
    driver.free(2)
    driver.step(3, KV_BLOCK)
    driver.free(3)
    assert driver.cache.nbytes == 0


@both
def test_a_parent_goes_on_and_back_without_its_children_noticing() -> None:
    driver = Driver()
    driver.step(0, 100)
    driver.share(1, 0, 80)
    driver.step(0, 50)
    driver.step(0, 70, start=30)
    driver.step(1, 10)
    driver.step(0, 70, start=0)
    driver.step(1, 10)
    driver.step(0, 10)


@both
def test_conversations_that_take_over_their_last_turn_stay_one_segment() -> None:
    driver = Driver()
    driver.step(0, 50)
    for turn in range(1, 30):
        driver.take(turn, turn - 1, 50 * turn)
        driver.step(turn, 50)
    driver.cache.begin(SequenceId(29), 1500, as_token_ids([0]))
    keys, values = torch.zeros(HEADS, 1, KEY_DIM), torch.zeros(HEADS, 1, VALUE_DIM)
    assert len(driver.cache.append(0, SequenceId(29), 1500, keys, values)) == 1
    assert driver.cache.capacity == blocks(1501) * KV_BLOCK


@both
def test_memory_is_exactly_the_blocks_that_are_needed() -> None:
    driver = Driver()
    for position in range(1, 400):
        driver.step(7, 1)
        assert driver.cache.nbytes == blocks(position) * BLOCK_BYTES


def slice_of(
    sequence_id: int, start: int, count: int, parent: int | None = None, *, take: bool = False
) -> SequenceSlice:
    prefix = None
    if parent is not None:
        prefix = SharedPrefix(sequence_id=SequenceId(parent), length=start, take=take)
    return SequenceSlice(
        sequence_id=SequenceId(sequence_id), start=start, num_tokens=count, prefix=prefix
    )


@both
def test_a_step_that_does_not_fit_as_a_whole_is_refused() -> None:
    driver = Driver(max_blocks=4)
    driver.step(0, 2 * KV_BLOCK)
    fits = [slice_of(0, 2 * KV_BLOCK, 1), slice_of(1, 0, KV_BLOCK)]
    driver.cache.admit(fits)
    with pytest.raises(KVCacheFull, match=r"needs \d+ bytes more than its limit"):
        driver.cache.admit([*fits, slice_of(2, 0, 1)])
    with pytest.raises(KVCacheFull) as caught:
        driver.cache.admit([slice_of(2, 100, 3 * KV_BLOCK, parent=0)])
    assert caught.value.code == "kv_full"
    assert driver.cache.sequence_ids == (0,)
    driver.step(0, 2 * KV_BLOCK)  # the refused child left nothing that would be in the way
    assert driver.cache.capacity == 4 * KV_BLOCK


@both
def test_what_is_taken_makes_room() -> None:
    driver = Driver(max_blocks=4)
    driver.step(0, 4 * KV_BLOCK)
    with pytest.raises(KVCacheFull):
        driver.cache.admit([slice_of(1, 2 * KV_BLOCK, 2 * KV_BLOCK, parent=0)])
    step = [slice_of(1, 2 * KV_BLOCK, 2 * KV_BLOCK, parent=0, take=True)]
    driver.cache.admit(step)
    driver.cache.admit(step)
    assert driver.cache.sequence_ids == (1,)


@both
def test_what_is_taken_goes_on_in_place_unless_others_read_there() -> None:
    """Five positions of it are read by another; the taker begins beyond them, or before."""
    for start, capacity in ((5, 2), (4, 2 + 2)):
        driver = Driver()
        driver.step(0, 2 * KV_BLOCK)
        driver.share(1, 0, 5)
        driver.cache.admit([slice_of(2, start, 2 * KV_BLOCK - 5, parent=0, take=True)])
        driver.cache.begin(SequenceId(2), start, as_token_ids([0] * (2 * KV_BLOCK - 5)))
        assert driver.cache.capacity == capacity * KV_BLOCK


@both
def test_one_that_is_shared_goes_on_in_place() -> None:
    driver = Driver()
    driver.step(0, 10)
    driver.share(1, 0, 10)
    driver.step(0, KV_BLOCK - 10)
    assert driver.cache.capacity == KV_BLOCK
    driver.step(0, 10, start=9)  # what the other reads is not overwritten
    assert driver.cache.capacity == 2 * KV_BLOCK
    driver.step(1, 1)


@both
def test_who_shares_beyond_what_was_shared_is_not_in_the_way() -> None:
    driver = Driver()
    driver.step(0, 10)
    driver.share(1, 0, 5)
    driver.step(1, 100)
    driver.share(2, 1, 100)  # five positions of the first one, the rest of the second
    driver.step(0, KV_BLOCK - 10)
    assert driver.cache.capacity == (1 + 2) * KV_BLOCK


def test_only_a_new_sequence_shares_and_only_what_there_is() -> None:
    driver = Driver()
    driver.step(0, 10)
    driver.step(1, 10)
    for child, parent, length in ((1, 0, 5), (2, 0, 11), (2, 5, 1)):
        with pytest.raises(ValueError, match=f"cannot begin as {length} positions of {parent}"):
            driver.cache.share(SequenceId(child), SequenceId(parent), length)


def test_an_unknown_sequence_has_nothing() -> None:
    cache = KVCache(1)
    assert cache.length(SequenceId(5)) == 0
    assert SequenceId(5) not in cache
    cache.free([SequenceId(5)])
    with pytest.raises(ValueError, match="sequence 5 has no position 0"):
        cache.begin(SequenceId(5), 1, np.zeros(1, dtype=np.int32))
