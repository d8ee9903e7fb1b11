"""Attention over the KV cache against the formula, in float64, token by token."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distributed_llm.common.types import SequenceId
from distributed_llm.worker.kv.cache import KVCache, as_token_ids
from distributed_llm.worker.kv.segments import KVBuffers
from distributed_llm.worker.kv.slabs import SlabPool
from distributed_llm.worker.model import chunk_attention, partial_attention, token_attention
from distributed_llm.worker.model.attention import packed_attention
from distributed_llm.worker.model.kernels import native
from distributed_llm.worker.model.kernels.native.attention import Part, attend, places_of
from distributed_llm.worker.model.kernels.native.chunks import attend_rows, can_attend_chunk
from distributed_llm.worker.model.packed_step import PackedSlice, PackedStep, Scoring, running

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1 / 64}
HEADS, KV_HEADS, KEY_DIM = 6, 2, 8
HAS_CHUNKS = can_attend_chunk(torch.zeros(1, 1, 8, dtype=torch.bfloat16), 8)
LAYER = 3
Chunk = tuple[int, int, int]
"""A sequence, the first position, the number of tokens."""


class Attention:
    """One layer's attention, and the keys and values that each sequence should hold."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        *,
        value_dim: int = KEY_DIM,
        window: int | None = None,
        softcap: float | None = None,
        with_sinks: bool = False,
        with_slopes: bool = False,
        offset: float = 0.0,
    ) -> None:
        torch.manual_seed(1)
        self.cache = KVCache(1)
        self.held: dict[int, tuple[Tensor, Tensor]] = {}
        self.dtype, self.value_dim = dtype, value_dim
        self.window, self.softcap, self.offset = window, softcap, offset
        self.coarse: set[int] = set()
        self.sinks = torch.randn(HEADS).to(dtype) if with_sinks else None
        self.slopes = torch.rand(HEADS) if with_slopes else None
        self.module = nn.Module()
        self.module.layer_idx = LAYER  # type: ignore[assignment]

    def step(self, *chunks: Chunk) -> Tensor:
        """Run a step of random tokens; return what attention gives, [tokens, heads, value_dim]."""
        total = sum(count for _, _, count in chunks)
        query = torch.randn(1, HEADS, total, KEY_DIM).to(self.dtype)
        key = torch.randn(1, KV_HEADS, total, KEY_DIM)
        query[..., 0] += self.offset
        key[..., 0] += self.offset
        key = key.to(self.dtype)
        value = torch.randn(1, KV_HEADS, total, self.value_dim).to(self.dtype)
        slices, row = [], 0
        for number, start, count in chunks:
            self.cache.begin(SequenceId(number), start, as_token_ids([0] * count))
            slices.append(PackedSlice(SequenceId(number), start, row, count))
            row += count
        step = PackedStep(self.cache, LAYER, tuple(slices), [0], coarse=self.coarse)
        with torch.inference_mode(), running(step):
            output, _ = packed_attention(
                self.module,
                query,
                key,
                value,
                None,
                scaling=0.5,
                sliding_window=self.window,
                softcap=self.softcap,
                s_aux=self.sinks,
                slopes=self.slopes,
            )
        assert step.appended == [1]
        expected = []
        for part in slices:
            rows = slice(part.row, part.row + part.num_tokens)
            self.cache.commit(part.sequence_id, part.start + part.num_tokens)
            keys, values = key[0, :, rows], value[0, :, rows]
            if part.start:
                old_keys, old_values = self.held[part.sequence_id]
                keys = torch.cat([old_keys[:, : part.start], keys], dim=1)
                values = torch.cat([old_values[:, : part.start], values], dim=1)
            self.held[part.sequence_id] = keys, values
            expected.append(self.reference(query[0, :, rows], keys, values))
        self.check(output[0], torch.cat(expected))
        return output[0]

    def check(self, actual: Tensor, expected: Tensor) -> None:
        error = (actual.double() - expected).abs().max() / expected.abs().max()
        assert float(error) < TOLERANCE[self.dtype]

    def share(self, child: int, parent: int, length: int) -> None:
        self.cache.share(SequenceId(child), SequenceId(parent), length)
        self.held[child] = self.held[parent]

    def reference(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return attention [tokens, heads, value_dim] of the last positions."""
        tokens, positions = queries.shape[1], keys.shape[1]
        rows = []
        for token in range(tokens):
            stop = positions - tokens + token + 1
            first = max(0, stop - self.window) if self.window else 0
            for head in range(HEADS):
                shared = head // (HEADS // KV_HEADS)
                scores = keys[shared, first:stop].double() @ queries[head, token].double() * 0.5
                if self.softcap:
                    scores = torch.tanh(scores / self.softcap) * self.softcap
                if self.slopes is not None:
                    scores += self.slopes[head].double() * torch.arange(first - stop, 0)
                if self.sinks is not None:
                    scores = torch.cat([scores, self.sinks[head].double()[None]])
                weights = torch.softmax(scores, dim=0)[: stop - first]
                rows.append(weights @ values[shared, first:stop].double())
        return torch.stack(rows).view(tokens, HEADS, -1)


def run_steps_of_all_kinds(attention: Attention) -> None:
    """Run chunks and single tokens, alone and together, of sequences that share and that do not."""
    attention.step((0, 0, 20), (1, 0, 30), (2, 0, 7), (3, 0, 1), (4, 0, 12))
    attention.cache.free([SequenceId(2)])  # between others
    for child, length in ((5, 18), (6, 18), (7, 18), (8, 5)):
        attention.share(child, 0, length)
    attention.step((1, 30, 1), (5, 18, 1), (3, 1, 1), (6, 18, 5), (4, 12, 1), (7, 18, 2))
    attention.step(
        (4, 13, 1), (5, 19, 1), (0, 20, 1), (1, 31, 1), (6, 23, 1), (8, 5, 1), (7, 20, 1)
    )
    attention.share(9, 5, 20)
    attention.step((9, 20, 1), (5, 20, 1), (1, 32, 4), (4, 10, 1))
    attention.step((1, 36, 1))


@pytest.fixture(params=["fused", "products", "library"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute single tokens by one kernel, whichever is the faster here; masks of few queries."""
    products = request.param == "products"
    if request.param != "library":
        monkeypatch.setattr(token_attention, "can_attend", lambda *_: False)
        monkeypatch.setattr(chunk_attention, "can_attend_chunk", lambda *_: False)
    monkeypatch.setattr(token_attention, "products_are_faster", lambda *_: products)
    monkeypatch.setattr(chunk_attention, "QUERIES_AT_ONCE", 2)
    monkeypatch.setattr(chunk_attention, "SCORES_AT_ONCE", 200)


@pytest.fixture
def kernel_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_attention, "can_attend", lambda *_: False)
    monkeypatch.setattr(token_attention, "products_are_faster", lambda *_: True)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("window", [None, 4, 14])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_attention_is_that_of_the_formula(
    dtype: torch.dtype, window: int | None, softcap: float | None, with_sinks: bool
) -> None:
    run_steps_of_all_kinds(Attention(dtype, window=window, softcap=softcap, with_sinks=with_sinks))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("window", [None, 14])
