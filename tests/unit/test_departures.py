"""Workers that are to leave: who may go when, and what those who asked are told."""

from dataclasses import replace

import pytest

from distributed_llm.common.errors import InvalidRequest, NotEnoughMemory, NotReady, WorkerLost
from distributed_llm.common.messages import LoadStage, MayLeave, UndoMove, WorkerDrained
from distributed_llm.common.states import IllegalTransition
from distributed_llm.common.types import PeerId
from distributed_llm.coordinator.cluster.departures import (
    DEPARTURE_STATES,
    DepartureCause,
    DepartureState,
)
from distributed_llm.coordinator.cluster.move import MoveState
from distributed_llm.coordinator.cluster.worker import WorkerState
from distributed_llm.coordinator.events import Action, Send, Study
from distributed_llm.coordinator.planning.plan_question import PlanQuestion
from tests.unit.coordinator_parts import CLIENT, COST, Parts, ready, sent

OTHER = PeerId(b"another client")


def pair(memory: int = 20_000, strategy: str = "even", **memories: int) -> Parts:
    """Return workers a and b that serve half of the model each, and perhaps others."""
    parts = Parts({"a": memory, "b": memory, **memories}, strategy=strategy)
    parts.ask(parts.serve(("a", 0, 3), ("b", 3, 6)), 100)
    return parts


def settle(parts: Parts, now: float = 10.0) -> list[Action]:
    """Do what the core does after every event."""
    actions = [*parts.moves.settle(now=now), *parts.departures.settle(now=now)]
    return parts.answered(actions, now)


def moved(parts: Parts, now: float = 11.0) -> list[Action]:
    """All stages of the move have loaded; it goes on without copying."""
    move = parts.moves.move
    assert move
    for stage in move.new.stages:
        worker = parts.registry.worker(stage.peer)
        assert worker
        parts.moves.stage_ready(worker, ready(move.new.epoch), now=now)
    if move.state is MoveState.COPYING:
        move.copy_timed_out(now=now)
    for stage in move.new.stages:
        move.handed_over(stage.peer)
    return settle(parts, now)


def may_leave(actions: list[Action]) -> list[str]:
    """Return who is told that it may."""
    sends = [action for action in actions if isinstance(action, Send)]
    return [send.peer.decode() for send in sends if isinstance(send.message, MayLeave)]


def answers(actions: list[Action]) -> list[tuple[PeerId, str, str]]:
    """Return which clients are told what of whom."""
    sends = [action for action in actions if isinstance(action, Send)]
    return [
        (send.peer, send.message.worker, send.message.code)
        for send in sends
        if isinstance(send.message, WorkerDrained)
    ]


def gone(parts: Parts, name: str) -> list[Action]:
    """A worker is no longer there."""
    worker = parts.registry.remove(PeerId(name.encode()))
    assert worker
    actions = parts.departures.gone(worker)
    actions += parts.moves.lost(worker, now=12.0)
    return actions + parts.answered(parts.replanning.recover(worker))


# ------------------------------------------------------------------ who may go


def test_a_worker_without_layers_may_leave_at_once_and_is_told_so_once() -> None:
    parts = pair(c=100)
    assert sent(parts.departures.drain(CLIENT, "c")) == []
    assert parts.worker("c").leaving
    assert may_leave(settle(parts)) == ["c"]
    assert settle(parts) == []
    assert answers(gone(parts, "c")) == [(CLIENT, "c", "")]


def test_a_worker_that_may_leave_and_is_still_there_is_told_again() -> None:
    """Nothing else would have it leave, and it is given no layers any more."""
    parts = pair(c=100)
    parts.departures.drain(CLIENT, "c")
    assert parts.departures.still_there(parts.worker("c")) == []
    (told,) = settle(parts)
    assert parts.departures.still_there(parts.worker("c")) == [told]
    assert parts.departures.still_there(parts.worker("b")) == []
    parts.departures.validate()


def test_a_worker_that_serves_may_leave_once_others_have_its_layers() -> None:
    parts = pair()
    assert sent(parts.departures.drain(CLIENT, "b")) == []
    actions = settle(parts)
    assert [a.peer for a in actions if isinstance(a, Send)] == [b"a"]
    assert parts.moves.move
    assert parts.moves.move.copies
    assert "worker b is to leave" in parts.event_log.entries[-1].text
    assert settle(parts) == [], "it waits for the move"
    assert may_leave(moved(parts)) == ["b"]
    assert parts.pipelines.all[0].layers_text == "a 1-6"


