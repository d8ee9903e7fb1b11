"""The worker's decisions: sessions, heartbeats, epochs, tasks and their way on."""

from collections.abc import Callable
from itertools import permutations
from typing import Any

import msgspec
import pytest

from distributed_llm.common.errors import (
    CheckpointMismatch,
    CheckpointUnavailable,
    CoordinatorUnreachable,
    DistributedLLMError,
    NotReady,
    ProtocolMismatch,
    RemoteProtocolError,
    StageError,
)
from distributed_llm.common.messages import (
    NOT_SERVED,
    Capabilities,
    CopyKV,
    DropStage,
    Goodbye,
    HandOver,
    KVEnd,
    KVFailed,
    Leaving,
    LinkReport,
    LoadStage,
    MayLeave,
    MissingPositions,
    ModelSource,
    NextStage,
    Notice,
    NotUnderstood,
    PeerHello,
    PeerProbed,
    PeerWelcome,
    Pong,
    Refused,
    ReleaseSequences,
    Remeasured,
    Renamed,
    SequenceSlice,
    StageFailed,
    StageReady,
    StageTime,
    Task,
    TaskFailed,
    TaskResult,
    ToWorker,
    UndoMove,
    Welcome,
    WorkerHello,
    tag_of,
)
from distributed_llm.common.tensors import TensorSpec
from distributed_llm.common.types import (
    NO_EPOCH,
    Epoch,
    LayerRange,
    Outline,
    PeerId,
    SequenceId,
    StepNumber,
)
from distributed_llm.worker.session.agent import Agent
from distributed_llm.worker.session.dialling import proof
from distributed_llm.worker.session.epoch_stage import CREDITS
from distributed_llm.worker.session.events import (
    Action,
    Computed,
    ComputeFailed,
    Connected,
    Disconnected,
    Drop,
    End,
    Fail,
    Garbage,
    Load,
    Loaded,
    LoadFailed,
    Log,
    Probe,
    Probed,
    Received,
    Reconnect,
    Release,
    Run,
    Send,
    SendHeartbeat,
    Signalled,
    Stalled,
)
from distributed_llm.worker.session.link_events import (
    CloseLink,
    ForwardTask,
    Greet,
    LinkDown,
    LinkId,
    LinkReached,
    LinkReceived,
    LinkUp,
    OpenLink,
    PeerGarbage,
    PeerReceived,
    SendOverLink,
    SendToPeer,
)
from distributed_llm.worker.session.peers import PROBE_BYTES

WELCOME = Welcome(worker_id="pc-2", heartbeat_interval_s=1.0, silence_timeout_s=4.0)
IDS = TensorSpec("int32", (1,))
HIDDEN = TensorSpec("bfloat16", (1, 2))
MAC = NextStage(worker="mac", addresses=("10.0.0.2:7000", "127.0.0.1:7000"))
REMEASURED = Send(
    Remeasured(memory_bandwidth_bytes_per_s=5e9, flops_per_s=7e10, memory_bytes=1 << 29)
)
BEFORE, STRANGER = PeerId(b"before"), PeerId(b"stranger")


def capabilities() -> Capabilities:
    return Capabilities(
        device="cpu",
        device_name="A CPU",
        platform="Linux",
        memory_bytes=1 << 30,
        cores=2,
        threads=2,
        memory_bandwidth_bytes_per_s=1e10,
        flops_per_s=1e11,
    )


def new_agent(now: float = 0.0, leave_timeout_s: float = 60.0) -> Agent:
    return Agent(
        "pc",
        capabilities(),
        instance="me",
        address="boss:5555",
        connect_timeout_s=10.0,
        leave_timeout_s=leave_timeout_s,
        now=now,
    )


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


def order(epoch: int, next_stage: NextStage | None = None) -> LoadStage:
    return LoadStage(
        epoch=Epoch(epoch),
        source=ModelSource(kind="builtin", name=""),
        layers=LayerRange(0, 2),
        dtype="float32",
        wire_dtype="bfloat16",
        digest="d",
        kv_tokens=100,
        link_key="secret",
        next_stage=next_stage,
    )


def task(epoch: int, step: int = 0, *, oldest: int = 0, route: tuple[bool, ...] = ()) -> Task:
    part = SequenceSlice(sequence_id=SequenceId(0), start=0, num_tokens=1)
    return Task(
        epoch=Epoch(epoch),
        step=StepNumber(step),
        oldest=StepNumber(oldest),
        sequences=(part,),
        tensors=(IDS,),
        route=route,
    )


def session_of(actions: list[Action]) -> int:
    (session,) = [action.session for action in actions if isinstance(action, Load)]
    return session


def serving(next_stage: NextStage | None = None) -> Agent:
    """An agent that serves epoch 3; its link is up if there is a next stage."""
    agent = joined()
    hear(agent, order(3, next_stage))
    if next_stage is not None:
        agent.handle(LinkUp(LinkId(Epoch(3)), 0.001), now=0.0)
    return agent


def run_of(agent: Agent, given: Task, *frames: bytes) -> Run:
    """Hand a task to the agent and return the order that it gives."""
    (run,) = agent.handle(Received(given, frames), now=0.0)
    assert isinstance(run, Run)
    return run


