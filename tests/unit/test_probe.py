"""The probe: real measurements on the CPU, and machines of other kinds built from files."""

import platform
import queue
import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import psutil
import pytest
import torch

from distributed_llm.common.errors import ConfigError
from distributed_llm.worker import devices
from distributed_llm.worker.compute import probe
from distributed_llm.worker.compute.engine import Engine
from distributed_llm.worker.session.events import Event, Probe, Probed
from tests.weights import weights_here

GIB = 2**30


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "present", lambda: ["cpu"])


@pytest.fixture
def no_cgroup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_cgroup_limits", lambda root: [])


def with_ram(monkeypatch: pytest.MonkeyPatch, available: int, total: int) -> None:
    ram = SimpleNamespace(available=available, total=total)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: ram)


# ------------------------------------------------------------------ the whole


def test_measures_this_machine_quickly() -> None:
    threads = torch.get_num_threads()
    torch.mm(torch.ones(8, 8), torch.ones(8, 8))  # torch starts its threads
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        capabilities = probe.measure("cpu", threads=2, max_memory_bytes=None)
        seconds.append(time.perf_counter() - start)
    assert statistics.median(seconds) < 2  # 0.4 s on an idle machine
    assert (capabilities.device, capabilities.threads) == ("cpu", 2)
    assert 0 < capabilities.memory_bytes < psutil.virtual_memory().total
    assert 1e8 < capabilities.memory_bandwidth_bytes_per_s < 1e13
    assert 1e8 < capabilities.flops_per_s < 1e15
    assert capabilities.device_name.strip()
    assert re.search(r"Python 3.*torch \d", capabilities.platform)
    assert torch.get_num_threads() == threads


def test_threads_are_used_while_measuring_and_restored_after_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = torch.get_num_threads()
    seen = []

    def fail(*args: object) -> float:
        seen.append(torch.get_num_threads())
        raise RuntimeError("injected")

    monkeypatch.setattr(probe, "_bandwidth", fail)
    with pytest.raises(RuntimeError, match="injected"):
        probe.measure("cpu", threads=before + 1, max_memory_bytes=None)
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("threads", [0, -1, 65537])
def test_a_number_of_threads_out_of_range(threads: int) -> None:
    with pytest.raises(ConfigError, match="threads"):
        probe.measure("cpu", threads=threads, max_memory_bytes=None)


def test_speeds_are_amounts_divided_by_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_median_seconds", lambda device, work, budget_s: 0.5)
    cpu = torch.device("cpu")
    assert probe._bandwidth(cpu, (4096, 8192), 0.1) == 2 * 128 * 2**20
    assert probe._flops(cpu, 0.1) == 2 * 2 * 1024**3


@pytest.fixture
def untried() -> Iterator[None]:
    """No dtype was capabilities to be the faster one, nor will be."""
    probe._faster_dtype.cache_clear()
    yield
    probe._faster_dtype.cache_clear()


@pytest.mark.usefixtures("untried")
def test_operations_are_counted_in_the_faster_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {torch.float32: 2.0, torch.bfloat16: 1.0}
    monkeypatch.setattr(probe, "_matmul_seconds", lambda device, dtype, *_: seconds[dtype])
    assert probe._flops(torch.device("cpu"), 0.1) == 2 * 1024**3


@pytest.mark.usefixtures("untried")
def test_the_faster_dtype_stays_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {torch.float32: 2.0, torch.bfloat16: 1.0}
    monkeypatch.setattr(probe, "_matmul_seconds", lambda device, dtype, *_: seconds[dtype])
    probe._flops(torch.device("cpu"), 0.1)
    seconds[torch.bfloat16] = 4.0
    assert probe._flops(torch.device("cpu"), 0.1) == 2 * 1024**3 / 4


def test_the_median_ignores_a_hiccup_and_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([9.0, 0.01, 0.01, 5.0])
    monkeypatch.setattr(probe, "_timed", lambda device, work: next(times))
    assert probe._median_seconds(torch.device("cpu"), lambda: None, 0.06) == 0.01


# ------------------------------------------------------------------ again, while it is idle


def test_measures_this_machine_again_in_less_time() -> None:
    capabilities = probe.measure("cpu", threads=1, max_memory_bytes=None)
    seconds, again = [], []
    for _ in range(5):
        start = time.perf_counter()
        again.append(probe.remeasure(Probe(4), capabilities, slowdown=1.0))
        seconds.append(time.perf_counter() - start)
    assert statistics.median(seconds) < 1  # 0.05 s on an idle machine
    assert {each.session for each in again} == {4}
    bandwidth = statistics.median(each.memory_bandwidth_bytes_per_s for each in again)
    flops = statistics.median(each.flops_per_s for each in again)
    assert 0.1 < bandwidth / capabilities.memory_bandwidth_bytes_per_s < 10
    assert 0.1 < flops / capabilities.flops_per_s < 10


