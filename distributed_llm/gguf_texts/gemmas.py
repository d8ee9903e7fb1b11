"""What config.json says of the models of Gemma, out of the metadata of GGUF files.

ollama's own files have some names of their own.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from distributed_llm.common.errors import CheckpointError
from distributed_llm.gguf_texts.header import Header
from distributed_llm.gguf_texts.rotary import linear_factor

_LARGEST = {"gemma2": 46, "gemma3_text": 62}
"""Layers of the models of 27 billion, whose attention alone is scaled by the hidden size."""

_SCALED = (34, 48, 62)
"""Layers of the models of Gemma 3 whose rotary positions are scaled; not all files say so."""

_FACTOR = 8.0
_NOT_ROTATED = 1e20
"""Divisor of a frequency from which on a pair of numbers stays as it is."""

_SOFT_CAP_OF_3N = 30.0
_TABLE = "per_layer_token_embd.weight"


def of_largest(header: Header, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return by what the attention of Gemma 2 and 3 is scaled."""
    hidden, heads = header.get("embedding_length"), content["num_attention_heads"]
    largest = header.get("block_count") == _LARGEST[content["model_type"]]
    head_dim = content.get("head_dim") or hidden // heads
    return {"query_pre_attn_scalar": hidden // heads if largest else head_dim}


def of_gemma3(header: Header, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of Gemma 3."""
    found: dict[str, Any] = of_largest(header, content) | {
        "rope_theta": _first(header, "rope.freq_base", "rope.global.freq_base", default=1e6),
        "rope_local_base_freq": _local_base(header),
    }
    factor = linear_factor(header)
    if factor is None and header.get("block_count") in _SCALED:
        factor = _FACTOR
    if factor:
        found["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    return found


def of_gemma3n(header: Header, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of Gemma 3n."""
    widths = _per_layer(header, "feed_forward_length")
    sparsity = header.get("activation_sparsity_scale") or [-math.inf] * len(widths)
    return {
        **_of_inputs(header),
        "head_dim": header.get("attention.key_length") or header.get("head_dim"),
        "intermediate_size": widths,
        "activation_sparsity_pattern": [_share_below(deviations) for deviations in sparsity],
        "altup_active_idx": header.get("altup.active_idx") or 0,
        "altup_num_inputs": header.get("altup.num_inputs"),
        "laurel_rank": header.tensors["blk.0.laurel_l.weight"].shape[0],
        "final_logit_softcapping": header.get("final_logit_softcapping") or _SOFT_CAP_OF_3N,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "default",
                "rope_theta": _first(header, "rope.freq_base", default=1e6),
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": _local_base(header)},
        },
    }


def of_gemma4(header: Header, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of Gemma 4."""
    types = _layer_types(header)
    heads = dict(zip(types, _per_layer(header, "attention.head_count_kv"), strict=True))
    widths = _per_layer(header, "feed_forward_length")
    own = len(types) - (header.get("attention.shared_kv_layers") or 0)
    full = [number for number in range(own) if types[number] == "full_attention"]
    found = {
        **_of_inputs(header),
        "head_dim": header.get("attention.key_length_swa"),
        "global_head_dim": header.get("attention.key_length"),
        "num_key_value_heads": heads.get("sliding_attention", heads["full_attention"]),
        "num_global_key_value_heads": heads["full_attention"],
        "attention_k_eq_v": any(f"blk.{n}.attn_v.weight" not in header.tensors for n in full),
        "intermediate_size": widths[0],
        "use_double_wide_mlp": widths[-1] == 2 * widths[0],
        "final_logit_softcapping": header.get("final_logit_softcapping"),
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": _first(header, "rope.freq_base", default=1e6),
                "partial_rotary_factor": _rotated_share(header),
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": _local_base(header)},
        },
    }
    if experts := header.get("expert_count"):
        found |= {
            "enable_moe_block": True,
            "num_experts": experts,
            "top_k_experts": header.get("expert_used_count"),
        }
    return found


def _of_inputs(header: Header) -> dict[str, Any]:
    """Return what Gemma 3n and 4 have in common: windows, and inputs of each layer."""
    found: dict[str, Any] = {
        "layer_types": _layer_types(header),
        "sliding_window": header.get("attention.sliding_window"),
        "num_kv_shared_layers": header.get("attention.shared_kv_layers") or 0,
        "hidden_size_per_layer_input": header.get("embedding_length_per_layer_input") or 0,
    }
    if (table := header.tensors.get(_TABLE)) is not None:
        found["vocab_size_per_layer_input"] = table.shape[0]
    return found


def _first(header: Header, *names: str, default: float) -> float:
    return float(next((v for name in names if (v := header.get(name))), default))


def _local_base(header: Header) -> float:
    names = ("rope.freq_base_swa", "rope.local.freq_base", "rope.freq_base_local")
    return _first(header, *names, default=1e4)


def _layer_types(header: Header) -> list[str]:
    """Return which layers see a window.

    Raises:
        CheckpointError: the files do not say it.
    """
    pattern = header.get("attention.sliding_window_pattern")
    if not isinstance(pattern, list) or len(pattern) < header.get("block_count"):
        raise CheckpointError(
            "does not say which of its layers see a window of the text "
            f"({header.architecture}.attention.sliding_window_pattern). Use a newer file of the "
            "model."
        )
    return ["sliding_attention" if windowed else "full_attention" for windowed in pattern]


def _per_layer(header: Header, name: str) -> Sequence[int]:
    """Return a number for each layer, whether the files have several or one."""
    value = header.get(name)
    return value if isinstance(value, list) else [value] * header.get("block_count")


def _share_below(deviations: float) -> float:
    """Return the share of a normal distribution below so many standard deviations."""
    return round((1 + math.erf(deviations / math.sqrt(2))) / 2, 4)


def _rotated_share(header: Header) -> float:
    """Return which share of a head is rotated in layers that see all."""
    factors = header.numbers("rope_freqs.weight")
    if not factors:
        return 1.0
    return sum(factor < _NOT_ROTATED for factor in factors) / len(factors)
