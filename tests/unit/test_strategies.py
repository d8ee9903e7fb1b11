"""Layers to workers: never over memory, every layer once, and no cheaper cut exists."""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed_llm.common.errors import ConfigError, NotEnoughMemory
from distributed_llm.common.types import LayerRange, WorkerId
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.plan import (
    Plan,
    PlannedStage,
    describe,
    kv_tokens_of,
    layer_map_of,
    plan_of,
)
from distributed_llm.coordinator.planning.strategies import (
    StaticStrategy,
    make_plan,
    plan_by_speed,
    wanted_kv_tokens,
)
from distributed_llm.coordinator.speeds.demand import Demand
from distributed_llm.coordinator.speeds.links import LinkSpeeds
from distributed_llm.coordinator.speeds.machines import Machines
from distributed_llm.coordinator.speeds.worker_speed import Prior, WorkerSpeed


def model(
    layer_bytes: Sequence[int] = (100,) * 6,
    *,
    first: int = 0,
    last: int = 0,
    shared: int = 0,
    kv: int = 0,
) -> ModelCost:
    return ModelCost(tuple(layer_bytes), first, last, shared, (kv,) * len(layer_bytes))


def memory_of(*memory_bytes: int) -> dict[WorkerId, int]:
    """Return the memory of workers w0, w1, ..."""
    return {WorkerId(f"w{i}"): size for i, size in enumerate(memory_bytes)}


def plan(
    cost: ModelCost,
    workers: Mapping[WorkerId, int],
    strategy: StaticStrategy = "memory",
    kv_tokens: int = 0,
) -> Plan:
    return make_plan(cost, workers, strategy=strategy, kv_tokens=kv_tokens)


def custom(cost: ModelCost, workers: Mapping[WorkerId, int], **layers: tuple[int, int]) -> Plan:
    ranges = {name: LayerRange(*held) for name, held in layers.items()}
    return make_plan(cost, workers, strategy="custom", kv_tokens=0, layers=ranges)


def cuts(found: Plan) -> dict[str, tuple[int, int]]:
    return {stage.worker: (stage.layers.start, stage.layers.stop) for stage in found}


def is_whole(found: Plan, cost: ModelCost) -> bool:
    """Return whether every layer is served exactly once, in order, and no worker serves twice."""
    served = [i for s in found for i in range(s.layers.start, s.layers.stop)]
    names = [stage.worker for stage in found]
    return served == list(range(cost.num_layers)) and len(set(names)) == len(names)


def stage_bytes(cost: ModelCost, start: int, stop: int, kv_tokens: int) -> int:
    """Return what a stage needs, written down once more."""
    size = sum(cost.layer_bytes[start:stop])
    size += sum(cost.layer_kv_bytes[start:stop]) * kv_tokens
    if start == 0:
        size += cost.first_bytes
    if stop == cost.num_layers:
        size += cost.last_bytes
    if start == 0 or stop == cost.num_layers:
        size += cost.shared_bytes
    return size


def every_cut(count: int, workers: int) -> Iterator[list[tuple[int, int]]]:
    """Yield the (start, stop) of every worker for every way to share out `count` layers."""
    for edges in itertools.combinations_with_replacement(range(count + 1), workers - 1):
        yield list(itertools.pairwise((0, *edges, count)))


def cheapest(cost: ModelCost, workers: Mapping[WorkerId, int], kv_tokens: int) -> float | None:
    """Return the least sum of bytes^2 / memory over all cuts that fit, in order of memory."""
    ranked = sorted(workers.values(), reverse=True)
    prices = []
    for ranges in every_cut(cost.num_layers, len(ranked)):
        sizes = [stage_bytes(cost, *r, kv_tokens) if r[0] < r[1] else 0 for r in ranges]
        pairs = list(zip(sizes, ranked, strict=True))
        if all(s <= memory for s, memory in pairs):
            prices.append(sum(s**2 / memory for s, memory in pairs if s))
    return min(prices, default=None)


def price(cost: ModelCost, workers: Mapping[WorkerId, int], found: Plan, kv_tokens: int) -> float:
    return sum(
        stage_bytes(cost, s.layers.start, s.layers.stop, kv_tokens) ** 2 / workers[s.worker]
        for s in found
    )


