"""Loads stages as ordered: the right weights, threads, and memory for weights and KV cache."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from distributed_llm.common.checkpoint import Checkpoint
from distributed_llm.common.errors import NotEnoughMemory, StageError
from distributed_llm.common.messages import Capabilities, LoadStage
from distributed_llm.common.offloading import Away, away
from distributed_llm.common.types import KV_BLOCK, LayerRange
from distributed_llm.common.wording import layers_text, size_text
from distributed_llm.worker.compute.finding import Weights
from distributed_llm.worker.compute.probe import free_memory_bytes
from distributed_llm.worker.kv.held_transfer import HeldImporter
from distributed_llm.worker.model.stage import Stage
from distributed_llm.worker.session.events import Load
from distributed_llm.worker.tensor_frames import TORCH_DTYPES

_RESERVE_BYTES = 256 * 1024 * 1024
"""Free memory that is left to other programs at least, bytes."""

_RESERVE_SHARE = 0.05
"""Share of the free memory that is left to other programs at least."""

_MIN_PARALLEL_BYTES = 2 << 20
"""Size of a stage's largest matrix from which on all threads compute, bytes."""

_SWITCH_INTERVAL_S = sys.getswitchinterval()
"""Python's own switch interval, seconds."""

_LOADING_SWITCH_INTERVAL_S = 0.0002
"""Switch interval while a stage is loaded in the background, seconds."""


@dataclass(frozen=True)
class LoadedStage:
    """A stage in memory, with the order that it was loaded for."""

    order: LoadStage
    stage: Stage


@dataclass(frozen=True)
class NewStage:
    """A stage that was just loaded.

    Attributes:
        threads: to compute with.
        weights: that it was loaded from; None if it was in memory already.
    """

    stage: Stage
    threads: int
    weights: Weights | None = None


@dataclass
class PreparedStage:
    """A stage that was loaded beside the served one, for a move.

    Attributes:
        order: as in `LoadedStage`.
        stage: as in `LoadedStage`.
        threads: to compute with once the stage is served.
        importers: of KV cache from other workers, by layers; empty once it is assembled.
        imported_bytes: memory that the importers take.
    """

    order: LoadStage
    stage: Stage
    threads: int
    importers: dict[LayerRange, HeldImporter]
    imported_bytes: int = 0


@dataclass(frozen=True)
class Memory:
    """The memory of a worker at one moment.

    Attributes:
        device: that has the memory.
        budget_bytes: that the worker may use for weights and KV cache in total.
        free_bytes: that this process could still allocate for them.
    """

    device: torch.device
    budget_bytes: int
    free_bytes: int

    @property
    def reserve_bytes(self) -> int:
        """Bytes of the free memory that are left to other programs."""
        return max(_RESERVE_BYTES, int(self.free_bytes * _RESERVE_SHARE))


def memory_now(device: torch.device, budget_bytes: int, order: LoadStage) -> Memory:
    """Return the memory as it is at this moment, without what steps of a stage will take.

    Args:
        device: that has the memory.
        budget_bytes: that the worker may use in total.
        order: for the stage.
    """
    taken = order.workspace_bytes
    return Memory(device, max(0, budget_bytes - taken), max(0, free_memory_bytes(device) - taken))


def num_threads(checkpoint: Checkpoint, order: LoadStage, available: int) -> int:
    """Return how many threads to compute with: one for layers with small matrices, else all.

    Threads wait for each other after every product. One thread reads a matrix of 2 MiB in about
    0.1 ms; more threads gain little there, and lose much on a machine that is busy with other work.
    """
    sizes = (
        checkpoint.weight_bytes(weight, order.dtype, order.quantize)
        for weight in checkpoint.weights_of(order.layers)
        if not checkpoint.outer.is_embedding(weight.name)
    )
    return available if max(sizes, default=0) >= _MIN_PARALLEL_BYTES else 1


