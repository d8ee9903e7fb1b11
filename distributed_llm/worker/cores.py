"""The cores that a worker computes with: how many threads are worth having, and who shares them.

A product of matrices is done when its slowest thread is. A second thread on a core has no
arithmetic of its own, one on a small core makes the others wait for it, and one beyond the
container's quota stops all of them until the next period.
"""

import ctypes
import hashlib
import math
import os
import socket
import struct
import sys
from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path

import psutil

from distributed_llm.common.wording import count_text
from distributed_llm.worker import cgroups

_CAPABLE = 0.5
"""Capacity of a large core at least, as a share of the largest core's."""

_SYSTEM = "sys/devices/system/cpu"

_CORES = 0
"""`RelationProcessorCore`: Windows tells of each core."""

_RECORD = struct.Struct("<IIBB22xQH6x")
"""A core, for Windows: relationship, size, flags, efficiency class, mask of CPUs, their group."""


@dataclass(frozen=True)
class Cores:
    """The cores that a worker may compute with.

    Attributes:
        threads: that it is best to have, at least 1.
        reason: how it comes to that number, for people.
        shares: stands for these cores: two workers with the same text share them. It tells nothing
            about machine or user. Empty if that cannot be known.
    """

    threads: int
    reason: str
    shares: str


def own_cores() -> Cores:
    """Return the cores of this process."""
    if sys.platform == "linux":
        return linux_cores(Path("/"), os.sched_getaffinity(0), socket.gethostname())
    if sys.platform == "darwin":
        return apple_cores(_sysctl, psutil.cpu_count() or 1)
    if sys.platform == "win32":
        allowed = set(psutil.Process().cpu_affinity() or range(psutil.cpu_count() or 1))
        return windows_cores(_windows_processors(), allowed, _windows_machine())
    threads = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    return Cores(threads, count_text(threads, "core"), "")


def apple_cores(sysctl: Callable[[str], bytes], logical: int) -> Cores:
    """Return the performance cores of a Mac.

    Args:
        sysctl: returns what the system knows under a name; empty: nothing.
        logical: CPUs.
    """
    fast, all_cores = (
        int.from_bytes(sysctl(name), sys.byteorder)
        for name in ("hw.perflevel0.physicalcpu", "hw.physicalcpu")
    )
    threads = max(1, min(fast or all_cores or logical, logical))
    boot = sysctl("kern.bootsessionuuid").split(b"\0")[0].decode(errors="replace")
    kind = "performance core" if fast else "core"
    reason = f"{count_text(threads, kind)}, {logical} logical"
    return Cores(threads, reason, _hashed(boot) if boot else "")


def windows_cores(processors: bytes, allowed: Set[int], machine: str) -> Cores:
    """Return the cores of this process on Windows.

    Args:
        processors: `PROCESSOR_RELATIONSHIP` records, as `GetLogicalProcessorInformationEx` writes
            them.
        allowed: numbers of the logical CPUs that it may run on; all are of the first group.
        machine: a text that no other machine has; empty: unknown.
    """
    cores: dict[int, list[set[int]]] = {}  # by how fast: Windows' efficiency class
    start = 0
    while start + _RECORD.size <= len(processors):
        _, size, _, speed, mask, group = _RECORD.unpack_from(processors, start)
        own = {cpu for cpu in allowed if not group and mask >> cpu & 1}
        if own:
            cores.setdefault(speed, []).append(own)
        start += max(size, _RECORD.size)
    fast = cores[max(cores)] if cores else [{cpu} for cpu in allowed]
    reason = f"{count_text(len(allowed), 'logical CPU')} allowed"
    if len(cores) > 1:
        reason += f", {sum(map(len, fast))} of them on large cores"
    if len(fast) < sum(map(len, fast)):
        reason += f", which are {count_text(len(fast), 'core')}"
    numbers = ",".join(map(str, sorted(set().union(*fast))))
    shares = _hashed(machine, numbers) if machine else ""
    return Cores(max(1, len(fast)), reason, shares)


