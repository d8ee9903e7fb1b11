"""When better plans are searched for a pipeline, and what follows from what is found."""

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from distributed_llm.common.messages import LoadStage, Notice
from distributed_llm.common.types import KV_BLOCK, PeerId, WorkerId
from distributed_llm.coordinator.cluster.balancer import Alternative
from distributed_llm.coordinator.cluster.worker import WorkerState
from distributed_llm.coordinator.events import Action, Send, Study
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.partition.tables import Partition
from distributed_llm.coordinator.planning.advice import Advice
from distributed_llm.coordinator.planning.forecast import Forecast
from distributed_llm.coordinator.planning.plan_question import PlanQuestion, PlanReply
from distributed_llm.coordinator.planning.plan_search import PlanSearch, SearchResult
from distributed_llm.coordinator.serving.pipeline import Pipeline
from distributed_llm.coordinator.speeds.demand import Demand, DemandMeter
from tests.unit.coordinator_parts import COST, Parts, ranges_of, ready

Held = tuple[str, int, int]


def serving(**given: Any) -> Parts:
    """Return workers a and b that serve half of the model each; c and d are idle."""
    parts = Parts(dict.fromkeys("abcd", 90_000), **given)
    parts.serve(("a", 0, 3), ("b", 3, 6))
    parts.rebalancing.wake(now=10.0)
    return parts


def pipeline_of(parts: Parts) -> Pipeline:
    return parts.pipelines.all[0]


def asked(parts: Parts, now: float, *, quiet: bool = False) -> PlanSearch | None:
    """Return the search that is wanted now, if one is.

    Args:
        quiet: no step has ended since the last one; otherwise one has, in every pipeline.
    """
    for pipeline in () if quiet else parts.pipelines.all:
        parts.rebalancing._lineage(pipeline).observed_at = now
    actions = parts.rebalancing.on_timer(now=now)
    assert len(actions) <= 1
    for action in actions:
        assert isinstance(action, Study)
        assert isinstance(action.question, PlanSearch)
        return action.question
    return None


def expected(rate: float, *ranges: Held) -> Forecast:
    partition = Partition(ranges_of(*ranges), 1 / rate, 1 / rate)
    return Forecast(rate, 1, partition, 0.0, rate, rate)


def result(
    search: PlanSearch,
    best: Forecast | None = None,
    extra: Forecast | None = None,
    **advice: Advice,
) -> SearchResult:
    """Return a result by which the served plan gives ten tokens per second."""
    served = expected(10.0, ("a", 0, 3), ("b", 3, 6))
    return SearchResult(search, served, best, extra, {WorkerId(k): v for k, v in advice.items()})


def question_of(actions: list[Action]) -> PlanQuestion:
    (study,) = (action for action in actions if isinstance(action, Study))
    assert isinstance(study.question, PlanQuestion)
    return study.question


def loads(actions: list[Action]) -> list[str]:
    sends = [action for action in actions if isinstance(action, Send)]
    return sorted(send.peer.decode() for send in sends if isinstance(send.message, LoadStage))


BETTER = expected(20.0, ("a", 0, 2), ("b", 2, 6))


def confirmed(parts: Parts, best: Forecast, now: float = 11.0) -> list[Action]:
    """Have a plan found twice, long enough apart."""
    first = asked(parts, now)
    assert first
    assert parts.rebalancing.search_done(result(first, best), now=now) == []
    second = asked(parts, now + 2.0)
    assert second
    return parts.rebalancing.search_done(result(second, best), now=now + 2.0)


# ------------------------------------------------------------------ when it searches


def test_searches_every_second_while_something_is_served() -> None:
    parts = serving()
    assert parts.rebalancing.next_deadline() == 11.0
    assert asked(parts, 10.9) is None
    search = asked(parts, 11.0)
    assert search
    assert parts.rebalancing.next_deadline() == 12.0
    assert asked(parts, 12.0) is None, "the search is not done"
    parts.rebalancing.search_done(result(search), now=12.5)
    assert asked(parts, 13.0)
    parts.rebalancing.search_failed()
    assert asked(parts, 14.0)


def test_does_not_search_while_nothing_is_served() -> None:
    parts = Parts({"a": 90_000})
    assert parts.rebalancing.next_deadline() is None
    parts.rebalancing.wake(now=10.0)
    assert asked(parts, 11.0) is None
    assert parts.rebalancing.next_deadline() is None
    parts.serve(("a", 0, 6))
    parts.rebalancing.wake(now=20.0)
    assert parts.rebalancing.next_deadline() == 21.0


