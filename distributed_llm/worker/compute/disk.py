"""Measures the disk that layers stay on which have no room in memory."""

import os
import shutil
import tempfile
import time
from pathlib import Path

from distributed_llm.common.errors import ConfigError
from distributed_llm.common.wording import size_text

_READ_BYTES = 64 << 20
"""Bytes that are written and read to measure a disk."""

_PIECE_BYTES = 4 << 20
"""Bytes of one write or read."""


def measure_disk(folder: Path, wanted_bytes: int, *, read_bytes: int = _READ_BYTES) -> float:
    """Return at how many bytes per second a disk is read; takes about 0.2 s.

    Where the system has no call to forget what it has just written (macOS, Windows), it may read
    that from memory, and the disk looks faster than it is.

    Args:
        folder: on the disk; made if it is not there.
        wanted_bytes: that are going to be written there.
        read_bytes: to measure with.

    Raises:
        ConfigError: the disk has less room, or cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if wanted_bytes > free:
            raise ConfigError(
                f"offload is {size_text(wanted_bytes)}, but the disk of {folder} has "
                f"{size_text(free)} free. Set it to less, make room there, or name another folder "
                "by DLLM_CACHE."
            )
        return _read_rate(folder, read_bytes)
    except OSError as exc:
        raise ConfigError(
            f"offload is set, but {folder} cannot be used: {exc.strerror or exc}. Name another "
            "folder by DLLM_CACHE, or leave offload out."
        ) from exc


def _read_rate(folder: Path, size: int) -> float:
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        piece = bytearray(os.urandom(min(size, _PIECE_BYTES)))
        for _ in range(size // len(piece)):
            file.write(piece)
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        started = time.perf_counter()
        while file.readinto(piece):
            pass
        return size / max(time.perf_counter() - started, 1e-6)
