"""Models that cannot be served: what they are, why not and what to do, before a worker is asked."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from distributed_llm.common.errors import (
    CheckpointError,
    CheckpointUnavailable,
    DistributedLLMError,
)
from distributed_llm.common.model_names import (
    checkpoint_here,
    fingerprints,
    own_checkpoint,
    resolve_for_coordinator,
)
from distributed_llm.common.settings import CoordinatorSettings, WorkerSettings
from distributed_llm.common.types import LayerRange
from distributed_llm.coordinator import serve
from distributed_llm.worker import way_in

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "vocab_size": 16,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 988097824\n"
F32 = np.float32
FP8 = {"quant_method": "fp8"}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "config_groups": {"group_0": {"weights": {"num_bits": 4}}},
}


def layer(number: int, **more: Any) -> dict[str, Any]:
    name = f"model.layers.{number}.mlp.up_proj"
    return {f"{name}.{ending}": value for ending, value in more.items()}


def write(
    folder: Path, config: dict[str, Any] | None = None, weights: dict[str, Any] | None = None
) -> Path:
    """Write a checkpoint of two layers; `config` and `weights` change it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | (config or {})))
    (folder / "tokenizer.json").write_text("{}")
    table = np.ones((16, 8), F32)
    tensors = {"model.embed_tokens.weight": table, "model.norm.weight": table[0]}
    tensors |= weights or layer(0, weight=table) | layer(1, weight=table)
    save_file(tensors, folder / "model.safetensors")
    return folder


def refusal(model: Path | str) -> str:
    """Return what a coordinator says about `model`."""
    with pytest.raises(DistributedLLMError) as caught:
        serve.open_model(str(model), CoordinatorSettings())
    said = str(caught.value)
    assert isinstance(caught.value, CheckpointError), said
    assert len(said) < 700
    return said


def touch(folder: Path, *names: str, content: bytes = b"x") -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_the_model_that_the_others_are_made_of_is_read(tmp_path: Path) -> None:
    served, _ = serve.open_model(str(write(tmp_path)), CoordinatorSettings())
    assert len(served.cost.layer_bytes) == 2


# ------------------------------------------------------------------ files and paths


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("llama-Q4_K_M.gguf", ("is no GGUF file", "Download it again")),
        ("model.safetensors", ("is one file of a model", "Give the folder")),
        ("config.json", ("is one file of a model", "Give the folder")),
        ("tokenizer.model", ("is one file of a model", "Give the folder")),
        ("pytorch_model.bin", ("is a pickle", "save_pretrained")),
        ("model.pth", ("is a pickle", "save_pretrained")),
        ("model.onnx", ("is in ONNX", "original model")),
        ("model.tar.gz", ("is an archive", "Unpack it")),
        ("notes", ("is a file", "Give a folder")),
    ],
)
def test_a_file_instead_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: tuple[str, ...]
) -> None:
    touch(tmp_path / "models", name)
    monkeypatch.chdir(tmp_path)
    for model in (tmp_path / "models" / name, f"models/{name}", f"./models/{name}"):
        said = refusal(model)
        assert all(word in said for word in words), said
        assert "hub:" not in said


@pytest.mark.parametrize("name", ["models/none.gguf", "none.safetensors", "x/none.bin"])
def test_a_file_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    said = refusal(name)
    assert f"There is no file '{name}' in {tmp_path}" in said
    assert "folder with config.json" in said


@pytest.mark.parametrize("model", ["models/lama-3b", "./models/lama-3b", "models/lama-3b/"])
def test_a_folder_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "models" / "llama-3b")
    monkeypatch.chdir(tmp_path)
    said = refusal(model)
    assert said.startswith(f"There is no folder '{model}' on this machine")
    assert str(tmp_path) in said
    assert "in 'models' there is 'llama-3b'" in said


