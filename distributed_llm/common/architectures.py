"""Which architectures can be split into stages, which cannot, and why.

A model type in neither table may still work if transformers has it: before a worker serves a
checkpoint of it, it compares a small random model of that type, whole and split.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from distributed_llm.common.config_defaults import generates_text, has_type
from distributed_llm.common.encoder_decoders import is_encoder_decoder
from distributed_llm.common.errors import CheckpointError, UnsupportedModel
from distributed_llm.common.indexers import INDEXED
from distributed_llm.common.key_blocks import CHOOSES_BLOCKS
from distributed_llm.common.layer_windows import layer_sections
from distributed_llm.common.model_sizes import num_layers, positive
from distributed_llm.common.ngrams import ngram_layers
from distributed_llm.common.text_config import PART_OF

VERIFIED: frozenset[str] = frozenset(
    {
        "afmoe",
        "apertus",
        "arcee",
        "aria_text",
        "axk1",
        "axk2",
        "bailing_hybrid",
        "bamba",
        "beam",
        "bert",
        "bert-generation",
        "biogpt",
        "bitnet",
        "bloom",
        "codegen",
        "cohere",
        "cohere2",
        "cohere2_moe",
        "cohere_compass_text",
        "ctrl",
        "cwm",
        "dbrx",
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "diffllama",
        "dots1",
        "electra",
        "ernie",
        "ernie4_5",
        "ernie4_5_moe",
        "exaone4",
        "exaone_moe",
        "falcon",
        "falcon_h1",
        "falcon_mamba",
        "flex_olmo",
        "flint",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gemma3n_text",
        "gemma4_text",
        "glm",
        "glm4",
        "glm4_moe",
        "glm4_moe_lite",
        "gpt-sw3",
        "glm4v_moe_text",
        "glm4v_text",
        "glm_ocr_text",
        "glm_moe_dsa",
        "gpt2",
        "gpt_bigcode",
        "gpt_neo",
        "gpt_neox",
        "gpt_neox_japanese",
        "gpt_oss",
        "gptj",
        "granite",
        "granite_swa",
        "granitemoe",
        "granitemoe_swa",
        "granitemoehybrid",
        "granitemoeshared",
        "helium",
        "hunyuan_v1_dense",
        "hunyuan_v1_moe",
        "hy_v3",
        "hy_v4",
        "hyperclovax",
        "internlm3",
        "iquestcoder",
        "jais2",
        "jamba",
        "jetmoe",
        "kimi_linear",
        "kolibri1",
        "laguna",
        "lfm2",
        "lfm2_moe",
        "lfm3",
        "llama",
        "megatron-bert",
        "mellum",
        "mimo_v2_flash",
        "minicpm3",
        "llama4_text",
        "longcat_flash",
        "mamba",
        "mamba2",
        "minimax",
        "minimax_m2",
        "minimax_m3_vl_text",
        "ministral",
        "ministral3",
        "mistral",
        "mistral4",
        "mixtral",
        "modernbert-decoder",
        "mpt",
        "nanochat",
        "nemotron",
        "nemotron_h",
        "olmo",
        "olmo2",
        "olmo3",
        "olmo_hybrid",
        "olmoe",
        "openai-gpt",
        "opt",
        "persimmon",
        "phi",
        "phi3",
        "phimoe",
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
        "qwen4_exp_text",
        "recurrent_gemma",
        "rembert",
        "rwkv",
        "seed_oss",
        "smollm3",
        "solar_open",
        "stablelm",
        "starcoder2",
        "vaultgemma",
        "xglm",
        "xlstm",
        "youtu",
        "zamba",
        "zamba2",
        "zaya",
    }
)
"""Model types whose tokens `tests/model/test_families.py` compares with those of transformers."""

EXCEEDS_FLOAT16: frozenset[str] = frozenset(
    {
        *("gemma", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "glm4"),
        *("mt5", "switch_transformers", "t5", "t5gemma", "t5gemma2", "umt5"),
    }
)
"""Model types whose hidden states are known to exceed 65,504, the largest number of float16."""

_ALIBI = "its attention adds a bias that grows with distance (ALiBi), which travels in the mask"
_OWN_ATTENTION = (
    "its attention is computed by code of its own, which knows nothing of packed sequences"
)
_ENCODER = "it is an encoder-decoder of another kind than those that are served, T5 and BART say"
_ENCODER_IN_BLOCKS = "its encoder attends in blocks or windows of the text"
_TWO_VOCABULARIES = "its encoder and its decoder have vocabularies of different sizes"
_OWN_PROMPTS = "its attention sees prompts of its own before the text (use_prompt in config.json)"
_ANY_STACKS = "its encoder and its decoder are models of any types"
_SEVERAL_STREAMS = "its decoder computes several streams, one for each of the next tokens"
_EXPERTS_ARE_FULL = (
    "its experts take so many tokens of a step and no more, so that what others ask at the same "
    "time would change an answer"
)
_POSITION_BIAS = "its attention adds a bias of its own to the scores"
_OWN_MASK = "its attention makes a mask of its own from what it sees"
_CHOOSES = (
    "its attention chooses some of the positions of a long text, and not as DeepSeek V3.2 does"
)
_LOOPS = "its layers run several times for each token"
_BYTES = "it reads bytes, and a model of its own decides where one piece of text ends"
_POSITIONS = (
    "it numbers positions from its padding token on, and transformers does that in a forward pass "
    "but not when it generates"
)
_UNMASKED = "its tokens see those after them, which are not there yet when generating"
_ENCODES = f"without is_decoder = true in config.json, {_UNMASKED}"
_WINDOW_IN_MASK = "its sliding window is expressed in the mask"
_READS_PICTURES = "its layers read pictures or sound, and only text is served"
_WRITES_SOUND = "its tokens are sound, and only text is served"
_SEES_PROMPT = "the tokens of its prompts see those after them"
_NO_CONVOLUTION = (
    "its convolution of n-grams is of one token (ple_conv_kernel_size), with which transformers "
    "does not generate"
)
_CHUNKED = "config.json does not tell which of its layers see chunks of the text (layer_types)"

_REASONS: Mapping[str, tuple[str, ...]] = {
    _OWN_ATTENTION: (
        "xlnet",
        "big_bird",
        "reformer",
        "roformer",
        "xlm",
    ),
    _ENCODER_IN_BLOCKS: ("bigbird_pegasus", "led", "longt5", "pegasus_x"),
    _TWO_VOCABULARIES: ("fsmt",),
    _SEVERAL_STREAMS: ("prophetnet", "xlm-prophetnet"),
    _ANY_STACKS: ("encoder-decoder",),
    _EXPERTS_ARE_FULL: ("nllb-moe",),
    _WRITES_SOUND: ("musicgen", "musicgen_melody"),
    _READS_PICTURES: (
        *("mllama", "mllama_text_model", "moshi", "git"),
        *("seamless_m4t", "seamless_m4t_v2", "trocr", "whisper"),
    ),
    _SEES_PROMPT: ("paligemma",),
    _POSITION_BIAS: ("cpmant", "inkling_text", "inkling2_text"),
    _OWN_MASK: ("doge",),
    _LOOPS: ("hrm_text",),
    _BYTES: ("blt",),
    _POSITIONS: (
        "camembert",
        "data2vec-text",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    ),
}
_REASON_OF: Mapping[str, str] = {
    model_type: reason for reason, model_types in _REASONS.items() for model_type in model_types
}

_MADE_TO_ENCODE = frozenset(
    {"bert", "bert-generation", "electra", "ernie", "megatron-bert", "rembert", "roc_bert"}
)
"""Model types that are decoders only if their config.json says so."""

_SPARSE = ("index_topk", "index_n_heads", "sparse_attention_config")

_WHAT_TO_DO = "Use a model of a kind that is known to work, such as llama, qwen3 or mistral."


def check_architecture(config: Mapping[str, Any]) -> None:
    """Raise if a model of this config is known to be computed wrongly when split, or unknown.

    Args:
        config: the content of a checkpoint's config.json.

    Raises:
        UnsupportedModel: with what, why and what to do.
        CheckpointError: it says something that is not known.
    """
    reason = why_refused(config)
    if reason is not None:
        raise unsupported(config, reason)
    if has_tests(config):
        return
    model_type = str(config.get("model_type"))
    if not has_type(model_type):
        raise unknown_type(model_type)
    if not generates_text(model_type):
        raise generates_nothing(model_type)


def has_tests(config: Mapping[str, Any]) -> bool:
    """Return whether tests compare models of this type, split, with transformers."""
    return config.get("model_type") in VERIFIED or is_encoder_decoder(config)


def unsupported(config: Mapping[str, Any], reason: str) -> UnsupportedModel:
    """Return the error for a model of this config.

    Args:
        config: the content of a checkpoint's config.json.
        reason: as it follows "is not supported: ".
    """
    model_type = repr(str(config.get("model_type")))
    if PART_OF in config:  # which people know
        model_type = f"{str(config[PART_OF])!r}, whose text model is {model_type},"
    return UnsupportedModel(
        f"The model type {model_type} is not supported: {reason}. {_WHAT_TO_DO}"
    )


def unknown_type(model_type: str) -> UnsupportedModel:
    """Return the error for a model type that the installed transformers does not have."""
    return UnsupportedModel(
        f"The installed transformers does not know the model type {model_type!r}. Upgrade it "
        "(pip install -U transformers) on every machine; if that does not help, use another "
        "model: code that comes with checkpoints is never run."
    )


def generates_nothing(model_type: str) -> UnsupportedModel:
    """Return the error for a model type of which transformers has no class that generates text."""
    return UnsupportedModel(
        f"The model type {model_type!r} is no language model that is known. Use one that generates "
        "text, such as llama, qwen3 or mistral."
    )


def why_refused(config: Mapping[str, Any]) -> str | None:
    """Return why a model of this config is known to be computed wrongly when split, if it is."""
    model_type = str(config.get("model_type"))
    reasons = (_REASON_OF.get(str(config.get(name))) for name in ("model_type", PART_OF))
    reason = next(filter(None, reasons), None) or next(_reasons_in(config), None)
    known = model_type in VERIFIED or has_type(model_type)
    if reason is None and "auto_map" in config and not known:
        return (
            "it asks to run code of its own (auto_map in config.json), and code from checkpoints "
            "is never run"
        )
    return reason


def _reasons_in(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield reasons why a model with the values in `config` cannot be split or run."""
    if config.get("is_encoder_decoder") and not is_encoder_decoder(config):
        yield _ENCODER
    if config.get("is_encoder_decoder") is False and is_encoder_decoder(config):
        yield "config.json says that it is no encoder-decoder, and others of its type are"
    if config.get("model_type") == "mvp" and _flag(config, "use_prompt"):
        yield _OWN_PROMPTS
    if _flag(config, "alibi") and config.get("model_type") != "falcon":
        yield _ALIBI
    if config.get("position_embedding_type") == "alibi":
        yield _ALIBI
    if _flag(config, "reorder_and_upcast_attn"):
        yield "reorder_and_upcast_attn makes it compute its attention by itself"
    if _flag(config, "add_cross_attention"):
        yield _ENCODER
    if config.get("is_causal") is False or _sees_both_ways(config):
        yield _UNMASKED
    if config.get("model_type") in _MADE_TO_ENCODE and not _flag(config, "is_decoder"):
        yield _ENCODES
    if _has_window_in_mask(config):
        yield _WINDOW_IN_MASK
    if config.get("attention_chunk_size") is not None:
        positive(config, "attention_chunk_size")
        if not any(layer_sections(config, num_layers(config))):
            yield _CHUNKED
    if ngram_layers(config) and config.get("ple_conv_kernel_size") == 1:
        yield _NO_CONVOLUTION
    # Short texts, as in a check, would not show it.
    if config.get("model_type") not in INDEXED | CHOOSES_BLOCKS and any(map(config.get, _SPARSE)):
        yield _CHOOSES


