"""What llama.cpp's converter does to Mamba and Granite 4, for `tests.gguf_families`."""

from typing import Any

from torch import Tensor


def mamba_sizes(config: Any) -> dict[str, Any]:
    """Return what metadata have of Mamba beyond that of all."""
    return {
        "attention.layer_norm_rms_epsilon": config.layer_norm_epsilon,
        "feed_forward_length": 0,
        "ssm.conv_kernel": config.conv_kernel,
        "ssm.inner_size": config.intermediate_size,
        "ssm.state_size": config.state_size,
        "ssm.time_step_rank": config.time_step_rank,
    }


def mamba2_sizes(config: Any) -> dict[str, Any]:
    """Likewise, of Mamba 2."""
    return {
        "attention.layer_norm_rms_epsilon": config.layer_norm_epsilon,
        "feed_forward_length": 0,
        "ssm.conv_kernel": config.conv_kernel,
        "ssm.inner_size": config.num_heads * config.head_dim,
        "ssm.state_size": config.state_size,
        "ssm.group_count": config.n_groups,
        "ssm.time_step_rank": config.num_heads,
    }


def granite_hybrid_sizes(config: Any) -> dict[str, Any]:
    """Likewise, of Granite 4."""
    found = {
        "ssm.conv_kernel": config.mamba_d_conv,
        "ssm.inner_size": config.mamba_n_heads * config.mamba_d_head,
        "ssm.state_size": config.mamba_d_state,
        "ssm.group_count": config.mamba_n_groups,
        "ssm.time_step_rank": config.mamba_n_heads,
        "rope.scaling.finetuned": config.position_embedding_type == "rope",
        "attention.head_count_kv": [
            config.num_key_value_heads if kind == "full_attention" else 0
            for kind in config.layer_types
        ],
    }
    if config.num_local_experts:
        found["expert_shared_feed_forward_length"] = config.shared_intermediate_size
    else:
        found["feed_forward_length"] = config.shared_intermediate_size
    return found


def split_mamba(config: Any, name: str, tensor: Tensor) -> dict[str, Tensor] | None:
    """Return what a parameter of a Mamba becomes; None: it is only renamed."""
    is_second = config.model_type != "mamba"
    match name.rpartition("mixer." if "mixer." in name else "mamba.")[2]:
        case "A_log":
            decay = -tensor.exp()
            return {"ssm_a": decay[:, None] if is_second else decay}
        case "D" if is_second:
            return {"ssm_d": tensor[:, None]}
        case "dt_bias":
            return {"ssm_dt.bias": tensor}
        case "conv1d.weight":
            return {"ssm_conv1d.weight": tensor[:, 0]}
        case "norm.weight" if name.startswith(("mixer.", "mamba.")):
            groups = getattr(config, "n_groups", None) or config.mamba_n_groups
            return {"ssm_norm.weight": tensor.view(groups, -1)}
    return None


def split_granite(config: Any, name: str, tensor: Tensor) -> dict[str, Tensor] | None:
    """Return what a parameter of a mixture of Granite becomes; None: it is only renamed."""
    end = "_shexp.weight" if config.num_local_experts else ".weight"
    match name:
        case "block_sparse_moe.router.weight":
            return {"ffn_gate_inp.weight": tensor}
        case "shared_mlp.input_linear.weight":
            gates, ups = tensor.chunk(2)
            return {f"ffn_gate{end}": gates, f"ffn_up{end}": ups}
        case "shared_mlp.output_linear.weight":
            return {f"ffn_down{end}": tensor}
    return None


def split_granite_hybrid(config: Any, name: str, tensor: Tensor) -> dict[str, Tensor] | None:
    """Likewise, of Granite 4."""
    if name.startswith("mamba."):
        return split_mamba(config, name, tensor)
    return split_granite(config, name, tensor)


def nemotron_h_sizes(config: Any) -> dict[str, Any]:
    """Likewise, of Nemotron 3."""
    types = config.layers_block_type
    widths = {"moe": config.moe_intermediate_size, "mlp": config.intermediate_size}
    found = {
        "attention.layer_norm_rms_epsilon": config.layer_norm_epsilon,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.head_count_kv": [
            config.num_key_value_heads if kind == "full_attention" else 0 for kind in types
        ],
        "feed_forward_length": [widths.get(kind, 0) for kind in types],
        "ssm.conv_kernel": config.conv_kernel,
        "ssm.inner_size": config.mamba_num_heads * config.mamba_head_dim,
        "ssm.state_size": config.ssm_state_size,
        "ssm.group_count": config.n_groups,
        "ssm.time_step_rank": config.mamba_num_heads,
        "vocab_size": config.vocab_size,
    }
    if "moe" not in types:
        return found
    return found | {
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_feed_forward_length": config.moe_shared_expert_intermediate_size,
        "expert_shared_count": config.n_shared_experts,
        "expert_weights_norm": config.norm_topk_prob,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_group_count": config.n_group,
    }


_NEMOTRON = {
    "in_proj.weight": "ssm_in.weight",
    "out_proj.weight": "ssm_out.weight",
    "conv1d.bias": "ssm_conv1d.bias",
    "q_proj.weight": "attn_q.weight",
    "k_proj.weight": "attn_k.weight",
    "v_proj.weight": "attn_v.weight",
    "o_proj.weight": "attn_output.weight",
    "experts.up_proj": "ffn_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
    "gate.weight": "ffn_gate_inp.weight",
    "gate.e_score_correction_bias": "exp_probs_b.bias",
    "up_proj.weight": "ffn_up.weight",
    "down_proj.weight": "ffn_down.weight",
    "shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}


def split_nemotron_h(config: Any, name: str, tensor: Tensor) -> dict[str, Tensor] | None:
    """Return what a parameter of Nemotron 3 becomes; None: it is only renamed."""
    path, _, rest = name.partition(".")
    if path == "mixer" and rest in _NEMOTRON:
        return {_NEMOTRON[rest]: tensor}
    return split_mamba(config, name, tensor)
