"""Types of layers are those that transformers gives a model whose config.json lists none."""

from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from distributed_llm.common.architectures import VERIFIED
from distributed_llm.common.layer_types import FULL, SLIDING, layer_types
from distributed_llm.common.layer_windows import layer_windows
from distributed_llm.common.model_sizes import layer_kv_bytes

ALWAYS_LISTED = {"gpt_neo", "nemotron_h", "zamba2"}
"""Types of which no file leaves out the list, under a name of their own or today's."""
WINDOWED = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 5}
TOLD: dict[str, tuple[str, dict[str, Any]]] = {
    "afmoe": ("afmoe", {"global_attn_every_n_layers": 3}),
    "cohere2": ("cohere2", {"sliding_window_pattern": 3}),
    "cohere2_moe": (
        "cohere2_moe",
        {
            "first_k_dense_replace": 4,
            "prefix_dense_sliding_window_pattern": 2,
            "sliding_window_pattern": 3,
        },
    ),
    "gemma2": ("gemma2", {"sliding_window_pattern": 3}),
    "gemma3": ("gemma3_text", {"sliding_window_pattern": 3}),
    "exaone4": ("exaone4", {"sliding_window_pattern": 5}),
    "llama4": ("llama4_text", {"no_rope_layer_interval": 3}),
    "llama4-list": ("llama4_text", {"no_rope_layers": [0, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 1, 0]}),
    "modernbert": ("modernbert-decoder", {"global_attn_every_n_layers": 4}),
    "qwen2": ("qwen2", WINDOWED),
    "qwen2_vl": ("qwen2_vl_text", WINDOWED),
    "qwen3": ("qwen3", WINDOWED),
}
MIMO = {
    "model_type": "mimo_v2_flash",
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "v_head_dim": 8,
}


def found(model_type: str, num_layers: int, **told: Any) -> tuple[list[str], list[str]]:
    """Return the types that transformers gives the layers, and those read off the same file."""
    kind: Any = CONFIG_MAPPING[model_type]
    made = kind(num_hidden_layers=num_layers, **told)
    config = {**made.to_dict(), **told, "model_type": model_type}
    for name in ("layer_types", "layers_block_type"):
        config.pop(name, None)
    types = getattr(made, "layer_types", None)
    ours = list(layer_types(config, num_layers))
    return ours if types is None else types, ours


@pytest.mark.parametrize("num_layers", [3, 13])
def test_defaults_are_those_of_transformers(num_layers: int) -> None:
    pairs = {name: found(name, num_layers) for name in sorted(VERIFIED - ALWAYS_LISTED)}
    assert {name: pair for name, pair in pairs.items() if pair[0] != pair[1]} == {}


@pytest.mark.parametrize("name", TOLD)
def test_numbers_in_the_file_count_as_in_transformers(name: str) -> None:
    model_type, told = TOLD[name]
    wanted, ours = found(model_type, 13, **told)
    assert ours == wanted
    assert len(set(ours)) == 2


@pytest.mark.parametrize("model_type", ["mimo_v2_flash", "gemma3n_text", "gemma4_text", "llama"])
def test_a_longer_list_is_cut_and_a_shorter_one_counts_as_none(model_type: str) -> None:
    kinds = [FULL, SLIDING, FULL, SLIDING, SLIDING]
    config = {"model_type": model_type}
    last = FULL if model_type == "gemma4_text" else SLIDING
    assert layer_types({**config, "layer_types": kinds}, 4) == (*kinds[:3], last)
    assert layer_types({**config, "layer_types": kinds}, 6) == layer_types(config, 6)


def test_sizes_are_of_layers_whatever_the_length_of_the_list() -> None:
    kinds = [SLIDING, FULL, SLIDING, FULL]
    assert layer_kv_bytes({**MIMO, "layer_types": kinds}, "bfloat16") == (160, 80, 160)
    assert layer_kv_bytes({**MIMO, "layer_types": kinds[:2]}, "bfloat16") == (80, 160, 160)
    assert layer_kv_bytes(MIMO, "bfloat16") == (80, 160, 160)


def test_windows_of_mimo_are_those_of_transformers() -> None:
    told: dict[str, Any] = {"sliding_window": 128, "sliding_window_size": 128}
    kind: Any = CONFIG_MAPPING["mimo_v2_flash"]
    made = kind(num_hidden_layers=3, **told)
    assert layer_windows({**MIMO, **told}, 3) == (0, made.sliding_window, made.sliding_window)
    assert layer_windows({**MIMO, "sliding_window": 128}, 3) == (0, 128, 128)


def test_every_layer_of_qwen3_moe_has_the_window() -> None:
    config = {"model_type": "qwen3_moe", **WINDOWED}
    assert layer_windows(config, 7) == (8,) * 7
    assert layer_windows({**config, "use_sliding_window": False}, 7) == (0,) * 7
