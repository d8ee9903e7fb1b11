"""When workers that joined are used: at once, when nothing is asked, or by who seeks speed."""

from collections.abc import Sequence
from dataclasses import replace

from distributed_llm.coordinator.cluster.newcomers import Newcomers
from distributed_llm.coordinator.events import Action, Study
from distributed_llm.coordinator.planning.plan_question import PlanQuestion
from tests.unit.coordinator_parts import COST, Parts
from tests.unit.test_moves import begun, moving
from tests.unit.test_replanning import HALF, WHOLE, layers, notices, serving


def newcomers(parts: Parts) -> Newcomers:
    return Newcomers(parts.cluster, parts.replanning, parts.moves)


def joined(parts: Parts, name: str, memory: int = HALF) -> Newcomers:
    """Another worker joins at 5 s; return what sees to that."""
    parts.join(name, memory)
    parts.replanning.joined(now=5.0)
    return newcomers(parts)


def twins(strategy: str) -> Parts:
    """Return workers a and b that serve half of the model each; another pipeline is wanted."""
    parts = Parts({"a": HALF, "b": HALF}, strategy=strategy, replicas=2)
    parts.serve(("a", 0, 3), ("b", 3, 6))
    return parts


def asked(actions: Sequence[Action]) -> list[list[str]]:
    """Return the workers of each question about plans."""
    return [
        sorted(action.question.machines.memory_bytes)
        for action in actions
        if isinstance(action, Study) and isinstance(action.question, PlanQuestion)
    ]


def test_the_first_plan_waits_until_nobody_joins_any_more() -> None:
    parts = Parts({"a": HALF}, strategy="even")
    new = joined(parts, "b")
    due = new.next_deadline()
    assert due is not None
    assert due == 5.0 + parts.cluster.settings.settle_s
    assert new.settle() == []
    assert new.on_timer(now=due - 0.01) == []
    parts.replanning.joined(now=due - 0.01)  # one more
    assert new.on_timer(now=due) == []
    assert asked(new.on_timer(now=due + 10)) == [["a", "b"]]
    assert new.next_deadline() is None


def test_all_are_planned_for_while_nothing_is_asked() -> None:
    parts = serving()
    new = joined(parts, "c")
    assert asked(new.on_timer(now=99.0)) == [["a", "b", "c"]]


def test_while_requests_run_newcomers_wait_and_are_told() -> None:
    parts = serving()
    parts.ask(parts.pipelines.all[0], 100)
    new = joined(parts, "c")
    told = new.on_timer(now=99.0)
    assert asked(told) == []
    assert "once no request runs" in notices(told)["c"]
    assert new.next_deadline() is None
    assert new.settle() == []
    (answer,) = parts.book._schedulers
    parts.book.cancel(*answer.request.key[:2])
    assert asked(new.settle()) == [["a", "b", "c"]]
    assert new.settle() == []


def test_a_pipeline_that_is_missing_is_added_while_requests_run() -> None:
    parts = twins("even")
    parts.ask(parts.pipelines.all[0], 100)
    new = joined(parts, "c", WHOLE)
    actions = new.on_timer(now=99.0)
    assert asked(actions) == [["c"]]
    parts.answered(actions)
    assert layers(parts) == ["a 1-3, b 4-6", "c 1-6"]


def test_who_cannot_serve_alone_waits_until_no_request_is_under_way() -> None:
    parts = twins("even")
    parts.ask(parts.pipelines.all[0], 100)
    new = joined(parts, "c")
    parts.answered(new.on_timer(now=99.0))
    assert layers(parts) == ["a 1-3, b 4-6"]
    assert asked(new.settle()) == []


def test_nothing_is_planned_anew_while_layers_move() -> None:
    parts = moving(strategy="even")
    begun(parts)
    new = joined(parts, "d")
    assert new.on_timer(now=99.0) == []
    assert new.next_deadline() is None
    assert parts.replanning.replan_when_idle


def test_who_seeks_speed_is_left_to_find_out_whether_newcomers_make_it_faster() -> None:
    parts = serving(strategy="speed")
    new = joined(parts, "c")
    assert new.on_timer(now=99.0) == []
    assert new.settle() == []
    assert (new.next_deadline(), parts.replanning.replan_when_idle) == (None, False)


def test_who_seeks_speed_adds_a_pipeline_that_is_missing() -> None:
    parts = twins("speed")
    new = joined(parts, "c", WHOLE)
    assert asked(new.on_timer(now=99.0)) == [["c"]]


def test_weights_that_shrank_may_get_more_bits_once_no_layers_move() -> None:
    half = replace(COST, layer_bytes=(500,) * 6, quantize="int8")
    parts = Parts({"a": HALF}, strategy="speed", smaller=(half,))
    parts.serve(("a", 0, 6))
    parts.answered(parts.replanning.recover(parts.worker("a")))
    (pipeline,) = parts.pipelines.all
    assert pipeline.quantize == "int8"
    new = joined(parts, "c", WHOLE)
    assert asked(new.on_timer(now=99.0)) == [["a", "c"]]


def test_weights_get_more_bits_once_layers_have_moved() -> None:
    parts = moving(strategy="speed")
    begun(parts)
    more = replace(parts.cost, quantize="int8")
    parts.replanning._planner = replace(
        parts.planner, cost=more, smaller=(parts.cost,), may_shrink=True
    )
    new = joined(parts, "d")
    assert new.on_timer(now=99.0) == []
    assert parts.replanning.replan_when_idle
