"""What handing a step from stage to stage costs: bytes through the coordinator, and round trips.

    python -m benchmarks.handoff bytes
    python -m benchmarks.handoff roundtrip [--ray-python PYTHON]

`bytes` counts in a proxy before the coordinator's port what passes while tokens are generated.

`roundtrip` sends tasks of one decode token, 4 KiB of hidden states, to a real worker process whose
stage computes nothing: transport, codec, agent, compute thread and back. Beside it, in turns: bare
pyzmq under asyncio with a child process that echoes the same bytes, and a Ray actor that does, if
the interpreter has Ray (`pip install ray`).
"""

import argparse
import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

from benchmarks import echo
from benchmarks.common import ask, fresh_prompts, gather, print_table
from distributed_llm import AsyncDistributedClient, LocalCluster
from distributed_llm.common import codec
from distributed_llm.common.cache_folder import cache_folder
from distributed_llm.common.keyring import Keyring, state_folder
from distributed_llm.common.keys import PublicKey
from distributed_llm.common.messages import (
    Capabilities,
    Heartbeat,
    LoadStage,
    ModelSource,
    Pong,
    StageReady,
    StageTime,
    TaskResult,
    ToWorker,
    Welcome,
    WorkerHello,
)
from distributed_llm.common.tensors import Frame
from distributed_llm.common.transport import Router
from distributed_llm.common.types import Epoch, LayerRange, PeerId
from distributed_llm.common.units import split_address
from distributed_llm.coordinator.trust.store import Trust
from distributed_llm.weights.cache.content_cache import ContentCache
from tests import checkpoints
from tests.fault_proxy import FaultProxy

STAGES = 3
HIDDEN_SIZE = 2048
NEW_TOKENS = 128
TRIPS = 2000
WARM_UP = 200

_CAPABILITIES = Capabilities(
    device="cpu",
    device_name="null",
    platform="none",
    memory_bytes=1 << 30,
    cores=1,
    threads=1,
    memory_bandwidth_bytes_per_s=1e9,
    flops_per_s=1e9,
)

# ------------------------------------------------------------------ bytes through the coordinator


async def count_bytes() -> None:
    """Print the bytes per generated token between the coordinator and its peers."""
    with tempfile.TemporaryDirectory() as folder:
        model = checkpoints.make_checkpoint(
            Path(folder),
            num_layers=STAGES,
            hidden_size=HIDDEN_SIZE,
            intermediate_size=HIDDEN_SIZE,
            num_attention_heads=16,
            max_position_embeddings=2048,
            vocab_size=1000,
        )
        with (
            LocalCluster(model, workers=0, coordinator={"strategy": "memory"}) as cluster,
            _behind_proxies(cluster) as proxies,
        ):
            to_workers, to_clients = proxies
            async with AsyncDistributedClient(to_clients.address) as client:
                rows = [
                    await _bytes_per_token(client, count, to_workers, to_clients)
                    for count in (1, 16)
                ]
                links = [worker.link for worker in (await client.status()).workers]
    print(f"\n{STAGES} stages, hidden size {HIDDEN_SIZE}, links: {', '.join(filter(None, links))}")
    head = ("requests at once", "workers, bytes per token", "clients, bytes per token", "together")
    print_table(head, rows)


@contextlib.contextmanager
def _behind_proxies(cluster: LocalCluster) -> Iterator[tuple[FaultProxy, FaultProxy]]:
    """Start the workers behind a proxy; yield that, and another one for clients."""
    with FaultProxy(cluster.address) as workers, FaultProxy(cluster.address) as clients:
        for _ in range(STAGES):
            cluster.add_worker(coordinator=workers.address, threads=1)
        cluster.wait_until_serving(num_workers=STAGES)
        yield workers, clients


async def _bytes_per_token(
    client: AsyncDistributedClient, count: int, *proxies: FaultProxy
) -> Sequence[object]:
    """Return how many requests, and bytes per token of each proxy and together."""
    prompts = fresh_prompts(count, 16, vocab_size=1000)
    await gather(ask(client, prompt, 8) for prompt in prompts)  # warms up
    before = [sum(proxy.passed_bytes) for proxy in proxies]
    await gather(ask(client, prompt, NEW_TOKENS) for prompt in prompts)
    passed = [sum(proxy.passed_bytes) - was for proxy, was in zip(proxies, before, strict=True)]
    tokens = count * NEW_TOKENS
    return count, *(number / tokens for number in passed), sum(passed) / tokens


# ------------------------------------------------------------------ round trips


