"""Two whole workers with fake layers, and a coordinator that the test plays."""

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
import torch

from distributed_llm.common import codec
from distributed_llm.common.keys import PublicKey
from distributed_llm.common.messages import (
    Capabilities,
    DropStage,
    Heartbeat,
    LinkReport,
    LoadStage,
    ModelSource,
    NextStage,
    Pong,
    SequenceSlice,
    StageReady,
    Task,
    TaskResult,
    ToWorker,
    Welcome,
    WorkerHello,
)
from distributed_llm.common.tensors import Frame, TensorSpec
from distributed_llm.common.transport import Delivery, Door, Login, Router, new_key_pair
from distributed_llm.common.types import Epoch, LayerRange, PeerId, SequenceId, StepNumber
from distributed_llm.worker.compute.held_stages import HeldStages
from distributed_llm.worker.compute.loading import NewStage
from distributed_llm.worker.model.stage import Stage
from distributed_llm.worker.model.step_results import StageOutput
from distributed_llm.worker.service import Worker
from distributed_llm.worker.session import peers
from tests.weights import cache_here
from tests.wire.test_transport import come_true, on_loop

pytestmark = pytest.mark.timeout(60)
IDS = TensorSpec("int32", (2,))
TOKEN_IDS = bytes([5, 0, 0, 0, 6, 0, 0, 0])

KEYS = new_key_pair()
"""Of all workers, as if one user of one machine ran them."""


class FakeStage:
    """The first stage doubles token ids, the last adds up what it is given."""

    weight_bytes = kv_bytes = 0
    layers_s = 0.0
    kv_bytes_per_token = 1
    kv_windowed_bytes_per_token = window = 0

    def limit_kv(self, max_bytes: int) -> None:
        pass

    def forget(self, seen_from: Mapping[SequenceId, int]) -> None:
        pass

    def release(self, sequence_ids: Sequence[int]) -> None:
        pass

    def reset(self) -> None:
        pass

    def give_kv_back(self) -> None:
        pass

    def run(self, sequences: Any, token_ids: Any, hidden_states: Any, masks: Any) -> StageOutput:
        if hidden_states is None:
            return StageOutput(hidden_states=2.0 * token_ids[:, None])
        return StageOutput(token_ids=(token_ids + hidden_states[:, 0]).to(torch.int32))


class Coordinator:
    """Says what the test tells it to, and notes what it hears and how many bytes that was."""

    def __init__(self) -> None:
        self.heard: dict[str, list[Any]] = {}
        self.frames: list[tuple[Frame, ...]] = []
        self.bytes = 0
        self._peers: dict[PeerId, str] = {}
        keys = new_key_pair()
        door = Door(keys, lambda key: key == KEYS.public)
        self._router = Router("127.0.0.1:0", self._on_message, lambda: None, door=door)
        self.login = Login(keys.public, KEYS)
        self.address = self._router.address

    def close(self) -> None:
        self._router.close()

    def say(self, name: str, message: ToWorker, frames: Sequence[Frame] = ()) -> None:
        (peer,) = [peer for peer, known in self._peers.items() if known == name]
        assert self._router.send(peer, codec.encode(message, frames)) is Delivery.SENT

    def messages_of(self, name: str, kind: type) -> list[Any]:
        return [one for one in self.heard.get(name, []) if isinstance(one, kind)]

    async def hear(self, name: str, kind: type, count: int = 1) -> Any:
        """Return the last of `count` messages of this kind once they are here."""
        await come_true(lambda: len(self.messages_of(name, kind)) >= count)
        return self.messages_of(name, kind)[count - 1]

    def _on_message(self, peer: PeerId, key: PublicKey, frames: list[Frame]) -> None:
        message, tensors = codec.to_coordinator.decode(frames)
        if isinstance(message, WorkerHello):
            self._peers[peer] = message.name
            self.say(
                message.name,
                Welcome(worker_id=message.name, heartbeat_interval_s=0.2, silence_timeout_s=10.0),
            )
        name = self._peers[peer]
        self.heard.setdefault(name, []).append(message)
        if isinstance(message, Heartbeat):
            self.say(name, Pong())
        if isinstance(message, TaskResult):
            self.frames.append(tuple(bytes(tensor) for tensor in tensors))
            self.bytes += sum(len(frame) for frame in frames)


@asynccontextmanager
async def cluster(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Coordinator]:
    """A coordinator and workers "a" and "b" that know of each other nothing yet."""
    monkeypatch.setattr(
        HeldStages, "_load_stage", lambda self, load: NewStage(cast(Stage, FakeStage()), 1)
    )
    coordinator = Coordinator()
    workers = [
        Worker(
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
            leave_timeout_s=20.0,
        )
        for name in ("a", "b")
    ]
    tasks = [asyncio.create_task(worker.run()) for worker in workers]
    try:
        for name in ("a", "b"):
            await coordinator.hear(name, WorkerHello)
        yield coordinator
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        coordinator.close()


def capabilities() -> Capabilities:
    return Capabilities(
        device="cpu",
        device_name="A CPU",
        platform="Linux",
        memory_bytes=1 << 30,
        cores=2,
        threads=1,
        memory_bandwidth_bytes_per_s=1e10,
        flops_per_s=1e11,
    )


