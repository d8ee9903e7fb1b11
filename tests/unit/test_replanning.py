"""Plans that are made while the cluster goes on: what counts, what is asked again, what is told."""

from collections.abc import Sequence
from typing import Any

import pytest

from distributed_llm.common.errors import DistributedLLMError, NotReady
from distributed_llm.common.messages import (
    DropStage,
    LoadStage,
    Notice,
    RequestFailed,
    StageFailed,
)
from distributed_llm.common.types import Epoch, LayerRange, PeerId
from distributed_llm.coordinator.cluster.worker import WorkerState
from distributed_llm.coordinator.events import Action, Send, Stop, Study
from distributed_llm.coordinator.planning.plan_question import PlanQuestion, PlanReply
from tests.unit.coordinator_parts import Parts, ready, sent

WHOLE = 20_000
"""Bytes in which the model fits."""
HALF = 5_000
"""Bytes in which half of it does."""


def question_of(actions: Sequence[Action]) -> PlanQuestion:
    """Return the question that is asked, the only one."""
    (study,) = (action for action in actions if isinstance(action, Study))
    assert isinstance(study.question, PlanQuestion)
    return study.question


def asked(actions: Sequence[Action]) -> list[str]:
    """Return which workers are asked about."""
    return sorted(question_of(actions).machines.memory_bytes)


def answered(parts: Parts, question: PlanQuestion, *, moving: bool = False) -> list[Action]:
    return parts.replanning.replied(question.reply(), moving=moving)


def notices(actions: Sequence[Action]) -> dict[str, str]:
    """Return what workers are told, by name."""
    return {
        action.peer.decode(): action.message.text
        for action in actions
        if isinstance(action, Send) and isinstance(action.message, Notice)
    }


def layers(parts: Parts) -> list[str]:
    return [
        ", ".join(f"{worker} {held}" for worker, held in pipeline.layer_map)
        for pipeline in parts.pipelines.all
    ]


def serving(memory: int = HALF, strategy: str = "even", **memories: int) -> Parts:
    """Return workers a and b that serve half of the model each, and perhaps others."""
    parts = Parts({"a": memory, "b": memory, **memories}, strategy=strategy)
    parts.serve(("a", 0, 3), ("b", 3, 6))
    return parts


def remove(parts: Parts, name: str) -> list[Action]:
    """A worker is no longer there."""
    worker = parts.registry.remove(PeerId(name.encode()))
    assert worker
    return parts.replanning.recover(worker)


# ------------------------------------------------------------------ nothing is planned on the loop


def test_the_first_plan_is_asked_for_and_loaded_when_it_is_made() -> None:
    parts = Parts({"a": HALF, "b": HALF}, strategy="even")
    actions = parts.replanning.plan_anew()
    assert asked(actions) == ["a", "b"]
    assert parts.replanning.busy
    assert parts.pipelines.state == "waiting", "requests are still refused"
    loads = answered(parts, question_of(actions))
    assert sent(loads) == [("b", LoadStage), ("a", LoadStage)]
    assert (parts.pipelines.state, parts.replanning.busy) == ("loading", False)


def test_while_a_lost_pipeline_is_planned_anew_its_answers_wait() -> None:
    parts = serving(c=HALF)
    parts.ask(parts.pipelines.all[0], 100)
    actions = remove(parts, "b")
    assert asked(actions) == ["a", "c"]
    assert sent(actions) == []
    assert parts.pipelines.state == "loading", "nobody is refused"
    assert parts.book.num_waiting == 1
    answered(parts, question_of(actions))
    assert layers(parts) == ["a 1-3, c 4-6"]


# ------------------------------------------------------------------ answers that come too late


def test_a_plan_with_somebody_who_has_left_is_asked_for_again() -> None:
    parts = Parts({"a": HALF, "b": HALF, "c": HALF}, strategy="even")
    first = question_of(parts.replanning.plan_anew())
    parts.registry.remove(PeerId(b"b"))
    again = answered(parts, first)
    assert asked(again) == ["a", "c"]
    answered(parts, question_of(again))
    assert layers(parts) == ["a 1-3, c 4-6"]


def test_that_nobody_can_hold_the_model_is_asked_again_if_somebody_came() -> None:
    parts = serving()
    first = question_of(remove(parts, "b"))
    parts.join("c", HALF)
    again = answered(parts, first)
    assert asked(again) == ["a", "c"]
    assert parts.pipelines.recovering
    answered(parts, question_of(again))
    assert layers(parts) == ["a 1-3, c 4-6"]
    assert not parts.pipelines.recovering


def test_a_plan_for_those_that_are_left_counts_although_somebody_came() -> None:
    parts = Parts({"a": HALF, "b": HALF}, strategy="even")
    first = question_of(parts.replanning.plan_anew())
    parts.join("c", HALF)
    assert sent(answered(parts, first)) == [
        ("b", LoadStage),
        ("a", LoadStage),
        ("c", Notice),
    ]


