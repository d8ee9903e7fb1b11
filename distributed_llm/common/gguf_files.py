"""Opens models in GGUF files, the format of llama.cpp and ollama.

A GGUF file holds what other models have in a folder: configuration, tokenizer, chat template. A
process that ends (`gguf_texts`) writes these as files to a folder in this user's cache, once per
file, so that all others read them as those of any model. The weights stay where they are. Nothing
here parses GGUF.
"""

import contextlib
import hashlib
import importlib.metadata
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import msgspec

from distributed_llm.common.cache_folder import CACHE_VARIABLE, cache_folder
from distributed_llm.common.checkpoint import Checkpoint, checkpoint_of
from distributed_llm.common.errors import CheckpointError, UnsupportedModel
from distributed_llm.common.model_files import (
    TensorInfo,
    check_beginning,
    read_json,
    unreadable,
)
from distributed_llm.common.other_formats import CONFIG_NAME

TENSORS_NAME = "tensors.json"
"""File of the texts that names the weights, and where they stand in the GGUF files."""

REFUSAL_NAME = "refusal.json"
"""File that stands there instead, if the model cannot be served."""

SUFFIX = ".gguf"

_VERSION = 2
"""Of the texts; another number has all written anew."""

_MAGIC = b"GGUF"
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_PROJECTOR = re.compile(r"(^|[._-])mmproj([._-]|$)", re.IGNORECASE)
_TIMEOUT_S = 300.0
_MAX_PARTS = 1000
_MAX_MODELS = 16
"""Models whose texts are kept: up to 40 MB each."""

_ABANDONED_S = 24 * 3600.0
"""Age at which texts that were never finished are deleted."""

_SHOWN_NAMES = 12

logger = logging.getLogger(__name__)


class Refusal(msgspec.Struct, frozen=True):
    """Why files cannot be served.

    Attributes:
        message: for people, without the file's name.
        unsupported: whether they are as they should be, but of a kind that is not read.
    """

    message: str
    unsupported: bool


def is_gguf(path: Path) -> bool:
    """Return whether `path` is a GGUF file, whatever its name, or a file that is called one."""
    try:
        with open(path, "rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC or path.suffix.lower() == SUFFIX
    except (OSError, ValueError):
        return False


def models_among(names: Collection[str]) -> list[str]:
    """Return the GGUF files among `names` that are models, of several parts only the first.

    Projectors are left out: they turn pictures into what a model reads.
    """
    found = []
    for name in sorted(names):
        part = _PART.fullmatch(name)
        first = part is None or int(part["number"]) == 1
        if name.lower().endswith(SUFFIX) and first and not _PROJECTOR.search(Path(name).name):
            found.append(name)
    return found


def only_model(names: Collection[str], folder: str) -> str | None:
    """Return the GGUF file of the only model among the files in a folder, or None if none is there.

    Raises:
        CheckpointError: there are several, with their names.
    """
    models = models_among(names)
    if len(models) > 1:
        shown = ", ".join(models[:_SHOWN_NAMES]) + ", ..." * (len(models) > _SHOWN_NAMES)
        raise CheckpointError(
            f"{folder} holds several models in GGUF: {shown}. Give one of them: "
            f"{folder}{'' if folder.endswith(('/', os.sep)) else '/'}{models[0]}."
        )
    return models[0] if models else None


def parts_of(name: str) -> list[str]:
    """Return the names of all files of a model, of which `name` is one."""
    part = _PART.fullmatch(name)
    if part is None:
        return [name]
    count = min(int(part["count"]), _MAX_PARTS)
    suffix = name[-len(SUFFIX) :]
    return [f"{part['stem']}-{n:05}-of-{part['count']}{suffix}" for n in range(1, count + 1)]


def open_gguf(path: Path) -> Checkpoint:
    """Return the model in a GGUF file, or in the files of which this is one part.

    Raises:
        CheckpointUnavailable: a file cannot be read just now.
        CheckpointError: it is not whole, or of a kind that is not read; with what to do.
    """
    files = [path.parent / name for name in parts_of(path.name)]
    for file in files:
        _check_beginning(file)
    with _storing():
        folder = _texts(files)
    tensors = _read_tensors(folder)
    return checkpoint_of(folder, read_json(folder / CONFIG_NAME), tensors, files[0].parent)


def _check_beginning(file: Path) -> None:
    """Raise if a file is not there, or is no GGUF file whatever it is called."""
    try:
        with open(file, "rb") as opened:
            if opened.read(len(_MAGIC)) == _MAGIC:
                return
    except OSError as exc:
        raise unreadable(file, exc) from exc
    check_beginning(file)
    raise CheckpointError(f"{file} is no GGUF file: it does not begin as one. Download it again.")


def _texts(files: Sequence[Path]) -> Path:
    """Return the folder with the texts of a model; write them if they are not there yet."""
    root = cache_folder() / "gguf"
    folder = root / _key(files)
    if (folder / TENSORS_NAME).is_file():
        os.utime(folder)
        return folder
    logger.info("reading %s: its configuration and tokenizer, once", files[0])
    root.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix="tmp-", dir=root))
    try:
        _write_texts(files, made)
        with contextlib.suppress(OSError):  # another process was faster
            made.rename(folder)
        if not (folder / TENSORS_NAME).is_file():  # half of one, which someone has touched
            shutil.rmtree(folder, ignore_errors=True)
            made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    _delete_old(root, folder)
    return folder


