"""Tiny random checkpoints of every model family, made in place; nothing is downloaded."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

HIDDEN_SIZE = 32
VOCAB_SIZE = 128
WEIGHT_STD = 0.15

_COMMON: Mapping[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_NO_GQA = {"num_key_value_heads": 4}
_MIXED = ["sliding_attention", "full_attention"]
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LATENTS = {
    **_NO_GQA,
    "kv_lora_rank": 24,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
_ROUTED = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
_SHARED_EXPERT = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}
_MAMBA = {
    "mamba_n_heads": 4,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_chunk_size": 4,
}
_DELTA_NET = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
}

FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "gpt2": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
    },
    "mixtral": {**_EXPERTS, "sliding_window": 6},
    "gemma": {"head_dim": 16},
    "gemma2": {
        "head_dim": 16,
        "sliding_window": 5,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 10.0,
        "query_pre_attn_scalar": 16,
    },
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": 5,
        "layer_types": _MIXED,
        "query_pre_attn_scalar": 16,
    },
    "phi3": {"sliding_window": 7},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 24},
    "olmo2": {},
    "granite": {
        "embedding_multiplier": 2.0,
        "logits_scaling": 1.5,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.3,
    },
    "granitemoe": {**_EXPERTS, "attention_multiplier": 0.3},
    "cohere": {"logit_scale": 0.5},
    "cohere2": {"logit_scale": 0.5, "sliding_window": 5, "layer_types": _MIXED, "head_dim": 8},
    "gpt_oss": {**_EXPERTS, "head_dim": 16, "sliding_window": 5, "layer_types": _MIXED},
    "starcoder2": {"sliding_window": 6},
    "phi": {"partial_rotary_factor": 0.5},
    "olmo": {"clip_qkv": 2.0},
    "smollm3": {"no_rope_layers": [1, 1, 0, 1], "use_sliding_window": False},
    "glm": {"head_dim": 8, "partial_rotary_factor": 0.5},
    "glm4": {"head_dim": 8, "partial_rotary_factor": 0.5},
    "ernie4_5": {"head_dim": 8},
    "exaone4": {"sliding_window": 5, "layer_types": _MIXED},
    "gpt_bigcode": {"multi_query": True},
    "hunyuan_v1_dense": {"head_dim": 8},
    "stablelm": {"partial_rotary_factor": 0.5},
    "nemotron": {"partial_rotary_factor": 0.5},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, **_NO_GQA},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
    },
    "seed_oss": {"head_dim": 8},
    "arcee": {},
    "helium": {"head_dim": 8},
    "apertus": {},
    "deepseek_v2": {
        **_LATENTS,
        **_ROUTED,
        "q_lora_rank": None,
        "topk_method": "group_limited_greedy",
        "rope_parameters": _YARN,
    },
    "deepseek_v3": {**_LATENTS, **_ROUTED, "rope_parameters": {**_YARN, "mscale_all_dim": 1.0}},
    "minicpm3": {**_LATENTS, "v_head_dim": 24, "dim_model_base": 48},
    "youtu": _LATENTS,
    "glm4_moe_lite": {**_LATENTS, **_ROUTED, "n_group": 1, "topk_group": 1, "v_head_dim": 20},
    "axk1": {**_LATENTS, **_ROUTED, "rope_parameters": _YARN},
    "qwen3_next": {"head_dim": 16, **_DELTA_NET, **_SHARED_EXPERT},
    "qwen3_5_text": {"head_dim": 16, **_DELTA_NET},
    "qwen3_5_moe_text": {"head_dim": 16, **_DELTA_NET, **_SHARED_EXPERT},
    "olmo_hybrid": _DELTA_NET,
    "kimi_linear": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_heads": 2,
        "linear_head_dim": 8,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 6,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 24,
        **_EXPERTS,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention"],
        "num_dense_layers": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
    },
    "bamba": {"attn_layer_indices": [1, 3], **_MAMBA},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "shared_intermediate_size": 24,
        **_EXPERTS,
        **_MAMBA,
    },
    "falcon_h1": {"mamba_d_ssm": 64, **_MAMBA},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "head_dim": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 4,
        "n_routed_experts": 4,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 24,
    },
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 4,
        "expert_layer_period": 2,
        "expert_layer_offset": 0,
        "mamba_d_state": 8,
    },
    "minimax": {
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 8,
        "block_size": 4,
        **_EXPERTS,
    },
}
"""What the configuration of each family has beyond `_COMMON`; layer lists repeat as needed."""


def build_model(
    family: str, *, num_layers: int = 4, tie: bool | None = None, seed: int = 0, **settings: Any
) -> PreTrainedModel:
    """Return a small random float32 model whose outputs vary.

    Args:
        family: a model type.
        tie: whether the head is the embedding; default: as the family does.
        settings: more values of the configuration.
    """
    values = {**_COMMON, "num_hidden_layers": num_layers, **FAMILIES.get(family, {}), **settings}
    for name in ("layer_types", "no_rope_layers"):
        if name in values:
            repeated = values[name] * num_layers
            values[name] = repeated[:num_layers]
    if tie is not None:
        values["tie_word_embeddings"] = tie
    config = CONFIG_MAPPING[family](**copy.deepcopy(values))
    torch.manual_seed(seed)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model: PreTrainedModel = kind._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=WEIGHT_STD)
            else:
                parameter.add_(WEIGHT_STD * torch.randn_like(parameter))
    model.train(False)
    return model


def make_checkpoint(
    folder: Path,
    family: str = "llama",
    *,
    num_layers: int = 4,
    tokenizer: bool = False,
    tie: bool | None = None,
    max_shard_size: str = "1GB",
    seed: int = 0,
    **settings: Any,
) -> Path:
    """Write a small random checkpoint of `family` to `folder` and return it.

    Args:
        tokenizer: write a byte-level BPE tokenizer with a chat template, and let the vocabulary
            and the end-of-sequence token be its.
        max_shard_size: largest safetensors file; "40KB" gives several and an index.
        settings: more values of the configuration.
    """
    if tokenizer:
        made = make_tokenizer()
        made.save_pretrained(folder)
        settings = {"vocab_size": len(made), "eos_token_id": made.eos_token_id, **settings}
        settings.setdefault("bos_token_id", made.bos_token_id)
    model = build_model(family, num_layers=num_layers, tie=tie, seed=seed, **settings)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


_TEXT = (
    "The quick brown fox jumps over the lazy dog.",
    "A worker holds its layers and the cache of those layers.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 你好世界 🙂",
)
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with a few merges, a chat template and an end token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>"
    )
    fast.chat_template = _CHAT_TEMPLATE
    return fast
