"""Layers with a window keep what a token may still see, and answer what transformers answers."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from distributed_llm.common.checkpoint import Checkpoint, open_checkpoint
from distributed_llm.common.layer_windows import layer_windows
from distributed_llm.common.messages import MissingPositions, SequenceSlice, SharedPrefix
from distributed_llm.common.types import KV_BLOCK, LayerRange, SequenceId
from distributed_llm.worker.kv import slabs
from distributed_llm.worker.kv.cache import KVCacheFull
from distributed_llm.worker.model import stage as stage_module
from distributed_llm.worker.model.failures import MissingPositionsError
from distributed_llm.worker.model.stage import Stage
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.model.driver import CPU, GREEDY, Pipeline, load_stages

NUM_LAYERS = 3
GENERATOR = torch.Generator().manual_seed(5)
PROMPTS = [torch.randint(VOCAB_SIZE, (n,), generator=GENERATOR).tolist() for n in (200, 75, 9)]
TEXTS = [torch.randint(VOCAB_SIZE, (300,), generator=GENERATOR).tolist() for _ in range(2)]
FAMILIES = ("mistral", "gemma2", "gpt_oss", "llama4_text")
"""All layers have a window; or some, with soft caps or with sinks; or some cut into sections."""
SETTINGS = {"llama4_text": {"attention_chunk_size": 7, "no_rope_layer_interval": 3}}
OTHERS = ("qwen2", "mixtral", "gemma3_text", "phi3", "cohere2", "starcoder2", "exaone4", "llama")


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    settings = SETTINGS.get(request.param, {})
    return make_checkpoint(path, request.param, num_layers=NUM_LAYERS, **settings)  # type: ignore[arg-type]


@pytest.fixture(params=["slabs", "exact", "pages"])
def pipeline(
    request: pytest.FixtureRequest, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> Pipeline:
    """Two stages, with buffers in slabs or of exactly the room that they need; or with pages."""
    if request.param == "exact":
        monkeypatch.setattr(slabs, "_pages_come_when_written", lambda: False)
    monkeypatch.setattr(stage_module, "in_pages", lambda *_: request.param == "pages")
    return Pipeline(load_stages(checkpoint, [1, 2]))


def forget(stages: Iterable[Stage], done: Iterable[int]) -> None:
    """Have stages drop what no token will see, if sequences are set back by one at most."""
    lengths = list(enumerate(done))
    for stage in stages:
        stage.forget({SequenceId(i): max(0, length - stage.window) for i, length in lengths})


def decode(pipeline: Pipeline, count: int) -> None:
    for _ in range(count):
        pipeline.decode()
        forget(pipeline.stages, pipeline.done)


def check(whole: Any, texts: list[list[int]], lengths: list[int]) -> None:
    """Fail unless transformers goes on from the first tokens of each text as the text does."""
    for text, length in zip(texts, lengths, strict=True):
        with torch.inference_mode():
            logits = whole(torch.tensor([text])).logits[0]
        assert text[length:] == logits[length - 1 : -1].argmax(-1).tolist()


def test_tokens_are_those_of_transformers(pipeline: Pipeline, whole: Any) -> None:
    """Prompts in chunks, ragged decoding, a child, a turn that takes the last, a repeated task."""
    pipeline.prefill(PROMPTS, [0, 0, 0])
    for chunks in ([(0, 0, 90), (2, 0, 5)], [(0, 90, 199), (1, 0, 74)]):
        pipeline.run(chunks, sampling=None)
        forget(pipeline.stages, pipeline.done)
    decode(pipeline, 4)
    pipeline.share(0, pipeline.done[0], [7, 8, 9])
    pipeline.share(1, pipeline.done[1], [1] * 90)
    lengths = [*map(len, PROMPTS), *map(len, pipeline.texts[3:])]
    decode(pipeline, 3)
    number, length = 0, pipeline.done[0]
    again = pipeline.run([(number, length - 1, length)])
    assert again == [pipeline.texts[number][length]]
    decode(pipeline, 20)
    check(whole, pipeline.texts, lengths)


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_what_config_tells_is_what_layers_do(family: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path, family, num_layers=4))
    told = layer_windows(checkpoint.config, 4)
    stage = Stage.load(checkpoint, LayerRange(0, 4), device=CPU, dtype=torch.float32)
    assert told == stage._cache.windows
    assert any(told) == (family != "llama")
    before = {name: value for name, value in checkpoint.config.items() if name != "layer_types"}
    if family not in ("gpt_oss", "llama"):  # gpt_oss has always told
        config = AutoConfig.for_model(**before)
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * 4
        size = getattr(config, "attention_chunk_size", None) or config.sliding_window or 0
        windows = tuple(size * (one in ("sliding_attention", "chunked_attention")) for one in kinds)
        assert layer_windows(before, 4) == windows


DEFAULTS = {"gemma3n_text": (5, 5, 5, 5, 0, 5, 5), "gemma4_text": (5, 5, 5, 5, 5, 0, 0)}
"""Windows of seven layers, if config.json does not list their types."""


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("family", DEFAULTS)
def test_plans_count_windows_whether_types_are_listed_or_not(
    family: str, listed: bool, tmp_path: Path
) -> None:
    """The list gives the last layer a window, which that of Gemma 4 never has."""
    windows = (0, 5, 0, 5, 0, 5, 5) if listed else DEFAULTS[family]
    kinds = ["sliding_attention" if window else "full_attention" for window in windows]
    made = make_checkpoint(tmp_path, family, num_layers=7, layer_types=list(kinds))
    path = made / "config.json"
    config = {**json.loads(path.read_text()), "layer_types": kinds if listed else None}
    if config.pop("per_layer_config", None):  # which tells the types once more
        config["global_head_dim"] = 32
    path.write_text(json.dumps(config))
    checkpoint = open_checkpoint(tmp_path)
    stage = Stage.load(checkpoint, LayerRange(0, 7), device=CPU, dtype=torch.float32)
    told = layer_windows(checkpoint.config, 7)
    assert told == (*windows[:6], DEFAULTS[family][6])
    assert stage._cache.windows == told
    assert stage.window == max(told)
    sizes = checkpoint.layer_kv_bytes("float32")
    assert stage.kv_bytes_per_token == sum(sizes)
    windowed = sum(size for size, window in zip(sizes, told, strict=True) if window)
    assert stage.kv_windowed_bytes_per_token == windowed


def test_gpt_neo_has_words_of_its_own(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path, "gpt_neo", num_layers=4))
    told = layer_windows(checkpoint.config, 4)
    stage = Stage.load(checkpoint, LayerRange(0, 4), device=CPU, dtype=torch.float32)
    assert told == (0, 5, 0, 5) == stage._cache.windows


@pytest.mark.parametrize("slab", [True, False])
def test_what_is_dropped_changes_no_bit(
    checkpoint: Checkpoint, slab: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16, which other kernels read."""
    if not slab:
        monkeypatch.setattr(slabs, "_pages_come_when_written", lambda: False)
    layers = LayerRange(0, NUM_LAYERS - 1)
    kept, dropped = (
        Stage.load(checkpoint, layers, device=CPU, dtype=torch.bfloat16) for _ in range(2)
    )
    step = [(0, 0, 150), (1, 0, 64)]
    for _ in range(20):
        slices = [
            SequenceSlice(sequence_id=SequenceId(i), start=start, num_tokens=stop - start)
            for i, start, stop in step
        ]
        tokens = torch.tensor([t for i, start, stop in step for t in TEXTS[i][start:stop]])
        found = [stage.run(slices, tokens.int(), None).hidden_states for stage in (kept, dropped)]
        assert found[0] is not None
        assert found[1] is not None
        assert torch.equal(found[0], found[1])
        forget([dropped], [stop for _, _, stop in step])
        step = [(i, stop, stop + 1) for i, _, stop in step]
    assert dropped.kv_bytes < kept.kv_bytes