def test_a_folder_of_nearly_that_name_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is quite different is not told: an id of the hub may be meant."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "llama-3b")
    assert f"(looked up from {tmp_path}); there is 'llama-3b'. As a model id" in refusal("lama-3b")
    assert f"(looked up from {tmp_path}). As a model id" in refusal("qwen")


def test_a_folder_above_the_model(tmp_path: Path) -> None:
    write(tmp_path / "models" / "llama-3b")
    assert f"Give that: {tmp_path / 'models' / 'llama-3b'}" in refusal(tmp_path / "models")


def test_the_folder_of_the_hubs_cache(tmp_path: Path) -> None:
    folder = tmp_path / "models--org--tiny"
    snapshot = write(folder / "snapshots" / ("c0ffee" * 6 + "1234"))
    touch(folder, "blobs/a", "refs/main")
    assert f"Give that: {snapshot}" in refusal(folder)


def test_an_empty_folder(tmp_path: Path) -> None:
    assert "is empty" in refusal(tmp_path)


# ------------------------------------------------------------------ folders of other formats


@pytest.mark.parametrize("with_config", [False, True])
@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a-00001-of-00002.gguf", "README.md"], ("is no GGUF file",)),
        (["a.Q4_0.gguf", "a.Q8_0.gguf"], ("several models in GGUF", "a.Q8_0.gguf", "Give one")),
        (["pytorch_model.bin"], ("pytorch_model.bin, a pickle", "save_pretrained")),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"], ("a pickle",)),
        (["tf_model.h5"], ("TensorFlow's format", "original")),
        (["flax_model.msgpack"], ("Flax's format", "original")),
        (["onnx/model.onnx", "onnx/model.onnx_data"], ("in the folder onnx", "ONNX")),
        (["model.onnx"], ("model.onnx, in ONNX", "original")),
        (["openvino_model.xml"], ("OpenVINO", "original")),
        (["params.json", "consolidated.00.pth"], ("publisher's own format", "-hf")),
        (["params.json", "consolidated.safetensors"], ("publisher's own format", "-hf")),
        (["model_index.json", "unet/config.json"], ("diffusers", "pictures")),
        (["optimizer.pt", "training_args.bin", "tf_model.h5"], ("in tf_model.h5",)),
        (["gptq_model-4bit-128g.safetensors"], ("gptq_model-4bit-128g.safetensors",)),
    ],
)
def test_a_folder_in_another_format(
    tmp_path: Path, names: list[str], words: tuple[str, ...], with_config: bool
) -> None:
    touch(tmp_path, *names)
    if with_config:
        (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    said = refusal(tmp_path)
    assert said.startswith(str(tmp_path))
    assert all(word in said for word in words), said


def test_a_config_without_model_type_beside_weights_of_another_format(tmp_path: Path) -> None:
    touch(tmp_path, "config.json", content=b'{"bos_token": "<s>"}')
    assert "without model_type" in refusal(tmp_path)
    touch(tmp_path, "model.bin")
    assert "model.bin, a pickle" in refusal(tmp_path)


def test_a_part_of_a_diffusers_pipeline(tmp_path: Path) -> None:
    touch(tmp_path, "config.json", content=b'{"_class_name": "UNet2DConditionModel"}')
    touch(tmp_path, "diffusion_pytorch_model.safetensors")
    assert "diffusers" in refusal(tmp_path)


def test_an_adapter(tmp_path: Path) -> None:
    base = {"base_model_name_or_path": "Qwen/Qwen3-0.6B", "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(base))
    touch(tmp_path, "adapter_model.safetensors")
    said = refusal(tmp_path)
    assert "LoRA adapter for 'Qwen/Qwen3-0.6B'" in said
    assert "merge_and_unload" in said


def test_weights_that_no_index_names(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    said = refusal(tmp_path)
    assert "has model-00001-of-00002.safetensors" in said
    assert "model.safetensors.index.json" in said


def test_weights_without_a_config(tmp_path: Path) -> None:
    (write(tmp_path) / "config.json").unlink()
    assert "has model.safetensors, but no config.json" in refusal(tmp_path)


# ------------------------------------------------------------------ quantized weights


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quantization_config": {"quant_method": "hqq", "bits": 4}}, "HQQ, 4 bits"),
        ({"quantization_config": {"quant_method": "quanto"}}, "Quanto"),
        ({"quantization_config": {"quant_method": "torchao"}}, "torchao"),
        ({"quantization_config": {"quant_method": "exl2" * 99}}, "'exl2exl2"),
        ({"quantization_config": {"bits": 3}}, "does not say by which method"),
        ({"quantization_config": {"quant_method": "awq", "version": "gemv"}}, "version 'gemv'"),
        (
            {"quantization_config": {"quant_method": "gptq", "checkpoint_format": "marlin"}},
            "checkpoint_format 'marlin'",
        ),
        (
            {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
            "ModelOpt's NVFP4",
        ),
        ({"quantization_config": COMPRESSED | {"format": "nvfp4-pack-quantized"}}, "nvfp4"),
        ({"compression_config": COMPRESSED | {"transform_config": COMPRESSED}}, "rotated"),
        (
            {"quantization_config": COMPRESSED | {"sparsity_config": {"format": "24-bitmask"}}},
            "sparse (24-bitmask)",
        ),
        ({"quantization_config": FP8 | {"weight_block_size": "128"}}, "scales for blocks of '128'"),
    ],
)
def test_a_config_of_weights_that_are_quantized_otherwise(
    tmp_path: Path, config: dict[str, Any], words: str
) -> None:
    said = refusal(write(tmp_path, config))
    assert said.startswith(f"The model in {tmp_path} is quantized in a way that is not read: ")
    assert words in said
    assert "Use the original model" in said


@pytest.mark.parametrize(
    ("settings", "weights", "words"),
    [
        (
            {"group_size": 64, "bits": 4, "mode": "mxfp4"},
            {"weight": np.ones((8, 8), np.uint32), "scales": np.ones((8, 2), F32)},
            "MLX, in its mode 'mxfp4'",
        ),
        (
            {"group_size": 64, "bits": 7},
            {"weight": np.ones((8, 8), np.uint32), "scales": np.ones((8, 2), F32)},
            "MLX, 7 bits",
        ),
        (
            {"group_size": 64, "bits": 4},
            {"qweight": np.ones((4, 8), np.int32)},
            "names no quant_method, which would mean MLX",
        ),
        (
            {"quant_method": "auto-round", "packing_format": "auto_round:exllama"},
            {"qweight": np.ones((4, 8), np.int32)},
            "packing_format 'auto_round:exllama'",
        ),
        ({"quant_method": "fp8"}, {"weight": np.ones((16, 8), np.int8)}, "integers (I8"),
        (
            {"quant_method": "gptq", "bits": 3},
            {
                "qweight": np.ones((6, 16), np.int32),
                "qzeros": np.ones((1, 3), np.int32),
                "scales": np.ones((1, 16), np.float16),
            },
            "GPTQ, 3 bits",
        ),
    ],
)
def test_tensors_of_weights_that_are_quantized_otherwise(
    tmp_path: Path, settings: dict[str, Any], weights: dict[str, Any], words: str
) -> None:
    made = layer(0, **weights) | layer(1, **weights)
    said = refusal(write(tmp_path, {"quantization_config": settings}, made))
    assert said.startswith(f"The model in {tmp_path} is quantized in a way that is not read: ")
    assert words in said


GPTQ = {
    "qweight": np.ones((8, 16), np.int32),
    "qzeros": np.ones((2, 2), np.int32),
    "scales": np.ones((2, 16), np.float16),
}


@pytest.mark.parametrize(
    ("settings", "weights", "words"),
    [
        ({"quant_method": "gptq"}, GPTQ | {"scales": None}, "tensor scales is missing"),
        (
            {"quant_method": "gptq"},
            GPTQ | {"scales": np.ones((2, 8), np.float16)},
            "F16 [2, 8], and [groups, 16] is expected",
        ),
        (
            {"quant_method": "gptq"},
            GPTQ | {"qweight": np.ones((8, 16), np.float16)},
            "F16 [8, 16], and I32 is expected",
        ),
        (
            {"quant_method": "gptq"},
            GPTQ | {"g_idx": np.ones(63, np.int32)},
            "I32 [63], and [64] is expected",
        ),
        ({"quant_method": "gptq", "desc_act": True}, GPTQ, "tensor g_idx is missing"),
        (
            {"quant_method": "awq"},
            GPTQ | {"qzeros": np.ones((1, 16), np.int32), "scales": np.ones((2, 128), np.float16)},
            "I32 [1, 16], and [2, 16] is expected",
        ),
        (
            {"group_size": 64, "bits": 4},
            {"weight": np.ones((8, 8), np.uint32), "scales": np.ones((8, 2), F32)},
            "tensor biases is missing",
        ),
        (
            {"quant_method": "compressed-tensors", "config_groups": {}},
            {"weight_packed": np.ones((8, 8), np.int32), "weight_scale": np.ones((8, 2), F32)},
            "2, 4 or 8 bits in groups are expected",
        ),
        (
            {"quant_method": "bitsandbytes"},
            {"weight": np.ones((64, 1), np.uint8), "weight.absmax": np.ones(2, F32)},
            "tensor weight.quant_state.bitsandbytes__nf4 is missing",
        ),
        (
            {"quant_method": "mxfp4"},
            {"x_blocks": np.ones((8, 2, 16), np.uint8), "x_scales": np.ones((8, 3), np.uint8)},
            "U8 [8, 3], and [8, 2] is expected",
        ),
    ],
)
def test_parts_of_quantized_weights_that_do_not_fit(
    tmp_path: Path, settings: dict[str, Any], weights: dict[str, Any], words: str
) -> None:
    held = {part: tensor for part, tensor in weights.items() if tensor is not None}
    made = layer(0, **held) | layer(1, **held)
    said = refusal(write(tmp_path, {"quantization_config": settings}, made))
    assert "model.layers.0.mlp.up_proj" in said
    assert words in said, said
    assert "Use another copy of the model" in said


@pytest.mark.parametrize(
    ("beside", "content"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 32}),
        ("config.json", CONFIG | {"quantization_config": {"quant_method": "gptq"}}),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 32, "version": "GEMM"}),
    ],
)
def test_settings_of_quantized_weights_beside_the_config(
    tmp_path: Path, beside: str, content: dict[str, Any]
) -> None:
    awq = {"qweight": np.ones((64, 2), np.int32), "qzeros": np.ones((2, 2), np.int32)}
    weights = GPTQ | (awq if beside == "quant_config.json" else {})
    folder = write(tmp_path, weights=layer(0, **weights) | layer(1, **weights))
    (folder / beside).write_text(json.dumps(content))
    served, _ = serve.open_model(str(folder), CoordinatorSettings())
    pairs = 16 * 2 * (4 + 4)  # a scale and an offset for each group of 32
    assert served.cost.layer_bytes == (16 * 64 // 2 + pairs,) * 2


def test_a_config_of_quantized_weights_beside_plain_ones(tmp_path: Path) -> None:
    served, _ = serve.open_model(
        str(write(tmp_path, {"quantization_config": {"quant_method": "fp8"}})),
        CoordinatorSettings(dtype="float32"),
    )
    assert served.cost.layer_bytes == (16 * 8 * 4,) * 2


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (
            {"weight": np.ones((16, 8), np.int8), "weight_scale": np.ones(1, F32)},
            "integers (I8 in model.layers.0.mlp.up_proj.weight)",
        ),
        (GPTQ, "integers (I32 in model.layers.0.mlp.up_proj.qweight)"),
        ({"weight": np.ones((16, 8), np.int8)}, "without the scales"),
        ({"weight": np.ones((16, 1), np.uint32)}, "without the scales"),
    ],
)
def test_weights_that_are_quantized_by_what_they_are(
    tmp_path: Path, weights: dict[str, Any], words: str
) -> None:
    folder = write(tmp_path, weights=layer(0, **weights) | layer(1, **weights))
    assert words in refusal(folder)


