"""Which weights workers have on their disks, who gives them to whom, and how long that takes."""

import pytest

from distributed_llm.common.keys import PublicKey, key_text
from distributed_llm.common.messages import (
    MAX_SOURCES,
    MAX_STAGES,
    FetchProgress,
    GiveWeights,
    StageReady,
)
from distributed_llm.common.types import Epoch, LayerRange
from distributed_llm.coordinator.cluster.registry import Registry
from distributed_llm.coordinator.cluster.weight_sources import let_read, sources_of
from distributed_llm.coordinator.cluster.weight_stock import WeightStock
from distributed_llm.coordinator.cluster.worker import Worker
from distributed_llm.coordinator.events import Send
from tests.unit.coordinator_parts import Parts
from tests.unit.test_registry import join as joined

MIB = 1 << 20


def key(number: int) -> PublicKey:
    return PublicKey(key_text(number.to_bytes(32, "big")))


def ready(fetched_bytes: int = 0, fetch_s: float = 0.0, *, gives: bool = True) -> StageReady:
    return StageReady(
        epoch=Epoch(1),
        credits=4,
        load_s=10.0,
        weight_bytes=1,
        kv_tokens=64,
        fetched_bytes=fetched_bytes,
        fetch_s=fetch_s,
        gives_weights=gives,
    )


# ------------------------------------------------------------------ the stock


def test_a_worker_that_reads_its_own_copy_gives_nothing_and_waits_for_nothing() -> None:
    stock = WeightStock()
    stock.loaded(LayerRange(0, 4), ready(gives=False))
    assert (stock.ranges, stock.fetches) == ((), False)
    assert stock.fetch_s(10**12, None, LayerRange(0, 4)) == 0.0


def test_layers_that_were_fetched_add_up() -> None:
    stock = WeightStock()
    for start, stop in ((4, 6), (0, 2), (1, 3), (9, 10), (5, 7)):
        stock.loaded(LayerRange(start, stop), ready())
    assert stock.ranges == (LayerRange(0, 3), LayerRange(4, 7), LayerRange(9, 10))


@pytest.mark.parametrize(
    ("before", "after", "seconds"),
    [
        (None, (0, 4), 0.0),  # all are on the disk
        (None, (2, 6), 1.0),  # two of four are missing
        ((2, 4), (2, 6), 2.0),  # both that are added are missing
        ((2, 4), (0, 4), 0.0),
        ((0, 4), (0, 4), 0.0),
        (None, (4, 8), 2.0),
    ],
)
def test_only_layers_that_are_not_on_the_disk_are_fetched(
    before: tuple[int, int] | None, after: tuple[int, int], seconds: float
) -> None:
    stock = WeightStock(bytes_per_s=50.0)
    stock.loaded(LayerRange(0, 4), ready())
    held = LayerRange(*before) if before else None
    assert stock.fetch_s(100, held, LayerRange(*after)) == seconds


def test_the_speed_is_that_of_the_last_fetch_that_was_large_enough() -> None:
    stock = WeightStock()
    for fetched_bytes, fetch_s in ((64 * MIB, 2.0), (MIB, 5.0), (64 * MIB, 0.0)):
        stock.loaded(LayerRange(0, 1), ready(fetched_bytes, fetch_s))
        assert stock.bytes_per_s == 32 * MIB
    stock.loaded(LayerRange(0, 1), ready(64 * MIB, 1e12))
    assert stock.bytes_per_s == 1.0, "nothing is divided by almost nothing"


def test_progress_ends_with_the_load() -> None:
    stock = WeightStock(progress=FetchProgress(here_bytes=1, total_bytes=2))
    stock.loaded(LayerRange(0, 1), ready())
    assert stock.progress is None


# ------------------------------------------------------------------ who gives to whom


def cluster(*held: tuple[int, int] | None) -> list[Worker]:
    """Return workers that have fetched these layers, or nothing."""
    registry = Registry(silence_timeout_s=4.0, task_timeout_s=30.0)
    workers = []
    for number, layers in enumerate(held):
        worker = joined(registry, f"w{number}".encode(), f"w{number}")  # type: ignore[arg-type]
        worker.key = key(number + 1)
        if layers:
            worker.stock.loaded(LayerRange(*layers), ready())
        workers.append(worker)
    return workers


def test_sources_are_others_that_have_some_of_the_layers() -> None:
    workers = cluster((0, 4), (0, 2), None, (2, 6), (6, 8))
    sources = sources_of(LayerRange(1, 5), workers[0], workers)
    assert [(one.worker, one.layers, one.key) for one in sources] == [
        ("w1", (LayerRange(0, 2),), key(2)),
        ("w3", (LayerRange(2, 6),), key(4)),
    ]
    assert sources[0].addresses == ("10.0.0.1:7",)


def test_a_worker_that_nobody_can_dial_is_no_source() -> None:
    workers = cluster((0, 4), (0, 4))
    workers[1].peer_addresses = ()
    assert sources_of(LayerRange(0, 1), workers[0], workers) == ()


def test_sources_and_their_ranges_are_bounded() -> None:
    workers = cluster(None, *[(0, 4)] * 40)
    workers[1].stock.layers = set(range(0, 400, 2))
    sources = sources_of(LayerRange(0, 1), workers[0], workers)
    assert len(sources) == MAX_SOURCES
    assert len(sources[0].layers) == 64


def test_givers_let_all_others_read_and_nobody_else_is_told() -> None:
    workers = cluster(*[None] * 3)
    assert let_read(["w1"], workers) == [
        Send(workers[1].peer, GiveWeights(readers=(key(1), key(3))))
    ]
    assert let_read([], workers) == []
    workers[2].key = workers[0].key  # one machine
    ((told),) = let_read(["w1"], workers)
    assert told.message == GiveWeights(readers=(key(1),))


def test_readers_are_bounded() -> None:
    workers = cluster(*[None] * (MAX_STAGES + 9))
    ((told),) = let_read(["w0"], workers)
    assert isinstance(told.message, GiveWeights)
    assert len(told.message.readers) == MAX_STAGES


# ------------------------------------------------------------------ what a move costs


def test_a_move_is_dearer_if_weights_have_to_be_fetched_for_it() -> None:
    parts = Parts({"a": 10**6, "b": 10**6})
    pipeline = parts.serve(("a", 0, 3), ("b", 3, 6))
    plan = parts.plan(("a", 0, 2), ("b", 2, 6))
    price = parts.moves.prices.price
    before = price(pipeline, plan).standstill_s
    stock = parts.worker("b").stock
    stock.loaded(LayerRange(3, 6), ready())
    stock.bytes_per_s = 10.0
    assert price(pipeline, plan).standstill_s > before + 5.0
    stock.loaded(LayerRange(2, 3), ready())
    assert price(pipeline, plan).standstill_s == before, "it has those layers on its disk"
