"""Tiny random checkpoints of every model family, made in place; nothing is downloaded."""

import copy
import json
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
_WINDOWS = {"sliding_window": 5, "layer_types": _MIXED, "head_dim": 8}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
}
_DECODER = {**_NO_GQA, "is_decoder": True}
_DENSE_FIRST = ["dense", "sparse", "sparse", "sparse"]
_ROPE_BY_KIND = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
_SCALED_LIKE_GRANITE = {
    "embedding_multiplier": 2.0,
    "logits_scaling": 1.5,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.3,
}
_PER_LAYER = (
    "layer_types",
    "no_rope_layers",
    "mlp_layer_types",
    "layer_rope_theta",
    "num_attention_heads_per_layer",
)

FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "gpt2": _NO_GQA,
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
    "gpt_neox": _NO_GQA,
    "opt": {**_NO_GQA, "ffn_dim": 48, "word_embed_proj_dim": 24},
    "olmo2": {},
    "granite": _SCALED_LIKE_GRANITE,
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
    "olmo3": {**_WINDOWS, "rope_parameters": _ROPE_BY_KIND},
    "ministral": {"sliding_window": 5, "layer_types": _MIXED, "head_dim": 16},
    "ministral3": {
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale_all_dim": 1.0,
            "mscale": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "glm4_moe": {**_ROUTED, "head_dim": 16, "first_k_dense_replace": 1, "use_qk_norm": True},
    "glm4_moe_lite": {**_ROUTED, **_LATENT, "mlp_layer_types": _DENSE_FIRST},
    "deepseek_v2": {
        **_ROUTED,
        **_LATENT,
        "first_k_dense_replace": 1,
        "n_shared_experts": 2,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 16.0,
    },
    "deepseek_v3": {**_ROUTED, **_LATENT, "first_k_dense_replace": 1},
    "minimax_m2": {**_EXPERTS, "head_dim": 16, "rotary_dim": 8, "use_qk_norm": True},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 24,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 3,
    },
    "phimoe": {**_EXPERTS, "attention_bias": True, "lm_head_bias": True},
    "solar_open": {**_ROUTED, "head_dim": 16},
    "exaone_moe": {
        **_WINDOWS,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "mlp_layer_types": _DENSE_FIRST,
        "n_group": 4,
        "topk_group": 2,
    },
    "cohere2_moe": {
        **_WINDOWS,
        "logit_scale": 0.5,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_shared_experts": 1,
        "mlp_layer_types": _DENSE_FIRST,
        "prefix_dense_intermediate_size": 40,
        "expert_selection_fn": "sigmoid",
    },
    "nanochat": {},
    "mimo_v2_flash": {
        **{name: _ROUTED[name] for name in _ROUTED if name != "n_shared_experts"},
        **_WINDOWS,
        "head_dim": 12,
        "v_head_dim": 8,
        "mlp_layer_types": _DENSE_FIRST,
        "rope_parameters": {
            kind: {**parameters, "partial_rotary_factor": 0.334}
            for kind, parameters in _ROPE_BY_KIND.items()
        },
    },
    "hy_v3": {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mlp_layer_types": _DENSE_FIRST,
    },
    "granite_swa": {
        **_SCALED_LIKE_GRANITE,
        "sliding_window": 5,
        "layer_types": _MIXED,
        "layer_rope_theta": [10000.0, 100.0, 10000.0],
    },
    "granitemoeshared": {**_EXPERTS, **_SCALED_LIKE_GRANITE, "shared_intermediate_size": 24},
    "granitemoe_swa": {
        **_EXPERTS,
        **_SCALED_LIKE_GRANITE,
        "shared_intermediate_size": 24,
        "sliding_window": 5,
        "layer_types": _MIXED,
        "layer_rope_theta": [10000.0, 100.0, 10000.0],
    },
    "afmoe": {
        **_WINDOWS,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_shared_experts": 1,
        "moe_intermediate_size": 24,
        "num_dense_layers": 1,
        "mup_enabled": True,
    },
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "bitnet": {},
    "vaultgemma": {
        **_WINDOWS,
        "head_dim": 16,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 10.0,
        "query_pre_attn_scalar": 16,
    },
    "minicpm3": {**_LATENT, "dim_model_base": 16, "scale_emb": 4},
    "jetmoe": {**_EXPERTS, "kv_channels": 16},
    "youtu": _LATENT,
    "laguna": {
        **_WINDOWS,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "mlp_layer_types": _DENSE_FIRST,
        "num_attention_heads_per_layer": [4, 8],
        "rope_parameters": _ROPE_BY_KIND,
    },
    "mellum": {
        **_EXPERTS,
        **_WINDOWS,
        "moe_intermediate_size": 24,
        "mlp_layer_types": _DENSE_FIRST,
        "rope_parameters": _ROPE_BY_KIND,
    },
    "internlm3": {"head_dim": 16, "bias": True, "qkv_bias": True},
    "iquestcoder": {"head_dim": 16},
    "kolibri1": {
        **_EXPERTS,
        **_WINDOWS,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
    },
    "axk1": {**_ROUTED, **_LATENT, "mlp_layer_types": _DENSE_FIRST},
    "persimmon": _NO_GQA,
    "hyperclovax": {**_SCALED_LIKE_GRANITE, "head_dim": 16},
    "dots1": {**_ROUTED, **_WINDOWS, "first_k_dense_replace": 1},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 8},
    "aria_text": {"head_dim": 16, "moe_num_experts": 4},
    "beam": {
        **_WINDOWS,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "mlp_layer_types": _DENSE_FIRST,
        "n_group": 4,
        "topk_group": 2,
        "rope_parameters": {**_ROPE_BY_KIND, "full_attention": None},
    },
    "biogpt": _NO_GQA,
    "cwm": {**_WINDOWS, "bos_token_id": 1, "rope_parameters": _ROPE_BY_KIND["sliding_attention"]},
    "flint": {
        **_WINDOWS,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "mlp_only_layers": [0],
    },
    "jais2": {"head_dim": 8},
    "modernbert-decoder": {
        **_NO_GQA,
        "local_attention": 10,
        "layer_types": _MIXED,
        "rope_parameters": _ROPE_BY_KIND,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "cls_token_id", "sep_token_id"), 1),
    },
    "dbrx": {
        "d_model": HIDDEN_SIZE,
        "n_heads": 4,
        "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 2.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "gpt-sw3": _NO_GQA,
    "bert": _DECODER,
    "bert-generation": _DECODER,
    "electra": _DECODER,
    "ernie": _DECODER,
    "ctrl": {**_NO_GQA, "dff": 48, "n_positions": 256},
    "cohere_compass_text": {**_WINDOWS, "rope_parameters": _ROPE_BY_KIND},
}
"""What the configuration of each family has beyond `_COMMON`; layer lists repeat as needed."""

REPRESENTATIVES: Mapping[str, str] = {
    "llama": "plain layers",
    "gpt2": "transposed matrices, learned positions, a tied head",
    "opt": "projections around the layers",
    "gemma2": "norms that add one, scaled embeddings, windows, soft caps",
    "gpt_oss": "experts with biases, sinks",
    "qwen3_moe": "experts in some layers, norms of heads",
    "granitemoe": "experts whose matrices are stacked in the files",
    "deepseek_v2": "latent attention, groups of experts, shared ones, a dense first layer",
    "mimo_v2_flash": "layers whose attention is of different sizes",
    "dbrx": "one matrix for queries, keys and values, sizes of other names",
    "phi": "biases everywhere, also of the head; a norm and a feed-forward side by side",
    "modernbert-decoder": "a head of several layers",
}
"""Families that cover what loading and sharing weights can meet, with what each of them adds."""


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
    for name in _PER_LAYER:
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
    if model.config.model_type != family:  # gpt-sw3, which is gpt2
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": family}))
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
