"""Layers that move between whole workers over real sockets, and workers that leave.

The compute thread is faked: what crosses the wire, and when, is what is looked at.
"""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from distributed_llm.common.messages import (
    CopyKV,
    DropStage,
    FetchProgress,
    Goodbye,
    HandedOver,
    HandOver,
    Heartbeat,
    KVCopied,
    KVEnd,
    KVFailed,
    KVPart,
    KVPieces,
    KVTransfer,
    Leaving,
    LinkReport,
    MayLeave,
    NextStage,
    StageReady,
    Task,
    TaskResult,
    UndoMove,
    WorkerHello,
)
from distributed_llm.common.tensors import TensorSpec
from distributed_llm.common.types import Epoch, LayerRange, StepNumber
from distributed_llm.worker import service
from distributed_llm.worker.compute.engine import Vitals
from distributed_llm.worker.service import Worker
from distributed_llm.worker.session import kv_sender
from distributed_llm.worker.session.events import (
    AssembleKV,
    Computed,
    Drop,
    Event,
    ExportKV,
    ImportKV,
    KVAssembled,
    KVExported,
    KVImported,
    Load,
    Loaded,
    Run,
    Serve,
    Unload,
)
from tests.weights import cache_here
from tests.wire.test_transport import come_true, on_loop
from tests.wire.test_worker import IDS, KEYS, TOKEN_IDS, Coordinator, capabilities, order

pytestmark = pytest.mark.timeout(60)
PIECE_BYTES = 1 << 20
NUM_PIECES = 7
FIRST, SECOND = LayerRange(0, 1), LayerRange(1, 2)


class FakeEngine:
    """Does at once what it is told to; sends zeros, and notes what it was ordered."""

    made: "list[FakeEngine]" = []  # noqa: RUF012

    def __init__(
        self,
        capabilities: object,
        *,
        is_void: Callable[[Any], bool],
        post: Callable[[Event], None],
        **settings: object,
    ) -> None:
        self.vitals = Vitals()
        self.load_progress: int | None = None
        self.fetch_progress: FetchProgress | None = None
        self.orders: list[object] = []
        self.imported_bytes = 0
        self._is_void = is_void
        self._post = post
        self.made.append(self)

    def put(self, order: Any) -> None:
        self.orders.append(order)
        match order:
            case Load(session=session, order=wanted):
                self._post(Loaded(session, wanted.epoch, 0.1, 1, wanted.kv_tokens))
            case Run():
                self._post(Computed(order, (IDS,), (TOKEN_IDS,), 3, 2, 1))
            case ExportKV():
                self._post(self._exported(order))
            case ImportKV(frames=frames):
                self.imported_bytes += sum(len(frame) for frame in frames)
                self._post(KVImported(order))
            case AssembleKV():
                self._post(KVAssembled(order))

    def _exported(self, order: ExportKV) -> KVExported:
        names = {"epoch": order.epoch, "layers": order.layers, "number": order.number}
        if order.number <= NUM_PIECES:
            spec = TensorSpec("uint8", (PIECE_BYTES,))
            part = KVPart(segment=1, layer=order.layers.start, offset=0, count=1, capacity=64)
            pieces = KVPieces(**names, dtype="uint8", parts=(part,), tensors=(spec,))  # type: ignore[arg-type]
            return KVExported(order, pieces, (bytes(PIECE_BYTES),))
        if not order.rest:
            return KVExported(order, None)
        end = KVEnd(**names, tensors=(TensorSpec("uint8", (3,)),))  # type: ignore[arg-type]
        return KVExported(order, end, (b"end",))

    def progress_age_s(self) -> float:
        return 0.0

    def stop(self, timeout_s: float) -> bool:
        return True

    def orders_of(self, kind: type) -> list[Any]:
        return [order for order in self.orders if isinstance(order, kind)]