def ensure_ram(checkpoint: Checkpoint, order: LoadStage, held: LayerRange | None = None) -> None:
    """Refuse an order for which the machine has too little memory beside its GPU.

    Args:
        checkpoint: of the layers.
        order: perhaps with layers that stay in the machine's memory.
        held: layers that need not be loaded.

    Raises:
        NotEnoughMemory: it is taken meanwhile.
    """
    start, stop = (held.start, held.stop) if held else (0, 0)
    gone = {layer for layer in _away(order).in_ram if not start <= layer < stop}
    if not gone:
        return
    needed = sum(
        checkpoint.weight_bytes(weight, order.dtype, order.quantize)
        for weight in checkpoint.weights_of(order.layers)
        if checkpoint.layer_of(weight.name) in gone
    )
    memory = Memory(torch.device("cpu"), 0, free_memory_bytes(torch.device("cpu")))
    if needed > memory.free_bytes - memory.reserve_bytes:
        raise NotEnoughMemory(
            f"{size_text(needed)} of {layers_text(order.layers)} are to stay in this machine's "
            f"memory beside its GPU, but {size_text(memory.free_bytes)} are free there, of which "
            f"{size_text(memory.reserve_bytes)} are left to others. End other programs there, or "
            "give this worker a smaller --offload."
        )


