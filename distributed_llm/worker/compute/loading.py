"""From an order to a stage: which weights, how many threads, how much memory for its KV cache."""

import ctypes
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch

from distributed_llm.common.checkpoint import Checkpoint
from distributed_llm.common.errors import CheckpointMismatch, NotEnoughMemory, StageError
from distributed_llm.common.hub import fingerprints, resolve_for_worker
from distributed_llm.common.messages import Capabilities, LoadStage
from distributed_llm.common.types import KV_BLOCK, LayerRange, size_text
from distributed_llm.worker.compute.probe import free_memory_bytes
from distributed_llm.worker.kv.transfer import KVImporter
from distributed_llm.worker.model.stage import Stage
from distributed_llm.worker.session.events import Load
from distributed_llm.worker.tensor_frames import TORCH_DTYPES

_RESERVE_BYTES = 256 * 1024 * 1024
_RESERVE_SHARE = 0.05

_WORTH_THREADS_BYTES = 2 << 20
"""Of the largest matrix of a stage; one thread reads it in about 0.1 ms."""

_SWITCH_INTERVAL_S = sys.getswitchinterval()
_SHORT_SWITCH_INTERVAL_S = 0.0002


@dataclass(frozen=True)
class LoadedStage:
    """A stage, and the order to load it."""

    order: LoadStage
    stage: Stage


@dataclass
class PreparedStage:
    """A stage that was loaded beside the served one.

    Attributes:
        threads: to compute with once it is served.
        importers: for KV cache of other workers, by its layers; none once it was taken over.
        imported_bytes: what they have taken of memory.
    """

    order: LoadStage
    stage: Stage
    threads: int
    importers: dict[LayerRange, KVImporter]
    imported_bytes: int = 0


@dataclass(frozen=True)
class Memory:
    """The memory of a worker.

    Attributes:
        budget_bytes: what the worker may use for weights and KV cache.
        free_bytes: what this process could still take now.
    """

    device: torch.device
    budget_bytes: int
    free_bytes: int

    @property
    def reserve_bytes(self) -> int:
        """What is free and left to others."""
        return max(_RESERVE_BYTES, int(self.free_bytes * _RESERVE_SHARE))