def test_memory_is_that_of_the_window(pipeline: Pipeline) -> None:
    pipeline.prefill(PROMPTS[:1], [len(PROMPTS[0]) - 1])
    for stage in pipeline.stages:
        windowed, every = stage.kv_windowed_bytes_per_token, stage.kv_bytes_per_token
        assert stage._held_sequences.nbytes == 4 * KV_BLOCK * every
        stage.limit_kv(KV_BLOCK * (7 * (every - windowed) + 2 * windowed))
    forget(pipeline.stages, pipeline.done)
    for stage in pipeline.stages:
        windowed, every = stage.kv_windowed_bytes_per_token, stage.kv_bytes_per_token
        assert stage._held_sequences.nbytes == KV_BLOCK * (4 * (every - windowed) + windowed)
    pipeline.texts[0] += PROMPTS[0]
    for start in (199, 263, 327):
        pipeline.run([(0, start, start + KV_BLOCK)], sampling=None)
        forget(pipeline.stages, pipeline.done)
    pipeline.share(0, 391, [1] * 129)
    with pytest.raises(KVCacheFull):  # a child of three blocks
        pipeline.run([(1, 391, 520)], sampling=None)
    for stage in pipeline.stages:
        stage.release([SequenceId(0), SequenceId(1)])
        assert stage._held_sequences.nbytes == 0