def test_everybody_who_asked_is_told() -> None:
    parts = pair()
    for client in (CLIENT, OTHER):
        parts.departures.drain(client, "b")
    settle(parts)
    moved(parts)
    assert answers(gone(parts, "b")) == [(CLIENT, "b", ""), (OTHER, "b", "")]


def test_two_may_leave_at_once() -> None:
    """The second one would have layers after the move of the first: that is undone."""
    parts = pair(c=20_000)
    parts.departures.leave(parts.worker("a"))
    settle(parts)
    assert parts.moves.move
    parts.departures.leave(parts.worker("b"))
    actions = settle(parts)
    assert any(isinstance(a, Send) and isinstance(a.message, UndoMove) for a in actions)
    assert parts.moves.move
    assert parts.moves.move.new.layers_text == "c 1-6"
    assert may_leave(moved(parts)) == ["a", "b"]


def test_a_worker_that_takes_over_just_now_is_waited_for() -> None:
    parts = pair(c=20_000)
    parts.departures.leave(parts.worker("a"))
    settle(parts)
    move = parts.moves.move
    assert move
    for stage in move.new.stages:
        parts.moves.stage_ready(parts.worker(stage.worker), ready(2), now=11.0)
    move.copy_timed_out(now=11.0)
    assert move.state is MoveState.HANDOVER
    parts.departures.leave(parts.worker("b"))
    assert settle(parts) == []
    assert parts.moves.move is move


def test_one_that_only_loads_for_a_move_may_leave() -> None:
    parts = pair(c=20_000)
    parts.departures.leave(parts.worker("a"))
    settle(parts)
    parts.departures.leave(parts.worker("c"))
    settle(parts)
    assert may_leave(settle(parts)) == ["c"]
    assert parts.moves.move
    assert parts.moves.move.new.layers_text == "b 1-6"


# ------------------------------------------------------------------ when nobody can take over


def test_a_client_is_told_why_a_worker_cannot_leave() -> None:
    parts = pair(memory=5000)
    assert sent(parts.departures.drain(CLIENT, "b")) == []
    assert answers(settle(parts)) == [(CLIENT, "b", NotEnoughMemory.code)]
    assert not parts.worker("b").leaving
    assert settle(parts) == []


def test_the_last_worker_cannot_be_drained() -> None:
    parts = Parts({"a": 20_000})
    parts.serve(("a", 0, 6))
    assert sent(parts.departures.drain(CLIENT, "a")) == []
    actions = settle(parts)
    assert answers(actions) == [(CLIENT, "a", NotReady.code)]
    action = actions[-1]
    assert isinstance(action, Send)
    assert isinstance(action.message, WorkerDrained)
    assert action.message.message == "Nobody but a can serve the model. Add a worker first."


@pytest.mark.parametrize("alone", [False, True])
def test_its_pipeline_just_ends_where_another_one_serves(alone: bool) -> None:
    parts = Parts(dict.fromkeys("abcd", 20000 if alone else 5000), replicas=2)
    both = (
        [(("a", 0, 6),), (("b", 0, 6),)]
        if alone
        else [
            (("a", 0, 3), ("c", 3, 6)),
            (("b", 0, 3), ("d", 3, 6)),
        ]
    )
    for name in "cd":
        parts.worker(name).leaving = alone
    first, second = (parts.serve(*ranges) for ranges in both)
    parts.ask(first, 100)
    assert sent(parts.departures.drain(CLIENT, "a")) == []
    settle(parts)
    assert parts.pipelines.all == [second]
    assert parts.book.num_waiting == 1
    assert may_leave(settle(parts)) == ["a"]


def test_nobody_who_is_not_there_is_drained() -> None:
    parts = pair()
    (action,) = parts.departures.drain(CLIENT, "nobody" * 20)
    assert answers([action]) == [(CLIENT, ("nobody" * 20)[:64], InvalidRequest.code)]
    assert isinstance(action, Send)
    assert isinstance(action.message, WorkerDrained)
    assert action.message.message.endswith("Workers: a, b.")


