"""Only the tensors of a range are loaded, and none is ever made up."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from distributed_llm.common.checkpoint import Checkpoint, open_checkpoint
from distributed_llm.common.errors import CheckpointError
from distributed_llm.common.types import LayerRange
from distributed_llm.worker.model.shared_weights import StageModel
from distributed_llm.worker.model.weights import load_stage_model
from tests.checkpoints import HIDDEN_SIZE, make_checkpoint
from tests.model.driver import CPU


def load(checkpoint: Checkpoint, start: int, stop: int) -> StageModel:
    return load_stage_model(checkpoint, LayerRange(start, stop), device=CPU, dtype=torch.float32)


def edit(folder: Path, **changes: torch.Tensor | None) -> Checkpoint:
    """Replace tensors of a checkpoint; None removes one."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, path, metadata={"format": "pt"})
    return open_checkpoint(folder)


@pytest.mark.parametrize(
    ("family", "tie"),
    [("llama", False), ("llama", True), ("gpt2", True), ("opt", True), ("mixtral", False)],
)
def test_stages_hold_their_weights_and_no_others(tmp_path: Path, family: str, tie: bool) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path, family, tie=tie))
    stages = [load(checkpoint, 0, 1), load(checkpoint, 1, 3), load(checkpoint, 3, 4)]
    for stage, layers in zip(stages, ((0, 1), (1, 3), (3, 4)), strict=True):
        wanted = sum(t.nbytes for t in checkpoint.tensors_of(LayerRange(*layers)))
        buffers = sum(buffer.nbytes for buffer in stage.model.buffers())
        assert stage.nbytes == wanted + buffers
        assert not any(tensor.is_meta for tensor in stage.model.parameters())
        assert not any(tensor.is_meta for tensor in stage.model.buffers())
    for stage, count in zip(stages, (1, 0, 1), strict=True):
        names = [name for name, _ in stage.model.named_parameters()]  # a tied one once
        vocabulary = [name for name in names if re.search(r"embed_tokens|wte|lm_head", name)]
        assert len(vocabulary) == count


def test_every_tensor_is_told_when_it_is_read(tmp_path: Path) -> None:
    """So that others know that a load gets on."""
    checkpoint = open_checkpoint(make_checkpoint(tmp_path))
    layers, read = LayerRange(1, 3), list[int]()
    load_stage_model(checkpoint, layers, device=CPU, dtype=torch.float32, on_read=read.append)
    assert sorted(read) == sorted(tensor.nbytes for tensor in checkpoint.tensors_of(layers))


def test_weights_own_their_memory(tmp_path: Path) -> None:
    """The files may change once a stage is loaded."""
    folder = make_checkpoint(tmp_path)
    stage = load(open_checkpoint(folder), 0, 4)
    before = {name: tensor.clone() for name, tensor in stage.model.state_dict().items()}
    path = folder / "model.safetensors"
    with open(path, "r+b") as file:
        size = path.stat().st_size
        file.seek(size // 4)
        file.write(b"\xff" * (size - size // 4))
    for name, tensor in stage.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_come_in_the_dtype_asked_for(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path, "mixtral"))
    stage = load_stage_model(checkpoint, LayerRange(1, 3), device=CPU, dtype=dtype)
    assert {parameter.dtype for parameter in stage.model.parameters()} == {dtype}


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.self_attn.k_proj.weight",
        "model.layers.3.input_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.embed_tokens.weight",
    ],
)
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    checkpoint = edit(make_checkpoint(tmp_path), **{name: None})
    start, stop = (0, 1) if "embed" in name else (1, 4)
    with pytest.raises(CheckpointError, match=f"lacks tensor {name}.*download it again"):
        load(checkpoint, start, stop)


def test_a_missing_expert_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "mixtral")
    checkpoint = edit(folder, **{"model.layers.2.block_sparse_moe.experts.1.w2.weight": None})
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.experts\.down_proj"):
        load(checkpoint, 1, 4)
    load(checkpoint, 0, 2)


@pytest.mark.parametrize("name", ["model.layers.2.self_attn.q_norm.weight", "model.extra.weight"])
def test_an_unknown_tensor_is_named(tmp_path: Path, name: str) -> None:
    checkpoint = edit(make_checkpoint(tmp_path), **{name: torch.ones(3)})
    with pytest.raises(CheckpointError, match=f"has the unknown tensor {name}"):
        load(checkpoint, 1, 4)


def test_buffers_that_old_checkpoints_hold_are_passed_over(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    name = "model.layers.2.self_attn.rotary_emb.inv_freq"
    load(edit(folder, **{name: torch.ones(4)}), 1, 4)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    checkpoint = edit(make_checkpoint(tmp_path), **{name: torch.ones(48, HIDDEN_SIZE + 1)})
    with pytest.raises(CheckpointError, match=rf"{name} has shape \[48, 33\].*says \[48, 32\]"):
        load(checkpoint, 1, 4)


def test_a_head_saved_with_a_model_that_ties_is_accepted(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, tie=True)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    stage = load(edit(folder, **{"lm_head.weight": embedding.clone()}), 2, 4)
    assert torch.equal(stage.model.get_parameter("lm_head.weight"), embedding)


def test_names_without_the_prefix_of_the_base_model_are_read(tmp_path: Path) -> None:
    """As in the first checkpoints of GPT-2 on the hub."""
    folder = make_checkpoint(tmp_path, "gpt2")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    stripped = {name.removeprefix("transformer."): t.clone() for name, t in tensors.items()}
    stripped["h.2.attn.bias"] = torch.ones(1, 1, 4, 4)
    save_file(stripped, path, metadata={"format": "pt"})
    stage = load(open_checkpoint(folder), 2, 4)
    weight = stage.layers[0].get_parameter("attn.c_attn.weight")
    assert torch.equal(weight, tensors["transformer.h.2.attn.c_attn.weight"])


def test_a_file_that_vanished_is_named(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path, max_shard_size="20KB"))
    files = sorted({tensor.file for tensor in checkpoint.tensors.values()})
    assert len(files) > 2
    (checkpoint.folder / files[1]).unlink()
    with pytest.raises(CheckpointError, match=f"{files[1]} cannot be read"):
        load(checkpoint, 0, 4)


def test_values_that_transformers_refuses_are_an_error_of_the_checkpoint(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": 17}))
    with pytest.raises(CheckpointError, match="hidden_act"):
        load(open_checkpoint(folder), 0, 4)