def test_a_second_loss_is_planned_for_once_the_first_is() -> None:
    """c and d serve too, and d is lost while a plan for a and e is made."""
    parts = Parts(dict.fromkeys("abcde", HALF), strategy="even", replicas=2)
    parts.serve(("a", 0, 3), ("b", 3, 6))
    parts.serve(("c", 0, 3), ("d", 3, 6))
    first = question_of(remove(parts, "b"))
    assert remove(parts, "d") == [], "one question at a time"
    second = answered(parts, first)
    assert layers(parts) == ["a 1-3, e 4-6"]
    assert asked(second) == ["c"]
    assert parts.pipelines.recovering
    actions = answered(parts, question_of(second))
    assert "the model is still served by 1 pipeline" in parts.event_log.entries[-1].text
    assert not any(isinstance(action, Study) for action in actions)
    assert not parts.pipelines.recovering


def test_what_was_lost_is_planned_before_what_would_be_nice() -> None:
    parts = Parts(dict.fromkeys("abcdef", HALF), strategy="even", replicas=3)
    parts.serve(("a", 0, 3), ("b", 3, 6))
    first = question_of(parts.replanning.add_pipeline())
    assert parts.replanning.plan_anew() == []
    assert remove(parts, "b") == []
    second = answered(parts, first)
    assert len(parts.pipelines.all) == 1
    assert asked(second) == ["a"], "all workers are planned for later"


def test_a_plan_for_all_workers_recovers_what_was_lost_meanwhile() -> None:
    parts = serving(c=WHOLE)
    question = question_of(parts.replanning.plan_anew())
    assert remove(parts, "b") == []
    assert parts.pipelines.recovering
    plan = PlanReply(question, plans=(parts.plan(("c", 0, 6)),))
    orders = sent(parts.replanning.replied(plan, moving=False))
    assert orders == [("a", DropStage), ("c", LoadStage), ("a", Notice)]
    assert (parts.replanning.busy, parts.pipelines.recovering) == (False, False)


def test_plans_for_all_workers_wait_for_requests_that_came_meanwhile() -> None:
    parts = serving(WHOLE, c=WHOLE)
    first = question_of(parts.replanning.plan_anew())
    parts.ask(parts.pipelines.all[0], 100)
    assert answered(parts, first) == []
    assert layers(parts) == ["a 1-3, b 4-6"]
    assert parts.replanning.replan_when_idle


def test_plans_for_all_workers_wait_for_a_move() -> None:
    parts = serving(WHOLE, c=WHOLE)
    first = question_of(parts.replanning.plan_anew())
    assert answered(parts, first, moving=True) == []
    assert parts.replanning.replan_when_idle


def test_what_is_planned_as_it_is_stays() -> None:
    parts = serving(WHOLE)
    before = parts.pipelines.all
    assert sent(answered(parts, question_of(parts.replanning.plan_anew()))) == []
    assert parts.pipelines.all == before


# ------------------------------------------------------------------ nobody can hold it


def test_without_anybody_who_can_hold_it_requests_fail_and_layers_are_freed() -> None:
    parts = serving(strategy="memory")
    parts.ask(parts.pipelines.all[0], 100)
    actions = answered(parts, question_of(remove(parts, "b")))
    assert sorted(sent(actions), key=str) == [
        ("a", DropStage),
        ("a", Notice),
        ("client", RequestFailed),
    ]
    assert parts.pipelines.state == "waiting"
    assert "are missing" in parts.pipelines.note
    assert parts.event_log.entries[-1].text.startswith("waiting: ")


def test_a_plan_that_cannot_be_bettered_stays() -> None:
    parts = serving()
    parts.worker("a").leaving = True
    answered(parts, question_of(parts.replanning.plan_anew()))
    assert layers(parts) == ["a 1-3, b 4-6"]
    assert parts.event_log.entries[-1].text.startswith("layers stay as they are: ")


def test_a_worker_that_no_plan_fits_is_told_why() -> None:
    parts = serving(strategy="even")
    parts.join("tiny", 1)
    actions = answered(parts, question_of(parts.replanning.plan_anew()))
    assert layers(parts) == ["a 1-3, b 4-6"]
    assert list(notices(actions)) == ["tiny"]
    assert notices(actions)["tiny"].startswith("no layers: Worker tiny would hold layers ")


def test_another_pipeline_that_does_not_fit_is_not_mentioned() -> None:
    parts = serving(c=100)
    before = parts.event_log.entries
    assert answered(parts, question_of(parts.replanning.add_pipeline())) == []
    assert parts.event_log.entries == before


