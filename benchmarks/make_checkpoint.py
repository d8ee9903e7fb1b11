"""Write a random checkpoint in the shape of a 1.1 B Llama (TinyLlama), bfloat16, in shards.

    python -m benchmarks.make_checkpoint FOLDER [--experts]

Its text is noise; speed and memory are those of the real thing. With `--experts` it has a few
layers in the shape of Qwen3-30B-A3B, a mixture of experts.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "intermediate_size": 5632,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}
_LAYERS_PER_SHARD = 8

EXPERTS_CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 32000,  # not 151936: with few layers the head would be most of the work
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}


def make_checkpoint(folder: Path) -> Path:
    """Write the checkpoint into `folder`, unless it is there already, and return `folder`."""
    return _write(folder, CONFIG, _layer, _LAYERS_PER_SHARD)


def make_experts_checkpoint(folder: Path) -> Path:
    """Write the checkpoint with experts into `folder`, unless it is there already."""
    return _write(folder, EXPERTS_CONFIG, _experts_layer, 1)


def _write(
    folder: Path,
    config: Mapping[str, object],
    layer_of: Callable[[torch.Generator, int], dict[str, Tensor]],
    layers_per_shard: int,
) -> Path:
    if (folder / "model.safetensors.index.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    random = torch.Generator().manual_seed(0)
    vocab, hidden = config["vocab_size"], config["hidden_size"]
    assert isinstance(vocab, int)
    assert isinstance(hidden, int)
    ends = {
        "model.embed_tokens.weight": _matrix(random, vocab, hidden),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        "lm_head.weight": _matrix(random, vocab, hidden),
    }
    layers = range(int(str(config["num_hidden_layers"])))
    shards = [layers[i : i + layers_per_shard] for i in range(0, len(layers), layers_per_shard)]
    weight_map: dict[str, str] = {}
    for number, held in enumerate([None, *shards]):
        tensors = ends if held is None else {}
        for layer in held or ():
            tensors |= layer_of(random, layer)
        name = f"model-{number + 1:05d}-of-{len(shards) + 1:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _matrix(random: torch.Generator, rows: int, columns: int) -> Tensor:
    return (torch.randn(rows, columns, generator=random) * 0.02).bfloat16()


def _layer(random: torch.Generator, layer: int) -> dict[str, Tensor]:
    hidden, inner, kv = 2048, 5632, 256
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    prefix = f"model.layers.{layer}"
    tensors = {f"{prefix}.{name}.weight": _matrix(random, *shape) for name, shape in shapes.items()}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{prefix}.{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    return tensors


def _experts_layer(random: torch.Generator, layer: int) -> dict[str, Tensor]:
    hidden, inner, heads, kv, experts = 2048, 768, 4096, 512, 128
    prefix = f"model.layers.{layer}"
    shapes = {
        "self_attn.q_proj": (heads, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, heads),
        "mlp.gate": (experts, hidden),
    }
    tensors = {f"{prefix}.{name}.weight": _matrix(random, *shape) for name, shape in shapes.items()}
    for norm, size in (
        ("input_layernorm", hidden),
        ("post_attention_layernorm", hidden),
        ("self_attn.q_norm", 128),
        ("self_attn.k_norm", 128),
    ):
        tensors[f"{prefix}.{norm}.weight"] = torch.ones(size, dtype=torch.bfloat16)
    noise = _matrix(random, hidden + experts, inner)  # experts share it, shifted: drawing is slow
    for expert in range(experts):
        own = noise[expert : expert + hidden]
        name = f"{prefix}.mlp.experts.{expert}"
        tensors[f"{name}.gate_proj.weight"] = own.t().contiguous()
        tensors[f"{name}.up_proj.weight"] = own.flip(0).t().contiguous()
        tensors[f"{name}.down_proj.weight"] = own.clone()
    return tensors


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--experts", action="store_true", help="a mixture of experts instead")
    given = parser.parse_args()
    print((make_experts_checkpoint if given.experts else make_checkpoint)(given.folder))
