"""Coordinators and workers that meet a bug of their own: they end, and say so."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from distributed_llm.common import codec
from distributed_llm.common.errors import DistributedLLMError
from distributed_llm.common.keyring import Keyring
from distributed_llm.common.messages import ClientHello, ClientWelcome, WorkerHello
from distributed_llm.common.model_names import resolve_for_coordinator
from distributed_llm.common.settings import CoordinatorSettings
from distributed_llm.common.transport import Dealer, Login
from distributed_llm.common.transport.authenticator import Authenticator
from distributed_llm.common.units import split_address
from distributed_llm.coordinator import service as coordinator_service
from distributed_llm.coordinator.core import Core
from distributed_llm.coordinator.trust.store import Trust
from distributed_llm.worker import service as worker_service
from distributed_llm.worker.session.agent import Agent
from tests.unit.fake_model import MODEL
from tests.weights import cache_here, library_of
from tests.wire.test_transport import on_loop
from tests.wire.test_worker import Coordinator as FakeCoordinator
from tests.wire.test_worker import capabilities

pytestmark = pytest.mark.timeout(60)


class Bug(Exception):
    """What no code expects."""


def broken(*_: Any, **__: Any) -> Any:
    raise Bug("it is broken")


def service(
    trust: Trust | None = None,
) -> tuple[coordinator_service.Coordinator, "asyncio.Future[str]"]:
    """Return a coordinator, and what will be its address."""
    address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    source, checkpoint = resolve_for_coordinator("")
    made = coordinator_service.Coordinator(
        MODEL,
        checkpoint.folder,
        CoordinatorSettings(heartbeat_interval_s=0.05),
        bind="127.0.0.1:0",
        on_listening=address.set_result,
        trust=trust,
        library=library_of(source, checkpoint),
    )
    return made, address


@contextmanager
def client(address: str, login: Login | None = None) -> Iterator["asyncio.Future[None]"]:
    """Say hello to a coordinator; what is given is done once it has welcomed."""
    welcomed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def heard(frames: list[Any]) -> None:
        if isinstance(codec.to_client.decode(frames)[0], ClientWelcome):
            welcomed.set_result(None)

    dealer = Dealer(
        address, heard, lambda: None, lambda: None, login=login, on_rejected=lambda _: None
    )
    dealer.send(codec.encode(ClientHello()))
    try:
        yield welcomed
    finally:
        dealer.close()


@pytest.mark.parametrize("method", ["handle", "on_timer", "next_deadline"])
@on_loop
async def test_coordinator_ends_with_the_error(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator, address = service()
    running = asyncio.create_task(coordinator.run())
    monkeypatch.setattr(Core, method, broken)
    if method == "on_timer":
        monkeypatch.setattr(Core, "next_deadline", lambda self: 0.0)
    with client(await address), pytest.raises(DistributedLLMError, match=r"it is broken.*report"):
        await running


@on_loop
async def test_coordinator_ends_with_an_exception_outside_of_its_core(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such as one in the transport, which the event loop would only log."""
    coordinator, address = service()
    running = asyncio.create_task(coordinator.run())
    with client(await address) as welcomed:
        await welcomed
        monkeypatch.setattr(codec.to_coordinator, "decode", broken)
        with (
            client(await address),
            pytest.raises(DistributedLLMError, match=r"it is broken.*report"),
        ):
            await running


@on_loop
async def test_coordinator_ends_when_it_cannot_say_who_may_connect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would let nobody in any more, and nobody would know why."""
    trust = Trust(tmp_path, 0, now=0.0)
    coordinator, address = service(trust)
    running = asyncio.create_task(coordinator.run())
    login = Keyring(tmp_path).login(await listening(trust, address))
    with client(address.result(), login) as welcomed:
        await welcomed  # until now it can
        monkeypatch.setattr(Authenticator, "handle_zap_message", broken)
        with (
            client(address.result(), login) as refused,
            pytest.raises(DistributedLLMError, match=r"it is broken.*report"),
        ):
            await running
        assert not refused.done()


async def listening(trust: Trust, address: "asyncio.Future[str]") -> str:
    """Return the address of a coordinator that has keys for it."""
    trust.listening(split_address(await address)[1])
    return address.result()


def worker(coordinator: FakeCoordinator) -> worker_service.Worker:
    return worker_service.Worker(
        "a",
        capabilities(),
        address=coordinator.address,
        addresses=(coordinator.address,),
        login=coordinator.login,
        peer_bind="127.0.0.1:0",
        slowdown=1.0,
        local_model="",
        cache=cache_here(),
        connect_timeout_s=20.0,
        leave_timeout_s=20.0,
    )


@pytest.mark.parametrize("method", ["handle", "on_timer", "next_deadline"])
@on_loop
async def test_worker_ends_with_the_error(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    coordinator = FakeCoordinator()
    running = asyncio.create_task(worker(coordinator).run())
    await coordinator.hear("a", WorkerHello)
    monkeypatch.setattr(Agent, method, broken)
    with pytest.raises(DistributedLLMError, match=r"it is broken.*report"):
        await running
    coordinator.close()


@on_loop
async def test_worker_ends_with_an_exception_outside_of_its_agent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    coordinator = FakeCoordinator()
    running = asyncio.create_task(worker(coordinator).run())
    await coordinator.hear("a", WorkerHello)
    monkeypatch.setattr(codec.to_worker, "decode", broken)
    with pytest.raises(DistributedLLMError, match=r"it is broken.*report"):
        await running
    coordinator.close()
