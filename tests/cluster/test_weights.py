"""Weights that only the coordinator's machine has: workers get them from it and from each other."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from distributed_llm import DistributedClient
from distributed_llm.common.cache_folder import CACHE_VARIABLE
from distributed_llm.common.checkpoint import Checkpoint, open_checkpoint
from distributed_llm.common.messages import ClusterStatus
from distributed_llm.common.types import LayerRange
from distributed_llm.forking import ForkServer, fork_server
from distributed_llm.local_process import LocalProcess
from tests.checkpoints import make_checkpoint
from tests.hub_snapshot import NAME, write_snapshot
from tests.reference import reference_text
from tests.waiting import eventually
from tests.warm import checked

pytestmark = pytest.mark.timeout(120)
NUM_LAYERS = 6
PROMPT = "A worker holds its layers"
LIMIT_S = 30.0


@dataclass(frozen=True)
class Hub:
    """What the coordinator's machine got from the hub.

    Attributes:
        home: folder of the hub's library.
        checkpoint: in there.
        sha256: of each tensor, by name.
    """

    home: Path
    checkpoint: Checkpoint
    sha256: dict[str, str]

    def names(self, *ranges: LayerRange) -> set[str]:
        """Return the names, in a cache, of the tensors of some layers."""
        return {
            self.sha256[one.name] for part in ranges for one in self.checkpoint.tensors_of(part)
        }

    @property
    def total_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.checkpoint.tensors.values())


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Hub:
    folder = make_checkpoint(
        tmp_path_factory.mktemp("checkpoint") / "llama",
        num_layers=NUM_LAYERS,
        tokenizer=True,
        tie=False,
        seed=10,
        hidden_size=128,
        intermediate_size=384,
        max_shard_size="2MB",
    )
    home = tmp_path_factory.mktemp("hub")
    checkpoint = open_checkpoint(checked(write_snapshot(home / "hub", folder)))

    def digest(name: str) -> str:
        info = checkpoint.tensors[name]
        content = (checkpoint.folder / info.file).read_bytes()
        return hashlib.sha256(content[info.offset : info.offset + info.nbytes]).hexdigest()

    return Hub(home, checkpoint, {name: digest(name) for name in checkpoint.tensors})


@pytest.fixture
def server() -> Iterator[ForkServer | None]:
    with fork_server() as shared:
        yield shared


class Machines:
    """A coordinator that has the weights, and workers that have nothing but a cache of their own.

    Args:
        folder: for caches and logs.
        hub: of the coordinator's machine.
        server: forks the workers.
        stack: ends all processes.
        port: of the coordinator.
    """

    def __init__(
        self, folder: Path, hub: Hub, server: ForkServer | None, stack: ExitStack, port: int
    ) -> None:
        self.folder = folder
        self.address = f"127.0.0.1:{port}"
        self._hub = hub
        self._server = server
        self._stack = stack
        self._count = 0

    def coordinator(self, **settings: Any) -> LocalProcess:
        """Start the coordinator, and return it once it listens."""
        given = {"bind": self.address, "settle_s": 0.05, "strategy": "even", **settings}
        environment = {f"DLLM_COORDINATOR__{key.upper()}": str(v) for key, v in given.items()}
        environment |= {"HF_HOME": str(self._hub.home), "HF_HUB_OFFLINE": "1"}
        process = self._start("coordinator", ["coordinator", NAME], environment, None)
        assert process.stdout.readline().decode().strip() == self.address, process.log_tail()
        return process

    def worker(self, name: str, **settings: Any) -> LocalProcess:
        """Start a worker, whose cache is kept from one start to the next."""
        given = {
            "name": name,
            "coordinator": self.address,
            "threads": 1,
            "max_memory": "256MiB",
            "leave_timeout_s": 0,
            **settings,
        }
        environment = {f"DLLM_WORKER__{key.upper()}": str(value) for key, value in given.items()}
        environment |= {CACHE_VARIABLE: str(self.cache(name))}
        return self._start(name, ["worker"], environment, self._server)

    def _start(
        self,
        name: str,
        command: list[str],
        environment: dict[str, str],
        server: ForkServer | None,
    ) -> LocalProcess:
        self._count += 1
        process = LocalProcess(
            name, command, environment, self.folder / f"{self._count}-{name}.log", server
        )
        self._stack.callback(process.close)
        return process

    def cache(self, name: str) -> Path:
        """Return the folder of a worker's cache."""
        return self.folder / name

    def complete(self, name: str) -> dict[str, int]:
        """Return the inodes of the complete entries of a worker's cache, by name."""
        entries = self.cache(name).glob("tensors/*/*")
        return {entry.name: os.stat(entry).st_ino for entry in entries}

    def written_bytes(self, name: str) -> int:
        """Return the bytes in a worker's cache, complete or not."""
        files = [*self.cache(name).glob("tensors/*/*"), *self.cache(name).glob("partial/*")]
        return sum(size_of(file) for file in files)


