"""Bad connections between workers, and to their coordinator: no token changes."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from distributed_llm import DistributedClient, LocalCluster
from distributed_llm.common.messages import Addresses, WorkerHello
from tests.checkpoints import HIDDEN_SIZE
from tests.cluster.hello_relay import HelloRelay
from tests.cluster.test_commands import dllm
from tests.fault_proxy import FaultProxy, Faults
from tests.reference import check_varied, reference_ids
from tests.unhurried_worker import unhurried_workers
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(90)

PROMPTS = [[3 + n, *((7 * i + n) % 90 + 3 for i in range(n))] for n in (1, 8, 30, 90)]
NUM_TOKENS = 60
MIN_TASK_S = 0.005
"""Least time of a task, with which an answer takes about a second: long enough to break a link."""

ACTIVATIONS_BYTES = len(PROMPTS) * NUM_TOKENS * HIDDEN_SIZE * 4
"""Size of the activations of all answers, which every stage but the last sends on, at least."""

SILENCE_S = 4.0
"""Time after which a silent connection is closed: ZeroMQ's heartbeat interval and its timeout."""

LIMIT_S = SILENCE_S + 8.0
"""Time limit of an answer that waits for that; no lease of a step, 30 s, may run out for it."""

OPEN_END: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "timeout_s": LIMIT_S}


def links(client: DistributedClient) -> list[str]:
    """Return how each stage sends its results on, in the order of the stages."""
    workers = [worker for worker in client.status().workers if worker.layers]
    return [worker.link for worker in sorted(workers, key=lambda worker: worker.layers or (0, 0))]


# ------------------------------------------------------------------ networks


@dataclass
class Network:
    """Three stages in the order of their names, and what is between them.

    Attributes:
        expected: what transformers answers to each prompt.
        link: from the first stage to the second.
        lifeline: from the first stage to the coordinator.
    """

    cluster: LocalCluster
    client: DistributedClient
    expected: list[list[int]]
    lifeline: FaultProxy
    proxies: dict[str, FaultProxy] = field(default_factory=dict)

    @property
    def link(self) -> FaultProxy:
        return self.proxies["worker-2"]

    def heal(self) -> None:
        """End all faults and wait until every stage sends its results on directly."""
        for proxy in (self.lifeline, *self.proxies.values()):
            proxy.heal()
        self.cluster.wait_until_serving(num_workers=3)
        eventually(lambda: links(self.client) == ["direct", "direct", ""])

    def begin_new_plan(self) -> None:
        """Let the first stage lose its coordinator for an instant."""
        epoch = self.client.status().epoch
        self.lifeline.cut()
        eventually(lambda: self.client.status().epoch > epoch)
        self.cluster.wait_until_serving(num_workers=3)


class Answers:
    """Answers to all prompts that are under way; each has begun."""

    def __init__(self, network: Network) -> None:
        self._expected = network.expected
        self._streams = [
            network.client.stream(prompt, max_new_tokens=NUM_TOKENS, **OPEN_END)
            for prompt in PROMPTS
        ]
        self._begun = [next(stream) for stream in self._streams]

    def check(self) -> None:
        """Wait for their ends; fail if one is not what is expected."""
        given = [
            [token for chunk in (begun, *stream) for token in chunk.token_ids]
            for begun, stream in zip(self._begun, self._streams, strict=True)
        ]
        assert given == self._expected