@pytest.mark.parametrize("strategy", ["memory", "even"])
def test_never_searches_under_other_strategies(strategy: str) -> None:
    parts = serving(strategy=strategy)
    assert parts.rebalancing.next_deadline() is None


def test_does_not_search_during_a_move_nor_soon_after_one_was_undone() -> None:
    parts = serving()
    confirmed(parts, BETTER)
    assert parts.moves.move
    assert asked(parts, 14.0) is None
    parts.moves.undo("a test", now=15.0)
    assert asked(parts, 24.9) is None
    assert asked(parts, 26.0)


@pytest.mark.parametrize(("failures", "wait_s"), [(0, 0), (1, 10), (2, 30), (6, 630), (60, 630)])
def test_waits_longer_after_each_move_that_is_undone(failures: int, wait_s: float) -> None:
    parts = serving()
    parts.moves.failures, parts.moves.undone_at = failures, 100.0
    if wait_s:
        assert asked(parts, 100.0 + wait_s - 0.1) is None
    parts.rebalancing._next_at = 0.0
    assert asked(parts, 100.0 + wait_s)


def test_does_not_search_while_plans_are_made_for_who_came_or_left() -> None:
    parts = serving()
    actions = parts.replanning.add_pipeline()
    assert parts.replanning.busy
    assert asked(parts, 11.0) is None
    parts.replanning.replied(PlanReply(question_of(actions)), moving=False)
    assert asked(parts, 12.0)


def test_what_a_search_found_waits_for_plans_that_are_made() -> None:
    """Those plans may be for the same workers."""
    parts = serving()
    first = asked(parts, 11.0)
    assert first
    parts.rebalancing.search_done(result(first, BETTER), now=11.0)
    second = asked(parts, 13.0)
    assert second
    parts.replanning.add_pipeline()
    assert parts.rebalancing.search_done(result(second, BETTER), now=13.0) == []
    assert parts.moves.move is None


def test_nothing_is_asked_again_while_nothing_was_asked_for_and_nobody_came() -> None:
    parts = serving()
    for name in "cd":
        parts.worker(name).fail("no room", now=0.0)
    search = asked(parts, 11.0, quiet=True)
    assert search
    parts.rebalancing.search_done(result(search), now=11.1)
    assert asked(parts, 12.0, quiet=True) is None
    assert asked(parts, 99.0, quiet=True) is None, "no better links help either"
    parts.join("e", 90_000)
    assert asked(parts, 100.0, quiet=True)


def test_a_quiet_pipeline_is_looked_at_as_often_as_advice_is_due() -> None:
    """Links may have become faster, and idle workers worth having."""
    parts = serving()
    ask_for_one(parts, pipeline_of(parts))
    looked = []
    for second in range(11, 35):
        search = asked(parts, float(second), quiet=True)
        if search:
            looked.append(second)
            parts.rebalancing.search_done(result(search), now=second + 0.1)
    assert looked == [11, 21, 31]


def test_a_better_plan_is_confirmed_although_it_is_quiet() -> None:
    parts = serving()
    search = asked(parts, 11.0, quiet=True)
    assert search
    parts.rebalancing.search_done(result(search, BETTER), now=11.1)
    assert asked(parts, 12.0, quiet=True)


def test_plans_are_searched_for_one_pipeline_after_the_other() -> None:
    parts = serving(replicas=2)
    parts.serve(("c", 0, 3), ("d", 3, 6))
    epochs = []
    for second in range(4):
        search = asked(parts, 11.0 + second, quiet=True)
        if search:
            epochs.append(search.epoch)
            parts.rebalancing.search_done(result(search), now=11.1 + second)
    assert epochs == [1, 2, 1], "once more, for advice that knows what the other is worth"


def test_a_pipeline_somebody_is_to_leave_is_left_alone() -> None:
    parts = serving()
    parts.worker("a").leaving = True
    assert asked(parts, 11.0) is None


# ------------------------------------------------------------------ what it asks


def test_what_a_search_is_about() -> None:
    parts = serving(objective="latency")
    parts.worker("d").leaving = True
    search = asked(parts, 11.0)
    assert search
    assert search.layer_map == ranges_of(("a", 0, 3), ("b", 3, 6))
    assert search.idle == ("c",)
    assert sorted(search.machines.memory_bytes) == ["a", "b", "c"]
    assert search.demand == Demand.expected(3)
    assert search.objective == "latency"
    assert search.planner == parts.planner.only("none")
    assert search.needed_tokens == 0
    assert search.hanging == set()


