"""Coordinator, worker and client after their event loop stood still: nobody is lost for that."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from distributed_llm import AsyncDistributedClient
from distributed_llm.common import codec
from distributed_llm.common.keyring import Keyring, state_folder
from distributed_llm.common.messages import Heartbeat, ToWorker, WorkerHello
from distributed_llm.common.tensors import Frame
from distributed_llm.common.transport import Dealer, Router
from distributed_llm.coordinator.core import Core
from distributed_llm.worker.session.agent import Agent
from tests.fake_coordinator import FakeCoordinator, piece
from tests.unit.coordinator_parts import capabilities
from tests.wire.test_coordinator import coordinator
from tests.wire.test_transport import come_true, on_loop
from tests.wire.test_worker import cluster

pytestmark = pytest.mark.timeout(60)

LONG_S = 1000.0


@pytest.fixture
def jump(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return what lets `LONG_S` pass for the running loop without it having run."""

    def put_forward() -> None:
        loop = asyncio.get_running_loop()
        time = loop.time
        monkeypatch.setattr(loop, "time", lambda: time() + LONG_S)

    return put_forward


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done of reading a whole socket and looking at the time, in order."""
    done: list[str] = []

    def note(kind: type[Any], name: str) -> None:
        method = getattr(kind, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            done.append(name)
            return method(*args, **kwargs)

        monkeypatch.setattr(kind, name, noted)

    note(Router, "deliver_waiting")
    note(Dealer, "deliver_waiting")
    note(Core, "on_timer")
    note(Agent, "on_timer")
    return done


@on_loop
async def test_a_coordinator_that_stood_still_loses_nobody(jump: Callable[[], None]) -> None:
    heard: list[ToWorker] = []

    def hear(frames: list[Frame]) -> None:
        heard.append(codec.to_worker.decode(frames)[0])

    hello = WorkerHello(name="pc", instance="1", capabilities=capabilities(1000))
    async with coordinator() as address:
        worker = Dealer(
            address,
            hear,
            lambda: worker.send(codec.encode(hello)),
            heard.clear,
            login=Keyring(state_folder()).login(address),
            on_rejected=lambda _: None,
        )
        try:
            async with AsyncDistributedClient(address) as client:
                await come_true(lambda: bool(heard))
                assert [one.name for one in (await client.status()).workers] == ["pc"]
                jump()
                status = await client.status()
                assert [one.name for one in status.workers] == ["pc"]
                assert any("stood still" in event.text for event in status.events)
        finally:
            worker.close()


@on_loop
async def test_a_worker_that_stood_still_stays_in_its_session(
    monkeypatch: pytest.MonkeyPatch, jump: Callable[[], None]
) -> None:
    async with cluster(monkeypatch) as played:
        before = len(played.messages_of("a", Heartbeat))
        jump()
        await played.hear("a", Heartbeat, before + 3)
        for name in ("a", "b"):
            assert len(played.messages_of(name, WorkerHello)) == 1


@on_loop
async def test_a_client_that_stood_still_keeps_its_request(jump: Callable[[], None]) -> None:
    with FakeCoordinator(lambda request: [piece(request, "a", 1)]) as fake:
        async with AsyncDistributedClient(fake.address) as client:
            chunks = client.stream("Hi")
            assert (await anext(chunks)).text == "a"
            jump()
            (request,) = fake.requests
            for _ in range(5):  # its timers are due at once
                await asyncio.sleep(0)
            fake.say(piece(request, "b", 2, index=1))
            assert (await anext(chunks)).text == "b"
            await chunks.aclose()


@on_loop
async def test_a_coordinator_hears_what_has_arrived_before_it_looks_at_the_time(
    calls: list[str],
) -> None:
    """A backlog of others may lie before the message of somebody who seems silent."""
    async with coordinator() as address:
        hello = WorkerHello(name="pc", instance="1", capabilities=capabilities(1000))
        worker = Dealer(
            address,
            lambda frames: None,
            lambda: worker.send(codec.encode(hello)),
            lambda: None,
            login=Keyring(state_folder()).login(address),
            on_rejected=lambda _: None,
        )
        try:
            await come_true(lambda: "on_timer" in calls)  # one is due soon after it joined
        finally:
            worker.close()
    _assert_heard_first(calls)


@on_loop
async def test_a_worker_hears_what_has_arrived_before_it_looks_at_the_time(
    monkeypatch: pytest.MonkeyPatch, calls: list[str]
) -> None:
    async with cluster(monkeypatch):
        await come_true(lambda: "on_timer" in calls)
    _assert_heard_first(calls)


def _assert_heard_first(calls: list[str]) -> None:
    looks = [at for at, name in enumerate(calls) if name == "on_timer"]
    assert all(calls[at - 1 : at] == ["deliver_waiting"] for at in looks), calls
