"""What a survey asks, and what its findings are."""

from typing import Any

import pytest

from distributed_llm.common.types import LayerRange, WorkerId
from distributed_llm.coordinator.planning.forecast import forecast
from distributed_llm.coordinator.planning.plan_search import PlanSearch
from distributed_llm.coordinator.speeds.demand import Demand
from tests.unit.coordinator_parts import COST, Parts, ranges_of


def survey(parts: Parts, **changes: Any) -> PlanSearch:
    """Return a survey of a pipeline of a and b; c is idle."""
    given = {
        "epoch": 1,
        "cost": COST,
        "layer_map": ranges_of(("a", 0, 5), ("b", 5, 6)),
        "machines": parts.measurements.machines(parts.registry.workers),
        "idle": (parts.worker("c").id,),
        "demand": Demand.expected(3),
        "goal": "throughput",
        "kv_tokens": 64,
        "extra_kv_tokens": 64,
        "least_kv_tokens": 64,
        "beside_tokens_per_s": 0.0,
        "advise": False,
    }
    return PlanSearch(**{**given, **changes})


def three(*, memory: int = 9000) -> Parts:
    return Parts({"a": memory, "b": memory, "c": 9000})


def test_now_is_the_plan_of_the_survey() -> None:
    asked = survey(three())
    found = asked.carry_out()
    assert found.survey is asked
    assert found.now == forecast(COST, asked.machines, asked.layer_map, asked.demand)
    assert found.now.layer_map == asked.layer_map


def test_the_best_plan_is_of_all_and_better() -> None:
    """Three machines that are alike have two layers each, where one had five."""
    found = survey(three()).carry_out()
    assert found.best
    assert sorted(len(held) for _, held in found.best.layer_map) == [2, 2, 2]
    assert found.best.full_tokens_per_s > 1.1 * found.now.full_tokens_per_s


def test_the_best_plan_has_the_room_that_is_asked_for() -> None:
    """c with 9000 bytes could do all of it; two of 4000 cannot with more than 233 positions."""
    parts = three(memory=4000)
    room = (4000 - 3500) // 3
    pair = parts.measurements.machines([parts.worker("a"), parts.worker("b")])
    for kv_tokens, fits in ((room, True), (room + 1, False)):
        found = survey(parts, machines=pair, idle=(), kv_tokens=kv_tokens).carry_out()
        assert (found.best is not None) == fits


def test_extra_is_what_idle_workers_do_by_themselves() -> None:
    found = survey(three()).carry_out()
    assert found.extra
    assert found.extra.layer_map == (("c", LayerRange(0, 6)),)


@pytest.mark.parametrize(("kv_tokens", "fits"), [((9000 - 6800) // 6, True), (367, False)])
def test_extra_has_room_of_its_own(kv_tokens: int, fits: bool) -> None:
    found = survey(three(), extra_kv_tokens=kv_tokens).carry_out()
    assert (found.extra is not None) == fits
    assert found.best, "it is not asked for so much"


def test_nobody_idle_is_no_extra() -> None:
    assert survey(three(), idle=()).carry_out().extra is None


def test_advice_is_given_if_it_is_asked_for() -> None:
    assert survey(three()).carry_out().advice == {}
    assert set(survey(three(), advise=True).carry_out().advice) == {"a", "b", "c"}


def test_no_advice_where_nothing_fits() -> None:
    found = survey(three(), advise=True, kv_tokens=1 << 30).carry_out()
    assert found.best is None
    assert found.advice == {}


def test_advice_counts_what_other_pipelines_give() -> None:
    alone, beside = (
        survey(three(), advise=True, beside_tokens_per_s=more).carry_out().advice
        for more in (0.0, 1000.0)
    )
    for worker, advice in alone.items():
        assert beside[worker].with_tokens_per_s == pytest.approx(advice.with_tokens_per_s + 1000.0)


def test_advice_without_a_machine_may_do_with_less_room() -> None:
    """Two of them have room for 1000 positions only if all three serve."""
    room = (9000 - 2500) // 2
    little = survey(three(), advise=True, kv_tokens=room, least_kv_tokens=64).carry_out().advice
    strict = survey(three(), advise=True, kv_tokens=room, least_kv_tokens=room).carry_out().advice
    assert strict[WorkerId("a")].gain is None
    assert little[WorkerId("a")].gain is not None
