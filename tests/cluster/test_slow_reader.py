"""Clients that do not read, and clients that are killed: they harm nobody and leave nothing."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq

from distributed_llm import DistributedClient, LocalCluster
from distributed_llm.common import codec
from distributed_llm.common.keyring import Keyring, state_folder
from distributed_llm.common.messages import ClientHello, ClusterStatus, Generate, GetStatus, Ping
from distributed_llm.common.sampling_params import SamplingParams
from distributed_llm.common.tensors import frame_of_token_ids
from tests.reference import reference_ids
from tests.unhurried_worker import unhurried_workers
from tests.waiting import eventually
from tests.wire.test_transport import raw_sockets

pytestmark = pytest.mark.timeout(60)

OPEN_END: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
BEAT_S = 0.1
BACKLOG_BYTES = 8 << 20
"""Size of the messages that the coordinator keeps at most for a client that does not read."""

MAX_GROWTH_BYTES = 4 * BACKLOG_BYTES
"""Growth of the coordinator's memory at most: the backlog, and what the allocator keeps."""

MAX_GAP_S = 2.0
"""Time between two tokens of a client that reads at most; some 50 ms if it is alone."""


class Mute:
    """A client that asks and never reads its answers. Closing it closes its connection."""

    def __init__(self, make: Callable[..., "zmq.Socket[bytes]"], address: str) -> None:
        self._socket = make(zmq.DEALER, rcvhwm=1, rcvbuf=4096, sndtimeo=20_000, rcvtimeo=20_000)
        Keyring(state_folder()).login(address).put_on(self._socket)
        self._socket.connect(f"tcp://{address}")
        self._socket.send_multipart(codec.encode(ClientHello()))
        self._socket.recv_multipart()

    def ask(self, name: str, token_ids: list[int], **params: Any) -> None:
        spec, frame = frame_of_token_ids(token_ids)
        asked = Generate(
            request_id=name,
            prompt="token_ids",
            params=SamplingParams.from_arguments({**params, **OPEN_END}),
            tensors=(spec,),
        )
        self._socket.send_multipart(codec.encode(asked, [frame]))

    def say(self, message: GetStatus | Ping) -> None:
        self._socket.send_multipart(codec.encode(message))

    def close(self) -> None:
        self._socket.close(0)


@pytest.fixture(scope="module")
def unhurried(checkpoint: Path) -> Iterator[LocalCluster]:
    """Two stages that take 40 ms for a token together, and ten seconds for a long answer."""
    settings = {"min_workers": 2, "strategy": "memory", "heartbeat_interval_s": BEAT_S}
    with ExitStack() as stack:
        cluster = stack.enter_context(LocalCluster(checkpoint, 0, coordinator=settings))
        coordinators = dict.fromkeys(("worker-1", "worker-2"), cluster.address)
        workers = unhurried_workers(coordinators, min_task_s=0.02, max_memory="1GiB")
        stack.enter_context(workers)
        cluster.wait_until_serving(num_workers=2)
        yield cluster


@pytest.fixture
def mute(unhurried: LocalCluster) -> Iterator[Mute]:
    with raw_sockets() as raw:
        yield Mute(raw, unhurried.address)


@pytest.fixture
def client(unhurried: LocalCluster) -> Iterator[DistributedClient]:
    """One on a cluster that does nothing."""
    with DistributedClient(unhurried.address) as client:
        eventually(lambda: is_idle(client.status()))
        yield client


def is_idle(status: ClusterStatus) -> bool:
    return (status.answers_running, status.answers_waiting, status.kv_tokens_used) == (0, 0, 0)


def read(client: DistributedClient, prompt: list[int], num_tokens: int) -> tuple[list[int], float]:
    """Return the answer to `prompt`, and the longest wait between two of its tokens, s."""
    token_ids: list[int] = []
    times = []
    for chunk in client.stream(prompt, max_new_tokens=num_tokens, **OPEN_END):
        token_ids += chunk.token_ids
        times.append(time.monotonic())
    return token_ids, max(after - before for before, after in pairwise(times))