def failed(agent: Agent, run: Run) -> list[Action]:
    return agent.handle(ComputeFailed(run, StageError("no")), now=0.0)


def hello(epoch: int, key: str = "secret", worker: str = "pc-2") -> PeerHello:
    return PeerHello(epoch=Epoch(epoch), key=proof(key, Epoch(epoch), worker))


# ------------------------------------------------------------------ joining


def test_hello_is_the_first_thing_said() -> None:
    agent = new_agent()
    here = ("10.0.0.1:7000", "127.0.0.1:7000")
    said = WorkerHello(name="pc", instance="me", capabilities=capabilities(), peer_addresses=here)
    assert agent.handle(Connected(here), now=1.0) == [Send(said)]


def test_it_asks_for_its_own_name_again_in_another_session() -> None:
    agent = joined()
    agent.handle(Disconnected(), now=1.0)
    (said,) = agent.handle(Connected(), now=2.0)
    assert isinstance(said, Send)
    assert isinstance(said.message, WorkerHello)
    assert said.message.name == "pc"


def test_nobody_listens() -> None:
    agent = new_agent(now=5.0)
    assert agent.next_deadline() == 15.0
    assert agent.on_timer(reached=False, now=14.9) == []
    (leave,) = agent.on_timer(reached=False, now=15.0)
    assert isinstance(leave, Fail)
    assert isinstance(leave.error, CoordinatorUnreachable)
    assert "boss:5555 after 10 s: nothing listens there" in str(leave.error)


def test_something_else_listens() -> None:
    agent = new_agent()
    (leave,) = agent.on_timer(reached=True, now=10.0)
    assert isinstance(leave, Fail)
    assert "something listens there that does not answer" in str(leave.error)


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
    assert isinstance(leave, Fail)
    assert "something listens there that does not answer" in str(leave.error)


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
        assert agent.on_timer(reached=True, now=at) == [SendHeartbeat(())]
        beats.append(at)
        hear(agent, Pong(), at)
    assert beats == [3.0, 4.0, 5.0, 6.0]


def test_beat_carries_the_epoch() -> None:
    agent = joined()
    hear(agent, order(5))
    assert agent.on_timer(reached=True, now=1.0) == [SendHeartbeat((Epoch(5),))]


def test_silence_makes_it_connect_anew() -> None:
    agent = joined()
    for now in (0.0, 1.0, 2.0, 3.0):
        assert agent.on_timer(reached=True, now=now) == [SendHeartbeat(())]
    assert agent.next_deadline() == 4.0
    actions = agent.on_timer(reached=True, now=4.0)
    assert without_logs(actions) == [Reconnect()]
    assert agent.next_deadline() is None


@pytest.mark.parametrize("message", [Pong(), order(1), task(9), DropStage(epoch=Epoch(1))])
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
    agent.handle(Connected(), now=1.0)
    hear(agent, WELCOME, 1.0)
    assert agent.on_timer(reached=True, now=1.0) == [SendHeartbeat(())]


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
    assert isinstance(leave, Fail)
    assert type(leave.error) is kind
    assert str(leave.error) == "because"


def test_what_the_coordinator_says_is_a_line_of_its_log_once_a_second() -> None:
    agent = joined()
    first, second = (Received(Notice(text=f"no layers: {why}")) for why in ("slow", "too slow"))
    assert agent.handle(first, now=5.0) == [Log("the coordinator says: no layers: slow")]
    assert agent.handle(second, now=5.25) == []
    agent.on_timer(reached=True, now=5.25)  # beats, and is due again in a second
    assert agent.next_deadline() == 6.0
    line = Log("the coordinator says: no layers: too slow")
    assert agent.on_timer(reached=True, now=6.0) == [line]


def test_garbage_is_logged_and_another_version_is_the_end() -> None:
    agent = joined()
    told, line = agent.handle(Garbage(RemoteProtocolError("malformed", "noise")), now=0.0)
    assert told == Send(NotUnderstood(what="", why="malformed: noise"))
    assert isinstance(line, Log)
    error = ProtocolMismatch("version 2")
    assert agent.handle(Garbage(error), now=0.0) == [Fail(error)]


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        (Task, TaskFailed),
        (LoadStage, StageFailed),
        (CopyKV, KVFailed),
        (HandOver, KVFailed),
        (DropStage, NotUnderstood),
        (UndoMove, NotUnderstood),
        (ReleaseSequences, NotUnderstood),
        (MayLeave, NotUnderstood),
    ],
)
@pytest.mark.parametrize("known", [True, False])
def test_what_cannot_be_read_is_answered(
    kind: type[Task], answer: type[TaskFailed], known: bool
) -> None:
    """As failed, if it is known what; the coordinator waits for no time limit."""
    agent = serving()
    outline = Outline(type=tag_of(kind), epoch=Epoch(3), step=StepNumber(7))
    if not known:
        outline = Outline(type=tag_of(kind))
    error = RemoteProtocolError("bad_field", "too long", outline)
    for now in (1.0, 1.1):  # though only one line is written
        told = agent.handle(Garbage(error), now=now)[0]
        assert isinstance(told, Send)
        assert isinstance(told.message, answer if known else NotUnderstood)
        assert "too long" in str(told.message)
        if isinstance(told.message, TaskFailed):
            assert (told.message.epoch, told.message.step) == (3, 7)


