"""Stages with KV cache in pages say what transformers says, with a kernel made up on the CPU."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed_llm.common.checkpoint import Checkpoint, open_checkpoint
from distributed_llm.common.types import LayerRange, SequenceId
from distributed_llm.worker.kv.cache import KVCache, as_token_ids
from distributed_llm.worker.kv.page_tables import Piece
from distributed_llm.worker.kv.segments import Segment
from distributed_llm.worker.model import page_attention, page_choice, page_chunks
from distributed_llm.worker.model.kernels import varlen
from distributed_llm.worker.model.kernels.gpu_choice import Gpu
from distributed_llm.worker.model.packed_step import PackedSlice, PackedStep, Scoring
from distributed_llm.worker.model.page_chunks import _Chunk
from distributed_llm.worker.model.stage import Stage
from distributed_llm.worker.model.token_attention import attend_tokens
from distributed_llm.worker.model.token_schedule import Reading
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.made_up_varlen import Kernel, made_up
from tests.model.driver import CPU, Pipeline, load_stages
from tests.model.test_attention import Attention
from tests.model.test_windows import check

NUM_LAYERS = 3
GENERATOR = torch.Generator().manual_seed(5)
PROMPTS = [torch.randint(VOCAB_SIZE, (n,), generator=GENERATOR).tolist() for n in (150, 75, 9)]
SETTINGS: dict[str, dict[str, Any]] = {
    "qwen3": {},  # heads of queries share keys
    "gpt_oss": {},  # windows and sinks
    "llama4_text": {"attention_chunk_size": 7, "no_rope_layer_interval": 3},  # sections
}


@pytest.fixture(scope="module", params=SETTINGS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    return make_checkpoint(path, request.param, num_layers=NUM_LAYERS, **SETTINGS[request.param])


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    """The kernel that the CPU has in these tests."""
    with made_up(monkeypatch) as kernel:
        yield kernel


def forget(pipeline: Pipeline) -> None:
    """Have all stages drop what no token will see, as the coordinator does."""
    window = max(stage.window for stage in pipeline.stages)
    seen_from = {SequenceId(i): max(0, done - window) for i, done in enumerate(pipeline.done)}
    for stage in pipeline.stages:
        stage.forget(seen_from)


def test_tokens_are_those_of_transformers(
    kernel: Kernel, checkpoint: Checkpoint, whole: Any
) -> None:
    """Prompts in chunks, ragged decoding, children, a turn that takes the last, a step again."""
    pipeline = Pipeline(load_stages(checkpoint, [1, 2]))
    assert all(stage._cache.pages for stage in pipeline.stages)
    pipeline.prefill(PROMPTS, [0, 0, 0])
    for chunks in ([(0, 0, 90), (2, 0, 5)], [(0, 90, 149), (1, 0, 74)]):
        pipeline.run(chunks, sampling=None)
        forget(pipeline)
    called = kernel.calls
    pipeline.decode()
    assert kernel.calls == called + 2 * NUM_LAYERS, "a chunk, and two tokens"
    called = kernel.calls
    pipeline.decode()
    assert kernel.calls == called + NUM_LAYERS
    pipeline.share(0, pipeline.done[0], [7, 8, 9])
    pipeline.share(0, pipeline.done[0], [7])
    pipeline.share(1, pipeline.done[1], [1] * 40, take=True)
    lengths = [*map(len, PROMPTS), *map(len, pipeline.texts[3:])]
    alive = [0, 2, 3, 4, 5]
    for _ in range(4):
        pipeline.decode(numbers=alive)
        forget(pipeline)
    number, length = 0, pipeline.done[0]
    again = pipeline.run([(number, length - 1, length)])
    assert again == [pipeline.texts[number][length]]
    for stage in pipeline.stages:  # given up and computed again, as after a preemption
        stage._held_sequences.free([SequenceId(2)])
    pipeline.done[2] = 0
    for _ in range(4):
        pipeline.decode(numbers=alive)
        forget(pipeline)
    check(whole, pipeline.texts, lengths)


def test_moved_layers_go_on_in_the_pages_that_they_have(
    kernel: Kernel, checkpoint: Checkpoint, whole: Any
) -> None:
    pipeline = Pipeline(load_stages(checkpoint, [2, 1]))
    pipeline.prefill(PROMPTS, [100, 60, 4])
    old, last = pipeline.stages
    moved = LayerRange(2, 3)
    new = Stage.load(checkpoint, LayerRange(0, 3), device=CPU, dtype=torch.float32, donor=old)
    out, into = last.export_kv(moved), new.import_kv(moved, 1 << 30)
    for _ in range(2):
        while (pieces := out.next_chunk(1 << 20, 100)) is not None:
            for piece in pieces:
                into.add(piece)
        pipeline.decode()
        pipeline.decode()
        forget(pipeline)
    while (pieces := out.next_chunk(1 << 20, 100)) is not None:
        for piece in pieces:
            into.add(piece)
    into.update(last.kv_manifest())
    new.assemble_kv(old, [into])
    pages, before = new._cache.pages, old._cache.pages
    assert pages
    assert before
    assert pages.tensors_of(0)[0] is before.tensors_of(0)[0]
    pipeline.stages = [new]
    for _ in range(4):
        pipeline.decode()
        forget(pipeline)
    check(whole, pipeline.texts, [*map(len, PROMPTS)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings", [{}, {"window": 40}, {"with_sinks": True}, {"window": 100, "with_sinks": True}]
)
def test_attention_is_the_sum_of_its_pieces(
    dtype: torch.dtype, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With pieces so short, and so few put together at once, that there are many of both."""
    monkeypatch.setattr(page_attention, "_LEAST_PIECE", 8)
    monkeypatch.setattr(page_attention, "EXPANDED_AT_ONCE", 3000)
    attention = Attention(dtype, **settings)
    attention.cache = KVCache(1, in_pages=True)
    with made_up(monkeypatch, (dtype,)) as kernel:
        attention.step((0, 0, 130), (1, 0, 20))
        for position in range(6):
            attention.step((0, 130 + position, 1), (1, 20 + position, 1))
        attention.share(2, 0, 100)
        attention.share(3, 0, 100)
        attention.step((0, 136, 1), (2, 100, 1), (1, 26, 3), (3, 100, 1))
        called = kernel.calls
        attention.step((2, 101, 1), (0, 137, 1), (3, 101, 1))
        assert kernel.calls == called + 1


