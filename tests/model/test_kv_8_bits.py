"""Keys and values in 8 bits: what is kept, what attention makes of it, and what it costs."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import accuracy
from distributed_llm import summary
from distributed_llm.common.checkpoint import open_checkpoint
from distributed_llm.common.kv_dtypes import KVDtype, kv_row_bytes
from distributed_llm.common.messages import LoadStage
from distributed_llm.common.settings import CoordinatorSettings
from distributed_llm.common.types import KV_BLOCK, LayerRange, SequenceId
from distributed_llm.coordinator import serve
from distributed_llm.worker.kv.assembly import assemble
from distributed_llm.worker.kv.cache import KVCache
from distributed_llm.worker.kv.coding import RowCoding
from distributed_llm.worker.kv.manifest import KVManifest, KVTransferError
from distributed_llm.worker.kv.segments import KVBuffers
from distributed_llm.worker.kv.wire import decode_end, decode_pieces, encode_end, encode_pieces
from distributed_llm.worker.model import chunk_attention, decoded_rows, token_attention
from distributed_llm.worker.model.empty_model import parameters_of
from distributed_llm.worker.model.failures import SequencesFailed
from distributed_llm.worker.model.kernels import native
from distributed_llm.worker.model.kernels.native.attention import Part, attend, places_of
from distributed_llm.worker.model.stage import Stage
from tests.checkpoints import VOCAB_SIZE, build_model, make_checkpoint
from tests.model.driver import CPU, Pipeline
from tests.model.test_attention import KEY_DIM, KV_HEADS, Attention, run_steps_of_all_kinds
from tests.model.test_engine_moves import move
from tests.model.test_kv_transfer import compute, importer, new_cache
from tests.model.workers import Cluster, workers

KINDS: tuple[KVDtype, ...] = ("int8", "fp8")
STEP = {"int8": 1 / 127, "fp8": 1 / 8}
"""Widest step between codes: of the largest number, or of the number itself."""
LOGITS = {"int8": 0.024, "fp8": 0.1}
"""Error of logits that is allowed, as a part of their spread; twice what was measured."""
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},  # groups of heads
    "gemma2": {},  # soft caps
    "gpt_oss": {"num_experts_per_tok": 4},  # sinks and a window; all experts, or a few flip
    "mistral": {},  # a window
    "gpt_bigcode": {},  # one head of keys
}


def decoded_keys(coding: RowCoding, keys: Tensor) -> Tensor:
    """Return the keys that rows stand for, not rotated."""
    dim = keys.shape[-1]
    turn = coding.rotated(torch.eye(dim))
    rows, _ = coding.encoded(keys, keys)
    return coding.decoded(rows, dim, torch.float32) @ turn.T


@pytest.mark.parametrize("kv_dtype", KINDS)
@pytest.mark.parametrize("dim", [5, 6, 64, 80])
def test_numbers_come_back_within_half_a_step(kv_dtype: KVDtype, dim: int) -> None:
    coding = RowCoding(kv_dtype)
    values = torch.randn(3, 50, dim, generator=torch.Generator().manual_seed(dim))
    values[0, 0] = 0
    _, rows = coding.encoded(values, values)
    assert rows.shape == (3, 50, kv_row_bytes(dim, 4, kv_dtype))
    back = coding.decoded(rows, dim, torch.float32)
    largest = values.abs().amax(dim=-1, keepdim=True)
    step = STEP[kv_dtype] * (largest if kv_dtype == "int8" else values.abs() + largest / 2**12)
    assert bool(((back - values).abs() <= 0.51 * step).all())
    assert not back[0, 0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp8_is_that_of_torch(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    numbers = codes.view(torch.float8_e4m3fn).to(dtype)
    rows = torch.cat([codes, torch.ones(1, dtype=torch.bfloat16).view(torch.uint8)])
    back = RowCoding("fp8").decoded(rows, 256, dtype)
    finite = numbers.isfinite()
    assert torch.equal(back[finite], numbers[finite])


def test_a_few_large_channels_do_not_make_the_others_coarse() -> None:
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(1, 500, 128, generator=generator)
    keys[..., (3, 70)] = keys[..., (3, 70)] * 2 + 50
    queries = torch.randn(40, 128, generator=generator)
    queries[:, (3, 70)] = 0.0  # what matters is in the others
    coding = RowCoding("int8")
    error = queries @ (decoded_keys(coding, keys) - keys)[0].T
    without = (
        queries @ (coding.decoded(coding.encoded(keys, keys)[1], 128, torch.float32) - keys)[0].T
    )
    assert float(error.std()) < 0.35 * float(without.std())


@pytest.mark.parametrize("kv_dtype", KINDS)
def test_what_is_not_finite_does_not_come_back_finite(kv_dtype: KVDtype) -> None:
    coding = RowCoding(kv_dtype)
    for wrong in (math.nan, math.inf):
        values = torch.ones(2, 8)
        values[0, 3] = wrong
        back = coding.decoded(coding.encoded(values, values)[1], 8, torch.float32)
        assert not back[0].isfinite().all()
        assert back[1].isfinite().all()


class Attention8(Attention):
    """Attention that is to be that of the numbers that rows stand for."""

    def __init__(self, kv_dtype: KVDtype, **settings: object) -> None:
        super().__init__(**settings)  # type: ignore[arg-type]
        self.cache = KVCache(1, kv_dtype=kv_dtype)
        self.coding = RowCoding(kv_dtype)

    def reference(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        _, rows = self.coding.encoded(values, values)
        values = self.coding.decoded(rows, values.shape[-1], torch.float32)
        return super().reference(queries, decoded_keys(self.coding, keys), values)


@pytest.mark.parametrize("kv_dtype", KINDS)
@pytest.mark.parametrize("products", [False, True], ids=["fused", "products"])
@pytest.mark.parametrize("at_once", [7, 45])
def test_attention_is_that_of_the_formula(
    kv_dtype: KVDtype, products: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All kinds of steps, decoded in pieces of positions, and of sequences."""
    monkeypatch.setattr(token_attention, "products_are_faster", lambda *_: products)
    monkeypatch.setattr(chunk_attention, "QUERIES_AT_ONCE", 2)
    monkeypatch.setattr(decoded_rows, "_CPU_BYTES", at_once * KV_HEADS * 2 * KEY_DIM * 4)
    run_steps_of_all_kinds(Attention8(kv_dtype, window=14, with_sinks=True))
    run_steps_of_all_kinds(Attention8(kv_dtype))
    if at_once == 7:
        run_steps_of_all_kinds(Attention8(kv_dtype, window=4, softcap=2.0))
        run_steps_of_all_kinds(Attention8(kv_dtype, value_dim=12, with_sinks=True))


