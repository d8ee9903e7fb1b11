"""Finds the model that a name means: in the package, a folder or file, of ollama, or on the hub.

What asks the hub is imported only for models on the hub: its library takes as long to import as
half of a coordinator.
"""

import logging
import os
import re
from difflib import get_close_matches
from pathlib import Path

from distributed_llm.common import hub_gguf, ollama_models
from distributed_llm.common.checkpoint import Checkpoint, open_checkpoint
from distributed_llm.common.errors import CheckpointError, CheckpointUnavailable
from distributed_llm.common.gguf_files import (
    is_gguf,
    models_among,
    only_model,
    open_gguf,
    parts_of,
)
from distributed_llm.common.messages import ModelSource
from distributed_llm.common.model_folder import check_texts, listing
from distributed_llm.common.other_formats import (
    CONFIG_NAME,
    INDEX_NAME,
    SINGLE_NAME,
    looks_like_file,
    reason_of_file,
)
from distributed_llm.common.types import LayerRange

_MAX_NAME_CHARS = 4096
_SHOWN_CHARS = 100
_SHOWN_FOLDERS = 5
_REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._/+-]{0,199}")
_WINDOWS_PATH = re.compile(r"(?P<drive>[A-Za-z]):[\\/](?P<path>.*)")
_PATH_START = re.compile(r"[./~\\]|[A-Za-z]:[\\/]")

logger = logging.getLogger(__name__)


def resolve_for_coordinator(model: str) -> tuple[ModelSource, Checkpoint]:
    """Return the source of `model` for the workers, and its checkpoint.

    Downloads configuration and tokenizer of a model on the hub, but no weights, except GGUF files.

    Args:
        model: empty for the model in the package, a folder, a GGUF file, 'ollama:name[:tag]', or a
            hub id 'org/name[@revision]', 'org/name:Q4_K_M' or 'org/name/file.gguf'.

    Returns:
        The source with the commit pinned; the checkpoint (of a hub model whose weights are not
        here, the tensors have offset 0).

    Raises:
        CheckpointError: it is not there, cannot be fetched, or is of a kind that is not read.
    """
    if not model:
        return ModelSource(kind="builtin", name=""), open_checkpoint(_builtin_folder())
    if (file := _gguf_here(model)) is not None:
        return _gguf_source(model, file)
    if model.startswith(ollama_models.PREFIX):
        raise ollama_models.not_pulled(model)
    in_repository = hub_gguf.parse_name(model)
    folder = None if in_repository else _existing_folder(model)
    if folder is not None:
        checkpoint = open_checkpoint(folder)
        check_texts(folder)
        return ModelSource(kind="folder", name=str(folder)), checkpoint
    return _resolve_on_hub(model, in_repository)


def _resolve_on_hub(
    model: str, in_repository: tuple[str, str] | None
) -> tuple[ModelSource, Checkpoint]:
    """Return the source and the checkpoint of a model on the hub.

    Args:
        in_repository: the repository, and which GGUF file of it; None: the name has no such part.
    """
    from distributed_llm.common import hub

    name, revision = _parse_hub_id(in_repository[0] if in_repository else model)
    folder = _texts_of_hub(model, name, revision)
    if in_repository:
        file = hub.download_gguf(name, folder, in_repository[1])
        return _gguf_source(str(file), file)
    try:
        checkpoint = hub.checkpoint_on_hub(name, folder)
    except CheckpointUnavailable:
        raise
    except CheckpointError:
        only = hub.only_gguf(name, folder)
        if only is None:
            raise
        file = hub.download_gguf(name, folder, only)
        return _gguf_source(str(file), file)
    check_texts(folder)
    return ModelSource(kind="hub", name=name, revision=folder.name), checkpoint


def _texts_of_hub(model: str, name: str, revision: str | None) -> Path:
    """Return the folder of a snapshot, with the small files that tell what is in it."""
    from huggingface_hub import errors

    from distributed_llm.common import hub

    try:
        return hub.download_texts(name, revision)
    except CheckpointError as exc:
        if isinstance(exc.__cause__, errors.GatedRepoError | errors.RevisionNotFoundError):
            raise
        raise type(exc)(f"{_no_folder(model)} As a model id of the hub: {exc}") from exc


def _gguf_source(model: str, file: Path) -> tuple[ModelSource, Checkpoint]:
    """Return the source of a model in GGUF for the workers, and its checkpoint.

    Args:
        model: as it was named. Of ollama, this name is the same on all machines.
        file: of it.
    """
    of_ollama = model.startswith(ollama_models.PREFIX)
    first = file.with_name(parts_of(file.name)[0])
    name = model if of_ollama else os.path.abspath(first)  # links may be others on the workers
    return ModelSource(kind="folder", name=name), open_gguf(first)


def _gguf_here(model: str) -> Path | None:
    """Return the GGUF file of this machine that `model` names, or None if it names none.

    Raises:
        CheckpointError: it names a folder with several.
    """
    if model.startswith(ollama_models.PREFIX):
        return ollama_models.ollama_file(model)
    if len(model) > _MAX_NAME_CHARS or "\0" in model:
        return None
    path = _path(model)
    if is_gguf(path):
        return path
    if not _is_folder(path) or not model:
        return None
    names = listing(path)
    if SINGLE_NAME in names or INDEX_NAME in names:
        if also := models_among(names):
            logger.warning(
                "%s holds a model in safetensors, which is taken, and %s in GGUF, which is not: "
                "give that file to serve it",
                *(path, also[0]),
            )
        return None
    only = only_model(names, str(path))
    return path / only if only else None


