"""What a cluster connects to: the coordinator that was named, and the workers that it names."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from distributed_llm import DistributedClient, LocalCluster
from tests.waiting import eventually

COMMAND = [sys.executable, "-m", "distributed_llm"]
ELSEWHERE = """
import socket, zmq
socket.socket().connect_ex(("127.0.0.1", 9))
zmq.Context().socket(zmq.DEALER).connect("tcp://127.0.0.1:10")
"""
SPY = Path(__file__).parent / "spy"


@dataclass(frozen=True)
class Connect:
    """One call that reaches out.

    Attributes:
        how: by which function.
        kind: of socket; empty for ZeroMQ's.
        target: "HOST:PORT".
    """

    process: int
    how: str
    kind: str
    target: str

    @property
    def sends_nothing(self) -> bool:
        """Whether it only asks the system by which of its addresses the target would be reached."""
        return self.how == "socket.connect" and self.kind == "SOCK_DGRAM"


@pytest.fixture
def spied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have processes write down what they connect to; the file in which they do."""
    log = tmp_path / "connects"
    log.touch()
    paths = (str(SPY), os.environ.get("PYTHONPATH", ""), str(Path(__file__).parents[2]))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv("SPY_LOG", str(log))
    return log


def read(log: Path) -> list[Connect]:
    rows = [line.split("\t") for line in log.read_text(encoding="utf-8").splitlines()]
    return [Connect(int(process), *rest) for process, *rest in rows]


def elsewhere(connects: list[Connect], allowed: set[str]) -> list[Connect]:
    """Return what went to no place that was named."""
    return [one for one in connects if not one.sends_nothing and one.target not in allowed]


def own_addresses() -> set[str]:
    """Return all IP addresses of this machine."""
    held = psutil.net_if_addrs().values()
    return {"127.0.0.1", *(one.address for addresses in held for one in addresses)}


def listened_on(pid: int) -> set[str]:
    """Return the addresses at which a process lets others connect."""
    ports = {
        one.laddr.port
        for one in psutil.Process(pid).net_connections("tcp")
        if one.status == psutil.CONN_LISTEN
    }
    return {f"{host}:{port}" for host in own_addresses() for port in ports}


def test_a_cluster_connects_to_nobody_but_its_own(checkpoint: Path, spied: Path) -> None:
    with LocalCluster(checkpoint, workers=2, coordinator={"strategy": "even"}) as cluster:
        with DistributedClient(cluster.address) as client:
            eventually(lambda: "direct" in [one.link for one in client.status().workers])
        generate = [*COMMAND, "generate", "--coordinator", cluster.address, "Hi"]
        subprocess.run(generate, check=True, capture_output=True, timeout=60)
        workers = [worker.pid for worker in cluster.workers]
        between = set[str]().union(*map(listened_on, workers))
        connects = read(spied)
        # A worker looks whether other machines reach the coordinator, which is beside it.
        port = cluster.address.rpartition(":")[2]
        named = {cluster.address, *between, *(f"{host}:{port}" for host in own_addresses())}
        assert elsewhere(connects, named) == []
        # It was watched: both workers and the client called the coordinator, one worker the other,
        to_coordinator = {one.process for one in connects if one.target == cluster.address}
        assert {*workers} < to_coordinator
        assert {one.process for one in connects if one.target in between} <= {*workers}
        assert any(one.target in between for one in connects)
        # the coordinator nobody,
        own = [one for one in connects if one.process == cluster.coordinator.pid]
        assert all(one.sends_nothing for one in own)
        # and who calls another place is found out.
        subprocess.run([sys.executable, "-c", ELSEWHERE], check=True, timeout=60)
        found = elsewhere(read(spied), named)
        assert [(one.how, one.target) for one in found] == [
            ("socket.connect", "127.0.0.1:9"),
            ("zmq.connect", "127.0.0.1:10"),
        ]
