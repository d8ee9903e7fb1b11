"""Compute threads in this process; tests do what agents and the network between them would do."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from distributed_llm.common import codec
from distributed_llm.common.checkpoint import open_checkpoint
from distributed_llm.common.messages import (
    Capabilities,
    KVEnd,
    KVPieces,
    LoadStage,
    ModelSource,
    SequenceSlice,
    Task,
)
from distributed_llm.common.model_names import fingerprints
from distributed_llm.common.types import Epoch, LayerRange, SequenceId, StepNumber
from distributed_llm.worker.compute.engine import Engine
from distributed_llm.worker.model.stage import Stage
from distributed_llm.worker.model.step_results import StageOutput
from distributed_llm.worker.session.events import (
    AssembleKV,
    Computed,
    ComputeFailed,
    Event,
    ExportKV,
    ImportKV,
    KVAssembled,
    KVExported,
    KVImported,
    Load,
    Loaded,
    Order,
    Release,
    Run,
    Serve,
    Unload,
    VoidableOrder,
)
from distributed_llm.worker.tensor_frames import frame_of, tensor_of
from tests.model.driver import Pipeline
from tests.weights import weights_here

GIB = 1 << 30
E = TypeVar("E")

Plan = Sequence[tuple[str, tuple[int, int]]]
"""Names of workers and their layers, in the order of the layers."""


class Worker:
    """One compute thread, and what it posted.

    Attributes:
        void: whether an order is void; may be changed.
        gate: loads in the background wait until it is set; it is, at first.
    """

    def __init__(self, memory_bytes: int = GIB) -> None:
        self.void: Callable[[VoidableOrder], bool] = lambda order: False
        self.gate = threading.Event()
        self.gate.set()
        self._posted: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._loaded: list[Loaded] = []
        self.engine = Engine(
            Capabilities(
                device="cpu",
                device_name="A CPU",
                platform="Linux",
                memory_bytes=memory_bytes,
                cores=2,
                threads=1,
                memory_bandwidth_bytes_per_s=1e10,
                flops_per_s=1e11,
            ),
            slowdown=1.0,
            weights=weights_here(),
            is_void=lambda order: self.void(order),
            post=self._posted.put,
        )
        held: Any = self.engine._stages
        held._load_beside = self._gated(held._load_beside)

    def _gated(self, load: Callable[..., tuple[Stage, int]]) -> Callable[..., tuple[Stage, int]]:
        def load_later(*given: Any) -> tuple[Stage, int]:
            assert self.gate.wait(20)
            return load(*given)

        return load_later

    def next(self, kind: type[E]) -> E:
        """Return the next event, which is of this kind; `Loaded` before it is kept for later."""
        if kind is Loaded and self._loaded:
            return cast(E, self._loaded.pop(0))
        while isinstance(event := self._posted.get(timeout=30), Loaded) and kind is not Loaded:
            self._loaded.append(event)
        assert isinstance(event, kind), event
        return event

    def ask(self, order: Order, kind: type[E]) -> E:
        """Put an order and return what it posts."""
        self.engine.put(order)
        return self.next(kind)

    @property
    def silent(self) -> bool:
        """Whether it posted nothing that was not waited for, after all orders are done."""
        done = threading.Event()
        before = self.void

        last = AssembleKV(0, Epoch(0))

        def is_void(order: VoidableOrder) -> bool:
            if order is last:
                done.set()
            return order is last or before(order)

        self.void = is_void
        self.engine.put(last)
        assert done.wait(20)
        self.void = before
        return self._posted.empty() and not self._loaded


class WorkerStage:
    """A stage that a worker's engine runs, as a pipeline drives it."""

    def __init__(self, worker: Worker, epoch: int) -> None:
        self.worker = worker
        self.epoch = epoch

    def run(
        self, sequences: Sequence[SequenceSlice], token_ids: Tensor, hidden_states: Tensor | None
    ) -> StageOutput:
        """Run a task, over the wire format."""
        tensors = [token_ids] if hidden_states is None else [token_ids, hidden_states]
        given = [frame_of(tensor) for tensor in tensors]
        task = Task(
            epoch=Epoch(self.epoch),
            step=StepNumber(0),
            oldest=StepNumber(0),
            sequences=tuple(sequences),
            tensors=tuple(spec for spec, _ in given),
        )
        run = Run(0, task, tuple(frame for _, frame in given))
        self.worker.engine.put(run)
        event: Any = self.worker.next(object)
        if isinstance(event, ComputeFailed):
            raise event.error
        assert isinstance(event, Computed), event
        assert 0 < event.layers_us <= event.compute_us
        back = [tensor_of(s, f) for s, f in zip(event.specs, event.frames, strict=True)]
        if back and back[0].dtype == torch.int32:
            return StageOutput(token_ids=back[0])
        if back:
            return StageOutput(hidden_states=back[0])
        return StageOutput(token_ids=torch.empty(0, dtype=torch.int32))

    def release(self, sequence_ids: Sequence[int]) -> None:
        """Release sequences."""
        self.worker.engine.put(Release(Epoch(self.epoch), tuple(map(SequenceId, sequence_ids))))


