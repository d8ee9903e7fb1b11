"""The services of deploy/docker-compose.yml, as plain processes on this machine.

Their commands and environment are read from that file; folders and addresses stand for those of the
containers.
"""

import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from distributed_llm.common.join_line import parse_join_line
from tests.waiting import eventually

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(sys.platform == "win32", reason="commands of POSIX"),
]

ROOT = Path(__file__).parents[2]
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(
    (ROOT / "deploy/docker-compose.yml").read_text()
)["services"]
OURS = ("coordinator", "keys", "worker", "api")
DEFAULTS = {"${MODEL:-}": "", "${WORKER_MEMORY:-1GiB}": "1GiB"}
"""What Compose puts in where nothing is set."""


class Machine:
    """Starts services in a folder.

    Args:
        port: of the coordinator.
    """

    def __init__(self, folder: Path, port: int, stack: ExitStack) -> None:
        self.folder = folder
        self._stack = stack
        self._addresses = {
            "0.0.0.0:5555": f"127.0.0.1:{port}",
            "127.0.0.1:5555": f"127.0.0.1:{port}",
            "172.30.55.2:5555": f"127.0.0.1:{port}",
            "0.0.0.0:8000": "127.0.0.1:0",
            "/keys/": f"{folder}/keys/",
            "$$": "$",
        }
        for name in ("worker", "api", "prometheus"):
            (folder / "keys" / name).mkdir(parents=True)

    def start(self, service: str, command: list[str] | None = None) -> "subprocess.Popen[str]":
        """Start a service, or another command in its container."""
        given = SERVICES[service]
        environment = {
            name: self._here(DEFAULTS.get(value, value))
            for name, value in given.get("environment", {}).items()
        }
        state = "coordinator" if service == "keys" else service  # it mounts that one's volume
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        process = subprocess.Popen(
            [self._here(word) for word in command or given["command"]],
            env={**os.environ, **environment, "DLLM_STATE": str(self.folder / state), "PATH": path},
            stdout=subprocess.PIPE,
            text=True,
        )
        self._stack.enter_context(process)
        self._stack.callback(process.kill)
        return process

    def _here(self, word: str) -> str:
        # At once: what stands for one of them may begin like another (port 5555 and port 55553).
        there = "|".join(re.escape(place) for place in self._addresses)
        return re.sub(there, lambda found: self._addresses[found[0]], word)


@pytest.fixture
def machine(tmp_path: Path, unused_port: int) -> Iterator[Machine]:
    with ExitStack() as stack:
        yield Machine(tmp_path, unused_port, stack)


def test_the_services_make_a_cluster_that_asks_for_keys(machine: Machine) -> None:
    coordinator = machine.start("coordinator")
    assert coordinator.stdout is not None
    assert coordinator.stdout.readline()  # it listens
    check = SERVICES["coordinator"]["healthcheck"]["test"][1:]
    assert machine.start("coordinator", check).wait(60) == 0
    assert machine.start("keys").wait(60) == 0
    found = list((machine.folder / "keys").glob("*/*"))
    assert {path.parent.name for path in found} == {"api", "prometheus", "worker"}
    line = machine.folder / "keys/worker/line"
    parse_join_line(line.read_text().strip())
    assert line.stat().st_mode & 0o077 == 0
    machine.start("worker")
    api = machine.start("api")
    assert api.stdout is not None
    url = api.stdout.readline().strip()
    key = (machine.folder / "keys/api/key").read_text().strip()
    models = urllib.request.Request(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"})
    assert urllib.request.urlopen(models).status == 200
    eventually(lambda: list((machine.folder / "worker/keys").glob("*.json")))  # it has joined


def test_no_secret_is_in_the_files_and_nobody_is_root() -> None:
    files = [ROOT / "deploy/docker-compose.yml", ROOT / "deploy/Dockerfile"]
    text = "".join(path.read_text() for path in files)
    assert "dllm://" not in text
    assert "insecure" not in text
    assert "USER 10001" in text
    for name in OURS:
        assert SERVICES[name]["read_only"]
        assert SERVICES[name]["cap_drop"] == ["ALL"]
