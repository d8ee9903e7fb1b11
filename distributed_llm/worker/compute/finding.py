"""Finds the weights that an order names: on this machine, else on others, else on the hub."""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from distributed_llm.common.checkpoint import Checkpoint, checkpoint_of
from distributed_llm.common.errors import CheckpointError, CheckpointMismatch, FetchFailed
from distributed_llm.common.hub import download_file
from distributed_llm.common.messages import (
    FetchProgress,
    LoadStage,
    ModelDescription,
    ModelSource,
)
from distributed_llm.common.model_files import TensorInfo
from distributed_llm.common.model_names import checkpoint_here, fingerprints
from distributed_llm.common.wording import layers_text
from distributed_llm.weights.fetch import Fetch
from distributed_llm.weights.giving.shelf import Place, places_in_file
from distributed_llm.worker.model.tensor_files import Locate

logger = logging.getLogger(__name__)

StartFetch = Callable[[LoadStage, Callable[[], bool], Callable[[int], None]], Fetch]
"""Starts to fetch what an order names; args: the order, whether it is still wanted (may be called
in any thread), and what to call with the bytes that came."""


class _Waiting:
    """Measures time in which at least one thread waits.

    Attributes:
        seconds: that it was so far, until none waits.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._threads = 0
        self._since = 0.0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            if not self._threads:
                self._since = time.monotonic()
            self._threads += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._threads -= 1
            if not self._threads:
                self.seconds += time.monotonic() - self._since


@dataclass
class Weights:
    """The weights for one order.

    Attributes:
        checkpoint: that they belong to.
        locate: returns where a tensor is, once it is there; None: in the checkpoint's folder.
        fetch: that brings them; None if they were here.
        waiting: for them.
    """

    checkpoint: Checkpoint
    locate: Locate | None = None
    fetch: Fetch | None = None
    waiting: _Waiting = field(default_factory=_Waiting)

    @property
    def waited_s(self) -> float:
        """Time for which threads have waited for weights so far, seconds."""
        return self.waiting.seconds

    @property
    def fetched_bytes(self) -> int:
        """Bytes that came from other machines."""
        return self.fetch.fetched_bytes if self.fetch else 0


class WeightFinder:
    """Finds weights; used by the threads that load, one load at a time.

    Args:
        local_model: folder of the model on this machine; empty looks where the coordinator says.
        start_fetch: see there.
    """

    def __init__(self, local_model: str, start_fetch: StartFetch) -> None:
        self._local_model = local_model
        self._start_fetch = start_fetch
        self._fetch: Fetch | None = None
        self._stopped = False

    def stop(self) -> None:
        """Fetch nothing any more; who waits for weights gets an error. May be called anywhere."""
        self._stopped = True
        if fetch := self._fetch:
            fetch.close()

    @property
    def progress(self) -> FetchProgress | None:
        """How far weights from other machines have arrived; None if none are fetched now."""
        fetch = self._fetch
        return fetch.progress if fetch else None

    @contextmanager
    def weights(
        self, order: LoadStage, is_wanted: Callable[[], bool], on_bytes: Callable[[int], None]
    ) -> Iterator[Weights]:
        """Find the weights for an order; those from other machines arrive until the context ends.

        Args:
            is_wanted: may be called in any thread; once it is false, fetching ends.
            on_bytes: called with bytes that came, in any thread.

        Raises:
            CheckpointMismatch: the folder that this worker was started with has other weights.
            CheckpointUnavailable: they cannot be read or fetched just now.
            CheckpointError: they are missing or damaged, everywhere.
        """
        here = self._here(order)
        if here is not None:
            yield Weights(here)
            return

        def wanted() -> bool:
            return not self._stopped and is_wanted()

        fetch = self._fetch = self._start_fetch(order, wanted, on_bytes)
        try:
            yield self._fetched(order, fetch, wanted, on_bytes)
        finally:
            self._fetch = None
            fetch.close()

    def _here(self, order: LoadStage) -> Checkpoint | None:
        """Return the checkpoint if this machine has the weights by itself, else None."""
        own = bool(self._local_model) or order.source.kind == "builtin"
        try:
            checkpoint = checkpoint_here(order.source, order.layers, local_model=self._local_model)
            if checkpoint is None or _is_same(order, checkpoint):
                return checkpoint
        except CheckpointError as exc:
            if own:
                raise
            logger.warning("%s Asking other machines for the weights.", exc)
            return None
        if own:
            raise _mismatch(order, checkpoint)
        logger.warning("%s Asking other machines for them.", _mismatch(order, checkpoint))
        return None

    def _fetched(
        self,
        order: LoadStage,
        fetch: Fetch,
        is_wanted: Callable[[], bool],
        on_bytes: Callable[[int], None],
    ) -> Weights:
        waiting = _Waiting()
        with waiting:
            checkpoint = _checkpoint_of(fetch.model())
        fetch.begin(checkpoint)
        found = Weights(checkpoint, fetch=fetch, waiting=waiting)
        from_hub = _FromHub(order.source, on_bytes)

        def locate(info: TensorInfo) -> Place:
            with found.waiting:
                try:
                    return fetch.wait_for(info.name)
                except FetchFailed as exc:
                    if order.source.kind != "hub" or not is_wanted():
                        raise
                    return from_hub.place(info, exc)

        found.locate = locate
        return found


class _FromHub:
    """Downloads files of a model from the hub, for tensors that no other machine gives.

    Args:
        source: of the model.
        on_bytes: called with bytes that came.
    """

    def __init__(self, source: ModelSource, on_bytes: Callable[[int], None]) -> None:
        self._source = source
        self._on_bytes = on_bytes
        self._told: set[str] = set()

    def place(self, info: TensorInfo, why: FetchFailed) -> Place:
        """Return where a tensor is in its file, once that is here.

        Args:
            info: of the tensor.
            why: no other machine gives it.

        Raises:
            FetchFailed: the hub does not either; with both reasons.
        """
        if info.file not in self._told:
            self._told.add(info.file)
            logger.warning("%s Getting %s from the hub.", why, info.file)
        try:
            path = download_file(self._source, info.file, self._on_bytes)
        except CheckpointError as exc:
            raise FetchFailed(f"{why} And this machine cannot get them by itself: {exc}") from exc
        return places_in_file(path, [info])[0]


def _is_same(order: LoadStage, checkpoint: Checkpoint) -> bool:
    prints = fingerprints(order.source, checkpoint, order.layers)
    return checkpoint.digest(order.layers, prints) == order.digest


def _mismatch(order: LoadStage, checkpoint: Checkpoint) -> CheckpointMismatch:
    return CheckpointMismatch(
        f"The weights of {layers_text(order.layers)} in {checkpoint.folder} are not those of the "
        "coordinator: they would give other text. Copy the coordinator's checkpoint to this "
        "machine, name the right folder with `dllm worker --model`, or leave that out: then they "
        "come from other machines."
    )


def _checkpoint_of(model: ModelDescription) -> Checkpoint:
    """Return the checkpoint that the coordinator describes; its files are nowhere.

    Raises:
        CheckpointError: it describes something else.
    """
    tensors = {
        one.name: TensorInfo(one.name, one.file, one.dtype, one.shape, 0, one.nbytes)
        for one in model.tensors
    }
    try:
        config = json.loads(model.config)
    except (ValueError, RecursionError) as exc:
        raise FetchFailed(f"What the coordinator says of the model is broken: {exc}") from exc
    if not isinstance(config, dict):
        raise FetchFailed("What the coordinator says of the model is broken: no configuration")
    return checkpoint_of(Path("the coordinator's model"), config, tensors)