@pytest.fixture(scope="module")
def one_network(checkpoint: Path) -> Iterator[Network]:
    expected = [reference_ids(checkpoint, prompt, NUM_TOKENS) for prompt in PROMPTS]
    for answer in expected:
        check_varied(answer)
    with ExitStack() as stack:
        settings = {"min_workers": 3, "strategy": "even"}
        cluster = stack.enter_context(LocalCluster(checkpoint, 0, coordinator=settings))
        client = stack.enter_context(DistributedClient(cluster.address))
        lifeline = stack.enter_context(FaultProxy(cluster.address))
        network = Network(cluster, client, expected, lifeline)

        def behind_proxy(hello: WorkerHello) -> Addresses:
            proxy = stack.enter_context(FaultProxy(hello.peer_addresses[0]))
            network.proxies[hello.name] = proxy
            return (proxy.address,)

        relay = stack.enter_context(HelloRelay(cluster.address, behind_proxy))
        coordinators = {
            "worker-1": lifeline.address,
            "worker-2": relay.address,
            "worker-3": relay.address,
        }
        workers = unhurried_workers(coordinators, min_task_s=MIN_TASK_S, max_memory="256MiB")
        stack.enter_context(workers)
        cluster.wait_until_serving(num_workers=3)
        yield network


@pytest.fixture
def network(one_network: Network) -> Network:
    one_network.heal()
    return one_network


# ------------------------------------------------------------------ the link between two stages


def test_steps_go_round_a_link_that_is_cut_and_over_it_once_it_is_healed(network: Network) -> None:
    answers = Answers(network)
    network.link.refuse()
    network.link.degrade(to_server=Faults(cut_after_bytes=1000))  # in the middle of a task
    eventually(lambda: network.link.num_connections == 0)
    passed = network.link.passed_bytes
    answers.check()
    eventually(lambda: links(network.client) == ["relayed", "direct", ""])
    Answers(network).check()
    assert network.link.passed_bytes == passed
    network.link.heal()

    def came_up_in_the_middle_of_answers() -> bool:
        Answers(network).check()
        return links(network.client)[0] == "direct"

    eventually(came_up_in_the_middle_of_answers, limit_s=40)
    Answers(network).check()
    assert network.link.passed_bytes[0] > passed[0] + ACTIVATIONS_BYTES


def test_link_that_swallows_everything_is_found_out(network: Network) -> None:
    silent = Faults(black_hole=True)
    answers = Answers(network)
    network.link.degrade(to_server=silent, to_client=silent)
    answers.check()
    eventually(lambda: links(network.client) == ["relayed", "direct", ""])
    network.link.heal()


def test_slow_link_is_used_and_waited_for(network: Network) -> None:
    slow = Faults(latency_s=0.02)
    network.link.degrade(to_server=slow, to_client=slow)
    passed, began_at = network.link.passed_bytes, time.monotonic()
    Answers(network).check()
    assert time.monotonic() - began_at > NUM_TOKENS * slow.latency_s
    assert network.link.passed_bytes[0] > passed[0] + ACTIVATIONS_BYTES
    assert links(network.client) == ["direct", "direct", ""]
    network.link.heal()


def test_workers_that_never_reach_each_other_serve_all_the_same(network: Network) -> None:
    for proxy in network.proxies.values():
        proxy.refuse()
        proxy.cut()
    network.begin_new_plan()
    Answers(network).check()
    eventually(lambda: links(network.client) == ["relayed", "relayed", ""])
    Answers(network).check()
    assert all(proxy.num_connections == 0 for proxy in network.proxies.values())
    told = dllm("status", "--coordinator", network.cluster.address).stdout
    rows = [line for line in told.splitlines() if "MiB" in line and "serving" in line]
    assert sorted("relayed" in row for row in rows) == [False, True, True]
    assert told.count("does not reach the next worker; its results go through the coordinator") == 2


# ------------------------------------------------------------------ the link to the coordinator


@pytest.mark.parametrize("refused", [False, True], ids=["for an instant", "until it is missed"])
def test_worker_whose_connection_is_cut_comes_back(network: Network, refused: bool) -> None:
    answers = Answers(network)
    epoch = network.client.status().epoch
    if refused:
        network.lifeline.refuse()
    network.lifeline.cut()
    eventually(lambda: network.client.status().epoch > epoch)
    if refused:
        assert len(network.client.status().workers) == 2
        network.lifeline.heal()
    answers.check()
    network.heal()
    Answers(network).check()
    assert network.client.status().requests_failed == 0
