"""Blocks that several layers share are read and kept once, wherever their layers are."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed_llm.common.checkpoint import Checkpoint, open_checkpoint
from distributed_llm.common.shared_blocks import block_sources
from distributed_llm.common.types import LayerRange
from distributed_llm.coordinator.inspect_model import model_cost
from distributed_llm.worker.model.stage import Stage
from tests.checkpoints import build_model, make_checkpoint
from tests.model.driver import CPU, Pipeline
from tests.reference import generated

NUM_LAYERS = 4
SETTINGS: dict[str, Any] = {
    "num_layers": NUM_LAYERS,
    "layers_block_type": ["hybrid", "hybrid", "linear_attention", "hybrid"],
    "num_mem_blocks": 2,
    "use_mem_rope": False,
}
"""Layers 0 and 3 share a block, layer 1 has the other one."""
PROMPT = [5, 17, 99, 3, 44, 8]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(make_checkpoint(tmp_path_factory.mktemp("m"), "zamba2", **SETTINGS))


@pytest.fixture(scope="module")
def answer() -> list[int]:
    return generated(build_model("zamba2", **SETTINGS), PROMPT, 5)


def load(checkpoint: Checkpoint, start: int, stop: int, donor: Stage | None = None) -> Stage:
    layers = LayerRange(start, stop)
    return Stage.load(checkpoint, layers, device=CPU, dtype=torch.float32, donor=donor)


def answered(*stages: Stage) -> list[int]:
    for stage in stages:
        stage.reset()
    pipeline = Pipeline(list(stages))
    pipeline.prefill([PROMPT], [0])
    return [token for _ in range(5) for token in pipeline.decode()]


def block_bytes(checkpoint: Checkpoint, *sources: int) -> int:
    return sum(
        checkpoint.weight_bytes(weight, "float32", "none")
        for name, weight in checkpoint.weights.items()
        if checkpoint.block_of(name) in sources
    )


def test_sources_are_the_first_layers_with_a_block() -> None:
    kinds = ["mamba", "hybrid", "hybrid", "mamba", "hybrid", "hybrid"]
    config = {"model_type": "zamba2", "layers_block_type": kinds, "num_mem_blocks": 2}
    assert block_sources(config, 6) == (None, 1, 2, None, 1, 2)
    assert block_sources({**config, "num_mem_blocks": 1}, 6) == (None, 1, 1, None, 1, 1)
    assert block_sources({**config, "model_type": "bamba"}, 6) == (None,) * 6


@pytest.mark.parametrize("cuts", [(4,), (1, 4), (2, 3, 4), (1, 2, 3, 4)], ids=str)
def test_split_anywhere_it_answers_as_transformers_does(
    checkpoint: Checkpoint, answer: list[int], cuts: tuple[int, ...]
) -> None:
    stages = [load(checkpoint, *both) for both in pairwise((0, *cuts))]
    assert answered(*stages) == answer


def test_a_stage_keeps_each_of_its_blocks_once(checkpoint: Checkpoint) -> None:
    """What is planned has both blocks in every stage."""
    cost = model_cost(checkpoint, "float32")
    whole, last = load(checkpoint, 0, 4), load(checkpoint, 2, 4)
    buffers = whole.weight_bytes - sum(cost.layer_bytes) - cost.each_bytes - cost.last_bytes
    assert 0 <= buffers < 100
    planned = sum(cost.layer_bytes[2:]) + cost.each_bytes + cost.last_bytes
    assert last.weight_bytes == planned - block_bytes(checkpoint, 1) + buffers


def test_a_block_is_shared_with_another_stage(checkpoint: Checkpoint, answer: list[int]) -> None:
    first = load(checkpoint, 0, 1)
    whole = load(checkpoint, 0, 4, first)
    assert whole.weight_bytes == load(checkpoint, 0, 4).weight_bytes
    assert whole.shared_weight_bytes == first.weight_bytes
    rest = load(checkpoint, 1, 4, whole)
    assert rest.shared_weight_bytes == rest.weight_bytes
    assert answered(whole) == answered(first, rest) == answer


def test_files_that_repeat_a_block_are_read_like_others(
    tmp_path: Path, checkpoint: Checkpoint, answer: list[int]
) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(checkpoint.folder / "model.safetensors")
    assert not any(".3.shared_transformer." in name for name in tensors)
    for name in [name for name in tensors if ".0.shared_transformer." in name]:
        tensors[name.replace(".0.", ".3.", 1)] = torch.zeros_like(tensors[name])
    (tmp_path / "config.json").write_bytes((checkpoint.folder / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    assert answered(load(open_checkpoint(tmp_path), 0, 4)) == answer
