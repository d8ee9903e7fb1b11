"""The worker's decisions: sessions, heartbeats, epochs."""

import pytest

from distributed_llm.common.errors import (
    CheckpointMismatch,
    CoordinatorUnreachable,
    DistributedLLMError,
    NotReady,
    ProtocolMismatch,
    RemoteProtocolError,
    StageError,
)
from distributed_llm.common.messages import (
    DropStage,
    LoadStage,
    MissingPositions,
    ModelSource,
    Pong,
    Refused,
    ReleaseSequences,
    SequenceSlice,
    StageFailed,
    StageReady,
    Task,
    TaskFailed,
    TaskResult,
    ToWorker,
    Welcome,
    WorkerHello,
)
from distributed_llm.common.tensors import TensorSpec
from distributed_llm.common.types import LayerRange
from distributed_llm.worker.agent import (
    CREDITS,
    Action,
    Agent,
    Beat,
    Broke,
    Computed,
    Connected,
    Disconnected,
    Drop,
    Exit,
    Garbage,
    Load,
    Loaded,
    LoadFailed,
    Log,
    Received,
    Reconnect,
    Release,
    Run,
    Say,
)
from tests.unit.simulation import capabilities

WELCOME = Welcome(worker_id="pc", heartbeat_interval_s=1.0, silence_timeout_s=4.0)


def new_agent(now: float = 0.0) -> Agent:
    return Agent("pc", capabilities(), address="boss:5555", connect_timeout_s=10.0, now=now)


def hear(agent: Agent, message: ToWorker, now: float = 0.0) -> list[Action]:
    """Return what the agent does about a message, log lines left out."""
    return without_logs(agent.handle(Received(message), now=now))


def without_logs(actions: list[Action]) -> list[Action]:
    return [action for action in actions if not isinstance(action, Log)]


def joined(now: float = 0.0) -> Agent:
    agent = new_agent(now)
    agent.handle(Connected(), now=now)
    hear(agent, WELCOME, now)
    return agent


def order(epoch: int, start: int = 0, stop: int = 2) -> LoadStage:
    return LoadStage(
        epoch=epoch,
        source=ModelSource(kind="builtin", name=""),
        layers=LayerRange(start, stop),
        dtype="float32",
        digest="d",
        kv_tokens=100,
    )


def task(epoch: int, step: int = 0) -> Task:
    part = SequenceSlice(sequence_id=0, start=0, num_tokens=1)
    spec = TensorSpec("int32", (1,))
    return Task(epoch=epoch, step=step, attempt=1, sequences=(part,), tensors=(spec,))


def session_of(actions: list[Action]) -> int:
    (load,) = actions
    assert isinstance(load, Load)
    return load.session


# ------------------------------------------------------------------ joining


def test_hello_is_the_first_thing_said() -> None:
    agent = new_agent()
    hello = WorkerHello(name="pc", capabilities=capabilities())
    assert agent.handle(Connected(), now=1.0) == [Say(hello)]


def test_nobody_listens() -> None:
    agent = new_agent(now=5.0)
    assert agent.next_deadline() == 15.0
    assert agent.on_timer(reached=False, now=14.9) == []
    (leave,) = agent.on_timer(reached=False, now=15.0)
    assert isinstance(leave, Exit)
    assert isinstance(leave.error, CoordinatorUnreachable)
    assert "boss:5555 after 10 s: nothing listens there" in str(leave.error)


def test_something_else_listens() -> None:
    agent = new_agent()
    (leave,) = agent.on_timer(reached=True, now=10.0)
    assert isinstance(leave, Exit)
    assert "something listens there, but it is no coordinator" in str(leave.error)


def test_something_that_connects_but_never_welcomes() -> None:
    """It is given two chances within the time, and the reason is not lost with the connection."""
    agent = new_agent()
    for now in (0.0, 4.0):
        agent.handle(Connected(), now=now)
        assert agent.next_deadline() == now + 4.0
        assert agent.on_timer(reached=True, now=now + 3.9) == []
        assert Reconnect() in agent.on_timer(reached=True, now=now + 4.0)
    agent.handle(Connected(), now=8.0)
    assert agent.next_deadline() == 10.0
    (leave,) = agent.on_timer(reached=False, now=10.0)
    assert isinstance(leave, Exit)
    assert "it is no coordinator" in str(leave.error)


def test_later_connections_are_tried_for_ever() -> None:
    agent = joined()
    agent.handle(Disconnected(), now=1.0)
    assert agent.next_deadline() is None
    assert agent.on_timer(reached=False, now=1e6) == []
    agent.handle(Connected(), now=1e6)
    assert agent.next_deadline() == 1e6 + 4.0
    assert Reconnect() in agent.on_timer(reached=True, now=1e6 + 4.0)