def order(epoch: int, next_stage: NextStage | None, key: str = "key") -> LoadStage:
    return LoadStage(
        epoch=Epoch(epoch),
        source=ModelSource(kind="builtin", name=""),
        layers=LayerRange(0, 1) if next_stage else LayerRange(1, 2),
        dtype="float32",
        wire_dtype="bfloat16",
        digest="d",
        kv_tokens=64,
        link_key=key,
        next_stage=next_stage,
        senders=(KEYS.public,),
    )


def task(epoch: int, step: int, *, direct: bool) -> Task:
    part = SequenceSlice(sequence_id=SequenceId(1), start=0, num_tokens=2, sample=True)
    return Task(
        epoch=Epoch(epoch),
        step=StepNumber(step),
        oldest=StepNumber(step),
        sequences=(part,),
        tensors=(IDS,),
        route=(direct,),
    )


async def load(
    coordinator: Coordinator, epoch: int, *, key_of_b: str = "key", up: bool = True
) -> None:
    """Give both their layers, the last stage first, and wait for the link."""
    (address,) = coordinator.messages_of("b", WorkerHello)[0].peer_addresses
    assert address.startswith("127.0.0.1:")
    ready = [len(coordinator.messages_of(name, StageReady)) for name in ("a", "b")]
    reports = len(coordinator.messages_of("a", LinkReport))
    coordinator.say("b", order(epoch, None, key_of_b))
    coordinator.say("a", order(epoch, NextStage(worker="b", addresses=(address,), key=KEYS.public)))
    for name, count in zip(("a", "b"), ready, strict=True):
        assert (await coordinator.hear(name, StageReady, count + 1)).epoch == epoch
    report = await coordinator.hear("a", LinkReport, reports + 1)
    assert (report.epoch, report.up, report.rtt_s > 0) == (epoch, up, up)
    if up:
        report = await coordinator.hear("a", LinkReport, reports + 2)
        assert report.up
        assert 1e5 < report.bytes_per_s < 1e12


@on_loop
async def test_activations_do_not_pass_the_coordinator(monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster(monkeypatch) as coordinator:
        await load(coordinator, 1)
        for step in range(1, 21):
            coordinator.say("a", task(1, step, direct=True), (TOKEN_IDS,))
            result = await coordinator.hear("b", TaskResult, step)
            assert (result.epoch, result.step, result.tensors) == (1, step, (IDS,))
            assert len(result.timings) == 2
            assert coordinator.frames[-1] == (bytes([15, 0, 0, 0, 18, 0, 0, 0]),)
        assert coordinator.messages_of("a", TaskResult) == []
        assert coordinator.bytes < 20 * 150


@on_loop
async def test_heartbeats_tell_that_a_load_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()

    def slow(self: HeldStages, load: object) -> NewStage:
        go_on.wait(60)
        return NewStage(cast(Stage, FakeStage()), 1)

    async with cluster(monkeypatch) as coordinator:
        monkeypatch.setattr(HeldStages, "_load_stage", slow)
        assert not (await coordinator.hear("b", Heartbeat)).loading
        coordinator.say("b", order(1, None))

        def beats() -> list[Heartbeat]:
            return [beat for beat in coordinator.messages_of("b", Heartbeat) if beat.loading]

        try:
            await come_true(lambda: bool(beats()))
            assert beats()[0].load_progress > 0  # this process has read and written before
        finally:
            go_on.set()
        await coordinator.hear("b", StageReady)
        before = len(coordinator.messages_of("b", Heartbeat))
        assert not (await coordinator.hear("b", Heartbeat, before + 1)).loading


@on_loop
async def test_route_of_the_coordinator_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster(monkeypatch) as coordinator:
        await load(coordinator, 1)
        coordinator.say("a", task(1, 1, direct=False), (TOKEN_IDS,))
        result = await coordinator.hear("a", TaskResult)
        assert result.tensors == (TensorSpec("bfloat16", (2, 1)),)
        relayed = Task(
            epoch=Epoch(1),
            step=StepNumber(1),
            oldest=StepNumber(1),
            sequences=task(1, 1, direct=False).sequences,
            tensors=(IDS, *result.tensors),
            timings=result.timings,
        )
        coordinator.say("b", relayed, (TOKEN_IDS, *coordinator.frames[-1]))
        assert len((await coordinator.hear("b", TaskResult)).timings) == 2
        assert coordinator.frames[-1] == (bytes([15, 0, 0, 0, 18, 0, 0, 0]),)


@on_loop
async def test_every_epoch_has_its_own_link(monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster(monkeypatch) as coordinator:
        await load(coordinator, 1)
        coordinator.say("b", DropStage(epoch=Epoch(2)))  # forgets who may hand it tasks
        await load(coordinator, 3)
        coordinator.say("a", task(3, 1, direct=True), (TOKEN_IDS,))
        await coordinator.hear("b", TaskResult)
        coordinator.say("a", order(4, NextStage(worker="b", addresses=())))
        assert (await coordinator.hear("a", LinkReport, 5)).up is False
        await coordinator.hear("a", StageReady, 3)
        coordinator.say("a", task(4, 1, direct=True), (TOKEN_IDS,))
        assert (await coordinator.hear("a", TaskResult)).tensors[0].dtype == "bfloat16"


@on_loop
async def test_worker_with_another_key_is_not_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_REPORT_DOWN_AFTER_S", 0.5)
    async with cluster(monkeypatch) as coordinator:
        await load(coordinator, 1, key_of_b="other", up=False)
        coordinator.say("a", task(1, 1, direct=True), (TOKEN_IDS,))
        await coordinator.hear("a", TaskResult)
        assert coordinator.messages_of("b", TaskResult) == []
