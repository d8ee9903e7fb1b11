"""Fingerprints of tensors in files, which tell whether two checkpoints are the same."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from distributed_llm.common.model_files import TensorInfo, ends_early, unreadable

_SAMPLE_BYTES = 4096


def fingerprints_of(
    tensors: Iterable[TensorInfo], path_of: Callable[[str], Path], *, sampled: bool
) -> dict[str, str]:
    """Return, by name, a fingerprint of each tensor.

    It covers dtype, shape and, if `sampled`, the first 4 KiB. It detects a wrong checkpoint, not a
    forged one.

    Args:
        tensors: of some files.
        path_of: returns where a file of this name is.
        sampled: whether the files are read.

    Raises:
        CheckpointError: a file cannot be read.
    """
    by_file: dict[str, list[TensorInfo]] = {}
    for tensor in tensors:
        by_file.setdefault(tensor.file, []).append(tensor)
    prints: dict[str, str] = {}
    for name, own in by_file.items():
        samples = _samples(path_of(name), own) if sampled else [b""] * len(own)
        for tensor, sample in zip(own, samples, strict=True):
            named = f"{tensor.name} {tensor.dtype} {tensor.shape} ".encode()
            prints[tensor.name] = hashlib.sha256(named + sample).hexdigest()
    return prints


def _samples(path: Path, tensors: Iterable[TensorInfo]) -> list[bytes]:
    samples = []
    try:
        with open(path, "rb") as file:
            for tensor in tensors:
                file.seek(tensor.offset)
                samples.append(file.read(min(_SAMPLE_BYTES, tensor.nbytes)))
                if len(samples[-1]) < min(_SAMPLE_BYTES, tensor.nbytes):
                    raise ends_early(path, tensor.name)
    except OSError as exc:
        raise unreadable(path, exc) from exc
    return samples
