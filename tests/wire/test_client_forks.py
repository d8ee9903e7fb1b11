"""Clients in forks of their process, and in other event loops."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Iterator

import pytest

from distributed_llm import AsyncDistributedClient, CoordinatorLost, DistributedClient
from distributed_llm.common.messages import Generate, ToClient
from tests.fake_coordinator import FakeCoordinator, finished, piece

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.skipif(sys.platform == "win32", reason="nothing forks"),
    # The child execs nothing; that other threads are gone there is what is tested.
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]

LIMIT_S = 20


def answer(request: Generate) -> list[ToClient]:
    return [
        piece(request, "Hi", 1),
        piece(request, "!", 2, index=1, end="stop"),
        finished(request),
    ]


@pytest.fixture
def coordinator() -> Iterator[FakeCoordinator]:
    with FakeCoordinator(answer) as fake:
        yield fake


def in_a_fork(work: Callable[[], object]) -> str:
    """Return what `work` returns in a forked child, or its error; a child that hangs is killed."""
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(LIMIT_S)  # ends it
        try:
            said = str(work())
        except BaseException as exc:
            said = f"{type(exc).__name__}: {exc}"
        os.write(theirs, said.encode())
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


def test_a_client_that_was_used_before_a_fork_works_in_the_child(
    coordinator: FakeCoordinator,
) -> None:
    with DistributedClient(coordinator.address) as client:
        assert client.generate("Hi") == "Hi!"
        assert in_a_fork(lambda: client.generate("Hi") + client.generate("Hi")) == "Hi!Hi!"
        assert client.generate("Hi") == "Hi!", "the parent's goes on"


def test_closing_in_the_child_closes_nothing_of_the_parent(coordinator: FakeCoordinator) -> None:
    with DistributedClient(coordinator.address) as client:
        stream = client.stream("Hi")
        assert next(stream).text == "Hi"
        assert in_a_fork(client.close) == "None"
        assert next(stream).text == "!"


def test_an_answer_goes_on_in_the_parent_only(coordinator: FakeCoordinator) -> None:
    with DistributedClient(coordinator.address) as client:
        stream = client.stream("Hi")
        assert next(stream).text == "Hi"
        assert in_a_fork(lambda: next(stream)).startswith("CoordinatorLost: This process was fork")
        assert next(stream).text == "!"


def test_a_closed_client_stays_closed_in_a_fork(coordinator: FakeCoordinator) -> None:
    client = DistributedClient(coordinator.address)
    client.close()
    said = in_a_fork(lambda: client.generate("Hi"))
    assert said == "CoordinatorLost: The client was closed. Make a new one."


def test_an_async_client_says_where_it_is_connected(coordinator: FakeCoordinator) -> None:
    client = AsyncDistributedClient(coordinator.address)
    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    assert first.run_until_complete(client.generate("Hi")) == "Hi!"
    with pytest.raises(CoordinatorLost, match="another event loop"):
        second.run_until_complete(client.generate("Hi"))
    assert first.run_until_complete(client.generate("Hi")) == "Hi!"
    first.run_until_complete(client.close())
    first.close()
    second.close()
