"""The weights of the served model as the coordinator has them, for workers that lack them.

The coordinator vouches for the SHA-256 of every tensor. It hashes what workers ask for, in a thread
of its own. Of a model on the hub it first downloads the files that hold what is asked for: one
machine that may reach the hub is enough, and each file comes over the internet once.
"""

import json
import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from distributed_llm.common.checkpoint import Checkpoint
from distributed_llm.common.errors import CheckpointError, internal_error
from distributed_llm.common.messages import ModelDescription, ModelSource, TensorDescription
from distributed_llm.common.model_files import TensorInfo
from distributed_llm.common.types import LayerRange
from distributed_llm.common.wording import layers_text, size_text
from distributed_llm.weights.giving.digests import FileDigests
from distributed_llm.weights.giving.shelf import Shelf, places_in_file

logger = logging.getLogger(__name__)

_MOST_RANGES = 64
"""Ranges of layers of which it is remembered what tensors they need; finding those takes long."""

FetchFile = Callable[[str, Callable[[int], None]], Path]
"""Has a file of the model on this disk; args: its name, and what to call with bytes that came."""


@dataclass(frozen=True)
class Digests:
    """What the tensors of some layers hash to.

    Attributes:
        sha256: by name, of those that are known.
        complete: whether these are all.
        failure: why the others could not be had at the latest attempt, for people; told once.
    """

    sha256: dict[str, str]
    complete: bool
    failure: str


class Library:
    """The weights of one model. Its methods return at once, and may be called in any thread.

    Args:
        source: of the model, as orders to workers name it.
        checkpoint: of the model; of one on the hub, files may be missing.
        fetch_file: called in the library's thread; raises CheckpointError.
        shelf: that gets every tensor once it is hashed.
        kept_digests: folder that keeps what was hashed, for the next start.

    Attributes:
        source: as given.
        shelf: as given.
        description: of the model.
    """

    def __init__(
        self,
        source: ModelSource,
        checkpoint: Checkpoint,
        fetch_file: FetchFile,
        shelf: Shelf,
        kept_digests: Path,
    ) -> None:
        self.source = source
        self.description = ModelDescription(
            config=json.dumps(checkpoint.config).encode(),
            tensors=tuple(
                TensorDescription(
                    name=one.name,
                    file=one.file,
                    dtype=one.dtype,
                    shape=one.shape,
                    nbytes=one.nbytes,
                )
                for one in checkpoint.tensors.values()
            ),
        )
        self._checkpoint = checkpoint
        self._tensors_of = lru_cache(_MOST_RANGES)(
            lambda layers: tuple(checkpoint.tensors_of(layers))
        )
        self._fetch_file = fetch_file
        self.shelf = shelf
        self._kept_digests = kept_digests
        self._sha256: dict[str, str] = {}
        self._failures: dict[LayerRange, str] = {}
        self._doing = ""
        self._progress = 0
        self._asked: set[LayerRange] = set()
        self._orders: queue.SimpleQueue[LayerRange | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._closed = False

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self._checkpoint.num_layers

    @property
    def doing(self) -> str:
        """What the library is at, for people; empty if nothing."""
        return self._doing

    @property
    def progress(self) -> int:
        """A number that changes as long as the library gets on."""
        return self._progress

    def digests(self, layers: LayerRange) -> Digests:
        """Return what the tensors that `layers` need hash to, as far as that is known.

        If some are missing, the library gets on with those.
        """
        tensors = self._tensors_of(layers)
        known = {one.name: self._sha256[one.name] for one in tensors if one.name in self._sha256}
        complete = len(known) == len(tensors)
        failure = self._failures.pop(layers, "")
        if not complete:
            self._order(layers)
        return Digests(known, complete, "" if complete else failure)

    def close(self) -> None:
        """Get on with nothing any more."""
        self._closed = True
        self._orders.put(None)

    def _order(self, layers: LayerRange) -> None:
        with self._lock:
            if layers in self._asked or self._closed:
                return
            self._asked.add(layers)
            self._orders.put(layers)
            if self._thread is None:
                self._thread = threading.Thread(target=self._main, name="library", daemon=True)
                self._thread.start()

    def _main(self) -> None:
        while (layers := self._orders.get()) is not None and not self._closed:
            try:
                self._prepare(layers)
            except CheckpointError as exc:
                self._failed(layers, str(exc))
            except Exception as exc:
                logger.exception("cannot prepare the weights of %s", layers_text(layers))
                self._failed(layers, str(internal_error(exc)))
            self._doing = ""
            with self._lock:
                self._asked.discard(layers)

    def _failed(self, layers: LayerRange, why: str) -> None:
        logger.warning("cannot give the weights of %s: %s", layers_text(layers), why)
        self._failures[layers] = why

    def _prepare(self, layers: LayerRange) -> None:
        by_file: dict[str, list[TensorInfo]] = {}
        for tensor in self._tensors_of(layers):
            if tensor.name not in self._sha256:
                by_file.setdefault(tensor.file, []).append(tensor)
        for name, tensors in by_file.items():
            self._doing = f"gets {name}"
            path = self._fetch_file(name, self._count)
            size = sum(one.nbytes for one in tensors)
            self._doing = f"hashes {size_text(size)} of {name}"
            self._hash(path, tensors)

    def _hash(self, path: Path, tensors: list[TensorInfo]) -> None:
        digests = FileDigests(path, self._kept_digests)
        places = places_in_file(path, tensors)
        try:
            for tensor, place in zip(tensors, places, strict=True):
                if self._closed:
                    return
                sha256 = digests.of(tensor.name, place, self._count)
                self.shelf.put(sha256, place)
                self._sha256[tensor.name] = sha256
                self._progress += 1
        finally:
            digests.keep()

    def _count(self, nbytes: int) -> None:
        self._progress += nbytes
