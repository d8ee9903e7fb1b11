"""Finds the files of models that ollama has pulled, by the names that ollama gives them.

ollama keeps a manifest per name, which names the blobs of the model by their hashes. The blob with
the weights is a GGUF file.
"""

import os
import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

from distributed_llm.common.errors import CheckpointError, UnsupportedModel
from distributed_llm.common.model_files import read_json

PREFIX = "ollama:"
"""How names of models begin that ollama has pulled."""

FOLDER_VARIABLE = "OLLAMA_MODELS"
"""ollama's own environment variable that names another folder for models."""

_SYSTEM_FOLDERS = ("/usr/share/ollama/.ollama/models", "/var/lib/ollama/.ollama/models")
"""Where ollama keeps models that runs as a service on Linux."""

_HOST, _NAMESPACE, _TAG = "registry.ollama.ai", "library", "latest"
_WORD = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
_NAME = re.compile(rf"(?:(?:({_WORD}(?::\d+)?)/)?({_WORD})/)?({_WORD})(?::({_WORD}))?")
_MODEL_LAYER = "application/vnd.ollama.image.model"
_ADAPTER_LAYER = "application/vnd.ollama.image.adapter"
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")
_MAX_LISTED = 1000
_SHOWN_NAMES = 12
_SHOWN_CHARS = 100


def ollama_file(model: str) -> Path | None:
    """Return the GGUF file of a model, or None if ollama has none of that name here.

    Args:
        model: such as "ollama:llama3.2:1b".

    Raises:
        CheckpointError: it is no such name, or what ollama has of the model cannot be read.
    """
    parts = _parts(model)
    for folder in _folders():
        manifest = folder.joinpath("manifests", *parts)
        if manifest.is_file():
            return _blob(folder, manifest, model.removeprefix(PREFIX))
    return None


def not_pulled(model: str) -> CheckpointError:
    """Return the error for a model that ollama does not have here, with those that it has."""
    name = model.removeprefix(PREFIX)
    here = sorted({found for folder in _folders() for found in _names(folder)})
    close = get_close_matches(name, here) or here
    shown = ", ".join(close[:_SHOWN_NAMES]) + ", ..." * (len(close) > _SHOWN_NAMES)
    has = f"It has {shown}." if here else "It has no models here that this user may read."
    return CheckpointError(
        f"ollama has no model {name[:_SHOWN_CHARS]!r} on this machine. {has} Run `ollama pull "
        f"{name[:_SHOWN_CHARS]}` first, or set {FOLDER_VARIABLE} if its models are elsewhere."
    )


def _parts(model: str) -> tuple[str, str, str, str]:
    match = _NAME.fullmatch(model.removeprefix(PREFIX))
    if match is None or ".." in model:
        raise CheckpointError(
            f"{model[:_SHOWN_CHARS]!r} is no name of a model of ollama. Give one that `ollama "
            "list` shows, such as 'ollama:llama3.2:1b'."
        )
    host, namespace, name, tag = match.groups()
    return host or _HOST, namespace or _NAMESPACE, name, tag or _TAG


def _folders() -> list[Path]:
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return [Path(named)]
    return [Path.home() / ".ollama" / "models", *map(Path, _SYSTEM_FOLDERS)]


def _blob(folder: Path, manifest: Path, name: str) -> Path:
    told = read_json(manifest).get("layers")
    layers = [layer for layer in told if isinstance(layer, dict)] if isinstance(told, list) else []
    if any(layer.get("mediaType") == _ADAPTER_LAYER for layer in layers):
        raise UnsupportedModel(
            f"{manifest} names a model with an adapter (LoRA), which is not applied here: answers "
            "would be those of the model without it. Merge the adapter into its base model, or "
            "choose another one of `ollama list`."
        )
    for layer in layers:
        if layer.get("mediaType") == _MODEL_LAYER:
            match = _DIGEST.fullmatch(str(layer.get("digest")))
            if match:
                return _checked(folder / "blobs" / f"sha256-{match[1]}", name)
    raise CheckpointError(
        f"{manifest} names no file with weights: it is no model that ollama runs by itself. "
        "Choose another one of `ollama list`."
    )


def _checked(blob: Path, name: str) -> Path:
    if os.path.lexists(blob):
        return blob
    raise CheckpointError(
        f"ollama knows the model {name!r}, but its file {blob} is not there: it was not pulled to "
        f"its end, or was deleted. Run `ollama pull {name}`."
    )


def _names(folder: Path) -> Iterator[str]:
    """Yield the names of the models in a folder of ollama, as `ollama list` shows them."""
    root = folder / "manifests"
    try:
        found = [path for path in root.glob("*/*/*/*") if path.is_file()][:_MAX_LISTED]
    except OSError:
        return
    for path in found:
        host, namespace, name, tag = path.relative_to(root).parts
        above = "" if host == _HOST else f"{host}/"
        inside = "" if not above and namespace == _NAMESPACE else f"{namespace}/"
        yield f"{above}{inside}{name}:{tag}"
