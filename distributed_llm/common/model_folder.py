"""Reads folders of models: what is in them, config.json, and what they are if no checkpoints."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from distributed_llm.common.errors import CheckpointError, UnsupportedModel
from distributed_llm.common.model_files import check_beginning, read_json, unreadable
from distributed_llm.common.other_formats import (
    CONFIG_NAME,
    SETTINGS_BESIDE,
    has_only_config,
    quantization,
    quantized,
    reason_of_config,
    reason_of_file,
    reason_of_listing,
)
from distributed_llm.common.schemes.parts import NotRead
from distributed_llm.common.schemes.reading import check_method
from distributed_llm.common.text_config import text_config

GENERATION_NAME = "generation_config.json"
TOKENIZER_NAMES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json"),
    *("source.spm", "target.spm", "target_vocab.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.json", "chat_template.jinja"),
)

_MAX_FOLDERS = 100


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of config.json; if it describes other parts as well, of its text model.

    Raises:
        CheckpointError: there is no such file, or it is no config.
        UnsupportedModel: it says that the weights are quantized in a way that is not known, or not
            of which type the text model is.
    """
    names = listing(folder)
    if CONFIG_NAME not in names:
        raise no_checkpoint(folder, names)
    config = read_json(folder / CONFIG_NAME)
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{folder} {reason_of_config(config, names)}")
    config = text_config(config | _settings_beside(folder, config, names))
    try:
        check_method(config)
    except NotRead as exc:
        raise UnsupportedModel(f"The model in {folder} {quantized(str(exc))}") from None
    return config


def _settings_beside(
    folder: Path, config: Mapping[str, Any], names: Collection[str]
) -> dict[str, Any]:
    """Return what a file beside config.json says about how weights are quantized, if it does not.

    Programs for quantizing wrote such files before config.json had a place for it.
    """
    if quantization(config) is not None:
        return {}
    for name, method in SETTINGS_BESIDE.items():
        if name in names:
            content = read_json(folder / name)
            inner = content.get("quantization")
            settings = inner if isinstance(inner, Mapping) else content
            return {"quantization_config": {"quant_method": method, **settings}}
    return {}


def folder_of_config(path: Path) -> Path | None:
    """Return the folder of a config.json that stands for a model without its weights, or None.

    Args:
        path: that file, or its folder if there are no weights in it.
    """
    if path.name == CONFIG_NAME:
        return path.parent
    try:
        return path if has_only_config(listing(path)) else None
    except CheckpointError:
        return None


def read_generation_config(folder: Path) -> dict[str, Any]:
    """Return the content of generation_config.json, empty if there is none.

    Raises:
        CheckpointError: it cannot be read, or is not JSON.
    """
    path = folder / GENERATION_NAME
    return read_json(path) if os.path.lexists(path) else {}


def check_texts(folder: Path) -> None:
    """Raise if a file that only the coordinator reads is there, but not what its name says.

    Raises:
        CheckpointError: with the file, and what to do.
    """
    names = listing(folder)
    for name in (GENERATION_NAME, *TOKENIZER_NAMES):
        if name in names:
            check_beginning(folder / name)


def listing(folder: Path) -> set[str]:
    """Return the names of what is in `folder`; those of folders end in "/".

    Raises:
        CheckpointError: there is no such folder, or it cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return {entry.name + "/" * entry.is_dir() for entry in entries}
    except NotADirectoryError as exc:
        reason = reason_of_file(folder.name, str(folder.parent))
        raise CheckpointError(f"{folder} {reason}") from exc
    except FileNotFoundError as exc:
        raise CheckpointError(
            f"There is no folder {folder}. Give the path of a checkpoint folder, or a model id of "
            "the hub such as 'Qwen/Qwen3-0.6B'."
        ) from exc
    except OSError as exc:
        raise unreadable(folder, exc) from exc


def no_checkpoint(folder: Path, names: set[str]) -> CheckpointError:
    """Return the error for a folder with these `names`, which lacks config.json or weights."""

    def read(name: str) -> Mapping[str, Any]:
        return read_json(folder / name)

    if reason := reason_of_listing(names, read):
        return CheckpointError(f"{folder} {reason}")
    if not names:
        return CheckpointError(f"{folder} is empty. Give the folder of a model.")
    if inside := _model_inside(folder, names):
        return CheckpointError(
            f"{folder} is not the folder of a model, but has one in it. Give that: {inside}."
        )
    return CheckpointError(
        f"There is no {CONFIG_NAME} in {folder}. Give the folder of a Hugging Face checkpoint "
        f"({CONFIG_NAME}, *.safetensors, tokenizer.json)."
    )


def _model_inside(folder: Path, names: set[str]) -> Path | None:
    """Return a folder of a model in `folder`, or in its snapshots if it is of the hub's cache."""
    try:
        if "snapshots/" in names:
            folder = folder / "snapshots"
            names = listing(folder)
        folders = sorted(name for name in names if name.endswith("/"))[:_MAX_FOLDERS]
        return next((folder / n for n in folders if CONFIG_NAME in listing(folder / n)), None)
    except CheckpointError:
        return None