def test_a_worker_that_wants_to_end_does_though_nobody_can_have_its_layers() -> None:
    parts = pair(memory=5000)
    parts.departures.leave(parts.worker("b"))
    actions = settle(parts)
    assert may_leave(actions) == ["b"]
    assert "cannot hand its layers over" in parts.event_log.entries[-1].text
    assert settle(parts) == [], "told once"


@pytest.mark.parametrize("wants", [False, True])
def test_who_could_have_its_layers_is_lost_meanwhile(wants: bool) -> None:
    """A worker that only clients want to leave stays; one that wants to end goes."""
    parts = pair(memory=5000, c=5000)
    assert sent(parts.departures.drain(CLIENT, "b")) == []
    if wants:
        parts.departures.leave(parts.worker("b"))
    settle(parts)
    assert parts.moves.move
    gone(parts, "c")
    actions = settle(parts)
    assert may_leave(actions) == (["b"] if wants else [])
    assert answers(actions) == ([] if wants else [(CLIENT, "b", NotEnoughMemory.code)])
    assert parts.worker("b").leaving == wants
    if not wants:
        parts.departures.drain(CLIENT, "b")
        assert answers(settle(parts)) == [(CLIENT, "b", NotEnoughMemory.code)], "asked again"
    assert answers(gone(parts, "b")) == ([(CLIENT, "b", "")] if wants else [])


def test_one_that_is_lost_before_others_have_its_layers_was_not_drained() -> None:
    parts = pair()
    parts.departures.drain(CLIENT, "b")
    settle(parts)
    assert answers(gone(parts, "b")) == [(CLIENT, "b", WorkerLost.code)]


def test_one_that_wanted_to_end_and_is_gone_has_left() -> None:
    parts = pair()
    parts.departures.drain(CLIENT, "b")
    parts.departures.leave(parts.worker("b"))
    settle(parts)
    assert answers(gone(parts, "b")) == [(CLIENT, "b", "")]


@pytest.mark.parametrize(("new_tokens", "served_by"), [(20, 1), (700, 2)])
def test_the_others_have_room_for_what_an_answer_may_take(new_tokens: int, served_by: int) -> None:
    """One of them alone is quickest, and leaves (11,000 - 6800) / 6 = 700 positions."""
    parts = Parts(dict.fromkeys("abc", 11_000), kv_tokens=64, objective="latency")
    parts.ask(parts.serve(("a", 0, 3), ("b", 3, 6)), 100, new_tokens)
    parts.departures.leave(parts.worker("a"))
    settle(parts)
    assert parts.moves.move
    assert len(parts.moves.move.new.stages) == served_by
    assert parts.moves.move.new.kv_tokens >= 100 + new_tokens


def test_nobody_is_told_of_a_worker_that_nobody_asked_for() -> None:
    parts = pair()
    assert parts.departures.gone(parts.worker("a")) == []


# ------------------------------------------------------------------ moves that fail


def test_tried_once_with_and_once_without_the_cache_and_then_given_up() -> None:
    parts = pair()
    parts.departures.leave(parts.worker("b"))
    for copies in (True, False):
        settle(parts)
        assert parts.moves.move
        assert parts.moves.move.copies == copies
        parts.moves.undo("a test", now=11.0)
    actions = settle(parts)
    assert parts.moves.move is None
    loads = [a.message for a in actions if isinstance(a, Send) and isinstance(a.message, LoadStage)]
    assert [load.beside for load in loads] == [None]
    assert parts.book.num_waiting == 1, "its answer waits for the new stage"
    assert may_leave(settle(parts)) == ["b"]


def test_without_room_for_both_the_layers_are_loaded_anew() -> None:
    """a can hold the model with one block of KV cache, but two are used."""
    parts = pair(memory=6800 + 6 * 127)
    parts.departures.leave(parts.worker("b"))
    settle(parts)
    assert parts.moves.move is None
    assert parts.pipelines.all[0].layers_text == "a 1-6"
    assert parts.worker("a").state is WorkerState.LOADING


def test_layers_that_are_loading_are_loaded_by_others() -> None:
    parts = Parts({"a": 20_000, "b": 20_000})
    parts.pipelines.load([parts.plan(("a", 0, 3), ("b", 3, 6))])
    parts.departures.leave(parts.worker("b"))
    settle(parts)
    assert parts.moves.move is None
    assert parts.pipelines.all[0].layers_text == "a 1-6"
    assert may_leave(settle(parts)) == ["b"]


