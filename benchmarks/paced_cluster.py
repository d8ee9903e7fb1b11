"""A cluster on this machine of workers whose speeds are known, and change when told.

Workers wait after each task, so three of them on two cores are hardly in each other's way. They
stay when the coordinator ends, and join the next one.
"""

import asyncio
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import msgspec

from benchmarks.watched_coordinator import Searched
from distributed_llm import AsyncDistributedClient
from distributed_llm.common.cache_folder import CACHE_VARIABLE
from distributed_llm.common.errors import ConnectionFailed
from distributed_llm.common.keyring import STATE_VARIABLE
from distributed_llm.common.messages import ClusterStatus

_START_S = 60.0
_MEMORY = "1GiB"


class _Child:
    """A process of this benchmark; it ends when this process ends."""

    def __init__(self, module: str, settings: Mapping[str, object], log: Path) -> None:
        section = "COORDINATOR" if "coordinator" in module else "WORKER"
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("DLLM_") or name in (STATE_VARIABLE, CACHE_VARIABLE)
        }
        environment |= {f"DLLM_{section}__{k.upper()}": str(v) for k, v in settings.items()}
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                bufsize=1,
            )
        self.log = log

    @property
    def stdout(self) -> IO[str]:
        assert self._process.stdout is not None
        return self._process.stdout

    def say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with suppress(BrokenPipeError):
                    pipe.close()


class PacedCluster:
    """Workers that stay, and one coordinator after the other; a context manager.

    Args:
        model: checkpoint folder.
        slowdowns: by worker.

    Attributes:
        address: of the coordinator.
        searches: what those of the present coordinator found, and when, `perf_counter` seconds.
    """

    def __init__(self, model: Path, slowdowns: Mapping[str, float]) -> None:
        self._model = model
        self._slowdowns = dict(slowdowns)
        self._coordinator: _Child | None = None
        self._workers: dict[str, _Child] = {}
        self.address = "127.0.0.1:0"
        self.searches: list[tuple[float, Searched]] = []

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="dllm-", ignore_cleanup_errors=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for child in (*self._workers.values(), *filter(None, [self._coordinator])):
            child.end()
        self._folder.cleanup()

    async def coordinate(self, **settings: Any) -> ClusterStatus:
        """Have a new coordinator with these settings; return its status once it serves."""
        if self._coordinator:
            self._coordinator.end()
        given = {
            "model": self._model,
            "bind": self.address,
            "min_workers": len(self._slowdowns),
            "settle_s": 0.05,
            "replicas": 1,
            **settings,
        }
        log = Path(self._folder.name) / "coordinator.log"
        self._coordinator = _Child("benchmarks.watched_coordinator", given, log)
        line = self._coordinator.stdout.readline().strip()
        if not line:
            raise RuntimeError(f"no coordinator: {log.read_text()[-2000:]}")
        self.address = line
        self.searches = []
        reader = threading.Thread(
            target=_read, args=(self._coordinator.stdout, self.searches), daemon=True
        )
        reader.start()
        for name, slowdown in self._slowdowns.items():
            if name not in self._workers:
                self._start_worker(name, slowdown)
        return await self._serving()

    def _start_worker(self, name: str, slowdown: float) -> None:
        settings = {
            "name": name,
            "coordinator": self.address,
            "threads": 1,
            "max_memory": _MEMORY,
            "slowdown": slowdown,
        }
        log = Path(self._folder.name) / f"{name}.log"
        self._workers[name] = _Child("benchmarks.paced_worker", settings, log)

    def set_slowdown(self, name: str, slowdown: float) -> None:
        """Have a worker look so many times slower from now on."""
        self._slowdowns[name] = slowdown
        self._workers[name].say(str(slowdown))

    async def _serving(self) -> ClusterStatus:
        give_up_at = time.monotonic() + _START_S
        async with AsyncDistributedClient(self.address, connect_timeout_s=1.0) as client:
            while time.monotonic() < give_up_at:
                for name, child in self._workers.items():
                    if not child.running:
                        raise RuntimeError(f"{name} ended: {child.log.read_text()[-2000:]}")
                with suppress(ConnectionFailed):
                    status = await client.status()
                    if status.state == "serving":
                        return status
                await asyncio.sleep(0.05)
        raise RuntimeError(f"the cluster does not serve: {status}")

    def logs(self) -> str:
        """Return what all processes wrote."""
        children = {**self._workers, "coordinator": self._coordinator}
        return "\n".join(
            f"== {name}\n{child.log.read_text()}" for name, child in children.items() if child
        )


def _read(lines: IO[str], searches: list[tuple[float, Searched]]) -> None:
    with suppress(ValueError):  # closed
        searches.extend((time.perf_counter(), _decode(line)) for line in lines)


def _decode(line: str) -> Searched:
    return msgspec.json.decode(line, type=Searched)