def test_a_plan_must_have_room_for_what_an_answer_may_take() -> None:
    parts = serving()
    parts.ask(pipeline_of(parts), 100, new_tokens=900)
    search = asked(parts, 11.0)
    assert search
    assert search.needed_tokens == 1024, "in whole blocks"


KEEPS_STATES = replace(COST, layer_state_bytes=(100,) * 6)
SEES_LITTLE = replace(COST, windows=(64, 64, 64, 64, 64, 0))


def serve_as_told(parts: Parts, *ranges: Held) -> Pipeline:
    """Return a pipeline that serves, whose stages tell what their layers keep."""
    parts.pipelines.load([parts.plan(*ranges)])
    pipeline = pipeline_of(parts)
    for stage in pipeline.plan:
        kept = parts.cost.kept_by(stage.layers, stage.kv_tokens)
        told = msgspec.structs.replace(
            ready(pipeline.epoch, load_s=0.0),
            kv_tokens=kept.tokens,
            kv_token_bytes=kept.token_bytes,
            kv_window=kept.window,
            kv_windowed_bytes=kept.windowed_bytes,
        )
        parts.pipelines.stage_ready(parts.worker(stage.worker), told)
    assert pipeline.in_flight
    return pipeline


@pytest.mark.parametrize("share", [1, 2])
@pytest.mark.parametrize("cost", [COST, KEEPS_STATES, SEES_LITTLE], ids=["", "states", "windows"])
def test_who_fits_alone_needs_what_there_is_and_no_more(cost: ModelCost, share: int) -> None:
    """With states it is more than its positions; with windows less, so other plans have room."""
    parts = Parts({"a": 6500, "b": 6300}, cost, max_batch_tokens=64)
    pipeline = serve_as_told(parts, ("a", 0, 3), ("b", 3, 6))
    length = min(pipeline.longest_tokens, 1920) // share
    parts.ask(pipeline, 10, new_tokens=length - 10)
    needed, windows = parts.cluster.needed_tokens(pipeline), pipeline.kv_windows
    assert windows.longest(needed) >= length > windows.longest(needed - KV_BLOCK)
    assert needed <= pipeline.kv_tokens


@pytest.mark.parametrize("room", [512, 576])
def test_a_plan_without_room_for_what_it_is_to_serve_is_not_moved_to(room: int) -> None:
    """A search knows what requests need by the prices of another plan."""
    parts = Parts({"a": 90_000, "b": 4300 + 4 * room}, KEEPS_STATES)
    pipeline = serve_as_told(parts, ("a", 0, 3), ("b", 3, 6))
    parts.rebalancing.wake(now=10.0)
    parts.ask(pipeline, 100, new_tokens=200)
    assert bool(loads(confirmed(parts, BETTER))) == (room == 576), "5 blocks, and 2 for each state"


def test_a_search_knows_who_hangs() -> None:
    parts = serving()
    parts.worker("b").progress_age_s = 1e6
    search = asked(parts, 11.0)
    assert search
    assert search.hanging == {"b"}


class Asked(DemandMeter):
    """Somebody has asked for something."""

    @property
    def demand(self) -> Demand:
        """One sequence."""
        return Demand(1.0, 100.0, 0.0, 1.0)


def ask_for_one(parts: Parts, pipeline: Pipeline) -> None:
    parts.rebalancing._lineage(pipeline).demand = Asked()


@pytest.mark.parametrize("objective", ["auto", "latency"])
def test_what_was_asked_for_is_planned_for(objective: str) -> None:
    parts = serving(objective=objective)
    ask_for_one(parts, pipeline_of(parts))
    search = asked(parts, 11.0)
    assert search
    assert (search.demand.sequences, search.objective) == (1.0, objective)


def test_a_search_knows_what_other_pipelines_give() -> None:
    parts = serving(replicas=2)
    parts.serve(("c", 0, 3), ("d", 3, 6))
    for pipeline in parts.pipelines.all:
        ask_for_one(parts, pipeline)
    beside = []
    for second in range(4):
        search = asked(parts, 11.0 + second)
        assert search
        beside.append((search.epoch, search.beside_tokens_per_s))
        parts.rebalancing.search_done(result(search), now=11.1 + second)
    assert beside == [(1, 0.0), (2, 10.0), (1, 10.0), (2, 10.0)]


def test_advice_is_asked_for_now_and_then_and_when_somebody_came() -> None:
    parts = serving()
    wanted = {}
    for second in range(11, 25):
        if second == 14:
            parts.join("e", 90_000)
        search = asked(parts, float(second))
        assert search
        wanted[second] = search.advise
        parts.rebalancing.search_done(result(search), now=second + 0.1)
    assert [second for second, advise in wanted.items() if advise] == [11, 14, 24]


