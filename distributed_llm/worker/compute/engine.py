"""The compute thread: runs orders one after the other and posts what came of them.

Nothing but this thread computes, so heartbeats never wait for a layer. It holds the served stage
and, while layers move, one that was loaded beside it by a thread of its own.
"""

import contextlib
import gc
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from distributed_llm.common.errors import DistributedLLMError, StageError
from distributed_llm.common.messages import Capabilities, LoadStage, StageTime, StageTrial
from distributed_llm.worker.compute.computing import Given, compute
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
from distributed_llm.worker.compute.orders import Orders
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
    KVOrderFailed,
    Load,
    Loaded,
    LoadFailed,
    Probe,
    Release,
    Run,
    Serve,
    Unload,
)
from distributed_llm.worker.tensor_frames import TORCH_DTYPES

logger = logging.getLogger(__name__)


HandOver = ExportKV | ImportKV | AssembleKV
Order = Load | Run | Release | Drop | Serve | Unload | HandOver | Probe
Voidable = Load | Run | HandOver | Probe

_T = TypeVar("_T")


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
    """Holds the served stage, and one beside it, and runs them.

    Args:
        capabilities: of this machine: the device and threads to compute with, memory to use.
        slowdown: how many times slower to look; it waits after each task. May be changed later.
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
        is_void: Callable[[Voidable], bool],
        post: Callable[[Event], None],
    ) -> None:
        self._capabilities = capabilities
        self._device = torch.device(capabilities.device)
        self.slowdown = slowdown
        self._min_task_s = min_task_s
        self._local_model = local_model
        self._is_void = is_void
        self._post = post
        self._orders: Orders[Order | BackgroundLoad] = Orders()
        self._served: LoadedStage | None = None
        self._beside: PreparedStage | None = None
        self._leaving: list[Tensor] = []  # memory of stages that were given up
        self._exports = KVExports()
        self._wanted: Load | None = None  # to be loaded beside
        self._loader: BackgroundLoad | None = None
        self.vitals = Vitals()
        self._thread = threading.Thread(target=self._main, name="compute", daemon=True)
        self._thread.start()

    def put(self, order: Order) -> None:
        """Queue an order."""
        if isinstance(order, Run):
            self.vitals.tasks_put += 1
        self._orders.put(order)

    def progress_age_s(self) -> float:
        """Return how long ago the thread finished a layer; 0 if it has nothing to do."""
        if not self.vitals.tasks_waiting:
            return 0.0
        return max(0.0, time.monotonic() - self.vitals.progress_at)

    def stop(self, timeout_s: float) -> bool:
        """End the thread after what it is doing; return whether it ended in time."""
        deadline = time.monotonic() + timeout_s
        self._orders.end()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            return False
        return self._loader is None or self._loader.join(max(0.0, deadline - time.monotonic()))

    def _main(self) -> None:
        use_threads(self._capabilities.threads)
        while (item := self._next()) is not None:
            queued_at, order = item
            self._made_progress()
            try:
                self._do(order, queued_at)
            except Exception:
                logger.exception("the compute thread failed at %s", type(order).__name__)
            finally:
                if isinstance(order, Run):
                    self.vitals.tasks_done += 1

    def _next(self) -> tuple[float, Order | BackgroundLoad] | None:
        """Return the next order; until it comes, but once at least, give some memory back."""
        while self._leaving:
            self._leaving.pop()
            if not self._leaving:
                give_memory_back(self._device)
            with contextlib.suppress(queue.Empty):
                return self._orders.get(block=False)
        return self._orders.get()

    def _do(self, order: Order | BackgroundLoad, queued_at: float) -> None:
        match order:
            case Run():
                self._run(order, _us(time.perf_counter() - queued_at))
            case Release(epoch=epoch, sequence_ids=ids):
                if held := self._held_of(epoch):
                    held.stage.release(ids)
            case Load():
                self._load(order)
            case BackgroundLoad():
                self._loaded_beside(order)
            case Serve(epoch=epoch):
                self._serve(epoch)
            case Unload(epoch=epoch):
                self._unload(epoch)
            case Drop():
                self._drop()
            case ExportKV() | ImportKV() | AssembleKV():
                self._hand_over(order)
            case Probe() if self._loader is None and not self._is_void(order):
                self._post(remeasure(order, self._capabilities, slowdown=self.slowdown))
        kv_bytes = self._served.stage.kv_bytes if self._served else 0
        self.vitals.kv_bytes = kv_bytes + (self._beside.imported_bytes if self._beside else 0)

    def _held_of(self, epoch: int) -> LoadedStage | PreparedStage | None:
        for held in (self._served, self._beside):
            if held is not None and held.order.epoch == epoch:
                return held
        return None

    # -------------------------------------------------------------- which stages

    def _serve(self, epoch: int) -> None:
        beside = self._beside
        if beside is None or beside.order.epoch != epoch:
            logger.error("epoch %s is not to be served: its layers are not loaded", epoch)
            return
        self._exports.clear()
        self._let_go(self._served)
        self._served, self._beside = LoadedStage(beside.order, beside.stage), None
        use_threads(beside.threads)

    def _unload(self, epoch: int) -> None:
        self._exports.end(epoch)
        if self._wanted and self._wanted.order.epoch == epoch:
            self._wanted = None
        if self._beside and self._beside.order.epoch == epoch:
            self._drop_beside()

    def _drop_beside(self) -> None:
        self._let_go(self._beside)
        self._beside = None

    def _let_go(self, held: LoadedStage | PreparedStage | None) -> None:
        """Give the memory of a stage back bit by bit, while the other one goes on."""
        if held is not None:
            self._leaving += held.stage.memory()

    def _drop(self) -> None:
        self._wanted = None
        self._exports.clear()
        if self._served is None and self._beside is None and not self._leaving:
            return
        self._served = self._beside = None
        gc.collect()  # modules of some models may refer to each other
        self._let_all_go()

    def _let_all_go(self) -> None:
        self._leaving.clear()
        give_memory_back(self._device)

    # -------------------------------------------------------------- loading

    def _load(self, load: Load) -> None:
        if self._is_void(load):
            return
        self._exports.clear()
        self._drop_beside()
        if load.order.beside:
            self._wanted = load
            self._load_wanted()
        else:
            self._wanted = None
            self._load_alone(load)

    def _load_alone(self, load: Load) -> None:
        if self._loader:
            self._loader.discard()
        self._let_all_go()
        started = time.perf_counter()
        try:
            stage = self._stage_alone(load.order)
            kv_tokens = limit_kv(stage, load.order, self._room())
        except Exception as exc:
            self._drop()
            self._fail(load, exc)
            return
        self._served = LoadedStage(load.order, stage)
        self._tell(load, stage, time.perf_counter() - started, kv_tokens)

    def _stage_alone(self, order: LoadStage) -> Stage:
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

    def _load_wanted(self) -> None:
        """Begin with what is wanted, unless the thread is not through with what was before."""
        load, served = self._wanted, self._served
        if load is None or self._loader is not None:
            return
        order = load.order
        self._let_all_go()
        self._loader = BackgroundLoad(
            load,
            lambda: self._load_beside(order, served),
            self._orders.put,
        )

    def _load_beside(self, order: LoadStage, served: LoadedStage | None) -> tuple[Stage, int]:
        """Return a stage and the threads that it is worth; runs in a thread of its own."""
        stage, threads = load_beside(order, served, self._capabilities, self._local_model)
        stage.progress = self._made_progress
        return stage, threads

    def _loaded_beside(self, done: BackgroundLoad) -> None:
        self._loader = None
        load = done.load
        if load is self._wanted and not self._is_void(load):
            self._admit(load, done)
        elif stage := done.discard():
            self._let_go(LoadedStage(load.order, stage))
        if load is self._wanted:
            self._wanted = None
        self._load_wanted()

    def _admit(self, load: Load, done: BackgroundLoad) -> None:
        order = load.order
        try:
            stage, threads = done.take()
        except Exception as exc:
            self._fail(load, exc)
            return
        try:
            kv_tokens, import_bytes = admit_beside(order, stage, self._served, self._room())
            importers = importers_for(order, stage, import_bytes)
        except Exception as exc:
            self._let_go(LoadedStage(order, stage))
            self._fail(load, exc)
            return
        self._beside = PreparedStage(order, stage, threads, importers)
        if self._served is None:
            use_threads(threads)
        self._tell(load, stage, done.seconds, kv_tokens)

    def _room(self) -> Memory:
        return memory_now(self._device, self._capabilities.memory_bytes)

    def _tell(self, load: Load, stage: Stage, load_s: float, kv_tokens: int) -> None:
        epoch, size = load.order.epoch, stage.weight_bytes
        trials = self._trials(load.order, stage, kv_tokens)
        self._post(Loaded(load.session, epoch, load_s, size, kv_tokens, trials))

    def _trials(self, order: LoadStage, stage: Stage, kv_tokens: int) -> tuple[StageTrial, ...]:
        """Return what steps take that are tried, if that is wanted and no other stage waits."""
        if not order.trials or (self._served and self._served.stage is not stage):
            return ()
        try:
            return try_out(stage, lambda do: self._timed(stage, do)[1], kv_tokens=kv_tokens)
        except Exception as exc:
            logger.warning("layers %s could not be tried out: %s", order.layers, exc)
            return ()
        finally:
            give_memory_back(self._device)

    def _fail(self, load: Load, exc: Exception) -> None:
        error = _told(exc, f"Loading layers {load.order.layers}")
        self._post(LoadFailed(load.session, load.order.epoch, error))

    # -------------------------------------------------------------- handing over

    def _hand_over(self, order: HandOver) -> None:
        if self._is_void(order):
            return
        served = self._served.stage if self._served else None
        try:
            match order:
                case ExportKV():
                    event: Event = self._exports.next(order, served)
                case ImportKV():
                    event = import_kv(order, self._beside)
                case AssembleKV():
                    event = assemble_kv(order, served, self._beside)
        except Exception as exc:
            event = KVOrderFailed(order, _told(exc, "Handing over the KV cache"))
        self._post(event)

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
            self._post(ComputeFailed(run, _told(exc, "Computing")))
            return
        self._post(Computed(run, specs, frames, took.compute_us, took.layers_us, queued_us))

    def _compute(self, run: Run) -> tuple[Given, StageTime]:
        held = self._held_of(run.task.epoch)
        if held is None:
            raise StageError(f"No layers are loaded for epoch {run.task.epoch}.")
        stage, dtype = held.stage, held.order.wire_dtype
        return self._timed(stage, lambda: compute(stage, run.task, run.frames, dtype))

    def _timed(self, stage: Stage, work: Callable[[], _T]) -> tuple[_T, StageTime]:
        """Do what a task does, as slowly as is to be; return what it gives and what it took."""
        started = time.perf_counter()
        given = work()
        layers_s = stage.layers_s * self.slowdown
        self._wait(time.perf_counter() - started)
        compute_us = _us(time.perf_counter() - started)
        layers_us = min(_us(layers_s), compute_us)
        return given, StageTime(compute_us=compute_us, layers_us=layers_us, queued_us=0)

    def _wait(self, computed_s: float) -> None:
        wait_s = max(computed_s * self.slowdown, self._min_task_s) - computed_s
        if wait_s > 0.0:
            time.sleep(wait_s)

    def _made_progress(self) -> None:
        self.vitals.progress_at = time.monotonic()


def _us(seconds: float) -> int:
    return max(0, round(seconds * 1e6))


def _told(exc: Exception, what: str) -> DistributedLLMError:
    """Return what others are told; what should not happen is logged with its trace."""
    if isinstance(exc, DistributedLLMError):
        return exc
    logger.error("%s failed", what, exc_info=exc)
    return StageError(f"{what} failed: {type(exc).__name__}: {exc}"[:500] + ".")