def _key(files: Sequence[Path]) -> str:
    """Return a name for the texts of files as they are now.

    Raises:
        CheckpointError: one is missing.
    """
    versions = [importlib.metadata.version(name) for name in ("transformers", "gguf", "tokenizers")]
    said = [f"{_VERSION} {versions}"]
    for file in files:
        try:
            stat = file.stat()
        except OSError as exc:
            raise unreadable(file, exc) from exc
        said.append(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(said).encode(errors="surrogateescape")).hexdigest()[:32]


def _run(files: Sequence[Path], out: Path) -> "subprocess.CompletedProcess[bytes]":
    """Run the process that writes the texts of files to the folder `out`.

    Raises:
        CheckpointError: it takes too long.
    """
    command = [sys.executable, "-m", "distributed_llm.gguf_texts", str(out), *map(str, files)]
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
    try:
        return subprocess.run(  # noqa: S603
            command,
            env=os.environ | quiet,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        raise CheckpointError(
            f"{files[0]} could not be read in {_TIMEOUT_S:.0f} s: this machine is very busy, or "
            "the file claims to have more in it than any model has. Try another file."
        ) from exc


def _write_texts(files: Sequence[Path], out: Path) -> None:
    done = _run(files, out)
    if (out / REFUSAL_NAME).is_file():
        refusal = msgspec.json.decode((out / REFUSAL_NAME).read_bytes(), type=Refusal)
        kind = UnsupportedModel if refusal.unsupported else CheckpointError
        raise kind(f"{files[0]} {refusal.message}")
    if done.returncode or not (out / TENSORS_NAME).is_file():
        said = done.stderr.decode(errors="replace").strip()
        logger.debug("gguf_texts: %s", said)
        raise CheckpointError(
            f"{files[0]} cannot be read: the process that reads it ended with exit code "
            f"{done.returncode}. The file is damaged, or of a kind that transformers does not know "
            "yet: use another file, or a folder with the original model."
        )


def _read_tensors(folder: Path) -> dict[str, TensorInfo]:
    content = (folder / TENSORS_NAME).read_bytes()
    return msgspec.json.decode(content, type=dict[str, TensorInfo])


def _delete_old(root: Path, keep: Path) -> None:
    """Delete the texts of the models that were opened the longest time ago."""
    finished, now = [], time.time()
    for folder in root.iterdir():
        with contextlib.suppress(OSError):
            opened = folder.stat().st_mtime
            if not folder.name.startswith("tmp-"):
                finished.append((opened, folder))
            elif now - opened > _ABANDONED_S:
                shutil.rmtree(folder, ignore_errors=True)
    for _, folder in sorted(finished, reverse=True)[_MAX_MODELS:]:
        if folder != keep:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _storing() -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise CheckpointError(
            f"What is in the GGUF file cannot be stored in {cache_folder()}: {exc}. Free some "
            f"space, or set {CACHE_VARIABLE} to a folder that can be written."
        ) from exc
