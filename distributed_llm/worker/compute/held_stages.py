"""Loads, serves and frees the stages that the compute thread holds in memory.

These are the served stage and, while layers move, a prepared one beside it. A stage that takes the
place of all others is loaded in the compute thread, one beside the served stage in a thread of its
own (`BackgroundLoad`). The memory of stages that are no longer needed is freed tensor by tensor.
"""

import gc
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from distributed_llm.common.errors import CheckpointError
from distributed_llm.common.messages import Capabilities, LoadStage, StageTime, StageTrial
from distributed_llm.common.types import Epoch
from distributed_llm.common.wording import layers_text
from distributed_llm.worker.compute.failures import reported
from distributed_llm.worker.compute.finding import WeightFinder, Weights
from distributed_llm.worker.compute.kv_orders import KVExports
from distributed_llm.worker.compute.load_progress import LoadProgress
from distributed_llm.worker.compute.loading import (
    BackgroundLoad,
    LoadedStage,
    Memory,
    NewStage,
    PreparedStage,
    admit_beside,
    ensure_ram,
    importers_for,
    limit_kv,
    load_beside,
    memory_now,
    num_threads,
    same_layers,
    use_threads,
)
from distributed_llm.worker.compute.trials import try_out
from distributed_llm.worker.devices import give_memory_back
from distributed_llm.worker.model.kernels.gpu_check import used_text
from distributed_llm.worker.model.stage import Stage
from distributed_llm.worker.session.events import Event, Load, Loaded, LoadFailed
from distributed_llm.worker.tensor_frames import TORCH_DTYPES

logger = logging.getLogger(__name__)

StageTimer = Callable[[Stage, Callable[[], object]], StageTime]
"""Runs a step of a stage as a task is run, and returns the time it took."""