def checkpoint_here(
    source: ModelSource, layers: LayerRange, *, local_model: str = ""
) -> Checkpoint | None:
    """Return the checkpoint of `source` if the weights of `layers` are on this disk, else None.

    Downloads nothing.

    Args:
        local_model: a folder of this machine that holds the same model, or empty.

    Raises:
        CheckpointUnavailable: it cannot be read just now.
        CheckpointError: what is there is of a kind that is not read.
    """
    if source.kind == "builtin":
        return open_checkpoint(_builtin_folder())
    if local_model:
        return own_checkpoint(local_model)
    if source.kind == "folder":
        if (file := _gguf_here(source.name)) is not None:
            return open_gguf(file)
        folder = Path(source.name)
        return open_checkpoint(folder) if _is_folder(folder) else None
    from distributed_llm.common import hub

    held = hub.held_file(source, CONFIG_NAME)
    return hub.snapshot_here(held.parent, layers) if held else None


def own_checkpoint(model: str) -> Checkpoint:
    """Return the checkpoint in the folder or file `model`, a copy that a worker has of its own.

    Raises:
        CheckpointError: it is none of this machine, or of a kind that is not read.
    """
    if (file := _gguf_here(model)) is not None:
        return open_gguf(file)
    if model.startswith(ollama_models.PREFIX):
        raise ollama_models.not_pulled(model)
    hub_gguf.parse_name(model)
    folder = _existing_folder(model)
    if folder is None:
        raise CheckpointError(
            f"{_no_folder(model)} A worker's --model is the folder of its own copy of the model; "
            "without it, the worker takes what the coordinator names."
        )
    return open_checkpoint(folder)


def fingerprints(source: ModelSource, checkpoint: Checkpoint, layers: LayerRange) -> dict[str, str]:
    """Return fingerprints by which coordinator and worker compare the tensors of `layers`.

    Weights are sampled, except those of a model on the hub: the coordinator does not have them, and
    the commit determines what the files contain.

    Raises:
        CheckpointError: a file cannot be read.
    """
    return checkpoint.fingerprints(layers, sampled=source.kind != "hub")


def _builtin_folder() -> Path:
    return Path(__file__).parents[1] / "builtin_model"


def _is_folder(path: Path) -> bool:
    """Return whether `path` is a folder, or may be one that this user may not look at."""
    try:
        return path.is_dir()
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _existing_folder(model: str) -> Path | None:
    """Return the folder that `model` names, or None if it can only be a hub id."""
    if len(model) > _MAX_NAME_CHARS:
        from distributed_llm.common import hub

        raise hub.no_such_id(model)
    path = _path(model)
    if _is_folder(path):
        return Path(os.path.abspath(path))  # links may be others on the workers
    if "://" in model:
        raise CheckpointError(
            f"The model is a URL, {_shown(model)}. Give a folder, or the model's id on the hub, "
            "such as 'Qwen/Qwen3-0.6B'."
        )
    repository = model.partition("@")[0]
    if _is_file(path):
        raise CheckpointError(f"{_shown(model)} {reason_of_file(path.name, str(path.parent))}")
    if looks_like_file(repository):
        raise CheckpointError(
            f"There is no file {_shown(model)} in {Path.cwd()}. Give a folder with config.json and "
            "*.safetensors, a GGUF file, or a model id of the hub."
        )
    if (
        _PATH_START.match(model)
        or model.endswith(("/", os.sep))
        or repository.count("/") > 1
        or repository.count(os.sep) > 1
    ):
        raise CheckpointError(f"{_no_folder(model)} Check the path.")
    return None


def _path(model: str) -> Path:
    try:
        return Path(model).expanduser()
    except RuntimeError:  # ~nobody
        return Path(model)


def _no_folder(model: str) -> str:
    """Return that there is no such folder, and what is in the one above it."""
    parent = _path(model).parent
    if os.sep == "/" and (windows := _WINDOWS_PATH.fullmatch(model)):
        inside = windows["path"].replace("\\", "/")
        return (
            f"{_shown(model)} is a path of Windows, and this machine has no drives. In WSL it is "
            f"/mnt/{windows['drive'].lower()}/{inside}."
        )
    text = f"There is no folder {_shown(model)} on this machine (looked up from {Path.cwd()})"
    try:
        beside = sorted(entry.name for entry in os.scandir(parent) if entry.is_dir())
    except OSError:
        return f"{text}."
    close = get_close_matches(Path(model).name, beside)
    if parent == Path():  # it may be meant as an id of the hub
        return f"{text}; there is {', '.join(map(_shown, close))}." if close else f"{text}."
    close = close or beside[:_SHOWN_FOLDERS]
    if not close:
        return f"{text}."
    return f"{text}; in {_shown(str(parent))} there is {', '.join(map(_shown, close))}."


def _parse_hub_id(model: str) -> tuple[str, str | None]:
    from distributed_llm.common import hub

    name, at, revision = model.partition("@")
    hub.check_id(name)
    if at and not _REVISION.fullmatch(revision):
        raise CheckpointError(
            f"{_shown(revision)} is no revision of {name}. After the @ comes a branch, a tag or a "
            "commit, such as 'Qwen/Qwen3-0.6B@main'."
        )
    return name, revision or None


def _shown(text: str) -> str:
    shown = repr(text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "...")
    return shown.replace("\\\\", "\\")  # as people write paths of Windows
