"""Checkpoints that people run are planned as large as they are; small ones of them answer right.

Plans are made from the published config.json alone. Small checkpoints have the same structure, the
tensor names of those on the hub, in several files with an index, and layers that predict several
tokens at once where the published ones have them.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from distributed_llm.common.checkpoint import Checkpoint, open_checkpoint
from distributed_llm.common.model_folder import read_config
from distributed_llm.common.other_formats import INDEX_NAME
from distributed_llm.common.settings import CoordinatorSettings
from distributed_llm.coordinator import serve
from distributed_llm.coordinator.inspect_model import model_cost
from distributed_llm.worker.model.empty_model import parameters_of
from distributed_llm.worker.model.stage import Stage
from tests.checkpoints import random_model
from tests.model.driver import Pipeline, load_stages
from tests.real_configs import REAL, shrunk
from tests.real_encoder_decoders import REAL_STACKS
from tests.reference import generated

PROMPTS = [list(range(3, 22)), [7, 5]]
NEW_TOKENS = 5
PLANNED_ONLY = "microsoft/Phi-4-mini-instruct"
"""Its factors of positions (longrope) have as many numbers as its heads are wide."""


def write_config(folder: Path, config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", [*REAL, *REAL_STACKS])
def test_a_plan_is_as_large_as_the_checkpoint(name: str, tmp_path: Path) -> None:
    real = {**REAL, **REAL_STACKS}[name]
    config = read_config(write_config(tmp_path, real.config))
    cost = model_cost(Checkpoint(tmp_path, config, parameters_of(config)), "bfloat16")
    assert cost.num_layers == real.layers
    assert cost.all_weight_bytes == pytest.approx(2e9 * real.billions, rel=0.01)
    assert sum(cost.layer_kv_bytes) == real.kv_bytes


@pytest.mark.parametrize("name", REAL)
def test_what_transformers_makes_of_the_config_is_as_large(name: str) -> None:
    """Its own class, for the whole model, without the parts for pictures."""
    config = CONFIG_MAPPING[REAL[name].config["model_type"]].from_dict(dict(REAL[name].config))
    with torch.device("meta"):
        whole = _kind_of(config)._from_config(config, dtype=torch.bfloat16)
    parts = ("vision", "visual", "multi_modal_projector")
    tied = whole.all_tied_weights_keys
    numbers = sum(
        tensor.numel()
        for path, tensor in whole.named_parameters(remove_duplicate=False)
        if not any(part in path for part in parts) and path not in tied
    )
    assert numbers == pytest.approx(1e9 * REAL[name].billions, rel=0.002)


def test_the_command_plans_a_text_model(tmp_path: Path) -> None:
    real = REAL["google/gemma-3-27b-it"]
    run = serve.plan(
        *(str(write_config(tmp_path, real.config)), ["a=40GiB", "b=40GiB"], CoordinatorSettings()),
        parameters_of=parameters_of,
        check_loading=Stage.check_loading,
    )
    assert sum(len(stage.layers) for stage in run.plans[0]) == real.layers
    assert run.full_bytes == pytest.approx(2e9 * real.billions, rel=0.01)


def _kind_of(config: Any) -> Any:
    wholes = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return (wholes if hasattr(config, "text_config") else MODEL_FOR_CAUSAL_LM_MAPPING)[type(config)]


@cache
def small_model(name: str) -> Any:
    """Return a small random model for the whole, with little for pictures."""
    values = shrunk(REAL[name])
    if "vision_config" in values:
        values["vision_config"] |= {
            name: 2 if name in ("depth", "num_hidden_layers") else 32
            for name in ("depth", "num_hidden_layers", "hidden_size", "intermediate_size")
            if name in values["vision_config"]
        }
    config = CONFIG_MAPPING[values["model_type"]].from_dict(values)
    return random_model(_kind_of(config), config)


def write_small(name: str, folder: Path) -> None:
    """Write a small checkpoint with the published config.json, but for sizes."""
    small_model(name).save_pretrained(folder, max_shard_size="100KB")
    write_config(folder, {**shrunk(REAL[name]), "torch_dtype": "float32"})
    if REAL[name].config.get("num_nextn_predict_layers"):
        _add_layer_that_predicts(folder)


def _add_layer_that_predicts(folder: Path) -> None:
    """Add what published files have beyond the last layer."""
    index = json.loads((folder / INDEX_NAME).read_text())
    map_ = index["weight_map"]
    file = "model-99999-of-99999.safetensors"
    tensors = {}
    for name, held_in in list(map_.items()):
        if name.startswith("model.layers.3."):
            extra = name.replace("model.layers.3.", "model.layers.4.")
            tensors[extra] = load_file(folder / held_in)[name]
            map_[extra] = file
    tensors["model.layers.4.eh_proj.weight"] = torch.zeros(64, 128)
    map_["model.layers.4.eh_proj.weight"] = file
    save_file(tensors, folder / file)
    (folder / INDEX_NAME).write_text(json.dumps(index))


@pytest.mark.parametrize("name", [name for name in REAL if name != PLANNED_ONLY])
def test_a_small_one_of_the_same_structure_answers_as_transformers(
    name: str, tmp_path: Path
) -> None:
    whole = small_model(name)
    write_small(name, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.num_layers == 4
    pipeline = Pipeline(load_stages(checkpoint, [1, 3]))
    pipeline.prefill(PROMPTS, [len(prompt) - 1 for prompt in PROMPTS])
    found = [pipeline.decode() for _ in range(NEW_TOKENS)]
    for number, prompt in enumerate(PROMPTS):
        assert [tokens[number] for tokens in found] == generated(whole, prompt, NEW_TOKENS)
