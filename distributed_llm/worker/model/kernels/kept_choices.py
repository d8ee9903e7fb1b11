"""Choices that were measured once and are kept for a machine, so that each start is the same."""

import hashlib
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch
from filelock import FileLock, Timeout

from distributed_llm.worker.model.kernels import chosen, native
from distributed_llm.worker.model.kernels.choice import Choice, Kind
from distributed_llm.worker.model.kernels.measuring import measure
from distributed_llm.worker.model.kernels.orders import FLOAT, INT4, INT8

logger = logging.getLogger(__name__)

KERNELS_VARIABLE = "DLLM_KERNELS"
"""Environment variable; with the value "usual" nothing is measured and no file is read."""

_FORMAT = 4
"""To be raised when kernels are added or become faster: what older versions kept is not read."""

_LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "FBGEMM_ENABLE_INSTRUCTIONS", "MKL_CBWR")
"""Environment variables that take instructions from torch's libraries."""

_WAIT_S = 30.0
"""Time that another worker of this machine has to measure, seconds."""


_TOLD_EVERY_S = 2.0
"""Time between two lines about how far measuring has come, seconds."""


class _Kept(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    machine: dict[str, str]
    choices: dict[str, Choice]


def settle(folder: Path, processor: str) -> None:
    """Set this process's choices to those kept for this machine; measure them if there are none.

    Workers that start at the same time wait for the one that measures. A folder that cannot be
    written to is no failure: then each start measures.

    Args:
        folder: of files of choices; made if it is missing.
        processor: the system's name for it.
    """
    if os.environ.get(KERNELS_VARIABLE) == "usual":
        return
    told = _Progress()
    chosen.use(choices_of(folder, machine_of(processor), lambda: measure(on_progress=told)))


class _Progress:
    """Tells the operator how far measuring has come: at its beginning, then now and then."""

    def __init__(self) -> None:
        self._next_at = 0.0

    def __call__(self, done: int, of: int) -> None:
        now = time.monotonic()
        if not done:
            logger.info("first start here: measuring which kernels are the fastest, once")
        elif now >= self._next_at:
            logger.info("measured kernels for %d of %d kinds of weights", done, of)
        else:
            return
        self._next_at = now + _TOLD_EVERY_S


def machine_of(processor: str) -> dict[str, str]:
    """Return what the choice of kernels depends on."""
    return {
        "format": str(_FORMAT),
        "processor": processor,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "native": native.instructions(),
        "limits": " ".join(f"{name}={os.environ.get(name, '')}" for name in _LIMITS),
        "torch": str(torch.__version__),
        "system": f"{platform.system()} {platform.machine()}",
    }


def choices_of(
    folder: Path,
    machine: Mapping[str, str],
    measured: Callable[[], Mapping[Kind, Choice] | None],
) -> dict[str, Choice]:
    """Return the choices kept for a machine, by kind; those that `measured` returns if none are.

    Args:
        folder: see `settle`.
        machine: see `machine_of`.
        measured: measures, or returns None if the machine is too busy for it; not called while
            another process does so.
    """
    path = folder / f"{_digest(machine)}.json"
    if (kept := _read(path, machine)) is not None:
        return kept
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "lock"):
            if (kept := _read(path, machine)) is not None:
                return kept
            choices = _timed(measured)
            if choices is not None:
                _write(path, _Kept(dict(machine), choices))
            return choices or {}
    except Timeout:
        logger.warning(
            "Another process has been measuring the kernels of this machine for %.0f s; this "
            "worker uses the usual ones. Start it again for measured ones.",
            _WAIT_S,
        )
        return {}
    except OSError as exc:
        logger.warning(
            "%s cannot be written to (%s), so the next start measures kernels again. Set "
            "DLLM_CACHE to a folder that can be.",
            *(folder, exc.strerror or exc),
        )
        return _timed(measured) or {}


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock for this context, once no other process does.

    Raises:
        Timeout: another one has held it for too long.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("another worker measures the kernels of this machine: waiting for that")
        lock.acquire(timeout=_WAIT_S)
    try:
        yield
    finally:
        lock.release()


def _timed(measured: Callable[[], Mapping[Kind, Choice] | None]) -> dict[str, Choice] | None:
    started = time.perf_counter()
    choices = measured()
    if choices is None:
        logger.info("this machine is too busy to measure its kernels; the usual ones are used")
        return None
    logger.info("measured the kernels of this machine in %.1f s", time.perf_counter() - started)
    return {str(kind): choice for kind, choice in choices.items()}


def _digest(machine: Mapping[str, str]) -> str:
    return hashlib.sha256(msgspec.json.encode(dict(sorted(machine.items())))).hexdigest()[:32]


def _read(path: Path, machine: Mapping[str, str]) -> dict[str, Choice] | None:
    """Return the choices in a file; None if it is missing, damaged, or another machine's."""
    try:
        kept = msgspec.json.decode(path.read_bytes(), type=_Kept)
    except (OSError, ValueError, RecursionError):
        return None
    if kept.machine != machine or not all(map(_is_known, kept.choices.items())):
        return None
    return kept.choices


def _is_known(choice: tuple[str, Choice]) -> bool:
    """Return whether a kind may be held in the order that was chosen for it."""
    orders: Mapping[str, Collection[str]] = {"float": FLOAT, "int8": INT8, "int4": INT4}
    return choice[1].order in orders.get(choice[0].partition(" ")[0], {})


def _write(path: Path, kept: _Kept) -> None:
    """Write a file that others see whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(kept)))
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
