"""One fork server for all clusters of a test run."""

from collections.abc import Iterator

import pytest

from distributed_llm.local_process import fork_server


@pytest.fixture(scope="session", autouse=True)
def warm_workers() -> Iterator[None]:
    """Keep the process that workers are forked from between clusters, so torch is loaded once."""
    with fork_server():
        yield