@asynccontextmanager
async def workers(
    monkeypatch: pytest.MonkeyPatch, *names: str, leave_timeout_s: float = 20.0
) -> AsyncIterator[tuple[Coordinator, dict[str, FakeEngine], dict[str, "asyncio.Task[int]"]]]:
    """A coordinator, and workers of these names with their engines and what they return."""
    monkeypatch.setattr(service, "Engine", FakeEngine)
    monkeypatch.setattr(FakeEngine, "made", [])
    coordinator = Coordinator()
    running = {}
    for name in names:
        worker = Worker(
            name,
            capabilities(),
            address=coordinator.address,
            addresses=(coordinator.address,),
            login=coordinator.login,
            peer_bind="127.0.0.1:0",
            slowdown=1.0,
            local_model="",
            cache=cache_here(),
            connect_timeout_s=20.0,
            leave_timeout_s=leave_timeout_s,
        )
        running[name] = asyncio.create_task(worker.run())
        await coordinator.hear(name, WorkerHello)
    try:
        yield coordinator, dict(zip(names, FakeEngine.made, strict=True)), running
    finally:
        for task in running.values():
            task.cancel()
        await asyncio.gather(*running.values(), return_exceptions=True)
        coordinator.close()


def address_of(coordinator: Coordinator, name: str) -> tuple[str, ...]:
    return tuple(coordinator.messages_of(name, WorkerHello)[0].peer_addresses)


async def both_loaded(coordinator: Coordinator) -> None:
    """Worker "a" serves layers 0-2 in plan 1; in plan 2, "b" has the second of them."""
    alone = msgspec.structs.replace(order(1, None), layers=LayerRange(0, 2))
    coordinator.say("a", alone)
    await coordinator.hear("a", StageReady)
    to_b = NextStage(worker="b", addresses=address_of(coordinator, "b"), key=KEYS.public)
    last = msgspec.structs.replace(order(2, None, "new"), beside=Epoch(1), imports=(SECOND,))
    coordinator.say("b", last)
    coordinator.say("a", msgspec.structs.replace(order(2, to_b, "new"), beside=Epoch(1)))
    await coordinator.hear("a", StageReady, 2)
    await coordinator.hear("b", StageReady)
    await coordinator.hear("a", LinkReport)


def copy_to_b(coordinator: Coordinator) -> CopyKV:
    addresses = address_of(coordinator, "b")
    what = KVTransfer(layers=SECOND, worker="b", addresses=addresses, key=KEYS.public)
    return CopyKV(epoch=Epoch(2), link_key="new", transfers=(what,))


def task(epoch: int, step: int, *route: bool) -> Task:
    from tests.wire.test_worker import task as made

    return msgspec.structs.replace(made(epoch, step, direct=True), route=route)


@on_loop
async def test_layers_move_with_their_kv_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    async with workers(monkeypatch, "a", "b") as (coordinator, engines, _):
        await both_loaded(coordinator)
        coordinator.say("a", copy_to_b(coordinator))
        coordinator.say("a", task(1, 1), (TOKEN_IDS,))
        assert (await coordinator.hear("a", TaskResult)).epoch == 1
        copied = await coordinator.hear("a", KVCopied)
        assert copied.bytes_sent == NUM_PIECES * PIECE_BYTES
        assert engines["b"].imported_bytes == NUM_PIECES * PIECE_BYTES
        coordinator.say("b", HandOver(epoch=Epoch(2), first_step=StepNumber(2)))
        coordinator.say("a", HandOver(epoch=Epoch(2), first_step=StepNumber(2)))
        for name in ("a", "b"):
            assert (await coordinator.hear(name, HandedOver)).epoch == 2
        numbers = [order.message.number for order in engines["b"].orders_of(ImportKV)]
        assert numbers == [*range(1, NUM_PIECES + 2)]
        coordinator.say("a", DropStage(epoch=Epoch(1)))
        coordinator.say("a", task(2, 1, True), (TOKEN_IDS,))
        result = await coordinator.hear("b", TaskResult)
        assert (result.epoch, result.step, len(result.timings)) == (2, 1, 2)
        for engine in engines.values():
            assert engine.orders_of(Serve) == [Serve(Epoch(2))]
        assert not coordinator.messages_of("a", KVFailed)
        beats = len(coordinator.messages_of("a", Heartbeat))
        assert (await coordinator.hear("a", Heartbeat, beats + 2)).epochs == (2,)


