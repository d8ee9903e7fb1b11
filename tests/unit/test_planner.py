"""Which plans are made for some workers: how many, of whom, and with how much room."""

from collections.abc import Sequence
from typing import Any

import pytest

from distributed_llm.common.errors import ConfigError, NotEnoughMemory, NotReady
from distributed_llm.common.types import LayerRange
from distributed_llm.coordinator.cluster.registry import Worker
from distributed_llm.coordinator.plan import Plan, kv_tokens_of
from distributed_llm.coordinator.planning.planner import ranked_by_speed
from distributed_llm.coordinator.speeds.measurements import Measurements
from tests.unit.coordinator_parts import Parts, ranges_of


def layers(plans: Sequence[Plan]) -> list[list[str]]:
    """Return who has which layers, by plan."""
    return [[f"{stage.worker} {stage.layers}" for stage in plan] for plan in plans]


def names(plans: Sequence[Plan]) -> list[list[str]]:
    """Return who has any, by plan."""
    return [sorted(stage.worker for stage in plan) for plan in plans]


def everybody(parts: Parts) -> list[Worker]:
    return list(parts.registry.workers)


def faster(parts: Parts, name: str, times: float) -> None:
    """A machine is so many times faster than the others."""
    worker = parts.worker(name)
    found = type(worker.capabilities)(
        **{
            **{f: getattr(worker.capabilities, f) for f in worker.capabilities.__struct_fields__},
            "memory_bandwidth_bytes_per_s": times * 1e6,
            "flops_per_s": times * 1e9,
        }
    )
    parts.measurements.joined(worker.id, found)


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
    parts = Parts(sizes, strategy="even", replicas=replicas)
    assert names(parts.planner.plans(everybody(parts))) == found


def test_no_more_than_the_workers_can_hold() -> None:
    parts = Parts(dict.fromkeys("abcd", 4000), strategy="even", replicas=3)
    assert names(parts.planner.plans(everybody(parts))) == [["a", "d"], ["b", "c"]]


def test_all_together_if_they_cannot_hold_more_than_one() -> None:
    parts = Parts(dict.fromkeys("abcd", 2500), strategy="even", replicas=2)
    assert names(parts.planner.plans(everybody(parts))) == [["a", "b", "c", "d"]]


def test_too_little_memory_is_said() -> None:
    parts = Parts(dict.fromkeys("ab", 2500), strategy="memory", replicas=2)
    with pytest.raises(NotEnoughMemory, match="are missing"):
        parts.planner.plans(everybody(parts))


@pytest.mark.parametrize("strategy", ["speed", "memory"])
@pytest.mark.parametrize("replicas", [1, "auto"])
def test_without_workers_nothing_is_planned(strategy: str, replicas: Any) -> None:
    parts = Parts({}, strategy=strategy, replicas=replicas)
    with pytest.raises(NotReady, match="Start one with `dllm worker`"):
        parts.planner.plans([])


@pytest.mark.parametrize("strategy", ["memory", "even"])
def test_auto_is_once_where_speed_is_not_asked_for(strategy: str) -> None:
    parts = Parts(dict.fromkeys("ab", 90_000), strategy=strategy, replicas="auto")
    assert names(parts.planner.plans(everybody(parts))) == [["a", "b"]]


def test_auto_is_as_often_as_is_fastest() -> None:
    """Two that are alike answer twice as much apart; links would only take time."""
    parts = Parts(dict.fromkeys("ab", 900_000), replicas="auto", objective="throughput")
    assert layers(parts.planner.plans(everybody(parts))) == [["a 0-6"], ["b 0-6"]]


def test_auto_is_once_if_one_request_counts() -> None:
    """For latency the best pipeline counts, not the sum."""
    parts = Parts(dict.fromkeys("ab", 900_000), replicas="auto", objective="latency")
    faster(parts, "a", 9.0)
    assert layers(parts.planner.plans(everybody(parts))) == [["a 0-6"]]