class HeldStages:
    """The stages in memory; only the compute thread may use them, except for `join`.

    Args:
        capabilities: of this machine: device, threads and memory to use.
        weights: finds the weights that orders name.
        is_void: whether the result of an order to load is no longer wanted.
        post: called with `Loaded` or `LoadFailed`.
        timer: runs and times trial steps.
        after_layer: called after each layer that any of the stages computes.
        progress: of the loads.
        load_ended: called with each load in the background when it has ended, in its own thread;
            has the compute thread call `loaded_beside`.

    Attributes:
        served: the stage that serves, or None.
        prepared: the stage that was loaded beside it, or None.
        exports: the KV cache transfers from the served stage.
    """

    def __init__(
        self,
        capabilities: Capabilities,
        *,
        weights: WeightFinder,
        is_void: Callable[[Load], bool],
        post: Callable[[Event], None],
        timer: StageTimer,
        after_layer: Callable[[], None],
        progress: LoadProgress,
        load_ended: Callable[[BackgroundLoad], None],
    ) -> None:
        self.served: LoadedStage | None = None
        self.prepared: PreparedStage | None = None
        self.exports = KVExports()
        self._capabilities = capabilities
        self._device = torch.device(capabilities.device)
        self._weights = weights
        self._is_void = is_void
        self._post = post
        self._timer = timer
        self._after_layer = after_layer
        self._progress = progress
        self._load_ended = load_ended
        self._loads_now = False
        self._to_free: list[object] = []  # memory of stages that were given up
        self._next_load: Load | None = None  # beside; the thread for it may be busy
        self._background: BackgroundLoad | None = None

    @property
    def served_stage(self) -> Stage | None:
        """The stage that serves, or None."""
        return self.served.stage if self.served else None

    @property
    def kv_bytes(self) -> int:
        """Bytes of memory that the KV cache of the served stage and all imports take."""
        held_bytes = self.served.stage.kv_bytes if self.served else 0
        return held_bytes + (self.prepared.imported_bytes if self.prepared else 0)

    @property
    def is_loading_beside(self) -> bool:
        """Whether a load in the background, even a void one, has not been dealt with yet."""
        return self._background is not None

    @property
    def is_loading(self) -> bool:
        """Whether a load is under way, even a void one; may be asked in any thread."""
        return self._loads_now or self._background is not None

    def of_epoch(self, epoch: Epoch) -> LoadedStage | PreparedStage | None:
        """Return the stage of an epoch, or None."""
        for held in (self.served, self.prepared):
            if held is not None and held.order.epoch == epoch:
                return held
        return None

    def serve(self, epoch: Epoch) -> None:
        """Serve the prepared stage, which has to be of `epoch`, in the place of the served one."""
        prepared = self.prepared
        if prepared is None or prepared.order.epoch != epoch:
            logger.error("plan %s cannot be served: its layers are not loaded", epoch)
            return
        self.exports.clear()
        self._free_gradually(self.served)
        self.served, self.prepared = LoadedStage(prepared.order, prepared.stage), None
        use_threads(prepared.threads)

    def unload(self, epoch: Epoch) -> None:
        """Give up the prepared stage of `epoch`, its load, and the transfers to it."""
        self.exports.end(epoch)
        if self._next_load and self._next_load.order.epoch == epoch:
            self._next_load = None
        if self.prepared and self.prepared.order.epoch == epoch:
            self._unload_prepared()

    def drop(self) -> None:
        """Give up all stages, and free their memory at once."""
        self._next_load = None
        self.exports.clear()
        if self.served is None and self.prepared is None and not self._to_free:
            return
        self.served = self.prepared = None
        gc.collect()  # modules of some models may refer to each other
        self._free_all()

    def free_some(self) -> bool:
        """Free one piece of the stages that were given up; return False if there is none left."""
        if not self._to_free:
            return False
        self._to_free.pop()
        if not self._to_free:
            give_memory_back(self._device)
        return True

    def join(self, timeout_s: float) -> bool:
        """Wait for a load in the background; return whether it has ended in time."""
        background = self._background
        return background is None or background.join(timeout_s)

    def _unload_prepared(self) -> None:
        self._free_gradually(self.prepared)
        self.prepared = None

    def _free_gradually(self, held: LoadedStage | PreparedStage | None) -> None:
        """Free the memory of a stage tensor by tensor, while the other stage goes on."""
        if held is not None:
            self._to_free += held.stage.memory()

    def _free_all(self) -> None:
        self._to_free.clear()
        give_memory_back(self._device)

    # -------------------------------------------------------------- loading

    def load(self, load: Load) -> None:
        """Load a stage, or begin to, unless the order is void; post how that ends."""
        if self._is_void(load):
            return
        with self._loading():
            self._begin(load)

    @contextmanager
    def _loading(self) -> Iterator[None]:
        """Note that the compute thread loads, or tries new layers out."""
        self._loads_now = True
        try:
            yield
        finally:
            self._loads_now = False

    def _layer_done(self) -> None:
        self._after_layer()
        if self._loads_now:
            self._progress.add(1)

    def _begin(self, load: Load) -> None:
        self.exports.clear()
        self._unload_prepared()
        if load.order.beside is None:
            self._next_load = None
            self._load_alone(load)
        else:
            self._next_load = load
            self._load_in_background()

    def _load_alone(self, load: Load) -> None:
        if self._background:
            self._background.discard()
        self._free_all()
        started = time.perf_counter()
        try:
            new = self._stage_alone(load)
            kv_tokens = limit_kv(new.stage, load.order, self._memory(load.order))
        except Exception as exc:
            self.drop()
            self._post_load_failed(load, exc)
            return
        self.served = LoadedStage(load.order, new.stage)
        self._post_loaded(load, new, time.perf_counter() - started, kv_tokens)

    def _stage_alone(self, load: Load) -> NewStage:
        """Return the served stage with an empty KV cache if it fits the order, else a new one."""
        held = self.served
        if held is not None and same_layers(held.order, load.order):
            held.stage.reset()
            held.stage.give_kv_back()
            give_memory_back(self._device)
            return NewStage(held.stage, torch.get_num_threads())
        del held
        self.drop()
        return self._load_stage(load)

    def _load_stage(self, load: Load) -> NewStage:
        order = load.order
        with self._weights_for(load) as weights:
            threads = num_threads(weights.checkpoint, order, self._capabilities.threads)
            use_threads(threads)
            ensure_ram(weights.checkpoint, order)
            stage = Stage.load(
                weights.checkpoint.limited_to(order.context_length),
                order.layers,
                device=self._device,
                dtype=TORCH_DTYPES[order.dtype],
                quantize=order.quantize,
                kv_dtype=order.kv_dtype,
                locate=weights.locate,
                on_read=self._progress.add,
                from_disk=order.from_disk,
                from_ram=order.from_ram,
            )
        stage.progress = self._layer_done
        return NewStage(stage, threads, weights)

    def _weights_for(self, load: Load) -> AbstractContextManager[Weights]:
        return self._weights.weights(
            load.order, lambda: not self._is_void(load), self._progress.add
        )

    def _load_in_background(self) -> None:
        """Start the next load beside, unless an older one, even a void one, has not ended."""
        load, served = self._next_load, self.served
        if load is None or self._background is not None:
            return
        self._free_all()
        self._background = BackgroundLoad(
            load,
            lambda: self._load_beside(load, served),
            self._load_ended,
        )

    def _load_beside(self, load: Load, served: LoadedStage | None) -> NewStage:
        """Return a new stage; runs in the background thread."""
        with self._weights_for(load) as weights:
            new = load_beside(load.order, served, self._capabilities, weights, self._progress.add)
        new.stage.progress = self._layer_done
        return new

    def loaded_beside(self, done: BackgroundLoad) -> None:
        """Prepare the stage of a load in the background that has ended, or free it if it is void.

        Begins the next load in the background, if one was ordered meanwhile.
        """
        self._background = None
        load = done.load
        if load is self._next_load and not self._is_void(load):
            with self._loading():
                self._prepare(load, done)
        elif stage := done.discard():
            self._free_gradually(LoadedStage(load.order, stage))
        if load is self._next_load:
            self._next_load = None
        self._load_in_background()

    def _prepare(self, load: Load, done: BackgroundLoad) -> None:
        """Prepare a stage that was loaded, if the memory is enough for its KV cache too."""
        order = load.order
        try:
            new = done.take()
        except Exception as exc:
            self._post_load_failed(load, exc)
            return
        stage = new.stage
        try:
            kv_tokens, import_bytes = admit_beside(order, stage, self.served, self._memory(order))
            importers = importers_for(order, stage, import_bytes)
        except Exception as exc:
            self._free_gradually(LoadedStage(order, stage))
            self._post_load_failed(load, exc)
            return
        self.prepared = PreparedStage(order, stage, new.threads, importers)
        if self.served is None:
            use_threads(new.threads)
        self._post_loaded(load, new, done.seconds, kv_tokens)

    def _memory(self, order: LoadStage) -> Memory:
        return memory_now(self._device, self._capabilities.memory_bytes, order)

    def _post_loaded(self, load: Load, new: NewStage, load_s: float, kv_tokens: int) -> None:
        stage, weights = new.stage, new.weights
        try:
            trials = self._trials(load.order, stage, kv_tokens)
        except CheckpointError as exc:
            del new, stage
            self.drop()
            self._post_load_failed(load, exc)
            return
        loaded = Loaded(
            load.session,
            load.order.epoch,
            load_s,
            stage.weight_bytes,
            kv_tokens,
            trials,
            kv_token_bytes=stage.kv_bytes_per_token,
            kv_windowed_bytes=stage.kv_windowed_bytes_per_token,
            kv_window=stage.window,
            fetched_bytes=weights.fetched_bytes if weights else 0,
            fetch_s=weights.waited_s if weights else 0.0,
            gives_weights=weights is not None and weights.fetch is not None,
            kernels=used_text(),
        )
        self._post(loaded)

    def _post_load_failed(self, load: Load, exc: Exception) -> None:
        error = reported(exc, f"Loading {layers_text(load.order.layers)}")
        self._post(LoadFailed(load.session, load.order.epoch, error))

    def _trials(self, order: LoadStage, stage: Stage, kv_tokens: int) -> tuple[StageTrial, ...]:
        """Return times of trial steps; none if they are not ordered, or another stage is served.

        Raises:
            CheckpointError: weights are not finite.
        """
        if not order.trials or (self.served and self.served.stage is not stage):
            return ()
        try:
            return try_out(
                stage,
                lambda step: self._timer(stage, step),
                kv_tokens=kv_tokens,
                context_length=order.context_length,
            )
        except torch.AcceleratorError:
            raise
        except Exception as exc:
            stage.check_finite_weights()
            logger.warning("the trial steps of layers %s failed: %s", order.layers, exc)
            return ()
        finally:
            give_memory_back(self._device)
