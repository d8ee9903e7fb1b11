"""A coordinator and workers as child processes: for tests, notebooks and `dllm demo`."""

import os
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from distributed_llm.client.client import DistributedClient
from distributed_llm.common.config import unknown_key
from distributed_llm.common.errors import (
    ConfigError,
    ConnectionFailed,
    DistributedLLMError,
)
from distributed_llm.common.messages import ClusterStatus
from distributed_llm.common.settings import SECTIONS
from distributed_llm.common.wording import count_text
from distributed_llm.forking import fork_server
from distributed_llm.local_process import LocalProcess

_POLL_S = 0.05
_CONNECT_S = 1.0
_KILL_AFTER_S = 5.0

_SHARE_OF_MEMORY = 0.8
"""Share of the free memory that all workers together may use."""

Progress = Callable[[str], None]


def print_progress(text: str) -> None:
    """Print a line to stderr."""
    print(text, file=sys.stderr, flush=True)


class LocalCluster:
    """A coordinator and its workers on this machine; a context manager.

    Args:
        model: checkpoint folder or hub id; empty is the built-in model.
        workers: how many, or the settings of each, such as
            `{"name": "mac", "slowdown": 2.0, "max_memory": "512MiB", "threads": 1}`. They end at
            once when told to, unless `leave_timeout_s` is given.
        start_timeout_s: after which a cluster that does not serve is given up.
        coordinator: settings of the coordinator, such as `{"strategy": "even"}`.
        progress: called with each line about how far the start is; None for silence.

    Raises:
        ConfigError: a setting is unknown, or neither text nor number.
        DistributedLLMError: it could not be started; the message says what the process said.
    """

    def __init__(
        self,
        model: str | Path = "",
        workers: int | Sequence[Mapping[str, Any]] = 3,
        *,
        start_timeout_s: float = 120.0,
        coordinator: Mapping[str, Any] | None = None,
        progress: Progress | None = print_progress,
    ) -> None:
        if isinstance(workers, int) and workers < 0:
            raise ConfigError(f"LocalCluster cannot start {workers} workers. Give 0 or more.")
        self._model = str(model)
        self._wanted = [
            {"name": f"worker-{i + 1}", "leave_timeout_s": 0, **given}
            for i, given in enumerate([{}] * workers if isinstance(workers, int) else workers)
        ]
        self._start_timeout_s = start_timeout_s
        self._progress = progress or (lambda text: None)
        self._settings: dict[str, Any] = {
            "bind": "127.0.0.1:0",
            "min_workers": max(1, len(self._wanted)),
            "settle_s": 0.05,
            **(coordinator or {}),
        }
        self._insecure = bool(self._settings.get("insecure"))
        _check("coordinator", self._settings)
        for settings in self._wanted:
            _check("worker", settings)
        self._share_bytes = int(
            psutil.virtual_memory().available * _SHARE_OF_MEMORY / max(1, len(self._wanted))
        )
        self.workers: list[LocalProcess] = []
        self.address = ""
        self._processes: list[LocalProcess] = []

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start all processes and wait until the cluster serves.

        Raises:
            DistributedLLMError: one of them failed, or it took too long.
        """
        workers = count_text(len(self._wanted), "worker")
        self._progress(f"starting a coordinator and {workers} on this machine ...")
        self._owner = os.getpid()
        self._folder = Path(tempfile.mkdtemp(prefix="dllm-"))
        self._remove_folder = weakref.finalize(self, _remove, self._folder, self._owner)
        self._used = ExitStack()
        try:
            # It imports what workers need while the coordinator starts.
            self._fork_server = self._used.enter_context(fork_server())
            self.coordinator = LocalProcess(
                "coordinator",
                ["coordinator", *([self._model] if self._model else [])],
                _environment("coordinator", self._settings),
                self._folder / "coordinator.log",
            )
            self._processes.append(self.coordinator)
            self.address = self.coordinator.stdout.readline().decode().strip()
            if not self.address:
                self.coordinator.wait(_KILL_AFTER_S)
                raise self.coordinator.failure()
            for settings in self._wanted:
                self.add_worker(**settings)
            if self._wanted:
                self._wait_until_serving(None, self._progress)
        except BaseException:
            self.close()
            raise

    def add_worker(self, **settings: Any) -> LocalProcess:
        """Start one more worker and return it at once.

        Args:
            settings: of the worker: name, device, threads, max_memory, slowdown.

        Raises:
            ConfigError: a setting is unknown, or neither text nor number.
        """
        number = len(self.workers) + 1
        settings = {
            "name": f"worker-{number}",
            "coordinator": self.address,
            "insecure": self._insecure,
            "max_memory": self._share_bytes,
            "device": "fastest",  # "auto" may be several workers
            **settings,
        }
        _check("worker", settings)
        worker = LocalProcess(
            settings["name"],
            ["worker"],
            _environment("worker", settings),
            self._folder / f"worker-{number}.log",
            self._fork_server,
        )
        self._processes.append(worker)
        self.workers.append(worker)
        return worker

    def wait_until_serving(self, *, num_workers: int | None = None) -> ClusterStatus:
        """Return the status once the cluster serves, with this many workers in the plan if given.

        Raises:
            DistributedLLMError: a process failed, or it took longer than `start_timeout_s`.
        """
        return self._wait_until_serving(num_workers, lambda text: None)

    def _wait_until_serving(self, num_workers: int | None, progress: Progress) -> ClusterStatus:
        told = 0  # number of the latest event that was told
        give_up_at = time.monotonic() + self._start_timeout_s
        with DistributedClient(
            self.address, insecure=self._insecure, connect_timeout_s=_CONNECT_S
        ) as client:
            while True:
                status = self._status(client)
                for event in status.events if status else ():
                    if event.number > told:
                        progress(event.text)
                        told = event.number
                if status and status.state == "serving":
                    serving = sum(worker.state == "serving" for worker in status.workers)
                    if num_workers in (None, serving):
                        return status
                if time.monotonic() > give_up_at:
                    raise self._too_late(status)
                time.sleep(_POLL_S)

    def _status(self, client: DistributedClient) -> ClusterStatus | None:
        """Return the status, or None if the coordinator runs but does not answer yet."""
        self._check_processes()
        try:
            return client.status()
        except ConnectionFailed:
            self._check_processes()
            return None

    def _too_late(self, status: ClusterStatus | None) -> DistributedLLMError:
        why = (
            f"It is {status.state}. {status.note} Last events: "
            f"{'; '.join(event.text for event in status.events)}"
            if status
            else "Its coordinator does not answer."
        )
        return DistributedLLMError(
            f"The cluster does not serve after {self._start_timeout_s:g} s. {why}"
        )

    def close(self) -> None:
        """End all processes; in a fork of the process that started them, do nothing."""
        if os.getpid() != self._owner:
            return
        for process in reversed(self._processes):
            process.terminate()
        for process in reversed(self._processes):
            process.close()
        self._used.close()
        self._remove_folder()

    def _check_processes(self) -> None:
        for process in self._processes:
            if process.exit_code is not None and process.exit_code > 0:
                raise process.failure()


def _environment(section: str, settings: Mapping[str, Any]) -> dict[str, str]:
    return {f"DLLM_{section}__{name}".upper(): str(value) for name, value in settings.items()}


def _check(section: str, settings: Mapping[str, Any]) -> None:
    """Raise `ConfigError` if a setting is unknown or cannot be given to a process."""
    for name, value in settings.items():
        if name not in SECTIONS[section].model_fields:
            raise ConfigError(f"LocalCluster: {unknown_key(name, section)}")
        if not isinstance(value, str | int | float):
            raise ConfigError(
                f"LocalCluster: {section}.{name} must be a text or a number, not {value!r:.60}."
            )


def _remove(folder: Path, owner: int) -> None:
    """Delete a folder, unless this is a fork of the process that made it."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
