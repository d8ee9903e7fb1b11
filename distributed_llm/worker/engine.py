"""The compute thread: runs orders one after the other and posts what came of them.

Nothing but this thread touches torch, so heartbeats never wait for a layer.
"""

import gc
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distributed_llm.common.errors import CheckpointMismatch, DistributedLLMError, StageError
from distributed_llm.common.hub import fingerprints, resolve_for_worker
from distributed_llm.common.messages import LoadStage
from distributed_llm.common.tensors import DtypeName, Frame, TensorSpec
from distributed_llm.worker.agent import (
    Broke,
    Computed,
    Drop,
    Event,
    Load,
    Loaded,
    LoadFailed,
    Release,
    Run,
)
from distributed_llm.worker.stage import MissingPositionsError, Stage

logger = logging.getLogger(__name__)

TORCH_DTYPES: dict[DtypeName, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int32": torch.int32,
    "uint8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

Order = Load | Run | Release | Drop


def tensor_of(spec: TensorSpec, frame: Frame) -> Tensor:
    """Return the tensor in a frame, on the CPU; it owns its memory and may be written to."""
    return torch.frombuffer(bytearray(frame), dtype=TORCH_DTYPES[spec.dtype]).view(spec.shape)


def frame_of(tensor: Tensor) -> tuple[TensorSpec, Frame]:
    """Return a tensor, not empty, as it crosses the wire."""
    held = tensor.detach().contiguous().cpu()
    spec = TensorSpec(_NAMES[held.dtype], tuple(held.shape))
    return spec, held.view(-1).view(torch.uint8).numpy().data


@dataclass
class Vitals:
    """What a heartbeat tells of the compute thread; read from other threads."""

    tasks_waiting: int = 0
    kv_bytes: int = 0
    progress_at: float = 0.0


class Engine:
    """Holds one stage and runs it.

    Args:
        device: torch's name.
        threads: CPU threads to compute with.
        slowdown: how many times slower to look; it waits after each task.
        local_model: path of the checkpoint on this machine; empty is the coordinator's.
        newest_epoch: tasks of older epochs are passed over.
        post: called in this thread with each event.
    """

    def __init__(
        self,
        *,
        device: str,
        threads: int,
        slowdown: float,
        local_model: str,
        newest_epoch: Callable[[], int],
        post: Callable[[Event], None],
    ) -> None:
        self._device = torch.device(device)
        self._threads = threads
        self._slowdown = slowdown
        self._local_model = local_model
        self._newest_epoch = newest_epoch
        self._post = post
        self._orders: queue.SimpleQueue[tuple[float, Order] | None] = queue.SimpleQueue()
        self._stage: Stage | None = None
        self._held: LoadStage | None = None
        self.vitals = Vitals()
        self._thread = threading.Thread(target=self._main, name="compute", daemon=True)
        self._thread.start()

    def put(self, order: Order) -> None:
        """Queue an order."""
        if isinstance(order, Run):
            self.vitals.tasks_waiting += 1
        self._orders.put((time.perf_counter(), order))

    def progress_age_s(self) -> float:
        """Return how long ago the thread finished a layer; 0 if it has nothing to do."""
        if not self.vitals.tasks_waiting:
            return 0.0
        return max(0.0, time.monotonic() - self.vitals.progress_at)

    def stop(self, timeout_s: float) -> bool:
        """End the thread after what it is doing; return whether it ended in time."""
        self._orders.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _main(self) -> None:
        torch.set_num_threads(self._threads)
        while (item := self._orders.get()) is not None:
            queued_at, order = item
            self._made_progress()
            try:
                self._do(order, queued_at)
            except Exception:
                logger.exception("the compute thread failed at %s", type(order).__name__)
            finally:
                if isinstance(order, Run):
                    self.vitals.tasks_waiting -= 1

    def _do(self, order: Order, queued_at: float) -> None:
        match order:
            case Run():
                self._run(order, time.perf_counter() - queued_at)
            case Load():
                self._load(order)
            case Release(sequence_ids=ids):
                if self._stage:
                    self._stage.release(ids)
            case Drop():
                self._drop()
        self.vitals.kv_bytes = self._stage.kv_bytes if self._stage else 0

    def _drop(self) -> None:
        self._stage = self._held = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    # -------------------------------------------------------------- loading

    def _load(self, load: Load) -> None:
        order = load.order
        if order.epoch < self._newest_epoch():
            return
        started = time.perf_counter()
        try:
            if self._stage is not None and self._holds(order):
                self._stage.reset()
            else:
                self._drop()
                self._stage = self._load_stage(order)
        except DistributedLLMError as exc:
            self._post(LoadFailed(load.session, order.epoch, exc))
            return
        except Exception as exc:
            logger.exception("loading layers %s failed", order.layers)
            error = StageError(f"Loading layers {order.layers} failed: {_short(exc)}.")
            self._post(LoadFailed(load.session, order.epoch, error))
            return
        self._held = order
        load_s = time.perf_counter() - started
        self._post(Loaded(load.session, order.epoch, load_s, self._stage.weight_bytes))

    def _holds(self, order: LoadStage) -> bool:
        held = self._held
        return held is not None and (held.layers, held.dtype, held.digest) == (
            order.layers,
            order.dtype,
            order.digest,
        )

    def _load_stage(self, order: LoadStage) -> Stage:
        checkpoint = resolve_for_worker(order.source, order.layers, local_model=self._local_model)
        prints = fingerprints(order.source, checkpoint, order.layers)
        if checkpoint.digest(order.layers, prints) != order.digest:
            raise CheckpointMismatch(
                f"The weights of layers {order.layers} in {checkpoint.folder} are not those of the "
                "coordinator: they would give other text. Copy the coordinator's checkpoint to "
                "this machine, or name the right folder with `dllm worker --model`."
            )
        stage = Stage.load(
            checkpoint, order.layers, device=self._device, dtype=TORCH_DTYPES[order.dtype]
        )
        stage.progress = self._made_progress
        return stage

    # -------------------------------------------------------------- running

    def _run(self, run: Run, queued_s: float) -> None:
        task = run.task
        if task.epoch < self._newest_epoch():
            return
        started = time.perf_counter()
        try:
            specs, frames = self._compute(run)
        except MissingPositionsError as exc:
            self._post(Broke(run.session, task, exc, exc.missing))
            return
        except DistributedLLMError as exc:
            logger.error("step %s failed: %s", task.step, exc)
            self._post(Broke(run.session, task, exc))
            return
        except Exception as exc:
            logger.exception("step %s failed", task.step)
            self._post(Broke(run.session, task, StageError(f"Computing failed: {_short(exc)}.")))
            return
        compute_s = time.perf_counter() - started
        if self._slowdown > 1.0:
            time.sleep(compute_s * (self._slowdown - 1.0))
            compute_s *= self._slowdown
        self._post(Computed(run.session, task, specs, frames, compute_s, queued_s))

    def _compute(self, run: Run) -> tuple[tuple[TensorSpec, ...], tuple[Frame, ...]]:
        if self._stage is None:
            raise StageError("No layers are loaded.")
        tensors = [
            tensor_of(spec, frame) for spec, frame in zip(run.task.tensors, run.frames, strict=True)
        ]
        if not 1 <= len(tensors) <= 2 or tensors[0].dtype != torch.int32:
            raise StageError("The task's tensors are not token ids and hidden states.")
        output = self._stage.run(
            run.task.sequences, tensors[0], tensors[1] if len(tensors) == 2 else None
        )
        given = output.token_ids if output.hidden_states is None else output.hidden_states
        if given is None or given.numel() == 0:
            return (), ()
        spec, frame = frame_of(given)
        return (spec,), (frame,)

    def _made_progress(self) -> None:
        self.vitals.progress_at = time.monotonic()


def _short(exc: Exception) -> str:
    return f"{type(exc).__name__}: {exc}"[:500]
