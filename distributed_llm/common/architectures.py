"""Which architectures can be split into stages, which cannot, and why.

A model type in neither table may still work: before a worker serves a checkpoint of it, it compares
a small random model of that type, whole and split.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from distributed_llm.common.errors import UnsupportedModel
from distributed_llm.common.model_sizes import rope_parameters, rope_type

VERIFIED: frozenset[str] = frozenset(
    {
        "apertus",
        "arcee",
        "axk1",
        "bamba",
        "cohere",
        "cohere2",
        "deepseek_v2",
        "deepseek_v3",
        "ernie4_5",
        "exaone4",
        "falcon_h1",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm",
        "glm4",
        "glm4_moe_lite",
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
        "minicpm3",
        "minimax",
        "mistral",
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
        "qwen2_moe",
        "qwen3",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_moe",
        "qwen3_next",
        "seed_oss",
        "smollm3",
        "stablelm",
        "starcoder2",
        "youtu",
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
_MULTIMODAL = "it wraps a language model together with one for pictures or sound"
_CHUNKED = "some of its layers see chunks of the text, which is expressed in the mask"
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
    _MULTIMODAL: ("gemma3", "gemma4", "llava", "mistral3", "mllama", "qwen2_vl", "qwen2_5_vl"),
    _CHUNKED: ("llama4", "llama4_text"),
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
    reason = _REASON_OF.get(model_type) or next(_reasons_in(config), None)
    if reason is None and "auto_map" in config and not _transformers_has(model_type):
        reason = (
            "it asks to run code of its own (auto_map in config.json), and code from checkpoints "
            "is never run"
        )
    if reason is not None:
        raise UnsupportedModel(
            f"The model type {model_type!r} is not supported: {reason}. {_WHAT_TO_DO}"
        )


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
    if "text_config" in config:
        yield _MULTIMODAL
    if config.get("alibi") or config.get("position_embedding_type") == "alibi":
        yield _ALIBI
    if config.get("reorder_and_upcast_attn"):
        yield "reorder_and_upcast_attn makes it compute its attention by itself"
    if config.get("add_cross_attention"):
        yield _ENCODER
    if config.get("is_causal") is False or config.get("use_bidirectional_attention"):
        yield "its tokens see those after them, which are not there yet when generating"
    if config.get("attention_chunk_size"):
        yield _CHUNKED
    if any(config.get(name) for name in _SPARSE):  # short texts, as in a check, would not show it
        yield "its attention picks some of the positions of a long text"
    for kind in map(rope_type, rope_parameters(config)):
        if kind in {"dynamic", "longrope", "su"}:
            yield (
                f"its rotary position encoding ({kind}) changes with the longest sequence of "
                "a batch, so that an answer would depend on who else is asking"
            )
