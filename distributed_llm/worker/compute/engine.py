"""The compute thread: carries out orders one after the other and posts their results as events.

No other thread runs tasks, and the thread of the event loop never does, so no heartbeat waits for a
layer. The thread holds the served stage and, while layers move, a prepared one beside it; the
latter is loaded by a thread of its own (`BackgroundLoad`).
"""

import contextlib
import gc
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, assert_never

import torch
from torch import Tensor

from distributed_llm.common.errors import DistributedLLMError, StageError
from distributed_llm.common.messages import Capabilities, LoadStage, StageTime, StageTrial
from distributed_llm.common.types import Epoch
from distributed_llm.worker.compute.computing import TensorsOnWire, compute
from distributed_llm.worker.compute.kv_orders import KVExports, assemble_kv, import_kv
from distributed_llm.worker.compute.loading import (
    BackgroundLoad,
    LoadedStage,
    Memory,
    PreparedStage,
    admit_beside,
    checked_checkpoint,
    give_memory_back,
    importers_for,
    limit_kv,
    load_beside,
    memory_now,
    num_threads,
    same_layers,
    use_threads,
)
from distributed_llm.worker.compute.orders import OrderQueue
from distributed_llm.worker.compute.probe import remeasure
from distributed_llm.worker.compute.trials import try_out
from distributed_llm.worker.model.stage import MissingPositionsError, ReleasedSequence, Stage
from distributed_llm.worker.session.events import (
    AssembleKV,
    Computed,
    ComputeFailed,
    Drop,
    Event,
    ExportKV,
    ImportKV,
    KVEvent,
    KVOrder,
    KVOrderFailed,
    Load,
    Loaded,
    LoadFailed,
    Order,
    Probe,
    Release,
    Run,
    Serve,
    Unload,
    VoidableOrder,
)
from distributed_llm.worker.tensor_frames import TORCH_DTYPES

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


@dataclass
class Vitals:
    """What a heartbeat says about the compute thread; each field has one thread that writes it."""

    tasks_put: int = 0
    tasks_done: int = 0
    kv_bytes: int = 0
    progress_at: float = 0.0

    @property
    def tasks_waiting(self) -> int:
        """How many tasks wait or run."""
        return self.tasks_put - self.tasks_done


