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

from distributed_llm.common.checkpoint import Checkpoint
from distributed_llm.common.errors import (
    CheckpointMismatch,
    DistributedLLMError,
    NotEnoughMemory,
    StageError,
)
from distributed_llm.common.hub import fingerprints, resolve_for_worker
from distributed_llm.common.messages import Capabilities, LoadStage
from distributed_llm.common.tensors import DtypeName, Frame, TensorSpec
from distributed_llm.common.types import KV_BLOCK, size_text
from distributed_llm.worker.events import (
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
from distributed_llm.worker.probe import free_memory_bytes
from distributed_llm.worker.stage import (
    MissingPositionsError,
    ReleasedSequence,
    Stage,
    StageOutput,
)

logger = logging.getLogger(__name__)

TORCH_DTYPES: dict[DtypeName, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int32": torch.int32,
    "uint8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

_RESERVE_BYTES = 256 * 1024 * 1024
_RESERVE_SHARE = 0.05

_WORTH_THREADS_BYTES = 2 << 20
"""Of the largest matrix of a stage; one thread reads it in about 0.1 ms."""

Order = Load | Run | Release | Drop


def tensor_of(spec: TensorSpec, frame: Frame) -> Tensor:
    """Return the tensor in a frame, on the CPU; it owns its memory and may be written to.

    It is copied because a frame may lie at any address, and numbers may not.
    """
    return torch.frombuffer(bytearray(frame), dtype=TORCH_DTYPES[spec.dtype]).view(spec.shape)


def frame_of(tensor: Tensor) -> tuple[TensorSpec, Frame]:
    """Return a tensor, not empty, as it crosses the wire."""
    held = tensor.detach().contiguous().cpu()
    spec = TensorSpec(_NAMES[held.dtype], tuple(held.shape))
    return spec, held.view(-1).view(torch.uint8).numpy().data


def num_threads(checkpoint: Checkpoint, order: LoadStage, available: int) -> int:
    """Return how many threads are worth it: one for layers whose matrices are small.

    Threads wait for each other after every product. Where a product takes 0.1 ms that gains little,
    and on a machine that is busy with something else it costs many times what it gains.
    """
    sizes = (
        checkpoint.bytes_in_memory(tensor, order.dtype)
        for tensor in checkpoint.tensors_of(order.layers)
        if not checkpoint.is_embedding(tensor.name)
    )
    return available if max(sizes, default=0) >= _WORTH_THREADS_BYTES else 1


@dataclass
class Vitals:
    """What a heartbeat tells of the compute thread; each value is written by one thread only."""

    tasks_put: int = 0
    tasks_done: int = 0
    kv_bytes: int = 0
    progress_at: float = 0.0

    @property
    def tasks_waiting(self) -> int:
        """Tasks that wait or run."""
        return self.tasks_put - self.tasks_done


class Engine:
    """Holds one stage and runs it.

    Args:
        capabilities: of this machine: the device and threads to compute with, memory to use.
        slowdown: how many times slower to look; it waits after each task.
        min_task_s: how long a task shall take at least; it waits.
        local_model: path of the checkpoint on this machine; empty is the coordinator's.
        is_void: called in this thread; what is void is passed over in silence.
        post: called in this thread with each event.
    """

    def __init__(
        self,
        capabilities: Capabilities,
        *,
        slowdown: float,
        min_task_s: float,
        local_model: str,
        is_void: Callable[[Load | Run], bool],
        post: Callable[[Event], None],
    ) -> None:
        self._capabilities = capabilities
        self._device = torch.device(capabilities.device)
        self._slowdown = slowdown
        self._min_task_s = min_task_s
        self._local_model = local_model
        self._is_void = is_void
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
            self.vitals.tasks_put += 1
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
        torch.set_num_threads(self._capabilities.threads)
        while (item := self._orders.get()) is not None:
            queued_at, order = item
            self._made_progress()
            try:
                self._do(order, queued_at)
            except Exception:
                logger.exception("the compute thread failed at %s", type(order).__name__)
            finally:
                if isinstance(order, Run):
                    self.vitals.tasks_done += 1

    def _do(self, order: Order, queued_at: float) -> None:
        match order:
            case Run():
                self._run(order, _us(time.perf_counter() - queued_at))
            case Load():
                self._load(order)
            case Release(sequence_ids=ids):
                if self._stage:
                    self._stage.release(ids)
            case Drop():
                self._drop()
        self.vitals.kv_bytes = self._stage.kv_bytes if self._stage else 0

    def _drop(self) -> None:
        if self._stage is None:
            return
        self._stage = self._held = None
        gc.collect()  # a model's modules and its hooks refer to each other
        self._give_memory_back()

    def _give_memory_back(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    # -------------------------------------------------------------- loading

    def _load(self, load: Load) -> None:
        order = load.order
        if self._is_void(load):
            return
        started = time.perf_counter()
        try:
            stage = self._stage_for(order)
            kv_tokens = self._limit_kv(stage, order)
        except DistributedLLMError as exc:
            self._give_up(load, exc)
            return
        except Exception as exc:
            logger.exception("loading layers %s failed", order.layers)
            self._give_up(load, StageError(f"Loading layers {order.layers} failed: {_short(exc)}."))
            return
        self._held = order
        load_s = time.perf_counter() - started
        self._post(Loaded(load.session, order.epoch, load_s, stage.weight_bytes, kv_tokens))

    def _give_up(self, load: Load, error: DistributedLLMError) -> None:
        self._drop()
        self._post(LoadFailed(load.session, load.order.epoch, error))

    def _stage_for(self, order: LoadStage) -> Stage:
        if self._stage is not None and self._holds(order):
            self._stage.reset()
            self._give_memory_back()
        else:
            self._drop()
            self._stage = self._load_stage(order)
        return self._stage

    def _limit_kv(self, stage: Stage, order: LoadStage) -> int:
        """Give the KV cache what is wanted, or what there is; return how many positions that is."""
        free_bytes = free_memory_bytes(self._device)
        reserve_bytes = max(_RESERVE_BYTES, int(free_bytes * _RESERVE_SHARE))
        own_bytes = self._capabilities.memory_bytes - stage.weight_bytes
        room_bytes = min(own_bytes, free_bytes - reserve_bytes)
        block_bytes = KV_BLOCK * stage.kv_bytes_per_token
        blocks = min(-(-order.kv_tokens // KV_BLOCK), room_bytes // block_bytes)
        if blocks < 1:
            raise NotEnoughMemory(
                f"No room for a KV cache beside layers {order.layers}. They take "
                f"{size_text(stage.weight_bytes)} of "
                f"{size_text(self._capabilities.memory_bytes)} that this worker may use; "
                f"{size_text(free_bytes)} are free on {self._device}, of which "
                f"{size_text(reserve_bytes)} are left to others; {KV_BLOCK} positions take "
                f"{size_text(block_bytes)}. Give this worker fewer layers, raise its max_memory, "
                "or end other programs there."
            )
        stage.limit_kv(blocks * block_bytes)
        return min(order.kv_tokens, blocks * KV_BLOCK)

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
        torch.set_num_threads(num_threads(checkpoint, order, self._capabilities.threads))
        stage = Stage.load(
            checkpoint, order.layers, device=self._device, dtype=TORCH_DTYPES[order.dtype]
        )
        stage.progress = self._made_progress
        return stage

    # -------------------------------------------------------------- running

    def _run(self, run: Run, queued_us: int) -> None:
        if self._is_void(run):
            return
        started = time.perf_counter()
        try:
            specs, frames = self._compute(run)
        except ReleasedSequence as exc:
            logger.debug("step %s is late: %s", run.task.step, exc)
            return
        except MissingPositionsError as exc:
            self._post(Broke(run, exc, exc.missing))
            return
        except DistributedLLMError as exc:
            logger.error("step %s failed: %s", run.task.step, exc)
            self._post(Broke(run, exc))
            return
        except Exception as exc:
            logger.exception("step %s failed", run.task.step)
            self._post(Broke(run, StageError(f"Computing failed: {_short(exc)}.")))
            return
        self._wait(time.perf_counter() - started)
        compute_us = _us(time.perf_counter() - started)
        self._post(Computed(run, specs, frames, compute_us, queued_us))

    def _wait(self, computed_s: float) -> None:
        wait_s = max(computed_s * self._slowdown, self._min_task_s) - computed_s
        if wait_s > 0.0:
            time.sleep(wait_s)

    def _compute(self, run: Run) -> tuple[tuple[TensorSpec, ...], tuple[Frame, ...]]:
        if self._stage is None or self._held is None:
            raise StageError("No layers are loaded.")
        self._stage.release(run.task.released)
        tensors = [
            tensor_of(spec, frame) for spec, frame in zip(run.task.tensors, run.frames, strict=True)
        ]
        if not 1 <= len(tensors) <= 2 or tensors[0].dtype != torch.int32:
            raise StageError("The task's tensors are not token ids and hidden states.")
        output = self._stage.run(
            run.task.sequences, tensors[0], tensors[1] if len(tensors) == 2 else None
        )
        given = [frame_of(tensor) for tensor in _tensors_of(output, self._held.wire_dtype)]
        return tuple(spec for spec, _ in given), tuple(frame for _, frame in given)

    def _made_progress(self) -> None:
        self.vitals.progress_at = time.monotonic()


def _tensors_of(output: StageOutput, wire_dtype: DtypeName) -> list[Tensor]:
    """Return what a task answers: hidden states, or token ids and what was asked for besides."""
    if output.hidden_states is not None:
        return [output.hidden_states.to(TORCH_DTYPES[wire_dtype])]
    if output.token_ids is None or output.token_ids.numel() == 0:
        return []
    return [
        tensor
        for tensor in (output.token_ids, output.logprobs, output.logprob_ids)
        if tensor is not None
    ]


def _us(seconds: float) -> int:
    return max(0, round(seconds * 1e6))


def _short(exc: Exception) -> str:
    return f"{type(exc).__name__}: {exc}"[:500]
