"""Real clusters of real processes; one small checkpoint for all."""

import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from distributed_llm import DistributedClient, LocalCluster
from tests.checkpoints import make_checkpoint
from tests.warm import checked, warm_workers

__all__ = ["warm_workers"]

NUM_LAYERS = 6


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_is_heard() -> None:
    """Undo what a shell does to jobs in the background: their children would ignore SIGINT."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checked(
        make_checkpoint(
            tmp_path_factory.mktemp("checkpoint") / "tiny llama",
            num_layers=NUM_LAYERS,
            tokenizer=True,
            tie=False,
            seed=10,  # one whose answers vary
        )
    )


@pytest.fixture(scope="session")
def cluster(checkpoint: Path) -> Iterator[LocalCluster]:
    """Three workers that no test harms."""
    with LocalCluster(checkpoint, workers=3, coordinator={"strategy": "memory"}) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def slow_cluster(checkpoint: Path) -> Iterator[LocalCluster]:
    """Two workers with which a long answer takes many seconds."""
    workers = [{"slowdown": 50.0}] * 2
    with LocalCluster(checkpoint, workers, coordinator={"strategy": "memory"}) as cluster:
        yield cluster


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[DistributedClient]:
    with DistributedClient(cluster.address) as client:
        yield client


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])