def test_advice_is_kept_for_those_that_are_there() -> None:
    parts = serving()
    search = asked(parts, 11.0)
    assert search
    one, other = Advice(0.1, 2.0, 1.0, "helps"), Advice(0.2, 2.0, 1.0, "helps")
    parts.rebalancing.search_done(result(search, a=one, b=one, gone=one), now=11.1)
    parts.rebalancing.search_done(result(search, b=other), now=12.1)
    assert parts.rebalancing.advice == {"a": one, "b": other}


def test_advice_waits_until_it_is_known_what_others_are_worth() -> None:
    """Two workers serve the whole model each: neither is needed, whatever is known of the other."""
    parts = Parts(dict.fromkeys("ab", 90_000), replicas=2)
    parts.serve(("a", 0, 6))
    parts.serve(("b", 0, 6))
    parts.rebalancing.wake(now=10.0)
    told = []
    for second in range(3):
        search = asked(parts, 11.0 + second, quiet=True)
        assert search
        told.append((search.epoch, search.advise, search.beside_tokens_per_s > 0))
        parts.rebalancing.search_done(search.reply(), now=11.1 + second)
    assert told == [(1, False, False), (2, True, True), (1, True, True)]
    texts = [advice.text for advice in parts.rebalancing.advice.values()]
    assert len(texts) == 2
    assert all("others go on without it" in text for text in texts)


def test_advice_is_void_once_other_pipelines_serve() -> None:
    parts = serving(replicas=2)
    search = asked(parts, 11.0)
    assert search
    needed = Advice(None, 2.0, None, "needed: without it the model does not fit")
    parts.rebalancing.search_done(result(search, a=needed), now=11.1)
    assert parts.rebalancing.advice == {"a": needed}
    late = asked(parts, 12.0)
    assert late
    parts.serve(("c", 0, 3), ("d", 3, 6))
    assert parts.rebalancing.advice == {}
    parts.rebalancing.search_done(result(late, a=needed), now=12.1)
    assert parts.rebalancing.advice == {}, "it was asked for before"


def test_a_worker_that_is_left_out_is_told_why() -> None:
    parts = serving()
    search = asked(parts, 11.0)
    assert search
    slow = Advice(-0.5, 1.0, 2.0, "left out: it is slow")
    actions = parts.rebalancing.search_done(result(search, c=slow), now=11.1)
    assert Send(PeerId(b"c"), Notice(text="no layers: it is slow")) in actions


# ------------------------------------------------------------------ what follows


def test_a_better_plan_is_moved_to_once_it_was_confirmed() -> None:
    parts = serving()
    assert loads(confirmed(parts, BETTER)) == ["a", "b"]
    assert parts.moves.move
    assert parts.moves.move.new.layer_map == BETTER.layer_map
    assert parts.event_log.entries[-1].text.endswith(
        "because this should be 2.0 times as fast under load"
    )
    layer_map = ranges_of(("a", 0, 1), ("b", 1, 6))
    again = Alternative(layer_map, gain=0.1, uncertainty=0.0, standstill_s=0.0, measured=True)
    assert (
        parts.rebalancing._lineage(pipeline_of(parts)).balancer.consider(again, now=13.0).what
        == "stay"
    ), "so soon"


@pytest.mark.parametrize(
    "best",
    [None, expected(99.0, ("a", 0, 3), ("b", 3, 6)), expected(10.3, ("a", 0, 2), ("b", 2, 6))],
)
def test_no_plan_or_the_same_or_one_hardly_better_changes_nothing(best: Forecast | None) -> None:
    parts = serving()
    for second in range(11, 20):
        search = asked(parts, float(second))
        assert search
        assert parts.rebalancing.search_done(result(search, best), now=second + 0.1) == []


def test_what_cannot_be_loaded_beside_is_loaded_in_its_place() -> None:
    """a and c hold 3500 bytes each; the other three layers do not fit beside them in a."""
    parts = Parts({"a": 3500 + 3 * 400, "b": 4800, "c": 4800})
    pipeline = parts.serve(("a", 0, 3), ("b", 3, 6))
    parts.rebalancing.wake(now=10.0)
    actions = confirmed(parts, expected(99.0, ("c", 0, 3), ("a", 3, 6)))
    assert loads(actions) == ["a", "c"]
    assert parts.moves.move is None
    assert parts.pipelines.all[0].lineage == pipeline.lineage
    assert parts.worker("a").state is WorkerState.LOADING


