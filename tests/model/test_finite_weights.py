"""Weights that are no numbers are found when they are loaded, and named."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distributed_llm.common.checkpoint import open_checkpoint
from distributed_llm.common.errors import CheckpointError, CheckpointUnavailable
from distributed_llm.common.types import LayerRange
from distributed_llm.common.weight_forms import Quantize
from distributed_llm.worker.model.stage import Stage
from distributed_llm.worker.model.task_inputs import TaskInputs
from distributed_llm.worker.session.events import Drop, Load, LoadFailed
from tests.checkpoints import HIDDEN_SIZE, VOCAB_SIZE, make_checkpoint
from tests.model.workers import Cluster, workers

NAN, INF = float("nan"), float("inf")
UP = "model.layers.2.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("whole"), tie=False)


def damaged(whole: Path, folder: Path, name: str, damage: Callable[[Tensor], object]) -> Path:
    """Write a copy of a checkpoint with another tensor `name`, which `damage` changes in place."""
    (folder / "config.json").write_bytes((whole / "config.json").read_bytes())
    tensors = load_file(whole / "model.safetensors")
    damage(tensors[name])
    save_file(tensors, folder / "model.safetensors")
    return folder


def load(folder: Path, start: int, stop: int, quantize: Quantize = "none") -> Stage:
    cpu, layers = torch.device("cpu"), LayerRange(start, stop)
    checkpoint = open_checkpoint(folder)
    return Stage.load(checkpoint, layers, device=cpu, dtype=torch.float32, quantize=quantize)


@pytest.mark.parametrize(
    ("name", "value", "quantize", "where"),
    [
        (UP, NAN, "none", "mlp.up_proj of layer 3"),
        (UP, INF, "none", "mlp.up_proj of layer 3"),
        (UP, NAN, "int8", "mlp.up_proj of layer 3"),
        (UP, NAN, "int4", "mlp.up_proj of layer 3"),
        ("model.layers.2.input_layernorm.weight", NAN, "none", "input_layernorm of layer 3"),
        ("model.norm.weight", INF, "none", "model.norm"),
        ("lm_head.weight", NAN, "none", "lm_head"),
    ],
)
def test_they_are_found_when_they_are_loaded(
    whole: Path, tmp_path: Path, name: str, value: float, quantize: Quantize, where: str
) -> None:
    """One number is enough. It will not be better the next time, so it is not tried again."""
    folder = damaged(whole, tmp_path, name, lambda tensor: tensor.view(-1)[5:6].fill_(value))
    with pytest.raises(CheckpointError) as caught:
        load(folder, 2, 4, quantize)
    assert f"Weights of the model in {folder} are not finite numbers: {where}. " in str(
        caught.value
    )
    assert "compare them with the original" in str(caught.value)
    assert not isinstance(caught.value, CheckpointUnavailable)
    load(folder, 0, 2, quantize)


def test_what_is_only_too_large_is_no_damage_of_the_files(whole: Path, tmp_path: Path) -> None:
    folder = damaged(whole, tmp_path, UP, lambda tensor: tensor.fill_(3e38))
    load(folder, 0, 4)


def test_what_one_token_does_not_show_is_found_by_trials(whole: Path, tmp_path: Path) -> None:
    """A worker gives the layers up, and says what is wrong."""
    tried, _ = TaskInputs(LayerRange(0, 4), HIDDEN_SIZE, VOCAB_SIZE).made_up(1)

    def damage(table: Tensor) -> None:
        kept = table[tried].clone()
        table.fill_(NAN)
        table[tried] = kept

    folder = damaged(whole, tmp_path, "model.embed_tokens.weight", damage)
    load(folder, 0, 4)
    with workers("a") as made:
        order = Cluster(folder, (("a", (0, 4)),), made).order(2, (0, 4), trials=True)
        made["a"].engine.put(Drop())
        failed = made["a"].ask(Load(0, order), LoadFailed)
        assert "are not finite numbers: model.embed_tokens. " in str(failed.error)
        assert isinstance(failed.error, CheckpointError)
        assert made["a"].engine._stages.served is None
