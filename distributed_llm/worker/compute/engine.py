"""The compute thread: carries out orders one after the other and posts their results as events.

No other thread runs tasks, and the thread of the event loop never does, so no heartbeat waits for a
layer. The stages that the thread holds, and loading them, are in `held_stages`.
"""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, assert_never

import torch

from distributed_llm.common.errors import DistributedLLMError, StageError, internal_error
from distributed_llm.common.messages import Capabilities, FetchProgress, StageTime
from distributed_llm.worker.compute.computing import TensorsOnWire, compute
from distributed_llm.worker.compute.failures import reported
from distributed_llm.worker.compute.finding import WeightFinder
from distributed_llm.worker.compute.held_stages import HeldStages
from distributed_llm.worker.compute.kv_orders import assemble_kv, import_kv
from distributed_llm.worker.compute.load_progress import LoadProgress
from distributed_llm.worker.compute.loading import BackgroundLoad, use_threads
from distributed_llm.worker.compute.orders import OrderQueue
from distributed_llm.worker.compute.probe import remeasure
from distributed_llm.worker.devices import give_memory_back, lost
from distributed_llm.worker.model.failures import (
    MissingPositionsError,
    ReleasedSequence,
    SequencesFailed,
)
from distributed_llm.worker.model.stage import Stage
from distributed_llm.worker.session.events import (
    AssembleKV,
    Computed,
    ComputeFailed,
    ComputeThreadFailed,
    Drop,
    Event,
    ExportKV,
    ImportKV,
    KVEvent,
    KVOrder,
    KVOrderFailed,
    Load,
    Order,
    Probe,
    Release,
    Run,
    Serve,
    Unload,
    VoidableOrder,
)

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


@dataclass
class Vitals:
    """What heartbeats tell of the compute thread; each field is written by one thread only.

    Attributes:
        tasks_put: tasks that were ordered so far.
        tasks_done: tasks that were run or skipped so far.
        kv_bytes: memory that KV cache takes.
        progress_at: when the thread last began an order or finished a layer, clock seconds.
    """

    tasks_put: int = 0
    tasks_done: int = 0
    kv_bytes: int = 0
    progress_at: float = 0.0

    @property
    def tasks_waiting(self) -> int:
        """How many tasks wait or run."""
        return self.tasks_put - self.tasks_done


