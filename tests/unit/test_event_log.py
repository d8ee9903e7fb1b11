"""Events as facts: their texts, their bounds, and the stories they make."""

from collections import Counter
from string import Formatter
from typing import Any

import pytest

from distributed_llm.common.types import Epoch, LayerRange, WorkerId
from distributed_llm.coordinator.events import Log
from distributed_llm.coordinator.serving.event_log import (
    MAX_EVENTS,
    MAX_REQUEST_EVENTS,
    Entry,
    EventKind,
    EventLog,
)
from tests.grammar import faults_of

A, B = WorkerId("a"), WorkerId("b")
MAP = ((A, LayerRange(0, 2)), (B, LayerRange(2, 6)))

FACTS = {
    "machine": "mac",
    "role": "worker",
    "memory_bytes": 8 << 30,
    "earlier": WorkerId("a-2"),
    "device": "cpu",
    "why": "it is so",
    "rtt_s": 0.0034,
    "stall_s": 2.5,
    "layer_map": MAP,
    "before": ((A, LayerRange(0, 6)),),
    "how": "",
    "layers": LayerRange(0, 2),
    "load_s": 1.25,
    "fetched_bytes": 3 << 30,
    "fetch_s": 2.5,
    "room": "640 tokens of context",
    "pipelines": 2,
    "took_s": 3.0,
    "stood_still": (0.12, 0.01),
    "answers": 1,
    "prompt_tokens": 7,
    "choice": 0,
    "code": "stage_error",
    "answer_tokens": 20,
    "pause_s": 300.0,
    "names": "num_beams",
    "what": "drop_stage",
    "form": "int8",
    "earlier_form": "bfloat16",
    "workers": "a and b",
    "read_s": 0.8,
    "nbytes": 3 << 30,
    "full": 6 << 30,
}
"""A value for every fact that a template may name."""


@pytest.mark.parametrize("kind", EventKind)
def test_every_kind_has_a_text_of_facts(kind: EventKind) -> None:
    fields = {name for _, name, _, _ in Formatter().parse(kind.template) if name}
    facts = {name: FACTS[name] for name in fields & set(FACTS)}
    assert fields <= {"worker", "request", "epoch", *FACTS}
    text = Entry(0.0, kind, A, "r1", Epoch(3), facts).text
    assert text
    assert faults_of(text) == []


ONES = {"pipelines": 1, "answers": 1, "prompt_tokens": 1, "answer_tokens": 1}
HUGE = dict.fromkeys(ONES, 9_677_888)


@pytest.mark.parametrize("kind", EventKind)
@pytest.mark.parametrize("counts", [ONES, HUGE], ids=["one", "many"])
def test_grammar_and_units(kind: EventKind, counts: dict[str, int]) -> None:
    nothing_ran = {"stood_still": None, "why": ""}
    text = Entry(0.0, kind, A, "r1", Epoch(3), {**FACTS, **counts, **nothing_ran}).text
    assert faults_of(text) == []


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (EventKind.WORKER_JOINED, "worker a joined: 8.0 GiB on cpu"),
        (
            EventKind.LINK_DIRECT,
            "worker a sends its results to the next one directly (3.4 ms)",
        ),
        (EventKind.PLAN_LOADING, "loading plan 3: layers 1-2 of 6 on a, 3-6 on b"),
        (EventKind.STAGE_LOADED, "worker a loaded layers 1-2 in 1.2 s"),
        (
            EventKind.MOVE_COMMITTED,
            "serving plan 3: layers moved in 3.0 s; requests stood still for 120 ms, 10 ms of "
            "it to hand over",
        ),
    ],
)
def test_units_are_those_that_people_read(kind: EventKind, text: str) -> None:
    assert Entry(0.0, kind, A, None, Epoch(3), FACTS).text == text


def test_an_event_is_kept_and_logged_with_its_level() -> None:
    log = EventLog()
    log.now = 5.0
    action = log.note(EventKind.WAITING, why="nobody is there")
    assert action == Log("waiting: nobody is there", "warning", "waiting")
    assert log.entries == (
        Entry(5.0, EventKind.WAITING, facts={"why": "nobody is there"}, number=1),
    )
    assert log.entries[0].text == "waiting: nobody is there"


def test_a_fact_that_is_missing_is_a_bug() -> None:
    with pytest.raises(KeyError):
        EventLog().note(EventKind.PLAN_SERVING, epoch=Epoch(1))


