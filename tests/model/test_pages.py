"""Pages: who gets which blocks, and what tensors they take."""

from typing import Any

import pytest
import torch

from distributed_llm.common.types import KV_BLOCK, SequenceId
from distributed_llm.worker.kv.blocks import Blocks
from distributed_llm.worker.kv.cache import KVCache, as_token_ids
from distributed_llm.worker.kv.pages import LayerPages

HEADS, DIM = 2, 4
BLOCK_BYTES = KV_BLOCK * HEADS * 2 * DIM * 4
"""Of one layer."""


class Caches:
    """A cache with layers of both kinds, and the numbers that each sequence should hold."""

    def __init__(self, windows: tuple[int, ...], max_blocks: int | None = None) -> None:
        """Have room for so many blocks of all layers."""
        self.cache = KVCache(len(windows), in_pages=True)
        self.step(99, 0, 1)
        self.cache.free([SequenceId(99)])
        self.cache.windows = windows
        if max_blocks is not None:
            self.cache.max_bytes = max_blocks * len(windows) * BLOCK_BYTES
        self.held: dict[int, list[float]] = {}

    @property
    def pages(self) -> LayerPages:
        assert self.cache.pages
        return self.cache.pages

    def step(self, number: int, start: int, count: int) -> None:
        self.cache.begin(SequenceId(number), start, as_token_ids([0] * count))
        self.compute(number, start, count)

    def compute(self, number: int, start: int, count: int) -> None:
        """Write what a step computes that has begun."""
        sequence = SequenceId(number)
        column = (torch.arange(start, start + count) + 1000.0 * number)[None, :, None]
        for layer in range(len(self.cache.windows)):
            keys = (column + layer / 8).expand(HEADS, -1, DIM)
            with torch.inference_mode():  # as layers of a stage do
                self.cache.append(layer, sequence, start, keys, -keys)
        self.cache.commit(sequence, start + count)

    def check(self, number: int, length: int, unseen: int = 0) -> None:
        """Fail unless all is held of a sequence that has one segment."""
        (segment,) = self.cache.segments(SequenceId(number))
        for layer, window in enumerate(self.cache.windows):
            first = unseen if window else 0
            held = self.cache.read(layer, segment, first, length)
            expected = torch.arange(first, length) + 1000.0 * number + layer / 8
            assert torch.equal(held.keys[1, :, 3], expected)
            assert torch.equal(held.values, -held.keys)

    def runs(self, number: int, length: int) -> int:
        """Return in how many pieces a sequence lies."""
        (segment,) = self.cache.segments(SequenceId(number))
        return len(self.pages.runs(segment, 0, length, windowed=False))


