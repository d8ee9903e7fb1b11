"""Reads single files of a model: JSON, and headers of safetensors; says what is wrong with them."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from distributed_llm.common.errors import CheckpointError, CheckpointUnavailable
from distributed_llm.common.types import Count

_MAX_JSON_BYTES = 64 * 1024 * 1024
_MAX_HEADER_BYTES = 100_000_000
"""Size of a safetensors header at most, as its format says."""

_SIZE_BYTES = 8
"""Bytes before the header of a safetensors file, which say how long it is."""

_ITEM_BITS: Mapping[str, int] = {
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8},
    **{"F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32},
    **{"I64": 64, "U64": 64, "F64": 64, "C64": 64},
}
"""Bits of one number, by safetensors' name of its type."""

_BEGINNING_BYTES = 64
_BEGINNINGS: tuple[tuple[tuple[bytes, ...], str], ...] = (
    (
        (b"version https://git-lfs",),
        "is a git-lfs pointer, not the file itself: the model was cloned without git-lfs. Run "
        "`git lfs install` and `git lfs pull` in its folder.",
    ),
    (
        (b"GGUF",),
        "is a GGUF file under another name. Give that file itself instead of its folder.",
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


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a safetensors header says of one tensor; offsets count from the end of the header."""

    dtype: str
    shape: tuple[Count, ...]
    data_offsets: tuple[Count, Count]


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

    The file is read, not mapped: the system ends a process that touches mapped memory behind which
    there is no file any more, or a disk that fails.

    Raises:
        CheckpointUnavailable: it is shorter than its header says, or cannot be read just now.
        CheckpointError: it is missing or broken, or a name occurs twice.
    """
    path = folder / name
    beginning = b""
    try:
        with open(path, "rb") as file:
            held_bytes = os.fstat(file.fileno()).st_size
            beginning = file.read(_BEGINNING_BYTES)
            if what := _what_begins_with(beginning):
                raise CheckpointError(f"{path} {what}")
            header_bytes = int.from_bytes(beginning[:_SIZE_BYTES], "little")
            if header_bytes > _MAX_HEADER_BYTES or beginning[_SIZE_BYTES:][:1] not in (b"", b"{"):
                raise ValueError("it does not begin with a header")
            file.seek(_SIZE_BYTES)
            content = file.read(header_bytes)
        start = _SIZE_BYTES + header_bytes
        if held_bytes < _SIZE_BYTES or len(content) < header_bytes:
            raise _cut_short(path, held_bytes, "its header alone takes more")
        entries = _entries(content)
        said_bytes = start + _data_bytes(entries)
        if held_bytes > said_bytes:
            raise ValueError(f"it has {held_bytes} bytes, and its header speaks of {said_bytes}")
    except OSError as exc:
        raise unreadable(path, exc) from exc
    except (ValueError, RecursionError) as exc:
        raise damaged(path, beginning, exc) from exc
    if held_bytes < said_bytes:
        raise _cut_short(path, held_bytes, f"its header speaks of {said_bytes}")
    return {
        tensor: TensorInfo(
            tensor,
            name,
            entry.dtype,
            entry.shape,
            start + entry.data_offsets[0],
            entry.data_offsets[1] - entry.data_offsets[0],
        )
        for tensor, entry in entries.items()
    }


def _entries(content: bytes) -> dict[str, _Entry]:
    """Return what a safetensors header says, by tensor.

    Raises:
        ValueError: it is no such header.
        RecursionError: it is nested too deeply to be one.
    """
    header = json.loads(content, object_pairs_hook=_refuse_repeats)
    if isinstance(header, dict):
        header.pop("__metadata__", None)
    return msgspec.convert(header, dict[str, _Entry])


def _data_bytes(entries: Mapping[str, _Entry]) -> int:
    """Return the bytes of all tensors, which have to follow each other without a gap.

    Raises:
        ValueError: they do not, or the size of one does not fit its shape.
    """
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        if entry.dtype not in _ITEM_BITS:
            raise ValueError(f"the numbers of {name} are of the unknown type {entry.dtype!r}")
        start, stop = entry.data_offsets
        if start != end or (stop - start) * 8 != math.prod(entry.shape) * _ITEM_BITS[entry.dtype]:
            raise ValueError(f"the bytes {start} to {stop} cannot be those of {name}")
        end = stop
    return end


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
    kind = CheckpointUnavailable if may_pass(exc) else CheckpointError
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
    return kind(f"{path} {what}")


def may_pass(exc: OSError) -> bool:
    """Return whether what the system refused may be granted later: by a share that is back, say."""
    lasting = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
    return not isinstance(exc, lasting)


def ends_early(path: Path, tensor: str) -> CheckpointUnavailable:
    """Return the error for a file that ends before a tensor that its header speaks of."""
    return CheckpointUnavailable(
        f"{path} ends before the tensor {tensor}, though its header was right a moment ago: "
        f"something is writing it. {how_to_replace(path)}"
    )


def how_to_replace(path: Path) -> str:
    """Return what to do about a broken file; the hub's library keeps those in its cache."""
    if path.parent.parent.name == "snapshots":
        return f"Delete {path.resolve()} and start again: it is then downloaded anew."
    if path.parent.name == "blobs" and path.name.startswith("sha256-"):
        return "It is ollama's: run `ollama rm` and `ollama pull` with the name of the model."
    return "Copy or download it again."


def damaged(path: Path, beginning: bytes, exc: Exception) -> CheckpointError:
    """Return the error for a file that could be read, but not parsed."""
    if what := _what_begins_with(beginning):
        return CheckpointError(f"{path} {what}")
    kind = "not a whole safetensors file" if path.suffix == ".safetensors" else "not JSON"
    return CheckpointError(f"{path} is {kind} ({exc}). {how_to_replace(path)}")


def _cut_short(path: Path, held_bytes: int, why: str) -> CheckpointUnavailable:
    return CheckpointUnavailable(
        f"{path} is not a whole safetensors file (it has {held_bytes} bytes, and {why}): it was "
        f"not copied to its end, or is still being written. {how_to_replace(path)}"
    )


def _what_begins_with(beginning: bytes) -> str | None:
    return next((what for starts, what in _BEGINNINGS if beginning.startswith(starts)), None)


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a tensor name occurs twice")
    return content