class NullStage:
    """A real worker process without layers, and the end that sends it tasks."""

    def __init__(self) -> None:
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._answered: asyncio.Future[None] | None = None
        self._task = echo.task()
        self._trust = Trust(state_folder(), 0, now=time.time())
        door = self._trust.door
        self._router = Router("127.0.0.1:0", self._on_message, lambda: None, door=door)
        self._trust.listening(split_address(self._router.address)[1])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.handoff", "--null-worker", self._router.address],
            stdin=subprocess.DEVNULL,
        )

    async def median_us(self, trips: int) -> float:
        """Return the median round trip of so many tasks, one after the other, microseconds."""
        await self._ready
        times = []
        for _ in range(trips):
            self._answered = asyncio.get_running_loop().create_future()
            started = time.perf_counter()
            self._router.send(self._peer, self._task)
            await self._answered
            times.append(time.perf_counter() - started)
        return statistics.median(times) * 1e6

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._router.close()
        self._trust.close()

    def _on_message(self, peer: PeerId, key: PublicKey, frames: list[Frame]) -> None:
        message, _ = codec.to_coordinator.decode(frames)
        match message:
            case TaskResult() if self._answered:
                self._answered.set_result(None)
            case WorkerHello():
                self._peer = peer
                self._say(
                    Welcome(worker_id="null", heartbeat_interval_s=60.0, silence_timeout_s=600.0)
                )
                self._say(_LOAD)
            case StageReady():
                self._ready.set_result(None)
            case Heartbeat():
                self._say(Pong())
            case _:
                raise AssertionError(message)

    def _say(self, message: ToWorker) -> None:
        self._router.send(self._peer, codec.encode(message))


_LOAD = LoadStage(
    epoch=Epoch(1),
    source=ModelSource(kind="folder", name="none"),
    layers=LayerRange(0, 1),
    dtype="bfloat16",
    wire_dtype="bfloat16",
    digest="",
    kv_tokens=1024,
    link_key="",
)


def serve_null_stage(address: str) -> None:
    """Be a worker whose stage gives back what it got, until killed."""
    from distributed_llm.worker import service
    from distributed_llm.worker.compute import engine
    from distributed_llm.worker.compute.computing import TensorsOnWire
    from distributed_llm.worker.session import events

    class NullEngine(engine.Engine):
        def put(self, order: events.Order) -> None:
            if isinstance(order, events.Load):
                load = order.order
                self._post(events.Loaded(order.session, load.epoch, 0.0, 0, load.kv_tokens))
            else:
                super().put(order)

        def _compute(self, run: events.Run) -> tuple[TensorsOnWire, StageTime]:
            none = StageTime(compute_us=0, layers_us=0, queued_us=0)
            return (run.task.tensors[1:], run.frames[1:]), none

    worker = service.Worker(
        "null",
        _CAPABILITIES,
        address=address,
        addresses=(address,),
        login=Keyring(state_folder()).login(address),
        peer_bind="127.0.0.1:0",
        slowdown=1.0,
        local_model="",
        cache=ContentCache(cache_folder(), None),
        connect_timeout_s=10.0,
        leave_timeout_s=0.0,
    )
    with patch.object(service, "Engine", NullEngine):
        asyncio.run(worker.run())


class RayActor:
    """A Ray actor in a process of its own, driven by lines."""

    def __init__(self, python: str) -> None:
        self._process = subprocess.Popen(
            [python, str(Path(__file__).with_name("ray_call.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "RAY_DEDUP_LOGS": "0", "RAY_USAGE_STATS_ENABLED": "0"},
        )
        if self._answer() != "ready":
            raise SystemExit(f"Ray does not run under {python}; see above.")

    def median_us(self, trips: int) -> float:
        """Return the median round trip of so many calls, microseconds."""
        assert self._process.stdin is not None
        print(len(echo.PAYLOAD), trips, file=self._process.stdin, flush=True)
        return float(self._answer())

    def close(self) -> None:
        """End it."""
        self._process.communicate("")

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


async def round_trips(rounds: int, ray_python: str) -> None:
    """Print medians of all kinds, measured in turns."""
    null = NullStage()
    ray = RayActor(ray_python) if _has_ray(ray_python) else None
    medians: dict[str, list[float]] = {"task of a null stage": [], "pyzmq, asyncio": []}
    if ray:
        medians["Ray actor call"] = []
    await null.median_us(WARM_UP)
    for _ in range(rounds):
        medians["task of a null stage"].append(await null.median_us(TRIPS))
        medians["pyzmq, asyncio"].append(await asyncio.to_thread(echo.measure, "pyzmq, asyncio"))
        if ray:
            medians["Ray actor call"].append(await asyncio.to_thread(ray.median_us, TRIPS))
    null.close()
    if ray:
        ray.close()
    found = {kind: statistics.median(values) for kind, values in medians.items()}
    ours = found["task of a null stage"]
    rows = [(kind, round(value), ours / value) for kind, value in found.items()]
    print_table(("round trip of 4 KiB", "µs", "task of a null stage / this"), rows)


def _has_ray(python: str) -> bool:
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('ray') is None)"
    return subprocess.run([python, "-c", code], check=False).returncode == 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("kind", nargs="?", choices=("bytes", "roundtrip"), default="roundtrip")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ray-python", default=sys.executable, help="an interpreter with Ray")
    parser.add_argument("--null-worker", metavar="ADDRESS", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.null_worker:
        serve_null_stage(arguments.null_worker)
    elif arguments.kind == "bytes":
        asyncio.run(count_bytes())
    else:
        asyncio.run(round_trips(arguments.rounds, arguments.ray_python))
