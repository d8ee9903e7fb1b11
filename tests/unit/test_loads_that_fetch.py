"""Loads that wait for weights of other machines: their progress, void ones, and how they end."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import pytest

from distributed_llm.common.errors import FetchFailed
from distributed_llm.common.messages import (
    Capabilities,
    FetchProgress,
    LoadStage,
    ModelDescription,
    ModelSource,
)
from distributed_llm.common.types import Epoch, LayerRange
from distributed_llm.weights.fetch import Fetch
from distributed_llm.worker.compute.engine import Engine
from distributed_llm.worker.compute.finding import WeightFinder
from distributed_llm.worker.session.events import Load, LoadFailed
from tests.unit.test_engine import Posted, capabilities


class WaitingFetch:
    """A fetch that is waited for until it is closed, or told to fail.

    Attributes:
        began: it is waited for.
        on_bytes, is_wanted: as given.
    """

    progress = FetchProgress(here_bytes=1, total_bytes=10, doing="waits")
    fetched_bytes = 0

    def __init__(self) -> None:
        self.began = threading.Event()
        self.on_bytes: Callable[[int], None]
        self.is_wanted: Callable[[], bool]
        self._ends = threading.Event()

    def start(
        self, order: LoadStage, is_wanted: Callable[[], bool], on_bytes: Callable[[int], None]
    ) -> Fetch:
        self.is_wanted, self.on_bytes = is_wanted, on_bytes
        return cast(Fetch, self)

    def model(self) -> ModelDescription:
        self.began.set()
        self._ends.wait()
        raise FetchFailed("It has ended.")

    def close(self) -> None:
        self._ends.set()


@contextmanager
def loading(
    folder: Path, *, beside: Epoch | None = None, void: Callable[[], bool] = lambda: False
) -> Iterator[tuple[Engine, WaitingFetch, Posted]]:
    """Yield an engine that is loading layers of which the weights are to come."""
    fetch, posted = WaitingFetch(), Posted()
    machine: Capabilities = capabilities()
    engine = Engine(
        machine,
        slowdown=1.0,
        weights=WeightFinder("", fetch.start),
        is_void=lambda order: void(),
        post=posted.post,
    )
    order = LoadStage(
        epoch=Epoch(3),
        source=ModelSource(kind="folder", name=str(folder / "elsewhere")),
        layers=LayerRange(0, 2),
        dtype="float32",
        wire_dtype="float32",
        digest="d",
        kv_tokens=64,
        link_key="k",
        beside=beside,
    )
    try:
        engine.put(Load(1, order))
        assert fetch.began.wait(20)
        yield engine, fetch, posted
    finally:
        fetch.close()
        assert engine.stop(20)


beside = pytest.mark.parametrize("beside", [None, Epoch(2)], ids=["alone", "beside"])


@beside
def test_bytes_that_come_are_progress_of_the_load(tmp_path: Path, beside: Epoch | None) -> None:
    with loading(tmp_path, beside=beside) as (engine, fetch, _):
        before = engine.load_progress
        assert before is not None
        fetch.on_bytes(1 << 40)  # more than what else this process reads
        after = engine.load_progress
        assert after is not None
        assert after - before >= 1 << 40
        assert engine.fetch_progress == fetch.progress


@beside
def test_a_load_that_is_void_wants_no_weights(tmp_path: Path, beside: Epoch | None) -> None:
    is_void = False
    with loading(tmp_path, beside=beside, void=lambda: is_void) as (_, fetch, _):
        assert fetch.is_wanted()
        is_void = True
        assert not fetch.is_wanted()


@beside
def test_an_engine_that_stops_waits_for_no_weights(tmp_path: Path, beside: Epoch | None) -> None:
    with loading(tmp_path, beside=beside) as (engine, fetch, _):
        assert engine.stop(20)
        assert not fetch.is_wanted()


@beside
def test_why_weights_do_not_come_is_told(tmp_path: Path, beside: Epoch | None) -> None:
    with loading(tmp_path, beside=beside) as (engine, fetch, posted):
        fetch.close()
        failed = posted.next()
        assert isinstance(failed, LoadFailed)
        assert "It has ended." in str(failed.error)
        assert isinstance(failed.error, FetchFailed)
        assert engine.fetch_progress is None
