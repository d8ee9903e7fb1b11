"""The state tables of a worker: each transition happens for the reason it names, no other does."""

from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Any

import pytest

from distributed_llm.common.errors import StageError
from distributed_llm.common.messages import (
    DropStage,
    HandOver,
    KVTaken,
    MayLeave,
    ToWorker,
    UndoMove,
)
from distributed_llm.common.states import IllegalTransition, StateTable
from distributed_llm.common.types import Epoch, StepNumber
from distributed_llm.worker.session.agent import Agent
from distributed_llm.worker.session.agent_states import AGENT_STATES, AgentCause, AgentState
from distributed_llm.worker.session.epoch_stage import (
    STAGE_STATES,
    EpochStage,
    StageCause,
    StageState,
)
from distributed_llm.worker.session.events import (
    AssembleKV,
    Connected,
    Disconnected,
    KVAssembled,
    KVExported,
    KVOrderFailed,
    Signalled,
)
from distributed_llm.worker.session.kv_move import (
    KV_MOVE_STATES,
    KVMoveCause,
    KVMoveState,
)
from distributed_llm.worker.session.link_events import LinkDown, LinkReceived
from tests.unit.test_agent import WELCOME, hear, joined, new_agent, order, ready_agent
from tests.unit.test_kv_move import (
    SECOND,
    TO_NAS,
    beside,
    both,
    do,
    loaded,
    only_new,
    sending,
    serving_3,
)

Scenario = Callable[[], Agent]
Event = object


def then(agent: Scenario, *events: Event) -> Scenario:
    """Return a scenario that goes on with events and messages of the coordinator."""

    def play() -> Agent:
        played = agent()
        for event in events:
            if isinstance(event, ToWorker):
                hear(played, event)
            else:
                do(played, event)
        return played

    return play


def copied() -> Agent:
    """Return an agent that has sent everything there is to "nas"."""
    agent, export = sending()
    do(agent, KVExported(export, None))  # type: ignore[arg-type]
    return agent


def leaving() -> Agent:
    agent = ready_agent()
    do(agent, Signalled(15))
    return agent


def greeting() -> Agent:
    agent = new_agent()
    do(agent, Connected())
    return agent


A, CAUSE = AgentState, AgentCause
OF_AGENT: dict[tuple[Enum, Enum], Scenario] = {
    (A.CONNECTING, CAUSE.CONNECTED): greeting,
    (A.CONNECTING, CAUSE.SESSION_LOST): then(new_agent, Disconnected()),
    (A.GREETING, CAUSE.CONNECTED): then(greeting, Connected()),
    (A.GREETING, CAUSE.WELCOMED): then(greeting, WELCOME),
    (A.GREETING, CAUSE.SESSION_LOST): then(greeting, Disconnected()),
    (A.JOINED, CAUSE.SESSION_LOST): then(joined, Disconnected()),
    (A.JOINED, CAUSE.ASKED_TO_LEAVE): leaving,
    (A.LEAVING, CAUSE.SESSION_LOST): then(leaving, Disconnected()),
    (A.CONNECTING, CAUSE.STOPPED): then(new_agent, Signalled(2)),
    (A.GREETING, CAUSE.STOPPED): then(greeting, Signalled(2)),
    (A.JOINED, CAUSE.STOPPED): then(joined, MayLeave()),
    (A.LEAVING, CAUSE.STOPPED): then(leaving, MayLeave()),
}


def hand_over(epoch: int) -> HandOver:
    return HandOver(epoch=Epoch(epoch), first_step=StepNumber(100))


S, WHY = StageState, StageCause
OF_STAGE: dict[tuple[Enum, Enum], Scenario] = {
    (S.NEW, WHY.ORDERED_ALONE): then(joined, order(3)),
    (S.NEW, WHY.ORDERED_BESIDE): then(joined, beside(5)),
    (S.LOADING, WHY.LOADED): serving_3,
    (S.PREPARING, WHY.LOADED): only_new,
    (S.PREPARING, WHY.COMMIT): then(serving_3, beside(5), DropStage(epoch=Epoch(3))),
    (S.COMMITTED, WHY.LOADED): then(serving_3, beside(5), DropStage(epoch=Epoch(3)), loaded(5)),
    (S.PREPARED, WHY.COMMIT): then(both, DropStage(epoch=Epoch(3))),
    (S.SERVED, WHY.SUSPEND): then(both, hand_over(5)),
    (S.SUSPENDED, WHY.RESUME): then(both, hand_over(5), UndoMove(epoch=Epoch(5))),
    (S.LOADING, WHY.GIVE_UP): then(joined, order(3), Disconnected()),
    (S.PREPARING, WHY.GIVE_UP): then(serving_3, beside(5), UndoMove(epoch=Epoch(5))),
    (S.PREPARED, WHY.GIVE_UP): then(both, UndoMove(epoch=Epoch(5))),
    (S.COMMITTED, WHY.GIVE_UP): then(
        serving_3, beside(5), DropStage(epoch=Epoch(3)), Disconnected()
    ),
    (S.SERVED, WHY.GIVE_UP): then(serving_3, DropStage(epoch=Epoch(3))),
    (S.SUSPENDED, WHY.GIVE_UP): then(copied, hand_over(5), DropStage(epoch=Epoch(3))),
}