# ------------------------------------------------------------------ heartbeats and silence


def test_beats_at_once_and_then_every_interval() -> None:
    agent = joined(now=3.0)
    beats = []
    for _ in range(4):
        at = agent.next_deadline()
        assert at is not None
        assert agent.on_timer(reached=True, now=at - 0.001) == []
        assert agent.on_timer(reached=True, now=at) == [Beat(0)]
        beats.append(at)
        hear(agent, Pong(), at)
    assert beats == [3.0, 4.0, 5.0, 6.0]


def test_beat_carries_the_epoch() -> None:
    agent = joined()
    hear(agent, order(5))
    assert agent.on_timer(reached=True, now=1.0) == [Beat(5)]


def test_silence_makes_it_connect_anew() -> None:
    agent = joined()
    for now in (0.0, 1.0, 2.0, 3.0):
        assert agent.on_timer(reached=True, now=now) == [Beat(0)]
    assert agent.next_deadline() == 4.0
    actions = agent.on_timer(reached=True, now=4.0)
    assert without_logs(actions) == [Reconnect()]
    assert agent.next_deadline() is None


@pytest.mark.parametrize("message", [Pong(), order(1), task(9), DropStage(epoch=1)])
def test_any_message_is_a_sign_of_life(message: ToWorker) -> None:
    agent = joined()
    hear(agent, message, 3.5)
    assert not [a for a in agent.on_timer(reached=True, now=7.4) if a == Reconnect()]
    assert Reconnect() in agent.on_timer(reached=True, now=7.5)


def test_connection_lost() -> None:
    agent = joined()
    assert without_logs(agent.handle(Disconnected(), now=1.0)) == [Reconnect()]


# ------------------------------------------------------------------ refusals


def test_told_that_its_session_is_lost() -> None:
    agent = joined()
    hear(agent, order(5))
    assert hear(agent, Refused(code="lost", message="connect again")) == [Reconnect()]
    assert agent.epoch == 0
    agent.handle(Connected(), now=1.0)
    hear(agent, WELCOME, 1.0)
    assert agent.on_timer(reached=True, now=1.0) == [Beat(0)]


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("unsupported_version", ProtocolMismatch),
        ("not_ready", NotReady),
        ("?", DistributedLLMError),
    ],
)
def test_told_to_go_away(code: str, kind: type[DistributedLLMError]) -> None:
    agent = new_agent()
    agent.handle(Connected(), now=0.0)
    (leave,) = hear(agent, Refused(code=code, message="because"))
    assert isinstance(leave, Exit)
    assert type(leave.error) is kind
    assert str(leave.error) == "because"


def test_garbage_is_logged_and_another_version_is_the_end() -> None:
    agent = joined()
    (line,) = agent.handle(Garbage(RemoteProtocolError("malformed", "noise")), now=0.0)
    assert isinstance(line, Log)
    error = ProtocolMismatch("version 2")
    assert agent.handle(Garbage(error), now=0.0) == [Exit(error)]


# ------------------------------------------------------------------ epochs


def test_orders_are_carried_out() -> None:
    agent = joined()
    (load,) = hear(agent, order(1))
    assert isinstance(load, Load)
    assert load.order == order(1)
    (run,) = without_logs(agent.handle(Received(task(1), (b"1234",)), now=0.0))
    assert run == Run(load.session, task(1), (b"1234",))
    assert hear(agent, ReleaseSequences(epoch=1, sequence_ids=(3, 4))) == [Release((3, 4))]
    assert hear(agent, DropStage(epoch=2)) == [Drop()]
    assert agent.epoch == 2


@pytest.mark.parametrize("epoch", [1, 2, 4])
def test_work_of_another_epoch_is_ignored(epoch: int) -> None:
    agent = joined()
    hear(agent, order(3))
    assert hear(agent, task(epoch)) == []
    assert hear(agent, ReleaseSequences(epoch=epoch, sequence_ids=(1,))) == []


def test_orders_of_older_epochs_are_ignored() -> None:
    agent = joined()
    hear(agent, order(3))
    assert hear(agent, order(2)) == []
    assert hear(agent, order(3)) == []
    assert hear(agent, DropStage(epoch=2)) == []
    assert agent.epoch == 3
    assert session_of(hear(agent, order(4))) == 0


def test_dropped_epoch_is_over() -> None:
    agent = joined()
    hear(agent, order(3))
    hear(agent, DropStage(epoch=4))
    assert hear(agent, task(3)) == []
    assert hear(agent, order(4)) == []


