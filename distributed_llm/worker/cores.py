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
import sys
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

import psutil

from distributed_llm.common.wording import count_text
from distributed_llm.worker import cgroups

_CAPABLE = 0.5
"""Capacity of a large core at least, as a share of the largest core's."""

_SYSTEM = "sys/devices/system/cpu"


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
    logical = psutil.cpu_count() or 1
    if sys.platform == "darwin":
        fast = _sysctl_int("hw.perflevel0.physicalcpu") or _sysctl_int("hw.physicalcpu")
        boot = _sysctl_text("kern.bootsessionuuid")
    else:
        fast, boot = psutil.cpu_count(logical=False), _windows_machine()
        if sys.platform == "win32":
            logical = len(psutil.Process().cpu_affinity() or range(logical))
    threads = max(1, min(fast or logical, logical))
    kind = "performance cores" if sys.platform == "darwin" else "cores"
    return Cores(threads, f"{threads} {kind}, {logical} logical", _hashed(boot) if boot else "")


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


def _sysctl(name: str, size: int) -> bytes:
    buffer, length = ctypes.create_string_buffer(size), ctypes.c_size_t(size)
    libc = ctypes.CDLL(None)
    failed = libc.sysctlbyname(name.encode(), buffer, ctypes.byref(length), None, 0)
    return b"" if failed else buffer.raw[: length.value]


def _sysctl_int(name: str) -> int:
    return int.from_bytes(_sysctl(name, 8), sys.byteorder)


def _sysctl_text(name: str) -> str:
    return _sysctl(name, 256).split(b"\0")[0].decode(errors="replace")


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
