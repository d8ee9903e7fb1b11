"""What layers keep, as config.json tells it in the forms that files in the wild have."""

from typing import Any

import pytest
from transformers import CONFIG_MAPPING
from transformers.cache_utils import get_layer_types_and_kwargs

from distributed_llm.common.errors import CheckpointError
from distributed_llm.common.layer_states import keeps_kv, state_bytes

_STATE_ALONE = {"linear_attention", "conv"}
_NO_KV = {*_STATE_ALONE, "dummy"}
_HYBRID = {"hybrid", "hybrid_sliding"}

FILES: dict[str, dict[str, Any]] = {
    "qwen3_next": {"num_hidden_layers": 12, "full_attention_interval": 3},
    "qwen3_5_text": {"num_hidden_layers": 9},
    "qwen4_exp_text": {
        "num_hidden_layers": 5,
        "layer_types": [*["linear_attention", "full_attention"] * 2, "linear_attention"],
        "ple_layer_ids": [3],
        "eos_token_id": 1,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 256,
        "indexer_budget": 64,
        "indexer_compress_ratio": 16,
    },
    "olmo_hybrid": {"num_hidden_layers": 8},
    "jamba": {"num_hidden_layers": 16, "attn_layer_period": 4, "attn_layer_offset": 2},
    "bamba": {"num_hidden_layers": 6, "attn_layer_indices": [1, 4]},
    "granitemoehybrid": {"num_hidden_layers": 3, "layer_types": ["mamba", "attention", "mamba"]},
    "falcon_h1": {"num_hidden_layers": 3},
    "nemotron_h": {"hybrid_override_pattern": "M-M*EM", "num_hidden_layers": 6},
    "lfm2": {"num_hidden_layers": 5, "full_attn_idxs": [2, 4]},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "conv", "full_attention"]},
    "lfm3": {"num_hidden_layers": 9},
    "minimax": {"num_hidden_layers": 5},
    "kimi_linear": {
        "num_hidden_layers": 4,
        "linear_attn_config": {
            "full_attn_layers": [4],
            "kda_layers": [1, 2, 3],
            "head_dim": 64,
            "num_heads": 8,
            "short_conv_kernel_size": 4,
        },
    },
}


@pytest.mark.parametrize("model_type", FILES)
def test_layers_keep_what_transformers_caches(model_type: str) -> None:
    made = CONFIG_MAPPING[model_type](**FILES[model_type])
    types, _ = get_layer_types_and_kwargs(made)
    config = {**made.to_dict(), **FILES[model_type], "model_type": model_type}
    for name in {"layer_types", "layers_block_type"} - FILES[model_type].keys():
        config.pop(name, None)  # files of old have other names for it, or none
    assert keeps_kv(config) == tuple(kind not in _NO_KV for kind in types)
    stateful = tuple(nbytes > 0 for nbytes in state_bytes(config, "bfloat16"))
    assert stateful == tuple(kind in _STATE_ALONE | _HYBRID for kind in types)


def test_a_model_without_states_keeps_keys_and_values_alone() -> None:
    config = {"model_type": "llama", "num_hidden_layers": 3}
    assert keeps_kv(config) == (True,) * 3
    assert state_bytes(config, "float32") == (0,) * 3


def test_windows_are_kept_in_the_dtype_of_the_model_and_recurrences_in_float32() -> None:
    config = {
        "model_type": "qwen3_5_text",
        "num_hidden_layers": 4,
        "hidden_size": 4096,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
    }
    window, recurrence = (2 * 16 + 32) * 128 * 4, 32 * 128 * 128
    narrow, wide = window * 2 + recurrence * 4, window * 4 + recurrence * 4
    assert state_bytes(config, "bfloat16") == (narrow, narrow, narrow, 0)
    assert state_bytes(config, "float32") == (wide, wide, wide, 0)


@pytest.mark.parametrize(
    ("model_type", "name", "value"),
    [
        ("qwen3_5_text", "linear_conv_kernel_dim", "four"),
        ("qwen3_5_text", "linear_key_head_dim", [8]),
        ("jamba", "attn_layer_period", 2.5),
        ("bamba", "attn_layer_indices", 2),
        ("lfm2", "full_attn_idxs", "all"),
        ("falcon_h1", "mamba_d_ssm", -1),
        ("mamba", "conv_kernel", "4"),
    ],
)
def test_values_of_the_wrong_kind_are_named(model_type: str, name: str, value: object) -> None:
    config = CONFIG_MAPPING[model_type]().to_dict()
    for listed in ("layer_types", "layers_block_type"):
        config.pop(listed, None)
    with pytest.raises(CheckpointError, match=f"{name} = "):
        state_bytes({**config, name: value}, "bfloat16")
