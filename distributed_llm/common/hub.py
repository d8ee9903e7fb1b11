"""Finding a model: in the package, in a folder, or on the Hugging Face hub.

Of a model on the hub the coordinator downloads only JSON: it learns about the tensors from the
headers of the files. A worker downloads the files that hold its layers. The commit is pinned, and
the headers are kept beside the snapshot, so that a second start needs no network.
"""

import errno
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import msgspec
from huggingface_hub import HfApi, errors
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from distributed_llm.common.checkpoint import (
    INDEX_NAME,
    SINGLE_NAME,
    Checkpoint,
    TensorInfo,
    open_checkpoint,
    read_config,
    read_header,
)
from distributed_llm.common.errors import CheckpointError
from distributed_llm.common.messages import ModelSource
from distributed_llm.common.types import LayerRange

_CONFIG_FILES = ("config.json", "generation_config.json")
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.json", "chat_template.jinja"),
)
_TENSORS_NAME = "distributed_llm_tensors.json"
_MAX_NAME_CHARS = 4096
_SHOWN_CHARS = 100
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._/+-]{0,199}")
_WEIGHT_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")
_PATH_START = re.compile(r"[./~\\]|[A-Za-z]:[\\/]")

_T = TypeVar("_T")


def resolve_for_coordinator(model: str) -> tuple[ModelSource, Checkpoint]:
    """Return the source of `model` for the workers, and its checkpoint.

    Downloads configuration and tokenizer of a model on the hub, but no weights.

    Args:
        model: empty for the model in the package, a folder, or a hub id 'org/name[@revision]'.

    Returns:
        The source with the commit pinned; the checkpoint (of a hub model whose weights are not
        here, the tensors have offset 0).

    Raises:
        CheckpointError: it is not there, cannot be fetched, or is of a kind that is not read.
    """
    if not model:
        return ModelSource(kind="builtin", name=""), open_checkpoint(_builtin_folder())
    folder = _existing_folder(model)
    if folder is not None:
        source = ModelSource(kind="folder", name=str(folder))
        return source, open_checkpoint(folder)
    name, revision = _parse_hub_id(model)
    folder = _download(name, revision, (*_CONFIG_FILES, *_TOKENIZER_FILES))
    checkpoint = _hub_checkpoint(name, folder)
    return ModelSource(kind="hub", name=name, revision=folder.name), checkpoint


def resolve_for_worker(
    source: ModelSource, layers: LayerRange, *, local_model: str = ""
) -> Checkpoint:
    """Return the checkpoint of `source`, with the weights of `layers` on this disk.

    Downloads the files of a hub model that hold these layers, and no others.

    Args:
        local_model: a folder of this machine that holds the same model, or empty.

    Raises:
        CheckpointError: it is not there, cannot be fetched, or is of a kind that is not read.
    """
    if source.kind == "builtin":
        return open_checkpoint(_builtin_folder())
    if local_model:
        return open_checkpoint(Path(local_model).expanduser())
    if source.kind == "folder":
        if not _is_folder(Path(source.name)):
            raise CheckpointError(
                f"There is no folder {_shown(source.name)} on this machine. Copy the model there "
                "from the coordinator's machine, or start the worker with `--model PATH`, the "
                "path of its copy here."
            )
        return open_checkpoint(Path(source.name))
    _check_hub_id(source.name)
    if not _COMMIT.fullmatch(source.revision):
        raise CheckpointError(f"The coordinator names no commit of {_shown(source.name)}.")
    folder = _download(source.name, source.revision, _CONFIG_FILES)
    needed = _files(_hub_checkpoint(source.name, folder).tensors_of(layers))
    _download(source.name, source.revision, needed)
    return _hub_checkpoint(source.name, folder)


def fingerprints(source: ModelSource, checkpoint: Checkpoint, layers: LayerRange) -> dict[str, str]:
    """Return fingerprints by which coordinator and worker compare the tensors of `layers`.

    Weights are sampled, except those of a model on the hub: the coordinator does not have them, and
    the commit determines what the files contain.

    Raises:
        CheckpointError: a file cannot be read.
    """
    return checkpoint.fingerprints(layers, sampled=source.kind != "hub")


def _builtin_folder() -> Path:
    return Path(__file__).parents[1] / "builtin_model"  # weights are mapped: it must be a folder


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _existing_folder(model: str) -> Path | None:
    """Return the folder that `model` names, or None if it can only be a hub id."""
    if len(model) > _MAX_NAME_CHARS:
        raise _bad_id(model)
    try:
        path = Path(model).expanduser()
    except RuntimeError:  # ~nobody
        path = Path(model)
    if _is_folder(path):
        return Path(os.path.abspath(path))  # links may be others on the workers
    if "://" in model:
        raise CheckpointError(
            f"The model is a URL, {_shown(model)}. Give a folder, or the model's id on the hub, "
            "such as 'Qwen/Qwen3-0.6B'."
        )
    repository = model.partition("@")[0]
    if _PATH_START.match(model) or repository.count("/") > 1 or repository.count(os.sep) > 1:
        raise CheckpointError(
            f"There is no folder {_shown(model)}. Check the path; it is looked up on this machine, "
            f"from {Path.cwd()}."
        )
    return None


def _parse_hub_id(model: str) -> tuple[str, str | None]:
    name, at, revision = model.partition("@")
    _check_hub_id(name)
    if at and not _REVISION.fullmatch(revision):
        raise CheckpointError(
            f"{_shown(revision)} is no revision of {name}. After the @ comes a branch, a tag or a "
            "commit, such as 'Qwen/Qwen3-0.6B@main'."
        )
    return name, revision or None