class Cluster(Pipeline):
    """Workers that serve one epoch after the other."""

    def __init__(self, folder: Path, plan: Plan, workers: dict[str, Worker]) -> None:
        self.folder = folder
        self.workers = workers
        self.epoch = 1
        self.plan = plan
        for name, layers in plan:
            workers[name].ask(Load(0, self.order(1, layers)), Loaded)
        super().__init__([])
        self.serve_epoch(1, plan)

    def serve_epoch(self, epoch: int, plan: Plan) -> None:
        """Let the stages of this epoch run what comes."""
        self.epoch, self.plan = epoch, plan
        self.stages = [WorkerStage(self.workers[name], epoch) for name, _ in plan]  # type: ignore[misc]

    def order(self, epoch: int, layers: tuple[int, int], **fields: Any) -> LoadStage:
        """Return the order to load these layers."""
        source = ModelSource(kind="folder", name=str(self.folder))
        held, checkpoint = LayerRange(*layers), open_checkpoint(self.folder)
        values: dict[str, Any] = {
            "epoch": epoch,
            "source": source,
            "layers": held,
            "dtype": "float32",
            "wire_dtype": "float32",
            "digest": checkpoint.digest(held, fingerprints(source, checkpoint, held)),
            "kv_tokens": 4096,
            "link_key": "k",
            **fields,
        }
        return LoadStage(**values)

    def transfers(self, plan: Plan) -> list[tuple[str, str, LayerRange]]:
        """Return who sends what to whom, that this plan needs."""
        return [
            (sender, receiver, LayerRange(left, right))
            for receiver, (start, stop) in plan
            for sender, (first, end) in self.plan
            if sender != receiver and (left := max(start, first)) < (right := min(stop, end))
        ]

    def begin_to_load(self, epoch: int, plan: Plan) -> None:
        """Order the layers of a new epoch, beside those that are served."""
        transfers = self.transfers(plan)
        for name, layers in plan:
            imports = tuple(moved for _, receiver, moved in transfers if receiver == name)
            order = self.order(epoch, layers, beside=Epoch(1), imports=imports)
            self.workers[name].engine.put(Load(0, order))

    def end_to_load(self, plan: Plan) -> list[Loaded]:
        """Wait until all are loaded."""
        return [self.workers[name].next(Loaded) for name, _ in plan]

    def copy(self, epoch: int, plan: Plan, *, rest: bool = False, most: int = 10**9) -> int:
        """Send what there is, at most so many messages by transfer; return how many those were."""
        sent = 0
        for sender, receiver, layers in self.transfers(plan):
            for number in range(1, most + 1):
                out = self.workers[sender].ask(
                    ExportKV(0, Epoch(epoch), layers, number, rest), KVExported
                )
                if out.message is None:
                    break
                self.deliver(receiver, out)
                sent += 1
                if isinstance(out.message, KVEnd):
                    break
        return sent

    def deliver(self, receiver: str, out: KVExported) -> KVImported:
        """Bring a message to the receiver over the wire."""
        order = carried(out)
        return self.workers[receiver].ask(order, KVImported)

    def assemble(self, epoch: int, plan: Plan) -> None:
        """Assemble the KV cache of all stages of a new epoch."""
        for name, _ in plan:
            self.workers[name].ask(AssembleKV(0, Epoch(epoch)), KVAssembled)

    def commit(self, epoch: int, plan: Plan) -> None:
        """Serve the new epoch, and give up the old one."""
        for name in {name for name, _ in (*plan, *self.plan)}:
            engine = self.workers[name].engine
            engine.put(Serve(Epoch(epoch)) if name in dict(plan) else Release(Epoch(0), ()))
        self.serve_epoch(epoch, plan)

    def cancel(self, epoch: int) -> None:
        """Give the new epoch up."""
        for worker in self.workers.values():
            worker.engine.put(Unload(Epoch(epoch)))


def carried(out: KVExported) -> ImportKV:
    """Return a message as it arrives at another worker."""
    assert out.message is not None
    frames = [bytes(frame) for frame in codec.encode(out.message, out.frames)]
    assert sum(map(len, frames)) <= 4 << 20 or isinstance(out.message, KVEnd)
    message, tensors = codec.to_next_worker.decode(frames)
    assert isinstance(message, KVPieces | KVEnd)
    return ImportKV(0, message, tensors)


@contextmanager
def workers(*names: str, memory_bytes: int = GIB) -> Iterator[dict[str, Worker]]:
    """Give workers, which end afterwards."""
    made = {name: Worker(memory_bytes) for name in names}
    try:
        yield made
    finally:
        deadline = time.monotonic() + 20
        for worker in made.values():
            worker.gate.set()
        ended = [worker.engine.stop(deadline - time.monotonic()) for worker in made.values()]
        assert all(ended)
