"""What one can read who listens between the parts of a cluster: with keys nothing."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from distributed_llm import DistributedClient, LocalCluster
from distributed_llm.common.messages import Addresses, WorkerHello
from tests.cluster.hello_relay import HelloRelay
from tests.fault_proxy import FaultProxy
from tests.waiting import eventually

PROMPT = "a prompt that nobody else may read"
NUM_TOKENS = 24
STRETCH = 4096
"""Bytes, of one message between workers."""


class Listener:
    """Listens between client, coordinator and two workers; a context manager."""

    def __init__(self, checkpoint: Path, *, insecure: bool) -> None:
        self._settings = {"strategy": "even", "insecure": insecure, "min_workers": 2}
        self._checkpoint = checkpoint
        self._insecure = insecure
        self._between: list[FaultProxy] = []
        self._stack = ExitStack()

    def __enter__(self) -> "Listener":
        enter = self._stack.enter_context
        cluster = enter(LocalCluster(self._checkpoint, workers=0, coordinator=self._settings))
        self._to_coordinator = enter(FaultProxy(cluster.address, record=True))
        relay = enter(HelloRelay(self._to_coordinator.address, self._advertise))
        for _ in range(2):
            cluster.add_worker(coordinator=relay.address)
        self.client = enter(
            DistributedClient(self._to_coordinator.address, insecure=self._insecure)
        )
        cluster.wait_until_serving(num_workers=2)
        eventually(lambda: "direct" in [one.link for one in self.client.status().workers])
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _advertise(self, hello: WorkerHello) -> Addresses:
        proxy = self._stack.enter_context(FaultProxy(hello.peer_addresses[0], record=True))
        self._between.append(proxy)
        return (proxy.address,)

    @property
    def heard(self) -> tuple[bytes, bytes]:
        """What passed the coordinator's port, and what passed between workers."""
        return self._to_coordinator.recorded, b"".join(one.recorded for one in self._between)


@pytest.fixture(params=[False, True], ids=["with keys", "without"])
def listener(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[Listener]:
    with Listener(checkpoint, insecure=request.param) as listener:
        yield listener


def unevenness(data: bytes) -> float:
    """Return how often the most frequent byte is there, in the stretch that looks most random.

    By how often it would be if all were as frequent; about 2 in what is random.
    """
    stretches = (data[at : at + STRETCH] for at in range(0, len(data) - STRETCH, STRETCH // 4))
    counts = [np.bincount(np.frombuffer(one, dtype=np.uint8)).max() for one in stretches]
    return float(min(counts) / (STRETCH / 256))


def test_who_listens_reads_no_prompt_no_tokens_and_no_tensors(
    listener: Listener, request: pytest.FixtureRequest
) -> None:
    insecure = "without" in request.node.name
    client = listener.client
    spoken = client.generate(PROMPT, max_new_tokens=4, temperature=0.0, ignore_eos=True)
    assert spoken
    prompt_ids = [7 * number % 90 + 3 for number in range(40)]
    answer = client.generate(
        prompt_ids, max_new_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True, details=True
    )
    assert len(answer.token_ids) == NUM_TOKENS
    at_coordinator, between = listener.heard
    ids = np.asarray(prompt_ids, dtype="<i4").tobytes()
    readable = {
        "the prompt": PROMPT.encode() in at_coordinator,
        "the token ids": ids in at_coordinator,
        "the token ids, between workers": ids in between,
        "what kind of message": b"task_result" in at_coordinator and b"generate" in at_coordinator,
        "the dtype of tensors": b"float32" in between,
        "numbers of tensors": unevenness(between) > 4.0,
    }
    assert readable == dict.fromkeys(readable, insecure)
    assert len(between) > NUM_TOKENS * 100  # it was listened to