def test_only_workers_of_the_plan_may_fail_a_step_by_garbage() -> None:
    agent = serving()
    agent.handle(PeerReceived(BEFORE, hello(3)), now=0.5)
    outline = Outline(type=tag_of(Task), epoch=Epoch(3), step=StepNumber(7))
    error = RemoteProtocolError("bad_field", "too long", outline)
    assert [type(a) for a in agent.handle(PeerGarbage(error, STRANGER), now=1.0)] == [Log]
    assert not any(isinstance(a, Send) for a in agent.handle(PeerGarbage(error), now=1.1))
    told, *_ = agent.handle(PeerGarbage(error, BEFORE), now=1.2)
    assert isinstance(told, Send)
    assert isinstance(told.message, TaskFailed)
    assert (told.message.epoch, told.message.step) == (3, 7)
    other = RemoteProtocolError("bad_field", "x", Outline(type=tag_of(KVEnd), epoch=Epoch(3)))
    assert not any(isinstance(a, Send) for a in agent.handle(PeerGarbage(other, BEFORE), now=1.3))


# ------------------------------------------------------------------ epochs


def test_orders_are_carried_out() -> None:
    agent = joined()
    (load,) = hear(agent, order(1))
    assert isinstance(load, Load)
    assert load.order == order(1)
    (run,) = without_logs(agent.handle(Received(task(1), (b"1234",)), now=0.0))
    assert run == Run(load.session, task(1), (b"1234",))
    assert not agent.is_void(run)
    assert hear(
        agent, ReleaseSequences(epoch=Epoch(1), sequence_ids=(SequenceId(3), SequenceId(4)))
    ) == [Release(Epoch(1), (SequenceId(3), SequenceId(4)))]
    assert hear(agent, DropStage(epoch=Epoch(2))) == [Drop()]
    assert hear(agent, order(2)) == []


@pytest.mark.parametrize("epoch", [1, 2, 4])
def test_work_of_another_epoch_is_not_done_and_the_coordinator_told(epoch: int) -> None:
    agent = joined()
    hear(agent, order(3))
    failure = TaskFailed(
        epoch=Epoch(epoch),
        step=task(epoch).step,
        code=NOT_SERVED,
        message=f"Worker pc-2 does not serve plan {epoch}.",
    )
    assert hear(agent, task(epoch)) == [Send(failure)]
    assert hear(agent, ReleaseSequences(epoch=Epoch(epoch), sequence_ids=(SequenceId(1),))) == []


def test_orders_of_older_epochs_are_ignored() -> None:
    agent = joined()
    hear(agent, order(3))
    assert hear(agent, order(2)) == []
    assert hear(agent, order(3)) == []
    assert hear(agent, DropStage(epoch=Epoch(2))) == []
    assert session_of(hear(agent, order(4))) == 0


def test_dropped_epoch_is_over() -> None:
    agent = joined()
    hear(agent, order(3))
    hear(agent, DropStage(epoch=Epoch(4)))
    (send,) = hear(agent, task(3))
    assert isinstance(send, Send)
    assert isinstance(send.message, TaskFailed)
    assert hear(agent, order(4)) == []


# ------------------------------------------------------------------ measuring again


def probes(agent: Agent, until: float) -> list[float]:
    """Return when the agent orders probes, each of which finds something that is said at once."""
    times: list[float] = []
    while (at := agent.next_deadline()) is not None and at <= until:
        hear(agent, Pong(), at)
        for action in agent.on_timer(reached=True, now=at):
            if isinstance(action, Probe):
                assert not agent.is_void(action)
                assert agent.handle(Probed(action.session, 5e9, 7e10, 1 << 29), now=at) == [
                    REMEASURED
                ]
                times.append(at)
    return times


def test_worker_without_layers_measures_its_machine_every_ten_seconds() -> None:
    assert probes(joined(now=3.0), until=40.0) == [13.0, 23.0, 33.0]


def test_worker_with_layers_does_not_measure_but_at_once_when_it_has_lost_them() -> None:
    agent = joined()
    hear(agent, order(1))
    assert probes(agent, until=34.5) == []
    assert hear(agent, DropStage(epoch=Epoch(1)), 34.5) == [Drop()]
    assert agent.next_deadline() == 34.5
    assert probes(agent, until=60.0) == [34.5, 44.5, 54.5]


def test_orders_that_take_no_layers_away_do_not_count() -> None:
    agent = joined()
    hear(agent, DropStage(epoch=Epoch(1)), 4.5)
    hear(agent, ReleaseSequences(epoch=Epoch(1), sequence_ids=(SequenceId(3),)), 4.5)
    assert probes(agent, until=15.0) == [10.0]