def scaled_fp8(folder: Path, *, scaled: bool) -> Path:
    """Rewrite float32 weights of a checkpoint as FP8, for which numpy has no type."""
    ones = np.full((16, 8), 0x38, np.uint8)  # 1.0 in F8_E4M3
    scales = {"scale_weight": np.ones(1, F32)} if scaled else {}
    write(folder, weights=layer(0, weight=ones, **scales) | layer(1, weight=ones, **scales))
    path = folder / "model.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size].replace(b'"U8"', b'"F8_E4M3"').rstrip()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    return folder


def test_scaled_fp8(tmp_path: Path) -> None:
    assert "scaled FP8" in refusal(scaled_fp8(tmp_path, scaled=True))


def test_fp8_without_scales_takes_the_memory_of_what_it_is_loaded_as(tmp_path: Path) -> None:
    served, _ = serve.open_model(
        str(scaled_fp8(tmp_path, scaled=False)), CoordinatorSettings(dtype="bfloat16")
    )
    assert served.cost.layer_bytes == (16 * 8 * 2,) * 2


@pytest.mark.parametrize(
    "buffer",
    [
        {"attn.bias": np.ones((1, 1, 4, 4), np.uint8), "attn.masked_bias": np.ones((), F32)},
        {"position_ids": np.ones((1, 4), np.int64)},
        {"attn.bias": np.ones((1, 1, 4, 4), bool)},
    ],
)
def test_masks_and_positions_are_no_quantized_weights(
    tmp_path: Path, buffer: dict[str, Any]
) -> None:
    table = np.ones((16, 8), F32)
    weights = layer(0, weight=table, **buffer) | layer(1, weight=table)
    serve.open_model(str(write(tmp_path, weights=weights)), CoordinatorSettings())


