"""Attention of an encoder-decoder's single tokens by the C library, against that of the formula."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distributed_llm.common.types import SequenceId
from distributed_llm.worker.kv.cache import KVCache
from distributed_llm.worker.model.kernels import native
from distributed_llm.worker.model.packed_step import PackedSlice, PackedStep, Scoring
from distributed_llm.worker.model.stacks.attention import _across, _within_answers_biased
from distributed_llm.worker.model.stacks.positions import RelativeBias

pytestmark = pytest.mark.skipif(
    native.instructions() == "none", reason="the C library was not built here"
)

HEADS, DIM = 3, 16
SOURCES, LENGTHS = (40, 5), (3, 70)
"""Of two texts: positions of the source, and of the answer with its newest token."""


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def begun() -> tuple[PackedStep, list[tuple[Tensor, Tensor]]]:
    """Return a step of one token of each text, and the keys and values of all positions."""
    cache, held, slices = KVCache(1), [], []
    for one, (source, length) in enumerate(zip(SOURCES, LENGTHS, strict=True)):
        stop, number = source + length, SequenceId(one)
        keys, values = drawn(HEADS, stop, DIM), drawn(HEADS, stop + 1, DIM)[:, :stop]
        cache.begin(number, 0, np.ones(stop - 1, dtype=np.int32))
        cache.append(0, number, 0, keys[:, :-1], values[:, :-1])
        cache.commit(number, stop - 1)
        cache.begin(number, stop - 1, np.ones(1, dtype=np.int32))
        held.append((keys, values))
        slices.append(PackedSlice(number, stop - 1, one, 1, source))
    return PackedStep(cache, 0, tuple(slices), [0]), held


def attended(query: Tensor, keys: Tensor, values: Tensor, added: Tensor | float = 0.0) -> Tensor:
    scores = (keys.double() @ query.double()[..., None])[..., 0] + added
    return torch.einsum("hp,hpd->hd", scores.softmax(dim=-1), values.double())


def test_biases_are_added_by_distance() -> None:
    step, held = begun()
    table = nn.Embedding(300, HEADS)
    queries = drawn(HEADS, 2, DIM) / 4
    key, value = (torch.cat([kept[which][:, -1:] for kept in held], dim=1) for which in (0, 1))
    with torch.inference_mode():
        bias = RelativeBias(table, lambda distances: distances % 300)
        scoring = Scoring(1.0, 0, None, None)
        actual = _within_answers_biased(step, 0, queries, key, value, scoring, bias)
        for one, (keys, values) in enumerate(held):
            length = LENGTHS[one]
            added = bias.between(range(length - 1, length), range(length))[:, 0].double()
            of_answer = keys[:, SOURCES[one] :], values[:, SOURCES[one] :]
            expected = attended(queries[:, one], *of_answer, added=added)
            torch.testing.assert_close(actual[one].double(), expected, rtol=0.01, atol=0.01)


def test_tokens_look_across_at_what_is_kept() -> None:
    step, held = begun()
    queries = drawn(HEADS, 2, DIM) / 4
    actual = _across(step, 0, queries, Scoring(1.0, 0, None, None, source="alone"))
    for one, (keys, values) in enumerate(held):
        of_source = keys[:, : SOURCES[one]], values[:, : SOURCES[one]]
        expected = attended(queries[:, one], *of_source)
        torch.testing.assert_close(actual[one].double(), expected, rtol=0.01, atol=0.01)