def give_memory_back(device: torch.device) -> None:
    """Give the system the memory that was freed; torch, and GNU's malloc, keep it for later."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        with suppress(AttributeError):  # another C library, which need not be asked
            ctypes.CDLL(None).malloc_trim(0)


def memory_now(device: torch.device, budget_bytes: int) -> Memory:
    """Return the memory as it is now."""
    return Memory(device, budget_bytes, free_memory_bytes(device))


def checked_checkpoint(order: LoadStage, local_model: str) -> Checkpoint:
    """Return the checkpoint on this machine that the order names.

    Raises:
        CheckpointMismatch: its weights are not those of the coordinator.
        CheckpointError: it is not here, or broken.
    """
    checkpoint = resolve_for_worker(order.source, order.layers, local_model=local_model)
    prints = fingerprints(order.source, checkpoint, order.layers)
    if checkpoint.digest(order.layers, prints) != order.digest:
        raise CheckpointMismatch(
            f"The weights of layers {order.layers} in {checkpoint.folder} are not those of the "
            "coordinator: they would give other text. Copy the coordinator's checkpoint to "
            "this machine, or name the right folder with `dllm worker --model`."
        )
    return checkpoint


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


def limit_kv(stage: Stage, order: LoadStage, room: Memory, leaving_bytes: int = 0) -> int:
    """Give the KV cache what is wanted, or what there is; return how many positions that is.

    Args:
        leaving_bytes: what will be free besides once the stage is alone.

    Raises:
        NotEnoughMemory: there is no room for one block.
    """
    own_bytes = room.budget_bytes - stage.weight_bytes
    room_bytes = min(own_bytes, room.free_bytes + leaving_bytes - room.reserve_bytes)
    block_bytes = KV_BLOCK * stage.kv_bytes_per_token
    blocks = min(-(-order.kv_tokens // KV_BLOCK), room_bytes // block_bytes)
    if blocks < 1:
        raise NotEnoughMemory(
            f"No room for a KV cache beside layers {order.layers}. They take "
            f"{size_text(stage.weight_bytes)} of {size_text(room.budget_bytes)} that this worker "
            f"may use; {size_text(room.free_bytes)} are free on {room.device}, of which "
            f"{size_text(room.reserve_bytes)} are left to others; {KV_BLOCK} positions take "
            f"{size_text(block_bytes)}. Give this worker fewer layers, raise its max_memory, "
            "or end other programs there."
        )
    stage.limit_kv(blocks * block_bytes)
    return min(order.kv_tokens, blocks * KV_BLOCK)


def _room_beside(
    order: LoadStage, served: LoadedStage, added_bytes: int, room: Memory, *, loaded: bool
) -> int:
    """Return the bytes that are left while the served stage and the new one are there together.

    Args:
        added_bytes: weights of the new one that the served one does not hold.
        loaded: whether they are in memory, and so not in what is free.

    Raises:
        NotEnoughMemory: they do not fit.
    """
    held_bytes = served.stage.weight_bytes + served.stage.kv_bytes
    in_budget = room.budget_bytes - held_bytes - added_bytes
    in_free = room.free_bytes - room.reserve_bytes - (0 if loaded else added_bytes)
    if min(in_budget, in_free) < 0:
        taken = "were added" if loaded else "would be added"
        raise NotEnoughMemory(
            f"No room for layers {order.layers} beside layers {served.order.layers}, which go on "
            f"being served meanwhile. Those take {size_text(held_bytes)} with their KV cache, and "
            f"{size_text(added_bytes)} {taken}, of {size_text(room.budget_bytes)} that this worker "
            f"may use; {size_text(room.free_bytes)} are free on {room.device}, of which "
            f"{size_text(room.reserve_bytes)} are left to others. Move fewer layers at once, raise "
            "its max_memory, or end other programs there."
        )
    return min(in_budget, in_free)


def admit_beside(
    order: LoadStage, stage: Stage, served: LoadedStage | None, room: Memory
) -> tuple[int, int]:
    """Give the KV cache of a stage what it may take once it is alone.

    Returns:
        How many positions that is, and the bytes that are left for KV cache that arrives before.

    Raises:
        NotEnoughMemory: there is too little for that, or for both stages together.
    """
    if served is None:
        held_bytes = stage.weight_bytes
        left_bytes = min(room.budget_bytes - held_bytes, room.free_bytes - room.reserve_bytes)
        return limit_kv(stage, order, room), left_bytes
    shared_bytes = stage.shared_weight_bytes
    left_bytes = _room_beside(order, served, stage.weight_bytes - shared_bytes, room, loaded=True)
    leaving_bytes = served.stage.weight_bytes - shared_bytes + served.stage.kv_bytes
    return limit_kv(stage, order, room, leaving_bytes), left_bytes


def same_layers(served: LoadStage, order: LoadStage) -> bool:
    """Return whether the order names the weights that are served."""
    return (served.layers, served.dtype, served.digest) == (order.layers, order.dtype, order.digest)


def load_beside(
    order: LoadStage, served: LoadedStage | None, capabilities: Capabilities, local_model: str
) -> tuple[Stage, int]:
    """Return a stage that shares what it can with the served one, and the threads it is worth.

    Raises:
        NotEnoughMemory: there is no room for its weights beside the served stage.
        StageError: it is of another model.
        CheckpointError: see `checked_checkpoint`.
    """
    checkpoint = checked_checkpoint(order, local_model)
    device = torch.device(capabilities.device)
    if served:
        _ensure_same_model(served.order, order)
        missing = _missing_bytes(checkpoint, order, served.order.layers)
        room = memory_now(device, capabilities.memory_bytes)
        _room_beside(order, served, missing, room, loaded=False)
    stage = Stage.load(
        checkpoint,
        order.layers,
        device=device,
        dtype=TORCH_DTYPES[order.dtype],
        donor=served.stage if served else None,
    )
    return stage, num_threads(checkpoint, order, capabilities.threads)


def _ensure_same_model(served: LoadStage, order: LoadStage) -> None:
    """Refuse layers that cannot share weights with those that are served.

    Both were compared with the coordinator's, so where the source is the same, the weights are.

    Raises:
        StageError: they are of another model.
    """
    if (served.source, served.dtype) != (order.source, order.dtype):
        raise StageError(
            f"Layers of {order.source.name or order.source.kind!r} in {order.dtype} cannot be "
            f"loaded beside layers of {served.source.name or served.source.kind!r} in "
            f"{served.dtype}. Load them alone."
        )


def _missing_bytes(checkpoint: Checkpoint, order: LoadStage, served: LayerRange) -> int:
    """Return about how many bytes of weights a stage needs that another one does not hold."""
    held = {tensor.name for tensor in checkpoint.tensors_of(served)}
    return sum(
        checkpoint.bytes_in_memory(tensor, order.dtype)
        for tensor in checkpoint.tensors_of(order.layers)
        if tensor.name not in held
    )


def importers_for(order: LoadStage, stage: Stage, max_bytes: int) -> dict[LayerRange, KVImporter]:
    """Return what collects KV cache for a stage, by its layers; together at most so many bytes.

    Raises:
        StageError: layers are announced that the stage does not have.
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
    """Makes a stage in a thread of its own, which computes with one thread and then ends.

    Args:
        load: what is carried out.
        make: returns the stage; called in that thread.
        ended: called in that thread at its end.

    Attributes:
        seconds: that it took, once it has ended.
    """

    def __init__(
        self,
        load: Load,
        make: Callable[[], tuple[Stage, int]],
        ended: Callable[["BackgroundLoad"], None],
    ) -> None:
        self.load = load
        self.seconds = 0.0
        self._make = make
        self._ended = ended
        self._made: tuple[Stage, int] | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._main, name="load", daemon=True)
        self._thread.start()

    def take(self) -> tuple[Stage, int]:
        """Return, once, the stage and the threads that it is worth; waits for the end.

        Raises:
            Exception: what `make` raised.
        """
        self._thread.join()
        made, self._made = self._made, None
        if self._error is not None:
            raise self._error
        assert made is not None
        return made

    def discard(self) -> Stage | None:
        """Give up what was made, if anything, and return it; waits for the end."""
        self._thread.join()
        made, self._made = self._made, None
        return made[0] if made else None

    def join(self, timeout_s: float) -> bool:
        """Return whether it has ended, after so long at most."""
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
    """Let this thread compute with so many.

    A thread that has not asked torch how many it has gets, at its first product, what any thread
    said last.
    """
    torch.set_num_threads(count)
    torch.get_num_threads()


@contextmanager
def _in_background() -> Iterator[None]:
    """Let this thread, and those that it starts, compute without helpers and wait for others.

    Each operation of torch gives the interpreter to other threads and asks for it again. One that
    runs Python all the time, as loading does at first, hands it back only after an interval.
    """
    threads = torch.get_num_threads()
    use_threads(1)
    sys.setswitchinterval(_SHORT_SWITCH_INTERVAL_S)
    try:
        yield
    finally:
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        torch.set_num_threads(threads)  # for threads that begin later