H, STEP = KVMoveState, KVMoveCause
HAND_OVER = hand_over(5)
ASSEMBLED = KVAssembled(AssembleKV(0, Epoch(5)))
NO_MEMORY = KVOrderFailed(AssembleKV(0, Epoch(5)), StageError("no"))
OF_KV_MOVE: dict[tuple[Enum, Enum], Scenario] = {
    (H.COPYING, STEP.ALL_COPIED): copied,
    (H.COPYING, STEP.STEPS_ENDED): then(lambda: both([SECOND]), HAND_OVER),
    (H.COPIED, STEP.STEPS_ENDED): then(copied, HAND_OVER),
    (H.HANDOVER, STEP.ALL_ARRIVED): then(both, HAND_OVER),
    (H.ASSEMBLING, STEP.ASSEMBLED): then(both, HAND_OVER, ASSEMBLED),
    (H.COPYING, STEP.FAILED): then(lambda: sending()[0], LinkDown(TO_NAS)),
    (H.COPIED, STEP.FAILED): then(copied, LinkDown(TO_NAS)),
    (H.HANDOVER, STEP.FAILED): then(copied, HAND_OVER, LinkDown(TO_NAS)),
    (H.ASSEMBLING, STEP.FAILED): then(both, HAND_OVER, NO_MEMORY),
    (H.ASSEMBLED, STEP.FAILED): then(both, HAND_OVER, ASSEMBLED, NO_MEMORY),
}

TABLES: list[tuple[StateTable[Any, Any], dict[tuple[Enum, Enum], Scenario]]] = [
    (AGENT_STATES, OF_AGENT),
    (STAGE_STATES, OF_STAGE),
    (KV_MOVE_STATES, OF_KV_MOVE),
]


@pytest.mark.parametrize(
    ("table", "transition", "scenario"),
    [(table, key, scenario) for table, scenarios in TABLES for key, scenario in scenarios.items()],
)
def test_transition_happens(
    table: StateTable[Any, Any],
    transition: tuple[Enum, Enum],
    scenario: Scenario,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is the last one of its table in its scenario."""
    after, seen = StateTable.after, []

    def recorded(self: StateTable[Any, Any], state: Enum, cause: Enum) -> Enum:
        following: Enum = after(self, state, cause)
        if self is table:
            seen.append((state, cause))
        return following

    monkeypatch.setattr(StateTable, "after", recorded)
    scenario()
    assert seen[-1] == transition


@pytest.mark.parametrize(("table", "scenarios"), TABLES)
def test_every_transition_has_a_scenario(
    table: StateTable[Any, Any], scenarios: dict[tuple[Enum, Enum], Scenario]
) -> None:
    assert set(scenarios) == set(table.transitions)


def test_connection_that_stands_twice_is_a_bug() -> None:
    with pytest.raises(IllegalTransition, match="CONNECTED cannot happen while JOINED"):
        do(joined(), Connected())


def test_layers_that_are_loaded_twice_are_a_bug() -> None:
    with pytest.raises(IllegalTransition, match="LOADED cannot happen while SERVED"):
        do(serving_3(), loaded(3))


def test_stage_that_was_given_up_is_not_used_again() -> None:
    stage = EpochStage(0, order(3), "pc")
    stage.give_up()
    suspend = partial(stage.suspend, StepNumber(1))
    for use in (stage.loaded, stage.commit, suspend, stage.resume, stage.give_up):
        with pytest.raises(IllegalTransition):
            use()


def test_kv_cache_that_nobody_ordered_is_a_bug() -> None:
    with pytest.raises(IllegalTransition, match="ASSEMBLED cannot happen while COPYING"):
        do(both(), ASSEMBLED)


def test_worker_that_has_ended_ignores_everything() -> None:
    agent = leaving()
    hear(agent, MayLeave())
    taken = LinkReceived(TO_NAS, KVTaken(epoch=Epoch(5), layers=SECOND, number=1))
    for event in (Connected(), Disconnected(), Signalled(2), taken, loaded(3)):
        assert agent.handle(event, now=1.0) == []
    assert hear(agent, order(9)) == []
    assert agent.next_deadline() is None
    assert agent.on_timer(reached=True, now=1e6) == []


def test_second_welcome_is_ignored() -> None:
    agent = serving_3()
    assert hear(agent, WELCOME) == []
    assert agent._stages.epochs == (3,)