def test_sequences_that_grow_in_turns_lie_in_few_pieces() -> None:
    made = Caches((0,))
    for position in range(0, 40 * KV_BLOCK, KV_BLOCK // 2):
        for number in range(5):
            made.step(number, position, KV_BLOCK // 2)
    for number in range(5):
        made.check(number, 40 * KV_BLOCK)
        assert made.runs(number, 40 * KV_BLOCK) <= 5, "4, 4, 8, 16 blocks, and the rest"


def test_memory_that_is_short_is_used_to_the_last_block() -> None:
    made = Caches((0,), max_blocks=20)
    for number in range(20):
        made.step(number, 0, 1)
    for number in range(0, 20, 2):
        made.cache.free([SequenceId(number)])
    made.step(50, 0, 10 * KV_BLOCK)
    made.check(50, 10 * KV_BLOCK)
    assert made.runs(50, 10 * KV_BLOCK) > 5
    assert made.cache.memory_bytes == (20 + 1) * BLOCK_BYTES
    for number in range(1, 20, 2):
        made.check(number, 1)


def test_tensors_are_replaced_a_few_times_only() -> None:
    made = Caches((0,))
    before = made.pages.generation
    for start in range(0, 200 * KV_BLOCK, KV_BLOCK):
        made.step(0, start, KV_BLOCK)
    made.check(0, 200 * KV_BLOCK)
    assert made.pages.generation - before <= 12
    assert made.cache.memory_bytes <= 1.3 * 200 * BLOCK_BYTES
    made.cache.free([SequenceId(0)])
    assert made.cache.memory_bytes > 0
    assert made.cache.nbytes == 0
    made.cache.give_back()
    assert made.cache.memory_bytes == 0


def test_values_are_kept_in_the_dtype_of_keys() -> None:
    """Rotary positions make keys float32 in some models."""
    cache = KVCache(1, in_pages=True)
    for number in range(2):
        cache.begin(SequenceId(number), 0, as_token_ids([0]))
    keys = torch.ones(HEADS, 2, DIM)
    cache.append_tokens(0, [(SequenceId(0), 0), (SequenceId(1), 0)], keys, keys.bfloat16() * 3)
    for number in range(2):
        (segment,) = cache.segments(SequenceId(number))
        held = cache.read(0, segment, 0, 1)
        assert held.values.dtype == torch.float32
        assert bool((held.values == 3).all())


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_step_for_which_tensors_could_not_grow_may_be_tried_again(
    failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device is out of memory at keys, at values, or at the second layer."""
    made = Caches((0, 0))
    made.step(0, 0, 20 * KV_BLOCK)
    calls = 0

    def zeros(*args: Any, **options: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise torch.OutOfMemoryError("too little")
        return torch.Tensor.new_zeros(torch.empty(0, **options), *args)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", zeros)
        with pytest.raises(torch.OutOfMemoryError):
            made.step(1, 0, 10)
    made.step(0, 20 * KV_BLOCK, 100)
    made.step(1, 0, 10)
    made.check(0, 20 * KV_BLOCK + 100)
    made.check(1, 10)
    made.cache.free([SequenceId(0), SequenceId(1)])
    assert made.cache.capacity == 0


def test_pages_are_closed_up_between_steps_though_they_were_made_in_one() -> None:
    """Tensors that torch makes while nothing is differentiated can only be written there."""
    made = Caches((0,))
    for number, count in ((0, 640), (1, 100)):
        made.cache.begin(SequenceId(number), 0, as_token_ids([0] * count))
    made.compute(0, 0, 640)
    made.compute(1, 0, 100)
    made.cache.free([SequenceId(0)])
    made.pages.trim(made.cache._segments)
    assert made.cache.memory_bytes == (2 + 1) * BLOCK_BYTES
    made.check(1, 100)


def test_layers_with_a_window_and_others_share_the_limit() -> None:
    """First many short sequences take all, half of it in layers with a window; then one takes it
    that has nearly nothing in these."""
    made = Caches((0, 16), max_blocks=40)
    for number in range(40):
        made.step(number, 0, KV_BLOCK)
    assert made.cache.memory_bytes <= (40 + 1) * 2 * BLOCK_BYTES
    made.cache.free([SequenceId(number) for number in range(1, 40)])
    length = 0
    while length < 60 * KV_BLOCK:
        made.step(50, length, KV_BLOCK)
        length += KV_BLOCK
        made.cache.forget({SequenceId(50): length - 16})
        assert made.cache.memory_bytes <= (40 + 1) * 2 * BLOCK_BYTES
    made.check(50, length, length - KV_BLOCK)
    made.check(0, KV_BLOCK)
    made.cache.free([SequenceId(50)])
    for number in range(1, 40):  # and back again
        made.step(number, 0, KV_BLOCK)
        assert made.cache.memory_bytes <= (40 + 1) * 2 * BLOCK_BYTES
    for number in range(40):
        made.check(number, KV_BLOCK)


@pytest.mark.parametrize("limit", [None, 30])
def test_blocks_are_taken_once_and_left_to_who_goes_on(limit: int | None) -> None:
    blocks = Blocks()
    first = blocks.take(None, 1, limit)
    second = blocks.take(None, 1, limit)
    assert (first, second) == (1, 5), "four to each, and the first to nobody"
    assert blocks.take(first, 1, limit) == 2
    assert blocks.end == 6
    blocks.free([1, 2])
    assert blocks.take(None, 1, limit) == 1
    assert blocks.take(second, 1, limit) == 6
    assert [blocks.take(number, 1, limit) for number in (6, 7, 8)] == [7, 8, 9]
    assert blocks.take(None, 1, limit) >= 12, "more are left to who has used up his own"


def test_what_is_left_is_given_to_others_when_nothing_else_is() -> None:
    blocks = Blocks()
    taken = [blocks.take(None, 1, 9) for _ in range(8)]
    assert sorted(taken) == list(range(1, 9))
    assert taken[:2] == [1, 5]
    assert blocks.take(None, 1, 9) >= 9, "who admitted that knows why"