def test_chunks_are_computed_together_but_for_those_that_are_gathered() -> None:
    alone = [_Chunk((row, 3), [(row, 3)], [1, 2], [[(640, 9)], [(70, 2)]]) for row in (0, 3)]
    cut = [_Chunk((row, 5), [(row, 5)], [5], [[(64, 30), (640, row)]]) for row in (10, 20, 200, 5)]
    assert [chunk.positions for chunk in (*alone, *cut)] == [0, 0, 40, 50, 230, 35]
    groups = page_chunks._groups([cut[0], alone[0], *cut[1:], alone[1]], 100)
    assert groups == [alone, cut[:2], [cut[2]], [cut[3]]]
    tables = page_chunks._made(cut[:2], CPU)
    assert tables.gathered is not None
    assert tables.gathered.tolist() == [
        *(*range(64, 94), *range(640, 650)),
        *(*range(64, 94), *range(640, 660)),
    ]
    assert (tables.ends.tolist(), tables.lengths.tolist()) == ([0, 5, 10], [40, 50])
    assert tables.starts.tolist()[:2] == [0, 40]
    assert page_chunks._made(alone, CPU).starts.tolist()[:4] == [640, 70, 640, 70]


def test_answers_do_not_depend_on_who_else_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token's attention is the same to the last bit, alone or among others that are longer."""
    lengths = (700, 1400, 9)
    states = torch.randn(2, len(lengths), 2, max(lengths) + 1, 8).bfloat16()
    queries = torch.randn(6, len(lengths), 8).bfloat16()
    found = []
    with made_up(monkeypatch, (torch.bfloat16,)):
        for served in ((0,), (1, 0, 2)):
            cache, parts = KVCache(1, in_pages=True), []
            for row, number in enumerate(served):
                length, sequence = lengths[number], SequenceId(number)
                keys, values = states[:, number, :, :length]
                cache.begin(sequence, 0, as_token_ids([0] * length))
                cache.append(0, sequence, 0, keys, values)
                cache.commit(sequence, length)
                cache.begin(sequence, length, as_token_ids([0]))
                parts.append(PackedSlice(sequence, length, row, 1))
            step = PackedStep(cache, 0, tuple(parts), [0])
            at = [lengths[number] for number in served]
            key, value = states[:, served, :, at].permute(1, 2, 0, 3)
            scoring = Scoring(0.5, 0, None, None)
            own = (queries[:, served], key, value, scoring)
            found.append(attend_tokens(step, 0, *own)[served.index(0)])
    assert torch.equal(*found)