@pytest.mark.parametrize("kv_dtype", KINDS)
@pytest.mark.parametrize("by_library", [True, False])
def test_attention_in_bfloat16(
    kv_dtype: KVDtype, by_library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the C library where it was built, and by torch as where it was not."""
    if not by_library:
        monkeypatch.setattr(token_attention, "can_attend", lambda *_: False)
    run_steps_of_all_kinds(Attention8(kv_dtype, dtype=torch.bfloat16, window=14, with_sinks=True))
    run_steps_of_all_kinds(Attention8(kv_dtype, dtype=torch.bfloat16, softcap=2.0, window=4))
    run_steps_of_all_kinds(Attention8(kv_dtype, dtype=torch.bfloat16, value_dim=16))


@pytest.mark.skipif(native.instructions() == "none", reason="the C library was not built here")
@pytest.mark.parametrize("kv_dtype", KINDS)
def test_the_library_keeps_what_torch_would(kv_dtype: KVDtype) -> None:
    """Values to the last bit; keys but for what the order of sums in a rotation changes."""
    torch.manual_seed(0)
    keys, values = (torch.randn(4, 300, dim).bfloat16() for dim in (64, 24))
    keys[:, 5] *= 1e30
    values[0, 0] = 0
    values[0, 1, 3] = 2e-38
    values[1] = torch.linspace(-448, 448, 300 * 24).view(300, 24)  # all codes of fp8
    values[1, :, 0] = 448.0  # the scale is 1
    coding = RowCoding(kv_dtype)
    expected = coding.encoded(keys, values)
    held = KVBuffers(torch.zeros_like(expected[0]), torch.zeros_like(expected[1]))
    addresses, strides = held.addresses, held.strides
    parts = [[Part(*addresses, position + 1, *strides)] for position in range(300)]
    attend(
        *(torch.zeros(8, 300, 64).bfloat16(), keys, values, places_of(parts)),
        kept=kv_dtype,
        rotation=coding.rotation(64, keys.device),
        scale=1.0,
        softcap=None,
        sinks=None,
    )
    assert torch.equal(held.values, expected[1])
    same = held.keys == expected[0]
    assert float(same[..., :64].float().mean()) > 0.999
    assert float(same[..., 64:].float().mean()) > 0.99
    if kv_dtype == "int8":
        kept, wanted = (rows[..., :64].view(torch.int8).int() for rows in (held.keys, expected[0]))
        assert int((kept - wanted).abs().max()) <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_change_little(family: str) -> None:
    model = build_model(family, num_layers=4, **FAMILIES[family])
    ids = torch.randint(VOCAB_SIZE, (1, 40), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        exact = accuracy.Cached(model, "auto")(ids).logits
        for kv_dtype in KINDS:
            for chunk in (40, 7, 1):
                logits = accuracy.Cached(model, kv_dtype, chunk)(ids).logits
                error = float((logits - exact).std() / exact.std())
                assert 0 < error < LOGITS[kv_dtype], (kv_dtype, chunk)


@pytest.mark.parametrize(("kv_dtype", "percent"), [("int8", 0.05), ("fp8", 0.2)])
def test_perplexity_rises_little(kv_dtype: KVDtype, percent: float) -> None:
    model, stories = accuracy.load_model(), accuracy.held_out_stories(6)
    plain = accuracy.loss(accuracy.Cached(model, "auto"), stories)
    kept = accuracy.loss(accuracy.Cached(model, kv_dtype), stories)
    assert plain < 0.4  # the stories are those that it knows to tell
    assert kept != plain
    assert math.exp(kept - plain) <= 1 + percent / 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), num_layers=4)


def stages(folder: Path, split: Sequence[int], kv_dtype: KVDtype) -> list[Stage]:
    made, start = [], 0
    for stop in split:
        layers = LayerRange(start, stop)
        made.append(
            Stage.load(
                open_checkpoint(folder), layers, device=CPU, dtype=torch.float32, kv_dtype=kv_dtype
            )
        )
        start = stop
    return made


def contents(held: Sequence[Stage]) -> list[list[int]]:
    """Return all bytes that count."""
    return [
        states[:, :count].flatten().tolist()
        for stage in held
        for segment, count in stage._cache.extents().items()
        for buffers in segment.layers
        if buffers is not None
        for states in (buffers.keys, buffers.values)
    ]


def moved(source: Stage, layers: LayerRange, into: Stage) -> None:
    """Send a stage's KV cache as workers do."""
    out, incoming = source.export_kv(layers), into.import_kv(layers, 1 << 24)
    number = 0
    while (pieces := out.next_chunk(3000, 10)) is not None:
        message, frames = encode_pieces(1, layers, number, pieces)  # type: ignore[arg-type]
        for piece in decode_pieces(message, frames, incoming.positions.layouts, {}):
            incoming.add(piece)
        number += 1
    end, frames = encode_end(1, layers, number, source.kv_manifest())  # type: ignore[arg-type]
    incoming.update(decode_end(end, frames))
    into.assemble_kv(None, [incoming])


@pytest.mark.parametrize("kv_dtype", KINDS)
def test_a_move_changes_no_bit(folder: Path, kv_dtype: KVDtype) -> None:
    kept = []
    for moves in (False, True):
        first, second = stages(folder, (2, 4), kv_dtype)
        pipeline = Pipeline([first, second])
        pipeline.texts = [[token % VOCAB_SIZE for token in range(3, 160, 2)] for _ in range(2)]
        pipeline.done = [0, 0]
        answers = [pipeline.run([(0, 0, 70)])]
        second_text = pipeline.share(0, 50, [9, 8, 7])
        answers.append(pipeline.run([(0, 70, 71), (second_text, 50, 53)]))
        if moves:
            fresh = stages(folder, (2, 4), kv_dtype)
            for old, new in zip((first, second), fresh, strict=True):
                moved(old, new.layers, new)
                assert new.kv_bytes == old.kv_bytes
            pipeline.stages = fresh
        answers += [pipeline.run([(0, position, position + 1)]) for position in range(71, 76)]
        kept.append((answers, contents(pipeline.stages)))
    assert kept[0] == kept[1]


class Cluster8(Cluster):
    """Workers whose orders say that KV cache is kept in 8 bits."""

    def order(self, epoch: int, layers: tuple[int, int], **fields: Any) -> LoadStage:
        return super().order(epoch, layers, kv_dtype="int8", **fields)


def test_workers_keep_and_move_what_they_are_told(folder: Path) -> None:
    texts = []
    for moves in (False, True):
        with workers("a", "b") as made:
            cluster = Cluster8(folder, (("a", (0, 2)), ("b", (2, 4))), made)
            cluster.prefill([list(range(90))], [89])
            cluster.decode()
            if moves:
                move(cluster, 2, (("b", (0, 3)), ("a", (3, 4))))
            for _ in range(6):
                cluster.decode()
            texts.append(cluster.texts[0])
            assert all(worker.silent for worker in made.values())
            held = sum(worker.engine.vitals.kv_bytes for worker in made.values())
            token_bytes = 4 * 2 * 2 * kv_row_bytes(8, 4, "int8")
            assert held == 2 * KV_BLOCK * token_bytes
    assert texts[0] == texts[1]


def test_caches_of_another_kind_are_refused() -> None:
    layers = LayerRange(0, 2)
    source = new_cache(layers)
    compute(source, layers, 0, 0, [1, 2, 3])
    incoming = importer(layers)
    incoming.update(KVManifest(sequences=(), segments=(), kv_dtype="fp8"))
    with pytest.raises(KVTransferError, match="kept as fp8, but this one as auto"):
        assemble(new_cache(layers), layers, None, [incoming])


@pytest.mark.parametrize("kv_dtype", KINDS)
def test_twice_the_context_fits(folder: Path, kv_dtype: KVDtype) -> None:
    (stage,) = stages(folder, (4,), kv_dtype)
    rooms = []
    for kept in ("auto", kv_dtype):
        settings = CoordinatorSettings(kv_dtype=kept, dtype="bfloat16")
        run = serve.plan(
            *(str(folder), ("pc=9800KiB",), settings),
            parameters_of=parameters_of,
            check_loading=Stage.check_loading,
        )
        rooms.append(run.plans[0][0].kv_tokens)
    assert sum(run.cost.layer_kv_bytes) == stage.kv_bytes_per_token
    assert f"context: kept in {kv_dtype}" in summary.plan_lines(run)
    assert 1.55 < rooms[1] / rooms[0] < 2  # heads of 8 numbers; of 128 it is 1.97
    assert kv_row_bytes(128, 2, "auto") / kv_row_bytes(128, 2, kv_dtype) > 1.96


def test_the_limit_of_the_cache_is_that_of_its_bytes(folder: Path) -> None:
    (stage,) = stages(folder, (4,), "int8")
    stage.limit_kv(KV_BLOCK * stage.kv_bytes_per_token)
    pipeline = Pipeline([stage])
    pipeline.texts, pipeline.done = [list(range(40))], [0]
    pipeline.run([(0, 0, 40)])
    assert stage.kv_bytes == KV_BLOCK * stage.kv_bytes_per_token
    held = stage._cache.segments(SequenceId(0))[0].layers[0]
    assert held is not None
    with torch.inference_mode():
        held.values[:, 5] = 255  # a scale that is no number
    pipeline.texts[0].append(1)
    with pytest.raises(SequencesFailed, match="not finite"):
        pipeline.run([(0, 40, 41)])
