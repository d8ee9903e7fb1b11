"""What config.json says of models some or all of whose layers have a state instead of attention."""

from collections.abc import Mapping
from typing import Any

from distributed_llm.gguf_texts.header import Header

_Content = Mapping[str, Any]


def layers_of(header: Header) -> int:
    """Return the number of layers, without those that only predict further tokens."""
    return int(header.get("block_count")) - int(header.get("nextn_predict_layers") or 0)


def of_lfm2_moe(header: Header, content: _Content) -> dict[str, Any]:
    """Return the settings of mixtures of LFM 2: a layer without heads is a convolution."""
    heads = header.get("attention.head_count_kv")
    return {
        "num_key_value_heads": max(heads),
        "layer_types": ["full_attention" if number else "conv" for number in heads],
        "norm_eps": header.get("attention.layer_norm_rms_epsilon"),
        "conv_L_cache": header.get("shortconv.l_cache"),
        "num_dense_layers": header.get("leading_dense_block_count") or 0,
    }


def of_qwen3_next(header: Header, content: _Content) -> dict[str, Any]:
    """Return the settings of Qwen 3 Next."""
    heads = header.get("ssm.time_step_rank")
    interval = header.get("full_attention_interval") or 4
    return {
        "linear_conv_kernel_dim": header.get("ssm.conv_kernel"),
        "linear_key_head_dim": header.get("ssm.state_size"),
        "linear_num_key_heads": header.get("ssm.group_count"),
        "linear_num_value_heads": heads,
        "linear_value_head_dim": header.get("ssm.inner_size") // heads,
        "norm_topk_prob": True,
        "layer_types": [
            "linear_attention" if (number + 1) % interval else "full_attention"
            for number in range(layers_of(header))
        ],
    }


def of_granite_hybrid(header: Header, content: _Content) -> dict[str, Any]:
    """Return the settings of Granite 4; files say a number of heads for each layer: none, or so."""
    heads = header.get("attention.head_count_kv")
    states, inner = header.get("ssm.time_step_rank"), header.get("ssm.inner_size")
    experts = header.get("expert_count") or 0
    shared = "expert_shared_feed_forward_length" if experts else "feed_forward_length"
    return {
        "num_key_value_heads": max(heads),
        "layer_types": ["full_attention" if n else "linear_attention" for n in heads],
        "logits_scaling": header.get("logit_scale") or 1.0,
        "num_local_experts": experts,
        "num_experts_per_tok": header.get("expert_used_count") or 0,
        "shared_intermediate_size": header.get(shared),
        "position_embedding_type": "rope" if header.get("rope.scaling.finetuned") else None,
        "mamba_n_heads": states,
        "mamba_d_head": inner // states,
        "mamba_n_groups": header.get("ssm.group_count"),
        "mamba_d_state": header.get("ssm.state_size"),
        "mamba_d_conv": header.get("ssm.conv_kernel"),
        "mamba_expand": inner // header.get("embedding_length"),
        "mamba_conv_bias": any(n.endswith("ssm_conv1d.bias") for n in header.tensors),
    }


def of_mamba(header: Header, content: _Content) -> dict[str, Any]:
    """Return the settings of Mamba."""
    inner = header.get("ssm.inner_size")
    return {
        "state_size": header.get("ssm.state_size"),
        "conv_kernel": header.get("ssm.conv_kernel"),
        "time_step_rank": header.get("ssm.time_step_rank"),
        "intermediate_size": inner,
        "expand": inner // header.get("embedding_length"),
        "layer_norm_epsilon": header.get("attention.layer_norm_rms_epsilon"),
    }


def of_mamba2(header: Header, content: _Content) -> dict[str, Any]:
    """Return the settings of Mamba 2."""
    heads, inner = header.get("ssm.time_step_rank"), header.get("ssm.inner_size")
    return {
        "state_size": header.get("ssm.state_size"),
        "conv_kernel": header.get("ssm.conv_kernel"),
        "n_groups": header.get("ssm.group_count"),
        "num_heads": heads,
        "head_dim": inner // heads,
        "intermediate_size": inner,
        "expand": inner // header.get("embedding_length"),
        "layer_norm_epsilon": header.get("attention.layer_norm_rms_epsilon"),
    }


_NEMOTRON_LAYERS: Mapping[str, str] = {
    "ssm_in.weight": "linear_attention",
    "attn_q.weight": "full_attention",
    "ffn_gate_inp.weight": "moe",
    "ffn_up.weight": "mlp",
}
"""Of Nemotron H, what a layer is by a tensor that it has."""


def of_nemotron_h(header: Header, content: _Content) -> dict[str, Any]:
    """Return the settings of Nemotron H and Nemotron 3, each of whose layers is one thing alone."""
    states, inner = header.get("ssm.time_step_rank"), header.get("ssm.inner_size")
    types = [
        kind
        for number in range(layers_of(header))
        for leaf, kind in _NEMOTRON_LAYERS.items()
        if f"blk.{number}.{leaf}" in header.tensors
    ]
    found = {
        "layers_block_type": types,
        "num_key_value_heads": max(header.get("attention.head_count_kv")),
        "intermediate_size": max(header.get("feed_forward_length")),
        "mamba_num_heads": states,
        "mamba_head_dim": inner // states,
        "n_groups": header.get("ssm.group_count"),
        "ssm_state_size": header.get("ssm.state_size"),
        "conv_kernel": header.get("ssm.conv_kernel"),
        "use_conv_bias": any(name.endswith("ssm_conv1d.bias") for name in header.tensors),
        "layer_norm_epsilon": header.get("attention.layer_norm_rms_epsilon"),
    }
    if header.get("expert_count"):
        shared = header.get("expert_shared_feed_forward_length")
        found |= {
            "moe_shared_expert_intermediate_size": shared,
            "moe_latent_size": header.get("moe_latent_size"),
            "norm_topk_prob": bool(header.get("expert_weights_norm")),
            "routed_scaling_factor": header.get("expert_weights_scale") or 1.0,
            "n_group": header.get("expert_group_count") or 1,
            "topk_group": header.get("expert_group_used_count") or 1,
        }
    return found