def test_it_is_bounded_and_requests_do_not_push_out_the_cluster() -> None:
    log = EventLog()
    log.note(EventKind.WORKER_LEFT, worker=A, why="said goodbye")
    for number in range(MAX_REQUEST_EVENTS + 5):
        log.trace(EventKind.REQUEST_ARRIVED, f"r{number}", answers=1)
    assert [entry.kind for entry in log.entries] == [EventKind.WORKER_LEFT]
    assert log.story(request="r4") == []
    assert len(log.story(request="r5")) == 1
    for number in range(MAX_EVENTS):
        log.note(EventKind.WORKER_LEFT, worker=B, why=f"said goodbye in {number} languages")
    assert log.story(worker="a") == []
    assert len(log.entries) == MAX_EVENTS


def test_what_happens_again_is_counted_and_comes_last() -> None:
    log = EventLog()
    for at, worker in ((1.0, A), (2.0, B), (3.0, A), (65.0, A)):
        log.now = at
        log.note(EventKind.WORKER_LEFT, worker=worker, why="said goodbye")
    told = [(entry.text, entry.times, entry.number) for entry in log.entries]
    assert told == [("worker b said goodbye", 1, 2), ("worker a said goodbye", 3, 4)]
    assert log.counts == {EventKind.WORKER_LEFT: 4}
    assert [(one.at, one.times) for one in log.story(worker="a")] == [(65.0, 3)]
    log.note(EventKind.WORKER_LEFT, worker=A, why="fell silent")
    assert log.entries[-1].text == "worker a fell silent"


def test_no_kind_of_event_pushes_the_others_out() -> None:
    log = EventLog()
    log.note(EventKind.STAGE_FAILED, worker=A, why="its disk is full")
    log.note(EventKind.PLAN_LOADING, epoch=Epoch(1), layer_map=MAP)
    log.note(EventKind.PLAN_SERVING, epoch=Epoch(1), room="640 tokens of context")
    for number in range(3 * MAX_EVENTS):  # no two of them are alike
        log.note(EventKind.LINK_DIRECT, worker=B, rtt_s=number / 1000)
        log.note(EventKind.WORKER_LEFT_OUT, worker=B, why=f"it is {number} times as slow")
    kinds = Counter(entry.kind for entry in log.entries)
    assert kinds[EventKind.STAGE_FAILED] == kinds[EventKind.PLAN_LOADING] == 1
    assert kinds[EventKind.PLAN_SERVING] == 1
    assert kinds.total() == MAX_EVENTS
    assert abs(kinds[EventKind.LINK_DIRECT] - kinds[EventKind.WORKER_LEFT_OUT]) <= 1
    assert [entry.at for entry in log.entries] == sorted(entry.at for entry in log.entries)
    assert (
        log.entries[-1].text == f"worker b has no layers: it is {3 * MAX_EVENTS - 1} times as slow"
    )


def test_a_long_reason_is_cut() -> None:
    log = EventLog()
    log.note(EventKind.WAITING, why="x" * 5000)
    assert len(log.entries[0].text) == 1000


def test_the_story_of_a_worker_has_the_plans_it_was_part_of_in_order() -> None:
    log = EventLog()
    told: list[tuple[float, EventKind, WorkerId | None, dict[str, Any]]] = [
        (1.0, EventKind.WORKER_JOINED, A, {"memory_bytes": 1, "device": "cpu"}),
        (2.0, EventKind.WORKER_JOINED, B, {"memory_bytes": 1, "device": "cpu"}),
        (3.0, EventKind.PLAN_LOADING, None, {"layer_map": MAP}),
        (5.0, EventKind.PLAN_LOADING, None, {"layer_map": MAP[1:]}),
    ]
    for at, kind, worker, facts in told:
        log.now = at
        log.note(kind, worker=worker, epoch=Epoch(1), **facts)
    log.now = 4.0
    log.trace(EventKind.STEP_FAILED, "r1", worker=A, code="stage_error", why="no room")
    story = log.story(worker="a")
    assert [(entry.at, entry.kind) for entry in story] == [
        (1.0, EventKind.WORKER_JOINED),
        (3.0, EventKind.PLAN_LOADING),
        (4.0, EventKind.STEP_FAILED),
    ]
    assert [entry.at for entry in log.story(request="r1")] == [4.0]