class Engine:
    """The compute thread; it starts at once.

    Args:
        capabilities: of this machine: device, threads and memory to use.
        slowdown: how many times slower to be: the thread sleeps after each task.
        weights: finds the weights that orders name.
        is_void: whether the result of an order is no longer wanted; called in the compute thread. A
            void order is skipped, and no event answers it.
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
        weights: WeightFinder,
        is_void: Callable[[VoidableOrder], bool],
        post: Callable[[Event], None],
    ) -> None:
        self._capabilities = capabilities
        self.slowdown = slowdown
        self._is_void = is_void
        self._post = post
        self._orders: OrderQueue[Order | BackgroundLoad] = OrderQueue()
        self._progress = LoadProgress()
        self._weights = weights
        self._stages = HeldStages(
            capabilities,
            weights=weights,
            is_void=is_void,
            post=post,
            timer=lambda stage, step: self._timed(stage, step)[1],
            after_layer=self._made_progress,
            progress=self._progress,
            load_ended=self._orders.put,
        )
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

    @property
    def load_progress(self) -> int | None:
        """A number that changes as long as a load makes progress; None while there is no load."""
        return self._progress.number if self._stages.is_loading else None

    @property
    def fetch_progress(self) -> FetchProgress | None:
        """How far weights from other machines have arrived for a load; None if it needs none."""
        return self._weights.progress

    def stop(self, timeout_s: float) -> bool:
        """Carry out the queued orders and end the thread; return whether it ended in time.

        Loads that wait for weights of other machines fail.
        """
        deadline = time.monotonic() + timeout_s
        self._weights.stop()
        self._orders.end()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            return False
        return self._stages.join(max(0.0, deadline - time.monotonic()))

    def _main(self) -> None:
        try:
            use_threads(self._capabilities.threads)
            while (item := self._next()) is not None:
                queued_at, order = item
                self._made_progress()
                self._carry_out(order, queued_at)
                if isinstance(order, Run):
                    self.vitals.tasks_done += 1
        except torch.AcceleratorError as exc:
            logger.error("the device failed", exc_info=exc)
            self._post(ComputeThreadFailed(lost(torch.device(self._capabilities.device), exc)))
        except Exception as exc:  # a bug: nobody knows what the stages hold now
            logger.exception("the compute thread cannot go on")
            self._post(ComputeThreadFailed(internal_error(exc)))

    def _next(self) -> tuple[float, Order | BackgroundLoad] | None:
        """Return the next order; free some memory before it, and more while there is no order."""
        while self._stages.free_some():
            with contextlib.suppress(queue.Empty):
                return self._orders.get(block=False)
        return self._orders.get()

    def _carry_out(self, order: Order | BackgroundLoad, queued_at: float) -> None:
        stages = self._stages
        match order:
            case Run():
                self._run(order, _us(time.perf_counter() - queued_at))
            case Release(epoch=epoch, sequence_ids=ids):
                if held := stages.of_epoch(epoch):
                    held.stage.release(ids)
            case Load():
                stages.load(order)
            case BackgroundLoad():
                stages.loaded_beside(order)
            case Serve(epoch=epoch):
                stages.serve(epoch)
            case Unload(epoch=epoch):
                stages.unload(epoch)
            case Drop():
                stages.drop()
            case ExportKV():
                self._answer(order, lambda: stages.exports.next(order, stages.served_stage))
            case ImportKV():
                self._answer(order, lambda: import_kv(order, stages.prepared))
            case AssembleKV():
                self._answer(
                    order, lambda: assemble_kv(order, stages.served_stage, stages.prepared)
                )
            case Probe():
                self._probe(order)
            case _:
                assert_never(order)
        self.vitals.kv_bytes = stages.kv_bytes

    def _answer(self, order: KVOrder, carry_out: Callable[[], KVEvent]) -> None:
        if self._is_void(order):
            return
        try:
            event = carry_out()
        except Exception as exc:
            event = KVOrderFailed(order, reported(exc, "Moving KV cache"))
        self._post(event)

    def _probe(self, order: Probe) -> None:
        if not self._stages.is_loading_beside and not self._is_void(order):
            self._post(remeasure(order, self._capabilities, slowdown=self.slowdown))

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
            self._post(ComputeFailed(run, exc, missing=exc.missing))
            return
        except SequencesFailed as exc:
            logger.error("step %s failed: %s", run.task.step, exc)
            self._post(ComputeFailed(run, exc.cause, sequence_ids=exc.sequence_ids))
            return
        except DistributedLLMError as exc:
            logger.error("step %s failed: %s", run.task.step, exc)
            self._post(ComputeFailed(run, exc))
            return
        except Exception as exc:
            self._post(ComputeFailed(run, reported(exc, "Computing")))
            return
        self._post(Computed(run, specs, frames, took.compute_us, took.layers_us, queued_us))

    def _compute(self, run: Run) -> tuple[TensorsOnWire, StageTime]:
        held = self._stages.of_epoch(run.task.epoch)
        if held is None:
            raise StageError(f"No layers are loaded for plan {run.task.epoch}.")
        stage, dtype = held.stage, held.order.wire_dtype

        def work() -> TensorsOnWire:
            return compute(stage, run.task, run.frames, dtype)

        try:
            return self._timed(stage, work)
        except torch.OutOfMemoryError:
            logger.warning("out of memory on %s; trying once more", self._capabilities.device)
            give_memory_back(torch.device(self._capabilities.device))
            return self._timed(stage, work)

    def _timed(self, stage: Stage, work: Callable[[], _T]) -> tuple[_T, StageTime]:
        """Run a step and slow it down; return its result and the time it took."""
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