def test_scores_may_grow_with_the_position(
    dtype: torch.dtype, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_attention, "SCORES_AT_ONCE", 200)
    run_steps_of_all_kinds(Attention(dtype, window=window, with_slopes=True))


def test_values_may_be_wider_than_keys() -> None:
    run_steps_of_all_kinds(Attention(value_dim=12, window=14, with_sinks=True))


def test_sequences_in_no_slab_are_attended_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on systems where addresses count as memory."""
    monkeypatch.setattr(
        SlabPool, "take", lambda pool, capacity, first=0: pool._layout.allocate(capacity, first)
    )
    run_steps_of_all_kinds(Attention(window=14, with_sinks=True))


def test_what_other_machines_compute_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel that GPUs have, and what is done by hand where it lacks something."""
    for with_sinks in (False, True):
        chunk = _chunk_by(monkeypatch, "_by_hand" if with_sinks else "_by_one_kernel")
        for window in (None, 4, 14):
            with monkeypatch.context() as patched:
                patched.setattr(chunk_attention, "_in_blocks", chunk)
                run_steps_of_all_kinds(Attention(window=window, with_sinks=with_sinks))


def _chunk_by(monkeypatch: pytest.MonkeyPatch, name: str) -> object:
    compute = getattr(chunk_attention, name)

    def chunk(
        step: PackedStep,
        queries: Tensor,
        parts: Sequence[chunk_attention.ChunkPart],
        scoring: Scoring,
    ) -> Tensor:
        whole = chunk_attention.ChunkPart(
            0,
            torch.cat([part.keys for part in parts], dim=1),
            torch.cat([part.values for part in parts], dim=1),
        )
        whose = (step,) if name == "_by_hand" else ()
        result: Tensor = compute(*whose, queries, whole, scoring)
        return result

    return chunk


