"""Write the random checkpoint of `benchmarks.make_checkpoint` as a GGUF file, for llama.cpp.

    python -m benchmarks.gguf_checkpoint FOLDER FILE

The same numbers in the same type, bfloat16; norms in float32, as llama.cpp wants them.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors import safe_open
from torch import Tensor

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_checkpoint(folder: Path, file: Path) -> Path:
    """Write `file`, unless it is there already, and return it."""
    if file.exists():
        return file
    config = json.loads((folder / "config.json").read_text())
    partial = file.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    _write_config(writer, config)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                own = _own_name(name)
                _add(writer, own, _as_rotated(tensors.get_tensor(name), heads.get(_kind(own))))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return partial.rename(file)


def _write_config(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("none")


def _own_name(name: str) -> str:
    stem, _, part = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, kind = stem.split(".", 3)
        return f"blk.{layer}.{_NAMES[kind]}.{part}"
    return f"{_NAMES[stem]}.{part}"


def _kind(own: str) -> str:
    return own.split(".")[-2]


def _as_rotated(weight: Tensor, heads: int | None) -> Tensor:
    """Return rows in the order in which llama.cpp rotates them: pairs side by side."""
    if heads is None:
        return weight
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _add(writer: gguf.GGUFWriter, name: str, weight: Tensor) -> None:
    if weight.dim() == 1:
        writer.add_tensor(name, weight.float().numpy())
        return
    raw = weight.contiguous().view(torch.uint8).numpy()
    writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    given = parser.parse_args()
    print(gguf_checkpoint(given.folder, given.file))
