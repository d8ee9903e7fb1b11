"""Reads single files of a model: JSON, and headers of safetensors; says what is wrong with them."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from distributed_llm.common.errors import CheckpointError

_MAX_JSON_BYTES = 64 * 1024 * 1024
_BEGINNING_BYTES = 64
_BEGINNINGS: tuple[tuple[tuple[bytes, ...], str], ...] = (
    (
        (b"version https://git-lfs",),
        "is a git-lfs pointer, not the file itself: the model was cloned without git-lfs. Run "
        "`git lfs install` and `git lfs pull` in its folder.",
    ),
    (
        (b"GGUF",),
        "is a GGUF file under another name. Only safetensors are read; use the original model.",
    ),
    (
        (b"PK\x03\x04", b"\x80\x02\x8a", b"\x80\x02}", b"\x80\x04\x95"),
        "was written by torch.save: it is a pickle, under another name, which can run any code "
        "when it is read. Use a version of the model with safetensors.",
    ),
    (
        (b"<!DOCTYPE html", b"<!doctype html", b"<html"),
        "is a web page: what a site answered instead of the file. Download it with `hf download`.",
    ),
)
"""First bytes of files that are something else than their names say, and what to do."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint.

    Attributes:
        file: the safetensors file that holds it, inside the folder.
        dtype: safetensors' name ("BF16").
        offset: of its first byte in the file.
        nbytes: its size in the file, bytes.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in the file at `path`.

    Raises:
        CheckpointError: there is no such file, or it holds something else.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_JSON_BYTES + 1)
    except OSError as exc:
        raise unreadable(path, exc) from exc
    if len(text) > _MAX_JSON_BYTES:
        raise CheckpointError(f"{path} has more than {_MAX_JSON_BYTES} bytes; it is no such file.")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise damaged(path, text[:_BEGINNING_BYTES], exc) from exc
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object. {how_to_replace(path)}")
    return content


def read_header(folder: Path, name: str) -> dict[str, TensorInfo]:
    """Return the tensors of the safetensors file `name` in `folder`, by their names.

    Raises:
        CheckpointError: it is missing or broken, or a name occurs twice.
    """
    path = folder / name
    beginning = b""
    try:
        with open(path, "rb") as file:
            beginning = file.read(_BEGINNING_BYTES)
            with safe_open(path, framework="numpy"):  # checks everything but repeated names
                pass
            (size,) = struct.unpack_from("<Q", beginning)
            file.seek(8)
            header = json.loads(file.read(size), object_pairs_hook=_refuse_repeats)
    except OSError as exc:
        raise unreadable(path, exc) from exc
    except (SafetensorError, ValueError, struct.error) as exc:
        raise damaged(path, beginning, exc) from exc
    header.pop("__metadata__", None)
    return {
        tensor: TensorInfo(
            tensor,
            name,
            info["dtype"],
            tuple(info["shape"]),
            8 + size + info["data_offsets"][0],
            info["data_offsets"][1] - info["data_offsets"][0],
        )
        for tensor, info in header.items()
    }


def check_beginning(path: Path) -> None:
    """Raise if the file at `path` cannot be read, or is something else than its name says.

    Raises:
        CheckpointError: with what it is and what to do.
    """
    try:
        with open(path, "rb") as file:
            beginning = file.read(_BEGINNING_BYTES)
    except OSError as exc:
        raise unreadable(path, exc) from exc
    if not beginning and path.suffix == ".json":
        raise CheckpointError(f"{path} is empty. {how_to_replace(path)}")
    if what := _what_begins_with(beginning):
        raise CheckpointError(f"{path} {what}")


def unreadable(path: Path, exc: OSError) -> CheckpointError:
    """Return the error for a file or folder that the system does not let us read."""
    match exc:
        case FileNotFoundError() if path.is_symlink():
            what = f"is a link to {path.readlink()}, which is not there. {how_to_replace(path)}"
        case FileNotFoundError():
            what = f"is not there. Copy {path.name} of the model to {path.parent}."
        case PermissionError():
            what = (
                f"cannot be read: {exc.strerror or exc}. Allow the user who runs dllm to read it "
                "(chmod), and to enter the folders above it."
            )
        case _:
            what = f"cannot be read: {exc.strerror or exc}. Check the disk or share that it is on."
    return CheckpointError(f"{path} {what}")


def how_to_replace(path: Path) -> str:
    """Return what to do about a broken file; the hub's library keeps those in its cache."""
    if path.parent.parent.name == "snapshots":
        return f"Delete {path.resolve()} and start again: it is then downloaded anew."
    return "Copy or download it again."


def damaged(path: Path, beginning: bytes, exc: Exception) -> CheckpointError:
    """Return the error for a file that could be read, but not parsed."""
    if what := _what_begins_with(beginning):
        return CheckpointError(f"{path} {what}")
    kind = "not a whole safetensors file" if path.suffix == ".safetensors" else "not JSON"
    return CheckpointError(f"{path} is {kind} ({exc}). {how_to_replace(path)}")


def _what_begins_with(beginning: bytes) -> str | None:
    return next((what for starts, what in _BEGINNINGS if beginning.startswith(starts)), None)


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a tensor name occurs twice")
    return content
