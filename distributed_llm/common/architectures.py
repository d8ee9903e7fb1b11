"""Which architectures can be split into stages, which cannot, and why.

A model type in neither table may still work: before a worker serves a checkpoint of it, it compares
a small random model of that type, whole and split.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from distributed_llm.common.errors import UnsupportedModel
from distributed_llm.common.layer_windows import layer_sections
from distributed_llm.common.model_sizes import num_layers, rope_parameters, rope_type
from distributed_llm.common.text_config import PART_OF

VERIFIED: frozenset[str] = frozenset(
    {
        "apertus",
        "arcee",
        "bamba",
        "cohere",
        "cohere2",
        "ernie4_5",
        "exaone4",
        "falcon_h1",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm",
        "glm4",
        "glm4v_moe_text",
        "glm4v_text",
        "glm_ocr_text",
        "gpt2",
        "gpt_bigcode",
        "gpt_neox",
        "gpt_oss",
        "granite",
        "granitemoe",
        "granitemoehybrid",
        "helium",
        "hunyuan_v1_dense",
        "jamba",
        "kimi_linear",
        "lfm2",
        "lfm2_moe",
        "llama",
        "llama4_text",
        "minimax",
        "mistral",
        "mistral4",
        "mixtral",
        "nemotron",
        "nemotron_h",
        "olmo",
        "olmo2",
        "olmo_hybrid",
        "olmoe",
        "opt",
        "phi",
        "phi3",
        "qwen2",
        "qwen2_5_vl_text",
        "qwen2_moe",
        "qwen2_vl_text",
        "qwen3",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_moe",
        "qwen3_vl_moe_text",
        "qwen3_vl_text",
        "qwen3_next",
        "seed_oss",
        "smollm3",
        "stablelm",
        "starcoder2",
    }
)
"""Model types whose tokens `tests/model/test_families.py` compares with those of transformers."""

EXCEEDS_FLOAT16: frozenset[str] = frozenset({"gemma", "gemma2", "gemma3_text", "glm4"})
"""Model types whose hidden states are known to exceed 65,504, the largest number of float16."""

_ALIBI = "its attention adds a bias that grows with distance (ALiBi), which travels in the mask"
_OWN_ATTENTION = "its attention cannot be replaced, and so not be run on packed sequences"
_OWN_STATE = (
    "its layers keep a state (convolution, linear attention or state space) in a way of their own"
)
_EMBEDDING_AGAIN = "some of its layers read the embedding of the tokens, which later stages lack"
_ENCODER = "it is an encoder-decoder, whose decoder reads a second sequence"
_READS_PICTURES = "its layers read pictures or sound, and only text is served"
_SEES_PROMPT = "the tokens of its prompts see those after them"
_CHUNKED = "config.json does not tell which of its layers see chunks of the text"
_SHARED_KV = "some of its layers read the keys and values of others, which may be elsewhere"

_REASONS: Mapping[str, tuple[str, ...]] = {
    _ALIBI: ("bloom", "mpt"),
    _OWN_ATTENTION: (
        "falcon",
        "gptj",
        "gpt_neo",
        "codegen",
        "openai-gpt",
        "ctrl",
        "xlnet",
        "transfo-xl",
    ),
    _OWN_STATE: (
        "falcon_mamba",
        "mamba",
        "mamba2",
        "recurrent_gemma",
        "rwkv",
        "xlstm",
    ),
    _EMBEDDING_AGAIN: ("zamba", "zamba2"),
    _ENCODER: ("t5", "mt5", "umt5", "bart", "mbart", "pegasus", "t5gemma", "whisper"),
    _READS_PICTURES: ("mllama", "mllama_text_model"),
    _SEES_PROMPT: ("paligemma",),
    _SHARED_KV: ("gemma3n", "gemma3n_text", "gemma4_text", "cpmant"),
}
_REASON_OF: Mapping[str, str] = {
    model_type: reason for reason, model_types in _REASONS.items() for model_type in model_types
}

_SPARSE = ("index_topk", "index_n_heads", "sparse_attention_config")

_WHAT_TO_DO = "Use a model of a kind that is known to work, such as llama, qwen3 or mistral."


def check_architecture(config: Mapping[str, Any]) -> None:
    """Raise if a model of this config is known to be computed wrongly when split.

    Args:
        config: the content of a checkpoint's config.json.

    Raises:
        UnsupportedModel: with what, why and what to do.
    """
    model_type = str(config.get("model_type"))
    part_of = str(config.get(PART_OF, model_type))
    reason = (
        _REASON_OF.get(model_type) or _REASON_OF.get(part_of) or next(_reasons_in(config), None)
    )
    if reason is None and "auto_map" in config and not _transformers_has(model_type):
        reason = (
            "it asks to run code of its own (auto_map in config.json), and code from checkpoints "
            "is never run"
        )
    if reason is not None:
        raise UnsupportedModel(
            f"The model type {_shown(model_type, part_of)} is not supported: {reason}. "
            f"{_WHAT_TO_DO}"
        )


def _shown(model_type: str, part_of: str) -> str:
    """Return a model type for people, who know the whole of which the text model is a part."""
    if part_of == model_type:
        return repr(model_type)
    return f"{part_of!r}, whose text model is {model_type!r},"


def _transformers_has(model_type: str) -> bool:
    """Return whether transformers has code for this type, so that none in a checkpoint is asked."""
    if model_type in VERIFIED:
        return True
    from transformers.models.auto.auto_mappings import CONFIG_MAPPING_NAMES  # loads no torch

    return model_type in CONFIG_MAPPING_NAMES


def _reasons_in(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield reasons why a model with the values in `config` cannot be split or run."""
    if config.get("is_encoder_decoder"):
        yield _ENCODER
    if config.get("alibi") or config.get("position_embedding_type") == "alibi":
        yield _ALIBI
    if config.get("reorder_and_upcast_attn"):
        yield "reorder_and_upcast_attn makes it compute its attention by itself"
    if config.get("add_cross_attention"):
        yield _ENCODER
    if config.get("is_causal") is False or config.get("use_bidirectional_attention"):
        yield "its tokens see those after them, which are not there yet when generating"
    if config.get("attention_chunk_size") and not any(layer_sections(config, num_layers(config))):
        yield _CHUNKED
    if any(config.get(name) for name in _SPARSE):  # short texts, as in a check, would not show it
        yield "its attention picks some of the positions of a long text"
    for kind in map(rope_type, rope_parameters(config)):
        if kind in {"dynamic", "longrope", "su"}:
            yield (
                f"its rotary position encoding ({kind}) changes with the longest sequence of "
                "a batch, so that an answer would depend on who else is asking"
            )
