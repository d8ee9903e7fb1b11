"""The API over a real cluster, of real processes; one for all tests that need one."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from distributed_llm import DistributedClient, LocalCluster
from distributed_llm.client.new_key import create_key
from distributed_llm.common.roles import Role
from distributed_llm.local_process import LocalProcess
from tests.api.fake_server import FakeServer, running
from tests.checkpoints import make_checkpoint
from tests.warm import checked, warm_workers

__all__ = ["warm_workers"]

LIMIT_S = 30.0


@dataclass(frozen=True)
class Api:
    """An API that runs.

    Attributes:
        url: "http://HOST:PORT".
        key: of a client.
        admin_key: of an admin.
        model: name of the model that is served.
        checkpoint: its folder.
        cluster: that serves it.
        process: the API's own.
    """

    url: str
    key: str
    admin_key: str
    model: str
    checkpoint: Path
    cluster: LocalCluster
    process: LocalProcess


def new_key(address: str, name: str, role: Role) -> str:
    return asyncio.run(create_key(address, name, role, timeout_s=LIMIT_S)).text


@contextmanager
def serving_api(coordinator: str, log: Path) -> Iterator[tuple[str, LocalProcess]]:
    """Run an API; yield its URL and its process."""
    words = ("api", "--coordinator", coordinator, "--bind", "127.0.0.1:0")
    process = LocalProcess("api", words, {}, log)
    try:
        url = process.stdout.readline().decode().strip()
        assert url, process.log_tail()
        yield url, process
    finally:
        process.close()


@pytest.fixture(scope="session")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """Two workers with a small random model that has a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("api")
    checkpoint = checked(make_checkpoint(folder / "tiny", tokenizer=True, tie=False, seed=10))
    with (
        LocalCluster(checkpoint, workers=2, coordinator={"strategy": "memory"}) as cluster,
        serving_api(cluster.address, folder / "api.log") as (url, process),
    ):
        with DistributedClient(cluster.address) as client:
            model = client.status().model
        yield Api(
            url=url,
            key=new_key(cluster.address, "app", Role.CLIENT),
            admin_key=new_key(cluster.address, "boss", Role.ADMIN),
            model=model,
            checkpoint=checkpoint,
            cluster=cluster,
            process=process,
        )


@pytest.fixture(scope="session")
def fake_server() -> Iterator[FakeServer]:
    """The API in this process, over a fake client."""
    yield from running()
