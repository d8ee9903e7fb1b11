"""Ctrl-C at a terminal, which all processes of a group hear; and children of programs that fork."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.waiting import eventually

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are no process groups")

LIMIT_S = 60


@contextmanager
def program(source: str, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """Run a program as a shell does in the foreground: in a process group of its own."""
    with subprocess.Popen(
        [sys.executable, "-c", source, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as running:
        try:
            yield running
        finally:
            running.kill()


def line(running: "subprocess.Popen[str]") -> str:
    assert running.stdout is not None
    return running.stdout.readline().strip()


INTERRUPTED = """
import sys, threading
from distributed_llm import DistributedClient, LocalCluster, forking
if sys.argv[2] == "cold":
    forking._can_fork = lambda: False
asked = {"max_new_tokens": 200, "ignore_eos": True, "temperature": 0.0}
with (
    LocalCluster(sys.argv[1], workers=[{"slowdown": 20.0}], progress=None) as cluster,
    DistributedClient(cluster.address) as client,
):
    def tell():
        while not client.status().answers_running:
            pass
        print("running", flush=True)
    for ask in (client.generate, lambda *prompt, **asked: list(client.stream(*prompt, **asked))):
        threading.Thread(target=tell).start()
        try:
            ask("Hi", **asked)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        while client.status().answers_running:
            pass
    print(len(client.generate("Hi", max_new_tokens=3, ignore_eos=True, details=True).token_ids))
    codes = [process.exit_code for process in (cluster.coordinator, *cluster.workers)]
    print(*codes, flush=True)
"""


@pytest.mark.parametrize("kind", ["forked", "cold"])
def test_ctrl_c_cancels_one_request_and_the_cluster_lives(checkpoint: Path, kind: str) -> None:
    with program(INTERRUPTED, str(checkpoint), kind) as running:
        for _ in range(2):
            assert line(running) == "running"
            os.killpg(running.pid, signal.SIGINT)
            assert line(running) == "interrupted"
        assert [line(running), line(running)] == ["3", "None None"]
        _, errors = running.communicate(timeout=LIMIT_S)
        assert (running.returncode, errors) == (0, "")


FORKING = """
import os, sys
from distributed_llm import LocalCluster
from distributed_llm.forking import fork_server
with LocalCluster(sys.argv[1], workers=2, progress=None) as cluster, fork_server() as server:
    processes = [cluster.coordinator, *cluster.workers]
    print(*(process.pid for process in processes), *([server.pid] if server else []), flush=True)
    copy = os.fork()
    if not copy:
        if sys.argv[2] == "leaves":
            sys.exit()  # runs the cluster's __exit__
        sys.stdin.read()
        os._exit(0)
    if sys.argv[2] == "leaves":
        os.waitpid(copy, 0)
        print(*(process.exit_code for process in processes), flush=True)
    sys.stdin.read()
"""


def test_children_end_with_a_killed_program_though_a_fork_of_it_lives(checkpoint: Path) -> None:
    with program(FORKING, str(checkpoint), "stays") as running:
        pids = [int(pid) for pid in line(running).split()]
        assert len(pids) >= 3
        assert all(map(psutil.pid_exists, pids))
        running.kill()
        running.wait(LIMIT_S)
        eventually(lambda: not any(map(psutil.pid_exists, pids)), limit_s=20)


def test_a_fork_that_ends_leaves_the_cluster_alone_and_its_program_leaves_nothing(
    checkpoint: Path,
) -> None:
    """No `if __name__ == "__main__"` is needed: nobody imports the program again."""
    with program(FORKING, str(checkpoint), "leaves") as running:
        pids = [int(pid) for pid in line(running).split()]
        assert line(running) == "None None None"
        _, errors = running.communicate(timeout=LIMIT_S)
        assert (running.returncode, errors) == (0, "")
        eventually(lambda: not any(map(psutil.pid_exists, pids)), limit_s=20)
