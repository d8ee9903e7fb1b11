"""A simulated cluster whose workers compute: real engines on a checkpoint, on the virtual clock.

Coordinator, agents, wires and clock are those of `tests.unit.simulation`. An order that its agent
gives is carried out by a worker's engine at once, in the thread of the test, and takes as much
virtual time as that of a simulated worker: nothing depends on how quick this machine is.
"""

import time
from dataclasses import replace
from pathlib import Path

import msgspec

from distributed_llm.common.checkpoint import Checkpoint, open_checkpoint
from distributed_llm.common.errors import StageError
from distributed_llm.common.messages import ModelSource
from distributed_llm.common.model_names import fingerprints
from distributed_llm.common.types import KV_BLOCK, LayerRange
from distributed_llm.coordinator.inspect_model import served_model
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.worker.compute.engine import Engine
from distributed_llm.worker.compute.loading import BackgroundLoad
from distributed_llm.worker.session import events as agents
from tests.unit.fake_worker import SimWorker, capabilities
from tests.unit.simulation import World, with_settings
from tests.weights import weights_here

_MEMORY_BYTES = 1 << 30
_LAYERS_SHARE = 0.5
_FAILURES: dict[type[agents.KVOrder], str] = {
    agents.ExportKV: "fail_exports",
    agents.ImportKV: "fail_imports",
    agents.AssembleKV: "fail_assemblies",
}


class StepEngine(Engine):
    """An engine without a thread: it carries out one order after the other when it is told to."""

    def __init__(self, worker: "EngineWorker") -> None:
        self._events: list[agents.Event] = []
        super().__init__(
            capabilities(_MEMORY_BYTES),
            slowdown=1.0,
            weights=weights_here(),
            is_void=lambda order: worker.agent.is_void(order),
            post=self._events.append,
        )

    def _main(self) -> None:
        """Compute nothing in the thread that the engine starts."""

    def carry_out(self, order: agents.Order | BackgroundLoad) -> agents.Event | None:
        """Carry an order out; return what it posts, if anything."""
        self._events.clear()
        self._carry_out(order, time.perf_counter())
        while self._stages.free_some():
            pass
        assert len(self._events) <= 1
        return self._events[0] if self._events else None

    @property
    def background(self) -> BackgroundLoad | None:
        """The load in the background that is under way, or has ended and was not dealt with."""
        return self._stages._background

    def ended_load(self) -> BackgroundLoad:
        """Wait for the end of the load in the background, and return it."""
        item = self._orders.get()
        assert item is not None
        assert isinstance(item[1], BackgroundLoad)
        return item[1]


class EngineWorker(SimWorker):
    """A machine with a real engine.

    Attributes:
        engine: that carries out its orders.
    """

    world: "EngineWorld"

    def __init__(self, world: "EngineWorld", name: str, memory_bytes: int) -> None:
        super().__init__(world, name, memory_bytes)
        self.engine = StepEngine(self)
        self._waits_for: BackgroundLoad | None = None

    def _do(self, order: agents.Order) -> agents.Event | None:
        match order:
            case agents.Probe():
                return super()._do(order)
            case agents.Load(order=wanted):
                room = self.world.room(wanted.layers)
                wanted = msgspec.structs.replace(
                    wanted, kv_tokens=min(wanted.kv_tokens, room), trials=False
                )
                return self._carry_out(replace(order, order=wanted))
            case agents.Run() if not self.agent.is_void(order):
                self.before_task(order.task)
                return self._carry_out(order) if self.state == "up" else None
            case agents.ExportKV() | agents.ImportKV() | agents.AssembleKV():
                return self._move(order)
            case _:
                return self._carry_out(order)

    def _move(self, order: agents.KVOrder) -> agents.Event | None:
        try:
            self._inject(_FAILURES[type(order)])
        except StageError as exc:
            return None if self.agent.is_void(order) else agents.KVOrderFailed(order, exc)
        return self._carry_out(order)

    def _carry_out(self, order: agents.Order | BackgroundLoad) -> agents.Event | None:
        """Return what the engine posts, with virtual times."""
        event = self.engine.carry_out(order)
        background = self.engine.background
        if background is not self._waits_for:
            self._waits_for = background
            if background is not None:
                done = self.engine.ended_load()
                self.world.at(self.load_s, lambda: self._when_up(lambda: self._loaded(done)))
        match event:
            case agents.Loaded():
                return replace(event, load_s=self.load_s, fetch_s=0.0)
            case agents.Computed():
                took_us = round(1e6 * (self.world.now - self._progress_at))
                layers_us = round(took_us * _LAYERS_SHARE)
                return replace(event, compute_us=took_us, layers_us=layers_us, queued_us=0)
            case _:
                return event

    def _loaded(self, done: BackgroundLoad) -> None:  # type: ignore[override]
        event = self._carry_out(done)
        if event is not None:
            self._apply(event)


