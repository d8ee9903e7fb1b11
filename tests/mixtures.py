"""What configurations of families with experts have, for `tests.checkpoints`."""

from collections.abc import Mapping
from typing import Any

MIXED = ["sliding_attention", "full_attention"]
WINDOWS = {"sliding_window": 5, "layer_types": MIXED, "head_dim": 8}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
}
INDEXER = {**LATENT, "index_n_heads": 16, "index_head_dim": 8, "index_topk": 6}
"""Of so many heads that no two positions are likely to have the same score, which is often 0."""
DENSE_FIRST = ["dense", "sparse", "sparse", "sparse"]
ROPE_BY_KIND = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
SCALED_LIKE_GRANITE = {
    "embedding_multiplier": 2.0,
    "logits_scaling": 1.5,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.3,
}

MIXTURES: Mapping[str, Mapping[str, Any]] = {
    "glm4_moe": {**ROUTED, "head_dim": 16, "first_k_dense_replace": 1, "use_qk_norm": True},
    "glm4_moe_lite": {**ROUTED, **LATENT, "mlp_layer_types": DENSE_FIRST},
    "deepseek_v2": {
        **ROUTED,
        **LATENT,
        "first_k_dense_replace": 1,
        "n_shared_experts": 2,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 16.0,
    },
    "deepseek_v3": {**ROUTED, **LATENT, "first_k_dense_replace": 1},
    "minimax_m2": {**EXPERTS, "head_dim": 16, "rotary_dim": 8, "use_qk_norm": True},
    "minimax_m3_vl_text": {
        **EXPERTS,
        "head_dim": 16,
        "dense_intermediate_size": 40,
        "shared_intermediate_size": 24,
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "mlp_layer_types": DENSE_FIRST,
        "index_n_heads": 2,
        "index_head_dim": 11,
        "index_block_size": 3,
        "index_topk_blocks": 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    },
    "zaya": {
        "head_dim": 8,
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "router_hidden_size": 12,
        "cca_time0": 3,
        "tie_word_embeddings": False,
    },
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 24,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 3,
    },
    "phimoe": {**EXPERTS, "attention_bias": True, "lm_head_bias": True},
    "solar_open": {**ROUTED, "head_dim": 16},
    "exaone_moe": {
        **WINDOWS,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "mlp_layer_types": DENSE_FIRST,
        "n_group": 4,
        "topk_group": 2,
    },
    "cohere2_moe": {
        **WINDOWS,
        "logit_scale": 0.5,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_shared_experts": 1,
        "mlp_layer_types": DENSE_FIRST,
        "prefix_dense_intermediate_size": 40,
        "expert_selection_fn": "sigmoid",
    },
    "mimo_v2_flash": {
        **{name: ROUTED[name] for name in ROUTED if name != "n_shared_experts"},
        **WINDOWS,
        "head_dim": 12,
        "v_head_dim": 8,
        "mlp_layer_types": DENSE_FIRST,
        "rope_parameters": {
            kind: {**parameters, "partial_rotary_factor": 0.334}
            for kind, parameters in ROPE_BY_KIND.items()
        },
    },
    "hy_v3": {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mlp_layer_types": DENSE_FIRST,
    },
    "granitemoeshared": {**EXPERTS, **SCALED_LIKE_GRANITE, "shared_intermediate_size": 24},
    "granitemoe_swa": {
        **EXPERTS,
        **SCALED_LIKE_GRANITE,
        "shared_intermediate_size": 24,
        "sliding_window": 5,
        "layer_types": MIXED,
        "layer_rope_theta": [10000.0, 100.0, 10000.0],
    },
    "afmoe": {
        **WINDOWS,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_shared_experts": 1,
        "moe_intermediate_size": 24,
        "num_dense_layers": 1,
        "mup_enabled": True,
    },
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "jetmoe": {**EXPERTS, "kv_channels": 16},
    "laguna": {
        **WINDOWS,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "mlp_layer_types": DENSE_FIRST,
        "num_attention_heads_per_layer": [4, 8],
        "rope_parameters": ROPE_BY_KIND,
    },
    "mellum": {
        **EXPERTS,
        **WINDOWS,
        "moe_intermediate_size": 24,
        "mlp_layer_types": DENSE_FIRST,
        "rope_parameters": ROPE_BY_KIND,
    },
    "kolibri1": {
        **EXPERTS,
        **WINDOWS,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
    },
    "axk1": {**ROUTED, **LATENT, "mlp_layer_types": DENSE_FIRST},
    "deepseek_v32": {**ROUTED, **INDEXER, "mlp_layer_types": DENSE_FIRST},
    "glm_moe_dsa": {
        **ROUTED,
        **INDEXER,
        "mlp_layer_types": DENSE_FIRST,
        "indexer_types": ["full", "full", "shared", "shared"],
    },
    "hy_v4": {
        **ROUTED,
        **INDEXER,
        "mlp_layer_types": DENSE_FIRST,
        "indexer_types": ["full", "full", "shared", "shared"],
        "learnable_sink_init": 1.0,
        "hc_mult": 3,
    },
    "axk2": {**ROUTED, **INDEXER, "mlp_layer_types": DENSE_FIRST, "gated_norm_rank": 4},
    "longcat_flash": {
        **LATENT,
        "head_dim": 4,
        "ffn_hidden_size": 40,
        "expert_ffn_hidden_size": 24,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "moe_topk": 3,
    },
    "dots1": {**ROUTED, **WINDOWS, "first_k_dense_replace": 1},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 8},
    "aria_text": {"head_dim": 16, "moe_num_experts": 4},
    "beam": {
        **WINDOWS,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "mlp_layer_types": DENSE_FIRST,
        "n_group": 4,
        "topk_group": 2,
        "rope_parameters": {**ROPE_BY_KIND, "full_attention": None},
    },
    "flint": {
        **WINDOWS,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "mlp_only_layers": [0],
    },
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 2.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
}
"""By model type; see `FAMILIES`."""
