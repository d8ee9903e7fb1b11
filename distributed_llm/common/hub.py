"""Finding a model: in the package, in a folder or file, of ollama, or on the Hugging Face hub.

Of a model on the hub the coordinator first downloads only JSON: it learns about the tensors from
the headers of the files. It downloads files of weights once workers ask for what is in them; if it
cannot, they do. The commit is pinned, and the headers are kept beside the snapshot, so that a
second start needs no network. Of a model in GGUF, all is in one file, which the coordinator
downloads; it then is like any file on this machine.
"""

import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from huggingface_hub import HfApi, errors, try_to_load_from_cache
from huggingface_hub.utils import tqdm, validate_repo_id  # type: ignore[attr-defined]

from distributed_llm.common import hub_gguf, ollama_models
from distributed_llm.common.checkpoint import Checkpoint, checkpoint_of, open_checkpoint
from distributed_llm.common.errors import CheckpointError, CheckpointUnavailable
from distributed_llm.common.gguf_files import is_gguf, only_model, open_gguf, parts_of
from distributed_llm.common.hub_errors import reporting
from distributed_llm.common.messages import ModelSource
from distributed_llm.common.model_files import TensorInfo, read_header, read_json
from distributed_llm.common.model_folder import (
    GENERATION_NAME,
    TOKENIZER_NAMES,
    check_texts,
    listing,
    read_config,
)
from distributed_llm.common.other_formats import (
    CONFIG_NAME,
    INDEX_NAME,
    SETTINGS_BESIDE,
    SINGLE_NAME,
    looks_like_file,
    reason_of_file,
    reason_of_listing,
)
from distributed_llm.common.types import LayerRange

_CONFIG_FILES = (CONFIG_NAME, GENERATION_NAME, *SETTINGS_BESIDE)
_CLUE_FILES = ("adapter_config.json",)
_TENSORS_NAME = "distributed_llm_tensors.json"
_MAX_NAME_CHARS = 4096
_SHOWN_CHARS = 100
_SHOWN_FOLDERS = 5
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._/+-]{0,199}")
_WEIGHT_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")
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
    name, revision = _parse_hub_id(in_repository[0] if in_repository else model)
    folder = _texts_of_hub(model, name, revision)
    if in_repository:
        file = _gguf_on_hub(name, folder, in_repository[1])
        return _gguf_source(str(file), file)
    try:
        checkpoint = _hub_checkpoint(name, folder)
    except CheckpointUnavailable:
        raise
    except CheckpointError:
        only = _only_gguf_on_hub(name, folder)
        if only is None:
            raise
        file = _gguf_on_hub(name, folder, only)
        return _gguf_source(str(file), file)
    check_texts(folder)
    return ModelSource(kind="hub", name=name, revision=folder.name), checkpoint


def _texts_of_hub(model: str, name: str, revision: str | None) -> Path:
    """Return the folder of a snapshot, with the small files that tell what is in it."""
    try:
        texts = (*_CONFIG_FILES, *TOKENIZER_NAMES, *_CLUE_FILES)
        return _download(name, revision, texts, all_needed=False)
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
    held = held_file(source, CONFIG_NAME)
    return _snapshot_here(held.parent, layers) if held else None


def held_file(source: ModelSource, file: str) -> Path | None:
    """Return where a file of a model on the hub is in the hub's cache on this machine, or None.

    Raises:
        CheckpointError: the source names no model, or no commit of it.
    """
    _check_source(source)
    held = reporting(
        source.name,
        lambda: try_to_load_from_cache(source.name, file, revision=source.revision),
    )
    return Path(held) if isinstance(held, str) else None


