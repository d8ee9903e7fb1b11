"""Measures this machine: device, memory, memory bandwidth and arithmetic throughput.

Memory bandwidth limits decoding, because each step reads every weight once; arithmetic throughput
limits prefill.
"""

import ctypes
import functools
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from distributed_llm.common.errors import ConfigError
from distributed_llm.common.messages import Capabilities
from distributed_llm.common.wording import size_text
from distributed_llm.worker import cgroups, devices
from distributed_llm.worker.session.events import Probe, Probed

_USABLE_SHARE = 0.8
"""Share of the free memory that a worker uses if no limit is set."""

_LABEL_CHARS = 256
_MAX_THREADS = 65536

_NO_LIMIT_BYTES = 2**60
"""Limits from here on are none: cgroups write "no limit" as a number near 2**63."""

_READ_ROWS = {"cpu": 4096, "cuda": 16384, "xpu": 16384, "mps": 8192}
_READ_COLUMNS = 8192
"""Shape of the float32 matrix that is read to measure bandwidth: 128 MiB and more, by device."""

_FEWEST_READ_ROWS = 1024
"""Rows of this matrix at least: 32 MiB; a smaller one would stay in the caches."""

_PROBE_SHARE = 0.1
"""Share of the free memory that this matrix takes at most."""

_MATMUL_SIZE = {"cpu": 1024, "cuda": 4096, "xpu": 4096, "mps": 2048}
"""Rows and columns of the matrices that are multiplied to measure throughput, by device."""

_DTYPE_MATMUL_SIZE = 256
"""Rows and columns of the matrices that are multiplied to find the faster dtype."""

_BUDGET_S = 0.06
"""Time for each measurement at the start of a worker, seconds."""

_SHORT_BUDGET_S = 0.01
"""Time for each measurement of a worker without layers, seconds."""

_MAX_ROUNDS = 25
"""How often a measurement is repeated at most."""


def measure(
    device: str, *, threads: int, max_memory_bytes: int | None, shares: str = ""
) -> Capabilities:
    """Measure this machine; takes about 0.4 s and 128 MiB.

    Args:
        device: "auto" or "fastest" (the first GPU, else the CPU), "cpu", "cuda", "cuda:1" or "mps".
        threads: CPU threads to measure with; torch's own setting is restored afterwards.
        max_memory_bytes: limit for the worker; never more than 80 % of what is free are used.
        shares: stands for the cores of these threads, as in `Cores`.

    Raises:
        ConfigError: the device does not exist, has less memory than `max_memory_bytes`, or
            `threads` is out of range.
    """
    if not 1 <= threads <= _MAX_THREADS:
        raise ConfigError(f"threads = {threads}; it must be between 1 and {_MAX_THREADS}.")
    torch_device = resolve_device(device)
    memory_bytes = _budget(torch_device, max_memory_bytes)
    shape = _read_shape(torch_device, _READ_ROWS[torch_device.type])
    bandwidth, flops = _speeds(torch_device, threads, shape, _BUDGET_S)
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return Capabilities(
        device=str(torch_device),
        device_name=_device_name(torch_device)[:_LABEL_CHARS],
        platform=f"{system}, {versions}"[:_LABEL_CHARS],
        memory_bytes=memory_bytes,
        cores=min(os.cpu_count() or 1, _MAX_THREADS),
        threads=threads,
        shares=shares if torch_device.type == "cpu" else "",
        memory_bandwidth_bytes_per_s=bandwidth,
        flops_per_s=flops,
        bfloat16=devices.computes_in_bfloat16(torch_device),
    )