def test_so_many_have_to_join_before_the_first_plan() -> None:
    parts = Parts({"a": WHOLE}, strategy="even", min_workers=2)
    assert notices(parts.replanning.plan_anew()) == {
        "a": "waiting: 1 of 2 workers can serve so far."
    }
    assert parts.pipelines.note.startswith("1 of 2 workers can serve so far. Start the others")
    assert parts.replanning.plan_anew() == [], "it was told"
    parts.join("b", WHOLE)
    assert asked(parts.replanning.plan_anew()) == ["a", "b"]


# ------------------------------------------------------------------ stages that cannot be loaded


def test_a_worker_that_cannot_load_is_planned_without() -> None:
    parts = Parts({"a": HALF, "b": HALF, "c": HALF}, strategy="even")
    parts.pipelines.load([parts.plan(("a", 0, 3), ("b", 3, 6))])
    failed = StageFailed(epoch=Epoch(1), code="stage_error", message="no room")
    actions = parts.replanning.stage_failed(parts.worker("b"), failed, now=1.0)
    assert parts.worker("b").state is WorkerState.UNFIT
    assert asked(actions) == ["a", "c"]
    answered(parts, question_of(actions))
    assert layers(parts) == ["a 1-3, c 4-6"]


@pytest.mark.parametrize(("others", "planned"), [("ac", "a 1-3, c 4-6"), ("a", "a 1-3, b 4-6")])
def test_who_failed_before_is_given_layers_only_if_the_others_cannot_hold_them(
    others: str, planned: str
) -> None:
    parts = Parts(dict.fromkeys([*others, "b", "lost"], HALF), strategy="even")
    parts.serve(("a", 0, 3), ("lost", 3, 6))
    parts.worker("b").failures = 1
    question = question_of(remove(parts, "lost"))
    assert question.doubted == {"b"}
    answered(parts, question)
    assert layers(parts) == [planned]


def test_plans_for_all_workers_are_for_those_that_failed_before_too() -> None:
    parts = Parts({"a": HALF, "b": HALF, "c": HALF}, strategy="even")
    parts.worker("b").failures = 1
    answered(parts, question_of(parts.replanning.plan_anew()))
    assert layers(parts) == ["a 1-2, b 3-4, c 5-6"]


def test_a_model_that_cannot_be_split_stops_the_coordinator() -> None:
    parts = Parts({"a": WHOLE})
    parts.pipelines.load([parts.plan(("a", 0, 6))])
    failed = StageFailed(epoch=Epoch(1), code="unsupported_model", message="it differs")
    actions = parts.replanning.stage_failed(parts.worker("a"), failed, now=1.0)
    assert [type(action) for action in actions if isinstance(action, Stop)] == [Stop]


def test_a_joiner_that_cannot_split_the_model_stops_nobody() -> None:
    """An older release may lack what the others have."""
    parts = serving(WHOLE)
    parts.join("old", WHOLE)
    parts.pipelines.load([parts.plan(("old", 0, 6))])
    failed = StageFailed(epoch=Epoch(2), code="unsupported_model", message="it differs")
    for name in ("a", "b"):
        parts.worker(name).leaving = True
    actions = parts.replanning.stage_failed(parts.worker("old"), failed, now=1.0)
    assert not [action for action in actions if isinstance(action, Stop)]
    assert parts.worker("old").state is WorkerState.UNFIT
    assert layers(parts) == ["a 1-3, b 4-6"]


def test_all_who_cannot_load_the_same_plan_are_known() -> None:
    parts = Parts({"a": HALF, "b": HALF}, strategy="even")
    parts.pipelines.load([parts.plan(("a", 0, 3), ("b", 3, 6))])
    failed = StageFailed(epoch=Epoch(1), code="unsupported_model", message="it differs")
    first = parts.replanning.stage_failed(parts.worker("a"), failed, now=1.0)
    assert not [action for action in first if isinstance(action, Stop)], "b may do it"
    second = parts.replanning.stage_failed(parts.worker("b"), failed, now=1.0)
    assert [action for action in second if isinstance(action, Stop)]
    assert {parts.worker(name).state for name in "ab"} == {WorkerState.UNFIT}


@pytest.mark.parametrize("epoch", [0, 2])
def test_a_failure_of_another_plan_changes_nothing(epoch: int) -> None:
    parts = serving()
    failed = StageFailed(epoch=Epoch(epoch), code="stage_error", message="no room")
    assert parts.replanning.stage_failed(parts.worker("b"), failed, now=1.0) == []
    assert layers(parts) == ["a 1-3, b 4-6"]