def test_measures_again_as_at_the_start_but_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities = msgspec.structs.replace(
        probe.measure("cpu", threads=1, max_memory_bytes=None), threads=torch.get_num_threads() + 1
    )
    before, seen = torch.get_num_threads(), []

    def median(device: torch.device, work: object, budget_s: float) -> float:
        seen.append((str(device), torch.get_num_threads(), budget_s))
        return 0.5

    monkeypatch.setattr(probe, "_median_seconds", median)
    monkeypatch.setattr(probe, "free_memory_bytes", lambda device: GIB)
    done = probe.remeasure(Probe(7), capabilities, slowdown=4.0)
    assert done == Probed(7, 2 * 64 * 2**20 / 4, 2 * 2 * 1024**3 / 4, int(0.8 * GIB))
    assert seen == [("cpu", before + 1, 0.01)] * 2
    assert torch.get_num_threads() == before


def test_compute_thread_probes_and_looks_as_slow_as_it_is_now(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    capabilities = probe.measure("cpu", threads=1, max_memory_bytes=None)
    monkeypatch.setattr(probe, "_speeds", lambda *args: (8e9, 4e10))
    monkeypatch.setattr(probe, "free_memory_bytes", lambda device: 1 << 60)
    budget = capabilities.memory_bytes  # more is never used
    posted: queue.SimpleQueue[Event] = queue.SimpleQueue()
    engine = Engine(
        capabilities,
        slowdown=2.0,
        weights=weights_here(),
        is_void=lambda order: isinstance(order, Probe) and order.session == 0,
        post=posted.put,
    )
    engine.put(Probe(0))
    engine.put(Probe(1))
    assert posted.get(timeout=20) == Probed(1, 4e9, 2e10, budget)
    engine.slowdown = 8.0
    engine.put(Probe(2))
    assert posted.get(timeout=20) == Probed(2, 1e9, 5e9, budget)
    assert engine.stop(20)
    assert posted.empty()


# ------------------------------------------------------------------ devices


@pytest.mark.parametrize(
    ("present", "asked", "expected"),
    [
        (["cpu"], "auto", "cpu"),
        (["cuda:0", "cuda:1", "cpu"], "auto", "cuda:0"),
        (["cuda:0", "cuda:1", "cpu"], "fastest", "cuda:0"),
        (["cpu"], "fastest", "cpu"),
        (["cuda:0", "cuda:1", "cpu"], "cuda", "cuda:0"),
        (["cuda:0", "cuda:1", "cpu"], "cuda:1", "cuda:1"),
        (["cuda:0", "cpu"], "cpu", "cpu"),
        (["mps", "cpu"], "auto", "mps"),
    ],
)
def test_devices(
    monkeypatch: pytest.MonkeyPatch, present: list[str], asked: str, expected: str
) -> None:
    monkeypatch.setattr(devices, "present", lambda: present)
    assert str(probe.resolve_device(asked)) == expected


@pytest.mark.parametrize("asked", ["cuda", "cuda:0", "mps", "tpu", "", "CPU", "cpu\n", "x" * 10**6])
def test_a_device_that_is_not_there(no_gpu: None, asked: str) -> None:
    with pytest.raises(ConfigError, match="Present are: cpu") as caught:
        probe.resolve_device(asked)
    assert len(str(caught.value)) < 600


def test_the_devices_of_this_machine_end_with_the_cpu() -> None:
    assert devices.present()[-1] == "cpu"


@pytest.mark.parametrize(
    ("capability", "hip", "expected"),
    [((7, 5), None, False), ((8, 0), None, True), ((8, 6), None, True), ((6, 1), "6.4", True)],
)
def test_only_newer_gpus_of_nvidia_compute_in_bfloat16(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None, expected: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert devices.computes_in_bfloat16(torch.device("cuda:1")) == expected


@pytest.mark.parametrize("macos", [13, 14, 15])
def test_apples_gpus_compute_in_bfloat16_from_macos_14_on(
    monkeypatch: pytest.MonkeyPatch, macos: int
) -> None:
    monkeypatch.setattr(
        torch.backends.mps, "is_macos_or_newer", lambda major, minor: (macos, 0) >= (major, minor)
    )
    assert devices.computes_in_bfloat16(torch.device("mps")) == (macos >= 14)


@pytest.mark.parametrize("able", [True, False])
def test_a_device_without_bfloat16_is_not_measured_with_it(
    monkeypatch: pytest.MonkeyPatch, able: bool
) -> None:
    used = []

    def seconds(device: torch.device, dtype: torch.dtype, size: int, budget_s: float) -> float:
        used.append(dtype)
        return 1.0

    monkeypatch.setattr(devices, "computes_in_bfloat16", lambda device: able)
    monkeypatch.setattr(probe, "_matmul_seconds", seconds)
    probe._faster_dtype.__wrapped__(torch.device("mps"))
    assert (torch.bfloat16 in used) == able
    assert torch.float16 in used


# ------------------------------------------------------------------ memory


def test_memory_is_a_share_of_what_is_free(
    monkeypatch: pytest.MonkeyPatch, no_cgroup: None
) -> None:
    with_ram(monkeypatch, available=10 * GIB, total=16 * GIB)
    cpu = torch.device("cpu")
    assert probe._budget(cpu, None) == 8 * GIB
    assert probe._budget(cpu, 3 * GIB) == 3 * GIB
    assert probe._budget(cpu, 16 * GIB) == 8 * GIB


@pytest.mark.parametrize("limit", [16 * GIB + 1, 0, -1])
def test_a_memory_limit_that_cannot_be(
    monkeypatch: pytest.MonkeyPatch, no_cgroup: None, limit: int
) -> None:
    with_ram(monkeypatch, available=10 * GIB, total=16 * GIB)
    with pytest.raises(ConfigError, match=r"max_memory is .*, but cpu has 16\.0 GiB in all"):
        probe._budget(torch.device("cpu"), limit)


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_memory_of_a_gpu_is_its_own_and_counted_once_the_cache_is_empty(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    free = [GIB]
    backend = getattr(torch, kind)
    monkeypatch.setattr(backend, "empty_cache", lambda: free.append(5 * GIB))
    monkeypatch.setattr(backend, "mem_get_info", lambda device: (free[-1], 8 * GIB))
    gpu = torch.device(kind, 0)
    assert probe._budget(gpu, None) == 4 * GIB
    with pytest.raises(ConfigError, match=rf"{kind}:0 has 8\.0 GiB in all"):
        probe._budget(gpu, 9 * GIB)


def test_gpus_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices.present() == ["cuda:0", "cuda:1", "xpu:0", "mps", "cpu"]


def test_the_probe_reads_less_where_little_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that other programs fill would refuse the memory, and the worker would end."""
    monkeypatch.setattr(probe, "free_memory_bytes", lambda device: GIB)
    rows, columns = probe._read_shape(torch.device("cuda:0"), 16384)
    assert 0.09 * GIB < 4 * rows * columns <= 0.1 * GIB
    monkeypatch.setattr(probe, "free_memory_bytes", lambda device: 0)
    assert probe._read_shape(torch.device("cuda:0"), 16384)[0] == 1024
    monkeypatch.setattr(probe, "free_memory_bytes", lambda device: 64 * GIB)
    assert probe._read_shape(torch.device("cuda:0"), 16384)[0] == 16384


def write(root: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")
    return root


def test_a_container_of_today(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/",
        "sys/fs/cgroup/memory.max": 4 * GIB,
        "sys/fs/cgroup/memory.current": 3 * GIB,
        "sys/fs/cgroup/memory.stat": f"anon 5\ninactive_file {GIB}\nactive_file 7",
    }
    assert probe._cgroup_limits(write(tmp_path, files)) == [(4 * GIB, 2 * GIB)]


def test_a_service_within_limited_slices(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/user.slice/app.service",
        "sys/fs/cgroup/user.slice/app.service/memory.max": "max",
        "sys/fs/cgroup/user.slice/app.service/memory.current": GIB,
        "sys/fs/cgroup/user.slice/memory.max": 2 * GIB,
        "sys/fs/cgroup/user.slice/memory.current": GIB,
    }
    assert probe._cgroup_limits(write(tmp_path, files)) == [(2 * GIB, GIB)]


def test_a_container_of_the_past(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "5:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n1:name=systemd:/",
        "sys/fs/cgroup/memory/docker/x/memory.limit_in_bytes": 2 * GIB,
        "sys/fs/cgroup/memory/docker/x/memory.usage_in_bytes": GIB,
        "sys/fs/cgroup/memory/memory.limit_in_bytes": 9223372036854771712,
        "sys/fs/cgroup/memory/memory.usage_in_bytes": GIB,
    }
    assert probe._cgroup_limits(write(tmp_path, files)) == [(2 * GIB, GIB)]


def test_no_cgroups(tmp_path: Path) -> None:
    assert probe._cgroup_limits(tmp_path) == []


def test_the_tightest_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    with_ram(monkeypatch, available=10 * GIB, total=16 * GIB)
    limits = [(8 * GIB, 3 * GIB), (6 * GIB, 0), (4 * GIB, 5 * GIB)]
    monkeypatch.setattr(probe, "_cgroup_limits", lambda root: limits[:2])
    assert probe._memory(torch.device("cpu")) == (5 * GIB, 6 * GIB)
    monkeypatch.setattr(probe, "_cgroup_limits", lambda root: limits)
    assert probe._memory(torch.device("cpu")) == (0, 4 * GIB)


# ------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        ("processor\t: 0\nmodel name\t: AMD Ryzen 9\nmodel name\t: AMD Ryzen 9", "AMD Ryzen 9"),
        ("processor\t: 0\nModel\t\t: Raspberry Pi 5", "Raspberry Pi 5"),
        ("CPU implementer\t: 0x41\nCPU part\t: 0xd0b", f"{platform.machine()} 0x41 0xd0b"),
        ("processor\t: 0", ""),
    ],
)
def test_names_of_processors(tmp_path: Path, cpuinfo: str, name: str) -> None:
    assert probe._linux_cpu_name(write(tmp_path, {"proc/cpuinfo": cpuinfo})) == name


def test_a_processor_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise OSError("no /proc here")

    monkeypatch.setattr(probe, "_cpu_name", fail)
    assert probe._device_name(torch.device("cpu"))