# ------------------------------------------------------------------ sessions


def test_answers_of_an_old_session_are_dropped() -> None:
    agent = joined()
    old = session_of(hear(agent, order(1)))
    agent.handle(Disconnected(), now=1.0)
    agent.handle(Connected(), now=2.0)
    hear(agent, WELCOME, 2.0)
    new = session_of(hear(agent, order(1), 2.0))
    assert new != old
    for event in (
        Loaded(old, 1, 1.0, 5),
        LoadFailed(old, 1, CheckpointMismatch("x")),
        Computed(old, task(1), (), (), 0.1, 0.0),
        Broke(old, task(1), StageError("x")),
    ):
        assert agent.handle(event, now=3.0) == []
    assert without_logs(agent.handle(Loaded(new, 1, 1.0, 5), now=3.0)) != []


def test_new_coordinator_may_count_epochs_from_one_again() -> None:
    agent = joined()
    hear(agent, order(50))
    agent.handle(Disconnected(), now=1.0)
    agent.handle(Connected(), now=2.0)
    hear(agent, WELCOME, 2.0)
    assert session_of(hear(agent, order(1), 2.0)) == 1


@pytest.mark.parametrize(
    "message", [WELCOME, order(50), task(50), DropStage(epoch=50), Refused(code="x", message="x")]
)
def test_rest_of_a_connection_that_was_given_up_is_ignored(message: ToWorker) -> None:
    """What was read with the last message, or comes before the new connection stands."""
    agent = joined()
    hear(agent, Refused(code="lost", message="connect again"))
    assert agent.handle(Received(message), now=0.0) == []
    assert agent.handle(Garbage(ProtocolMismatch("x")), now=0.0) == []
    agent.handle(Connected(), now=1.0)
    hear(agent, WELCOME, 1.0)
    assert session_of(hear(agent, order(1), 1.0)) == 1


@pytest.mark.parametrize("message", [order(50), task(50), DropStage(epoch=50)])
def test_orders_before_the_welcome_are_ignored(message: ToWorker) -> None:
    agent = new_agent()
    agent.handle(Connected(), now=0.0)
    assert agent.handle(Received(message), now=0.0) == []
    hear(agent, WELCOME)
    assert agent.epoch == 0


# ------------------------------------------------------------------ answers


def test_loaded() -> None:
    agent = joined()
    session = session_of(hear(agent, order(3)))
    ready = StageReady(epoch=3, credits=CREDITS, load_s=1.5, weight_bytes=99)
    said = without_logs(agent.handle(Loaded(session, 3, 1.5, 99), now=1.0))
    assert said == [Say(ready)]


def test_checkpoint_error_is_said_and_ends_the_worker() -> None:
    agent = joined()
    session = session_of(hear(agent, order(3)))
    error = CheckpointMismatch("other weights " + "x" * 9000)
    said, leave = agent.handle(LoadFailed(session, 3, error), now=1.0)
    assert isinstance(said, Say)
    assert isinstance(said.message, StageFailed)
    assert (said.message.epoch, said.message.code) == (3, "checkpoint_mismatch")
    assert said.message.message.startswith("other weights")
    assert leave == Exit(error)


def test_other_failure_to_load_is_said_and_it_stays() -> None:
    agent = joined()
    session = session_of(hear(agent, order(3)))
    said = without_logs(agent.handle(LoadFailed(session, 3, StageError("no memory")), now=1.0))
    assert said == [Say(StageFailed(epoch=3, code="stage_error", message="no memory"))]


def test_result_names_its_task_and_grants_one_credit() -> None:
    agent = joined()
    session = session_of(hear(agent, order(3)))
    spec = TensorSpec("float32", (1, 2))
    done = Computed(session, task(3, step=8), (spec,), (b"12345678",), 0.5, 0.25)
    (said,) = agent.handle(done, now=1.0)
    result = TaskResult(
        epoch=3, step=8, attempt=1, credits=1, compute_s=0.5, queued_s=0.25, tensors=(spec,)
    )
    assert said == Say(result, (b"12345678",))


def test_broken_task_names_what_is_missing() -> None:
    agent = joined()
    session = session_of(hear(agent, order(3)))
    missing = (MissingPositions(sequence_id=4, have=2),)
    (said,) = agent.handle(Broke(session, task(3), StageError("no"), missing), now=1.0)
    failed = TaskFailed(
        epoch=3,
        step=0,
        attempt=1,
        credits=1,
        code="stage_error",
        message="no",
        missing=missing,
    )
    assert said == Say(failed)