def test_why_the_last_worker_failed_is_told_to_whoever_asks() -> None:
    parts = Parts({"a": WHOLE}, strategy="even")
    parts.pipelines.load([parts.plan(("a", 0, 6))])
    failed = StageFailed(epoch=Epoch(1), code="checkpoint", message="model.safetensors is damaged.")
    answered(parts, question_of(parts.replanning.stage_failed(parts.worker("a"), failed, now=1.0)))
    why = "Worker a cannot serve layers 1-6: model.safetensors is damaged."
    assert parts.pipelines.note == (
        "1 worker is connected (a), but none can be given layers; `dllm status` shows why. "
        f"Start another one with `dllm worker`. {why}"
    )
    remove(parts, "a")  # it ends over it
    parts.replanning.left_waiting(now=10.0)
    assert parts.pipelines.note == f"No worker is there. Start one with `dllm worker`. {why}"
    parts.join("b", WHOLE)
    answered(parts, question_of(parts.replanning.plan_anew()))
    parts.pipelines.stage_ready(parts.worker("b"), ready(parts.pipelines.all[0].epoch))
    assert (parts.pipelines.state, parts.pipelines.last_failure) == ("serving", "")


def test_who_is_there_is_said_anew_when_one_of_several_leaves() -> None:
    parts = Parts({"a": 100, "b": 100}, strategy="memory")
    answered(parts, question_of(parts.replanning.plan_anew()))
    assert "(a 100 bytes, b 100 bytes)" in parts.pipelines.note
    remove(parts, "b")
    parts.replanning.left_waiting(now=10.0)
    assert parts.replanning.replan_at == 10.5
    answered(parts, question_of(parts.replanning.plan_anew()))
    assert "(a 100 bytes)" in parts.pipelines.note


def test_a_long_reason_is_cut() -> None:
    parts = Parts({"a": WHOLE}, strategy="even")
    parts.pipelines.load([parts.plan(("a", 0, 6))])
    failed = StageFailed(epoch=Epoch(1), code="checkpoint", message="x" * 9000)
    answered(parts, question_of(parts.replanning.stage_failed(parts.worker("a"), failed, now=1.0)))
    assert len(parts.pipelines.note) < 4096


def test_a_worker_that_was_lost_is_part_of_why_nobody_serves() -> None:
    parts = serving(strategy="even")
    worker = parts.registry.remove(PeerId(b"b"))
    assert worker
    actions = answered(
        parts, question_of(parts.replanning.recover(worker, "was lost: it fell silent"))
    )
    assert "Worker b was lost: it fell silent." in parts.pipelines.note
    assert list(notices(actions)) == ["a"]
    assert notices(actions)["a"].startswith("no layers yet: Worker a would hold layers 1-6, which")


def test_while_one_pipeline_serves_nobody_says_that_no_worker_is_there() -> None:
    parts = Parts({"a": WHOLE, "b": WHOLE}, strategy="even", replicas=2)
    parts.serve(("a", 0, 6))
    parts.serve(("b", 0, 6))
    answered(parts, question_of(remove(parts, "b")))
    assert parts.event_log.entries[-1].text == (
        "worker b serves its layers no longer; the model is still served by 1 pipeline"
    )


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            {"strategy": "custom", "layers": {"a": LayerRange(0, 6)}},
            "no layers: the setting `layers` does not name this worker",
        ),
        ({"strategy": "memory"}, "no layers: with strategy memory, others serve all of them"),
    ],
)
def test_a_worker_that_is_left_out_is_told_why_once(given: dict[str, Any], told: str) -> None:
    parts = Parts({"a": WHOLE, "b": 10}, **given)
    first = answered(parts, question_of(parts.replanning.plan_anew()))
    assert notices(first) == {"b": told}
    assert notices(answered(parts, question_of(parts.replanning.plan_anew()))) == {}


# ------------------------------------------------------------------ a bug in planning


def test_a_plan_that_cannot_be_made_for_a_bug_is_told_like_any_other() -> None:
    parts = serving()
    question = question_of(remove(parts, "b"))
    broken = PlanReply(question, error=DistributedLLMError("a bug"))
    parts.replanning.replied(broken, moving=False)
    assert parts.pipelines.state == "waiting"
    assert parts.pipelines.note == "a bug"


def test_nobody_there_is_no_plan() -> None:
    answer = question_of(Parts({}).replanning.add_pipeline()).reply()
    assert isinstance(answer.error, NotReady)


def test_while_a_plan_is_made_nobody_is_said_to_be_missing() -> None:
    parts = Parts({"pc": WHOLE, "mac": WHOLE}, strategy="even")
    assert parts.pipelines.note == "No worker has joined yet. Start one with `dllm worker`."
    parts.replanning.joined(now=0.0)
    assert "shared out; joined so far: 2 workers. Ask again in a moment." in parts.pipelines.note
    assert parts.replanning.replan_at == parts.cluster.settings.settle_s
    parts.answered(parts.replanning.plan_anew())
    assert parts.pipelines.note == ""
    parts.replanning.joined(now=1.0)
    assert parts.pipelines.note == "", "it is served"
