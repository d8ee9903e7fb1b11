"""One fork server for all clusters of a test run, and for commands that load torch."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from distributed_llm.local_process import LocalProcess, fork_server


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
