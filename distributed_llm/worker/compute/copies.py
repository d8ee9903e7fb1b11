"""Measures how fast a GPU is sent what stays in the machine's memory."""

import statistics
import time

import torch

from distributed_llm.worker.devices import synchronize
from distributed_llm.worker.model.device_copies import Copies
from distributed_llm.worker.model.kernels.memory import new_memory

_COPIED_BYTES = 64 << 20
"""Bytes of one copy."""

_ROUNDS = 5


def measure_copies(
    copies: Copies, device: torch.device, *, copied_bytes: int = _COPIED_BYTES
) -> float:
    """Return at how many bytes per second weights are copied to a device; takes some 0.05 s.

    Args:
        copies: to the device.
        device: to wait for.
        copied_bytes: to measure with.

    Raises:
        NotEnoughMemory: memory cannot be locked.
    """
    source, target = new_memory(copied_bytes), copies.buffer(copied_bytes)
    copies.lock(source)
    try:
        taken = [_seconds(copies, source, target, device) for _ in range(_ROUNDS)]
    finally:
        copies.unlock(source)
    return copied_bytes / statistics.median(taken)


def _seconds(
    copies: Copies, source: torch.Tensor, target: torch.Tensor, device: torch.device
) -> float:
    synchronize(device)
    started = time.perf_counter()
    copies.wait(copies.copy(source, target, copies.reached()))
    synchronize(device)
    return max(time.perf_counter() - started, 1e-9)