@on_loop
async def test_cancelled_move_leaves_the_old_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    async with workers(monkeypatch, "a", "b") as (coordinator, engines, _):
        await both_loaded(coordinator)
        coordinator.say("a", copy_to_b(coordinator))
        await coordinator.hear("a", KVCopied)
        coordinator.say("a", HandOver(epoch=Epoch(2), first_step=StepNumber(1)))
        await coordinator.hear("a", HandedOver)
        for name in ("a", "b"):
            coordinator.say(name, UndoMove(epoch=Epoch(2)))
        coordinator.say("a", task(1, 1), (TOKEN_IDS,))
        assert (await coordinator.hear("a", TaskResult)).epoch == 1
        await come_true(lambda: all(engine.orders_of(Unload) for engine in engines.values()))
        assert engines["a"].orders[-2:] == [Unload(Epoch(2)), engines["a"].orders_of(Run)[-1]]


@on_loop
async def test_receiver_that_ends_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    async with workers(monkeypatch, "a", "b") as (coordinator, _, running):
        await both_loaded(coordinator)
        coordinator.say("a", copy_to_b(coordinator))
        await coordinator.hear("a", KVCopied)
        running["b"].cancel()
        failed = await coordinator.hear("a", KVFailed)
        assert (failed.epoch, failed.worker, failed.code) == (2, "b", "connection_failed")


@on_loop
async def test_sender_with_another_key_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_sender, "_CONNECT_TIMEOUT_S", 0.5)
    async with workers(monkeypatch, "a", "b") as (coordinator, engines, _):
        await both_loaded(coordinator)
        wrong = msgspec.structs.replace(copy_to_b(coordinator), link_key="guess")
        coordinator.say("a", wrong)
        failed = await coordinator.hear("a", KVFailed)
        assert (failed.worker, failed.code) == ("b", "connection_failed")
        assert "cannot be reached within 0.5 s" in failed.message
        assert engines["b"].orders_of(ImportKV) == []


# ------------------------------------------------------------------ leaving


async def signalled(number: int) -> None:
    os.kill(os.getpid(), number)
    await asyncio.sleep(0)


needs_signals = pytest.mark.skipif(os.name == "nt", reason="needs signal handlers")


@needs_signals
@on_loop
async def test_worker_that_serves_is_let_go_by_the_coordinator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with workers(monkeypatch, "a") as (coordinator, _, running):
        coordinator.say("a", order(1, None))
        await coordinator.hear("a", StageReady)
        await signalled(signal.SIGTERM)
        await coordinator.hear("a", Leaving)
        coordinator.say("a", task(1, 1), (TOKEN_IDS,))
        await coordinator.hear("a", TaskResult)
        assert not running["a"].done()
        coordinator.say("a", DropStage(epoch=Epoch(1)))
        coordinator.say("a", MayLeave())
        await coordinator.hear("a", Goodbye)
        assert await running["a"] == signal.SIGTERM


@needs_signals
@on_loop
async def test_second_signal_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async with workers(monkeypatch, "a") as (coordinator, _, running):
        coordinator.say("a", order(1, None))
        await coordinator.hear("a", StageReady)
        await signalled(signal.SIGTERM)
        await coordinator.hear("a", Leaving)
        await signalled(signal.SIGINT)
        await coordinator.hear("a", Goodbye)
        assert await running["a"] == signal.SIGINT


@needs_signals
@on_loop
async def test_idle_worker_ends_with_the_first_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    async with workers(monkeypatch, "a") as (coordinator, _, running):
        await coordinator.hear("a", Heartbeat)
        await signalled(signal.SIGINT)
        await coordinator.hear("a", Goodbye)
        assert await running["a"] == signal.SIGINT
        assert coordinator.messages_of("a", Leaving) == []


@on_loop
async def test_drained_worker_ends_without_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    async with workers(monkeypatch, "a") as (coordinator, engines, running):
        coordinator.say("a", order(1, None))
        await coordinator.hear("a", StageReady)
        coordinator.say("a", DropStage(epoch=Epoch(1)))
        coordinator.say("a", MayLeave(why="drained"))
        await coordinator.hear("a", Goodbye)
        assert await running["a"] == 0
        assert engines["a"].orders_of(Drop) == [Drop()]