def _flag(config: Mapping[str, Any], name: str) -> bool:
    """Return a flag that config.json need not have.

    Raises:
        CheckpointError: it is neither true nor false.
    """
    told = config.get(name)
    if told is None or isinstance(told, bool):
        return bool(told)
    raise CheckpointError(
        f"config.json has {name} = {told!r}; it must be true or false. Copy that of the original "
        "model."
    )


def _sees_both_ways(config: Mapping[str, Any]) -> bool:
    """Return whether tokens of a text see those after them.

    Raises:
        CheckpointError: what config.json says about that is not known.
    """
    told = config.get("use_bidirectional_attention")
    if told is not None and not (isinstance(told, bool) or told in ("vision", "all")):
        raise CheckpointError(
            f"config.json has use_bidirectional_attention = {told!r}; it must be true, false, "
            "'vision' or 'all'. Copy that of the original model."
        )
    return told is True or told == "all"


def _has_window_in_mask(config: Mapping[str, Any]) -> bool:
    """Return whether attention is told only by the mask that it has a window."""
    window, length = config.get("sliding_window"), config.get("max_position_embeddings")
    match config.get("model_type"):
        case "qwen2_moe":
            return _flag(config, "use_sliding_window")
        case "phimoe":  # published with one that is as long as the texts may be
            return isinstance(window, int) and isinstance(length, int) and 0 < window < length
    return False
