"""Weights of GGUF files, against transformers' own reader, tensor by tensor."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from distributed_llm.common.checkpoint import Checkpoint
from distributed_llm.common.gguf_types import GGUF_BLOCKS
from distributed_llm.worker.model.empty_model import empty_model
from distributed_llm.worker.model.quantized.gguf import decode
from distributed_llm.worker.model.quantized.gguf_names import GgufNames
from distributed_llm.worker.model.tensor_files import TensorReader
from distributed_llm.worker.model.weights import checkpoint_place
from tests.checkpoints import build_model, make_tokenizer
from tests.gguf_models import open_here, write_gguf

SETTINGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"decoder_sparse_step": 1, "mlp_only_layers": []},
}


def weights_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return all parameters, made as a stage makes them: in order of rows, integers or not."""
    model = empty_model(checkpoint, torch.float32)
    names = GgufNames(model, checkpoint)
    reader = TensorReader(checkpoint_place(checkpoint), lambda nbytes: None)
    pieces: dict[str, dict[int, Tensor]] = {}
    for name, info in checkpoint.tensors.items():
        (target,) = names.targets(name)
        numbers = reader.read(info)
        if info.dtype not in GGUF_BLOCKS:
            numbers = target.values(numbers.float())
        elif target.convert:
            numbers = target.convert(decode(numbers, info.dtype).dequantized())
        else:
            numbers = decode(target.ordered(numbers), info.dtype).dequantized()
        pieces.setdefault(target.parameter, {})[target.piece] = numbers
    return {
        name: torch.cat([parts[i] for i in sorted(parts)], dim=-2) if len(parts) > 1 else parts[0]
        for name, parts in pieces.items()
    }


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llama", "Q4_K"),
        ("llama", "F16"),
        ("qwen2", "Q8_0"),
        ("qwen3", "Q8_0"),
        ("gemma2", "F32"),
        ("gemma3_text", "Q8_0"),
        ("qwen3_moe", "Q8_0"),
        ("qwen2_moe", "F32"),
        ("phi3", "F32"),
        ("starcoder2", "F32"),
        ("stablelm", "F32"),
        ("nemotron", "F32"),
        ("gpt2", "F32"),
    ],
)
def test_weights_are_those_of_transformers(tmp_path: Path, family: str, kind: str) -> None:
    size = 256 if kind == "Q4_K" else 32
    sizes = {"hidden_size": size, "intermediate_size": 2 * size, "moe_intermediate_size": size}
    tokenizer = make_tokenizer()
    settings = {"vocab_size": len(tokenizer), **sizes, **SETTINGS.get(family, {})}
    model = build_model(family, num_layers=2, **settings)
    file = write_gguf(tmp_path / "model.gguf", model, kind, tokenizer=tokenizer)
    checkpoint = open_here(file, tmp_path / "texts")
    ours = weights_of(checkpoint)
    read: Any = load_gguf_checkpoint
    theirs = read(file, return_tensors=True, model_to_load=model)["tensors"]
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    wanted = {
        n
        for n in model.state_dict()
        if n != "lm_head.weight" or not checkpoint.outer.ties_embeddings
    }
    assert ours.keys() == wanted
    if kind == "F32":
        for name in wanted:
            torch.testing.assert_close(ours[name], model.state_dict()[name])
