"""Workers die and connections break while layers move: no answer changes, and none fails."""

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from distributed_llm import DistributedClient, LocalCluster
from distributed_llm.common.messages import Addresses, WorkerHello
from distributed_llm.local_cluster import LocalProcess
from tests.cluster.hello_relay import HelloRelay
from tests.cluster.test_live_moves import (
    LIMIT_S,
    WORKER,
    Answers,
    check_whole,
    is_idle,
    make_movable_checkpoint,
    serving,
)
from tests.fault_proxy import FaultProxy, Faults
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(120)

NUM_WORKERS = 4
ASKED: dict[str, Any] = {"max_new_tokens": 100}
SLOWDOWN = 2.0
LATE = Faults(latency_s=0.4)
"""So late come the messages of workers to their coordinator that each phase of a move takes this
long at least, and what happens as a phase begins happens in it."""

NARROW = Faults(rate_bytes_per_s=150_000.0)
"""Between workers: the KV cache takes seconds, and the results of a step some hundredths of one."""


@pytest.fixture(scope="module")
def movable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_movable_checkpoint(tmp_path_factory.mktemp("checkpoint") / "llama")


@dataclass
class Network:
    """Workers behind proxies.

    Attributes:
        lifelines: from each worker to its coordinator, by name.
        doors: by which other workers reach it, by name.
    """

    cluster: LocalCluster
    client: DistributedClient
    checkpoint: Path
    stack: ExitStack
    lifelines: dict[str, FaultProxy] = field(default_factory=dict)
    doors: dict[str, FaultProxy] = field(default_factory=dict)
    relay: str = ""

    def add_worker(self) -> None:
        lifeline = self.stack.enter_context(FaultProxy(self.relay))
        worker = self.cluster.add_worker(
            **WORKER, slowdown=SLOWDOWN, coordinator=lifeline.address
        )
        self.lifelines[worker.name] = lifeline

    def open_door(self, hello: WorkerHello) -> Addresses:
        if hello.name not in self.doors:
            proxy = self.stack.enter_context(FaultProxy(hello.peer_addresses[0]))
            self.doors[hello.name] = proxy
        return (self.doors[hello.name].address,)

    @property
    def alive(self) -> list[LocalProcess]:
        return [worker for worker in self.cluster.workers if worker.exit_code is None]

    def rest(self) -> None:
        """End all faults, and wait until all workers serve."""
        for proxy in (*self.lifelines.values(), *self.doors.values()):
            proxy.heal()
        while len(self.alive) < NUM_WORKERS:
            self.add_worker()
        eventually(
            lambda: is_idle(self.client)
            and len(serving(self.client.status())) == NUM_WORKERS,
            limit_s=LIMIT_S,
        )

    def stages(self) -> list[LocalProcess]:
        """Return the workers that serve, in the order of their layers."""
        processes = {worker.name: worker for worker in self.cluster.workers}
        return [processes[name] for name in serving(self.client.status())]

    def make_late(self) -> None:
        for lifeline in self.lifelines.values():
            lifeline.degrade(to_server=LATE)

    def make_narrow(self) -> None:
        for door in self.doors.values():
            door.degrade(to_server=NARROW)

    def events(self) -> str:
        return "\n".join(self.client.status().events)
