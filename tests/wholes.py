"""Tiny random models for text and pictures, of which only the text model is served."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    PreTrainedModel,
)

from tests.checkpoints import _COMMON, FAMILIES, random_model

_TEXT = {**_COMMON, "num_hidden_layers": 4}
_PICTURES = {
    **{"num_hidden_layers": 4, "depth": 4, "num_heads": 2, "num_attention_heads": 2},
    **{"hidden_size": 16, "embed_dim": 16, "intermediate_size": 16, "mlp_ratio": 1},
    **{"image_size": 28, "patch_size": 14, "out_hidden_size": 32, "projection_dim": 16},
    **{"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    **{"vision_output_dim": 32, "projector_input_dim": 16, "projector_output_dim": 16},
}
"""As many layers as the text model has, so that their number does not tell them apart."""
_SOUND = {
    **{"hidden_size": 16, "intermediate_size": 16, "num_blocks": 4, "num_attention_heads": 2},
    **{"ext_pw_out_channel": 16, "nemo_conv_channels": 16, "depthwise_separable_out_channel": 16},
}

_TOKENS = ("image_token_id", "image_token_index", "video_token_id", "vision_start_token_id")
_UNUSED_TOKEN = 127
_QWEN2 = {"rope_parameters": {"rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
_QWEN3 = {
    "head_dim": 16,
    "rope_parameters": {"rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True},
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_GLM = {
    "num_attention_heads": 2,
    "rope_parameters": {
        **{"rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
    },
}
_GLM_EXPERTS = {
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1},
}
_MISTRAL4 = {
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    **{"kv_lora_rank": 8, "q_lora_rank": 8, "num_key_value_heads": 4},
    **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
    "rope_parameters": {
        **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "mscale": 1.0},
        **{"original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.5},
        **{"beta_fast": 32.0, "beta_slow": 1.0, "mscale_all_dim": 1.0},
    },
}

WHOLES: Mapping[str, tuple[str, Mapping[str, Any], bool]] = {
    "aya_vision": ("cohere2", FAMILIES["cohere2"], True),
    "gemma3": ("gemma3_text", FAMILIES["gemma3_text"], True),
    "gemma4": ("gemma4_text", {**FAMILIES["gemma4_text"], "pad_token_id": 0}, True),
    "glm4v": ("glm4v_text", _GLM, False),
    "glm4v_moe": ("glm4v_moe_text", {**_GLM, **_GLM_EXPERTS}, False),
    "glm_ocr": ("glm_ocr_text", _GLM, False),
    "idefics3": ("llama", {}, False),
    "internvl": ("qwen2", {}, True),
    "llama4": ("llama4_text", FAMILIES["llama4_text"], False),
    "llava": ("llama", {}, False),
    "minimax_m3_vl": ("minimax_m3_vl_text", FAMILIES["minimax_m3_vl_text"], False),
    "mistral3": ("mistral", {"head_dim": 16}, False),
    "mistral3 of mistral4": ("mistral4", _MISTRAL4, False),
    "qwen2_5_vl": ("qwen2_5_vl_text", _QWEN2, False),
    "qwen2_vl": ("qwen2_vl_text", _QWEN2, True),
    "qwen3_5": ("qwen3_5_text", FAMILIES["qwen3_5_text"], True),
    "qwen3_5_moe": ("qwen3_5_moe_text", FAMILIES["qwen3_5_moe_text"], False),
    "qwen4_exp": ("qwen4_exp_text", FAMILIES["qwen4_exp_text"], False),
    "qwen3_vl": ("qwen3_vl_text", _QWEN3, True),
    "qwen3_vl_moe": ("qwen3_vl_moe_text", {**_QWEN3, **_EXPERTS}, False),
}
"""By model type, perhaps with " of " another: the text model's, what its configuration has beyond
`_TEXT`, and whether the head is the embedding."""


def build_whole(name: str) -> PreTrainedModel:
    """Return a small random float32 model for text and pictures, one of `WHOLES`."""
    text_type, settings, tie = WHOLES[name]
    kind = CONFIG_MAPPING[name.partition(" ")[0]]
    usual: Any = kind().vision_config or CONFIG_MAPPING[f"{name}_vision"]()
    pictures = usual.to_dict()
    values = {
        "text_config": {**_repeated({**_TEXT, **settings}), "model_type": text_type},
        "vision_config": pictures | {n: v for n, v in _PICTURES.items() if n in pictures},
        "tie_word_embeddings": tie,
        **dict.fromkeys(_TOKENS, _UNUSED_TOKEN),
    }
    config = kind(**values)
    return random_model(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[kind], config)


def build_phi4() -> PreTrainedModel:
    """Return a small Phi-4-multimodal, whose configuration has the values of its text model."""
    kind = CONFIG_MAPPING["phi4_multimodal"]
    parts: dict[str, Any] = {}
    for part, small in (
        ("vision_config", {**_PICTURES, "crop_size": 28}),
        ("audio_config", _SOUND),
    ):
        values = getattr(kind(), part).to_dict()
        parts[part] = values | {name: value for name, value in small.items() if name in values}
    config = kind(**_TEXT | {"pad_token_id": 0, "eos_token_id": 2}, **parts)
    return random_model(MODEL_FOR_CAUSAL_LM_MAPPING[kind], config)


def _repeated(values: Mapping[str, Any]) -> dict[str, Any]:
    layers = values["num_hidden_layers"]
    types = values.get("layer_types")
    return {**values, "layer_types": (types * layers)[:layers]} if types else dict(values)


def rename_tensors(folder: Path, renamed: Callable[[str], str]) -> None:
    """Give the tensors of a checkpoint of one file other names."""
    path = folder / "model.safetensors"
    tensors = {renamed(name): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Replace the config.json of a checkpoint by what `edit` makes of it."""
    path = folder / "config.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
