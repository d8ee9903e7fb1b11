"""What config.json says differently from family to family, out of the metadata of GGUF files."""

from collections.abc import Callable, Mapping
from typing import Any

from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS

from distributed_llm.gguf_texts.gemmas import of_gemma3, of_gemma3n, of_gemma4, of_largest
from distributed_llm.gguf_texts.header import Header
from distributed_llm.gguf_texts.hybrids import (
    layers_of,
    of_granite_hybrid,
    of_lfm2_moe,
    of_mamba,
    of_mamba2,
    of_nemotron_h,
    of_qwen3_next,
)
from distributed_llm.gguf_texts.rotary import rope_parameters

_Content = Mapping[str, Any]
_SOFTMAX, _SIGMOID = 1, 2
"""How experts are weighted, in the metadata."""

_GROUPS: Mapping[tuple[str, int], tuple[int, int]] = {
    ("deepseek_v2", 160): (8, 3),
    ("deepseek_v3", 256): (8, 4),
}
"""Groups of experts, and those that a token may choose from, of models that many files of do not
say it: by model type and number of experts."""

_SHARED_UP = "blk.0.ffn_up_shexp.weight"
_OWN_ROTARY = frozenset(
    {"gpt2", "gemma3_text", "gemma3n_text", "gemma4_text", "mamba", "mamba2", "nemotron_h"}
)


def model_type_of(header: Header, usual: str) -> str:
    """Return the model type in transformers of an architecture that stands for several.

    Args:
        usual: the model type of most models of that architecture.
    """
    if usual == "llama" and header.get("expert_count"):
        return "mixtral"
    if usual == "deepseek_v3":
        corrected = any(name.endswith("exp_probs_b.bias") for name in header.tensors)
        gating = header.get("expert_gating_func") or (_SIGMOID if corrected else _SOFTMAX)
        return "deepseek_v3" if gating == _SIGMOID else "deepseek_v2"
    if usual == "ministral3" and header.get("attention.temperature_scale") is None:
        return "mistral"
    if usual == "granitemoe" and _SHARED_UP in header.tensors:
        return "granitemoeshared"
    return usual


def of_family(header: Header, content: _Content) -> dict[str, Any]:
    """Return what differs from family to family.

    Args:
        header: of the files.
        content: of config.json, as far as it is the same in all families.

    Raises:
        UnsupportedModel: rotary positions are scaled in a way that is not known.
    """
    kind = content["model_type"]
    make = _MAKERS.get(kind)
    own = make(header, content) if make else {}
    if kind in _OWN_ROTARY or header.architecture in GGUF_CONFIG_ARCHS:
        return own
    heads = content.get("num_attention_heads") or header.get("attention.head_count")
    head_dim = content.get("head_dim") or header.get("embedding_length") // heads
    rotary = rope_parameters(header, own.get("qk_rope_head_dim") or head_dim)
    return own | {"rope_parameters": rotary | own.get("rope_parameters", {})}


def _of_phi3(header: Header, content: _Content) -> dict[str, Any]:
    found = {"sliding_window": header.get("attention.sliding_window")}
    if original := header.get("rope.scaling.original_context_length"):
        found["original_max_position_embeddings"] = original
    return found


def _of_granite(header: Header, content: _Content) -> dict[str, Any]:
    return {"logits_scaling": header.get("logit_scale") or 1.0}


def _of_cohere(header: Header, content: _Content) -> dict[str, Any]:
    return {"use_qk_norm": "blk.0.attn_q_norm.weight" in header.tensors}


def _of_cohere2(header: Header, content: _Content) -> dict[str, Any]:
    return {"sliding_window": header.get("attention.sliding_window")}


def _of_gpt2(header: Header, content: _Content) -> dict[str, Any]:
    return {"n_positions": header.get("context_length")}


def _of_stablelm(header: Header, content: _Content) -> dict[str, Any]:
    return {
        "use_qkv_bias": "blk.0.attn_q.bias" in header.tensors,
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in header.tensors,
    }


def _of_gpt_oss(header: Header, content: _Content) -> dict[str, Any]:
    """Its frequencies are scaled without rounding, which its files do not say."""
    width = header.get("expert_feed_forward_length") or header.get("feed_forward_length")
    scaled = (header.get("rope.scaling.factor") or 1.0) != 1.0
    return {
        "intermediate_size": width,
        "sliding_window": header.get("attention.sliding_window"),
        "rope_parameters": {"truncate": False} if scaled else {},
    }


def _of_deepseek(header: Header, content: _Content) -> dict[str, Any]:
    """Files say widths of heads as their caches are, and newer ones beside it as they are."""
    kind, experts = content["model_type"], header.get("expert_count") or 0
    keys = header.get("attention.key_length_mla") or header.get("attention.key_length")
    values = header.get("attention.value_length_mla") or header.get("attention.value_length")
    rotated = header.get("rope.dimension_count")
    groups, chosen = _GROUPS.get((kind, experts), (1, 1))
    groups = header.get("expert_group_count") or groups
    found = {
        "num_key_value_heads": header.get("attention.head_count"),
        "q_lora_rank": header.get("attention.q_lora_rank"),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": keys - rotated,
        "v_head_dim": values,
        "head_dim": rotated,
        "n_group": groups,
        "topk_group": header.get("expert_group_used_count") or min(groups, chosen),
        "norm_topk_prob": bool(header.get("expert_weights_norm")),
        "routed_scaling_factor": header.get("expert_weights_scale") or 1.0,
    }
    if kind == "deepseek_v2":
        found["topk_method"] = "group_limited_greedy" if groups > 1 else "greedy"
    if (multiplier := header.get("rope.scaling.yarn_log_multiplier")) is not None:
        scale = round(10 * multiplier, 6)
        found["rope_parameters"] = {"mscale": scale, "mscale_all_dim": scale}
    return found


