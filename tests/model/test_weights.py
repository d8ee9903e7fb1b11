"""Only the tensors of a range are loaded, and none is ever made up."""

import errno
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from distributed_llm.common.architectures import check_architecture
from distributed_llm.common.checkpoint import Checkpoint, open_checkpoint
from distributed_llm.common.errors import (
    CheckpointError,
    CheckpointUnavailable,
    UnsupportedModel,
)
from distributed_llm.common.other_formats import INDEX_NAME
from distributed_llm.common.types import LayerRange
from distributed_llm.coordinator.inspect_model import model_cost
from distributed_llm.coordinator.text.tokenizer import Tokenizer
from distributed_llm.worker.model import tensor_files
from distributed_llm.worker.model.shared_weights import StageModel
from distributed_llm.worker.model.stage import Stage
from distributed_llm.worker.model.weights import load_stage_model
from tests.checkpoints import HIDDEN_SIZE, make_checkpoint
from tests.model.driver import CPU, Pipeline, load_stages


def load(checkpoint: Checkpoint, start: int, stop: int) -> StageModel:
    return load_stage_model(checkpoint, LayerRange(start, stop), device=CPU, dtype=torch.float32)


PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
NEW_TOKENS = 5


def generated(folder: Path) -> list[int]:
    """Return what transformers answers to `PROMPT`."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([PROMPT])
    answer = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return list(answer[0, len(PROMPT) :].tolist())


def tokens(checkpoint: Checkpoint, split: list[int] | None = None) -> list[int]:
    """Return what a split model answers to `PROMPT`."""
    pipeline = Pipeline(load_stages(checkpoint, split or [1, 3]))
    pipeline.prefill([PROMPT], [len(PROMPT) - 1])
    return [pipeline.decode()[0] for _ in range(NEW_TOKENS)]


def configure(folder: Path, **changes: Any) -> Checkpoint:
    """Change values of a config.json; None removes one."""
    path = folder / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return open_checkpoint(folder)


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_numbers_of_another_width_are_what_they_say(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = make_checkpoint(tmp_path)
    weights = load_file(folder / "model.safetensors")
    layers = {name: tensor.to(dtype) for name, tensor in weights.items() if "_proj" in name}
    cost = model_cost(open_checkpoint(folder), "float32")
    checkpoint = edit(folder, **layers)
    assert tokens(checkpoint) == generated(folder)
    assert model_cost(checkpoint, "float32") == cost


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
    with pytest.raises(CheckpointError, match=f"lacks tensor {name}.*another copy"):
        load(checkpoint, start, stop)


def test_a_missing_expert_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "mixtral")
    checkpoint = edit(folder, **{"model.layers.2.block_sparse_moe.experts.1.w2.weight": None})
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.experts\.down_proj"):
        load(checkpoint, 1, 4)
    load(checkpoint, 0, 2)


MASKS = {"attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool), "attn.masked_bias": torch.ones(())}


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("llama", {"model.layers.2.self_attn.q_norm.weight": torch.ones(3)}),
        ("llama", {"model.layers.2.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
        ("llama", {"model.rotary_emb.inv_freq": torch.ones(4)}),
        (
            "llama",
            {"score.weight": torch.ones(3, HIDDEN_SIZE), "v_head.summary.bias": torch.ones(1)},
        ),
        ("llama", {"model.layers.4.mlp.up_proj.weight": torch.ones(48, HIDDEN_SIZE)}),
        ("llama", {"model.layers.7.eh_proj.weight": torch.ones(3)}),
        ("gpt2", {f"transformer.h.2.{name}": mask for name, mask in MASKS.items()}),
        (
            "gpt_neox",
            {
                f"gpt_neox.layers.2.{name.replace('attn', 'attention')}": m
                for name, m in MASKS.items()
            },
        ),
    ],
)
def test_what_the_layers_do_not_need_is_left_out(
    tmp_path: Path, family: str, extra: dict[str, torch.Tensor]
) -> None:
    """As in transformers: buffers of older versions, heads of other tasks, layers beyond."""
    folder = make_checkpoint(tmp_path, family)
    before = open_checkpoint(folder)
    checkpoint = edit(folder, **extra)
    for start, stop in ((0, 2), (2, 4)):
        stage, plain = load(checkpoint, start, stop), load(before, start, stop)
        assert stage.nbytes == plain.nbytes
    assert tokens(checkpoint) == generated(folder)


def test_what_is_left_out_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = edit(make_checkpoint(tmp_path), **{"model.extra.weight": torch.ones(3)})
    load(checkpoint, 0, 3)
    assert not caplog.records
    load(checkpoint, 2, 4)
    assert "1 tensors in the files belong to no part of the model" in caplog.text
    assert "model.extra.weight" in caplog.text


def test_layers_beyond_those_of_the_config_cost_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_checkpoint(tmp_path)
    cost = model_cost(open_checkpoint(folder), "float32")
    more = {f"model.layers.{n}.eh_proj.weight": torch.ones(99, 99) for n in (4, 5)}
    assert model_cost(edit(folder, **more), "float32") == cost
    assert "2 tensors of layers beyond the 4 of config.json" in caplog.text


def test_a_config_with_fewer_layers_than_the_files(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    checkpoint = configure(folder, num_hidden_layers=2)
    assert checkpoint.num_layers == 2
    assert tokens(checkpoint, [1, 1]) == generated(folder)


@pytest.mark.parametrize(
    ("family", "embedding"),
    [
        ("llama", "model.embed_tokens.weight"),
        ("gpt2", "transformer.wte.weight"),
        ("gemma2", "model.embed_tokens.weight"),
    ],
)
def test_of_two_tied_tensors_either_may_be_there(
    tmp_path: Path, family: str, embedding: str
) -> None:
    folder = make_checkpoint(tmp_path, family, tie=True)
    expected = generated(folder)
    cost = model_cost(open_checkpoint(folder), "float32")
    table = load_file(folder / "model.safetensors")[embedding]
    only_head = edit(folder, **{"lm_head.weight": table.clone(), embedding: None})
    assert generated(folder) == expected
    for split in ([4], [1, 2, 1]):
        assert tokens(only_head, split) == expected
    assert model_cost(only_head, "float32") == cost
    donor = load(only_head, 0, 4)
    for start, stop in ((0, 2), (2, 4)):
        beside = load_stage_model(
            only_head, LayerRange(start, stop), device=CPU, dtype=torch.float32, donor=donor
        )
        assert beside.shared_nbytes > 0.9 * beside.nbytes
    both = edit(folder, **{embedding: table.clone()})
    assert tokens(both, [1, 2, 1]) == expected


def test_a_head_without_its_embedding_in_a_model_that_does_not_tie(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, tie=False)
    checkpoint = edit(folder, **{"model.embed_tokens.weight": None})
    with pytest.raises(CheckpointError, match=r"lacks tensor model\.embed_tokens\.weight"):
        load(checkpoint, 0, 2)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_a_dtype_by_its_name_in_torch(tmp_path: Path, name: str) -> None:
    folder = make_checkpoint(tmp_path)
    checkpoint = configure(folder, **{"dtype": None, name: "torch.float16"})
    assert checkpoint.dtype == "float16"
    load(checkpoint, 0, 4)


def test_code_beside_a_model_that_transformers_has_is_never_run(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, tokenizer=True)
    for module in ("evil", "modeling_evil", "configuration_evil", "tokenization_evil"):
        (folder / f"{module}.py").write_text(
            f"open({str(folder / 'ran')!r}, 'w')\nraise SystemExit"
        )
    auto_map = {
        "AutoConfig": "configuration_evil.EvilConfig",
        "AutoModelForCausalLM": "modeling_evil.EvilForCausalLM",
        "AutoTokenizer": ["tokenization_evil.EvilTokenizer", None],
    }
    checkpoint = configure(folder, auto_map=auto_map)
    tokenizer_config = folder / "tokenizer_config.json"
    content = json.loads(tokenizer_config.read_text())
    tokenizer_config.write_text(json.dumps({**content, "auto_map": auto_map}))
    check_architecture(checkpoint.config)
    Stage.ensure_supported(checkpoint)
    assert tokens(checkpoint) == generated(folder)
    assert Tokenizer.load(folder).encode("a")
    assert not (folder / "ran").exists()


def test_code_beside_a_model_that_only_it_describes(tmp_path: Path) -> None:
    config = {"model_type": "evil", "auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}
    with pytest.raises(UnsupportedModel, match=r"auto_map.*never run.*Use a model"):
        check_architecture(config)
    check_architecture({**config, "model_type": "olmo3"})  # in transformers, in no table here


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


def vanish(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (vanish, "is not there. Copy"),
        (cut, "ends before the tensor"),
        (empty, "ends before the tensor"),
    ],
)
def test_a_file_that_is_spoilt_after_its_header_was_read_is_named(
    tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path, max_shard_size="20KB"))
    files = sorted({tensor.file for tensor in checkpoint.tensors.values()})
    assert len(files) > 2
    path = checkpoint.folder / files[1]
    spoil(path)
    with pytest.raises(CheckpointError, match=re.escape(f"{path} {words}")):
        load(checkpoint, 0, 4)


def test_a_file_that_is_cut_short_while_it_is_read_is_named(tmp_path: Path) -> None:
    """Mapped memory behind which there is no file any more would end the process."""
    checkpoint = open_checkpoint(make_checkpoint(tmp_path))
    path = checkpoint.folder / "model.safetensors"
    with pytest.raises(CheckpointUnavailable, match=rf"{path} ends before the tensor \S+, though"):
        load_stage_model(
            checkpoint,
            LayerRange(0, 4),
            device=CPU,
            dtype=torch.float32,
            on_read=lambda nbytes: os.truncate(path, 4096),
        )


class Spoilt(io.FileIO):
    """A file on a share that fails once some of it was read."""

    def readinto(self, memory: Any) -> int:
        raise OSError(errno.ESTALE, "Stale file handle")


def refuse(path: Path, mode: str, buffering: int) -> io.FileIO:
    raise PermissionError(errno.EACCES, "Permission denied", str(path))


def fail(path: Path, mode: str, buffering: int) -> io.FileIO:
    return Spoilt(path, mode)


@pytest.mark.parametrize(
    ("opener", "kind", "words"),
    [
        (refuse, CheckpointError, "cannot be read: Permission denied.*chmod"),
        (fail, CheckpointUnavailable, "cannot be read: Stale file handle.*share"),
    ],
)
def test_a_file_that_cannot_be_read_any_more_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    opener: Callable[..., io.FileIO],
    kind: type[CheckpointError],
    words: str,
) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path))
    monkeypatch.setattr(tensor_files, "open", opener, raising=False)
    path = re.escape(str(checkpoint.folder / "model.safetensors"))
    with pytest.raises(kind, match=f"{path} {words}"):
        load(checkpoint, 0, 4)


def test_large_tensors_are_read_in_pieces_that_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that one that takes long is seen to get on."""
    monkeypatch.setattr(tensor_files, "_PIECE_BYTES", 1000)
    checkpoint = open_checkpoint(make_checkpoint(tmp_path))
    read = list[int]()
    stage = load_stage_model(
        checkpoint, LayerRange(0, 4), device=CPU, dtype=torch.float32, on_read=read.append
    )
    assert max(read) == 1000
    assert sum(read) == sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    weights = load_file(checkpoint.folder / "model.safetensors")
    held = stage.model.state_dict()
    assert torch.equal(held["model.norm.weight"], weights["model.norm.weight"])
    table = "model.embed_tokens.weight"
    assert torch.equal(held[table], weights[table])