# ------------------------------------------------------------------ types that no table has


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("nonesuch", "does not know the model type 'nonesuch'. Upgrade it"),
        ("vit", "'vit' is no language model"),
    ],
)
def test_a_type_that_no_worker_could_run(tmp_path: Path, model_type: str, words: str) -> None:
    assert words in refusal(write(tmp_path, {"model_type": model_type}))


def test_a_type_that_workers_may_try(tmp_path: Path) -> None:
    serve.open_model(
        str(write(tmp_path, {"model_type": "gemma4_unified_text"})), CoordinatorSettings()
    )


# ------------------------------------------------------------------ files that are something else


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "config.json", "generation_config.json"]
)
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (LFS, ("git-lfs pointer", "git lfs pull")),
        (b"<!DOCTYPE html><html><body>Sign in", ("web page", "hf download")),
    ],
)
def test_a_pointer_or_a_page_instead_of_a_file(
    tmp_path: Path, name: str, content: bytes, words: tuple[str, ...]
) -> None:
    said = refusal(touch(write(tmp_path), name, content=content))
    assert said.startswith(f"{tmp_path / name} is a ")
    assert all(word in said for word in words)
    assert "ownload it again" not in said


def test_a_pointer_instead_of_an_index(tmp_path: Path) -> None:
    folder = write(tmp_path)
    (folder / "model.safetensors").unlink()
    assert "git-lfs" in refusal(touch(folder, "model.safetensors.index.json", content=LFS))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"GGUF\x03\0\0\0" + bytes(60), "is a GGUF file"),
        (b"PK\x03\x04" + bytes(60), "pickle"),
        (b"\x80\x02\x8a\nl\xfc\x9c" + bytes(60), "pickle"),
    ],
)
def test_weights_under_the_name_of_safetensors(tmp_path: Path, content: bytes, words: str) -> None:
    assert words in refusal(touch(write(tmp_path), "model.safetensors", content=content))


