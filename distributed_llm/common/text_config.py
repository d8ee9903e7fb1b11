"""Takes the configuration of the text model out of that of a model for pictures or sound as well.

The text model is all that is served. Its configuration is complete without the rest: what
config.json says about the whole model (dtype, quantization, tied embeddings, special tokens) counts
for it as in transformers, and what it leaves to transformers' defaults is written out.
"""

from collections.abc import Mapping
from typing import Any

from distributed_llm.common.config_defaults import ConfigDefaults, config_defaults
from distributed_llm.common.encoder_decoders import STACK_TYPES, is_encoder_decoder
from distributed_llm.common.errors import CheckpointError, UnsupportedModel
from distributed_llm.common.ngrams import NGRAM_TYPES
from distributed_llm.common.other_formats import QUANTIZATION_NAMES

Config = Mapping[str, Any]

PART_OF = "part_of"
"""In the configuration of a text model, the model type of which it is a part."""

_TEXT = "text_config"
_OTHER_PARTS = ("vision_config", "audio_config")
_DTYPE = ("dtype", "torch_dtype")
_ENDS = "eos_token_id"
_OF_WHOLE = (
    *("architectures", "transformers_version", "bos_token_id", _ENDS),
    *(*_DTYPE, *QUANTIZATION_NAMES),
)
"""Values for the whole model, which go before those of the text model."""

TIED = "tie_word_embeddings"

_RENAMED: Mapping[str, str] = {"kimi_k2": "deepseek_v3"}
"""Names in files on the hub for model types that transformers has under another name."""

_SAME_AS: Mapping[str, str] = {**_RENAMED, "phi4_multimodal": "phi3"}
"""Model types whose text model is one of another type."""


def text_config(config: Config) -> dict[str, Any]:
    """Return the configuration of the text model that `config` describes, with `PART_OF`.

    A configuration of a text model alone is returned as it is, but for the name of its type.

    Args:
        config: the content of a config.json with `model_type`.

    Raises:
        CheckpointError: what should describe a part does not.
        UnsupportedModel: of which type the text model is, neither config.json nor transformers say.
    """
    whole = str(config["model_type"])
    if is_encoder_decoder(config):
        return _of_both_stacks(config)
    for part in (_TEXT, *_OTHER_PARTS):
        if not isinstance(config.get(part), Mapping | None):
            raise CheckpointError(
                f"config.json has {part} = {config[part]!r:.60}; it must be an object, which "
                "describes a part of the model. Copy that of the original model."
            )
    told = config.get(_TEXT)
    if told is None and not any(isinstance(config.get(part), Mapping) for part in _OTHER_PARTS):
        return dict(config) | {"model_type": _RENAMED.get(whole, whole)}
    defaults = config_defaults(whole)
    text_type = _text_type(told, defaults)
    if told is None:  # all in one, as in files of Qwen2-VL
        if not text_type:
            return dict(config)
        told = {name: value for name, value in config.items() if name not in _OTHER_PARTS}
    elif not text_type:
        raise UnsupportedModel(
            f"The model type {whole!r} is not supported: it has other parts beside its language "
            f"model, of which config.json names no model_type in {_TEXT}. Use a model of a kind "
            "that transformers knows."
        )
    said = {**defaults.text_values, **told}
    text = _completed(said, config_defaults(text_type)) | {"model_type": text_type, PART_OF: whole}
    if any(config.get(name) for name in _DTYPE):
        text = {name: value for name, value in text.items() if name not in _DTYPE}
    own_ends = text_type in NGRAM_TYPES and told.get(_ENDS) is not None  # part of its n-grams
    text |= {
        name: config[name]
        for name in _OF_WHOLE
        if config.get(name) is not None and not (own_ends and name == _ENDS)
    }
    tied = config.get(TIED, defaults.values.get(TIED))
    return text | {TIED: bool(tied if TIED in config else tied or told.get(TIED))}


def _of_both_stacks(config: Config) -> dict[str, Any]:
    """Return the configuration of an encoder-decoder, with what it leaves to defaults."""
    parts = {}
    for name, usual in STACK_TYPES.get(str(config["model_type"]), {}).items():
        part = config.get(name)
        if not isinstance(part, Mapping):
            continue
        if isinstance(text := part.get(_TEXT), Mapping):
            parts[name] = {**part, _TEXT: _completed(text, config_defaults(usual))}
        else:
            parts[name] = _completed(part, config_defaults(str(part.get("model_type", usual))))
    return _completed(config, config_defaults(str(config["model_type"]))) | parts


def _text_type(told: Config | None, whole: ConfigDefaults) -> str:
    """Return the model type of a text model; empty if it is unknown."""
    named = (told or {}).get("model_type")
    if not isinstance(named, str) or whole.text_is_fixed:
        named = whole.text_type or (whole.model_type if whole.model_type in _SAME_AS else "")
    return _SAME_AS.get(named, named)


def _completed(told: Config, defaults: ConfigDefaults) -> dict[str, Any]:
    """Return values with those that transformers takes for what they leave out."""
    own_names = {defaults.aliases.get(name, name) for name in told}
    return {n: v for n, v in defaults.values.items() if n not in own_names} | dict(told)
