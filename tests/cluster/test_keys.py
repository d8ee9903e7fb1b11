"""Keys between real processes: who finds one, who is refused, and what it is told."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from distributed_llm.common.keyring import STATE_VARIABLE
from tests.warm import failed_worker

COMMAND = [sys.executable, "-m", "distributed_llm"]
LIMIT_S = 60


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """State folder of the machine that the coordinator runs on."""
    return tmp_path / "here"


def environment(state: Path) -> dict[str, str]:
    return {**os.environ, STATE_VARIABLE: str(state)}


@contextmanager
def coordinator(state: Path, *arguments: str) -> Iterator[str]:
    """Yield the address of a coordinator of the built-in model."""
    command = [*COMMAND, "coordinator", "--bind", "127.0.0.1:0", *arguments]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment(state),
    ) as process:
        try:
            assert process.stdout
            yield process.stdout.readline().strip()
        finally:
            process.terminate()
            process.wait(LIMIT_S)


def dllm(state: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env=environment(state),
        check=False,
    )


def test_this_machine_is_let_in_and_another_is_not_until_it_joins(
    here: Path, tmp_path: Path
) -> None:
    there = tmp_path / "another machine"
    with coordinator(here) as address:
        assert dllm(here, "status", "--coordinator", address).returncode == 0
        for arguments in (
            ("status", "--coordinator", address),
            ("worker", "--coordinator", address, "--wait"),
        ):
            refused = dllm(there, *arguments)
            assert refused.returncode == 3, refused.stderr
            assert refused.stdout == ""
            assert refused.stderr.splitlines()[-1] == (
                f"Error (not_enrolled): This machine has no key for the coordinator at {address}. "
                "Run `dllm token create` where the coordinator runs, and here the line that it "
                "prints; if it was started with --insecure, give --insecure here too."
            )
        created = dllm(here, "token", "create", "--role", "client", "--coordinator", address)
        command = created.stdout.split()
        assert command[:2] == ["dllm", "join"], created.stderr
        joined = dllm(there, *command[1:])
        assert joined.returncode == 0, joined.stderr
        assert f"is enrolled at {address} as client." in joined.stderr
        assert dllm(there, "status", "--coordinator", address).returncode == 0
        settings = {STATE_VARIABLE: str(there)}
        code, said = failed_worker(tmp_path / "log", "--coordinator", address, settings=settings)
        assert code == 3
        assert "is enrolled as client, and this takes worker." in said
        secret = command[2].rpartition(".")[2]
        for one in (joined.stderr, said, created.stderr):
            assert secret not in one
    assert not [path for path in here.rglob("*") if path.is_file()]  # it kept nothing of port 0


def test_without_keys_both_sides_have_to_say_so(here: Path, tmp_path: Path) -> None:
    there = tmp_path / "another machine"
    with coordinator(here, "--insecure") as address:
        assert dllm(there, "status", "--insecure", "--coordinator", address).returncode == 0
        for command in ("status", "worker"):
            refused = dllm(there, command, "--coordinator", address)
            assert refused.returncode == 3
            assert "no key for the coordinator" in refused.stderr
    with coordinator(here) as address:
        asked = ("--insecure", "--coordinator", address)
        refused = dllm(there, "status", *asked)
        settings = {STATE_VARIABLE: str(there)}
        worker = failed_worker(tmp_path / "log", *asked, settings=settings)
        for code, said in ((refused.returncode, refused.stderr), worker):
            assert code == 3, said
            assert f"The coordinator at {address} uses keys" in said
            assert "Leave --insecure out." in said


def test_the_flag_alone_opens_no_port_to_others(here: Path) -> None:
    refused = dllm(here, "coordinator", "--insecure", "--bind", "0.0.0.0:0")
    assert refused.returncode == 2
    assert "lets everybody who reaches 0.0.0.0:0 do everything" in refused.stderr
    assert "dllm token create" in refused.stderr
    assert "`insecure: true` under `coordinator`" in refused.stderr