def _of_mla(header: Header, content: _Content) -> dict[str, Any]:
    """Return the settings of MiniCPM 3, whose files say nothing of how it scales."""
    rotated, keys = header.get("rope.dimension_count"), header.get("attention.key_length")
    width = header.tensors["blk.0.attn_kv_b.weight"].shape[0] // header.get("attention.head_count")
    return {
        "q_lora_rank": header.get("attention.q_lora_rank"),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": keys - rotated,
        "v_head_dim": width - (keys - rotated),
        "head_dim": rotated,
        "num_key_value_heads": header.get("attention.head_count"),
    }


def _of_glm(header: Header, content: _Content) -> dict[str, Any]:
    heads = header.get("attention.head_count")
    return {
        "head_dim": header.get("attention.key_length") or header.get("embedding_length") // heads,
        "use_qk_norm": "blk.0.attn_q_norm.weight" in header.tensors,
        "routed_scaling_factor": header.get("expert_weights_scale") or 1.0,
        "norm_topk_prob": bool(header.get("expert_weights_norm")),
        "n_group": header.get("expert_group_count") or 1,
        "topk_group": header.get("expert_group_used_count") or 1,
    }


def _of_dots(header: Header, content: _Content) -> dict[str, Any]:
    return _of_glm(header, content) | {
        "layer_types": ["full_attention"] * layers_of(header),
        "sliding_window": None,
    }


def _of_granite_moe(header: Header, content: _Content) -> dict[str, Any]:
    found = _of_granite(header, content)
    if (shared := header.tensors.get(_SHARED_UP)) is not None:
        found["shared_intermediate_size"] = shared.shape[0]
    return found


def _of_exaone4(header: Header, content: _Content) -> dict[str, Any]:
    """Every fourth layer of the larger one sees all; the smaller one has no windows."""
    window = header.get("attention.sliding_window")
    number = layers_of(header)
    types = [
        "sliding_attention" if window and (n + 1) % 4 else "full_attention" for n in range(number)
    ]
    return {"sliding_window": window, "layer_types": types}


def _of_ernie(header: Header, content: _Content) -> dict[str, Any]:
    found: dict[str, Any] = {"use_bias": "blk.0.attn_q.bias" in header.tensors}
    if experts := header.get("expert_count"):
        width = header.get("expert_feed_forward_length")
        first = header.get("leading_dense_block_count") or 0
        shared = header.tensors.get(f"blk.{first}.ffn_up_shexp.weight")
        found |= {
            "moe_num_experts": experts,
            "moe_k": header.get("expert_used_count"),
            "moe_layer_start_index": first,
            "moe_layer_interval": header.get("interleave_moe_layer_step") or 1,
            "moe_num_shared_experts": shared.shape[0] // width if shared else 0,
        }
    return found


def _of_minimax(header: Header, content: _Content) -> dict[str, Any]:
    return {"intermediate_size": header.get("expert_feed_forward_length")}


def _of_ministral3(header: Header, content: _Content) -> dict[str, Any]:
    """Queries far from the beginning are larger; of the scaling, all numbers are said."""
    scale = header.get("rope.scaling.yarn_log_multiplier") or 1.0
    return {
        "rope_parameters": {
            "mscale": scale,
            "mscale_all_dim": scale,
            "beta_fast": header.get("rope.scaling.yarn_beta_fast") or 32.0,
            "beta_slow": header.get("rope.scaling.yarn_beta_slow") or 1.0,
            "llama_4_scaling_beta": header.get("attention.temperature_scale") or 0.0,
        }
    }


def _of_mistral(header: Header, content: _Content) -> dict[str, Any]:
    return {"sliding_window": header.get("attention.sliding_window")}


def _of_hunyuan_moe(header: Header, content: _Content) -> dict[str, Any]:
    return {"moe_topk": header.get("expert_used_count")}


def _of_seed(header: Header, content: _Content) -> dict[str, Any]:
    return {"attention_out_bias": "blk.0.attn_output.bias" in header.tensors}


_MAKERS: Mapping[str, Callable[[Header, _Content], dict[str, Any]]] = {
    "cohere": _of_cohere,
    "cohere2": _of_cohere2,
    "deepseek_v2": _of_deepseek,
    "deepseek_v3": _of_deepseek,
    "dots1": _of_dots,
    "ernie4_5": _of_ernie,
    "ernie4_5_moe": _of_ernie,
    "exaone4": _of_exaone4,
    "gemma2": of_largest,
    "gemma3_text": of_gemma3,
    "gemma3n_text": of_gemma3n,
    "gemma4_text": of_gemma4,
    "glm4_moe": _of_glm,
    "gpt2": _of_gpt2,
    "gpt_oss": _of_gpt_oss,
    "granite": _of_granite,
    "granitemoe": _of_granite_moe,
    "granitemoehybrid": of_granite_hybrid,
    "granitemoeshared": _of_granite_moe,
    "hunyuan_v1_moe": _of_hunyuan_moe,
    "lfm2_moe": of_lfm2_moe,
    "mamba": of_mamba,
    "mamba2": of_mamba2,
    "minicpm3": _of_mla,
    "minimax_m2": _of_minimax,
    "ministral3": _of_ministral3,
    "mistral": _of_mistral,
    "nemotron_h": of_nemotron_h,
    "phi3": _of_phi3,
    "qwen3_next": of_qwen3_next,
    "seed_oss": _of_seed,
    "stablelm": _of_stablelm,
}
"""By model type, what returns the settings that other families do not have, or have otherwise."""
