"""Entries for tests of the cache of weights, and a system that refuses."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distributed_llm.weights.cache.content_cache import ContentCache
from distributed_llm.weights.cache.partial import Partial


def content(nbytes: int, seed: int = 0) -> bytes:
    return hashlib.shake_128(seed.to_bytes(4, "big")).digest(nbytes)


def name_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


DATA = content(1000)
NAME = name_of(DATA)


def begun(cache: ContentCache, data: bytes = DATA) -> Partial:
    partial = cache.begin(name_of(data), len(data))
    assert partial is not None
    return partial


def put(cache: ContentCache, data: bytes = DATA) -> Path:
    with begun(cache, data) as partial:
        partial.write(data[partial.done_bytes :])
        partial.finish()
    return cache.path(name_of(data))


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def refuse(code: int) -> Callable[..., Any]:
    """Return a function of the system that refuses."""

    def refused(path: object = None, *_: object, **__: object) -> Any:
        raise OSError(code, os.strerror(code), None if isinstance(path, int) else str(path))

    return refused