def test_layers_that_are_loaded_beside_are_layers() -> None:
    agent = joined()
    hear(agent, msgspec.structs.replace(order(1), beside=NO_EPOCH))
    assert probes(agent, until=34.5) == []
    hear(agent, UndoMove(epoch=Epoch(1)), 34.5)
    assert probes(agent, until=36.0) == [34.5]


def test_probe_is_void_once_there_are_layers_to_load() -> None:
    agent = joined()
    (probe,) = due_probes(agent, 10.0)
    hear(agent, order(1), 10.0)
    assert agent.is_void(probe)
    assert agent.handle(Probed(probe.session, 5e9, 7e10, 1 << 29), now=10.1) == []


def test_probe_of_an_old_session_is_void() -> None:
    agent = joined()
    (probe,) = due_probes(agent, 10.0)
    agent.handle(Disconnected(), now=11.0)
    agent.handle(Connected(), now=12.0)
    hear(agent, WELCOME, 12.0)
    assert agent.is_void(probe)
    assert agent.handle(Probed(probe.session, 5e9, 7e10, 1 << 29), now=12.0) == []
    assert probes(agent, until=30.0) == [22.0]


def due_probes(agent: Agent, now: float) -> list[Probe]:
    hear(agent, Pong(), now)
    return [a for a in agent.on_timer(reached=True, now=now) if isinstance(a, Probe)]


# ------------------------------------------------------------------ sessions


def test_answers_of_an_old_session_are_dropped() -> None:
    agent = joined()
    old = session_of(hear(agent, order(1)))
    agent.handle(Disconnected(), now=1.0)
    agent.handle(Connected(), now=2.0)
    hear(agent, WELCOME, 2.0)
    new = session_of(hear(agent, order(1), 2.0))
    assert new != old
    run = Run(old, task(1), (b"1234",))
    for event in (
        Loaded(old, Epoch(1), 1.0, 5, 64),
        LoadFailed(old, Epoch(1), CheckpointMismatch("x")),
        Computed(run, (), (), 100, 80, 0),
        ComputeFailed(run, StageError("x")),
    ):
        assert agent.handle(event, now=3.0) == []
    assert agent.is_void(run)
    assert agent.is_void(Load(old, order(1)))
    assert not agent.is_void(Load(new, order(1)))
    assert without_logs(agent.handle(Loaded(new, Epoch(1), 1.0, 5, 64), now=3.0)) != []


def test_new_coordinator_may_count_epochs_from_one_again() -> None:
    agent = joined()
    hear(agent, order(50))
    agent.handle(Disconnected(), now=1.0)
    agent.handle(Connected(), now=2.0)
    hear(agent, WELCOME, 2.0)
    assert session_of(hear(agent, order(1), 2.0)) == 1


