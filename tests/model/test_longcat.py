"""LongCat-Flash: layers that attend twice are moved whole, and some experts compute nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from distributed_llm.common.checkpoint import open_checkpoint
from distributed_llm.common.types import KV_BLOCK, LayerRange
from distributed_llm.worker.model.stage import Stage
from tests.checkpoints import build_model, make_checkpoint
from tests.model.driver import CPU, Pipeline, load_stages
from tests.model.test_engine_moves import move
from tests.model.workers import Cluster, workers
from tests.reference import generated

SETTINGS: dict[str, Any] = {"num_layers": 3, "expert_ffn_hidden_size": 40}
TEXT = [5, 17, 99, 3, 44, 8, 71, 20, 9, 64]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("longcat"), "longcat_flash", **SETTINGS)


@pytest.fixture(scope="module")
def answer() -> list[int]:
    return generated(build_model("longcat_flash", **SETTINGS), TEXT, 6)


def test_both_places_of_a_layer_are_moved(folder: Path, answer: list[int]) -> None:
    with workers("a", "b") as made:
        cluster = Cluster(folder, (("a", (0, 2)), ("b", (2, 3))), made)
        cluster.prefill([TEXT], [len(TEXT) - 1])
        cluster.decode()
        move(cluster, 2, (("b", (0, 2)), ("a", (2, 3))))
        for _ in range(5):
            cluster.decode()
        assert cluster.texts[0][len(TEXT) :] == answer
        assert all(worker.silent for worker in made.values())
        held = sum(worker.engine.vitals.kv_bytes for worker in made.values())
        assert held == KV_BLOCK * sum(open_checkpoint(folder).layer_kv_bytes("float32"))


def test_files_without_idle_experts_are_read_like_those_that_transformers_writes(
    tmp_path: Path, folder: Path, answer: list[int]
) -> None:
    written: dict[str, Any] = load_file(folder / "model.safetensors")
    published = {name: tensor for name, tensor in written.items() if ".experts.5." not in name}
    published = {name: tensor for name, tensor in published.items() if ".experts.4." not in name}
    assert len(published) == len(written) - 3 * 2 * 2
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(published, tmp_path / "model.safetensors")
    pipeline = Pipeline(load_stages(open_checkpoint(tmp_path), [3]))
    pipeline.prefill([TEXT], [0])
    assert [token for _ in range(6) for token in pipeline.decode()] == answer


def test_experts_that_compute_become_integers(folder: Path) -> None:
    checkpoint, layers = open_checkpoint(folder), LayerRange(0, 3)
    stage = Stage.load(checkpoint, layers, device=CPU, dtype=torch.float32, quantize="int8")
    layer: Any = stage._held.layers[0]
    experts = layer.mlp.experts
    assert {type(layer).__name__ for layer in (*experts.up, *experts.down)} == {"QuantLinear"}
    assert len(experts.up) == 4