def test_pieces_of_long_texts_are_longer() -> None:
    segment = Segment(0, 0, 1)
    for length, size in ((100, 256), (4096, 256), (4097, 512), (100_000, 8192)):
        reading = Reading(segment, 0, length, (0,))
        pieces = list(page_attention._pieces(reading, [(640, length)]))
        assert sum(piece.length for piece in pieces) == length
        assert [piece.start for piece in pieces] == [640 + n * size for n in range(len(pieces))]
        assert {piece.length for piece in pieces[:-1]} <= {size}
    cut = list(page_attention._pieces(Reading(segment, 250, 600, (3,)), [(1274, 262), (64, 88)]))
    assert cut == [Piece(1274, 6, (3,)), Piece(1280, 256, (3,)), Piece(64, 88, (3,))]


# ------------------------------------------------------------------ kernels that are not used


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("wrong", "is wrong by 10%; it goes on without"),
        ("fails", "fails: FlashAttention is not built"),
        ("old GPU", ""),
        ("dtype", ""),
    ],
)
def test_without_a_kernel_that_is_right_there_are_no_pages(
    kernel: Kernel, tmp_path: Path, fault: str, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    made = open_checkpoint(make_checkpoint(tmp_path, num_layers=1))
    with pytest.MonkeyPatch.context() as patch:
        match fault:
            case "wrong":
                kernel.wrong = 1.1
            case "fails":
                kernel.fault = "FlashAttention is not built.\nMore of it."
            case "old GPU":
                patch.setattr(varlen, "facts_of", lambda device: Gpu("cuda", capability=(7, 5)))
            case _:
                patch.setattr(varlen, "_DTYPES", (torch.bfloat16,))
        (stage,) = load_stages(made, [1])
    assert stage._cache.pages is None
    logged = [line for line in caplog.messages if "attention over pages" in line]
    assert len(logged) == (1 if told else 0)
    assert told in "".join(logged)
    assert bool(kernel.calls) == bool(told), "it is tried where it is offered"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_a_right_kernel_passes_its_trial_in_16_bits(
    dtype: torch.dtype, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with made_up(monkeypatch, (torch.float16, torch.bfloat16)) as kernel:
        assert varlen.is_right(CPU, dtype, dim)
        called = kernel.calls
        assert varlen.is_right(CPU, dtype, dim)
        assert kernel.calls == called, "it is tried once"
        assert not varlen.is_right(CPU, dtype, 264)
        assert not varlen.is_right(CPU, torch.float32, dim)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gemma2", {}),
        ("deepseek_v3", {}),
        ("bloom", {}),
        ("falcon", {"alibi": True, "multi_query": False}),
    ],
)
def test_models_that_the_kernel_does_not_compute_keep_buffers(
    kernel: Kernel, family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    made = open_checkpoint(make_checkpoint(tmp_path, family, num_layers=1, **settings))
    assert not page_choice.attends_plainly(made.config)
