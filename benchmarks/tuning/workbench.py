"""Workers that stay, and coordinators that come and go on one port."""

import re
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from distributed_llm import DistributedClient, DistributedLLMError
from distributed_llm.common.errors import (
    AddressInUse,
    CapacityError,
    ConnectionFailed,
    error_from_wire,
)
from distributed_llm.common.messages import ClusterStatus
from distributed_llm.common.units import split_address
from distributed_llm.local_process import LocalProcess

_POLL_S = 0.05
_CONNECT_S = 2.0
_SHARE_OF_MEMORY = 0.8
_GIVE_UP_PLANNING_S = 5.0
"""A cluster of which all workers are there and that has no plan after this has none at all."""
_END_S = 10.0
_ERROR_LINE = re.compile(r"^Error \((?P<code>\w+)\): (?P<message>.+)", re.MULTILINE | re.DOTALL)
_EVERYWHERE = ("0.0.0.0", "::", "*")


class Unusable(Exception):
    """No configuration can run here; `error` says why."""

    def __init__(self, error: DistributedLLMError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True)
class LocalWorker:
    """A worker process to start here.

    Attributes:
        settings: of the section `worker`, by name.
    """

    name: str
    settings: Mapping[str, str]


class Workbench:
    """Runs coordinators one after the other, with workers that find each of them again.

    Args:
        model: checkpoint folder or hub id; empty is the built-in model.
        local: workers to start on this machine; none: workers join from elsewhere.
        num_workers: to wait for.
        listen: HOST:PORT of the coordinators; empty: any free port of this machine.
        start_timeout_s: after which a configuration that does not serve has failed.
        on_wait: is told how many workers have joined, when that changes.
    """

    def __init__(
        self,
        model: str,
        *,
        local: Sequence[LocalWorker],
        num_workers: int,
        listen: str,
        start_timeout_s: float,
        on_wait: Callable[[int, int], None],
    ) -> None:
        self._model, self._local, self._num_workers = model, local, num_workers
        self.bind = listen or f"127.0.0.1:{_free_port()}"
        self._start_timeout_s = start_timeout_s
        self._on_wait = on_wait
        self._workers: list[LocalProcess] = []
        self._num_started = 0
        self._all_joined_once = False

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="dllm-tune-", ignore_cleanup_errors=True)
        try:
            self._workers = [self._start_worker(worker) for worker in self._local]
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all workers that were started here."""
        for process in self._workers:
            process.terminate()
        for process in self._workers:
            process.close()
        self._folder.cleanup()

    @contextmanager
    def serve(self, environment: Mapping[str, str]) -> Iterator[str]:
        """Run a coordinator; yield its address once it serves with all workers there.

        Args:
            environment: its settings.

        Raises:
            DistributedLLMError: it does not start, or does not serve in time.
            Unusable: nor would any other.
        """
        self._num_started += 1
        self._start_again()
        coordinator = LocalProcess(
            "coordinator",
            ["coordinator", *([self._model] if self._model else [])],
            {
                "DLLM_COORDINATOR__BIND": self.bind,
                "DLLM_COORDINATOR__MIN_WORKERS": str(self._num_workers),
                "DLLM_COORDINATOR__SETTLE_S": "0.1",
                **environment,
            },
            Path(self._folder.name) / f"coordinator-{self._num_started}.log",
        )
        try:
            if not coordinator.stdout.readline():
                coordinator.wait(_END_S)
                error = _failure(coordinator)
                raise Unusable(error) if isinstance(error, AddressInUse) else error
            self._wait_until_serving(coordinator)
            yield self.address
            self._check(coordinator)
        finally:
            coordinator.close()

    @property
    def address(self) -> str:
        """Where clients on this machine find the coordinator."""
        host, port = split_address(self.bind)
        return f"127.0.0.1:{port}" if host in _EVERYWHERE else self.bind

    def _start_worker(self, worker: LocalWorker) -> LocalProcess:
        share = int(psutil.virtual_memory().available * _SHARE_OF_MEMORY / len(self._local))
        settings = {
            "name": worker.name,
            "coordinator": self.address,
            "max_memory": str(share),
            "connect_timeout_s": "1h",
            "leave_timeout_s": "0",
            **worker.settings,
        }
        environment = {f"DLLM_WORKER__{name.upper()}": value for name, value in settings.items()}
        log = Path(self._folder.name) / f"{worker.name}.log"
        return LocalProcess(worker.name, ["worker"], environment, log)

    def _wait_until_serving(self, coordinator: LocalProcess) -> None:
        began = time.monotonic()
        there, complete_at = -1, 0.0
        with DistributedClient(self.address, connect_timeout_s=_CONNECT_S) as client:
            while True:
                status = self._status(client, coordinator)
                now = time.monotonic()
                if status and status.state == "serving":
                    self._all_joined_once = True
                    return
                if status and len(status.workers) != there:
                    there, complete_at = len(status.workers), now
                    if not self._all_joined_once:
                        self._on_wait(there, self._num_workers)
                if status and status.state == "waiting" and there >= self._num_workers:
                    if now > complete_at + _GIVE_UP_PLANNING_S:
                        raise CapacityError(status.note or "The workers cannot serve the model.")
                elif self._is_late(now - began):
                    raise _too_late(self._start_timeout_s, there, self._num_workers, status)
                time.sleep(_POLL_S)

    def _is_late(self, waited_s: float) -> bool:
        """Say whether to give up; people who start workers elsewhere for the first time may not."""
        patient = not self._local and not self._all_joined_once
        return waited_s > self._start_timeout_s and not patient

    def _status(self, client: DistributedClient, coordinator: LocalProcess) -> ClusterStatus | None:
        self._check(coordinator)
        try:
            return client.status()
        except ConnectionFailed:
            self._check(coordinator)
            return None

    def _check(self, coordinator: LocalProcess) -> None:
        if coordinator.exit_code is not None:
            raise _failure(coordinator)
        for process in self._workers:
            if process.exit_code is not None:
                error = _failure(process)
                raise error if self._all_joined_once else Unusable(error)

    def _start_again(self) -> None:
        """Start the workers that have ended, whatever an earlier configuration did to them."""
        for at, worker in enumerate(self._local):
            if self._workers[at].exit_code is not None:
                self._workers[at].close()
                self._workers[at] = self._start_worker(worker)


def _failure(process: LocalProcess) -> DistributedLLMError:
    """Return the error that a process ended with, of the class that it was there."""
    said = process.log_tail()
    match = _ERROR_LINE.search(said)
    if match is None:
        last = said.splitlines()[-1] if said else "nothing"
        return DistributedLLMError(
            f"The process {process.name} ended with exit code {process.exit_code}. It said: {last}"
        )
    if match["code"] == AddressInUse.code:
        return AddressInUse(match["message"].strip().replace("--bind", "--listen"))
    return error_from_wire(match["code"], match["message"].strip(), 0.0)


def _too_late(
    timeout_s: float, there: int, wanted: int, status: ClusterStatus | None
) -> DistributedLLMError:
    why = f"it is {status.state}. {status.note}".strip() if status else "it does not answer"
    return DistributedLLMError(
        f"The cluster does not serve after {timeout_s:g} s: {max(0, there)} of {wanted} workers "
        f"are there; {why}"
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
