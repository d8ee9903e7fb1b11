"""Writes config.json of a model in GGUF files: what transformers reads of it, put right.

transformers' reader leaves out what most files say in the same way as its defaults, and takes the
defaults where a file says something else, too: sizes of experts, scaled rotary positions.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.integrations.ggml import (
    GGUF_CONFIG_DEFAULTS_MAPPING,
    GGUF_CONFIG_MAPPING,
)
from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS, get_gguf_config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from distributed_llm.common.errors import UnsupportedModel
from distributed_llm.common.gguf_types import GGUF_FLOATS, GGUF_METHOD
from distributed_llm.common.other_formats import CONFIG_NAME
from distributed_llm.gguf_texts.checks import check_metadata
from distributed_llm.gguf_texts.families import model_type_of, of_family
from distributed_llm.gguf_texts.header import Header
from distributed_llm.gguf_texts.hybrids import layers_of

_MODEL_TYPES: Mapping[str, str] = {
    "arcee": "arcee",
    "cohere2": "cohere2",
    "command-r": "cohere",
    "deepseek2": "deepseek_v3",
    "dots1": "dots1",
    "ernie4_5": "ernie4_5",
    "ernie4_5-moe": "ernie4_5_moe",
    "exaone4": "exaone4",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "gemma3n": "gemma3n_text",
    "gemma4": "gemma4_text",
    "glm4": "glm4",
    "glm4moe": "glm4_moe",
    "gpt-oss": "gpt_oss",
    "gpt2": "gpt2",
    "gptoss": "gpt_oss",
    "granite": "granite",
    "granitehybrid": "granitemoehybrid",
    "granitemoe": "granitemoe",
    "hunyuan-dense": "hunyuan_v1_dense",
    "hunyuan-moe": "hunyuan_v1_moe",
    "llama": "llama",
    "lfm2moe": "lfm2_moe",
    "mamba": "mamba",
    "mamba2": "mamba2",
    "minicpm3": "minicpm3",
    "minimax-m2": "minimax_m2",
    "mistral3": "ministral3",
    "nemotron": "nemotron",
    "nemotron_h": "nemotron_h",
    "nemotron_h_moe": "nemotron_h",
    "olmo2": "olmo2",
    "olmoe": "olmoe",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen25vl": "qwen2",
    "qwen2moe": "qwen2_moe",
    "qwen2vl": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "qwen3next": "qwen3_next",
    "qwen3vl": "qwen3",
    "qwen3vlmoe": "qwen3_moe",
    "seed_oss": "seed_oss",
    "smollm3": "smollm3",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
}
"""Model types in transformers, by llama.cpp's names of architectures; those that are right. Models
that read pictures as well are, to text, those that they were made of."""

_TABLES = {
    "cohere": "llama",
    "cohere2": "llama",
    "gemma": "gemma2",
    "gemma3_text": "gemma3",
    "granite": "llama",
    "mixtral": "llama",
}
"""By model type, the name under which transformers has a table of settings, if it is another."""

_USUAL_TABLE = "qwen2"
"""Name of the table of those that transformers has none for."""

_EXTRA_SIZES: tuple[tuple[str, str], ...] = (
    ("attention.key_length", "head_dim"),
    ("expert_count", "num_experts"),
    ("feed_forward_length", "intermediate_size"),
    ("expert_used_count", "num_experts_per_tok"),
    ("expert_feed_forward_length", "moe_intermediate_size"),
    ("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
    ("attention.layer_norm_epsilon", "layer_norm_eps"),
    ("attention.scale", "attention_multiplier"),
    ("embedding_scale", "embedding_multiplier"),
    ("residual_scale", "residual_multiplier"),
    ("logit_scale", "logit_scale"),
    ("attn_logit_softcapping", "attn_logit_softcapping"),
    ("final_logit_softcapping", "final_logit_softcapping"),
    ("expert_count", "n_routed_experts"),
    ("expert_count", "num_local_experts"),
    ("expert_shared_count", "n_shared_experts"),
    ("leading_dense_block_count", "first_k_dense_replace"),
    ("attention.kv_lora_rank", "kv_lora_rank"),
)
"""Names in the metadata, and in config.json of those models that have them."""

_BIASES = ("blk.0.attn_q.bias", "blk.0.attn_qkv.bias")
_SHOWN_CHARS = 60


def write_config(header: Header, out: Path) -> None:
    """Write config.json.

    Raises:
        UnsupportedModel: transformers does not read models of this architecture.
        CheckpointError: what the files say is no possible model.
    """
    _refuse_unknown(header)
    check_metadata(header)
    content = _read(header)
    kind = CONFIG_MAPPING[content["model_type"]]
    known = set(kind.__dataclass_fields__)
    shape = header.tensors["token_embd.weight"].shape
    content |= {
        "vocab_size": shape[0],
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[content["model_type"]]],
    }
    for name in ("bos", "eos"):
        content[f"{name}_token_id"] = header.metadata.get(f"tokenizer.ggml.{name}_token_id")
    content["pad_token_id"] = header.metadata.get("tokenizer.ggml.padding_token_id")
    for key, name in _EXTRA_SIZES:
        if name in known and (value := header.get(key)) is not None:
            content[name] = value
    if "attention_bias" in known:
        content["attention_bias"] = any(name in header.tensors for name in _BIASES)
    heads = header.get("attention.head_count")
    if heads and "head_dim" in known and not content.get("head_dim"):  # as in llama.cpp
        content["head_dim"] = header.get("embedding_length") // heads
    content["num_hidden_layers"] = layers_of(header)
    content |= of_family(header, content)
    written = kind(**content).to_dict() | {
        "dtype": _dtype(header),
        "quantization_config": {
            "quant_method": GGUF_METHOD,
            "architecture": header.architecture,
        },
    }
    for name in ("transformers_version", "_name_or_path"):
        written.pop(name, None)
    (out / CONFIG_NAME).write_text(json.dumps(written, indent=2, sort_keys=True))


def _refuse_unknown(header: Header) -> None:
    architecture = header.architecture
    if architecture not in GGUF_CONFIG_ARCHS and architecture not in _MODEL_TYPES:
        raise UnsupportedModel(
            f"holds a model of the architecture {architecture[:_SHOWN_CHARS]!r}, which is not read "
            "from GGUF. Use a folder with the original model, or a quantized one in safetensors."
        )


def _read(header: Header) -> dict[str, Any]:
    """Return what transformers makes of the metadata."""
    architecture = header.architecture
    if architecture in GGUF_CONFIG_ARCHS:
        return dict(get_gguf_config(dict(header.metadata), tuple(header.tensors)))
    kind = model_type_of(header, _MODEL_TYPES[architecture])
    table: Any = GGUF_CONFIG_MAPPING.get(_TABLES.get(kind, kind), GGUF_CONFIG_MAPPING[_USUAL_TABLE])
    content: dict[str, Any] = {"model_type": kind, **GGUF_CONFIG_DEFAULTS_MAPPING.get(kind, {})}
    for key, name in table.items():
        if name and name != "rope_theta" and (value := header.get(key)) is not None:
            content[name] = value
    return content


def _dtype(header: Header) -> str:
    """Return the dtype to compute in: that of most numbers; bfloat16 if they are in blocks."""
    counts: dict[str, int] = {}
    for tensor in header.weights.values():
        kind = tensor.dtype if tensor.dtype in GGUF_FLOATS else "BF16"
        counts[kind] = counts.get(kind, 0) + math.prod(tensor.shape)
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    return names[max(counts, key=lambda kind: counts[kind])]