# ------------------------------------------------------------------ files that cannot be read


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1])
def test_weights_that_are_cut_short(tmp_path: Path, keep: int) -> None:
    """They may still be on their way."""
    path = write(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    said = refusal(tmp_path)
    assert f"{path} is not a whole safetensors file" in said
    assert "Copy or download it again" in said
    with pytest.raises(CheckpointUnavailable):
        serve.open_model(str(tmp_path), CoordinatorSettings())


def header(**tensors: Any) -> bytes:
    """Return a safetensors file without numbers, whose header says this."""
    content = json.dumps(tensors).encode()
    return len(content).to_bytes(8, "little") + content


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        header(a=ENTRY) + bytes(9),  # more than it says
        header(a={**ENTRY, "shape": [3]}) + bytes(8),
        header(a={**ENTRY, "shape": [-2]}) + bytes(8),
        header(a={**ENTRY, "data_offsets": [8, 0]}) + bytes(8),
        header(a={**ENTRY, "data_offsets": [4, 12]}) + bytes(12),
        header(a=ENTRY, b={**ENTRY, "data_offsets": [16, 24]}) + bytes(24),
        header(a=ENTRY, b=ENTRY) + bytes(8),
        header(a={**ENTRY, "dtype": "F33"}) + bytes(8),
        header(a={**ENTRY, "more": 1}) + bytes(8),
        header(a={"dtype": "F32"}) + bytes(8),
        header(a=7),
        (4).to_bytes(8, "little") + b"[{}]",
        (6).to_bytes(8, "little") + b"{{{{{{",
        (100_000).to_bytes(8, "little") + b'{"a":' * 20_000,
        (2**63).to_bytes(8, "little") + b"{}",
        header(a=ENTRY).replace(b"{", b" ", 1) + bytes(8),
    ],
)
def test_headers_that_cannot_be_right(tmp_path: Path, content: bytes) -> None:
    """They stay wrong, however often they are read."""
    path = touch(write(tmp_path), "model.safetensors", content=content) / "model.safetensors"
    said = refusal(tmp_path)
    assert f"{path} is not a whole safetensors file" in said
    with pytest.raises(CheckpointError) as caught:
        serve.open_model(str(tmp_path), CoordinatorSettings())
    assert not isinstance(caught.value, CheckpointUnavailable)