def test_a_worker_that_says_it_twice_leaves_once() -> None:
    parts = pair(c=100)
    for _ in range(2):
        parts.departures.leave(parts.worker("c"))
    assert may_leave(settle(parts)) == ["c"]


# ------------------------------------------------------------------ while a plan is made


def asked(parts: Parts, actions: list[Action]) -> PlanQuestion:
    """Return the question about a plan without a worker."""
    (study,) = (action for action in actions if isinstance(action, Study))
    assert isinstance(study.question, PlanQuestion)
    assert study.question.leaving is not None
    return study.question


def test_a_plan_without_it_is_asked_for_once() -> None:
    parts = pair()
    parts.departures.leave(parts.worker("b"))
    question = asked(parts, parts.departures.settle(now=10.0))
    assert question.leaving == "b"
    assert list(question.machines.memory_bytes) == ["a"]
    assert parts.departures.settle(now=10.1) == []
    parts.departures.validate()


def test_a_move_that_began_meanwhile_is_waited_for_and_it_is_planned_anew() -> None:
    parts = pair(c=20_000)
    parts.departures.leave(parts.worker("b"))
    question = asked(parts, parts.departures.settle(now=10.0))
    pipeline, plan = parts.pipelines.all[0], parts.plan(("a", 0, 2), ("b", 2, 6))
    price = parts.moves.prices.price(pipeline, plan)
    parts.moves.begin(pipeline, plan, price, why="it is better", now=10.0)
    assert parts.departures.planned(question.reply(), now=10.1) == []
    actions = parts.departures.settle(now=10.2)
    assert any(isinstance(a, Send) and isinstance(a.message, UndoMove) for a in actions)
    assert asked(parts, actions) is not question


def test_a_plan_with_somebody_who_has_left_is_made_anew() -> None:
    parts = pair(c=20_000)
    parts.departures.leave(parts.worker("b"))
    question = asked(parts, parts.departures.settle(now=10.0))
    parts.registry.remove(PeerId(b"c"))
    assert parts.departures.planned(question.reply(), now=10.1) == []
    assert list(asked(parts, parts.departures.settle(now=10.2)).machines.memory_bytes) == ["a"]


def test_that_nobody_can_is_asked_again_if_somebody_came() -> None:
    parts = pair(memory=5000)
    parts.departures.drain(CLIENT, "b")
    question = asked(parts, parts.departures.settle(now=10.0))
    parts.join("c", 5000)
    assert parts.departures.planned(question.reply(), now=10.1) == []
    settle(parts)
    assert parts.moves.move


def test_that_nobody_can_with_these_bits_is_asked_again_once_requests_have_nowhere_else_to_go() -> (
    None
):
    """Until then they would go on in the other pipeline, with the same weights."""
    half = replace(COST, layer_bytes=(500,) * 6, quantize="int8")
    parts = Parts(dict.fromkeys("abcd", 5000), strategy="even", replicas=2, smaller=(half,))
    parts.ask(parts.serve(("a", 0, 3), ("b", 3, 6)), 100)
    spare = parts.serve(("c", 0, 3), ("d", 3, 6))
    parts.departures.drain(CLIENT, "b")
    question = asked(parts, parts.departures.settle(now=10.0))
    parts.pipelines.dissolve(spare)
    for peer in (b"c", b"d"):
        parts.registry.remove(PeerId(peer))
    assert parts.departures.planned(question.reply(), now=10.1) == []
    settle(parts)
    (pipeline,) = parts.pipelines.all
    assert (pipeline.layers_text, pipeline.quantize) == ("a 1-6", "int8")


def test_an_answer_for_a_worker_that_is_gone_changes_nothing() -> None:
    parts = pair()
    parts.departures.leave(parts.worker("b"))
    question = asked(parts, parts.departures.settle(now=10.0))
    gone(parts, "b")
    assert parts.departures.planned(question.reply(), now=10.1) == []


def test_a_worker_that_was_let_go_or_stays_is_in_no_other_state() -> None:
    for state in (DepartureState.DISMISSED, DepartureState.REFUSED):
        assert not any(DEPARTURE_STATES.allows(state, cause) for cause in DepartureCause)
    with pytest.raises(IllegalTransition, match="MOVE_BEGAN cannot happen while WAITING"):
        DEPARTURE_STATES.after(DepartureState.WAITING, DepartureCause.MOVE_BEGAN)