def download_file(source: ModelSource, file: str, on_bytes: Callable[[int], None]) -> Path:
    """Return where a file of a model on the hub is on this machine; download it if it is not there.

    Args:
        on_bytes: called with the bytes that came, while they come.

    Raises:
        CheckpointUnavailable: it cannot be fetched just now.
        CheckpointError: it cannot be fetched.
    """
    if (held := held_file(source, file)) is not None:
        return held

    class Counter(tqdm):
        """Tells how many bytes came; shows nothing."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            on_bytes(int(n or 0))
            return None

    logger.info("downloading %s of %s from the hub", file, source.name)
    try:
        return Path(
            reporting(
                source.name,
                lambda: _api().hf_hub_download(
                    source.name, file, revision=source.revision, tqdm_class=Counter
                ),
            )
        )
    except CheckpointError as exc:
        raise type(exc)(f"{exc} Not here yet: {file}.") from exc


def _check_source(source: ModelSource) -> None:
    _check_hub_id(source.name)
    if not _COMMIT.fullmatch(source.revision):
        raise CheckpointError(f"The coordinator names no commit of {_shown(source.name)}.")


def own_checkpoint(model: str) -> Checkpoint:
    """Return the checkpoint in the folder or file `model`, a copy that a worker has of its own.

    Raises:
        CheckpointError: it is none of this machine, or of a kind that is not read.
    """
    if (file := _gguf_here(model)) is not None:
        return open_gguf(file)
    if model.startswith(ollama_models.PREFIX):
        raise ollama_models.not_pulled(model)
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
        raise _bad_id(model)
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
    text = f"There is no folder {_shown(model)} on this machine (looked up from {Path.cwd()})"
    try:
        beside = sorted(entry.name for entry in os.scandir(parent) if entry.is_dir())
    except OSError:
        return f"{text}."
    close = get_close_matches(Path(model).name, beside) or beside[:_SHOWN_FOLDERS]
    if parent == Path() or not close:
        return f"{text}."
    return f"{text}; in {_shown(str(parent))} there is {', '.join(map(_shown, close))}."


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
    if not (folder / CONFIG_NAME).exists():
        raise CheckpointError(f"{name} {_reason_of_repository(name, folder)}")
    read_config(folder)  # the reason to refuse a model may stand there
    absent = _absent_weights(folder)
    if not absent:
        return open_checkpoint(folder)
    try:
        tensors = dict(_tensors_on_hub(name, folder))
    except CheckpointError as exc:
        raise type(exc)(f"{exc} Not here yet: {', '.join(absent)}.") from exc
    return _with_headers(folder, tensors)


def _with_headers(folder: Path, tensors: dict[str, TensorInfo]) -> Checkpoint:
    """Return the checkpoint of a snapshot that has some of the files of `tensors`."""
    for file in _files(tensors.values()):
        if (folder / file).exists():
            tensors.update(read_header(folder, file))  # with offsets, and the file checked
    return checkpoint_of(folder, read_config(folder), tensors)


def _only_gguf_on_hub(name: str, folder: Path) -> str | None:
    """Return the only model in GGUF of a repository that has no others, or None.

    Raises:
        CheckpointError: there are several.
    """
    paths = _paths_on_hub(name, folder)
    if any(path.endswith(".safetensors") for path in paths):
        return None
    return only_model(paths, name)


def _gguf_on_hub(name: str, folder: Path, wanted: str) -> Path:
    """Return a GGUF file of a repository, downloaded.

    Args:
        folder: of the snapshot.
        wanted: the file, or how the weights are kept ("Q4_K_M").

    Raises:
        CheckpointError: there is none, or there are several.
    """
    chosen = hub_gguf.choose(name, _paths_on_hub(name, folder), wanted)
    for part in parts_of(chosen):
        if not (folder / part).exists():
            logger.info("downloading %s of %s from the hub", part, name)
            reporting(name, partial(_api().hf_hub_download, name, part, revision=folder.name))
    return folder / chosen


def _paths_on_hub(name: str, folder: Path) -> list[str]:
    """Return the files of a repository; if it cannot be reached, those in its snapshot here."""
    try:
        return reporting(name, lambda: _api().list_repo_files(name, revision=folder.name))
    except CheckpointError:
        here = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
        if not any(path.endswith((".gguf", ".safetensors")) for path in here):
            raise
        return here


def _snapshot_here(folder: Path, layers: LayerRange) -> Checkpoint | None:
    """Return the checkpoint of a snapshot if it has the weights of `layers`; ask nobody."""
    if not _absent_weights(folder):
        return open_checkpoint(folder)
    tensors = _kept_tensors(folder)
    if tensors is None:
        return None
    needed = _files(checkpoint_of(folder, read_config(folder), tensors).tensors_of(layers))
    if not all((folder / file).exists() for file in needed):
        return None
    return _with_headers(folder, tensors)


def _absent_weights(folder: Path) -> list[str]:
    """Return the files with weights that the snapshot lacks, as far as it tells.

    One that another program made, or with the weights of all layers, lacks none.
    """
    if (folder / SINGLE_NAME).exists():
        return []
    if not (folder / INDEX_NAME).exists():
        return [SINGLE_NAME]
    weight_map = read_json(folder / INDEX_NAME).get("weight_map")
    names = {str(name) for name in weight_map.values()} if isinstance(weight_map, dict) else set()
    return sorted(n for n in names if _WEIGHT_FILE.fullmatch(n) and not (folder / n).exists())


def _reason_of_repository(name: str, folder: Path) -> str:
    """Return why a repository without usable weights or configuration cannot be served."""
    paths = reporting(name, lambda: _api().list_repo_files(name, revision=folder.name))
    names = {path[: path.find("/") + 1] or path for path in paths}

    def read(file: str) -> Mapping[str, Any]:
        return read_json(folder / file) if (folder / file).exists() else {}

    return reason_of_listing(names, read) or (
        f"has no {CONFIG_NAME}, or no safetensors. Choose a model that transformers can load."
    )


def _tensors_on_hub(name: str, folder: Path) -> Mapping[str, TensorInfo]:
    """Return the tensors in the headers of the files on the hub; fetched once, then kept."""
    if (kept := _kept_tensors(folder)) is not None:
        return kept
    tensors, path = _fetch_headers(name, folder), folder / _TENSORS_NAME
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    content = msgspec.json.encode(tensors)
    reporting(name, lambda: (temporary.write_bytes(content), temporary.replace(path)))
    return tensors


def _kept_tensors(folder: Path) -> dict[str, TensorInfo] | None:
    try:
        content = (folder / _TENSORS_NAME).read_bytes()
        return msgspec.json.decode(content, type=dict[str, TensorInfo])
    except (OSError, ValueError, RecursionError):  # none yet, or a broken one
        return None


def _fetch_headers(name: str, folder: Path) -> dict[str, TensorInfo]:
    try:
        metadata = reporting(
            name, lambda: _api().get_safetensors_metadata(name, revision=folder.name)
        )
    except CheckpointError as exc:
        if isinstance(exc.__cause__, errors.NotASafetensorsRepoError):
            raise CheckpointError(f"{name} {_reason_of_repository(name, folder)}") from exc
        raise
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


def _download(name: str, revision: str | None, files: Iterable[str], *, all_needed: bool) -> Path:
    """Return the folder of the snapshot, named by its commit, with those `files` the hub has.

    Args:
        all_needed: raise if the hub cannot be reached and the snapshot lacks some of them.
    """

    def download() -> str:
        try:
            return _api().snapshot_download(name, revision=revision, allow_patterns=list(files))
        except errors.IncompleteSnapshotError as exc:
            if all_needed:
                raise
            logger.warning("%s", exc)
            return str(exc.snapshot_path)

    return Path(reporting(name, download))


def _api() -> HfApi:
    return HfApi()
