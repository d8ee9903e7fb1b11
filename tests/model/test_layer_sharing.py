"""Layers that read the keys and values of others, wherever the cut is that their model allows."""

import operator
from collections.abc import Sequence
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed_llm.common.checkpoint import Checkpoint, open_checkpoint
from distributed_llm.common.errors import CheckpointError
from distributed_llm.common.layer_sharing import kv_lenders, uncut
from distributed_llm.common.model_sizes import check_sizes
from distributed_llm.common.types import KV_BLOCK, LayerRange
from distributed_llm.coordinator.inspect_model import model_cost
from distributed_llm.worker.kv.held_transfer import HeldImporter
from distributed_llm.worker.model.stage import Stage
from tests.checkpoints import VOCAB_SIZE, build_model, make_checkpoint
from tests.model.driver import CPU, Pipeline
from tests.reference import generated

NUM_LAYERS = 6
SHARED = 3
KINDS = ["sliding_attention", "full_attention"]
CUTS = ([6], [1, 5])
LENGTHS = (23, 3, 12)
NEW_TOKENS = 6


@pytest.fixture(scope="module", params=["gemma3n_text", "gemma4_text"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    settings: dict[str, Any] = {"num_kv_shared_layers": SHARED, "layer_types": KINDS}
    return make_checkpoint(path, request.param, num_layers=NUM_LAYERS, **settings)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    draw = torch.Generator().manual_seed(7)
    return [torch.randint(VOCAB_SIZE, (n,), generator=draw).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def answers(whole: Any, prompts: list[list[int]]) -> list[list[int]]:
    return [generated(whole, prompt, NEW_TOKENS) for prompt in prompts]


@cache
def load(folder: Path, layers: LayerRange) -> Stage:
    return Stage.load(open_checkpoint(folder), layers, device=CPU, dtype=torch.float32)


def pipeline_of(folder: Path, split: Sequence[int]) -> Pipeline:
    stages = [load(folder, LayerRange(*edges)) for edges in pairwise(accumulate([0, *split]))]
    for stage in stages:
        stage.reset()
    return Pipeline(stages)


def decoded(pipeline: Pipeline, count: int, numbers: Sequence[int]) -> list[list[int]]:
    steps = [pipeline.decode(numbers=numbers) for _ in range(count)]
    return [list(tokens) for tokens in zip(*steps, strict=True)]


def test_the_cuts_here_are_those_that_are_allowed(checkpoint: Checkpoint) -> None:
    lenders = kv_lenders(checkpoint.config, NUM_LAYERS)
    assert lenders == (None, None, None, 1, 2, 1)
    assert uncut(checkpoint.config, NUM_LAYERS) == (2, 3, 4, 5)


@pytest.mark.parametrize("split", CUTS, ids=str)
def test_tokens_are_those_of_generate(
    folder: Path, prompts: list[list[int]], answers: list[list[int]], split: Sequence[int]
) -> None:
    pipeline = pipeline_of(folder, split)
    pipeline.prefill(prompts, [4, 2, 11])
    pipeline.run([(0, 4, 9), (1, 2, 3), (2, 11, 12)])  # chunks, and single tokens among them
    pipeline.run([(0, 9, 22)], sampling=None)
    pipeline.done[1:] = [length - 1 for length in LENGTHS[1:]]
    assert decoded(pipeline, NEW_TOKENS, [0, 1, 2]) == answers
    assert len({token for tokens in answers for token in tokens}) > 4


def test_what_begins_alike_is_shared(
    folder: Path, prompts: list[list[int]], answers: list[list[int]]
) -> None:
    pipeline = pipeline_of(folder, [1, 5])
    pipeline.prefill(prompts[:1], [20])
    child = pipeline.share(0, 20, prompts[0][20:])
    pipeline.run([(0, 20, 21), (child, 20, 22)])
    assert decoded(pipeline, NEW_TOKENS, [child]) == answers[:1]


def test_borrowers_keep_nothing_and_cost_nothing(folder: Path, checkpoint: Checkpoint) -> None:
    planned = checkpoint.layer_kv_bytes("float32")
    assert [layer for layer, size in enumerate(planned) if not size] == [3, 4, 5]
    cost = model_cost(checkpoint, "float32")
    for layers in (LayerRange(0, 1), LayerRange(1, 6), LayerRange(0, 6)):
        stage = load(folder, layers)
        assert stage.kv_bytes_per_token == cost.kv_bytes(layers)
        weights = sum(p.nbytes for p in stage._held.model.parameters())
        buffers = stage.weight_bytes - weights  # rotary frequencies and scales, of no file
        assert 0 <= cost.weight_bytes(layers) - weights <= buffers < 2000
    assert cost.uncut == (2, 3, 4, 5)
    inside = sum(p.nbytes for p in load(folder, LayerRange(0, 6))._held.layers[3].parameters())
    assert cost.table_bytes[3] > 0
    assert cost.sizes_away([3]) == [cost.read_bytes[3]]
    assert cost.read_bytes[3] - inside <= 4  # a scale that is no parameter


def test_a_stage_without_the_lenders_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match="layers 4-6 read keys and values of layers before them"):
        Stage.load(checkpoint, LayerRange(3, 6), device=CPU, dtype=torch.float32)


@pytest.mark.parametrize("donated", [False, True])
def test_kv_cache_moves_with_the_lenders(
    checkpoint: Checkpoint,
    folder: Path,
    prompts: list[list[int]],
    answers: list[list[int]],
    donated: bool,
) -> None:
    """To a worker that had no layer, or that had the first one."""
    pipeline = pipeline_of(folder, [1, 5])
    pipeline.prefill(prompts, [length - 1 for length in LENGTHS])
    before = decoded(pipeline, 3, [0, 1, 2])
    first, second = pipeline.stages
    whole = Stage.load(
        checkpoint,
        LayerRange(0, 6),
        device=CPU,
        dtype=torch.float32,
        donor=first if donated else None,
    )
    sources = [second] if donated else [first, second]
    imports = [moved(source, whole) for source in sources]
    whole.assemble_kv(first if donated else None, imports)
    whole.limit_kv(64 * KV_BLOCK * whole.kv_bytes_per_token)
    pipeline.stages = [whole]
    after = decoded(pipeline, NEW_TOKENS - 3, [0, 1, 2])
    assert list(map(operator.add, before, after)) == answers


def test_a_stage_that_keeps_its_layers_reads_nothing_again(checkpoint: Checkpoint) -> None:
    for layers, other in (((1, 6), (1, 6)), ((0, 6), (0, 6)), ((0, 1), (0, 6))):
        donor = Stage.load(checkpoint, LayerRange(*layers), device=CPU, dtype=torch.float32)
        stage = Stage.load(
            checkpoint, LayerRange(*other), device=CPU, dtype=torch.float32, donor=donor
        )
        unshared = stage.weight_bytes - stage.shared_weight_bytes
        assert (unshared < 2000) == (layers == other)  # what is no weight may be made again


def moved(source: Stage, receiver: Stage) -> HeldImporter:
    """Return what a stage holds, on its way to another."""
    into, out = receiver.import_kv(source.layers, 1 << 24), source.export_kv(source.layers)
    while (pieces := out.next_chunk(1 << 20, 10)) is not None:
        for piece in pieces:
            into.add(piece)
    into.update(source.kv_manifest())
    return into


def test_projections_that_nobody_reads_are_left_out(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Published files have them for borrowers too."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.0.self_attn.k_proj.weight"))
    tensors[name.replace("layers.0", "layers.4")] = tensors[name].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    checkpoint = open_checkpoint(tmp_path)
    assert "or of keys and values that are never read" in caplog.text
    plain = open_checkpoint(folder)
    assert checkpoint.num_parameters == plain.num_parameters
    assert model_cost(checkpoint, "float32") == model_cost(plain, "float32")


def test_a_table_by_layer_that_lacks_tokens_is_refused() -> None:
    """Transformers would read beyond its end, and every request fail."""
    config = build_model("gemma4_text").config.to_dict()
    check_sizes(config)
    with pytest.raises(CheckpointError, match="vocab_size_per_layer_input = 100, but vocab_size"):
        check_sizes({**config, "vocab_size_per_layer_input": 100})
