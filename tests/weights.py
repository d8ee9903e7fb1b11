"""Weights for tests of other things: those of this machine, and nobody to ask for others."""

from collections.abc import Callable
from pathlib import Path

from distributed_llm.common.cache_folder import cache_folder
from distributed_llm.common.checkpoint import Checkpoint
from distributed_llm.common.errors import CheckpointUnavailable
from distributed_llm.common.messages import LoadStage, ModelSource
from distributed_llm.weights.cache.content_cache import ContentCache
from distributed_llm.weights.fetch import Fetch
from distributed_llm.weights.giving.library import Library
from distributed_llm.weights.giving.shelf import Shelf
from distributed_llm.worker.compute.finding import WeightFinder


def no_fetch(
    order: LoadStage, is_wanted: Callable[[], bool], on_bytes: Callable[[int], None]
) -> Fetch:
    """Stands for a fetch where there is nobody to ask."""
    raise CheckpointUnavailable(f"{order.source.name} is not here, and there is nobody to ask.")


def weights_here() -> WeightFinder:
    """Return a finder of what is on this machine."""
    return WeightFinder("", no_fetch)


def cache_here() -> ContentCache:
    """Return the cache of this test."""
    return ContentCache(cache_folder(), None)


def library_of(source: ModelSource, checkpoint: Checkpoint) -> Library:
    """Return the weights of a checkpoint that is on this machine."""

    def file(name: str, on_bytes: Callable[[int], None]) -> Path:
        return checkpoint.folder / name

    return Library(source, checkpoint, file, Shelf(), cache_folder() / "digests")