def remeasure(order: Probe, capabilities: Capabilities, *, slowdown: float) -> Probed:
    """Measure the machine's speed again; takes about 0.05 s and half the memory of `measure`.

    Its memory is what other programs leave it now, and never more than at the start.

    Args:
        order: to answer.
        capabilities: at the start; with the device and threads to measure with.
        slowdown: the measured speeds are divided by this.
    """
    device = torch.device(capabilities.device)
    shape = _read_shape(device, _READ_ROWS[device.type] // 2)
    bandwidth, flops = _speeds(device, capabilities.threads, shape, _SHORT_BUDGET_S)
    memory_bytes = min(capabilities.memory_bytes, usable_memory_bytes(device))
    return Probed(order.session, bandwidth / slowdown, flops / slowdown, memory_bytes)


def resolve_device(device: str) -> torch.device:
    """Return the torch device of a setting; "auto" and "fastest": the first GPU, else the CPU.

    Raises:
        ConfigError: there is no such device; the message lists those there are.
    """
    present = devices.present()
    if device in ("auto", "fastest"):
        return torch.device(present[0])
    name = f"{device}:0" if device in ("cuda", "xpu") else device
    if name not in present:
        raise ConfigError(
            f"There is no device {device[:_LABEL_CHARS]!r} here. Present are: "
            f"{', '.join(present)}. For a GPU that is missing, check its driver and that torch "
            f"{torch.__version__} was built for it."
        )
    return torch.device(name)


# ------------------------------------------------------------------ memory


def _budget(device: torch.device, max_memory_bytes: int | None) -> int:
    free, total = _memory(device)
    usable = int(free * _USABLE_SHARE)
    if max_memory_bytes is None:
        return usable
    if not 0 < max_memory_bytes <= total:
        raise ConfigError(
            f"max_memory is {size_text(max_memory_bytes)}, but {device} has {size_text(total)} in "
            "all. Set it between 1 byte and that, or leave it out to use 80 % of what is free."
        )
    return min(usable, max_memory_bytes)


def usable_memory_bytes(device: torch.device) -> int:
    """Return how many bytes a worker uses of a device's free memory if no limit is set."""
    return int(free_memory_bytes(device) * _USABLE_SHARE)


def free_memory_bytes(device: torch.device) -> int:
    """Return how many bytes of memory this process could still allocate on `device`."""
    return _memory(device)[0]


def _memory(device: torch.device) -> tuple[int, int]:
    """Return (free, total) bytes of memory for this process on `device`."""
    if (own := devices.own_memory(device)) is not None:
        return own
    ram = psutil.virtual_memory()
    free, total = ram.available, ram.total
    for limit, used in _cgroup_limits(Path("/")):
        free, total = min(free, max(limit - used, 0)), min(total, limit)
    if device.type == "mps":  # unified: the GPU may use a part of the RAM
        total = min(total, torch.mps.recommended_max_memory())
        free = min(free, total - torch.mps.driver_allocated_memory())
    return max(free, 0), total


def _cgroup_limits(root: Path) -> list[tuple[int, int]]:
    """Return (limit, used) bytes of each memory cgroup that this process is in; Linux only.

    Page cache that the kernel would give back does not count as used.
    """
    limits = []
    for kind, folder in cgroups.folders(root, "memory"):
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        if kind == cgroups.UNIFIED:
            names = ("memory.max", "memory.current")
        limit, used = (cgroups.read_int(folder / name) for name in names)
        if limit is not None and limit < _NO_LIMIT_BYTES:
            limits.append((limit, max((used or 0) - _reclaimable(folder), 0)))
    return limits


def _reclaimable(folder: Path) -> int:
    try:
        words = (folder / "memory.stat").read_text().split()
        return int(words[words.index("inactive_file") + 1])
    except (OSError, ValueError, IndexError):
        return 0


# ------------------------------------------------------------------ speed


def _speeds(
    device: torch.device, threads: int, shape: tuple[int, int], budget_s: float
) -> tuple[float, float]:
    """Return the memory bandwidth in bytes per second, and operations per second.

    Args:
        device: to measure.
        threads: CPU threads to measure with.
        shape: of the matrix to read.
        budget_s: time for each measurement, beside the first two rounds.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _bandwidth(device, shape, budget_s), _flops(device, budget_s)
    finally:
        torch.set_num_threads(before)


def _read_shape(device: torch.device, rows: int) -> tuple[int, int]:
    """Return the shape of the matrix to read, with fewer rows where little memory is free."""
    fitting = int(free_memory_bytes(device) * _PROBE_SHARE) // (4 * _READ_COLUMNS)
    return min(rows, max(_FEWEST_READ_ROWS, fitting)), _READ_COLUMNS


def _bandwidth(device: torch.device, shape: tuple[int, int], budget_s: float) -> float:
    """Return bytes per second of reading a matrix too large for the caches, as decoding does."""
    rows, columns = shape
    matrix = torch.ones(rows, columns, dtype=torch.float32, device=device)
    vector = torch.ones(columns, dtype=torch.float32, device=device)
    seconds = _median_seconds(device, lambda: torch.mv(matrix, vector), budget_s)
    return matrix.numel() * matrix.element_size() / seconds


def _flops(device: torch.device, budget_s: float) -> float:
    """Return operations per second of multiplying matrices, in the fastest dtype."""
    size = _MATMUL_SIZE[device.type]
    return 2.0 * size**3 / _matmul_seconds(device, _faster_dtype(device), size, budget_s)


@functools.cache  # depends on the hardware alone, but measurements are noisy
def _faster_dtype(device: torch.device) -> torch.dtype:
    """Return the fastest dtype for matrices: some CPUs and GPUs only emulate bfloat16."""
    kinds = [torch.float32]
    if devices.computes_in_bfloat16(device):
        kinds.append(torch.bfloat16)
    if device.type != "cpu":
        kinds.append(torch.float16)
    seconds = {kind: _matmul_seconds(device, kind, _DTYPE_MATMUL_SIZE, _BUDGET_S) for kind in kinds}
    return min(seconds, key=lambda kind: seconds[kind])


def _matmul_seconds(device: torch.device, dtype: torch.dtype, size: int, budget_s: float) -> float:
    left = torch.ones(size, size, dtype=dtype, device=device)
    return _median_seconds(device, lambda: left @ left, budget_s)


def _median_seconds(device: torch.device, work: Callable[[], object], budget_s: float) -> float:
    """Return the median time of `work` after one round of warming up, in about `budget_s`."""
    _timed(device, work)
    rounds = [_timed(device, work)]
    while sum(rounds) < budget_s and len(rounds) < _MAX_ROUNDS:
        rounds.append(_timed(device, work))
    return statistics.median(rounds)


def _timed(device: torch.device, work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    devices.synchronize(device)
    return max(time.perf_counter() - start, 1e-9)


# ------------------------------------------------------------------ names


def _device_name(device: torch.device) -> str:
    if gpu := devices.name_of_gpu(device):
        return gpu
    try:
        name = _cpu_name()
    except (OSError, ValueError, AttributeError):  # only a name: never worth a failure
        name = ""
    return name or platform.machine() or "CPU"


def _cpu_name() -> str:
    """Return the operating system's name for the processor; empty if it has none."""
    if sys.platform == "win32":
        import winreg

        path = r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, path) as key:
            return str(winreg.QueryValueEx(key, "ProcessorNameString")[0]).strip()
    if sys.platform == "darwin":
        buffer = ctypes.create_string_buffer(_LABEL_CHARS)
        size = ctypes.c_size_t(len(buffer))
        key = b"machdep.cpu.brand_string"
        ctypes.CDLL(None).sysctlbyname(key, buffer, ctypes.byref(size), None, 0)
        return buffer.value.decode(errors="replace")
    return _linux_cpu_name(Path("/"))


def _linux_cpu_name(root: Path) -> str:
    lines = (root / "proc/cpuinfo").read_text(errors="replace").splitlines()
    fields = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    for key in ("model name", "Model", "Hardware", "cpu"):
        if fields.get(key):
            return fields[key]
    if part := fields.get("CPU part"):  # ARM's have numbers only
        return f"{platform.machine()} {fields.get('CPU implementer', '')} {part}"
    return ""