# ------------------------------------------------------------------ indexes


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path, max_shard_size="60KB")


def test_an_index_beside_one_file_with_everything(sharded: Path) -> None:
    """As in transformers, the one file counts."""
    whole = {}
    for path in sorted(sharded.glob("*.safetensors")):
        whole.update(load_file(path))
        path.unlink()
    save_file(whole, sharded / "model.safetensors", metadata={"format": "pt"})
    assert tokens(open_checkpoint(sharded)) == generated(sharded)


def test_an_index_that_has_tensors_in_the_wrong_files(sharded: Path) -> None:
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(files) > 1
    content = json.loads((sharded / INDEX_NAME).read_text())
    names = content["weight_map"]
    names.update({tensor: files[n % len(files)] for n, tensor in enumerate(names)})
    (sharded / INDEX_NAME).write_text(json.dumps(content))
    assert tokens(open_checkpoint(sharded)) == generated(sharded)


def test_an_index_that_names_files_by_other_names(sharded: Path) -> None:
    expected = generated(sharded)
    for path in sorted(sharded.glob("*.safetensors")):
        path.rename(sharded / f"renamed-{path.name}")
    assert tokens(open_checkpoint(sharded)) == expected


def test_an_index_of_tensors_that_are_nowhere(sharded: Path) -> None:
    content = json.loads((sharded / INDEX_NAME).read_text())
    content["weight_map"]["model.layers.4.eh_proj.weight"] = "mtp.safetensors"
    (sharded / INDEX_NAME).write_text(json.dumps(content))
    tokens(open_checkpoint(sharded))  # of a layer beyond those of config.json
    path = sorted(sharded.glob("*.safetensors"))[0]
    path.unlink()
    with pytest.raises(CheckpointError, match=f"There is no {path.name} in .*Copy that file"):
        open_checkpoint(sharded)


def test_values_that_transformers_refuses_are_an_error_of_the_checkpoint(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": 17}))
    with pytest.raises(CheckpointError, match="hidden_act"):
        load(open_checkpoint(folder), 0, 4)