# ------------------------------------------------------------------ strategy memory


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    layer_bytes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    ends=st.tuples(*[st.integers(0, 30)] * 3),
    kv=st.integers(0, 3),
    kv_tokens=st.integers(0, 8),
    memory=st.lists(st.integers(1, 120), min_size=1, max_size=5),
)
def test_memory_is_the_cheapest_of_all_cuts(
    layer_bytes: list[int],
    ends: tuple[int, int, int],
    kv: int,
    kv_tokens: int,
    memory: list[int],
) -> None:
    first, last, shared = ends
    cost = model(layer_bytes, first=first, last=last, shared=shared, kv=kv)
    workers = memory_of(*memory)
    best = cheapest(cost, workers, kv_tokens)
    if best is None:
        with pytest.raises(NotEnoughMemory):
            plan(cost, workers, kv_tokens=kv_tokens)
        return
    found = plan(cost, workers, kv_tokens=kv_tokens)
    assert is_whole(found, cost)
    for stage in found:
        start, stop = stage.layers.start, stage.layers.stop
        weights = stage_bytes(cost, start, stop, 0)
        assert stage.weight_bytes == weights == cost.weight_bytes(stage.layers)
        room = workers[stage.worker] - weights
        assert stage.kv_tokens == room // max(1, kv * (stop - start))
        assert stage_bytes(cost, start, stop, kv_tokens) <= workers[stage.worker]
    assert kv == 0 or kv_tokens_of(found) >= kv_tokens
    assert price(cost, workers, found, kv_tokens) == pytest.approx(best)


def test_all_small_cases_agree_with_brute_force() -> None:
    for count, workers in itertools.product(range(1, 5), range(1, 4)):
        for memory in itertools.combinations_with_replacement((10, 15, 20, 35), workers):
            for ends in itertools.product((0, 6), repeat=3):
                cost = model((7,) * count, first=ends[0], last=ends[1], shared=ends[2], kv=1)
                offered = memory_of(*memory)
                best = cheapest(cost, offered, 2)
                try:
                    found = plan(cost, offered, kv_tokens=2)
                except NotEnoughMemory:
                    assert best is None
                else:
                    assert is_whole(found, cost)
                    assert price(cost, offered, found, 2) == pytest.approx(best)


def test_memory_shares_in_proportion() -> None:
    found = plan(model((100,) * 12), memory_of(2000, 6000, 4000))
    assert cuts(found) == {"w1": (0, 6), "w2": (6, 10), "w0": (10, 12)}


def test_embedding_and_head_count_where_they_are() -> None:
    lean = plan(model((100,) * 8), memory_of(2000, 2000))
    assert cuts(lean) == {"w0": (0, 4), "w1": (4, 8)}
    with_head = plan(model((100,) * 8, last=400), memory_of(2000, 2000))
    assert cuts(with_head) == {"w0": (0, 6), "w1": (6, 8)}
    with_embedding = plan(model((100,) * 8, first=400), memory_of(2000, 2000))
    assert cuts(with_embedding) == {"w0": (0, 2), "w1": (2, 8)}


def test_tied_embedding_is_on_both_ends_but_once_on_one_worker() -> None:
    cost = model((10,) * 4, shared=100)
    assert cost.weight_bytes(LayerRange(0, 4)) == 140
    assert cost.weight_bytes(LayerRange(0, 1)) == cost.weight_bytes(LayerRange(3, 4)) == 110
    assert cost.weight_bytes(LayerRange(1, 3)) == 20
    assert len(plan(cost, memory_of(140, 100))) == 1
    with pytest.raises(NotEnoughMemory):
        plan(cost, memory_of(139, 100))


def test_unequal_layers_are_counted_by_bytes() -> None:
    found = plan(model((10, 10, 10, 30)), memory_of(100, 100))
    assert cuts(found) == {"w0": (0, 3), "w1": (3, 4)}


def test_kv_cache_is_reserved() -> None:
    cost = model((10,) * 4, kv=2)
    assert len(plan(cost, memory_of(60, 20, 20), kv_tokens=2)) >= 1
    with pytest.raises(NotEnoughMemory):
        plan(cost, memory_of(60, 20, 20), kv_tokens=100)
    (stage,) = plan(cost, memory_of(200), kv_tokens=20)
    assert stage.kv_tokens == kv_tokens_of((stage,)) == 20


def test_order_of_the_workers_does_not_matter() -> None:
    for workers in itertools.permutations(memory_of(900, 500, 500, 300).items()):
        assert plan(model(), dict(workers)) == plan(model(), memory_of(900, 500, 500, 300))


def test_small_workers_may_be_left_out() -> None:
    found = plan(model((100,) * 3), memory_of(300, 99))
    assert cuts(found) == {"w0": (0, 3)}


@pytest.mark.parametrize("strategy", ["memory", "even"])
def test_one_worker_serves_all(strategy: StaticStrategy) -> None:
    assert cuts(plan(model(), memory_of(1000), strategy)) == {"w0": (0, 6)}


