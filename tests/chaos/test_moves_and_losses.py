"""Workers die and connections break while layers move: no answer changes, and none fails."""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from distributed_llm import DistributedClient, LocalCluster
from distributed_llm.common.messages import Addresses, WorkerHello
from distributed_llm.local_process import LocalProcess
from tests.cluster.hello_relay import HelloRelay
from tests.cluster.test_live_moves import (
    LIMIT_S,
    WORKER,
    Answers,
    check_whole,
    is_idle,
    make_movable_checkpoint,
    nothing_left_behind,
    serving,
)
from tests.fault_proxy import FaultProxy, Faults
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(120)

NUM_WORKERS = 3
ASKED: dict[str, Any] = {"max_new_tokens": 60}
SLOWDOWN = 2.0
LEAVER = 1
"""Index of the stage whose worker is told to end; its layers go to both others."""

LATE = Faults(latency_s=0.4)
"""Delay of workers' messages to the coordinator: no phase of a move takes less.

So what a test does when a phase begins happens in that phase.
"""

NARROW = Faults(rate_bytes_per_s=1_000_000.0)
"""Rate between workers with which KV cache takes longer than a test needs to read of it in a log.

Not so slow that computing the cache again would be chosen, even if a link is measured at a third of
it beside KV cache under way: what was measured in a test is remembered by those that follow.
"""


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
        worker = self.cluster.add_worker(**WORKER, slowdown=SLOWDOWN, coordinator=lifeline.address)
        self.lifelines[worker.name] = lifeline

    def open_door(self, hello: WorkerHello) -> Addresses:
        if hello.name not in self.doors:
            proxy = self.stack.enter_context(FaultProxy(hello.peer_addresses[0]))
            self.doors[hello.name] = proxy
        return (self.doors[hello.name].address,)

    def start_workers(self, *going: LocalProcess) -> None:
        """Start so many that there are enough once these have gone, if they have not yet."""
        staying = [w for w in self.cluster.workers if w not in going]
        for _ in range(NUM_WORKERS - sum(w.exit_code is None for w in staying)):
            self.add_worker()

    def rest(self) -> None:
        """Wait until nothing is asked and enough workers serve."""
        self.start_workers()

        def is_at_rest() -> bool:
            return is_idle(self.client) and len(serving(self.client.status())) == NUM_WORKERS

        eventually(is_at_rest, limit_s=LIMIT_S, story=self.events)
        check_whole(self.client.status())

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
        return "\n".join(event.text for event in self.client.status().events)

    def heal(self) -> None:
        for proxy in (*self.lifelines.values(), *self.doors.values()):
            proxy.heal()

    def answers(self, **asked: Any) -> Answers:
        return Answers(self.client, self.checkpoint, **{**ASKED, **asked})


@pytest.fixture(scope="module")
def one_network(movable: Path) -> Iterator[Network]:
    settings = {
        "strategy": "even",  # all workers have layers, and they move only to let one leave
        "min_workers": NUM_WORKERS,
        "max_batch_tokens": 16,
    }
    with nothing_left_behind(), ExitStack() as stack:
        cluster = stack.enter_context(LocalCluster(movable, 0, coordinator=settings))
        client = stack.enter_context(DistributedClient(cluster.address))
        network = Network(cluster, client, movable, stack)
        relay = stack.enter_context(HelloRelay(cluster.address, network.open_door))
        network.relay = relay.address
        network.rest()
        yield network


@pytest.fixture
def network(one_network: Network) -> Iterator[Network]:
    """All workers serve, at rest; in the end nothing may be in use or have failed."""
    one_network.rest()
    failed = one_network.client.status().requests_failed
    yield one_network
    one_network.heal()
    eventually(lambda: is_idle(one_network.client), limit_s=LIMIT_S)
    assert one_network.client.status().requests_failed == failed


class Departure:
    """A worker in the middle of the pipeline is told to end; what others say of that."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self.stages = network.stages()
        self.leaver = self.stages[LEAVER]
        self._said_before = {worker.name: len(_log(worker)) for worker in self.stages}
        self._epoch = network.client.status().epoch
        self.leaver.terminate()

    def wait_for(self, text: str) -> str:
        """Return the first line with a text that any of the workers says about the new plan."""

        def look() -> str | None:
            for worker in self.stages:
                said = _log(worker)[self._said_before[worker.name] :]
                if line := re.search(rf".*{text}.*\(plan \d+\)", said):
                    return line[0]
            return None

        line = eventually(look, limit_s=LIMIT_S, story=self._network.events)
        assert line is not None
        return line

    def check_left(self) -> None:
        """Wait for the end of the leaver's process."""
        eventually(lambda: self.leaver.exit_code is not None, limit_s=LIMIT_S)


def _log(worker: LocalProcess) -> str:
    return worker.log.read_text(errors="replace")


# ------------------------------------------------------------------ killed


@pytest.mark.parametrize(
    ("phase", "victim"),
    [
        ("loading layers", 0),
        ("sending the KV cache", 1),
        ("sending the KV cache", 2),
        ("the KV cache of its layers has arrived", 0),
    ],
)
def test_any_worker_may_be_killed_in_any_phase_of_a_move(
    network: Network, phase: str, victim: int
) -> None:
    with network.answers() as answers:
        network.make_late()
        if phase == "sending the KV cache":
            network.make_narrow()
        departure = Departure(network)
        departure.wait_for(phase)
        departure.stages[victim].kill()
        network.heal()
        network.start_workers(departure.leaver, departure.stages[victim])
        answers.finish()
        departure.check_left()
    if (
        phase != "the KV cache of its layers has arrived"
    ):  # or it may have been over when the loss was noticed
        name = departure.stages[victim].name
        assert f"the move was undone: worker {name} was lost" in network.events()


# ------------------------------------------------------------------ cut


def test_kv_cache_is_computed_again_if_the_link_that_carries_it_is_cut(network: Network) -> None:
    with network.answers(max_new_tokens=200) as answers:  # it may take 5 s to give a dial up
        network.make_narrow()
        departure = Departure(network)
        line = departure.wait_for("sending the KV cache")
        door = network.doors[re.findall(r" to ([\w-]+)", line)[0]]
        door.refuse()
        door.cut()
        answers.check_under_way()
        network.start_workers(departure.leaver)
        departure.check_left()
        network.heal()
        answers.finish()
    assert departure.leaver.exit_code == 0
    # or, if the cut was quicker than its first dial
    assert re.search("was lost while KV cache was sent|cannot be reached within", network.events())
    assert "computing its KV cache again; because worker" in network.events()


@pytest.mark.parametrize("stage", [0, LEAVER])
def test_worker_may_lose_its_coordinator_for_an_instant_while_layers_move(
    network: Network, stage: int
) -> None:
    with network.answers() as answers:
        network.make_narrow()
        departure = Departure(network)
        departure.wait_for("sending the KV cache")
        network.lifelines[departure.stages[stage].name].cut()
        network.start_workers(departure.leaver)
        departure.check_left()
        network.heal()
        answers.finish()
    assert departure.leaver.exit_code == 0
    assert "the move was undone" in network.events()
