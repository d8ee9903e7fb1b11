"""The KV cache against a list of lists, under any order of steps, failures and releases."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from distributed_llm.worker.kv_cache import KVCache, as_token_ids

LAYERS, HEADS, KEY_DIM, VALUE_DIM = 3, 2, 4, 6
IDS = st.integers(0, 3)


class CacheMachine(RuleBasedStateMachine):
    """Each position's key is a fresh number, so that any mix-up shows."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = KVCache(LAYERS)
        self.model: dict[int, list[int]] = {}
        self.next_number = 0

    def begin(self, sequence_id: int, start: int, count: int) -> list[int]:
        numbers = list(range(self.next_number, self.next_number + count))
        self.next_number += count
        self.cache.begin(sequence_id, start, as_token_ids(numbers))
        self.model[sequence_id] = self.model.get(sequence_id, [])[:start]
        return numbers

    def append(self, layer: int, sequence_id: int, start: int, numbers: list[int]) -> list[Any]:
        column = torch.tensor(numbers, dtype=torch.float32)[None, :, None] + layer / 8
        keys, values = self.cache.append(
            layer,
            sequence_id,
            start,
            column.expand(HEADS, -1, KEY_DIM),
            -column.expand(HEADS, -1, VALUE_DIM),
        )
        assert keys.shape == (HEADS, start + len(numbers), KEY_DIM)
        assert torch.equal(values[..., :KEY_DIM], -keys)
        assert bool((keys == keys[:1, :, :1]).all())
        return (keys[0, :, 0] - layer / 8).tolist()

    @rule(sequence_id=IDS, count=st.integers(1, 90), back=st.integers(0, 5))
    def run_step(self, sequence_id: int, count: int, back: int) -> None:
        start = max(0, self.cache.length(sequence_id) - back)
        numbers = self.begin(sequence_id, start, count)
        for layer in range(LAYERS):
            seen = self.append(layer, sequence_id, start, numbers)
            assert seen == self.model[sequence_id] + numbers
        self.cache.commit(sequence_id, start + count)
        self.model[sequence_id] += numbers

    @rule(
        sequence_id=IDS,
        count=st.integers(1, 90),
        back=st.integers(0, 5),
        layers=st.integers(0, LAYERS),
    )
    def fail_step(self, sequence_id: int, count: int, back: int, layers: int) -> None:
        start = max(0, self.cache.length(sequence_id) - back)
        numbers = self.begin(sequence_id, start, count)
        for layer in range(layers):
            self.append(layer, sequence_id, start, numbers)

    @rule(sequence_id=IDS, length=st.integers(0, 200))
    def truncate(self, sequence_id: int, length: int) -> None:
        self.cache.truncate(sequence_id, length)
        if sequence_id in self.model:
            self.model[sequence_id] = self.model[sequence_id][:length]

    @rule(sequence_ids=st.lists(IDS))
    def free(self, sequence_ids: list[int]) -> None:
        self.cache.free(sequence_ids)
        for sequence_id in sequence_ids:
            self.model.pop(sequence_id, None)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def start_beyond_what_is_held(self, data: st.DataObject) -> None:
        sequence_id = data.draw(st.sampled_from(sorted(self.model)))
        with pytest.raises(ValueError, match="has no position"):
            self.cache.begin(sequence_id, len(self.model[sequence_id]) + 1, as_token_ids([1]))

    @invariant()
    def counts_and_tokens_are_those_of_finished_steps(self) -> None:
        assert set(self.cache.sequence_ids) == set(self.model)
        for sequence_id, numbers in self.model.items():
            assert self.cache.length(sequence_id) == len(numbers)
            assert self.cache.tokens(sequence_id, len(numbers)).tolist() == numbers

    @invariant()
    def bytes_are_zero_exactly_without_sequences(self) -> None:
        held = sum(map(len, self.model.values())) * LAYERS * HEADS * (KEY_DIM + VALUE_DIM) * 4
        assert held <= self.cache.nbytes
        if not self.model:
            assert self.cache.nbytes == 0


CacheMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, derandomize=True
)
TestCache = CacheMachine.TestCase


def test_growing_by_single_tokens_rarely_copies_and_wastes_little() -> None:
    cache = KVCache(1)
    sizes = set()
    for position in range(2000):
        cache.begin(7, position, as_token_ids([position]))
        column = torch.zeros(1, 1, 8)
        cache.append(0, 7, position, column, column)
        cache.commit(7, position + 1)
        sizes.add(cache.nbytes)
    assert len(sizes) < 20
    assert cache.nbytes <= 2000 * 2 * 8 * 4 * 1.25 + 64 * 2 * 8 * 4


def test_an_unknown_sequence_has_nothing() -> None:
    cache = KVCache(1)
    assert cache.length(5) == 0
    cache.truncate(5, 0)
    cache.free([5])
    with pytest.raises(ValueError, match="sequence 5 has no position 0"):
        cache.begin(5, 1, np.zeros(1, dtype=np.int32))
