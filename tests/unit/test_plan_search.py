"""Which better plans a search finds for a pipeline."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from distributed_llm.common.types import Epoch, LayerRange, WorkerId
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.planning.forecast import forecast
from distributed_llm.coordinator.planning.plan_search import MAX_IDLE, PlanSearch, SearchResult
from distributed_llm.coordinator.planning.planner import Planner
from distributed_llm.coordinator.speeds.demand import Demand
from distributed_llm.coordinator.speeds.links import LinkSpeeds
from distributed_llm.coordinator.speeds.machines import Machines
from distributed_llm.coordinator.speeds.worker_speed import Prior, WorkerSpeed

COST = ModelCost(
    (1000,) * 6, first_bytes=500, last_bytes=300, shared_bytes=0, layer_kv_bytes=(1,) * 6
)
A, B, C = WorkerId("a"), WorkerId("b"), WorkerId("c")


def machines(memory: Mapping[WorkerId, int]) -> Machines:
    """Return machines that are alike but for their memory in bytes."""
    speeds = {worker: WorkerSpeed(Prior(1e-3, 1e-5, 0, 0, 0, 0)) for worker in memory}
    return Machines(memory, speeds, LinkSpeeds(bytes_per_token=16).links)


@dataclass(frozen=True)
class Roomy(Planner):
    """A planner with a fixed room for KV cache.

    Attributes:
        room: for KV cache, positions.
        spare_room: likewise, for plans of c alone.
        asked: the workers that it was asked about.
    """

    room: int = 64
    spare_room: int = 64
    asked: list[set[WorkerId]] = field(default_factory=list)

    def kv_tokens(self, memory: Mapping[WorkerId, int]) -> int:
        """Return the fixed room."""
        self.asked.append(set(memory))
        return self.spare_room if set(memory) == {C} else self.room


def planner(*, least: int = 64, spare_room: int = 64) -> Roomy:
    return Roomy(COST, "speed", "throughput", {}, 1, 2048, least, spare_room=spare_room)


def search(*, memory: int = 9000, **changes: Any) -> PlanSearch:
    """Return a search for a pipeline of a and b, which have `memory` bytes; c is idle."""
    usual = PlanSearch(
        epoch=Epoch(1),
        planner=planner(),
        layer_map=((A, LayerRange(0, 5)), (B, LayerRange(5, 6))),
        machines=machines({A: memory, B: memory, C: 9000}),
        idle=(C,),
        hanging=frozenset(),
        demand=Demand.expected(3),
        objective="throughput",
        needed_tokens=64,
        beside_tokens_per_s=0.0,
        advise=False,
    )
    return replace(usual, **changes)


def result_of(*, memory: int = 9000, **changes: Any) -> SearchResult:
    return search(memory=memory, **changes).reply()


def test_the_served_plan_is_forecast_too() -> None:
    asked = search()
    result = asked.reply()
    assert result.search is asked
    assert result.served == forecast(COST, asked.machines, asked.layer_map, asked.demand)
    assert result.served.layer_map == asked.layer_map


def test_the_best_plan_is_of_all_and_better() -> None:
    """Three machines that are alike have two layers each, where one had five."""
    result = result_of()
    assert result.best
    assert sorted(len(held) for _, held in result.best.layer_map) == [2, 2, 2]
    assert result.best.full_tokens_per_s > 1.1 * result.served.full_tokens_per_s


def test_the_best_plan_has_the_room_that_is_asked_for() -> None:
    """c with 9000 bytes could do all of it; two of 4000 cannot with more than 166 positions."""
    room = (4000 - 3500) // 3
    pair = machines({A: 4000, B: 4000})
    for needed, fits in ((room, True), (room + 1, False)):
        assert (result_of(machines=pair, idle=(), needed_tokens=needed).best is not None) == fits


def test_extra_is_what_idle_workers_do_by_themselves() -> None:
    extra = result_of().extra
    assert extra
    assert extra.layer_map == ((C, LayerRange(0, 6)),)


@pytest.mark.parametrize(("kv_tokens", "fits"), [((9000 - 6800) // 6, True), (367, False)])
def test_extra_has_room_of_its_own(kv_tokens: int, fits: bool) -> None:
    result = result_of(planner=planner(spare_room=kv_tokens))
    assert (result.extra is not None) == fits
    assert result.best, "it is not asked for so much"


def test_nobody_idle_is_no_extra() -> None:
    assert result_of(idle=()).extra is None


def test_advice_is_given_if_it_is_asked_for() -> None:
    assert result_of().advice == {}
    assert set(result_of(advise=True).advice) == {A, B, C}


def test_no_advice_where_nothing_fits() -> None:
    result = result_of(advise=True, needed_tokens=1 << 30)
    assert result.best is None
    assert result.advice == {}


def test_advice_counts_what_other_pipelines_give() -> None:
    alone, beside = (
        result_of(advise=True, beside_tokens_per_s=more).advice for more in (0.0, 1000.0)
    )
    for worker, advice in alone.items():
        assert beside[worker].with_tokens_per_s == pytest.approx(advice.with_tokens_per_s + 1000.0)


def test_advice_without_a_machine_may_do_with_less_room() -> None:
    """Two of them have room for 3250 positions only if all three serve."""
    room = (9000 - 2500) // 2
    little = result_of(advise=True, needed_tokens=room).advice
    strict = result_of(advise=True, needed_tokens=room, planner=planner(least=room)).advice
    assert strict[A].gain is None
    assert little[A].gain is not None


def test_who_hangs_gives_no_room() -> None:
    made = planner()
    result_of(planner=made, hanging=frozenset({B}))
    assert made.asked == [{A, C}, {C}]


def test_only_the_fastest_without_layers_are_looked_at() -> None:
    names = [WorkerId(f"idle-{number}") for number in range(MAX_IDLE + 2)]
    some = machines(dict.fromkeys([A, B, *names], 9000))
    quick = names[-1]
    some = replace(some, speeds={**some.speeds, quick: WorkerSpeed(Prior(1e-4, 1e-6, 0, 0, 0, 0))})
    made = planner()
    result_of(planner=made, machines=some, idle=tuple(names), advise=False)
    spare = made.asked[-1]
    assert len(spare) == MAX_IDLE
    assert quick in spare
    assert made.asked[0] == {A, B, *spare}