@pytest.mark.skipif(native.instructions() == "none", reason="the C library was not built here")
@pytest.mark.parametrize("positions", [1, 31, 32, 33, 200])
def test_long_heads_in_the_library(positions: int) -> None:
    """Several blocks of positions, many heads of one key, keys that lie far apart."""
    torch.manual_seed(0)
    keys = torch.randn(positions + 5, 2, 72).bfloat16().transpose(0, 1)
    values = torch.randn(2, positions + 5, 40).bfloat16()
    query = torch.randn(3, 14, 72).bfloat16().transpose(0, 1)
    held = KVBuffers(keys, values).cut(3, 3 + positions)
    of_one = [Part(*held.addresses, positions, *held.strides)]
    newest = 2 + positions
    key, value = (each[:, newest, None].expand(-1, 3, -1).clone() for each in (keys, values))
    keys[:, newest] = values[:, newest] = float("nan")  # they are to be written
    actual = attend(query, key, value, places_of([of_one] * 3), scale=0.2, softcap=None, sinks=None)
    there = slice(3, 3 + positions)
    shared = (each[:, there].double().repeat_interleave(7, 0) for each in (keys, values))
    whole_keys, whole_values = shared
    scores = query.double() @ whole_keys.transpose(1, 2) * 0.2
    expected = (scores.softmax(-1) @ whole_values).transpose(0, 1)
    assert float((actual.double() - expected).abs().max() / expected.abs().max()) < 1 / 128


@pytest.mark.skipif(not HAS_CHUNKS, reason="the processor does not multiply bfloat16")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("tokens", "window", "softcap", "with_sinks"),
    [(230, 0, None, False), (64, 0, 5.0, True), (1, 0, None, False), (170, 40, None, True)],
)
def test_long_chunks_in_the_library(
    tokens: int, window: int, softcap: float | None, with_sinks: bool, threads: int
) -> None:
    """Several blocks of rows and keys, in two places; values that fill no register."""
    torch.manual_seed(0)
    before, positions = torch.get_num_threads(), 333
    keys = torch.randn(positions, 2, 72).bfloat16().transpose(0, 1)
    values = torch.randn(2, positions, 88).bfloat16()
    queries = torch.randn(tokens, 6, 72).bfloat16().transpose(0, 1)
    sinks = torch.randn(6) + 2 if with_sinks else None
    held = KVBuffers(keys, values)
    parts = [held.cut(0, 101), held.cut(101, positions)]
    places = [Part(*one.addresses, one.keys.shape[1], *one.strides) for one in parts]
    torch.set_num_threads(threads)
    actual = attend_rows(
        *(queries, places, 2, 88), scale=0.2, softcap=softcap, window=window, sinks=sinks
    )
    torch.set_num_threads(before)
    whole_keys, whole_values = (each.double().repeat_interleave(3, 0) for each in (keys, values))
    scores = queries.double() @ whole_keys.transpose(1, 2) * 0.2
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    behind = torch.arange(positions - tokens, positions)[:, None] - torch.arange(positions)
    scores[:, (behind < 0) | (behind >= (window or positions))] = float("-inf")
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, tokens, 1)], -1)
    weights = scores.softmax(-1)[..., :positions]
    expected = (weights @ whole_values).transpose(0, 1)
    assert float((actual.double() - expected).norm() / expected.norm()) < 1 / 256
    assert float((actual.double() - expected).abs().max() / expected.abs().max()) < 1 / 128