def size_of(file: Path) -> int:
    try:
        return os.stat(file).st_size
    except FileNotFoundError:  # complete meanwhile
        return 0


@pytest.fixture
def machines(
    tmp_path: Path, hub: Hub, server: ForkServer | None, unused_port: int
) -> Iterator[Machines]:
    with ExitStack() as stack:
        yield Machines(tmp_path, hub, server, stack, unused_port)


@contextmanager
def client_of(machines: Machines) -> Iterator[DistributedClient]:
    with DistributedClient(machines.address, connect_timeout_s=LIMIT_S) as client:
        yield client


def serving(client: DistributedClient, *names: str) -> ClusterStatus:
    """Return the status once these workers, and no others, serve."""

    def look() -> ClusterStatus | None:
        status = client.status()
        found = {worker.name for worker in status.workers if worker.state == "serving"}
        return status if status.state == "serving" and found == {*names} else None

    status = eventually(look, limit_s=LIMIT_S)
    assert status is not None
    return status


def layers_of(status: ClusterStatus) -> dict[str, LayerRange]:
    return {worker.name: worker.layers for worker in status.workers if worker.layers}


def answer(client: DistributedClient) -> str:
    return str(client.generate(PROMPT, max_new_tokens=20, ignore_eos=True, temperature=0.0))


def test_workers_without_weights_serve_and_keep_no_more_than_their_layers(
    machines: Machines, hub: Hub
) -> None:
    expected = reference_text(hub.checkpoint.folder, PROMPT, 20)
    machines.coordinator(min_workers=2)
    for name in ("pc", "mac"):
        machines.worker(name)
    with client_of(machines) as client:
        before = layers_of(serving(client, "pc", "mac"))
        assert answer(client) == expected
        for name, layers in before.items():
            assert machines.complete(name).keys() == hub.names(layers)
        kept = machines.complete("pc")
        machines.worker("late")
        eventually(lambda: any(w.name == "late" for w in client.status().workers))
        client.drain_worker("mac")  # to which "late" is heir
        after = layers_of(serving(client, "pc", "late"))
        assert answer(client) == expected
        assert machines.complete("late").keys() == hub.names(after["late"])
        assert machines.complete("pc").keys() == hub.names(before["pc"], after["pc"])
        assert machines.complete("pc").items() >= kept.items(), "nothing was fetched again"


def test_a_fetch_goes_on_whoever_is_killed_and_started_again(machines: Machines, hub: Hub) -> None:
    coordinator = machines.coordinator()
    worker = machines.worker("pc", max_transfer_rate="1MiB")
    found: dict[str, int] = {}

    def fetched(share: float) -> None:
        """Wait for so much of the weights; what is complete is not fetched again."""
        eventually(lambda: machines.written_bytes("pc") > share * hub.total_bytes, limit_s=LIMIT_S)
        complete = machines.complete("pc")
        assert complete.items() >= found.items()
        assert len(complete) < len(hub.names(LayerRange(0, NUM_LAYERS))), "it was too quick"
        found.update(complete)

    fetched(0.15)
    worker.kill()
    worker = machines.worker("pc", max_transfer_rate="1MiB")
    fetched(0.3)
    coordinator.kill()
    machines.coordinator()
    fetched(0.45)
    worker.terminate()
    assert worker.wait(LIMIT_S) == 0, worker.log_tail()
    assert "Traceback" not in worker.log.read_text()
    before = machines.written_bytes("pc")
    machines.worker("pc")
    with client_of(machines) as client:
        serving(client, "pc")
        assert answer(client) == reference_text(hub.checkpoint.folder, PROMPT, 20)
    assert before < hub.total_bytes
    assert machines.complete("pc").items() >= found.items()
    assert machines.written_bytes("pc") == hub.total_bytes
