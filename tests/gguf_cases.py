"""Tiny models that are written as GGUF files, for tests and for `benchmarks/gguf_agreement.py`."""

from collections.abc import Mapping
from typing import Any

_WINDOWED = {"layer_types": ["sliding_attention"]}
_GEMMA4 = {"vocab_size_per_layer_input": 320}
_UNGROUPED = {"topk_method": "greedy", "n_group": None}
_DELTA_NET: Mapping[str, Any] = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "partial_rotary_factor": 0.5,
    },
}
_SCALED: Mapping[str, Any] = {
    **{"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "mscale": 0.7},
    **{"mscale_all_dim": 0.7, "original_max_position_embeddings": 64},
}
_SHARED_KEYS: Mapping[str, Any] = {
    "layer_types": ["sliding_attention", *["sliding_attention", "full_attention"] * 2],
    "num_layers": 5,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
}

CASES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", {"tie": True}),
    "qwen2": ("qwen2", {"use_sliding_window": False, "sliding_window": None}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3_text", _WINDOWED),
    "mixtral": ("mixtral", {"sliding_window": None}),
    "qwen3moe": (
        "qwen3_moe",
        {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
    ),
    "phi3": ("phi3", {}),
    "granite": ("granite", {}),
    "command-r": ("cohere", {}),
    "command-r, larger": ("cohere", {"use_qk_norm": True}),
    "cohere2": (
        "cohere2",
        {"layer_types": [*["sliding_attention"] * 3, "full_attention"], "sliding_window": 5},
    ),
    "gpt_oss": (
        "gpt_oss",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}},
    ),
    "deepseek2": ("deepseek_v2", _UNGROUPED),
    "deepseek2, lite": ("deepseek_v2", {**_UNGROUPED, "q_lora_rank": None}),
    "deepseek3": ("deepseek_v3", {}),
    "deepseek3, scaled positions": ("deepseek_v3", {"rope_parameters": _SCALED}),
    "gemma3n": (
        "gemma3n_text",
        {
            "hidden_size_per_layer_input": 256,
            "vocab_size_per_layer_input": 320,
            "laurel_rank": 64,
            "activation_sparsity_pattern": [0.95],
        },
    ),
    "arcee": ("arcee", {}),
    "dots1": ("dots1", {"layer_types": ["full_attention"], "num_key_value_heads": 4}),
    "ernie4_5": ("ernie4_5", {}),
    "ernie4_5-moe": ("ernie4_5_moe", {"moe_layer_end_index": -1}),
    "exaone4": ("exaone4", {"layer_types": ["full_attention"], "sliding_window": None}),
    "glm4": ("glm4", {}),
    "glm4moe": ("glm4_moe", {}),
    "gpt2": ("gpt2", {"n_inner": 128, "intermediate_size": 128}),
    "granitemoe": ("granitemoe", {}),
    "granitemoe, shared": ("granitemoeshared", {}),
    "granitehybrid": ("granitemoehybrid", {}),
    "granitehybrid, without experts": (
        "granitemoehybrid",
        {"num_local_experts": 0, "position_embedding_type": "rope"},
    ),
    "hunyuan-dense": ("hunyuan_v1_dense", {}),
    "hunyuan-moe": ("hunyuan_v1_moe", {}),
    "lfm2": ("lfm2", {"block_auto_adjust_ff_dim": False}),
    "lfm2moe": ("lfm2_moe", {}),
    "mamba": ("mamba", {"intermediate_size": 64}),
    "mamba2": ("mamba2", {}),
    "minicpm3": ("minicpm3", {"dim_model_base": 256, "scale_emb": 12}),
    "minimax-m2": ("minimax_m2", {}),
    "mistral3": ("ministral3", {}),
    "nemotron": ("nemotron", {}),
    "nemotron_h": (
        "nemotron_h",
        {"num_layers": 3, "layers_block_type": ["linear_attention", "mlp", "full_attention"]},
    ),
    "nemotron_h_moe": (
        "nemotron_h",
        {"num_layers": 3, "layers_block_type": ["linear_attention", "moe", "full_attention"]},
    ),
    "olmo2": ("olmo2", {}),
    "olmoe": ("olmoe", {}),
    "qwen2moe": ("qwen2_moe", {"decoder_sparse_step": 1, "mlp_only_layers": []}),
    "qwen3next": ("qwen3_next", _DELTA_NET),
    "qwen35": ("qwen3_5_text", _DELTA_NET),
    "qwen35moe": ("qwen3_5_moe_text", _DELTA_NET),
    "qwen2vl": ("qwen2", {"use_sliding_window": False, "sliding_window": None}),
    "qwen3vl": ("qwen3", {}),
    "qwen3vlmoe": (
        "qwen3_moe",
        {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
    ),
    "mistral3, without scaling": ("mistral", {"sliding_window": None}),
    "seed_oss": ("seed_oss", {}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 1, 1, 0]}),
    "stablelm": ("stablelm", {}),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
    "gemma4": ("gemma4_text", _GEMMA4),
    "gemma4, keys are values": (
        "gemma4_text",
        {**_GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
    ),
    "gemma4, shared keys and values": ("gemma4_text", {**_GEMMA4, **_SHARED_KEYS}),
    "gemma4, experts": (
        "gemma4_text",
        {
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 24,
        },
    ),
}
"""Tiny models, made so that a GGUF file of them says all that they are: model type and settings."""

_SECTIONS = {"arch__rope__dimension_sections": [2, 1, 1, 0]}
WRITTEN: Mapping[str, Mapping[str, Any]] = {
    "qwen2vl": {"architecture": "qwen2vl", **_SECTIONS},
    "qwen3vl": {"architecture": "qwen3vl", "arch__n_deepstack_layers": 0, **_SECTIONS},
    "qwen3vlmoe": {"architecture": "qwen3vlmoe", "arch__n_deepstack_layers": 0, **_SECTIONS},
    "mistral3, without scaling": {"architecture": "mistral3"},
}
"""What `write_gguf` is told besides of some of them: what else their files say."""