def test_who_would_see_what_was_dropped_begins_again(checkpoint: Checkpoint) -> None:
    stages = load_stages(checkpoint, [1, 2])
    pipeline = Pipeline(stages)
    pipeline.prefill(PROMPTS[:1], [199])
    forget(stages, pipeline.done)
    windowed = [stage for stage in stages if stage.window]
    tokens = torch.tensor([1], dtype=torch.int32)
    assert windowed
    for stage in windowed:
        hidden_states = None if not stage.layers.start else stage.inputs.made_up(1)[1]
        early = SequenceSlice(sequence_id=SequenceId(0), start=150, num_tokens=1, sampling=GREEDY)
        child = SequenceSlice(
            sequence_id=SequenceId(1),
            start=150,
            num_tokens=1,
            sampling=GREEDY,
            prefix=SharedPrefix(sequence_id=SequenceId(0), length=150),
        )
        for part in (early, child):
            with pytest.raises(MissingPositionsError) as caught:
                stage.run([part], tokens, hidden_states)
            assert caught.value.missing == (MissingPositions(sequence_id=part.sequence_id, have=0),)


@pytest.mark.parametrize("also_before", [False, True])
def test_moved_layers_go_on(
    pipeline: Pipeline, checkpoint: Checkpoint, whole: Any, also_before: bool
) -> None:
    """All layers go to one new worker: what was dropped before and during the copy stays away."""
    pipeline.prefill(PROMPTS, [len(prompt) - 1 for prompt in PROMPTS])
    decode(pipeline, 1 if also_before else 0)
    old = pipeline.stages
    moved = Stage.load(checkpoint, LayerRange(0, NUM_LAYERS), device=CPU, dtype=torch.float32)
    transfers = [(s.export_kv(s.layers), moved.import_kv(s.layers, 1 << 24)) for s in old]
    for out, into in transfers:
        for piece in out.next_chunk(20_000, 100) or []:
            into.add(piece)
    decode(pipeline, 4)
    for (out, into), stage in zip(transfers, old, strict=True):
        while (pieces := out.next_chunk(50_000, 100)) is not None:
            for piece in pieces:
                into.add(piece)
        into.update(stage.kv_manifest())
    moved.assemble_kv(None, [into for _, into in transfers])
    assert moved._held_sequences.nbytes == sum(stage._held_sequences.nbytes for stage in old)
    pipeline.stages = [moved]
    decode(pipeline, 10)
    check(whole, pipeline.texts, [len(prompt) for prompt in PROMPTS])
