"""Reads the tokenizer of a checkpoint, whichever files it is in.

`tokenizer.json` is read by transformers' generic fast tokenizer, which needs no torch: 60 MB and a
second less than `AutoTokenizer`, which converts folders with only older files (vocab.json,
merges.txt). Mistral's tekken.json is converted too, and encoder-decoders have their own classes.
Nothing in a checkpoint is executed.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from distributed_llm.common.errors import CheckpointError
from distributed_llm.common.model_files import read_json
from distributed_llm.common.model_folder import TOKENIZER_NAMES
from distributed_llm.coordinator.text.chat_template import short
from distributed_llm.coordinator.text.source_tokenizers import (
    needs_no_files,
    read_source_tokenizer,
    source_config,
)

_MADE_FOR_ALL = "tokenizer.json"
_TEKKEN = "tekken.json"

_FILES = (
    *(_MADE_FOR_ALL, "tokenizer.model", "vocab.json", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "source.spm", _TEKKEN),
)

_SHOWN_CHARS = 200
"""Characters of what the package tokenizers says that are passed on."""

_OLD_TEMPLATE = "chat_template.json"
"""Where multimodal models had their chat template before there was chat_template.jinja."""


def has_tokenizer(folder: Path) -> bool:
    """Return whether `folder` has the files of a tokenizer."""
    return any((folder / name).exists() for name in _FILES) or needs_no_files(folder)


def read_tokenizer(folder: Path) -> Any:
    """Return the tokenizer in `folder`, one of transformers, with its chat templates.

    It is a fast one, but for some encoder-decoders.

    Raises:
        CheckpointError: there is no tokenizer, it is broken, it needs to run its own code, or a
            package that is not installed.
    """
    if not has_tokenizer(folder):
        raise CheckpointError(
            f"There is no tokenizer in {folder}. Copy tokenizer.json and tokenizer_config.json "
            "of the model there."
        )
    _refuse_code(folder)
    try:
        loaded = _reader(folder)(folder)
    except CheckpointError:
        raise
    except Exception as exc:  # transformers and tokenizers raise whatever a bad file causes
        raise CheckpointError(_why_unread(folder, exc)) from exc
    if getattr(loaded, "backend_tokenizer", None) is None and source_config(folder) is None:
        raise CheckpointError(
            f"The tokenizer in {folder} ({type(loaded).__name__}) is not one of the "
            "'tokenizers' package. Use a version of the model that has a tokenizer.json."
        )
    if not loaded.chat_template:
        loaded.chat_template = _old_template(folder)
    return loaded


def why_no_template(folder: Path) -> str:
    """Return what to do about a tokenizer without chat template; empty if nothing can be done."""
    if (folder / _MADE_FOR_ALL).exists() or not (folder / _TEKKEN).exists():
        return ""
    return (
        f"The model has {_TEKKEN} and no chat template. Install the package mistral-common where "
        "the coordinator runs (pip install mistral-common), which makes one, or copy "
        "chat_template.jinja of such a model to its folder; or send the prompt as text."
    )


def _why_unread(folder: Path, exc: Exception) -> str:
    """Return why a tokenizer cannot be read, by the file that is at fault, and what to do."""
    path = folder / _MADE_FOR_ALL
    if not path.exists():
        return (
            f"The tokenizer in {folder} cannot be read ({short(exc)}). Download it again; or, "
            "where sentencepiece is installed, have AutoTokenizer.from_pretrained(folder)"
            ".save_pretrained(folder) write a tokenizer.json."
        )
    if why := _why_no_backend(path):
        return (
            f"{path} cannot be read as a tokenizer ({why}). Copy or download it "
            "again from the original model."
        )
    files = ", ".join(name for name in TOKENIZER_NAMES if (folder / name).exists())
    return (
        f"The tokenizer in {folder} cannot be read ({short(exc)}). A file of it is damaged: copy "
        f"or download these again from the original model: {files}."
    )


def _why_no_backend(path: Path) -> str:
    """Return why a tokenizer.json is none; empty if it is one."""
    from tokenizers import Tokenizer as Backend

    try:
        Backend.from_file(str(path))
    except Exception as exc:  # of no narrower type
        return str(exc)[:_SHOWN_CHARS]
    return ""


def _refuse_code(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    auto_map = read_json(path).get("auto_map") if path.exists() else None
    if (folder / _MADE_FOR_ALL).exists():
        return  # read by a class of transformers, whatever code is named
    if auto_map and (not isinstance(auto_map, dict) or "AutoTokenizer" in auto_map):
        raise CheckpointError(
            f"{path} asks to run code of its own (auto_map). Code from checkpoints is never run; "
            "use a version of the model whose tokenizer is part of transformers."
        )


def _reader(folder: Path) -> Callable[[Path], Any]:
    if config := source_config(folder):
        return partial(read_source_tokenizer, config)
    if (folder / _MADE_FOR_ALL).exists():
        return _read_made_for_all
    return _read_tekken if (folder / _TEKKEN).exists() else _read_older


def _read_made_for_all(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def _read_older(folder: Path) -> Any:
    from transformers import AutoTokenizer  # loads torch

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _read_tekken(folder: Path) -> Any:
    """Return Mistral's own kind of tokenizer; texts begin with <s>, as in Mistral's package.

    Raises:
        CheckpointError: the file is of the kind that only that package can read.
    """
    from tokenizers import processors
    from transformers.integrations.mistral.tokenizer import convert_tekken_tokenizer

    path = folder / _TEKKEN
    try:
        loaded = convert_tekken_tokenizer(str(path))
    except ImportError as exc:
        raise CheckpointError(
            f"{path} is of an older kind, for which the package mistral-common is needed. Install "
            "it where the coordinator runs: pip install mistral-common. Or use a version of the "
            "model that has a tokenizer.json."
        ) from exc
    loaded.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{loaded.bos_token} $A", special_tokens=[(loaded.bos_token, loaded.bos_token_id)]
    )
    return loaded


def _old_template(folder: Path) -> str | None:
    path = folder / _OLD_TEMPLATE
    template = read_json(path).get("chat_template") if path.exists() else None
    return template if isinstance(template, str) else None