@pytest.mark.skipif(not HAS_CHUNKS, reason="the processor does not multiply bfloat16")
def test_what_is_no_number_stays_in_its_rows_of_a_chunk() -> None:
    queries = torch.randn(4, 9, 8).bfloat16()
    queries[1, 3, 2] = float("nan")
    held = KVBuffers(torch.randn(2, 9, 8).bfloat16(), torch.randn(2, 9, 8).bfloat16())
    places = [Part(*held.addresses, 9, *held.strides)]
    output = attend_rows(queries, places, 2, 8, scale=1.0, softcap=None, window=0, sinks=None)
    assert output[3, 1].isnan().all()
    output[3, 1] = 0.0
    assert output.isfinite().all()


@pytest.mark.skipif(native.instructions() == "none", reason="the C library was not built here")
def test_a_query_that_is_no_number_gives_none() -> None:
    query = torch.randn(4, 2, 8).bfloat16()
    query[1, 0, 2] = float("nan")
    held = KVBuffers(torch.randn(2, 9, 8).bfloat16(), torch.randn(2, 9, 8).bfloat16())
    part = Part(*held.addresses, 9, *held.strides)
    own = torch.randn(2, 2, 8).bfloat16()
    output = attend(
        query, own, own, places_of([[part], [part]]), scale=1.0, softcap=None, sinks=None
    )
    assert output[0, 1].isnan().all()
    assert output[0, [0, 2, 3]].isfinite().all()
    assert output[1].isfinite().all()


def test_a_shared_prefix_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def counted(queries: Tensor, keys: Tensor, *rest: Any) -> partial_attention.Partial:
        read.append(keys.shape[0] * keys.shape[2])
        return partial_attention.fused(queries, keys, *rest)

    attention = Attention()
    attention.step((0, 0, 200))
    for child in range(1, 9):
        attention.share(child, 0, 200)
    monkeypatch.setattr(token_attention, "fused", counted)
    monkeypatch.setattr(token_attention, "products_are_faster", lambda *_: False)
    attention.step(*((child, 200, 1) for child in range(1, 9)))
    assert sum(read) == 200 + 8


def test_scores_that_bfloat16_rounds_too_much_are_computed_by_the_fused_kernel(
    kernel_of_products: None,
) -> None:
    """Some models have scores in the hundreds, most of which all positions have in common."""
    attention = Attention(torch.bfloat16, offset=20.0)
    attention.step((0, 0, 50), (1, 0, 50), (2, 0, 50))
    attention.step((0, 50, 1), (1, 50, 1), (2, 50, 1))
    attention.step((0, 51, 1), (1, 51, 1), (2, 51, 1))
    assert attention.coarse == {0}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_a_sequence_is_alone_with_its_numbers(dtype: torch.dtype) -> None:
    """What is not finite in one sequence spoils no other, in whatever row of the slab it was."""
    attention = Attention(dtype)
    attention.step((0, 0, 5), (1, 0, 90), (2, 0, 5))
    for states in attention.held[1]:
        states.fill_(float("nan"))
    held = attention.cache.segments(SequenceId(1))[0].layers[0]
    assert held is not None
    with torch.inference_mode():
        held.values.fill_(float("nan"))
        held.keys.fill_(float("inf"))
    attention.step((0, 5, 1), (2, 5, 1))
    attention.cache.free([SequenceId(1)])
    del held
    attention.step((3, 0, 3), (2, 6, 1), (0, 6, 1))
    attention.step((3, 3, 1), (2, 7, 1), (0, 7, 60))
    attention.step((3, 4, 1), (2, 8, 1), (0, 67, 1))
