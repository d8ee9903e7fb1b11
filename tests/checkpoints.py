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

from tests.mixtures import (
    DENSE_FIRST,
    EXPERTS,
    LATENT,
    MIXED,
    MIXTURES,
    ROPE_BY_KIND,
    SCALED_LIKE_GRANITE,
    WINDOWS,
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
_DECODER = {**_NO_GQA, "is_decoder": True}
_COUNTED = {"longcat_flash": 2}
"""As how many hidden layers transformers counts a layer of these families."""
_PER_LAYER = (
    "layer_types",
    "layers_block_type",
    "no_rope_layers",
    "mlp_layer_types",
    "layer_rope_theta",
    "num_attention_heads_per_layer",
    "attention_types",
    "activation_sparsity_pattern",
    "indexer_types",
)
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

_INPUTS_BY_LAYER = {
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "head_dim": 16,
    "sliding_window": 5,
    "layer_types": MIXED,
}

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
    "mixtral": {**EXPERTS, "sliding_window": 6},
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
        "layer_types": MIXED,
        "query_pre_attn_scalar": 16,
    },
    "phi3": {"sliding_window": 7},
    "gpt_neox": _NO_GQA,
    "opt": {**_NO_GQA, "ffn_dim": 48, "word_embed_proj_dim": 24},
    "olmo2": {},
    "granite": SCALED_LIKE_GRANITE,
    "granitemoe": {**EXPERTS, "attention_multiplier": 0.3},
    "cohere": {"logit_scale": 0.5},
    "cohere2": {"logit_scale": 0.5, "sliding_window": 5, "layer_types": MIXED, "head_dim": 8},
    "gpt_oss": {**EXPERTS, "head_dim": 16, "sliding_window": 5, "layer_types": MIXED},
    "starcoder2": {"sliding_window": 6},
    "phi": {"partial_rotary_factor": 0.5},
    "olmo": {"clip_qkv": 2.0},
    "smollm3": {"no_rope_layers": [1, 1, 0, 1], "use_sliding_window": False},
    "glm": {"head_dim": 8, "partial_rotary_factor": 0.5},
    "glm4": {"head_dim": 8, "partial_rotary_factor": 0.5},
    "ernie4_5": {"head_dim": 8},
    "exaone4": {"sliding_window": 5, "layer_types": MIXED},
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
    "gptj": {"rotary_dim": 4, **_NO_GQA},
    "codegen": {"rotary_dim": 4, **_NO_GQA},
    "gpt_neo": {"attention_types": [[["global"], 1], [["local"], 1]], "window_size": 5, **_NO_GQA},
    "openai-gpt": _NO_GQA,
    "falcon": _NO_GQA,
    "bloom": {"num_attention_heads": 6, "hidden_size": 48, "num_key_value_heads": 6},
    "mpt": _NO_GQA,
    "gemma3n_text": {
        **_INPUTS_BY_LAYER,
        "num_kv_shared_layers": 0,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.5, 0.0],
    },
    "gemma4_text": {**_INPUTS_BY_LAYER, "global_head_dim": 32, "final_logit_softcapping": 10.0},
    "olmo3": {**WINDOWS, "rope_parameters": ROPE_BY_KIND},
    "ministral": {"sliding_window": 5, "layer_types": MIXED, "head_dim": 16},
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
    "nanochat": {},
    "granite_swa": {
        **SCALED_LIKE_GRANITE,
        "sliding_window": 5,
        "layer_types": MIXED,
        "layer_rope_theta": [10000.0, 100.0, 10000.0],
    },
    "bitnet": {},
    "vaultgemma": {
        **WINDOWS,
        "head_dim": 16,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 10.0,
        "query_pre_attn_scalar": 16,
    },
    "minicpm3": {**LATENT, "dim_model_base": 16, "scale_emb": 4},
    "youtu": LATENT,
    "internlm3": {"head_dim": 16, "bias": True, "qkv_bias": True},
    "iquestcoder": {"head_dim": 16},
    "persimmon": _NO_GQA,
    "hyperclovax": {**SCALED_LIKE_GRANITE, "head_dim": 16},
    "biogpt": _NO_GQA,
    "cwm": {**WINDOWS, "bos_token_id": 1, "rope_parameters": ROPE_BY_KIND["sliding_attention"]},
    "jais2": {"head_dim": 8},
    "modernbert-decoder": {
        **_NO_GQA,
        "local_attention": 10,
        "layer_types": MIXED,
        "rope_parameters": ROPE_BY_KIND,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "cls_token_id", "sep_token_id"), 1),
    },
    "gpt-sw3": _NO_GQA,
    "gpt_neox_japanese": {**_NO_GQA, "intermediate_multiple_size": 2},
    "xglm": {**_NO_GQA, "ffn_dim": 48},
    "diffllama": {"num_attention_heads": 8, "num_key_value_heads": 4},
    "megatron-bert": _DECODER,
    "rembert": {**_DECODER, "input_embedding_size": 24, "output_embedding_size": 40},
    "bert": _DECODER,
    "bert-generation": _DECODER,
    "electra": _DECODER,
    "ernie": _DECODER,
    "ctrl": {**_NO_GQA, "dff": 48, "n_positions": 256},
    "cohere_compass_text": {**WINDOWS, "rope_parameters": ROPE_BY_KIND},
    "llama4_text": {
        "head_dim": 16,
        "intermediate_size_mlp": 40,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 6,
        "floor_scale": 4,
        "attn_scale": 0.5,
    },
    "qwen3_next": {"head_dim": 16, **_DELTA_NET, **_SHARED_EXPERT},
    "qwen3_5_text": {"head_dim": 16, **_DELTA_NET},
    "qwen3_5_moe_text": {"head_dim": 16, **_DELTA_NET, **_SHARED_EXPERT},
    "qwen4_exp_text": {
        "head_dim": 16,
        **_DELTA_NET,
        **_SHARED_EXPERT,
        "output_gate_type": "sigmoid",
        "eos_token_id": [5, 9],
        "hc_count": 3,
        "hc_lowrank": 10,
        "ple_layer_ids": [1],
        "ple_embed_dim": 24,
        "ple_conv_kernel_size": 3,
        "ngram_size": 3,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 40,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 3,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 17,
        "indexer_budget": 6,
        "indexer_compress_ratio": 3,
    },
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
        **EXPERTS,
    },
    "bailing_hybrid": {
        **LATENT,
        "qk_rope_head_dim": 8,
        "head_dim": 8,
        "layer_group_size": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": DENSE_FIRST,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_token": 3,
        "num_expert_group": 4,
        "topk_group": 2,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {
        "layer_types": ["conv", "full_attention", "sliding_attention", "conv"],
        "head_dim": 8,
        "sliding_window": 5,
    },
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
        **EXPERTS,
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
    "recurrent_gemma": {
        "block_types": ["recurrent", "attention"],
        "attention_window_size": 5,
        "lru_width": 48,
        "logits_soft_cap": 10.0,
    },
    "zamba": {
        **_NO_GQA,
        "layers_block_type": ["hybrid", "hybrid", "linear_attention"],
        "n_mamba_heads": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "zamba2": {
        **_NO_GQA,
        "layers_block_type": ["hybrid", "linear_attention", "hybrid"],
        "num_mem_blocks": 1,
        "n_mamba_heads": 4,
        "mamba_d_state": 8,
        "mamba_ngroups": 2,
        "chunk_size": 4,
        "use_shared_attention_adapter": True,
        "adapter_rank": 4,
        "use_mem_rope": True,
    },
    "mamba": {"state_size": 8},
    "rwkv": {"rescale_every": 2},
    "xlstm": {"hidden_size": 128, "num_heads": 4, "chunk_size": 4},
    "falcon_mamba": {"state_size": 8},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 2, "state_size": 8, "chunk_size": 4},
    "minimax": {
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 8,
        "block_size": 4,
        **EXPERTS,
    },
    **MIXTURES,
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
    if tie is not None:
        settings["tie_word_embeddings"] = tie
    config = config_of(family, num_layers=num_layers, **settings)
    return random_model(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config, seed)


def config_of(family: str, *, num_layers: int = 4, **settings: Any) -> Any:
    """Return the configuration of a small model, of the class that transformers has for it."""
    counted = num_layers * _COUNTED.get(family, 1)
    values = {**_COMMON, "num_hidden_layers": counted, **FAMILIES.get(family, {}), **settings}
    for name in _PER_LAYER:
        if name in values:
            repeated = values[name] * num_layers
            values[name] = repeated[:num_layers]
    return CONFIG_MAPPING[family](**copy.deepcopy(values))


def random_model(kind: Any, config: Any, seed: int = 0) -> PreTrainedModel:
    """Return a float32 model of this class with random weights, whose outputs vary."""
    torch.manual_seed(seed)
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
