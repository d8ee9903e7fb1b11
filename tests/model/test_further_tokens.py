"""Layers that predict several tokens at once are in the files of some models, and left out."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from distributed_llm.common.checkpoint import open_checkpoint
from distributed_llm.common.other_formats import INDEX_NAME
from distributed_llm.common.settings import CoordinatorSettings
from distributed_llm.coordinator import serve
from distributed_llm.coordinator.inspect_model import model_cost
from distributed_llm.worker.model.empty_model import parameters_of
from distributed_llm.worker.model.stage import Stage
from tests.checkpoints import make_checkpoint
from tests.model.driver import Pipeline, load_stages
from tests.quantized_checkpoints import make_quantized
from tests.reference import reference_ids

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
NUM_LAYERS = 2
FAMILIES = {
    "deepseek_v3": "model.layers.2",
    "glm4_moe": "model.layers.2",
    "mimo_v2_flash": "model.mtp.layers.0",
    "qwen3_moe": "mtp.layers.0",
}
"""What begins the names of those layers, as in published files."""


def plan(model: Path) -> Any:
    return serve.plan(
        *(str(model), ("pc=40MiB", "mac=40MiB"), CoordinatorSettings()),
        parameters_of=parameters_of,
        check_loading=Stage.check_loading,
    )


def add_layer(folder: Path, prefix: str) -> None:
    """Write to `folder` a copy of the last layer, and what joins it with the embedding."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    last = f"model.layers.{NUM_LAYERS - 1}."
    added = {
        f"{prefix}.{name.removeprefix(last)}": tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith(last)
    }
    table = tensors["model.embed_tokens.weight"]
    for name in ("embed_tokens.weight", "shared_head.head.weight", "eh_proj.weight"):
        added[f"{prefix}.{name}"] = table.clone()
    added[f"{prefix}.shared_head.norm.weight"] = table[0].clone()
    save_file(tensors | added, path, metadata={"format": "pt"})


def answer(folder: Path) -> list[int]:
    pipeline = Pipeline(load_stages(open_checkpoint(folder), [1, 1]))
    pipeline.prefill([PROMPT], [len(PROMPT) - 1])
    return [pipeline.decode()[0] for _ in range(5)]


@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_neither_planned_nor_read(tmp_path: Path, family: str) -> None:
    folder = make_checkpoint(tmp_path, family, num_layers=NUM_LAYERS, num_nextn_predict_layers=1)
    expected, cost, planned = reference_ids(folder, PROMPT, 5), plan_cost(folder), plan(folder)
    add_layer(folder, FAMILIES[family])
    assert plan_cost(folder) == cost
    assert plan(folder).plans == planned.plans
    assert answer(folder) == expected
    names = load_file(folder / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-1.safetensors")}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    assert plan(folder).plans == planned.plans


def plan_cost(folder: Path) -> Any:
    checkpoint = open_checkpoint(folder)
    return checkpoint.num_parameters, model_cost(checkpoint, "float32")


def test_they_may_be_in_a_file_that_is_not_there(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "qwen3_moe", num_layers=NUM_LAYERS)
    cost = plan_cost(folder)
    files = dict.fromkeys(load_file(folder / "model.safetensors"), "model-1.safetensors")
    files["mtp.layers.0.mlp.gate.weight"] = files["model.layers.2.eh_proj.weight"] = (
        "mtp.safetensors"
    )
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": files}))
    assert plan_cost(folder) == cost


@pytest.mark.parametrize("prefix", ["model.layers.2", "mtp.layers.0"])
def test_they_may_be_quantized(tmp_path: Path, prefix: str) -> None:
    folder, _ = make_quantized(tmp_path, "fp8")
    expected, cost = answer(folder), plan_cost(folder)
    add_layer(folder, prefix)
    assert plan_cost(folder) == cost
    assert answer(folder) == expected
    assert plan(folder)