class EngineWorld(World):
    """A cluster that serves a checkpoint.

    Args:
        folder: of the checkpoint.
        seed: of the delays of messages.
        blocks: blocks of KV cache that the layers of a stage have room for.
        states: states of a sequence that they have room for beside, where layers keep some.
    """

    workers: list[EngineWorker]  # type: ignore[assignment]

    def __init__(self, folder: Path, *, seed: int, blocks: int, states: int) -> None:
        self.checkpoint: Checkpoint = open_checkpoint(folder)
        source = ModelSource(kind="folder", name=str(folder))
        layers = LayerRange(0, self.checkpoint.num_layers)
        prints = fingerprints(source, self.checkpoint, layers)
        settings = with_settings(dtype="float32", max_batch_tokens=32)
        model = served_model(source, self.checkpoint, settings, prints)
        self.blocks, self.states = blocks, states
        super().__init__(settings, seed=seed, model=model)

    @property
    def cost(self) -> ModelCost:
        """The memory that the parts of the model take."""
        return self.model.cost

    def worker(self, name: str, memory_bytes: int = _MEMORY_BYTES) -> EngineWorker:  # type: ignore[override]
        """Return a worker that is about to join."""
        worker = EngineWorker(self, name, memory_bytes)
        self.workers.append(worker)
        return worker

    def room(self, layers: LayerRange) -> int:
        """Return for how many positions these layers have room; bytes, if they keep none.

        It is the same for all layers of a model, so that no plan has less room than another.
        """
        whole = LayerRange(0, self.cost.num_layers)
        kv_bytes, state_bytes = self.cost.kv_bytes(whole), self.cost.state_bytes(whole)
        room_bytes = self.blocks * KV_BLOCK * kv_bytes + self.states * state_bytes
        if self.cost.kv_bytes(layers):
            return -(-room_bytes // (KV_BLOCK * kv_bytes)) * KV_BLOCK
        return room_bytes * len(layers) // len(whole)

    def tokens(self) -> int:
        """Return how many tokens have come of all answers."""
        answers = [answer for client in self.clients for answer in client.answers.values()]
        return sum(len(answer.token_ids) for answer in answers)

    def check_drained(self) -> None:
        """Assert that nothing is left of any request, and that stages take what was charged."""
        self.checker.check_drained()
        for pipeline in self.core._pipelines.loaded:
            assert pipeline.scheduler is not None
            assert pipeline.in_flight is not None
            ledger = pipeline.scheduler._ledger
            known = {*ledger.sequence_ids, *pipeline.in_flight.to_forget.released}
            for one in pipeline.stages:
                worker = self._links[one.peer].owner
                assert isinstance(worker, EngineWorker)
                assert not worker.orders
                stage = worker.engine._stages.served_stage
                assert stage is not None
                assert set(stage._cache.sequence_ids) <= known
                stage._held_sequences._states.tighten()
                if not pipeline.in_flight.to_forget.released:
                    room_bytes = self.room(one.layers) * max(1, stage.kv_bytes_per_token)
                    share = ledger.used_tokens / pipeline.kv_tokens
                    assert stage.kv_bytes <= share * room_bytes, "it takes more than is charged"