def test_a_result_for_a_plan_that_is_gone_changes_nothing() -> None:
    parts = serving()
    search = asked(parts, 11.0)
    assert search
    parts.answered(parts.replanning.recover(parts.worker("a")))
    assert parts.rebalancing.search_done(result(search, BETTER), now=99.0) == []
    assert parts.rebalancing.advice == {}


@pytest.mark.parametrize("state", ["leaving", "unfit", "hangs", "gone"])
def test_a_plan_with_somebody_who_cannot_be_had_any_more_is_not_taken(state: str) -> None:
    parts = serving()
    best = expected(99.0, ("a", 0, 2), ("c", 2, 6))
    first = asked(parts, 11.0)
    assert first
    parts.rebalancing.search_done(result(first, best), now=11.0)
    second = asked(parts, 13.0)
    assert second
    match state:
        case "leaving":
            parts.worker("c").leaving = True
        case "unfit":
            parts.worker("c").fail("no room", now=0.0)
        case "hangs":
            parts.worker("c").progress_age_s = 1e6
        case _:
            parts.registry.remove(PeerId(b"c"))
    assert parts.rebalancing.search_done(result(second, best), now=13.0) == []


@pytest.mark.parametrize("as_extra", [False, True])
def test_workers_that_have_layers_by_now_are_not_taken_away(as_extra: bool) -> None:
    parts = serving(replicas=3)
    first = asked(parts, 11.0)
    assert first
    best = None if as_extra else expected(99.0, ("a", 0, 2), ("c", 2, 6))
    extra = expected(99.0, ("c", 0, 6)) if as_extra else None
    if not as_extra:
        parts.rebalancing.search_done(result(first, best), now=11.0)
        first = asked(parts, 13.0)
        assert first
    other = parts.serve(("c", 0, 3), ("d", 3, 6))
    assert parts.rebalancing.search_done(result(first, best, extra), now=13.0) == []
    assert parts.pipelines.pipeline_of(PeerId(b"c")) is other
    parts.goes_on()


# ------------------------------------------------------------------ once more


def adds(parts: Parts, extra: Forecast, best: Forecast | None = None) -> bool:
    """Return whether idle workers begin to serve the model by themselves."""
    search = asked(parts, 11.0)
    assert search
    parts.rebalancing.search_done(result(search, best, extra), now=11.1)
    return len(parts.pipelines.all) > 1


@pytest.mark.parametrize(("replicas", "more"), [(1, False), (2, True)])
def test_idle_workers_serve_too_if_so_many_are_wanted(replicas: int, more: bool) -> None:
    slow = expected(0.01, ("c", 0, 3), ("d", 3, 6))
    assert adds(serving(replicas=replicas), slow) == more


@pytest.mark.parametrize(("rate", "more"), [(2.0, True), (1.9, False)])
def test_a_pipeline_that_is_far_slower_is_not_added(rate: float, more: bool) -> None:
    """It has to be a fifth as fast as the one that serves."""
    extra = expected(rate, ("c", 0, 6))
    assert adds(serving(replicas="auto", objective="throughput"), extra) == more


@pytest.mark.parametrize(("rate", "more"), [(20.6, True), (20.7, False)])
def test_a_longer_pipeline_is_preferred_if_it_is_faster_than_both(rate: float, more: bool) -> None:
    """Two of ten tokens per second are as good as one of twenty, or a little more."""
    longer = expected(rate, ("a", 0, 2), ("b", 2, 4), ("c", 4, 6))
    parts = serving(replicas="auto", objective="throughput")
    assert adds(parts, expected(10.0, ("c", 0, 6)), longer) == more


def test_for_latency_another_pipeline_takes_nothing_away() -> None:
    longer = expected(99.0, ("a", 0, 2), ("b", 2, 4), ("c", 4, 6))
    parts = serving(replicas="auto", objective="latency")
    assert adds(parts, expected(10.0, ("c", 0, 6)), longer)


@pytest.mark.parametrize(("gain", "moves"), [(0.23, False), (0.25, True)])
def test_an_uncertain_gain_has_to_be_larger(gain: float, moves: bool) -> None:
    """Tasks are 50 % off, so a mean 10 %: twice that and the least gain have to be exceeded."""
    parts = serving()
    doubts = {"a": 0.0, "b": 0.5, "c": 9.0}
    parts.measurements.doubt = doubts.__getitem__  # type: ignore[method-assign, assignment]
    confirmed(parts, expected(10.0 * (1 + gain), ("a", 0, 2), ("b", 2, 6)))
    assert (parts.moves.move is not None) == moves
