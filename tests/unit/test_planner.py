"""Which plans are made for some workers: how many, of whom, and with how much room."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest

from distributed_llm.common.errors import ConfigError, NotEnoughMemory, NotReady
from distributed_llm.common.types import LayerRange, WorkerId
from distributed_llm.common.weight_forms import Quantize
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.plan import Plan, kv_tokens_of
from distributed_llm.coordinator.planning.planner import Planner, ranked_by_speed
from distributed_llm.coordinator.speeds.links import LinkSpeeds
from distributed_llm.coordinator.speeds.machines import Machines
from distributed_llm.coordinator.speeds.worker_speed import Prior, WorkerSpeed
from tests.unit.coordinator_parts import Parts

COST = ModelCost(
    (1000,) * 6, first_bytes=500, last_bytes=300, shared_bytes=0, layer_kv_bytes=(1,) * 6
)
CONTEXT = 2048
LAYER_S = 1e-3


def planner(**changes: Any) -> Planner:
    """Return a planner for six layers; by speed unless something else is said."""
    usual = Planner(
        COST,
        strategy="speed",
        objective="throughput",
        layers={},
        replicas=1,
        context_length=CONTEXT,
        least_kv_tokens=64,
    )
    return replace(usual, **changes)


def machines(memory: Mapping[str, int], **faster: float) -> Machines:
    """Return machines of which nothing was measured.

    Args:
        memory: bytes of each.
        faster: how many times faster than the others some of them are.
    """
    links = LinkSpeeds(bytes_per_token=16)
    for pair in permutations(map(WorkerId, memory), 2):
        links.observe(*pair, rtt_s=2e-4, bytes_per_s=1e9)
    speeds = {
        WorkerId(name): WorkerSpeed(Prior(LAYER_S / faster.get(name, 1.0), 0, 0, 0, 0, 0))
        for name in memory
    }
    return Machines({WorkerId(name): size for name, size in memory.items()}, speeds, links.links)


def room(made: Planner, memory: Mapping[str, int]) -> int:
    """Return the positions of KV cache that plans leave room for."""
    return made.kv_tokens(machines(memory).memory_bytes)


def layers(plans: Sequence[Plan]) -> list[list[str]]:
    """Return who has which layers, by plan."""
    return [[f"{stage.worker} {stage.layers}" for stage in plan] for plan in plans]


def names(plans: Sequence[Plan]) -> list[list[str]]:
    """Return who has any, by plan."""
    return [sorted(stage.worker for stage in plan) for plan in plans]


# ------------------------------------------------------------------ how many


@pytest.mark.parametrize(
    ("replicas", "found"),
    [
        (1, [["a", "b", "c", "d"]]),
        (2, [["a", "d"], ["b", "c"]]),
        (4, [["a"], ["b"], ["c"], ["d"]]),
        (9, [["a"], ["b"], ["c"], ["d"]]),
    ],
)
def test_as_many_as_are_wanted_or_as_there_are_workers(
    replicas: int, found: list[list[str]]
) -> None:
    """They are dealt to and fro, so that groups are about alike: the largest with the smallest."""
    sizes = {"a": 90_000, "b": 80_000, "c": 70_000, "d": 60_000}
    assert names(planner(strategy="even", replicas=replicas).plans(machines(sizes))) == found


def test_no_more_than_the_workers_can_hold() -> None:
    assert names(
        planner(strategy="even", replicas=3).plans(machines(dict.fromkeys("abcd", 4000)))
    ) == [["a", "d"], ["b", "c"]]


def test_all_together_if_they_cannot_hold_more_than_one() -> None:
    assert names(
        planner(strategy="even", replicas=2).plans(machines(dict.fromkeys("abcd", 2500)))
    ) == [["a", "b", "c", "d"]]


def test_too_little_memory_is_said() -> None:
    with pytest.raises(NotEnoughMemory, match="are missing"):
        planner(strategy="memory", replicas=2).plans(machines(dict.fromkeys("ab", 2500)))


@pytest.mark.parametrize("strategy", ["speed", "memory"])
@pytest.mark.parametrize("replicas", [1, "auto"])
def test_without_workers_nothing_is_planned(strategy: str, replicas: Any) -> None:
    with pytest.raises(NotReady, match="Start one with `dllm worker`"):
        planner(strategy=strategy, replicas=replicas).plans(machines({}))


@pytest.mark.parametrize("strategy", ["memory", "even"])
def test_auto_is_once_where_speed_is_not_asked_for(strategy: str) -> None:
    assert names(
        planner(strategy=strategy, replicas="auto").plans(machines(dict.fromkeys("ab", 90_000)))
    ) == [["a", "b"]]


def test_auto_is_as_often_as_is_fastest() -> None:
    """Two that are alike answer twice as much apart; links would only take time."""
    assert layers(
        planner(replicas="auto", objective="throughput").plans(
            machines(dict.fromkeys("ab", 900_000))
        )
    ) == [["a 1-6"], ["b 1-6"]]


def test_auto_is_once_if_one_request_counts() -> None:
    """For latency the best pipeline counts, not the sum."""
    some = machines(dict.fromkeys("ab", 900_000), a=9.0)
    assert layers(planner(replicas="auto", objective="latency").plans(some)) == [["a 1-6"]]


def test_auto_is_once_where_they_can_hold_it_only_together() -> None:
    assert names(
        planner(replicas="auto", objective="throughput").plans(machines(dict.fromkeys("ab", 5000)))
    ) == [["a", "b"]]


# ------------------------------------------------------------------ by whom


def test_the_layers_of_strategy_custom_are_kept() -> None:
    given = {"b": LayerRange(0, 2), "a": LayerRange(2, 6)}
    made = planner(strategy="custom", layers=given)
    both = machines(dict.fromkeys("ab", 90_000))
    assert layers([made.plan(both)]) == [["b 1-2", "a 3-6"]]
    with pytest.raises(ConfigError, match="'b', not joined yet"):
        made.plan(both.subset([WorkerId("a")]))


def test_a_fast_machine_has_more_layers() -> None:
    """Three times as fast: five layers take it less than two would take the other one."""
    some = machines(dict.fromkeys("ab", 6500), b=3.0)
    plan = planner(context_length=4).plan(some)  # so there need not be much room for KV cache
    assert {stage.worker: len(stage.layers) for stage in plan} == {"a": 1, "b": 5}


def test_workers_are_ranked_by_the_time_of_a_layer_and_then_by_name() -> None:
    some = machines(dict.fromkeys("bac", 5500), c=2.0)
    assert ranked_by_speed(some) == ["c", "a", "b"]


# ------------------------------------------------------------------ with how much room


def test_a_plan_leaves_half_of_the_most_room_there_could_be() -> None:
    """Three layers on each leave (20,000 - 3500) / 3 = 5500 positions; a context is 2048."""
    assert room(planner(), dict.fromkeys("ab", 20_000)) == 5500 // 2


def test_a_plan_leaves_room_for_a_whole_context_if_it_can() -> None:
    """(9000 - 3500) / 3 = 1833 positions is all there can be."""
    assert room(planner(), dict.fromkeys("ab", 9000)) == 1833


def test_a_plan_never_leaves_less_room_than_is_needed() -> None:
    """(4000 - 3500) / 3 = 166 positions is all there can be."""
    assert room(planner(least_kv_tokens=999), dict.fromkeys("ab", 4000)) == 999


@pytest.mark.parametrize(("used", "found"), [(0, [["b"]]), (900, [["a", "b"]])])
def test_there_is_room_for_what_is_used_if_there_can_be(used: int, found: list[list[str]]) -> None:
    """b would hold all of it alone, in 10,000 bytes, and leave (10,000 - 6800) / 6 = 533."""
    some = machines({"a": 9000, "b": 10_000}, b=50.0)
    plan = planner(objective="latency", context_length=4).plan(some, used_tokens=used)
    assert names([plan]) == found
    assert kv_tokens_of(plan) >= used


def test_if_there_cannot_be_the_least_is_enough() -> None:
    plan = planner().plan(machines(dict.fromkeys("ab", 4000)), used_tokens=1 << 20)
    assert 64 <= kv_tokens_of(plan) < 400


@pytest.mark.parametrize(("wanted", "least"), [(100, 100), (CONTEXT, CONTEXT), (4096, CONTEXT)])
@pytest.mark.parametrize("strategy", ["memory", "speed"])
def test_no_more_room_than_one_context_is_needed(strategy: str, wanted: int, least: int) -> None:
    """`min_kv_tokens` counts up to the context length of the model; one worker holds all layers."""
    made = Parts({}, strategy=strategy, min_kv_tokens=wanted).planner
    needed = 6800 + 6 * least
    assert layers([made.plan(machines({"a": needed}))]) == [["a 1-6"]]
    with pytest.raises(NotEnoughMemory):
        made.plan(machines({"a": needed - 1}))


def test_the_plan_of_a_layer_map() -> None:
    memory = machines(dict.fromkeys("ab", 9000)).memory_bytes
    layer_map = ((WorkerId("b"), LayerRange(0, 1)), (WorkerId("a"), LayerRange(1, 6)))
    plan = planner().plan_of(memory, layer_map)
    assert [(s.worker, s.weight_bytes, s.kv_tokens) for s in plan] == [
        ("b", 1500, 7500),
        ("a", 5300, 3700 // 5),
    ]


def shrunk(quantize: Quantize, layer_bytes: int) -> ModelCost:
    return replace(COST, layer_bytes=(layer_bytes,) * 6, quantize=quantize)


SMALLER = (shrunk("int8", 500), shrunk("int4", 300))


@pytest.mark.parametrize("strategy", ["speed", "memory", "even"])
@pytest.mark.parametrize(
    ("memory", "quantize"), [(4500, "none"), (2900, "int8"), (1900, "int4"), (1000, None)]
)
def test_weights_keep_the_most_bits_that_fit(
    strategy: str, memory: int, quantize: Quantize | None
) -> None:
    made = planner(strategy=strategy, smaller=SMALLER, may_shrink=True)
    here = machines({"a": memory, "b": memory})
    if quantize is None:
        with pytest.raises(NotEnoughMemory, match=r"weights 2\.5 KiB|which take 1\.6 KiB"):
            made.plans(here)
        return
    for plan in (*made.plans(here), made.plan(here)):
        assert {stage.quantize for stage in plan} == {quantize}
        weights = made.only(quantize).cost.weight_bytes
        assert all(stage.weight_bytes == weights(stage.layers) for stage in plan)


def test_a_refusal_says_what_would_fit_with_fewer_bits() -> None:
    made = planner(strategy="memory", smaller=SMALLER)
    with pytest.raises(NotEnoughMemory, match=r"--quantize int8.*3\.7 KiB instead of 6\.6 KiB"):
        made.plans(machines({"a": 2900, "b": 2900}))
    with pytest.raises(NotEnoughMemory) as caught:
        made.only("none").plans(machines({"a": 2900, "b": 2900}))
    assert "quantize" not in str(caught.value)