@pytest.mark.parametrize("strategy", ["memory", "even"])
def test_more_workers_than_layers(strategy: StaticStrategy) -> None:
    found = plan(model((100, 100)), memory_of(100, 300, 200, 150), strategy)
    assert cuts(found) == {"w1": (0, 1), "w2": (1, 2)}


@pytest.mark.parametrize("strategy", ["memory", "even"])
def test_no_workers(strategy: StaticStrategy) -> None:
    with pytest.raises(NotEnoughMemory, match=r"offer 0 bytes \(none\)"):
        plan(model(), {}, strategy)


# ------------------------------------------------------------------ not enough memory


def test_message_says_what_is_missing_and_what_fits() -> None:
    cost = model((1024,) * 8, first=512, last=256, shared=256, kv=1)
    with pytest.raises(NotEnoughMemory) as caught:
        plan(cost, memory_of(3 * 1024, 2 * 1024), kv_tokens=1024)
    message = str(caught.value)
    assert (
        "needs 17.0 KiB (weights 9.0 KiB, KV cache for 1,024 tokens of context 8.0 KiB)" in message
    )
    assert "offer 5.0 KiB (w0 3.0 KiB, w1 2.0 KiB): 12.0 KiB are missing" in message
    assert "One layer takes 2.0 KiB, embedding and head 1.0 KiB" in message
    assert "about 2 of 8 layers would fit" in message


def test_message_when_there_is_enough_in_pieces_too_small() -> None:
    with pytest.raises(NotEnoughMemory, match="in pieces into which whole layers do not fit"):
        plan(model((100, 100)), memory_of(150, 99))
    with pytest.raises(
        NotEnoughMemory,
        match=r"has to hold layer 1, which takes 100 bytes, and the largest has 90 bytes\. Add a "
        "worker that has as much",
    ) as caught:
        plan(model((100, 100)), memory_of(*(90,) * 9))
    assert "would fit" not in str(caught.value)


@pytest.mark.parametrize("strategy", ["even", "custom"])
def test_worker_given_too_much_is_named(strategy: StaticStrategy) -> None:
    layers = {"w0": LayerRange(0, 3), "w1": LayerRange(3, 6)}
    with pytest.raises(NotEnoughMemory, match=r"Worker w1 would hold layers 4-6.*300 bytes.*250"):
        make_plan(model(), memory_of(999, 250), strategy=strategy, kv_tokens=0, layers=layers)


# ------------------------------------------------------------------ even, custom


@pytest.mark.parametrize(("count", "workers"), [(6, 3), (7, 3), (5, 4), (3, 3), (1, 1)])
def test_even_differs_by_one_layer_at_most(count: int, workers: int) -> None:
    cost = model((100,) * count)
    found = plan(cost, memory_of(*range(1000, 1000 + workers)), "even")
    assert is_whole(found, cost)
    sizes = [len(stage.layers) for stage in found]
    assert len(sizes) == workers
    assert max(sizes) - min(sizes) <= 1


