"""Writes tiny models as GGUF files, as llama.cpp's converter does it, with the `gguf` package."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from distributed_llm.common.checkpoint import Checkpoint, checkpoint_of
from distributed_llm.common.gguf_files import TENSORS_NAME
from distributed_llm.common.model_files import TensorInfo, read_json
from distributed_llm.common.other_formats import CONFIG_NAME
from distributed_llm.gguf_texts.texts import write_texts
from tests.checkpoints import make_tokenizer
from tests.gguf_families import as_by_ollama, extra_tensors, sizes_of, stacked, tensors_of

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "starcoder2": "starcoder2",
    "stablelm": "stablelm",
    "nemotron": "nemotron",
    "gpt2": "gpt2",
    "granite": "granite",
    "cohere": "command-r",
    "cohere2": "cohere2",
    "gpt_oss": "gpt-oss",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "gemma3n_text": "gemma3n",
    "gemma4_text": "gemma4",
    "arcee": "arcee",
    "dots1": "dots1",
    "ernie4_5": "ernie4_5",
    "ernie4_5_moe": "ernie4_5-moe",
    "exaone4": "exaone4",
    "glm4": "glm4",
    "glm4_moe": "glm4moe",
    "granitemoe": "granitemoe",
    "granitemoehybrid": "granitehybrid",
    "mamba": "mamba",
    "mamba2": "mamba2",
    "minimax_m2": "minimax-m2",
    "nemotron_h": "nemotron_h_moe",
    "ministral3": "mistral3",
    "granitemoeshared": "granitemoe",
    "hunyuan_v1_dense": "hunyuan-dense",
    "hunyuan_v1_moe": "hunyuan-moe",
    "lfm2": "lfm2",
    "lfm2_moe": "lfm2moe",
    "minicpm3": "minicpm3",
    "olmo2": "olmo2",
    "qwen3_next": "qwen3next",
    "qwen3_5_text": "qwen35",
    "qwen3_5_moe_text": "qwen35moe",
    "olmoe": "olmoe",
    "seed_oss": "seed_oss",
    "smollm3": "smollm3",
}
"""The name in llama.cpp of each model type."""

_ROTATED_IN_PAIRS = (
    *("llama", "granite", "granitemoe", "granitehybrid", "smollm3", "arcee", "mistral3"),
)
"""Architectures whose queries and keys are stored in another order."""

_ONE_MORE = ("gemma", "gemma2", "gemma3", "nemotron")
"""Architectures whose norms are stored with 1 added."""


def architecture_of(model: PreTrainedModel) -> str:
    """Return the name in llama.cpp of a model's architecture."""
    types = getattr(model.config, "layers_block_type", ())
    if model.config.model_type == "nemotron_h" and "moe" not in types:
        return "nemotron_h"
    return ARCHITECTURES[model.config.model_type]


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    kind: str = "F32",
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    parts: int = 1,
    by_ollama: bool = False,
    experts_alone: bool = False,
    architecture: str | None = None,
    **fields: Any,
) -> Path:
    """Write a model, and return the (first) file.

    Args:
        kind: of the numbers of matrices, as far as they can be in such blocks; what the `gguf`
            package cannot write gets random blocks.
        tokenizer: of byte pairs; None: a made one.
        parts: number of files.
        by_ollama: with the names of ollama's own files of gpt-oss.
        experts_alone: only experts are of that kind, all else is float32.
        architecture: llama.cpp's name, if it is not the usual one of that model type.
        fields: more of the metadata, "__" for "."; those of the architecture begin with "arch__".
    """
    architecture = architecture or architecture_of(model)
    most = -(-_count(model) // parts) if parts > 1 else 0
    known = architecture in gguf.MODEL_ARCH_NAMES.values()
    named_as = architecture if known else architecture_of(model)
    tensors = [*stacked(_tensors(model, named_as)), *extra_tensors(model)]
    if by_ollama:
        architecture, tensors = "gptoss", as_by_ollama(tensors)
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=most)
    _write_sizes(writer, model.config)
    for name, value in ({f"arch__{k}": v for k, v in sizes_of(model).items()} | fields).items():
        name = name.replace("__", ".").replace("arch.", f"{architecture}.")
        if name.endswith("token_id"):
            writer.add_uint32(name, value)
        elif isinstance(value, list):
            writer.add_array(name, value)
        elif type(value) is bool:
            writer.add_bool(name, value)
        elif type(value) is int:
            writer.add_uint32(name, value)
        else:
            writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    _write_tokenizer(writer, tokenizer or make_tokenizer(), int(model.config.vocab_size))
    for name, tensor in tensors:
        is_plain = experts_alone and "_exps." not in name
        _write_tensor(writer, name, tensor, "F32" if is_plain else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if parts == 1 else path.with_name(f"{path.stem}-00001-of-{parts:05}.gguf")


def _count(model: PreTrainedModel) -> int:
    return len(stacked(_tensors(model, architecture_of(model))))


def _write_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    rope = config.rope_parameters if hasattr(config, "rope_parameters") else None
    said = config.to_dict()
    heads = getattr(config, "num_attention_heads", 0)
    head_dim = said.get("head_dim") or config.hidden_size // max(1, heads)
    writer.add_context_length(getattr(config, "max_position_embeddings", 256))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(heads)
    writer.add_head_count_kv(said.get("num_key_value_heads", heads))
    if isinstance(getattr(config, "intermediate_size", None), int):
        writer.add_feed_forward_length(config.intermediate_size)
    if rope:
        full = rope.get("full_attention", rope)
        writer.add_rope_freq_base(full["rope_theta"])
        rotated = int(head_dim * full.get("partial_rotary_factor", 1.0))
        writer.add_rope_dimension_count(rotated)
    if heads and head_dim != config.hidden_size // heads:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if (
        config.model_type in ("gemma2", "gemma3_text", "phi3", "cohere2", "exaone4")
        and config.sliding_window
    ):
        writer.add_sliding_window(config.sliding_window)
    if config.model_type.startswith("granite"):
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if config.model_type in ("cohere", "cohere2"):
        writer.add_logit_scale(config.logit_scale)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for name in ("layer_norm_epsilon", "norm_epsilon", "norm_eps", "layer_norm_eps"):
        if hasattr(config, name):
            writer.add_layer_norm_eps(getattr(config, name))
            break
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    if experts and config.model_type != "nemotron_h":  # which may have layers of others alone
        writer.add_expert_count(experts)
        used = said.get("num_experts_per_tok") or said.get("top_k_experts")
        writer.add_expert_used_count(used)
    if experts and getattr(config, "moe_intermediate_size", None):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if hasattr(config, "shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def _write_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast, vocab_size: int
) -> None:
    import json

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = content["model"]["vocab"]
    special = {token["content"] for token in content["added_tokens"] if token["special"]}
    tokens = sorted(vocab, key=lambda token: vocab[token])[:vocab_size]
    tokens += [f"[PAD{number}]" for number in range(len(tokens), vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    types = [3 if t in special else 5 if t.startswith("[PAD") else 1 for t in tokens]
    writer.add_token_types(types)
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    writer.add_token_merges(merges)
    writer.add_bos_token_id(vocab["<|begin|>"])
    writer.add_eos_token_id(vocab["<|end|>"])
    writer.add_chat_template(tokenizer.chat_template)


def _tensors(model: PreTrainedModel, architecture: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors as llama.cpp names and orders them."""
    config: Any = model.config
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        if (own := tensors_of(model, name, tensor)) is not None:
            yield from own
            continue
        values = tensor.float().numpy()
        if match := re.fullmatch(r"model\.layers\.(\d+)\..*\.experts\.(\w+)", name):
            layer, half = match[1], values.shape[1] // 2
            if match[2] == "down_proj":
                yield f"blk.{layer}.ffn_down_exps.weight", values
            else:
                yield f"blk.{layer}.ffn_gate_exps.weight", values[:, :half]
                yield f"blk.{layer}.ffn_up_exps.weight", values[:, half:]
            continue
        if architecture == "gpt2" and re.search(r"\.(c_attn|c_proj|c_fc)\.weight$", name):
            values = values.T
        if architecture in _ROTATED_IN_PAIRS and re.search(r"\.[qk]_proj\.", name):
            heads = config.num_attention_heads
            heads = heads if ".q_proj." in name else config.num_key_value_heads
            paired = values.reshape(heads, 2, -1, *values.shape[1:])
            values = paired.swapaxes(1, 2).reshape(values.shape)
        if architecture in _ONE_MORE and name.endswith("norm.weight"):
            values = values + 1
        if name.endswith("shared_expert_gate.weight"):
            values = values[0]
        known = name.replace(".block_sparse_moe.", ".mlp.")
        named = names.get_name(known, try_suffixes=(".weight", ".bias"))
        assert named, name
        yield named, values


def _write_tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: str) -> None:
    quant = GGMLQuantizationType[kind]
    numbers = GGML_QUANT_SIZES[quant][0]
    values = np.ascontiguousarray(values)
    if values.ndim < 2 or values.shape[-1] % numbers or "ffn_gate_inp" in name or kind == "F32":
        writer.add_tensor(name, values.astype(np.float32))
    elif kind == "F16":
        writer.add_tensor(name, values.astype(np.float16))
    elif kind == "BF16":
        narrow = torch.from_numpy(values).bfloat16().view(torch.uint8).numpy()
        writer.add_tensor(name, narrow, raw_shape=narrow.shape, raw_dtype=quant)
    else:
        try:
            blocks = gguf.quants.quantize(values, quant)
        except NotImplementedError:
            blocks = random_blocks(kind, values.size // numbers)
            blocks = blocks.reshape(*values.shape[:-1], -1)
        writer.add_tensor(name, blocks, raw_shape=blocks.shape, raw_dtype=quant)


def random_blocks(kind: str, count: int) -> np.ndarray:
    """Return blocks of all bits, uint8 [count, bytes], with scales that are finite."""
    numbers = np.random.default_rng(7)
    nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]
    blocks = numbers.integers(0, 256, (count, nbytes), dtype=np.uint8)
    scales = (0.01 * numbers.standard_normal((count, 2))).astype(np.float16).view(np.uint8)
    at = {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208, "TQ1_0": 52, "TQ2_0": 64}.get(kind, 0)
    wide = 4 if kind in ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K") else 2
    if kind == "MXFP4":
        blocks[:, 0] = 110 + blocks[:, 0] % 30  # an exponent
    elif kind == "IQ1_M":
        blocks[:, -1] = 0x20 | blocks[:, -1] % 16  # the high bits of the scale
    else:
        blocks[:, at : at + wide] = scales[:, :wide]
    return blocks


def open_here(file: Path, texts: Path) -> Checkpoint:
    """Return the model in a file; what a process of its own does otherwise is done here."""
    texts.mkdir()
    write_texts([file], texts)
    content = (texts / TENSORS_NAME).read_bytes()
    tensors = msgspec.json.decode(content, type=dict[str, TensorInfo])
    return checkpoint_of(texts, read_json(texts / CONFIG_NAME), tensors, file.parent)
