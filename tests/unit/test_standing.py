"""After a loss, layers stay where they are if the model is served sooner so: in seconds of loading.

A layer takes a second to load, the embedding and the head half a second.
"""

from dataclasses import replace

import pytest

from distributed_llm.common.messages import WorkerHello
from distributed_llm.common.settings import Strategy
from distributed_llm.common.types import PeerId, WorkerId
from distributed_llm.coordinator.events import Study
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.plan import Plan, kv_tokens_of, layer_map_of
from distributed_llm.coordinator.planning.plan_question import PlanQuestion
from distributed_llm.coordinator.planning.planner import Planner
from distributed_llm.coordinator.planning.standing import Standing
from tests.unit.coordinator_parts import Parts, capabilities, ranges_of
from tests.unit.test_planner import machines, planner

SECOND = 400_000_000
COST = ModelCost((SECOND,) * 6, SECOND // 2, SECOND // 2, 0, layer_kv_bytes=(1000,) * 6)
MEMORY = 4 * SECOND
STRATEGIES = pytest.mark.parametrize("strategy", ["memory", "speed"])


def made(strategy: Strategy = "memory") -> Planner:
    return planner(cost=COST, strategy=strategy)


def planned(
    stands: Standing, memory: dict[str, int], strategy: Strategy = "memory", **faster: float
) -> tuple[Plan, float]:
    """Return what is planned, and how many seconds that takes to load."""
    question = PlanQuestion(made(strategy), machines(memory, **faster), standing=stands)
    (plan,) = question.reply().plans
    return plan, stands.load_s(plan)


@STRATEGIES
def test_one_that_is_there_takes_the_place_of_the_lost_one(strategy: Strategy) -> None:
    """Else all others would load layers too, as those are dealt by the names of workers."""
    stands = Standing(ranges_of(("b", 2, 4), ("c", 4, 6)))
    memory = dict.fromkeys("bcd", MEMORY)
    plan, took_s = planned(stands, memory, strategy)
    assert layer_map_of(plan) == ranges_of(("d", 0, 2), ("b", 2, 4), ("c", 4, 6))
    assert took_s == 2.5
    best, _ = planned(Standing(), memory, strategy)
    assert stands.load_s(best) > 3.5


def test_layers_that_have_to_be_together_are_not_parted_for_it() -> None:
    """Layers 3 to 5 are one piece; what stands is from another model."""
    stands = Standing(ranges_of(("c", 0, 3), ("a", 3, 5)))
    together = replace(made(), cost=replace(COST, uncut=(3, 4)))
    question = PlanQuestion(together, machines(dict.fromkeys("ac", 2 * MEMORY)), standing=stands)
    (plan,) = question.reply().plans
    assert plan[1].layers.start in (2, 5)


def test_a_neighbour_takes_the_layers_if_that_is_sooner() -> None:
    """The others keep theirs, whatever they are called."""
    stands = Standing(ranges_of(("c", 0, 3), ("a", 3, 5)))
    memory = dict.fromkeys("ac", MEMORY)
    plan, took_s = planned(stands, memory)
    assert layer_map_of(plan) == ranges_of(("c", 0, 3), ("a", 3, 6))
    assert took_s == 3.5
    best, _ = planned(Standing(), memory)
    assert layer_map_of(best) == ranges_of(("a", 0, 3), ("c", 3, 6))
    assert stands.load_s(best) == 3.5 + 3.5 / 4


def test_how_fast_each_one_loads_is_known() -> None:
    stands = Standing(load_bytes_per_s={WorkerId("a"): SECOND / 10})
    best, took_s = planned(stands, dict.fromkeys("ac", MEMORY))
    assert layer_map_of(best) == ranges_of(("a", 0, 3), ("c", 3, 6))
    assert took_s == 35.0 + 3.5 / 4


def test_all_load_at_once_where_that_is_sooner_than_one_that_loads_much() -> None:
    stands = Standing(ranges_of(("a", 0, 1), ("c", 5, 6)))
    plan, took_s = planned(stands, dict.fromkeys("ac", 2 * MEMORY))
    assert layer_map_of(plan) == ranges_of(("a", 0, 3), ("c", 3, 6))
    assert took_s == 3.5 + 3.5 / 4


def test_what_stands_is_not_kept_if_there_is_less_room_or_speed() -> None:
    stands = Standing(ranges_of(("b", 2, 4), ("c", 4, 6)))
    memory = {"b": MEMORY, "c": MEMORY, "d": 2 * SECOND + SECOND // 2 + 64_000}
    plan, _ = planned(stands, memory)
    best, _ = planned(Standing(), memory)
    assert plan == best
    assert kv_tokens_of(plan) > 10_000
    memory = dict.fromkeys("bcd", 3 * MEMORY)
    plan, _ = planned(stands, memory, "speed", b=9.0)
    assert layer_map_of(plan) == layer_map_of(planned(Standing(), memory, "speed", b=9.0)[0])


def test_weights_get_their_bits_back_though_fewer_are_loaded() -> None:
    half = replace(COST, layer_bytes=(SECOND // 2,) * 6, quantize="int8")
    stands = Standing(ranges_of(("b", 2, 4), ("c", 4, 6)), quantize="int8")
    auto = replace(made(), smaller=(half,), may_shrink=True)
    there = machines(dict.fromkeys("bcd", MEMORY))
    (plan,) = PlanQuestion(auto, there, standing=stands).reply().plans
    assert {stage.quantize for stage in plan} == {"none"}
    assert stands.load_s(plan) > 3.5


def test_who_gets_which_layers_by_strategy_even_is_no_matter_of_chance() -> None:
    stands = Standing(ranges_of(("b", 2, 4), ("c", 4, 6)))
    memory = dict.fromkeys("bcd", MEMORY)
    assert planned(stands, memory, "even")[0] == planned(Standing(), memory, "even")[0]


def test_what_is_still_loaded_after_a_loss_is_part_of_the_question() -> None:
    parts = Parts(dict.fromkeys("abcd", 5000), strategy="memory")
    parts.serve(("a", 0, 2), ("b", 2, 4), ("c", 4, 6))
    lost = parts.registry.remove(PeerId(b"b"))
    assert lost
    (study,) = (a for a in parts.replanning.recover(lost) if isinstance(a, Study))
    assert isinstance(study.question, PlanQuestion)
    assert study.question.standing.layer_map == ranges_of(("a", 0, 2), ("c", 4, 6))


def test_who_connected_anew_has_nothing_loaded() -> None:
    parts = Parts(dict.fromkeys("abc", 5000), strategy="memory")
    parts.serve(("a", 0, 2), ("b", 2, 4), ("c", 4, 6))
    lost = parts.registry.remove(PeerId(b"b"))
    assert lost
    hello = WorkerHello(name="b", instance="new", capabilities=capabilities(5000))
    back = parts.registry.add_worker(PeerId(b"anew"), hello, now=0.0)
    assert back.id == lost.id
    parts.measurements.joined(back.id, back.capabilities)
    (study,) = (a for a in parts.replanning.recover(lost) if isinstance(a, Study))
    assert isinstance(study.question, PlanQuestion)
    assert study.question.standing.layer_map == ranges_of(("a", 0, 2), ("c", 4, 6))
