"""Stages with KV cache in pages say what transformers says, with a kernel made up on the CPU."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed_llm.common.checkpoint import Checkpoint, open_checkpoint
from distributed_llm.common.types import LayerRange, SequenceId
from distributed_llm.worker.model import page_choice
from distributed_llm.worker.model.kernels import varlen
from distributed_llm.worker.model.kernels.gpu_choice import Gpu
from distributed_llm.worker.model.stage import Stage
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.made_up_varlen import Kernel, made_up
from tests.model.driver import CPU, Pipeline, load_stages
from tests.model.test_windows import check

NUM_LAYERS = 3
GENERATOR = torch.Generator().manual_seed(5)
PROMPTS = [torch.randint(VOCAB_SIZE, (n,), generator=GENERATOR).tolist() for n in (300, 75, 9)]
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
    for chunks in ([(0, 0, 190), (2, 0, 5)], [(0, 190, 299), (1, 0, 74)]):
        pipeline.run(chunks, sampling=None)
        forget(pipeline)
    pipeline.decode()
    called = kernel.calls
    pipeline.decode()
    assert kernel.calls == called + NUM_LAYERS
    pipeline.share(0, pipeline.done[0], [7, 8, 9])
    pipeline.share(0, pipeline.done[0], [7])
    pipeline.share(1, pipeline.done[1], [1] * 90, take=True)
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
    for _ in range(8):
        pipeline.decode(numbers=alive)
        forget(pipeline)
    check(whole, pipeline.texts, lengths)


def test_moved_layers_go_on_in_the_pages_that_they_have(
    kernel: Kernel, checkpoint: Checkpoint, whole: Any
) -> None:
    pipeline = Pipeline(load_stages(checkpoint, [2, 1]))
    pipeline.prefill(PROMPTS, [200, 60, 4])
    for _ in range(3):
        pipeline.decode()
    forget(pipeline)
    old, last = pipeline.stages
    moved = LayerRange(2, 3)
    new = Stage.load(checkpoint, LayerRange(0, 3), device=CPU, dtype=torch.float32, donor=old)
    out, into = last.export_kv(moved), new.import_kv(moved, 1 << 30)
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
    for _ in range(6):
        pipeline.decode()
        forget(pipeline)
    check(whole, pipeline.texts, [*map(len, PROMPTS)])


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
    kernel: Kernel,
    tmp_path: Path,
    fault: str,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    match fault:
        case "wrong":
            kernel.wrong = 1.1
        case "fails":
            kernel.fault = "FlashAttention is not built.\nMore of it."
        case "old GPU":
            monkeypatch.setattr(varlen, "facts_of", lambda device: Gpu("cuda", capability=(7, 5)))
        case _:
            monkeypatch.setattr(varlen, "_DTYPES", (torch.bfloat16,))
    (stage,) = load_stages(open_checkpoint(make_checkpoint(tmp_path, num_layers=1)), [1])
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
