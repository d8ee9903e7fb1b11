"""Asks the Hugging Face hub for models, or this user's cache of it.

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
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from huggingface_hub import HfApi, errors, try_to_load_from_cache
from huggingface_hub.utils import tqdm, validate_repo_id  # type: ignore[attr-defined]

from distributed_llm.common import hub_gguf
from distributed_llm.common.checkpoint import Checkpoint, checkpoint_of, open_checkpoint
from distributed_llm.common.errors import CheckpointError
from distributed_llm.common.gguf_files import only_model, parts_of
from distributed_llm.common.hub_errors import reporting
from distributed_llm.common.messages import ModelSource
from distributed_llm.common.model_files import TensorInfo, read_header, read_json
from distributed_llm.common.model_folder import GENERATION_NAME, TOKENIZER_NAMES, read_config
from distributed_llm.common.other_formats import (
    CONFIG_NAME,
    INDEX_NAME,
    SETTINGS_BESIDE,
    SINGLE_NAME,
    reason_of_listing,
)
from distributed_llm.common.tensor_index import of_text
from distributed_llm.common.types import LayerRange

_TEXT_FILES = (
    *(CONFIG_NAME, GENERATION_NAME, *SETTINGS_BESIDE),
    *TOKENIZER_NAMES,
    *("additional_chat_templates/*.jinja", "adapter_config.json"),
)
_TENSORS_NAME = "distributed_llm_tensors.json"
_SHOWN_CHARS = 100
_COMMIT = re.compile(r"[0-9a-f]{40}")
_WEIGHT_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")

logger = logging.getLogger(__name__)


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
    check_id(source.name)
    if not _COMMIT.fullmatch(source.revision):
        raise CheckpointError(f"The coordinator names no commit of {_shown(source.name)}.")


def check_id(name: str) -> None:
    """Raise if `name` can be no model id.

    Raises:
        CheckpointError: with what to give instead.
    """
    try:
        validate_repo_id(name)
    except errors.HFValidationError as exc:
        raise no_such_id(name) from exc


def no_such_id(name: str) -> CheckpointError:
    """Return the error for a name that is no folder, and can be no model id."""
    return CheckpointError(
        f"{_shown(name)} is neither a folder on this machine nor a model id of the hub. Give the "
        "path of a checkpoint folder, or an id such as 'Qwen/Qwen3-0.6B'."
    )


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "...")


def _files(tensors: Iterable[TensorInfo]) -> list[str]:
    return sorted({tensor.file for tensor in tensors})


def checkpoint_on_hub(name: str, folder: Path) -> Checkpoint:
    """Return the checkpoint of the snapshot in `folder`; its weights may not be downloaded yet."""
    if not (folder / CONFIG_NAME).exists():
        raise CheckpointError(f"{name} {_reason_of_repository(name, folder)}")
    absent = _absent_weights(folder, read_config(folder))
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


def only_gguf(name: str, folder: Path) -> str | None:
    """Return the only model in GGUF of a repository that has no others, or None.

    Raises:
        CheckpointError: there are several.
    """
    paths = _paths_on_hub(name, folder)
    if any(path.endswith(".safetensors") for path in paths):
        return None
    return only_model(paths, name)


def download_gguf(name: str, folder: Path, wanted: str) -> Path:
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


def snapshot_here(folder: Path, layers: LayerRange) -> Checkpoint | None:
    """Return the checkpoint of a snapshot if it has the weights of `layers`; ask nobody."""
    config = read_config(folder)
    if not _absent_weights(folder, config):
        return open_checkpoint(folder)
    tensors = _kept_tensors(folder)
    if tensors is None:
        return None
    needed = _files(checkpoint_of(folder, config, tensors).tensors_of(layers))
    if not all((folder / file).exists() for file in needed):
        return None
    return _with_headers(folder, tensors)


def _absent_weights(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """Return the files with weights of the text model that the snapshot lacks, as far as it tells.

    One that another program made, or with the weights of all layers, lacks none.
    """
    if (folder / SINGLE_NAME).exists():
        return []
    if not (folder / INDEX_NAME).exists():
        return [SINGLE_NAME]
    weight_map = read_json(folder / INDEX_NAME).get("weight_map")
    files = of_text(weight_map, config) if isinstance(weight_map, dict) else {}
    names = {str(name) for name in files.values()}
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


def download_texts(name: str, revision: str | None) -> Path:
    """Return the folder of a snapshot, named by its commit, with the small files that the hub has.

    If the hub cannot be reached, those that are here have to do.
    """

    def download() -> str:
        try:
            return _api().snapshot_download(
                name, revision=revision, allow_patterns=list(_TEXT_FILES)
            )
        except errors.IncompleteSnapshotError as exc:
            logger.warning("%s", exc)
            return str(exc.snapshot_path)

    return Path(reporting(name, download))


def _api() -> HfApi:
    return HfApi()
