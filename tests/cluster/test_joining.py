"""How workers find their coordinator: before it runs, by IPv6, by names; and how they leave it."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from distributed_llm import CoordinatorUnreachable, DistributedClient, LocalCluster
from tests.reference import reference_text
from tests.waiting import eventually
from tests.warm import warm_worker

COMMAND = [sys.executable, "-m", "distributed_llm"]
LIMIT_S = 60
UNKNOWN = "nobody.invalid:5555"  # RFC 6761: no name ends so


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as bound:
            bound.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_a_cluster_over_ipv6(checkpoint: Path) -> None:
    settings = {"bind": "[::1]:0", "strategy": "memory"}
    with LocalCluster(checkpoint, workers=2, coordinator=settings) as cluster:
        assert cluster.address.startswith("[::1]:")
        said = cluster.coordinator.log_tail()
        assert f"dllm worker --coordinator {cluster.address} " in said
        assert "only this machine can reach" in said
        with DistributedClient(cluster.address) as client:
            text = client.generate("Hi", max_new_tokens=20, ignore_eos=True, temperature=0.0)
            assert text == reference_text(checkpoint, "Hi", 20)
            assert [worker.link for worker in client.status().workers].count("direct") >= 1


def test_a_worker_waits_for_its_coordinator(
    checkpoint: Path, tmp_path: Path, unused_port: int
) -> None:
    address = f"127.0.0.1:{unused_port}"
    log = tmp_path / "log"
    serve = [*COMMAND, "coordinator", str(checkpoint), "--bind", address]
    with ExitStack() as stack:
        worker = stack.enter_context(warm_worker(log, "--wait", "--coordinator", address))
        eventually(lambda: f"waiting for the coordinator at {address}" in log.read_text())
        coordinator = stack.enter_context(
            subprocess.Popen(serve, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        )
        stack.callback(coordinator.kill)
        client = stack.enter_context(DistributedClient(address, connect_timeout_s=LIMIT_S))
        eventually(lambda: client.status().state == "serving")
        if sys.platform != "win32":
            os.kill(worker.pid, signal.SIGHUP)  # as when its terminal is closed
            assert worker.wait(LIMIT_S) == 0
            coordinator.send_signal(signal.SIGHUP)
            assert coordinator.wait(LIMIT_S) == 0


def test_a_name_that_nobody_knows_is_told_at_once() -> None:
    for verb in ("status", "worker"):
        done = subprocess.run(
            [*COMMAND, verb, "--coordinator", UNKNOWN],
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        assert done.returncode == 3
        assert "'nobody.invalid' of nobody.invalid:5555 is not known here" in done.stderr
        assert "Traceback" not in done.stderr
    with (
        DistributedClient(UNKNOWN, connect_timeout_s=LIMIT_S) as client,
        pytest.raises(CoordinatorUnreachable, match="not known"),
    ):
        client.status()


@pytest.mark.skipif(sys.platform == "win32", reason="there is no nohup")
def test_nohup_is_respected(checkpoint: Path) -> None:
    with subprocess.Popen(
        ["nohup", *COMMAND, "coordinator", str(checkpoint), "--bind", "127.0.0.1:0"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as running:
        try:
            assert running.stdout is not None
            address = running.stdout.readline().strip()
            running.send_signal(signal.SIGHUP)
            with DistributedClient(address) as client:
                for _ in range(3):
                    assert client.status().model
            running.terminate()
            assert running.wait(LIMIT_S) == 0
        finally:
            running.kill()
