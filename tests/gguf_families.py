"""What llama.cpp's converter does to the families whose tensors are not only renamed.

Written after the converter, not after what reads its files here: `benchmarks/gguf_agreement.py`
holds both against llama.cpp.
"""

import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.gguf_delta_nets import delta_net_sizes, split_delta_net
from tests.gguf_mambas import (
    granite_hybrid_sizes,
    mamba2_sizes,
    mamba_sizes,
    nemotron_h_sizes,
    split_granite,
    split_granite_hybrid,
    split_mamba,
    split_nemotron_h,
)

_LAYER = re.compile(r"(?:model|backbone)\.layers\.(?P<layer>\d+)\.(?P<rest>.+)")
_NUMBERED = re.compile(r"\.\d+$")
_Named = Iterator[tuple[str, np.ndarray]]


def sizes_of(model: PreTrainedModel) -> dict[str, Any]:
    """Return what metadata have of a model beyond that of all; without the architecture's name."""
    make = _SIZES.get(model.config.model_type)
    return {name.replace(".", "__"): v for name, v in (make(model.config) if make else {}).items()}


def tensors_of(model: PreTrainedModel, name: str, tensor: Tensor) -> _Named | None:
    """Return what a parameter becomes, by names in the file; None: it is only renamed."""
    found = _named(model, name, tensor)
    return None if found is None else ((n, t.float().numpy()) for n, t in found.items())


def _named(model: PreTrainedModel, name: str, tensor: Tensor) -> dict[str, Tensor] | None:
    match = _LAYER.fullmatch(name)
    split = _SPLITS.get(model.config.model_type)
    if split is None:
        return None
    found = split(model.config, match["rest"] if match else name, tensor)
    if found is None or match is None:
        return found
    return {f"blk.{match['layer']}.{leaf}": value for leaf, value in found.items()}


def _windows(config: Any) -> list[bool]:
    return [kind == "sliding_attention" for kind in config.layer_types]


def _yarn(rope: dict[str, Any]) -> dict[str, Any]:
    if rope["rope_type"] != "yarn":
        return {}
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(rope["factor"]),
        "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
    }


def _gpt_oss_sizes(config: Any) -> dict[str, Any]:
    found = {
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.sliding_window": config.sliding_window,
        "expert_feed_forward_length": config.intermediate_size,
    }
    return found | _yarn(config.rope_parameters)


def _split_gpt_oss(config: Any, name: str, tensor: Tensor) -> dict[str, Tensor] | None:
    match name:
        case "self_attn.sinks":
            return {"attn_sinks.weight": tensor}
        case "mlp.experts.gate_up_proj":
            lying = tensor.transpose(1, 2)
            return {
                "ffn_gate_exps.weight": lying[:, ::2],
                "ffn_up_exps.weight": lying[:, 1::2],
            }
        case "mlp.experts.gate_up_proj_bias":
            return {"ffn_gate_exps.bias": tensor[:, ::2], "ffn_up_exps.bias": tensor[:, 1::2]}
        case "mlp.experts.down_proj":
            return {"ffn_down_exps.weight": tensor.transpose(1, 2)}
        case "mlp.experts.down_proj_bias":
            return {"ffn_down_exps.bias": tensor}
    return None


def _deepseek_sizes(config: Any) -> dict[str, Any]:
    found = {
        "attention.head_count_kv": 1,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "attention.value_length_mla": config.v_head_dim,
        "rope.dimension_count": config.qk_rope_head_dim,
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_count": config.n_routed_experts,
        "expert_shared_count": config.n_shared_experts,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_gating_func": 2 if config.model_type == "deepseek_v3" else 1,
        "vocab_size": config.vocab_size,
    }
    if config.q_lora_rank:
        found["attention.q_lora_rank"] = config.q_lora_rank
    if config.model_type == "deepseek_v3" and config.norm_topk_prob:
        found["expert_weights_norm"] = True
    if config.n_group and config.n_group > 1:
        found |= {
            "expert_group_count": config.n_group,
            "expert_group_used_count": config.topk_group,
        }
    yarn = _yarn(config.rope_parameters)
    if yarn:
        found["rope.scaling.yarn_log_multiplier"] = 0.1 * config.rope_parameters["mscale_all_dim"]
    return found | yarn


def _split_deepseek(config: Any, name: str, tensor: Tensor) -> dict[str, Tensor] | None:
    if name == "self_attn.kv_b_proj.weight":
        by_head = tensor.view(config.num_attention_heads, -1, config.kv_lora_rank)
        sizes = [config.qk_nope_head_dim, config.v_head_dim]
        keys, values = torch.split(by_head, sizes, dim=1)
        return {"attn_k_b.weight": keys.transpose(1, 2), "attn_v_b.weight": values}
    if name == "mlp.gate.e_score_correction_bias":
        return {"exp_probs_b.bias": tensor}
    return None


