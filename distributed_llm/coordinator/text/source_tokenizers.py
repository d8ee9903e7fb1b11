"""Tokenizers of encoder-decoders: their class in transformers does what no file of theirs says.

Which languages there are, where the token of the source's language stands, that there are two
vocabularies: each class knows it of its models. `AutoTokenizer` would find the same class, but
loads torch to do so, which takes seconds.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distributed_llm.common.encoder_decoders import is_encoder_decoder
from distributed_llm.common.errors import CheckpointError
from distributed_llm.common.model_files import read_json
from distributed_llm.common.other_formats import CONFIG_NAME

_MADE_FOR_ALL = "tokenizer.json"

_GENERIC = "PreTrainedTokenizerFast"
"""Whose files say all."""

_OF_BYTES = "ByT5Tokenizer"

_OF_TYPE: Mapping[str, str] = {
    "bart": "BartTokenizer",
    "blenderbot": "BlenderbotTokenizer",
    "blenderbot-small": "BlenderbotSmallTokenizer",
    "m2m_100": "M2M100Tokenizer",
    "marian": "MarianTokenizer",
    "mbart": "MBartTokenizer",
    "mt5": "T5Tokenizer",
    "mvp": "MvpTokenizer",
    "pegasus": "PegasusTokenizer",
    "plbart": "PLBartTokenizer",
    "switch_transformers": "T5Tokenizer",
    "t5": "T5Tokenizer",
    "t5gemma": "GemmaTokenizer",
    "t5gemma2": "GemmaTokenizer",
    "umt5": _GENERIC,
}
"""Classes in transformers, by the model type; all types are here."""

_NAMED = frozenset(
    {
        *_OF_TYPE.values(),
        *("AlbertTokenizer", "BarthezTokenizer", "BertTokenizer", _OF_BYTES),
        *("GPT2Tokenizer", "MBart50Tokenizer", "NllbTokenizer", "RobertaTokenizer"),
        *("XLMRobertaTokenizer",),
    }
)
"""Classes that tokenizer_config.json of such models may name besides."""


def source_config(folder: Path) -> dict[str, Any] | None:
    """Return config.json of an encoder-decoder; None if `folder` is not that of one.

    Raises:
        CheckpointError: config.json cannot be read.
    """
    path = folder / CONFIG_NAME
    config = read_json(path) if path.exists() else {}
    return config if is_encoder_decoder(config) else None


def needs_no_files(folder: Path) -> bool:
    """Return whether the tokenizer is one of an encoder-decoder whose tokens are bytes."""
    config = source_config(folder)
    return config is not None and class_name(config, _tokenizer_config(folder)) == _OF_BYTES


def class_name(config: Mapping[str, Any], tokenizer_config: Mapping[str, Any]) -> str:
    """Return the class in transformers of an encoder-decoder's tokenizer.

    As in transformers, what the files name goes before what is usual for the model type, unless
    that is the generic one.
    """
    usual = _OF_TYPE[config["model_type"]]
    named = tokenizer_config.get("tokenizer_class") or config.get("tokenizer_class")
    if not isinstance(named, str) or usual == _GENERIC:
        return usual
    name = named.removesuffix("Fast")
    return name if name in _NAMED else _GENERIC


def read_source_tokenizer(config: Mapping[str, Any], folder: Path) -> Any:
    """Return the tokenizer of an encoder-decoder, as transformers has it.

    Args:
        config: content of config.json.
        folder: with its files.

    Raises:
        CheckpointError: its files are not all there.
        Exception: whatever a bad file causes in transformers.
    """
    import transformers

    name = class_name(config, _tokenizer_config(folder))
    kind = getattr(transformers, name)
    if missing := _missing_files(folder, kind):
        raise CheckpointError(
            f"The tokenizer in {folder} is a {name}, for which {' and '.join(missing)} must be "
            "there. Download the model again."
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Recommended: pip install sacremoses")  # never used
        return kind.from_pretrained(folder, local_files_only=True)


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.exists() else {}


def _missing_files(folder: Path, kind: Any) -> list[str]:
    """Return which files are missing, without which a class makes an empty tokenizer."""
    from transformers import PreTrainedTokenizerFast

    names = dict(kind.vocab_files_names)
    names.pop("target_vocab_file", None)  # of models with two vocabularies
    whole = names.pop("tokenizer_file", _MADE_FOR_ALL)
    if issubclass(kind, PreTrainedTokenizerFast) and (folder / whole).exists():
        return []
    parts = [name for key, name in names.items() if "config" not in key]
    if not parts and issubclass(kind, PreTrainedTokenizerFast):
        parts = [whole]
    return [name for name in parts if not (folder / name).exists()]
