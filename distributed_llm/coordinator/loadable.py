"""Asks whether workers could load a checkpoint, which only they can tell: it takes torch.

A process that ends (`load_check`) makes the model without weights and lays the tensors' names and
shapes beside it. What it found to be right is remembered in this user's cache.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from distributed_llm.common.cache_folder import cache_folder
from distributed_llm.common.checkpoint import Checkpoint
from distributed_llm.common.errors import error_from_wire
from distributed_llm.common.model_files import TensorInfo

_PACKAGES = ("distributedllm", "transformers", "torch")
"""Another version of one of them may find something else."""

_TIMEOUT_S = 300.0
_MAX_REMEMBERED = 64

logger = logging.getLogger(__name__)


class Asked(msgspec.Struct, frozen=True):
    """A checkpoint, as its attributes say; paths are texts."""

    folder: str
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    files: str | None
    served_context: int | None

    @classmethod
    def about(cls, checkpoint: Checkpoint) -> "Asked":
        """Return the question about a checkpoint."""
        return cls(
            folder=str(checkpoint.folder),
            config=dict(checkpoint.config),
            tensors=dict(checkpoint.tensors),
            files=None if checkpoint.files is None else str(checkpoint.files),
            served_context=checkpoint.served_context,
        )

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint that this is about."""
        return Checkpoint(
            folder=Path(self.folder),
            config=self.config,
            tensors=self.tensors,
            files=None if self.files is None else Path(self.files),
            served_context=self.served_context,
        )


class Verdict(msgspec.Struct, frozen=True):
    """What was found.

    Attributes:
        code: of the error with which loading would end; empty: of none.
        message: of it.
    """

    code: str = ""
    message: str = ""


def as_json(value: Asked | Verdict) -> bytes:
    """Return JSON as Python writes it: msgspec knows no infinity, and no path that is not UTF-8."""
    return json.dumps(msgspec.to_builtins(value)).encode()


def ensure_loadable(checkpoint: Checkpoint, tell: Callable[[str], None] = logger.info) -> None:
    """Refuse a checkpoint that workers could not load; of its weights only small parts are read.

    Takes some seconds, the first time. Where the question cannot be answered, it is left to the
    workers, and the log says so.

    Args:
        tell: called with a line for people, if it has to be asked.

    Raises:
        CheckpointError: tensors are missing, unknown, of the wrong shape, or contradict others.
        UnsupportedModel: the architecture gives wrong results when it is split.
    """
    asked = as_json(Asked.about(checkpoint))
    memory = cache_folder() / "loadable.json"
    key = _key(asked, checkpoint)
    known = _remembered(memory)
    if key in known:
        return
    tell(f"checking whether workers can load {checkpoint.place}")
    verdict = _answer(asked, checkpoint)
    if verdict is None:
        return
    if verdict.code:
        raise error_from_wire(verdict.code, verdict.message, 0.0)
    _remember(memory, [*known, key][-_MAX_REMEMBERED:])


def _answer(asked: bytes, checkpoint: Checkpoint) -> Verdict | None:
    """Return what the process says; None, and the log says why, if it says nothing."""
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "distributed_llm.load_check"],
            env=os.environ | quiet,
            input=asked,
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        why = f"it took more than {_TIMEOUT_S:.0f} s"
    else:
        if done.returncode == 0:
            return msgspec.convert(json.loads(done.stdout), Verdict)
        said = done.stderr.decode(errors="replace").strip().splitlines()
        why = f"exit code {done.returncode}" + "".join(f": {line}" for line in said[-1:])
    logger.warning(
        "whether workers can load %s could not be checked (%s); they check it when they load it",
        checkpoint.place,
        why,
    )
    return None


def _key(asked: bytes, checkpoint: Checkpoint) -> str:
    """Return a name for a question about files as they are now, and who answers it."""
    said = [*map(importlib.metadata.version, _PACKAGES)]
    for file in sorted({tensor.file for tensor in checkpoint.tensors.values()}):
        with contextlib.suppress(OSError):  # one of the hub, which is not here yet
            stat = checkpoint.path_of(file).stat()
            said.append(f"{file} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(said).encode(errors="surrogateescape") + asked).hexdigest()


def _remembered(memory: Path) -> list[str]:
    try:
        return msgspec.json.decode(memory.read_bytes(), type=list[str])
    except (OSError, ValueError):  # none yet, or damaged
        return []


def _remember(memory: Path, keys: list[str]) -> None:
    """Keep which checkpoints were found to be right; without a disk for it, ask again next time."""
    written = memory.with_name(f"{memory.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        written.write_bytes(msgspec.json.encode(keys))
        os.replace(written, memory)