def linux_cores(root: Path, allowed: Set[int], hostname: str) -> Cores:
    """Return the cores of this process on Linux.

    Args:
        root: of the file system.
        allowed: numbers of the logical CPUs that it may run on.
        hostname: tells containers on one machine apart.
    """
    fast = _large(root, allowed) or allowed
    cores = {_siblings(root, cpu) for cpu in fast}
    quota = _quota(root)
    threads = max(1, len(cores))
    reason = f"{count_text(len(allowed), 'logical CPU')} allowed"
    if len(fast) < len(allowed):
        reason += f", {len(fast)} of them on large cores"
    if len(cores) < len(fast):
        reason += f", which are {count_text(len(cores), 'core')}"
    if quota is not None and math.ceil(quota) < threads:
        threads = max(1, math.ceil(quota))
        reason += f"; the container's quota is {quota:g}"
    else:
        hostname = ""  # other containers may run on the same cores
    boot = _text(root / "proc/sys/kernel/random/boot_id")
    numbers = ",".join(map(str, sorted(fast)))
    return Cores(threads, reason, _hashed(boot, hostname, numbers) if boot else "")


def _large(root: Path, allowed: Set[int]) -> Set[int]:
    """Return which CPUs are on large cores; all, if there is but one kind."""
    performance = _text(root / "sys/devices/cpu_core/cpus")  # Intel's hybrid processors
    if performance:
        return allowed & _numbers(performance)
    capacity = {
        cpu: cgroups.read_int(root / _SYSTEM / f"cpu{cpu}/cpu_capacity") or 0 for cpu in allowed
    }
    largest = max(capacity.values(), default=0)
    return {cpu for cpu in allowed if capacity[cpu] >= _CAPABLE * largest}


def _siblings(root: Path, cpu: int) -> frozenset[int]:
    """Return the logical CPUs on the core of this one."""
    siblings = _numbers(_text(root / _SYSTEM / f"cpu{cpu}/topology/thread_siblings_list"))
    return frozenset(siblings | {cpu})


def _quota(root: Path) -> float | None:
    """Return the smallest number of cores whose time a container of this process may use."""
    quotas = []
    for kind, folder in cgroups.folders(root, "cpu"):
        if kind == cgroups.UNIFIED:
            words = _text(folder / "cpu.max").split()
        else:
            files = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            words = [_text(folder / name) for name in files]
        if len(words) == 2 and all(word.isdecimal() for word in words) and int(words[1]):
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def _numbers(text: str) -> set[int]:
    """Return the numbers in a list like "0-3,8"; none if it is no such list."""
    numbers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first.isdecimal() and (last or first).isdecimal():
            numbers.update(range(int(first), int(last or first) + 1))
    return numbers


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _hashed(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _sysctl(name: str) -> bytes:
    buffer, length = ctypes.create_string_buffer(256), ctypes.c_size_t(256)
    libc = ctypes.CDLL(None)
    failed = libc.sysctlbyname(name.encode(), buffer, ctypes.byref(length), None, 0)
    return b"" if failed else buffer.raw[: length.value]


def _windows_processors() -> bytes:
    """Return what Windows tells of the cores of this machine; empty if it tells nothing."""
    if sys.platform != "win32":
        return b""
    size = ctypes.c_uint32()
    kernel = ctypes.WinDLL("kernel32")
    kernel.GetLogicalProcessorInformationEx(_CORES, None, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    told = kernel.GetLogicalProcessorInformationEx(_CORES, buffer, ctypes.byref(size))
    return buffer.raw[: size.value] if told else b""


def _windows_machine() -> str:
    """Return the random number that Windows gave this machine; empty if it has none."""
    if sys.platform != "win32":
        return ""
    import winreg

    try:
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, r"SOFTWARE\Microsoft\Cryptography") as key:
            return str(winreg.QueryValueEx(key, "MachineGuid")[0])
    except OSError:
        return ""
