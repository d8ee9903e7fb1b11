"""What llama.cpp's converter does to Qwen 3 Next and Qwen 3.5, for `tests.gguf_families`."""

from typing import Any

import torch
from torch import Tensor


def delta_net_sizes(config: Any) -> dict[str, Any]:
    found = {
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "ssm.state_size": config.linear_key_head_dim,
        "ssm.group_count": config.linear_num_key_heads,
        "ssm.time_step_rank": config.linear_num_value_heads,
        "ssm.inner_size": config.linear_num_value_heads * config.linear_value_head_dim,
        "full_attention_interval": config.layer_types.index("full_attention") + 1,
    }
    if config.model_type != "qwen3_next":
        found["rope.dimension_sections"] = [2, 1, 1, 0]  # the same for text, whatever they are
    return found


def split_delta_net(config: Any, name: str, tensor: Tensor) -> dict[str, Tensor] | None:
    leaf = name.removeprefix("linear_attn.")
    if name.endswith("norm.weight") and leaf != "norm.weight":
        return {_renamed(name): tensor + 1}
    if name == "mlp.shared_expert_gate.weight":
        return {"ffn_gate_inp_shexp.weight": tensor[0]}
    if name == "mlp.experts.down_proj" or not name.startswith("linear_attn."):
        return None
    groups = config.linear_num_key_heads
    tiles = config.linear_num_value_heads // groups
    width = config.linear_value_head_dim
    tiled = config.model_type != "qwen3_next"
    keys = 2 * config.linear_key_head_dim * groups

    def spread(rows: Tensor, size: int) -> Tensor:
        if not tiled:
            return rows
        by_head = rows.reshape(groups, tiles, size, *rows.shape[1:])
        return by_head.transpose(0, 1).reshape(rows.shape)

    match leaf:
        case "A_log":
            return {"ssm_a": spread(-tensor.exp(), 1)}
        case "dt_bias":
            return {"ssm_dt.bias": spread(tensor, 1)}
        case "conv1d.weight":
            kernel = tensor[:, 0]
            return {"ssm_conv1d.weight": torch.cat([kernel[:keys], spread(kernel[keys:], width)])}
        case "in_proj_qkv.weight":
            return {"attn_qkv.weight": torch.cat([tensor[:keys], spread(tensor[keys:], width)])}
        case "in_proj_z.weight":
            return {"attn_gate.weight": spread(tensor, width)}
        case "in_proj_a.weight" | "in_proj_b.weight":
            new = "ssm_alpha.weight" if leaf == "in_proj_a.weight" else "ssm_beta.weight"
            return {new: spread(tensor, 1)}
        case "out_proj.weight":
            return {"ssm_out.weight": spread(tensor.T, width).T}
        case "in_proj_qkvz.weight":
            key = config.linear_key_head_dim
            by_head = tensor.view(groups, -1, tensor.shape[-1])
            parts = torch.split(by_head, [key, key, tiles * width, tiles * width], dim=1)
            q, k, v, z = (part.flatten(0, 1) for part in parts)
            return {"attn_qkv.weight": torch.cat([q, k, v]), "attn_gate.weight": z}
    return None


def _renamed(name: str) -> str:
    names = {
        "input_layernorm.weight": "attn_norm.weight",
        "post_attention_layernorm.weight": "post_attention_norm.weight",
        "self_attn.q_norm.weight": "attn_q_norm.weight",
        "self_attn.k_norm.weight": "attn_k_norm.weight",
        "model.norm.weight": "output_norm.weight",
    }
    return names[name]
