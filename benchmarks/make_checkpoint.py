"""Write a random checkpoint in the shape of a 1.1 B Llama (TinyLlama), bfloat16, in shards.

    python -m benchmarks.make_checkpoint FOLDER

Its text is noise; speed and memory are those of the real thing.
"""

import argparse
import json
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


def make_checkpoint(folder: Path) -> Path:
    """Write the checkpoint into `folder`, unless it is there already, and return `folder`."""
    if (folder / "model.safetensors.index.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    random = torch.Generator().manual_seed(0)
    vocab, hidden = CONFIG["vocab_size"], CONFIG["hidden_size"]
    assert isinstance(vocab, int)
    assert isinstance(hidden, int)
    ends = {
        "model.embed_tokens.weight": _matrix(random, vocab, hidden),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        "lm_head.weight": _matrix(random, vocab, hidden),
    }
    layers = range(int(str(CONFIG["num_hidden_layers"])))
    shards = [layers[i : i + _LAYERS_PER_SHARD] for i in range(0, len(layers), _LAYERS_PER_SHARD)]
    weight_map: dict[str, str] = {}
    for number, held in enumerate([None, *shards]):
        tensors = ends if held is None else {}
        for layer in held or ():
            tensors |= _layer(random, layer)
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    print(make_checkpoint(parser.parse_args().folder))
