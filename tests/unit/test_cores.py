"""How many threads a worker has, on made-up machines; and with whom it shares its cores."""

import struct
import sys
from pathlib import Path

import pytest

from distributed_llm.common.waiting_threads import limit_active_waiting
from distributed_llm.worker.cores import Cores, apple_cores, linux_cores, own_cores, windows_cores

CPU = "sys/devices/system/cpu"
BOOT = {"proc/sys/kernel/random/boot_id": "2f0a"}


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, content in (BOOT | files).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")
    return root


def pairs(count: int, first: int = 0) -> dict[str, str]:
    """Return cores with two logical CPUs each, n and n + 1."""
    return {
        f"{CPU}/cpu{cpu}/topology/thread_siblings_list": f"{cpu // 2 * 2}-{cpu // 2 * 2 + 1}"
        for cpu in range(first, first + 2 * count)
    }


def cores(root: Path, count: int, hostname: str = "pc") -> Cores:
    return linux_cores(root, set(range(count)), hostname)


def test_nothing_is_known_of_the_machine(tmp_path: Path) -> None:
    assert cores(tmp_path, 6) == Cores(6, "6 logical CPUs allowed", "")


def test_two_logical_cpus_on_a_core_count_once(tmp_path: Path) -> None:
    found = cores(tree(tmp_path, pairs(4)), 8)
    assert (found.threads, found.reason) == (4, "8 logical CPUs allowed, which are 4 cores")
    assert linux_cores(tmp_path, {1, 2, 3}, "pc").threads == 2, "of one core only half is allowed"


def test_efficient_cores_of_intel_are_left_out(tmp_path: Path) -> None:
    files = pairs(2) | {"sys/devices/cpu_core/cpus": "0-3", "sys/devices/cpu_atom/cpus": "4-11"}
    found = cores(tree(tmp_path, files), 12)
    assert found.threads == 2
    assert "12 logical CPUs allowed, 4 of them on large cores, which are 2 cores" in found.reason
    assert linux_cores(tmp_path, {5, 6, 7}, "pc").threads == 3, "where there are no others"


def test_little_cores_of_arm_are_left_out(tmp_path: Path) -> None:
    capacities = [1024, 1024, 870, 870, 290, 290, 290, 290]
    files = {f"{CPU}/cpu{cpu}/cpu_capacity": str(size) for cpu, size in enumerate(capacities)}
    assert cores(tree(tmp_path, files), 8).threads == 4


@pytest.mark.parametrize(
    ("files", "threads"),
    [
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "250000 100000"}, 3),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, 8),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "6400000 100000"}, 8),
        (
            {
                "proc/self/cgroup": "0::/a/b",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000",
                "sys/fs/cgroup/a/cpu.max": "200000 100000",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/x",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "200000",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            2,
        ),
    ],
)
def test_no_more_than_the_quota_of_the_container(
    tmp_path: Path, files: dict[str, str], threads: int
) -> None:
    found = cores(tree(tmp_path, files), 8)
    assert found.threads == threads
    assert ("quota" in found.reason) == (threads < 8)


def test_who_shares_cores(tmp_path: Path) -> None:
    shares = cores(tree(tmp_path, {}), 4).shares
    assert shares
    assert shares == cores(tmp_path, 4, "a-container").shares
    assert shares != linux_cores(tmp_path, {4, 5}, "pc").shares, "other cores"
    assert shares != cores(tree(tmp_path / "x", {next(iter(BOOT)): "77"}), 4).shares
    limited = tree(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "100000 100000"})
    names = ("one", "other")
    assert len({cores(limited, 4, name).shares for name in names}) == 2, "each has its quota"


def test_performance_cores_of_a_mac() -> None:
    known = {
        "hw.perflevel0.physicalcpu": (4).to_bytes(4, sys.byteorder),
        "hw.physicalcpu": (10).to_bytes(4, sys.byteorder),
        "kern.bootsessionuuid": b"A-B\0",
    }
    found = apple_cores(lambda name: known.get(name, b""), 10)
    assert (found.threads, found.reason) == (4, "4 performance cores, 10 logical")
    assert found.shares
    del known["hw.perflevel0.physicalcpu"]  # a Mac of Intel's has but one kind
    known["hw.physicalcpu"] = (2).to_bytes(4, sys.byteorder)
    assert apple_cores(lambda name: known.get(name, b""), 4).reason == "2 cores, 4 logical"
    assert apple_cores(lambda name: b"", 4) == Cores(4, "4 cores, 4 logical", "")


def windows_record(mask: int, speed: int, group: int = 0) -> bytes:
    """Return a core as Windows writes it, by its documented order; of 48 bytes."""
    core = bytes([0, speed]) + bytes(20) + (1).to_bytes(2, "little")
    return struct.pack("<II", 0, 48) + core + struct.pack("<QHHHH", mask, group, 0, 0, 0)


def test_efficient_cores_are_left_out_on_windows() -> None:
    """Two large cores of two threads, four small ones, and what another group has."""
    processors = [windows_record(0b11, 1), windows_record(0b1100, 1)]
    processors += [windows_record(1 << cpu, 0) for cpu in range(4, 8)]
    told = b"".join([*processors, windows_record(0b1, 2, group=1)])
    found = windows_cores(told, set(range(8)), "guid")
    assert found.threads == 2
    assert found.reason == "8 logical CPUs allowed, 4 of them on large cores, which are 2 cores"
    assert found.shares
    assert found.shares != windows_cores(told, {0, 1}, "guid").shares
    assert windows_cores(told, {4, 5, 6}, "").threads == 3, "where there are no others"
    assert windows_cores(told, {0, 4}, "").threads == 1
    assert windows_cores(b"", {0, 1, 2}, "") == Cores(3, "3 logical CPUs allowed", "")


def test_this_machine() -> None:
    found = own_cores()
    assert found.threads >= 1
    assert found == own_cores()


def test_what_was_set_stays() -> None:
    environment = {"KMP_BLOCKTIME": "infinite"}
    limit_active_waiting(environment)
    assert environment == {"KMP_BLOCKTIME": "infinite", "GOMP_SPINCOUNT": "10000"}