class Engine:
    """The compute thread and the stages it holds; it starts at once.

    Args:
        capabilities: of this machine: device, threads and memory to use.
        slowdown: how many times slower to be: the thread sleeps after each task.
        local_model: path of the checkpoint on this machine; empty is the coordinator's path.
        is_void: whether nobody waits for an order any more; called in the compute thread. A void
            order is skipped, and no event answers it.
        post: called in the compute thread with each event.

    Attributes:
        slowdown: as given; may be changed at any time.
        vitals: for heartbeats.
    """

    def __init__(
        self,
        capabilities: Capabilities,
        *,
        slowdown: float,
        local_model: str,
        is_void: Callable[[VoidableOrder], bool],
        post: Callable[[Event], None],
    ) -> None:
        self._capabilities = capabilities
        self._device = torch.device(capabilities.device)
        self.slowdown = slowdown
        self._local_model = local_model
        self._is_void = is_void
        self._post = post
        self._orders: OrderQueue[Order | BackgroundLoad] = OrderQueue()
        self._served: LoadedStage | None = None
        self._prepared: PreparedStage | None = None
        self._to_free: list[Tensor] = []  # memory of stages that were given up
        self._exports = KVExports()
        self._next_load: Load | None = None  # beside; the thread for it may be busy
        self._background: BackgroundLoad | None = None
        self.vitals = Vitals()
        self._thread = threading.Thread(target=self._main, name="compute", daemon=True)
        self._thread.start()

    def put(self, order: Order) -> None:
        """Queue an order."""
        if isinstance(order, Run):
            self.vitals.tasks_put += 1
        self._orders.put(order)

    def progress_age_s(self) -> float:
        """Return how long ago the thread finished a layer; 0 if it has no task."""
        if not self.vitals.tasks_waiting:
            return 0.0
        return max(0.0, time.monotonic() - self.vitals.progress_at)

    def stop(self, timeout_s: float) -> bool:
        """Carry out the queued orders and end the thread; return whether it ended in time."""
        deadline = time.monotonic() + timeout_s
        self._orders.end()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            return False
        background = self._background
        return background is None or background.join(max(0.0, deadline - time.monotonic()))

    def _main(self) -> None:
        use_threads(self._capabilities.threads)
        while (item := self._next()) is not None:
            queued_at, order = item
            self._made_progress()
            try:
                self._carry_out(order, queued_at)
            except Exception:
                logger.exception("the compute thread failed at %s", type(order).__name__)
            finally:
                if isinstance(order, Run):
                    self.vitals.tasks_done += 1

    def _next(self) -> tuple[float, Order | BackgroundLoad] | None:
        """Return the next order; while there is none, and once at least, free some memory."""
        while self._to_free:
            self._to_free.pop()
            if not self._to_free:
                give_memory_back(self._device)
            with contextlib.suppress(queue.Empty):
                return self._orders.get(block=False)
        return self._orders.get()

    def _carry_out(self, order: Order | BackgroundLoad, queued_at: float) -> None:
        match order:
            case Run():
                self._run(order, _us(time.perf_counter() - queued_at))
            case Release(epoch=epoch, sequence_ids=ids):
                if held := self._stage_of(epoch):
                    held.stage.release(ids)
            case Load():
                self._load(order)
            case BackgroundLoad():
                self._loaded_in_background(order)
            case Serve(epoch=epoch):
                self._serve(epoch)
            case Unload(epoch=epoch):
                self._unload(epoch)
            case Drop():
                self._drop()
            case ExportKV():
                self._answer(order, lambda: self._exports.next(order, self._served_stage()))
            case ImportKV():
                self._answer(order, lambda: import_kv(order, self._prepared))
            case AssembleKV():
                self._answer(
                    order, lambda: assemble_kv(order, self._served_stage(), self._prepared)
                )
            case Probe():
                self._probe(order)
            case _:
                assert_never(order)
        kv_bytes = self._served.stage.kv_bytes if self._served else 0
        self.vitals.kv_bytes = kv_bytes + (self._prepared.imported_bytes if self._prepared else 0)

    def _answer(self, order: KVOrder, carry_out: Callable[[], KVEvent]) -> None:
        if self._is_void(order):
            return
        try:
            event = carry_out()
        except Exception as exc:
            event = KVOrderFailed(order, _reported(exc, "Handing over the KV cache"))
        self._post(event)

    def _probe(self, order: Probe) -> None:
        if self._background is None and not self._is_void(order):
            self._post(remeasure(order, self._capabilities, slowdown=self.slowdown))

    # -------------------------------------------------------------- which stages

    def _served_stage(self) -> Stage | None:
        return self._served.stage if self._served else None

    def _stage_of(self, epoch: Epoch) -> LoadedStage | PreparedStage | None:
        for held in (self._served, self._prepared):
            if held is not None and held.order.epoch == epoch:
                return held
        return None

    def _serve(self, epoch: Epoch) -> None:
        prepared = self._prepared
        if prepared is None or prepared.order.epoch != epoch:
            logger.error("epoch %s is not to be served: its layers are not loaded", epoch)
            return
        self._exports.clear()
        self._free_gradually(self._served)
        self._served, self._prepared = LoadedStage(prepared.order, prepared.stage), None
        use_threads(prepared.threads)

    def _unload(self, epoch: Epoch) -> None:
        self._exports.end(epoch)
        if self._next_load and self._next_load.order.epoch == epoch:
            self._next_load = None
        if self._prepared and self._prepared.order.epoch == epoch:
            self._unload_prepared()

    def _unload_prepared(self) -> None:
        self._free_gradually(self._prepared)
        self._prepared = None

    def _free_gradually(self, held: LoadedStage | PreparedStage | None) -> None:
        """Free the memory of a stage tensor by tensor, while the other stage goes on."""
        if held is not None:
            self._to_free += held.stage.memory()

    def _drop(self) -> None:
        self._next_load = None
        self._exports.clear()
        if self._served is None and self._prepared is None and not self._to_free:
            return
        self._served = self._prepared = None
        gc.collect()  # modules of some models may refer to each other
        self._free_all()

    def _free_all(self) -> None:
        self._to_free.clear()
        give_memory_back(self._device)

    # -------------------------------------------------------------- loading

    def _load(self, load: Load) -> None:
        if self._is_void(load):
            return
        self._exports.clear()
        self._unload_prepared()
        if load.order.beside:
            self._next_load = load
            self._load_in_background()
        else:
            self._next_load = None
            self._load_alone(load)

    def _load_alone(self, load: Load) -> None:
        if self._background:
            self._background.discard()
        self._free_all()
        started = time.perf_counter()
        try:
            stage = self._stage_alone(load.order)
            kv_tokens = limit_kv(stage, load.order, self._memory())
        except Exception as exc:
            self._drop()
            self._post_load_failed(load, exc)
            return
        self._served = LoadedStage(load.order, stage)
        self._post_loaded(load, stage, time.perf_counter() - started, kv_tokens)

    def _stage_alone(self, order: LoadStage) -> Stage:
        """Return the served stage with an empty KV cache if it fits the order, else a new one."""
        held = self._served
        if held is not None and same_layers(held.order, order):
            held.stage.reset()
            give_memory_back(self._device)
            return held.stage
        del held
        self._drop()
        return self._load_stage(order)

    def _load_stage(self, order: LoadStage) -> Stage:
        checkpoint = checked_checkpoint(order, self._local_model)
        use_threads(num_threads(checkpoint, order, self._capabilities.threads))
        stage = Stage.load(
            checkpoint, order.layers, device=self._device, dtype=TORCH_DTYPES[order.dtype]
        )
        stage.progress = self._made_progress
        return stage

    def _load_in_background(self) -> None:
        """Start the next load beside, unless an older one, even a void one, has not ended."""
        load, served = self._next_load, self._served
        if load is None or self._background is not None:
            return
        order = load.order
        self._free_all()
        self._background = BackgroundLoad(
            load,
            lambda: self._load_beside(order, served),
            self._orders.put,
        )

    def _load_beside(self, order: LoadStage, served: LoadedStage | None) -> tuple[Stage, int]:
        """Return a stage and the number of threads for it; runs in the background thread."""
        stage, threads = load_beside(order, served, self._capabilities, self._local_model)
        stage.progress = self._made_progress
        return stage, threads

    def _loaded_in_background(self, done: BackgroundLoad) -> None:
        self._background = None
        load = done.load
        if load is self._next_load and not self._is_void(load):
            self._admit(load, done)
        elif stage := done.discard():
            self._free_gradually(LoadedStage(load.order, stage))
        if load is self._next_load:
            self._next_load = None
        self._load_in_background()

    def _admit(self, load: Load, done: BackgroundLoad) -> None:
        """Prepare a stage that was loaded, if the memory is enough for its KV cache too."""
        order = load.order
        try:
            stage, threads = done.take()
        except Exception as exc:
            self._post_load_failed(load, exc)
            return
        try:
            kv_tokens, import_bytes = admit_beside(order, stage, self._served, self._memory())
            importers = importers_for(order, stage, import_bytes)
        except Exception as exc:
            self._free_gradually(LoadedStage(order, stage))
            self._post_load_failed(load, exc)
            return
        self._prepared = PreparedStage(order, stage, threads, importers)
        if self._served is None:
            use_threads(threads)
        self._post_loaded(load, stage, done.seconds, kv_tokens)

    def _memory(self) -> Memory:
        return memory_now(self._device, self._capabilities.memory_bytes)

    def _post_loaded(self, load: Load, stage: Stage, load_s: float, kv_tokens: int) -> None:
        epoch, size = load.order.epoch, stage.weight_bytes
        trials = self._trials(load.order, stage, kv_tokens)
        self._post(Loaded(load.session, epoch, load_s, size, kv_tokens, trials))

    def _post_load_failed(self, load: Load, exc: Exception) -> None:
        error = _reported(exc, f"Loading layers {load.order.layers}")
        self._post(LoadFailed(load.session, load.order.epoch, error))

    def _trials(self, order: LoadStage, stage: Stage, kv_tokens: int) -> tuple[StageTrial, ...]:
        """Return times of trial steps; none if they are not ordered, or another stage is served."""
        if not order.trials or (self._served and self._served.stage is not stage):
            return ()
        try:
            return try_out(stage, lambda do: self._timed(stage, do)[1], kv_tokens=kv_tokens)
        except Exception as exc:
            logger.warning("layers %s could not be tried out: %s", order.layers, exc)
            return ()
        finally:
            give_memory_back(self._device)

    # -------------------------------------------------------------- running

    def _run(self, run: Run, queued_us: int) -> None:
        if self._is_void(run):
            return
        try:
            (specs, frames), took = self._compute(run)
        except ReleasedSequence as exc:
            logger.debug("step %s is late: %s", run.task.step, exc)
            return
        except MissingPositionsError as exc:
            self._post(ComputeFailed(run, exc, exc.missing))
            return
        except DistributedLLMError as exc:
            logger.error("step %s failed: %s", run.task.step, exc)
            self._post(ComputeFailed(run, exc))
            return
        except Exception as exc:
            self._post(ComputeFailed(run, _reported(exc, "Computing")))
            return
        self._post(Computed(run, specs, frames, took.compute_us, took.layers_us, queued_us))

    def _compute(self, run: Run) -> tuple[TensorsOnWire, StageTime]:
        held = self._stage_of(run.task.epoch)
        if held is None:
            raise StageError(f"No layers are loaded for epoch {run.task.epoch}.")
        stage, dtype = held.stage, held.order.wire_dtype
        return self._timed(stage, lambda: compute(stage, run.task, run.frames, dtype))

    def _timed(self, stage: Stage, work: Callable[[], _T]) -> tuple[_T, StageTime]:
        """Do the work of a task and slow it down; return its result and the time it took."""
        started = time.perf_counter()
        given = work()
        layers_s = stage.layers_s * self.slowdown
        self._wait(time.perf_counter() - started)
        compute_us = _us(time.perf_counter() - started)
        layers_us = min(_us(layers_s), compute_us)
        return given, StageTime(compute_us=compute_us, layers_us=layers_us, queued_us=0)

    def _wait(self, computed_s: float) -> None:
        wait_s = computed_s * self.slowdown - computed_s
        if wait_s > 0.0:
            time.sleep(wait_s)

    def _made_progress(self) -> None:
        self.vitals.progress_at = time.monotonic()


def _us(seconds: float) -> int:
    return max(0, round(seconds * 1e6))


def _reported(exc: Exception, what: str) -> DistributedLLMError:
    """Return the error to report for an exception; one that nobody expects is logged as well."""
    if isinstance(exc, DistributedLLMError):
        return exc
    logger.error("%s failed", what, exc_info=exc)
    return StageError(f"{what} failed: {type(exc).__name__}: {exc}"[:500] + ".")