@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error"), OSError(116, "Stale file handle")]
)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_disk_or_share_that_fails_may_be_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: OSError
) -> None:
    real, path = open, write(tmp_path) / name

    def failing(opened: Any, *args: Any, **kwargs: Any) -> Any:
        if opened == path:
            raise error
        return real(opened, *args, **kwargs)

    monkeypatch.setattr("builtins.open", failing)
    with pytest.raises(CheckpointUnavailable, match=f"{path} cannot be read: {error.strerror}"):
        serve.open_model(str(tmp_path), CoordinatorSettings())


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_link_to_nowhere(tmp_path: Path, name: str) -> None:
    path = write(tmp_path) / name
    path.unlink()
    path.symlink_to(tmp_path / "gone")
    assert f"{path} is a link to {tmp_path / 'gone'}, which is not there" in refusal(tmp_path)


Deny = Callable[[Path], None]


@pytest.fixture
def deny(monkeypatch: pytest.MonkeyPatch) -> Deny:
    """Return a function after which a file cannot be opened; root may read whatever its mode."""
    real = open

    def denying(denied: Path) -> None:
        def refuse(path: Any, *args: Any, **kwargs: Any) -> Any:
            if path == denied:
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *args, **kwargs)

        monkeypatch.setattr("builtins.open", refuse)

    return denying


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_file_that_may_not_be_read(tmp_path: Path, deny: Deny, name: str) -> None:
    path = write(tmp_path) / name
    deny(path)
    said = refusal(tmp_path)
    assert said.startswith(f"{path} cannot be read: Permission denied")
    assert "ownload it again" not in said


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    write(tmp_path)
    monkeypatch.setattr("os.scandir", refuse)
    assert refusal(tmp_path).startswith(f"{tmp_path} cannot be read: Permission denied")