def limit_kv(stage: Stage, order: LoadStage, memory: Memory, leaving_bytes: int = 0) -> int:
    """Limit a stage's KV cache to what is ordered, or to what fits; return its positions.

    Args:
        stage: loaded.
        order: wants `kv_tokens` positions.
        memory: while `stage` is loaded.
        leaving_bytes: memory that another stage will free before this one is served.

    Raises:
        NotEnoughMemory: not even one block fits.
    """
    own_bytes = memory.budget_bytes - stage.weight_bytes
    kv_bytes = min(own_bytes, memory.free_bytes + leaving_bytes - memory.reserve_bytes)
    block_bytes = KV_BLOCK * max(1, stage.kv_bytes_per_token)  # or positions are told in bytes
    blocks = min(-(-order.kv_tokens // KV_BLOCK), kv_bytes // block_bytes)
    if blocks < 1:
        raise NotEnoughMemory(
            f"No room for a KV cache beside {layers_text(order.layers)}. They take "
            f"{size_text(stage.weight_bytes)} of {size_text(memory.budget_bytes)} that this worker "
            f"has for both; {size_text(memory.free_bytes)} are free on {memory.device}, of which "
            f"{size_text(memory.reserve_bytes)} are left to others; {KV_BLOCK} tokens of context "
            f"take {size_text(block_bytes)}. Give this worker fewer layers, raise its max_memory, "
            "or end other programs there."
        )
    stage.limit_kv(blocks * block_bytes)
    return min(order.kv_tokens, blocks * KV_BLOCK)


def _bytes_left_beside(
    order: LoadStage, served: LoadedStage, added_bytes: int, memory: Memory, *, loaded: bool
) -> int:
    """Return the bytes that are left while the served stage and the new one are both in memory.

    Args:
        order: for the new stage.
        served: with its KV cache.
        added_bytes: weights of the new stage that it does not share with the served one.
        memory: of the worker.
        loaded: the new stage is in memory already, so that `memory` says what is left beside it.

    Raises:
        NotEnoughMemory: both together do not fit.
    """
    held_bytes = served.stage.weight_bytes + served.stage.kv_bytes
    in_budget = memory.budget_bytes - held_bytes - added_bytes
    in_free = memory.free_bytes - memory.reserve_bytes - (0 if loaded else added_bytes)
    if min(in_budget, in_free) < 0:
        taken = "were added" if loaded else "would be added"
        raise NotEnoughMemory(
            f"No room for {layers_text(order.layers)} beside {layers_text(served.order.layers)}, "
            f"which are served meanwhile. Those take {size_text(held_bytes)} with their KV cache, "
            f"and {size_text(added_bytes)} {taken}, of {size_text(memory.budget_bytes)} that this "
            f"worker may use; {size_text(memory.free_bytes)} are free on {memory.device}, of which "
            f"{size_text(memory.reserve_bytes)} are left to others. Move fewer layers at once, "
            "raise its max_memory, or end other programs there."
        )
    return min(in_budget, in_free)


def admit_beside(
    order: LoadStage, stage: Stage, served: LoadedStage | None, memory: Memory
) -> tuple[int, int]:
    """Limit the KV cache of a stage that was loaded beside the served one.

    Returns:
        Positions that the KV cache has room for once the stage is served, and bytes that are left
        until then for KV cache from other workers.

    Raises:
        NotEnoughMemory: there is too little for either, or for both stages together.
    """
    if served is None:
        held_bytes = stage.weight_bytes
        left_bytes = min(memory.budget_bytes - held_bytes, memory.free_bytes - memory.reserve_bytes)
        return limit_kv(stage, order, memory), left_bytes
    shared_bytes = stage.shared_weight_bytes
    left_bytes = _bytes_left_beside(
        order, served, stage.weight_bytes - shared_bytes, memory, loaded=True
    )
    leaving_bytes = served.stage.weight_bytes - shared_bytes + served.stage.kv_bytes
    return limit_kv(stage, order, memory, leaving_bytes), left_bytes


def same_layers(served: LoadStage, order: LoadStage) -> bool:
    """Return whether both orders name the same layers with the same weights in the same form."""
    return (served.layers, served.digest, _away(served), _form(served)) == (
        order.layers,
        order.digest,
        _away(order),
        _form(order),
    )


def _away(order: LoadStage) -> Away:
    return away(order.layers, order.from_ram, order.from_disk)


def _form(order: LoadStage) -> tuple[str, str, str, int]:
    return order.dtype, order.quantize, order.kv_dtype, order.context_length


def load_beside(
    order: LoadStage,
    served: LoadedStage | None,
    capabilities: Capabilities,
    weights: Weights,
    on_read: Callable[[int], None],
) -> NewStage:
    """Load a stage beside the served one, with which it shares layers that both have.

    Args:
        order: for the stage.
        served: the stage beside it.
        capabilities: of this machine.
        weights: for the order.
        on_read: see `Stage.load`.

    Raises:
        NotEnoughMemory: its weights do not fit beside the served stage.
        StageError: it belongs to another model.
        CheckpointError: see `Stage.load`.
    """
    checkpoint = weights.checkpoint
    device = torch.device(capabilities.device)
    if served:
        _ensure_same_model(served.order, order)
        missing = _missing_bytes(checkpoint, order, served.order.layers)
        memory = memory_now(device, capabilities.memory_bytes, order)
        _bytes_left_beside(order, served, missing, memory, loaded=False)
    ensure_ram(checkpoint, order, served.order.layers if served else None)
    stage = Stage.load(
        checkpoint.limited_to(order.context_length),
        order.layers,
        device=device,
        dtype=TORCH_DTYPES[order.dtype],
        quantize=order.quantize,
        kv_dtype=order.kv_dtype,
        donor=served.stage if served else None,
        locate=weights.locate,
        on_read=on_read,
        from_disk=order.from_disk,
        from_ram=order.from_ram,
    )
    return NewStage(stage, num_threads(checkpoint, order, capabilities.threads), weights)


def _ensure_same_model(served: LoadStage, order: LoadStage) -> None:
    """Refuse layers that cannot share weights with the served ones.

    The digests of both were compared with the coordinator's, so the same source means the same
    weights.

    Raises:
        StageError: they belong to another model.
    """
    if (served.source, *_form(served)) != (order.source, *_form(order)):
        raise StageError(
            f"Layers of {_what(order)} cannot be loaded beside layers of {_what(served)}. Load "
            "them alone."
        )


def _what(order: LoadStage) -> str:
    quantized = "" if order.quantize == "none" else f", quantized to {order.quantize}"
    kept = "" if order.kv_dtype == "auto" else f", with KV cache in {order.kv_dtype}"
    return f"{order.source.name or order.source.kind!r} in {order.dtype}{quantized}{kept}"


def _missing_bytes(checkpoint: Checkpoint, order: LoadStage, served: LayerRange) -> int:
    """Return an estimate of the weight bytes that a stage cannot share with the served layers."""
    held = {weight.name for weight in checkpoint.weights_of(served)}
    missing = 0
    for weight in checkpoint.weights_of(order.layers):
        is_cut = checkpoint.outer.is_cut(weight.name)
        if weight.name in held and not (is_cut and served != order.layers):
            continue
        size = checkpoint.weight_bytes(weight, order.dtype, order.quantize)
        missing += size * len(order.layers) // checkpoint.num_layers if is_cut else size
    return missing


def importers_for(order: LoadStage, stage: Stage, max_bytes: int) -> dict[LayerRange, HeldImporter]:
    """Return the importers for the KV cache that an order announces, by layers.

    Args:
        order: with `imports`.
        stage: that the KV cache is for.
        max_bytes: of memory for all importers together, divided in proportion to their layers.

    Raises:
        StageError: the stage lacks some of the announced layers.
    """
    total = sum(len(layers) for layers in order.imports)
    try:
        return {
            layers: stage.import_kv(layers, max_bytes * len(layers) // total)
            for layers in order.imports
        }
    except ValueError as exc:
        raise StageError(f"KV cache is announced for other layers: {exc}.") from exc


class BackgroundLoad:
    """Loads a stage in a thread of its own, which starts at once and computes single-threaded.

    Args:
        load: the order that is carried out.
        make: loads the stage; called in the thread.
        ended: called in the thread when it is about to end.

    Attributes:
        load: as given.
        seconds: time that loading took; 0 until it has ended.
    """

    def __init__(
        self,
        load: Load,
        make: Callable[[], NewStage],
        ended: Callable[["BackgroundLoad"], None],
    ) -> None:
        self.load = load
        self.seconds = 0.0
        self._make = make
        self._ended = ended
        self._made: NewStage | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._main, name="load", daemon=True)
        self._thread.start()

    def take(self) -> NewStage:
        """Wait for the thread and return the result of `make`, which is handed out only once.

        Raises:
            Exception: whatever `make` raised.
        """
        self._thread.join()
        made, self._made = self._made, None
        if self._error is not None:
            raise self._error
        assert made is not None
        return made

    def discard(self) -> Stage | None:
        """Wait for the thread and return the unwanted stage, so that it can be freed, if any."""
        self._thread.join()
        made, self._made = self._made, None
        return made.stage if made else None

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread for at most `timeout_s`; return whether it has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _main(self) -> None:
        started = time.perf_counter()
        try:
            with _in_background():
                self._made = self._make()
        except Exception as exc:
            self._error = exc
        finally:
            self.seconds = time.perf_counter() - started
            self._ended(self)


def use_threads(count: int) -> None:
    """Have the calling thread compute with `count` threads.

    Asking torch for the number makes it stick: otherwise a thread adopts, at its first product, the
    number that any thread has set last.
    """
    torch.set_num_threads(count)
    torch.get_num_threads()


@contextmanager
def _in_background() -> Iterator[None]:
    """Compute single-threaded, and yield the interpreter to other threads quickly.

    The compute thread releases the interpreter lock in each operation of torch and then has to wait
    for it. A thread that runs Python code, as loading does at first, gives the lock back only after
    the switch interval.
    """
    threads = torch.get_num_threads()
    use_threads(1)
    sys.setswitchinterval(_LOADING_SWITCH_INTERVAL_S)
    try:
        yield
    finally:
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        torch.set_num_threads(threads)  # for threads that start later
