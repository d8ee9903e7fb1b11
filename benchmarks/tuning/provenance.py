"""Where figures come from: command, machine, versions. No date."""

import platform
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

import psutil

from benchmarks.tuning.figures import WorkerFacts
from distributed_llm.common.wording import size_text

_PACKAGES = ("distributedllm", "torch", "transformers")


@dataclass(frozen=True)
class Provenance:
    """Where figures come from.

    Attributes:
        command: to get them again.
        model: for people.
        machine: this one; empty if nothing ran on it.
        workers: one line each.
        asked: what was asked of each configuration.
        how: rounds and warming up.
    """

    command: str
    model: str
    machine: str
    versions: str
    workers: tuple[str, ...]
    asked: str
    how: str

    @property
    def lines(self) -> list[str]:
        """All of it for people."""
        found = [
            f"command: {self.command}",
            f"model: {self.model}",
            f"machine: {self.machine}" if self.machine else "",
            f"versions: {self.versions}",
            *(f"worker {worker}" for worker in self.workers),
            f"asked: {self.asked}",
            f"how: {self.how}",
        ]
        return [line for line in found if line]


def command_line(arguments: Sequence[str]) -> str:
    """Return the command that was given."""
    return shlex.join(["python", "benchmark.py", *arguments])


def machine() -> str:
    """Return what this machine is."""
    memory = size_text(psutil.virtual_memory().total)
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    return f"{psutil.cpu_count() or 1} cores, {memory}, {system}"


def versions() -> str:
    """Return the versions that matter."""
    packages = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    return f"{packages}, Python {platform.python_version()}"


def worker_line(worker: WorkerFacts, settings: str = "") -> str:
    """Return a worker for people.

    Args:
        settings: with which it was started.
    """
    able = worker.capabilities
    return (
        f"{worker.name}: {able.device_name or able.device} ({able.device}), {able.threads} "
        f"threads, {size_text(able.memory_bytes)} for layers and KV cache, reads "
        f"{able.memory_bandwidth_bytes_per_s / 1e9:.1f} GB/s, {able.flops_per_s / 1e9:.0f} GFLOPS"
        + (f"; {settings}" if settings else "")
    )