# ------------------------------------------------------------------ on a worker


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (remove_weights, "has a config.json, but no weights"),
        (cut_weights, "model.safetensors is not a whole safetensors file"),
    ],
)
def test_what_the_coordinator_could_read_and_a_worker_cannot(
    tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    folder = write(tmp_path / "model")
    source, _ = resolve_for_coordinator(str(folder))
    spoil(folder)
    with pytest.raises(CheckpointError, match=words) as caught:
        checkpoint_here(source, LayerRange(0, 1))
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [(remove_weights, "is not there. Copy"), (cut_weights, "ends before the tensor")],
)
def test_what_changes_while_a_worker_reads_it(
    tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    folder = write(tmp_path / "model")
    layers = LayerRange(0, 2)
    source, checkpoint = resolve_for_coordinator(str(folder))
    spoil(folder)
    with pytest.raises(CheckpointError, match=f"{folder / 'model.safetensors'} {words}"):
        fingerprints(source, checkpoint, layers)


def test_a_worker_that_may_not_read_the_weights(tmp_path: Path, deny: Deny) -> None:
    folder = write(tmp_path / "model")
    source, checkpoint = resolve_for_coordinator(str(folder))
    deny(folder / "model.safetensors")
    for read in (
        lambda: checkpoint_here(source, LayerRange(0, 1)),
        lambda: fingerprints(source, checkpoint, LayerRange(0, 1)),
    ):
        with pytest.raises(CheckpointError, match=r"cannot be read: Permission denied.*chmod"):
            read()


def test_a_file_as_the_copy_of_a_worker(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    source, _ = resolve_for_coordinator(str(folder))
    for name in ("model.safetensors", "tiny.gguf"):
        path = touch(folder, name) / name
        with pytest.raises(CheckpointError, match=f"^'?{path}'? is "):
            checkpoint_here(source, LayerRange(0, 1), local_model=str(path))


def test_a_model_of_the_hub_as_the_copy_of_a_worker(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no folder 'org/tiny'.*--model is the folder"):
        own_checkpoint("org/tiny")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, "has model.safetensors, but no config.json"),
        ({"alibi": True}, "ALiBi"),
        ({"quantization_config": {"quant_method": "hqq"}}, "HQQ"),
    ],
)
def test_a_worker_says_what_is_wrong_with_its_copy_before_it_joins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any] | None, words: str
) -> None:
    async def join(settings: WorkerSettings) -> tuple[str, ...]:
        raise AssertionError("it looks for its coordinator")

    monkeypatch.setattr(way_in, "_addresses", join)
    folder = write(tmp_path / "model", config)
    if config is None:
        (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=words):
        asyncio.run(way_in.find_way_in(WorkerSettings(model=str(folder))))
    with pytest.raises(CheckpointError, match=f"There is no folder '{tmp_path / 'nowhere'}'"):
        asyncio.run(way_in.find_way_in(WorkerSettings(model=str(tmp_path / "nowhere"))))


def test_a_folder_with_models_in_two_formats(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    touch(write(tmp_path), "tiny.Q4_0.gguf")
    serve.open_model(str(tmp_path), CoordinatorSettings())
    assert "in safetensors, which is taken, and tiny.Q4_0.gguf in GGUF, which is not" in caplog.text