def test_client_that_never_reads_is_given_up_at_little_cost(
    unhurried: LocalCluster, client: DistributedClient, mute: Mute, checkpoint: Path
) -> None:
    """It asks for five times as much as may wait for it; that it is alive, nobody can doubt."""
    coordinator = psutil.Process(unhurried.coordinator.pid)
    before = client.status()
    rss_bytes = coordinator.memory_info().rss
    reports = 5 * BACKLOG_BYTES // len(codec.encode_payload(before))
    mute.ask("mute", [41, 7, 5], max_new_tokens=240, n=2)
    eventually(lambda: client.status().answers_running == 2)
    prompts = [31, 7, 5], [32, 7]
    with ThreadPoolExecutor(2) as pool, DistributedClient(unhurried.address) as other:
        readers = [
            pool.submit(read, *who, 60) for who in zip((client, other), prompts, strict=True)
        ]
        asked = 0
        while asked < reports or not all(reader.done() for reader in readers):
            for _ in range(1000):
                mute.say(GetStatus())
            asked += 1000
            wait(readers, timeout=BEAT_S / 2)
            assert coordinator.memory_info().rss - rss_bytes < MAX_GROWTH_BYTES
        answers = [reader.result() for reader in readers]
    assert [ids for ids, _ in answers] == [reference_ids(checkpoint, p, 60) for p in prompts]
    assert max(gap_s for _, gap_s in answers) < MAX_GAP_S
    eventually(lambda: is_idle(client.status()))
    assert client.status().requests_cancelled == before.requests_cancelled + 1
    refused = before.rejected.get("bad_state", 0) + reports // 2  # once it was given up
    eventually(lambda: client.status().rejected.get("bad_state", 0) > refused)
    assert coordinator.memory_info().rss - rss_bytes < MAX_GROWTH_BYTES


def test_client_that_reads_nothing_and_leaves_frees_its_memory(
    client: DistributedClient, mute: Mute, checkpoint: Path
) -> None:
    mute.ask("mute", [42, 7, 5], max_new_tokens=240, n=2)
    eventually(lambda: client.status().answers_running == 2)
    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(read, client, [33, 7, 5], 30)
        while not reader.done():
            mute.say(Ping())
            wait([reader], timeout=0.1)
    token_ids, gap_s = reader.result()
    assert token_ids == reference_ids(checkpoint, [33, 7, 5], 30)
    assert gap_s < MAX_GAP_S
    assert client.status().answers_running == 2
    assert client.status().kv_tokens_used > 0
    mute.close()
    eventually(lambda: is_idle(client.status()), limit_s=5)


def held_bytes(client: DistributedClient) -> list[int]:
    """Return what each stage of an idle cluster holds when it has freed what it was told to."""
    client.generate([70], max_new_tokens=1)  # the task says what is to be freed before it
    since = time.monotonic() + BEAT_S

    def told() -> list[int]:
        workers = client.status().workers
        heard_at = time.monotonic() - max(worker.last_heard_s for worker in workers)
        return [worker.kv_bytes for worker in workers] if heard_at > since else []

    return eventually(told)


READS_UNTIL_KILLED = """
import sys
from distributed_llm import DistributedClient

client = DistributedClient(sys.argv[1])
for _ in client.stream([61, 62, 63], max_new_tokens=240, ignore_eos=True, n=3):
    print("token", flush=True)
"""


def test_client_that_is_killed_leaves_nothing_on_any_stage(
    unhurried: LocalCluster, client: DistributedClient
) -> None:
    held = held_bytes(client)
    command = [sys.executable, "-c", READS_UNTIL_KILLED, unhurried.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as victim:
        assert victim.stdout
        assert victim.stdout.readline() == "token\n"
        eventually(
            lambda: all(
                worker.kv_bytes > before
                for worker, before in zip(client.status().workers, held, strict=True)
            )
        )
        assert client.status().answers_running == 3
        victim.kill()
    eventually(lambda: is_idle(client.status()), limit_s=5)
    eventually(lambda: [worker.kv_bytes for worker in client.status().workers] == held, limit_s=5)