def _gemma_inputs(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    return {
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": _windows(config),
        "attention.shared_kv_layers": config.num_kv_shared_layers,
        "embedding_length_per_layer_input": config.hidden_size_per_layer_input,
        "rope.freq_base_swa": float(rope["sliding_attention"]["rope_theta"]),
    }


def _gemma3n_sizes(config: Any) -> dict[str, Any]:
    normal = statistics.NormalDist()
    return _gemma_inputs(config) | {
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "feed_forward_length": config.intermediate_size[0],
        "altup.active_idx": config.altup_active_idx,
        "altup.num_inputs": config.altup_num_inputs,
        "activation_sparsity_scale": [
            normal.inv_cdf(share) if share else -math.inf
            for share in config.activation_sparsity_pattern
        ],
    }


def _split_gemma3n(config: Any, name: str, tensor: Tensor) -> dict[str, Tensor] | None:
    for stack, leaf in (
        ("altup_projections", "altup_proj"),
        ("altup_unembed_projections", "altup_unembd_proj"),
    ):
        if match := re.fullmatch(rf"model\.{stack}\.(\d+)\.weight", name):
            return {f"{leaf}.{match[1]}": tensor}
    if name == "altup.correct_output_scale":
        return {"altup_correct_scale.weight": tensor}
    return None


def _gemma4_sizes(config: Any) -> dict[str, Any]:
    said = config.to_dict()
    wide = said.get("per_layer_config") or {}
    full = next(n for n, windowed in enumerate(_windows(config)) if not windowed)
    own = wide.get(full, wide.get(str(full), {}))
    found = _gemma_inputs(config) | {
        "attention.key_length": own.get("head_dim", said["head_dim"]),
        "attention.value_length": own.get("head_dim", said["head_dim"]),
        "attention.key_length_swa": said["head_dim"],
        "attention.value_length_swa": said["head_dim"],
        "rope.dimension_count": own.get("head_dim", said["head_dim"]),
        "rope.dimension_count_swa": said["head_dim"],
        "attention.head_count_kv": [
            said["num_key_value_heads"]
            if windowed
            else own.get("num_key_value_heads", said["num_key_value_heads"])
            for windowed in _windows(config)
        ],
    }
    if config.final_logit_softcapping:
        found["final_logit_softcapping"] = config.final_logit_softcapping
    if config.enable_moe_block:
        found |= {
            "expert_count": config.num_experts,
            "expert_used_count": config.top_k_experts,
            "expert_feed_forward_length": config.moe_intermediate_size,
        }
    if config.use_double_wide_mlp:
        first = config.num_hidden_layers - config.num_kv_shared_layers
        width = config.intermediate_size
        found["feed_forward_length"] = [
            width if n < first else 2 * width for n in range(config.num_hidden_layers)
        ]
    return found


def _split_gemma4(config: Any, name: str, tensor: Tensor) -> dict[str, Tensor] | None:
    match name:
        case "layer_scalar":
            return {"layer_output_scale.weight": tensor.reshape(1)}
        case "router.scale":
            return {"ffn_gate_inp.scale": tensor}
        case "router.per_expert_scale":
            return {"ffn_down_exps.scale": tensor}
        case "experts.gate_up_proj":
            return {"ffn_gate_up_exps.weight": tensor}
        case "experts.down_proj":
            return {"ffn_down_exps.weight": tensor}
    return None


def stacked(tensors: Iterable[tuple[str, np.ndarray]]) -> list[tuple[str, np.ndarray]]:
    """Return tensors, those that are numbered by their names' ends as one."""
    by_name: dict[str, list[np.ndarray]] = {}
    for name, values in tensors:
        by_name.setdefault(_NUMBERED.sub(".weight", name), []).append(values)
    return [(name, v[0] if len(v) == 1 else np.stack(v)) for name, v in by_name.items()]


def as_by_ollama(tensors: Iterable[tuple[str, np.ndarray]]) -> list[tuple[str, np.ndarray]]:
    """Return the tensors of gpt-oss as ollama's own files have them, joined and renamed."""
    found: dict[str, np.ndarray] = {}
    for name, values in tensors:
        renamed = name
        for old, new in (
            (r"attn_output\.", "attn_out."),
            (r"attn_sinks\.weight", "attn_sinks"),
            (r"post_attention_norm\.", "ffn_norm."),
            (r"attn_[qkv]\.", "attn_qkv."),
        ):
            renamed = re.sub(old, new, renamed)
        before = found.get(renamed)
        found[renamed] = values if before is None else np.concatenate([before, values])
    return list(found.items())


def _routed_sizes(config: Any) -> dict[str, Any]:
    found = {
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_count": config.n_routed_experts,
        "expert_shared_count": config.n_shared_experts,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": config.norm_topk_prob,
        "expert_gating_func": 2,
    }
    if config.n_group > 1:
        found["expert_group_count"] = config.n_group
        found["expert_group_used_count"] = config.topk_group
    return found


def _ernie_sizes(config: Any) -> dict[str, Any]:
    return {
        "expert_count": config.moe_num_experts,
        "expert_used_count": config.moe_k,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_feed_forward_length": config.moe_intermediate_size
        * config.moe_num_shared_experts,
        "expert_shared_count": config.moe_num_shared_experts,
        "interleave_moe_layer_step": config.moe_layer_interval,
        "leading_dense_block_count": config.moe_layer_start_index,
    }


def _granite_shared_sizes(config: Any) -> dict[str, Any]:
    return {"expert_shared_feed_forward_length": config.shared_intermediate_size}


def _hunyuan_sizes(config: Any) -> dict[str, Any]:
    return {
        "expert_used_count": config.moe_topk,
        "expert_shared_feed_forward_length": config.intermediate_size,
        "expert_feed_forward_length": config.intermediate_size,
        "expert_shared_count": 1,
    }


def _minicpm3_sizes(config: Any) -> dict[str, Any]:
    return {
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.q_lora_rank": config.q_lora_rank,
        "attention.key_length": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "attention.value_length": config.v_head_dim,
        "rope.dimension_count": config.qk_rope_head_dim,
    }


def _lfm2_sizes(config: Any) -> dict[str, Any]:
    found = {
        "shortconv.l_cache": config.conv_L_cache,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "attention.head_count_kv": [
            config.num_key_value_heads if kind == "full_attention" else 0
            for kind in config.layer_types
        ],
    }
    if config.model_type == "lfm2_moe":
        found |= {
            "expert_feed_forward_length": config.moe_intermediate_size,
            "leading_dense_block_count": config.num_dense_layers,
            "expert_gating_func": 2,
        }
    return found


def _minimax_sizes(config: Any) -> dict[str, Any]:
    return {
        "expert_feed_forward_length": config.intermediate_size,
        "expert_gating_func": 2,
    }


def _ministral3_sizes(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": rope["factor"],
        "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        "rope.scaling.yarn_beta_fast": rope["beta_fast"],
        "rope.scaling.yarn_beta_slow": rope["beta_slow"],
        "rope.scaling.yarn_log_multiplier": rope["mscale_all_dim"],
        "attention.temperature_scale": rope["llama_4_scaling_beta"],
    }


def _split_correction(config: Any, name: str, tensor: Tensor) -> dict[str, Tensor] | None:
    if name.endswith(("e_score_correction_bias", "expert_bias")):
        return {"exp_probs_b.bias": tensor.reshape(-1)}
    return None


def _split_lfm2(config: Any, name: str, tensor: Tensor) -> dict[str, Tensor] | None:
    if name == "conv.conv.weight":
        return {"shortconv.conv.weight": tensor[:, 0]}
    return _split_correction(config, name, tensor)


def extra_tensors(model: PreTrainedModel) -> _Named:
    """Yield what a file has beside the parameters."""
    config: Any = model.config
    if config.model_type == "gemma4_text":
        rope = config.rope_parameters["full_attention"]
        half = _gemma4_sizes(config)["rope.dimension_count"] // 2
        rotated = int(half * rope["partial_rotary_factor"])
        factors = [1.0] * rotated + [1e30] * (half - rotated)
        yield "rope_freqs.weight", np.array(factors, dtype=np.float32)


_SIZES: Mapping[str, Callable[[Any], dict[str, Any]]] = {
    "deepseek_v2": _deepseek_sizes,
    "deepseek_v3": _deepseek_sizes,
    "dots1": _routed_sizes,
    "ernie4_5_moe": _ernie_sizes,
    "glm4_moe": _routed_sizes,
    "granitemoeshared": _granite_shared_sizes,
    "hunyuan_v1_moe": _hunyuan_sizes,
    "lfm2": _lfm2_sizes,
    "lfm2_moe": _lfm2_sizes,
    "granitemoehybrid": granite_hybrid_sizes,
    "mamba": mamba_sizes,
    "mamba2": mamba2_sizes,
    "minicpm3": _minicpm3_sizes,
    "minimax_m2": _minimax_sizes,
    "ministral3": _ministral3_sizes,
    "nemotron_h": nemotron_h_sizes,
    "qwen3_next": delta_net_sizes,
    "qwen3_5_text": delta_net_sizes,
    "qwen3_5_moe_text": delta_net_sizes,
    "gemma3n_text": _gemma3n_sizes,
    "gemma4_text": _gemma4_sizes,
    "gpt_oss": _gpt_oss_sizes,
}
_SPLITS: Mapping[str, Callable[[Any, str, Tensor], dict[str, Tensor] | None]] = {
    "deepseek_v2": _split_deepseek,
    "deepseek_v3": _split_deepseek,
    "dots1": _split_correction,
    "ernie4_5_moe": _split_correction,
    "glm4_moe": _split_correction,
    "granitemoe": split_granite,
    "granitemoeshared": split_granite,
    "granitemoehybrid": split_granite_hybrid,
    "mamba": split_mamba,
    "mamba2": split_mamba,
    "minimax_m2": _split_correction,
    "nemotron_h": split_nemotron_h,
    "lfm2": _split_lfm2,
    "lfm2_moe": _split_lfm2,
    "qwen3_next": split_delta_net,
    "qwen3_5_text": split_delta_net,
    "qwen3_5_moe_text": split_delta_net,
    "gemma3n_text": _split_gemma3n,
    "gemma4_text": _split_gemma4,
    "gpt_oss": _split_gpt_oss,
}