def test_auto_is_once_where_they_can_hold_it_only_together() -> None:
    parts = Parts(dict.fromkeys("ab", 5000), replicas="auto", objective="throughput")
    assert names(parts.planner.plans(everybody(parts))) == [["a", "b"]]


# ------------------------------------------------------------------ by whom


def test_the_layer_map_is_kept() -> None:
    given = {"b": LayerRange(0, 2), "a": LayerRange(2, 6)}
    parts = Parts(dict.fromkeys("ab", 90_000), strategy="custom", layers=given)
    assert layers([parts.planner.plan(everybody(parts))]) == [["b 0-2", "a 2-6"]]
    with pytest.raises(ConfigError, match="'b', which has not joined"):
        parts.planner.plan([parts.worker("a")])


def test_a_fast_machine_has_more_layers() -> None:
    """Three times as fast: five layers take it less than two would take the other one."""
    parts = Parts(dict.fromkeys("ab", 6500), objective="throughput", min_kv_tokens=64)
    parts.planner.kv_tokens = lambda workers: 64  # type: ignore[method-assign]
    faster(parts, "b", 3.0)
    found = {stage.worker: len(stage.layers) for stage in parts.planner.plan(everybody(parts))}
    assert found == {"a": 1, "b": 5}


def test_they_are_ranked_by_the_time_of_a_layer_and_then_by_name() -> None:
    parts = Parts(dict.fromkeys("abc", 5500))
    faster(parts, "c", 2.0)
    machines = Measurements.machines(parts.measurements, everybody(parts))
    ranked = ranked_by_speed(machines, everybody(parts)[::-1])
    assert [worker.id for worker in ranked] == ["c", "a", "b"]


# ------------------------------------------------------------------ with how much room


def test_a_plan_leaves_half_of_the_most_room_there_could_be() -> None:
    """Three layers on each leave (20,000 - 3500) / 3 = 5500 positions; a context is 2048."""
    parts = Parts(dict.fromkeys("ab", 20_000))
    assert parts.planner.kv_tokens(everybody(parts)) == 5500 // 2


def test_a_plan_leaves_room_for_a_whole_context_if_it_can() -> None:
    """(9000 - 3500) / 3 = 1833 positions is all there can be."""
    parts = Parts(dict.fromkeys("ab", 9000))
    assert parts.planner.kv_tokens(everybody(parts)) == 1833


def test_the_least_that_is_wanted_is_no_more_than_a_context() -> None:
    parts = Parts(dict.fromkeys("ab", 4000), min_kv_tokens=9_999)
    assert parts.planner.least_kv_tokens == 2048
    assert parts.planner.kv_tokens(everybody(parts)) == 2048


@pytest.mark.parametrize(("used", "found"), [(0, [["b"]]), (900, [["a", "b"]])])
def test_there_is_room_for_what_is_used_if_there_can_be(used: int, found: list[list[str]]) -> None:
    """b would hold all of it alone, in 10,000 bytes, and leave (10,000 - 6800) / 6 = 533."""
    parts = Parts({"a": 9000, "b": 10_000}, objective="latency")
    faster(parts, "b", 50.0)
    parts.planner.kv_tokens = lambda workers: 64  # type: ignore[method-assign]
    plan = parts.planner.plan(everybody(parts), used_tokens=used)
    assert names([plan]) == found
    assert kv_tokens_of(plan) >= used


def test_if_there_cannot_be_the_least_is_enough() -> None:
    parts = Parts(dict.fromkeys("ab", 4000))
    plan = parts.planner.plan(everybody(parts), used_tokens=1 << 20)
    assert 64 <= kv_tokens_of(plan) < 400


def test_the_plan_of_given_ranges() -> None:
    parts = Parts(dict.fromkeys("ab", 9000))
    plan = parts.planner.plan_of(everybody(parts), ranges_of(("b", 0, 1), ("a", 1, 6)))
    assert [(s.worker, s.weight_bytes, s.kv_tokens) for s in plan] == [
        ("b", 1500, 7500),
        ("a", 5300, 3700 // 5),
    ]