def test_custom_is_followed() -> None:
    found = custom(model(), memory_of(500, 500, 500), w2=(0, 1), w0=(1, 6))
    assert cuts(found) == {"w2": (0, 1), "w0": (1, 6)}
    assert [stage.worker for stage in found] == ["w2", "w0"]


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ({"w0": (0, 3), "w1": (3, 9)}, r"the model, which has 6 layers: there is no layer 9"),
        ({"w0": (0, 3), "w1": (3, 5)}, r"the model, which has 6 layers: nobody serves layer 6"),
        ({"w0": (0, 3), "pc": (3, 6)}, r"'pc', not joined yet \(there: w0, w1\).*--name pc"),
    ],
)
def test_custom_map_that_is_wrong(layers: dict[str, tuple[int, int]], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        custom(model(), memory_of(1000, 1000), **layers)


def test_custom_map_with_nobody_there() -> None:
    with pytest.raises(ConfigError, match="there: nobody"):
        custom(model(), {}, pc=(0, 6))


# ------------------------------------------------------------------ by speed

PC, MAC, PI = WorkerId("pc"), WorkerId("mac"), WorkerId("pi")


def by_speed(
    cost: ModelCost, memory: Mapping[WorkerId, int], layer_s: Mapping[WorkerId, float], kv: int = 0
) -> Plan:
    """Return the plan for throughput of machines whose layers take so long, with links for free."""
    speeds = {name: WorkerSpeed(Prior(took, 0, 0, 0, 0, 0)) for name, took in layer_s.items()}
    machines = Machines(memory, speeds, LinkSpeeds(bytes_per_token=0).links)
    demand = Demand.expected(len(memory))
    return plan_by_speed(cost, machines, demand, objective="throughput", kv_tokens=kv)


def test_a_layer_map_as_a_plan() -> None:
    cost = model((100,) * 4, first=10, last=20, shared=5, kv=2)
    layer_map = ((MAC, LayerRange(0, 1)), (PC, LayerRange(1, 4)))
    assert plan_of(cost, {PC: 400, MAC: 200, PI: 7}, layer_map) == (
        PlannedStage(MAC, LayerRange(0, 1), 115, 42),  # (200 - 115) / 2
        PlannedStage(PC, LayerRange(1, 4), 325, 12),  # (400 - 325) / 6
    )
    assert layer_map_of(plan_of(cost, {PC: 400, MAC: 200}, layer_map)) == layer_map
    assert plan_of(cost, {MAC: 1}, layer_map[:1]) == (PlannedStage(MAC, LayerRange(0, 1), 115, 0),)


def sizes_of(found: Plan) -> dict[str, int]:
    return {stage.worker: len(stage.layers) for stage in found}


def test_layers_by_speed() -> None:
    memory = {PC: 600, MAC: 600, PI: 600}
    found = by_speed(model(kv=1), memory, {PC: 0.1, MAC: 0.2, PI: 9.0})
    assert is_whole(found, model())
    assert sizes_of(found) == {"pc": 4, "mac": 2}
    rooms = {stage.worker: (stage.weight_bytes, stage.kv_tokens) for stage in found}
    assert rooms == {"pc": (400, 50), "mac": (200, 200)}  # (600 - 400) / 4, (600 - 200) / 2


def test_room_for_kv_cache_goes_before_speed() -> None:
    memory, speeds = {PC: 400, MAC: 600}, {PC: 0.1, MAC: 0.2}
    assert sizes_of(by_speed(model(kv=1), memory, speeds, kv=0)) == {"pc": 4, "mac": 2}
    found = by_speed(model(kv=1), memory, speeds, kv=50)  # a layer takes 150: pc holds two
    assert sizes_of(found) == {"pc": 2, "mac": 4}
    assert kv_tokens_of(found) == 50


def test_nothing_fits_by_speed() -> None:
    words = r"offer 300 bytes \(pc 100 bytes, mac 200 bytes\): 300 bytes are missing"
    with pytest.raises(NotEnoughMemory, match=words):
        by_speed(model(), {PC: 100, MAC: 200}, {PC: 0.1, MAC: 0.2})
    with pytest.raises(NotEnoughMemory, match=r"offer 0 bytes \(none\)"):
        by_speed(model(), {}, {})


@pytest.mark.parametrize(
    ("sizes", "context", "expected"),
    [
        ((1000, 1000), 1000, 233),  # three layers each: (1000 - 300) / 3, less than a context
        ((1000, 1000), 150, 150),  # a whole context, which is more than half of that
        ((1000, 1000), 100, 116),  # half of that
        ((1000, 1000), 5, 80),  # sixteen contexts
        ((1_000_000, 1_000_000), 100_000, 65_536),
        ((400, 400), 25, 25),  # (400 - 300) / 3 = 33, of which half is below a context
        ((400, 400), 8, 20),  # and a context below what is needed
        ((1_000_000, 1_000_000), 1_000_000, 65_536),
        ((100, 100), 1000, 20),  # fits in no way
        ((), 1000, 20),
    ],
)
def test_positions_that_a_plan_by_speed_leaves_room_for(
    sizes: Sequence[int], context: int, expected: int
) -> None:
    memory = memory_of(*sizes)
    assert wanted_kv_tokens(model(kv=1), memory, least=20, context_length=context) == expected


# ------------------------------------------------------------------ describe


def test_describe() -> None:
    cost = model((100,) * 4, first=10, last=20, kv=2)
    found = plan(cost, memory_of(400, 400))
    assert describe(found, cost) == [
        {
            "worker": "w0",
            "layers": LayerRange(0, 2),
            "weight_bytes": 210,
            "kv_tokens": 47,
            "kv_bytes_per_token": 4,
            "quantize": "none",
            "disk_bytes": 0,
            "ram_bytes": 0,
        },
        {
            "worker": "w1",
            "layers": LayerRange(2, 4),
            "weight_bytes": 220,
            "kv_tokens": 45,
            "kv_bytes_per_token": 4,
            "quantize": "none",
            "disk_bytes": 0,
            "ram_bytes": 0,
        },
    ]
    assert kv_tokens_of(found) == 45