@pytest.mark.parametrize(
    "message",
    [WELCOME, order(50), task(50), DropStage(epoch=Epoch(50)), Refused(code="x", message="x")],
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


@pytest.mark.parametrize("message", [order(50), task(50), DropStage(epoch=Epoch(50))])
def test_orders_before_the_welcome_are_ignored(message: ToWorker) -> None:
    agent = new_agent()
    agent.handle(Connected(), now=0.0)
    assert agent.handle(Received(message), now=0.0) == []
    hear(agent, WELCOME)
    assert session_of(hear(agent, order(1))) == 0


# ------------------------------------------------------------------ leaving


def ready_agent(leave_timeout_s: float = 60.0) -> Agent:
    """An agent whose layers of epoch 3 are loaded."""
    agent = new_agent(leave_timeout_s=leave_timeout_s)
    agent.handle(Connected(), now=0.0)
    hear(agent, WELCOME)
    hear(agent, order(3))
    agent.handle(Loaded(0, Epoch(3), 1.0, 5, 64), now=0.0)
    return agent


def signal(agent: Agent, number: int = 15, now: float = 0.0) -> list[Action]:
    return without_logs(agent.handle(Signalled(number), now=now))


def beat_until(agent: Agent, now: float) -> list[tuple[float, list[Action]]]:
    """Return what happens by the clock until then beside heartbeats, which are answered."""
    told: list[tuple[float, list[Action]]] = []
    while (at := agent.next_deadline()) is not None and at <= now:
        hear(agent, Pong(), at)
        actions = without_logs(agent.on_timer(reached=True, now=at))
        actions = [action for action in actions if not isinstance(action, SendHeartbeat)]
        if actions:
            told.append((at, actions))
            if any(isinstance(action, End) for action in actions):
                break
    return told


def test_worker_that_serves_says_that_it_wants_to_leave_and_serves_on() -> None:
    agent = ready_agent()
    said, line = agent.handle(Signalled(15), now=1.0)
    assert said == Send(Leaving())
    assert isinstance(line, Log)
    assert line.text == ("leaving once other workers have layers 1-2; a second signal ends at once")
    run_of(agent, task(3, step=1), b"1234")
    assert beat_until(agent, 60.9) == []
    hear(agent, DropStage(epoch=Epoch(3)))
    assert hear(agent, MayLeave()) == [Send(Goodbye()), End(15)]


def test_worker_leaves_anyway_after_a_while() -> None:
    agent = ready_agent(leave_timeout_s=20.0)
    signal(agent, 2, now=1.0)
    assert beat_until(agent, 1e3) == [(21.0, [Send(Goodbye()), End(2)])]


def test_second_signal_ends_at_once() -> None:
    agent = ready_agent()
    signal(agent, 15)
    assert signal(agent, 2) == [Send(Goodbye()), End(2)]


@pytest.mark.parametrize("how", ["lost", "refused", "silent"])
def test_lost_connection_ends_a_worker_that_leaves(how: str) -> None:
    agent = ready_agent()
    signal(agent)
    if how == "lost":
        actions = agent.handle(Disconnected(), now=1.0)
    elif how == "refused":
        actions = hear(agent, Refused(code="lost", message="connect again"))
    else:
        actions = agent.on_timer(reached=True, now=4.0)
    assert without_logs(actions) == [End(15)]


_AT_THE_END: dict[str, Callable[[Agent], list[Action]]] = {
    "signal": lambda agent: agent.handle(Signalled(15), now=1.0),
    "signal again": lambda agent: agent.handle(Signalled(15), now=1.0),
    "gone": lambda agent: agent.handle(Disconnected(), now=1.0),
    "session over": lambda agent: hear(agent, Refused(code="lost", message="it ends"), 1.0),
    "may leave": lambda agent: hear(agent, MayLeave(), 1.0),
    "dropped": lambda agent: hear(agent, DropStage(epoch=Epoch(3)), 1.0),
}


@pytest.mark.parametrize("count", range(1, 5))
def test_worker_ends_whatever_its_coordinator_does_when_both_are_signalled(count: int) -> None:
    """It ends at once, or once the coordinator is silent, and says so once."""
    for order_of_events in permutations(_AT_THE_END, count):
        if "signal" not in order_of_events:
            continue
        agent = ready_agent()
        actions = [one for name in order_of_events for one in _AT_THE_END[name](agent)]
        while (at := agent.next_deadline()) is not None and at <= 10.0:
            actions += agent.on_timer(reached=False, now=at)
        ends = [one for one in actions if isinstance(one, End)]
        assert len(ends) == 1, order_of_events
        assert agent.next_deadline() is None


@pytest.mark.parametrize("state", ["connecting", "greeting", "idle", "loading", "no time"])
def test_worker_that_serves_nothing_ends_at_once(state: str) -> None:
    agent = new_agent()
    if state != "connecting":
        agent.handle(Connected(), now=0.0)
    if state in ("idle", "loading"):
        hear(agent, WELCOME)
    if state == "loading":
        hear(agent, order(3))
    if state == "no time":
        agent = ready_agent(leave_timeout_s=0.0)
    assert signal(agent) == [Send(Goodbye()), End(15)]


def test_drained_worker_ends_without_a_signal_and_tells_why() -> None:
    agent = ready_agent()
    line, *actions = agent.handle(Received(MayLeave(why="drained by boss")), now=1.0)
    assert isinstance(line, Log)
    assert "drained by boss" in line.text
    assert actions == [Send(Goodbye()), End(0)]


# ------------------------------------------------------------------ answers


def test_loaded() -> None:
    agent = joined()
    session = session_of(hear(agent, order(3)))
    ready = StageReady(epoch=Epoch(3), credits=CREDITS, load_s=1.5, weight_bytes=99, kv_tokens=640)
    said = without_logs(agent.handle(Loaded(session, Epoch(3), 1.5, 99, 640), now=1.0))
    assert said == [Send(ready)]


def test_checkpoint_error_is_said_and_ends_the_worker() -> None:
    agent = joined()
    session = session_of(hear(agent, order(3)))
    error = CheckpointMismatch("other weights " + "x" * 9000)
    said, leave = agent.handle(LoadFailed(session, Epoch(3), error), now=1.0)
    assert isinstance(said, Send)
    assert isinstance(said.message, StageFailed)
    assert (said.message.epoch, said.message.code) == (3, "checkpoint_mismatch")
    assert said.message.message.startswith("other weights")
    assert leave == Fail(error)


@pytest.mark.parametrize("error", [StageError("no memory"), CheckpointUnavailable("no hub")])
def test_failure_to_load_that_may_pass_is_said_and_it_stays(error: DistributedLLMError) -> None:
    agent = joined()
    session = session_of(hear(agent, order(3)))
    said, line = agent.handle(LoadFailed(session, Epoch(3), error), now=1.0)
    assert said == Send(StageFailed(epoch=Epoch(3), code=error.code, message=str(error)))
    assert line == Log(str(error), "error")
    (load,) = [one for one in hear(agent, order(4)) if isinstance(one, Load)]
    assert load.order.epoch == 4  # it tries again when it is told to


@pytest.mark.parametrize(
    "named",
    [
        {"missing": (MissingPositions(sequence_id=SequenceId(4), have=2),)},
        {"sequence_ids": (SequenceId(4), SequenceId(7))},
    ],
    ids=lambda named: next(iter(named)),
)
def test_broken_task_names_what_is_to_blame(named: dict[str, Any]) -> None:
    agent = serving()
    run = run_of(agent, task(3, step=8), b"1234")
    (said,) = agent.handle(ComputeFailed(run, StageError("no"), **named), now=1.0)
    told = TaskFailed(epoch=Epoch(3), step=StepNumber(8), code="stage_error", message="no", **named)
    assert said == Send(told)


def test_last_stage_answers_the_coordinator() -> None:
    agent = serving()
    passed = (StageTime(compute_us=7, layers_us=5, queued_us=1),)
    given = msgspec.structs.replace(task(3, step=8), timings=passed)
    run = run_of(agent, given, b"1234")
    (said,) = agent.handle(Computed(run, (IDS,), (b"5678",), 500, 400, 250), now=1.0)
    own = StageTime(compute_us=500, layers_us=400, queued_us=250)
    result = TaskResult(epoch=Epoch(3), step=StepNumber(8), timings=(*passed, own), tensors=(IDS,))
    assert said == Send(result, (b"5678",))


def test_what_samples_nothing_is_answered_with_nothing() -> None:
    agent = serving()
    run = run_of(agent, task(3, step=8), b"1234")
    (said,) = agent.handle(Computed(run, (), (), 500, 400, 250), now=1.0)
    own = StageTime(compute_us=500, layers_us=400, queued_us=250)
    assert said == Send(TaskResult(epoch=Epoch(3), step=StepNumber(8), timings=(own,)))


# ------------------------------------------------------------------ the way on


def test_result_is_handed_on_as_the_route_says() -> None:
    agent = serving(MAC)
    passed = (StageTime(compute_us=7, layers_us=5, queued_us=1),)
    given = msgspec.structs.replace(
        task(3, step=8, oldest=6, route=(True, False)), timings=passed, tensors=(IDS, HIDDEN)
    )
    run = run_of(agent, given, b"1234", b"in.."[:4])
    (sent,) = agent.handle(Computed(run, (HIDDEN,), (b"out.",), 500, 400, 250), now=1.0)
    onward = msgspec.structs.replace(
        given,
        route=(False,),
        timings=(*passed, StageTime(compute_us=500, layers_us=400, queued_us=250)),
        tensors=(IDS, HIDDEN),
    )
    assert sent == ForwardTask(onward, (b"1234", b"out."))
    assert onward.sequences is given.sequences


def test_handed_on_task_carries_the_newest_that_is_known_to_be_void() -> None:
    agent = serving(MAC)
    run = run_of(agent, task(3, step=8, oldest=1, route=(True,)), b"1234")
    run_of(agent, task(3, step=9, oldest=5, route=(True,)), b"1234")
    (sent,) = agent.handle(Computed(run, (HIDDEN,), (b"out.",), 1, 1, 1), now=1.0)
    assert isinstance(sent, ForwardTask)
    assert sent.task.oldest == 5


@pytest.mark.parametrize(
    ("route", "link"),
    [((False,), True), ((False, True), True), ((True,), False), ((True, True), False)],
)
def test_coordinator_relays_where_it_must(route: tuple[bool, ...], link: bool) -> None:
    agent = serving(MAC)
    if not link:
        agent.handle(LinkDown(LinkId(Epoch(3))), now=0.5)
    run = run_of(agent, task(3, step=8, route=route), b"1234")
    (said,) = agent.handle(Computed(run, (HIDDEN,), (b"out.",), 500, 400, 250), now=1.0)
    own = StageTime(compute_us=500, layers_us=400, queued_us=250)
    result = TaskResult(epoch=Epoch(3), step=StepNumber(8), timings=(own,), tensors=(HIDDEN,))
    assert said == Send(result, (b"out.",))


def test_link_is_dialled_with_every_order_and_closed_with_every_end() -> None:
    agent = joined()
    dial, load = hear(agent, order(3, MAC))
    assert dial == OpenLink(LinkId(Epoch(3)), MAC.addresses)
    assert isinstance(load, Load)
    close, dial, _ = hear(agent, order(4, MAC))
    assert close == CloseLink(LinkId(Epoch(3)))
    assert dial == OpenLink(LinkId(Epoch(4)), MAC.addresses)
    close, load = hear(agent, order(5))
    assert close == CloseLink(LinkId(Epoch(4)))
    assert isinstance(load, Load)
    hear(agent, order(6, MAC))
    assert hear(agent, DropStage(epoch=Epoch(7))) == [CloseLink(LinkId(Epoch(6))), Drop()]
    hear(agent, order(8, MAC))
    actions = without_logs(agent.handle(Disconnected(), now=1.0))
    assert actions == [CloseLink(LinkId(Epoch(8))), Reconnect()]


def test_reports_of_the_link_are_said_between_heartbeats() -> None:
    agent = joined()
    hear(agent, order(3, MAC))
    assert agent.on_timer(reached=True, now=0.0) == [SendHeartbeat((Epoch(3),))]
    for now in (1.0, 2.0, 3.0):
        hear(agent, Pong(), now)
        assert agent.next_deadline() == now
        actions = without_logs(agent.on_timer(reached=True, now=now))
        down = [Send(LinkReport(epoch=Epoch(3), up=False))] if now == 3.0 else []
        assert actions == [*down, SendHeartbeat((Epoch(3),))]
    hello_to_mac = PeerHello(epoch=Epoch(3), key=proof("secret", Epoch(3), "mac"))
    address = MAC.addresses[0]
    greet = Greet(LinkId(Epoch(3)), hello_to_mac, (address,))
    assert agent.handle(LinkReached(LinkId(Epoch(3)), address), now=3.1) == [greet]
    assert agent.next_deadline() == pytest.approx(3.4)
    assert agent.on_timer(reached=True, now=3.4) == [greet]
    said, probe = without_logs(agent.handle(LinkUp(LinkId(Epoch(3)), 0.25), now=3.5))
    assert said == Send(LinkReport(epoch=Epoch(3), up=True, rtt_s=0.25))
    assert isinstance(probe, SendOverLink)
    (said,) = agent.handle(LinkReceived(LinkId(Epoch(3)), PeerProbed(epoch=Epoch(3))), now=4.25)
    assert said == Send(
        LinkReport(epoch=Epoch(3), up=True, rtt_s=0.25, bytes_per_s=PROBE_BYTES / 0.5)
    )


# ------------------------------------------------------------------ tasks of other workers


def test_whoever_said_a_right_hello_may_hand_tasks() -> None:
    agent = serving()
    given = PeerReceived(BEFORE, task(3, step=1), (b"1234",))
    assert without_logs(agent.handle(given, now=0.0)) == []
    welcome = agent.handle(PeerReceived(BEFORE, hello(3)), now=0.0)
    assert welcome == [SendToPeer(BEFORE, PeerWelcome(epoch=Epoch(3)))]
    assert agent.handle(given, now=0.0) == [Run(0, task(3, step=1), (b"1234",))]
    stranger = PeerReceived(STRANGER, task(3, step=2), (b"1234",))
    assert without_logs(agent.handle(stranger, now=0.0)) == []


@pytest.mark.parametrize(
    "wrong",
    [
        hello(3, key="guess"),
        hello(3, worker="mac"),
        hello(2),
        hello(4),
        PeerHello(epoch=Epoch(3), key="secret"),
        PeerHello(epoch=Epoch(3), key=""),
        PeerHello(epoch=Epoch(3), key="é"),
        PeerHello(epoch=Epoch(3), key=proof("secret", Epoch(2), "pc-2")),
    ],
)
def test_wrong_hello_is_not_answered(wrong: PeerHello) -> None:
    agent = serving()
    assert without_logs(agent.handle(PeerReceived(STRANGER, wrong), now=0.0)) == []
    given = PeerReceived(STRANGER, task(3, step=1), (b"1234",))
    assert without_logs(agent.handle(given, now=0.0)) == []


def test_whoever_was_welcome_in_one_epoch_is_nobody_in_the_next() -> None:
    agent = serving()
    agent.handle(PeerReceived(BEFORE, hello(3)), now=0.0)
    for message in (order(4), DropStage(epoch=Epoch(5)), order(6)):
        hear(agent, message)
        for epoch in range(7):
            given = PeerReceived(BEFORE, task(epoch, step=1), (b"1234",))
            assert without_logs(agent.handle(given, now=0.0)) == []


def test_nobody_is_welcome_where_nothing_is_served() -> None:
    agent = serving()
    agent.handle(Disconnected(), now=1.0)
    for epoch in (0, 3):
        for key in (
            proof("secret", Epoch(3), "pc-2"),
            proof("secret", Epoch(0), "pc-2"),
            proof("", Epoch(0), "pc-2"),
        ):
            given = PeerReceived(BEFORE, PeerHello(epoch=Epoch(epoch), key=key))
            assert agent.handle(given, now=1.0) == []
        given = PeerReceived(BEFORE, task(epoch), (b"1234",))
        assert without_logs(agent.handle(given, now=1.0)) == []


def test_flood_of_strangers_writes_few_lines() -> None:
    agent = serving()
    lines = []
    for number in range(300):
        now = number * 0.01
        lines += agent.handle(PeerReceived(STRANGER, task(3), (b"1234",)), now=now)
        lines += agent.handle(PeerReceived(STRANGER, hello(3, key="guess")), now=now)
        lines += agent.handle(PeerGarbage(RemoteProtocolError("bad_magic", "noise")), now=now)
        lines += agent.handle(PeerGarbage(ProtocolMismatch("version 9")), now=now)
    assert len(lines) == 5
    assert all(isinstance(line, Log) and line.level == "warning" for line in lines)


# ------------------------------------------------------------------ void steps


def test_steps_before_the_oldest_are_void_wherever_they_are() -> None:
    """Not received yet, waiting in the queue, or just computed."""
    agent = serving(MAC)
    waiting = run_of(agent, task(3, step=1, route=(True,)), b"1234")
    ahead = run_of(agent, task(3, step=6, oldest=1), b"1234")
    assert not agent.is_void(waiting)
    run_of(agent, task(3, step=7, oldest=5), b"1234")
    assert agent.is_void(waiting)
    assert not agent.is_void(ahead)
    assert agent.handle(Computed(waiting, (HIDDEN,), (b"out.",), 1, 1, 1), now=0.0) == []
    assert failed(agent, waiting) == []
    assert agent.handle(Received(task(3, step=4, oldest=1), (b"1234",)), now=0.0) == []
    run_of(agent, task(3, step=5, oldest=1), b"1234")


def test_oldest_is_of_its_epoch() -> None:
    agent = serving()
    run_of(agent, task(3, step=50, oldest=50), b"1234")
    hear(agent, order(4))
    run_of(agent, task(4, step=1, oldest=1), b"1234")


def test_oldest_of_another_worker_counts_too() -> None:
    agent = serving()
    waiting = run_of(agent, task(3, step=1), b"1234")
    agent.handle(PeerReceived(STRANGER, task(3, step=9, oldest=9), (b"1234",)), now=0.0)
    assert not agent.is_void(waiting)
    agent.handle(PeerReceived(BEFORE, hello(3)), now=0.0)
    agent.handle(PeerReceived(BEFORE, task(3, step=9, oldest=9), (b"1234",)), now=0.0)
    assert agent.is_void(waiting)


def test_task_that_waits_already_is_not_run_twice() -> None:
    agent = serving()
    run = run_of(agent, task(3, step=1), b"1234")
    assert agent.handle(Received(task(3, step=1), (b"1234",)), now=0.0) == []
    agent.handle(Computed(run, (IDS,), (b"5678",), 1, 1, 1), now=0.0)
    run_of(agent, task(3, step=1), b"1234")


def test_more_tasks_than_were_granted_are_refused() -> None:
    agent = serving()
    runs = [run_of(agent, task(3, step=step), b"1234") for step in range(CREDITS)]
    for refused in (100, 101):
        (said,) = agent.handle(Received(task(3, step=refused), (b"1234",)), now=0.0)
        assert isinstance(said, Send)
        assert isinstance(said.message, TaskFailed)
        assert (said.message.step, said.message.code) == (refused, "too_many_tasks")
    agent.handle(Computed(runs[0], (IDS,), (b"5678",), 1, 1, 1), now=0.0)
    failed(agent, runs[1])
    run_of(agent, task(3, step=102), b"1234")
    run_of(agent, task(3, step=103), b"1234")
    (said,) = agent.handle(Received(task(3, step=104), (b"1234",)), now=0.0)
    assert isinstance(said, Send)


@pytest.mark.parametrize("how", ["void", "next epoch", "next session"])
def test_what_is_void_does_not_count_as_waiting(how: str) -> None:
    agent = serving()
    for step in range(CREDITS):
        run_of(agent, task(3, step=step), b"1234")
    if how == "void":
        for step in range(CREDITS, 2 * CREDITS):
            run_of(agent, task(3, step=step, oldest=CREDITS), b"1234")
        return
    if how == "next session":
        agent.handle(Disconnected(), now=0.0)
        agent.handle(Connected(), now=0.0)
        hear(agent, WELCOME)
    hear(agent, order(4))
    for step in range(CREDITS):
        run_of(agent, task(4, step=step), b"1234")


def test_a_worker_goes_by_the_name_that_it_is_given() -> None:
    agent = joined()
    said = agent.handle(Received(Renamed(worker_id="pc")), now=1.0)
    assert said == [Log("is called pc now")]
    hello = PeerHello(epoch=Epoch(3), key=proof("secret", Epoch(3), "pc"))
    hear(agent, order(3))
    assert agent.handle(PeerReceived(BEFORE, hello), now=1.0) == [
        SendToPeer(BEFORE, PeerWelcome(epoch=Epoch(3)))
    ]
    assert agent._name == "pc", "it asks for the same name again"


def test_a_time_in_which_it_did_not_listen_does_not_end_its_session() -> None:
    agent = joined(now=0.0)
    assert agent.handle(Stalled(), now=3.9) == []
    assert agent.on_timer(reached=True, now=7.8) == [SendHeartbeat(())]
    assert Reconnect() in agent.on_timer(reached=True, now=7.9)


def test_a_flood_of_bad_messages_does_not_flood_the_log() -> None:
    agent = joined()
    noise = Garbage(RemoteProtocolError("malformed", "?"))
    actions = [action for _ in range(1000) for action in agent.handle(noise, now=1.0)]
    lines = [action for action in actions if isinstance(action, Log)]
    assert lines == [Log("cannot read a message: malformed: ?", "warning")] * 5
    told: list[Action] = []
    for second in range(2, 62):
        hear(agent, Pong(), now=float(second))
        told += agent.on_timer(reached=True, now=float(second))
    assert [action for action in told if isinstance(action, Log)] == [
        Log("995 more lines were left out in 60 s: dropped or ignored messages", "warning")
    ]


def test_a_flood_of_late_orders_does_not_flood_the_log() -> None:
    agent = serving()
    lines = [line for _ in range(150) for line in agent.handle(Received(order(2)), now=1.0)]
    assert lines == [Log("ignored an order of plan 2", "warning")] * 100
    assert agent.next_deadline() is not None
