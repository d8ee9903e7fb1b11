"""What would load torch once for each process or command of a test run is done with it once."""

import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from distributed_llm import load_check
from distributed_llm.common.checkpoint import open_checkpoint
from distributed_llm.coordinator.loadable import as_json, ensure_loadable
from distributed_llm.forking import fork_server
from distributed_llm.local_process import LocalProcess


@pytest.fixture(scope="session", autouse=True)
def warm_workers() -> Iterator[None]:
    """Keep the process that workers are forked from between clusters, so torch is loaded once."""
    with fork_server():
        yield


@contextmanager
def warm_worker(
    log: Path, *arguments: str, settings: Mapping[str, str] | None = None
) -> Iterator[LocalProcess]:
    """Run `dllm worker` as `LocalCluster` does, forked: a process of its own takes 3 CPU seconds.

    Args:
        log: takes its stderr.
        arguments: further ones.
        settings: environment variables `DLLM_...`.
    """
    with fork_server() as server:
        process = LocalProcess("worker", ["worker", *arguments], settings or {}, log, server)
        try:
            yield process
        finally:
            process.close()


def failed_worker(
    log: Path, *arguments: str, settings: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Return the exit code of a worker that ends by itself, and what it said on stderr."""
    with warm_worker(log, *arguments, settings=settings) as process:
        return process.wait(60), log.read_text()


@contextmanager
def load_checks_here() -> Iterator[list[bytes]]:
    """Play the process that checks checkpoints in this one; yield the questions that it is asked.

    Else it takes 3 CPU seconds for each.
    """
    asked: list[bytes] = []

    def answer(command: list[str], **options: Any) -> Any:
        asked.append(options["input"])
        return subprocess.CompletedProcess(command, 0, as_json(load_check.verdict(asked[-1])))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(subprocess, "run", answer)
        yield asked


def checked(folder: Path) -> Path:
    """Return a folder with a checkpoint, of which coordinators then know that it can be loaded."""
    with load_checks_here():
        ensure_loadable(open_checkpoint(folder))
    return folder
