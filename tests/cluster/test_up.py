"""`dllm up` as a person meets it: what it prints, what it survives, and how it ends."""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import psutil
import pytest

from distributed_llm.common.addresses import addresses_for_others
from distributed_llm.common.keyring import STATE_VARIABLE
from tests.waiting import eventually

COMMAND = [sys.executable, "-m", "distributed_llm"]
LIMIT_S = 60

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGINT for children")


class Running:
    """A `dllm up` with the lines that it prints, both streams as one."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.said: list[str] = []

    def until(self, text: str) -> str:
        """Return the next line that has `text`."""
        assert self.process.stdout
        for line in self.process.stdout:
            self.said.append(line.rstrip("\n"))
            if text in line:
                return self.said[-1]
        raise AssertionError(f"never said {text!r}: {self.said}")

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def worker(self) -> psutil.Process:
        return next(child for child in self.children() if "worker" in child.cmdline())

    def api(self) -> psutil.Process:
        return next(child for child in self.children() if "api" in child.cmdline())

    def rest(self) -> str:
        assert self.process.stdout
        return self.process.stdout.read()


@contextmanager
def up(state: Path, *arguments: str) -> Iterator[Running]:
    with subprocess.Popen(
        [*COMMAND, "up", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, STATE_VARIABLE: str(state), "PYTHONUNBUFFERED": "1"},
    ) as process:
        try:
            yield Running(process)
        finally:
            process.kill()


def dllm(state: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env={**os.environ, STATE_VARIABLE: str(state)},
        check=False,
    )


def test_one_command_serves_here_and_invites_others(
    checkpoint: Path, tmp_path: Path, unused_port: int
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    bind = f"0.0.0.0:{unused_port}"
    with up(here, str(checkpoint), "--bind", bind, "--max-memory", "256MiB") as running:
        begun = running.until("starting a coordinator")
        assert str(here / "logs" / str(unused_port)) in begun
        running.until("is served, with room for")
        page = running.until("page:").split()[-1]
        url, _, admin = page.partition("/#key=")
        assert running.until("base URL for apps:").endswith(f"{url}/v1")
        key = running.until("key for apps:").split()[-1]
        assert shlex.split(running.until("try:"))[:3] == ["try:", "curl", f"{url}/v1/completions"]
        for one, name in ((admin, "page"), (key, "app")):
            with openai.OpenAI(base_url=f"{url}/v1", api_key=one) as client:
                assert client.models.list().data, name
        keys = here / "api_keys" / f"{unused_port}.json"
        assert keys.stat().st_mode & 0o077 == 0
        assert any("joined: 256.0 MiB" in line for line in running.said)
        assert running.until("dllm generate").endswith('"Once upon a time"')
        assert f"--coordinator 127.0.0.1:{unused_port}" in running.said[-1]
        if addresses_for_others(bind):
            line = running.until("dllm join dllm://").split()[-1]
            assert re.search(
                r"good for 10 machines until tomorrow \d\d:\d\d", running.until("good")
            )
            for name, called in (("a", "old"), ("b", "old-2")):
                joined = dllm(there / name, "join", line, "--enrol-only", "--name", "old")
                assert (joined.returncode, joined.stdout) == (0, "")
                assert f"{called} is enrolled" in joined.stderr
        else:
            running.until("Only this machine can reach it.")
        running.until("Ctrl-C")

        taken = dllm(here, "up", "--bind", bind)
        assert taken.returncode == 2
        assert "A coordinator that serves " in taken.stderr
        assert f"`dllm status --coordinator 127.0.0.1:{unused_port}`" in taken.stderr
        assert f"--bind 0.0.0.0:{unused_port + 1}" in taken.stderr

        running.api().send_signal(signal.SIGKILL)
        running.until("the API ended (SIGKILL;")
        running.until("the API serves again")
        with openai.OpenAI(base_url=f"{url}/v1", api_key=key) as client:
            assert client.models.list().data
        running.worker().send_signal(signal.SIGKILL)
        running.until("the worker of this machine ended (SIGKILL;")
        assert "it is started again in 1.0 s" in running.said[-1]
        eventually(lambda: any("worker" in child.cmdline() for child in running.children()))
        children = running.children()
        running.process.send_signal(signal.SIGINT)
        running.until("the worker leaves first (again: at once)")
        assert running.process.wait(LIMIT_S) == 130
        assert "Traceback" not in running.rest()
        psutil.wait_procs(children, LIMIT_S)
        assert not any(child.is_running() for child in children)
    logs = "".join(path.read_text() for path in here.rglob("*.log*"))
    assert "dllm://" not in logs, "the line is a secret"
    assert key not in logs
    assert admin not in logs


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nowhere/at/all"], 2, "Error (checkpoint): There is no folder"),
        (["--threads", "-1"], 2, "threads"),
        (["--insecure"], 2, "lets everybody who reaches"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_fails_at_the_start_is_said_and_ends_it(
    tmp_path: Path, unused_port: int, arguments: list[str], code: int, said: str
) -> None:
    done = dllm(tmp_path, "up", "--bind", f"0.0.0.0:{unused_port}", *arguments)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    if said.startswith("Error"):
        assert done.stderr.startswith(said), "nothing is begun"