def _check_hub_id(name: str) -> None:
    try:
        validate_repo_id(name)
    except errors.HFValidationError as exc:
        raise _bad_id(name) from exc


def _bad_id(name: str) -> CheckpointError:
    return CheckpointError(
        f"{_shown(name)} is neither a folder on this machine nor a model id of the hub. Give the "
        "path of a checkpoint folder, or an id such as 'Qwen/Qwen3-0.6B'."
    )


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "...")


def _files(tensors: Iterable[TensorInfo]) -> list[str]:
    return sorted({tensor.file for tensor in tensors})


def _hub_checkpoint(name: str, folder: Path) -> Checkpoint:
    """Return the checkpoint of the snapshot in `folder`; its weights may not be downloaded yet."""
    tensors = dict(_tensors_on_hub(name, folder))
    for file in _files(tensors.values()):
        if (folder / file).exists():
            tensors.update(read_header(folder, file))  # with offsets, and the file checked
    return Checkpoint(folder, read_config(folder), tensors)


def _tensors_on_hub(name: str, folder: Path) -> Mapping[str, TensorInfo]:
    """Return the tensors in the headers of the files on the hub; fetched once, then kept."""
    path = folder / _TENSORS_NAME
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, TensorInfo])
    except (OSError, ValueError, RecursionError):  # none yet, or a broken one
        tensors = _fetch_headers(name, folder.name)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    content = msgspec.json.encode(tensors)
    _reporting(name, lambda: (temporary.write_bytes(content), temporary.replace(path)))
    return tensors


def _fetch_headers(name: str, commit: str) -> dict[str, TensorInfo]:
    metadata = _reporting(name, lambda: _api().get_safetensors_metadata(name, revision=commit))
    tensors: dict[str, TensorInfo] = {}
    for file, content in metadata.files_metadata.items():
        if not _WEIGHT_FILE.fullmatch(file):
            raise CheckpointError(
                f"{INDEX_NAME} of {name} names the file {_shown(file)}, which is not a safetensors "
                "file in the same folder. Do not use this checkpoint."
            )
        for tensor, info in content.tensors.items():
            start, stop = info.data_offsets
            shape = tuple(info.shape)
            tensors[tensor] = TensorInfo(tensor, file, info.dtype, shape, 0, stop - start)
    return tensors


def _download(name: str, revision: str | None, files: Iterable[str]) -> Path:
    """Return the folder of the snapshot, named by its commit, with those `files` the hub has."""

    def download() -> str:
        return _api().snapshot_download(name, revision=revision, allow_patterns=list(files))

    return Path(_reporting(name, download))


def _api() -> HfApi:
    return HfApi()


def _reporting(name: str, action: Callable[[], _T]) -> _T:
    """Return what `action` returns.

    Raises:
        CheckpointError: instead of whatever it raises. The hub's library changes its HTTP client,
            and with it the exceptions, from version to version; hence all of them.
    """
    try:
        return action()
    except Exception as exc:
        raise CheckpointError(_explain(name, exc)) from exc


def _explain(name: str, exc: Exception) -> str:
    match exc:
        case errors.GatedRepoError():
            return (
                f"{name} is gated: its owner wants you to accept a licence. Do so at "
                f"https://huggingface.co/{name}, then run `hf auth login` on this machine."
            )
        case errors.RevisionNotFoundError():
            return f"{name} has no such revision on the hub. Check what stands after the @."
        case errors.RepositoryNotFoundError():
            return (
                f"The hub has no model {name}, or it is private. Check the spelling; for a "
                "private model run `hf auth login` on this machine."
            )
        case errors.NotASafetensorsRepoError():
            return (
                f"{name} has neither {SINGLE_NAME} nor {INDEX_NAME}. Weights in pickles (.bin), "
                "which can run any code when they are read, are not used. Choose a version of the "
                "model with safetensors, or convert it: AutoModelForCausalLM.from_pretrained(id)"
                ".save_pretrained(folder)."
            )
        case errors.SafetensorsParsingError():
            return f"The weights of {name} on the hub are broken ({exc}). Choose another model."
        case errors.OfflineModeIsEnabled():
            return _offline(name, "HF_HUB_OFFLINE is set")
        case errors.LocalEntryNotFoundError() if isinstance(exc.__cause__, Exception):
            return _explain(name, exc.__cause__)
        case errors.HfHubHTTPError():
            return _refused(name, exc)
        case OSError(errno=errno.ENOSPC):
            return (
                f"The disk is full; {name} does not fit. Free some space, or set HF_HOME to a "
                "folder on another disk, and start again: what was downloaded is kept."
            )
        case OSError(errno=code) if code is not None and exc.filename is not None:
            return f"{name} cannot be stored: {exc}. Set HF_HOME to a folder that can be written."
    return _offline(name, f"{type(exc).__name__}: {str(exc)[:300]}")


def _refused(name: str, exc: errors.HfHubHTTPError) -> str:
    status = exc.response.status_code
    if status in (401, 403):
        return (
            f"The hub refuses {name} (HTTP {status}). Run `hf auth login` on this machine with a "
            "token that may read it, and check that no old HF_TOKEN is set."
        )
    return _offline(name, f"the hub answers HTTP {status}")


def _offline(name: str, reason: str) -> str:
    return (
        f"{name} cannot be fetched from the hub: {reason}. What was downloaded is kept; try again "
        "when the hub can be reached, or give the path of a folder with the model."
    )
