"""What a worker does while its layers move: the agent, driven by hand-made messages."""

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from distributed_llm.common.errors import (
    CheckpointMismatch,
    DistributedLLMError,
    NotEnoughMemory,
    ProtocolMismatch,
    RemoteProtocolError,
    StageError,
)
from distributed_llm.common.messages import (
    NOT_SERVED,
    CopyKV,
    DropStage,
    HandedOver,
    HandOver,
    KVCopied,
    KVEnd,
    KVFailed,
    KVPart,
    KVPieces,
    KVTaken,
    KVTransfer,
    LoadStage,
    PeerHello,
    PeerProbe,
    PeerProbed,
    PeerWelcome,
    Pong,
    ReleaseSequences,
    StageFailed,
    StageReady,
    Task,
    TaskFailed,
    UndoMove,
    tag_of,
)
from distributed_llm.common.states import IllegalTransition
from distributed_llm.common.tensors import TensorSpec
from distributed_llm.common.types import (
    Epoch,
    LayerRange,
    Outline,
    PeerId,
    SequenceId,
    StepNumber,
)
from distributed_llm.worker.session.agent import Agent
from distributed_llm.worker.session.dialling import proof
from distributed_llm.worker.session.events import (
    Action,
    AssembleKV,
    Computed,
    ComputeFailed,
    Disconnected,
    Drop,
    ExportKV,
    Fail,
    ImportKV,
    KVAssembled,
    KVExported,
    KVImported,
    KVOrderFailed,
    Load,
    Loaded,
    LoadFailed,
    Probe,
    Received,
    Reconnect,
    Release,
    Run,
    Send,
    SendHeartbeat,
    Serve,
    Unload,
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
from tests.unit.test_agent import (
    HIDDEN,
    IDS,
    MAC,
    hear,
    joined,
    order,
    run_of,
    serving,
    task,
    without_logs,
)

BYTES = TensorSpec("uint8", (4,))
HERE = LayerRange(0, 2)
FIRST, SECOND = LayerRange(0, 1), LayerRange(1, 2)
NEW = LayerRange(0, 4)
COMES = LayerRange(2, 4)
NAS = KVTransfer(layers=SECOND, worker="nas", addresses=("10.0.0.3:7000",))
TO_MAC = KVTransfer(layers=FIRST, worker="mac", addresses=MAC.addresses)
TO_NAS = LinkId(Epoch(5), SECOND)
SENDER = PeerId(b"sender")


def hand_over(epoch: int, first_step: int = 450) -> HandOver:
    """An order to hand over; steps before this one were begun before it."""
    return HandOver(epoch=Epoch(epoch), first_step=StepNumber(first_step))


def beside(epoch: int = 5, imports: Sequence[LayerRange] = (), **changes: object) -> LoadStage:
    """An order to load layers 0-4 beside those that are served, 0-2."""
    made = msgspec.structs.replace(
        order(epoch), beside=Epoch(3), layers=NEW, imports=tuple(imports), link_key="new"
    )
    return msgspec.structs.replace(made, **changes)


def copy(*transfers: KVTransfer, epoch: int = 5) -> CopyKV:
    return CopyKV(epoch=Epoch(epoch), link_key="new", transfers=transfers or (NAS,))


def do(agent: Agent, event: object, now: float = 0.0) -> list[Action]:
    return without_logs(agent.handle(event, now=now))  # type: ignore[arg-type]


def loaded(epoch: int, session: int = 0) -> Loaded:
    return Loaded(session, Epoch(epoch), 1.0, 99, 640)


def serving_3(next_stage: object = None) -> Agent:
    """An agent whose layers of epoch 3 are loaded and served."""
    agent = serving(next_stage)  # type: ignore[arg-type]
    do(agent, loaded(3))
    return agent


def both(imports: Sequence[LayerRange] = ()) -> Agent:
    """An agent that serves epoch 3 and has loaded epoch 5 beside it."""
    agent = serving_3()
    hear(agent, beside(5, imports))
    do(agent, loaded(5))
    return agent


def only_new(imports: Sequence[LayerRange] = ()) -> Agent:
    """An agent that has loaded epoch 5 and serves nothing."""
    agent = joined()
    hear(agent, beside(5, imports))
    do(agent, loaded(5))
    return agent


def sending(now: float = 0.0) -> tuple[Agent, Action]:
    """An agent that serves epoch 3 and is about to export to "nas"."""
    agent = serving_3()
    hear(agent, copy(), now)
    do(agent, LinkReached(TO_NAS, NAS.addresses[0]), now)
    (export,) = do(agent, LinkUp(TO_NAS, 0.001), now)
    assert isinstance(export, ExportKV)
    return agent, export


def pieces(number: int, layers: LayerRange = SECOND, epoch: int = 5) -> KVPieces:
    part = KVPart(segment=1, layer=layers.start, offset=0, count=1, capacity=64)
    return KVPieces(
        epoch=Epoch(epoch),
        layers=layers,
        number=number,
        dtype="bfloat16",
        parts=(part,),
        tensors=(BYTES,),
    )


def end(number: int, layers: LayerRange = SECOND, epoch: int = 5) -> KVEnd:
    return KVEnd(epoch=Epoch(epoch), layers=layers, number=number, tensors=(BYTES,))


def exported(
    agent: Agent, export: Action, message: KVPieces | KVEnd | None, now: float = 0.0
) -> list[Action]:
    """Return what is done about the message that was exported."""
    assert isinstance(export, ExportKV)
    return do(agent, KVExported(export, message, (b"1234",) if message else ()), now)


def taken(agent: Agent, number: int, now: float = 0.0, layers: LayerRange = SECOND) -> list[Action]:
    answer = KVTaken(epoch=Epoch(5), layers=layers, number=number)
    return do(agent, LinkReceived(LinkId(Epoch(5), layers), answer), now)


def pass_time(agent: Agent, until: float) -> list[tuple[float, list[Action]]]:
    """Return what is done by the clock until then, and when; heartbeats and logs left out."""
    told = []
    while (at := agent.next_deadline()) is not None and at <= until:
        do(agent, Received(Pong()), at)
        actions = without_logs(agent.on_timer(reached=True, now=at))
        actions = [action for action in actions if not isinstance(action, SendHeartbeat)]
        if actions:
            told.append((round(at, 6), actions))
    return told


def failure(actions: list[Action]) -> KVFailed:
    """Return the only failure that is told among these actions."""
    said = [a.message for a in actions if isinstance(a, Send) and isinstance(a.message, KVFailed)]
    assert len(said) == 1, actions
    return said[0]


def beats(agent: Agent) -> tuple[int, ...]:
    actions = agent.on_timer(reached=True, now=agent.next_deadline() or 0.0)
    (epochs,) = [action.epochs for action in actions if isinstance(action, SendHeartbeat)]
    return epochs


def assert_serves(agent: Agent, epoch: int, step: int = 500) -> Run:
    """A task of this epoch runs."""
    run = run_of(agent, task(epoch, step=step), b"1234")
    assert not agent.is_void(run)
    return run


# ------------------------------------------------------------------ loading beside


def test_loading_beside_leaves_what_is_served() -> None:
    agent = serving_3()
    before = run_of(agent, task(3, step=1), b"1234")
    (load,) = hear(agent, beside())
    assert load == Load(0, beside())
    assert not agent.is_void(load)
    assert not agent.is_void(before)
    assert_serves(agent, 3)
    assert beats(agent) == (3, 5)
    (ready,) = do(agent, loaded(5))
    assert isinstance(ready, Send)
    assert isinstance(ready.message, StageReady)
    assert ready.message.epoch == 5
    assert_serves(agent, 3, 501)


def test_layers_that_nobody_wants_any_more_are_given_up_first() -> None:
    """The message that they were dropped did not come."""
    agent = serving_3()
    hear(agent, beside(5))
    do(agent, loaded(5))
    hear(agent, hand_over(5))
    order_7 = beside(7, beside=Epoch(5))
    assert hear(agent, order_7) == [Drop(), Load(0, order_7)]
    assert beats(agent) == (7,)
    do(agent, loaded(7))
    assert hear(agent, hand_over(7)) == [AssembleKV(0, Epoch(7))]
    assert is_not_served(hear(agent, task(3, step=500)))


def test_layers_of_an_older_session_are_given_up_by_who_serves_nothing() -> None:
    agent = joined()
    assert hear(agent, beside()) == [Drop(), Load(0, beside())]
    assert beats(agent) == (5,)


def test_link_of_the_new_epoch_comes_up_beside_the_old_one() -> None:
    agent = serving_3(MAC)
    dial, load = hear(agent, beside(next_stage=MAC))
    assert dial == OpenLink(LinkId(Epoch(5)), MAC.addresses)
    assert isinstance(load, Load)
    (greet,) = do(agent, LinkReached(LinkId(Epoch(5)), MAC.addresses[0]))
    assert greet == Greet(
        LinkId(Epoch(5)),
        PeerHello(epoch=Epoch(5), key=proof("new", Epoch(5), "mac")),
        (MAC.addresses[0],),
    )
    _, probe = do(agent, LinkUp(LinkId(Epoch(5)), 0.001))
    assert isinstance(probe, SendOverLink)
    assert probe.link == LinkId(Epoch(5))
    do(agent, LinkDown(LinkId(Epoch(5))))
    run = run_of(agent, task(3, step=1, route=(True,)), b"1234")
    (sent,) = do(agent, Computed(run, (HIDDEN,), (b"out.",), 1, 1, 1))
    assert isinstance(sent, ForwardTask)


@pytest.mark.parametrize("served", [False, True])
def test_what_comes_late_of_links_of_another_epoch_is_ignored(served: bool) -> None:
    agent = serving_3(MAC) if served else serving_3()
    for link in (
        LinkId(Epoch(2)),
        LinkId(Epoch(5)),
        LinkId(Epoch(3), SECOND),
        LinkId(Epoch(5), SECOND),
    ):
        assert do(agent, LinkReached(link, MAC.addresses[0])) == []
        assert do(agent, LinkUp(link, 0.001)) == []
        assert do(agent, LinkReceived(link, PeerProbed(epoch=link.epoch))) == []
        assert do(agent, LinkDown(link)) == []
    run = run_of(agent, task(3, step=1, route=(True,)), b"1234")
    (sent,) = do(agent, Computed(run, (HIDDEN,), (b"out.",), 1, 1, 1))
    assert isinstance(sent, ForwardTask if served else Send)


def test_whoever_is_welcome_in_one_epoch_is_not_in_the_other() -> None:
    agent = both()
    old, new = PeerId(b"old"), PeerId(b"new")
    hellos = {
        old: PeerHello(epoch=Epoch(3), key=proof("secret", Epoch(3), "pc-2")),
        new: PeerHello(epoch=Epoch(5), key=proof("new", Epoch(5), "pc-2")),
    }
    for peer, said in hellos.items():
        assert do(agent, PeerReceived(peer, said)) == [
            SendToPeer(peer, PeerWelcome(epoch=said.epoch))
        ]
    assert do(agent, PeerReceived(new, task(3, step=1), (b"1234",))) == []
    assert do(agent, PeerReceived(old, task(5, step=1), (b"1234",))) == []
    probe = PeerProbe(epoch=Epoch(5), tensors=(BYTES,))
    assert do(agent, PeerReceived(new, probe, (b"1234",))) == [
        SendToPeer(new, PeerProbed(epoch=Epoch(5)))
    ]
    assert do(agent, PeerReceived(old, probe, (b"1234",))) == []
    (run,) = do(agent, PeerReceived(old, task(3, step=1), (b"1234",)))
    assert isinstance(run, Run)


def test_newer_order_takes_the_place_of_what_loads() -> None:
    agent = serving_3()
    hear(agent, beside(5, next_stage=MAC))
    assert hear(agent, beside(5)) == []
    assert hear(agent, beside(7)) == [
        CloseLink(LinkId(Epoch(5))),
        Unload(Epoch(5)),
        Load(0, beside(7)),
    ]
    assert agent.is_void(Load(0, beside(5)))
    assert do(agent, loaded(5)) == []
    assert beats(agent) == (3, 7)
    do(agent, loaded(7))
    assert hear(agent, DropStage(epoch=Epoch(3))) == [Serve(Epoch(7))]


def test_newer_order_undoes_a_handover_that_has_begun() -> None:
    agent = both()
    hear(agent, hand_over(5))
    hear(agent, beside(7))
    assert_serves(agent, 3)


def test_order_that_is_not_beside_drops_all_older_ones() -> None:
    agent = both()
    assert hear(agent, order(6)) == [Load(0, order(6))]
    assert beats(agent) == (6,)
    for epoch in (3, 5):
        assert is_not_served(hear(agent, task(epoch)))
    assert agent.is_void(Run(0, task(3), ()))


@pytest.mark.parametrize("kind", [NotEnoughMemory, CheckpointMismatch])
def test_failure_to_load_beside_is_told_and_serving_goes_on(kind: type[StageError]) -> None:
    agent = serving_3()
    hear(agent, beside())
    (said,) = do(agent, LoadFailed(0, Epoch(5), kind("no")))
    assert said == Send(StageFailed(epoch=Epoch(5), code=kind.code, message="no"))
    assert_serves(agent, 3)
    assert hear(agent, UndoMove(epoch=Epoch(5))) == [Unload(Epoch(5))]
    assert beats(agent) == (3,)


def test_worker_that_serves_nothing_and_has_another_checkpoint_ends() -> None:
    agent = joined()
    hear(agent, beside())
    _, leave = do(agent, LoadFailed(0, Epoch(5), CheckpointMismatch("no")))
    assert isinstance(leave, Fail)


# ------------------------------------------------------------------ the commit


@pytest.mark.parametrize("after", ["loading", "handover"])
def test_dropping_the_old_epoch_serves_the_new_one(after: str) -> None:
    agent = both()
    waiting = run_of(agent, task(3, step=1), b"1234")
    if after == "handover":
        (assemble,) = hear(agent, hand_over(5))
        assert do(agent, KVAssembled(assemble)) == [Send(HandedOver(epoch=5))]  # type: ignore[arg-type]
    assert hear(agent, DropStage(epoch=Epoch(3))) == [Serve(Epoch(5))]
    assert beats(agent) == (5,)
    assert agent.is_void(waiting)
    assert do(agent, Computed(waiting, (IDS,), (b"5678",), 1, 1, 1)) == []
    assert is_not_served(hear(agent, task(3, step=2)))
    assert_serves(agent, 5, step=0)
    assert hear(agent, DropStage(epoch=Epoch(3))) == []
    assert hear(agent, UndoMove(epoch=Epoch(5))) == []
    assert_serves(agent, 5, step=1)


def test_first_task_of_the_new_epoch_overtakes_the_commit() -> None:
    agent = serving_3(MAC)
    hear(agent, beside(next_stage=MAC))
    do(agent, loaded(5))
    (assemble,) = hear(agent, hand_over(5))
    do(agent, KVAssembled(assemble))  # type: ignore[arg-type]
    close, serve, run = hear(agent, task(5, step=1))
    assert (close, serve) == (CloseLink(LinkId(Epoch(3))), Serve(Epoch(5)))
    assert isinstance(run, Run)
    assert not agent.is_void(run)
    assert hear(agent, DropStage(epoch=Epoch(3))) == []
    assert is_not_served(hear(agent, task(3, step=9)))
    assert_serves(agent, 5, 2)


def test_task_from_the_stage_before_serves_the_new_epoch_too() -> None:
    agent = both()
    do(agent, PeerReceived(SENDER, PeerHello(epoch=Epoch(5), key=proof("new", Epoch(5), "pc-2"))))
    serve, run = do(agent, PeerReceived(SENDER, task(5, step=1), (b"1234",)))
    assert serve == Serve(Epoch(5))
    assert isinstance(run, Run)


def test_idle_worker_serves_with_its_first_task() -> None:
    agent = only_new()
    serve, run = hear(agent, task(5))
    assert serve == Serve(Epoch(5))
    assert isinstance(run, Run)


def test_worker_of_the_old_epoch_only_loses_its_layers() -> None:
    agent, _ = sending()
    assert hear(agent, DropStage(epoch=Epoch(3))) == [CloseLink(TO_NAS), Drop()]
    assert beats(agent) == ()
    assert agent.next_deadline() is not None
    done = [action for _, actions in pass_time(agent, 100.0) for action in actions]
    assert done, "it is idle, and measured again now and then"
    assert all(isinstance(action, Probe) for action in done)


@pytest.mark.parametrize("during", ["loading", "handover"])
def test_task_that_comes_too_early_is_refused(during: str) -> None:
    agent = serving_3()
    hear(agent, beside())
    if during == "handover":
        do(agent, loaded(5))
        hear(agent, hand_over(5))
    (said,) = hear(agent, task(5, step=4))
    assert isinstance(said, Send)
    assert isinstance(said.message, TaskFailed)
    assert (said.message.epoch, said.message.step, said.message.code) == (5, 4, "not_ready")
    assert beats(agent) == (3, 5)


def test_commit_before_it_is_loaded_is_carried_out_then() -> None:
    agent = serving_3()
    hear(agent, beside())
    assert hear(agent, DropStage(epoch=Epoch(3))) == []
    assert is_not_served(hear(agent, task(3)))
    (said,) = hear(agent, task(5))
    assert isinstance(said, Send)
    assert isinstance(said.message, TaskFailed)
    assert beats(agent) == (5,)
    serve, ready = do(agent, loaded(5))
    assert serve == Serve(Epoch(5))
    assert isinstance(ready, Send)
    assert_serves(agent, 5)


def test_released_sequences_are_of_their_epoch() -> None:
    agent = both()
    for epoch in (3, 5):
        told = ReleaseSequences(epoch=Epoch(epoch), sequence_ids=(SequenceId(1), SequenceId(2)))
        assert hear(agent, told) == [Release(Epoch(epoch), (SequenceId(1), SequenceId(2)))]
    assert (
        hear(agent, ReleaseSequences(epoch=Epoch(4), sequence_ids=(SequenceId(1), SequenceId(2))))
        == []
    )


# ------------------------------------------------------------------ cancelling


def phases() -> dict[str, list[Any]]:
    """What a worker of both epochs, that sends and is sent KV cache, is told, phase by phase."""
    hello = PeerHello(epoch=Epoch(5), key=proof("new", Epoch(5), "pc-2"))
    load: list[Any] = [beside(5, [COMES])]
    ready = [*load, loaded(5), PeerReceived(SENDER, hello)]
    copying = [
        *ready,
        copy(),
        LinkUp(TO_NAS, 0.001),
        PeerReceived(SENDER, pieces(1, COMES), (b"",)),
    ]
    handover = [*copying, hand_over(5)]
    last = PeerReceived(SENDER, end(2, COMES), (b"",))
    first = ImportKV(0, pieces(1, COMES), (b"",))
    second = ImportKV(0, end(2, COMES), (b"",))
    assembling = [*handover, last, KVImported(first), KVImported(second)]
    return {
        "loading": load,
        "loaded": ready,
        "copying": copying,
        "handover": handover,
        "assembling": assembling,
        "assembled": [*assembling, KVAssembled(AssembleKV(0, Epoch(5)))],
    }


def go_through(agent: Agent, steps: Sequence[object]) -> list[Action]:
    actions: list[Action] = []
    for step in steps:
        known = step if hasattr(step, "__dataclass_fields__") else Received(step)  # type: ignore[arg-type]
        actions += do(agent, known)
    return actions


@pytest.mark.parametrize("phase", phases())
def test_cancelling_goes_on_with_the_old_epoch(phase: str) -> None:
    agent = serving_3()
    begun = run_of(agent, task(3, step=7), b"1234")
    go_through(agent, phases()[phase])
    actions = hear(agent, UndoMove(epoch=Epoch(5)))
    links = [CloseLink(TO_NAS)] if phase not in ("loading", "loaded") else []
    assert actions == [*links, Unload(Epoch(5))]
    assert beats(agent) == (3,)
    assert_serves(agent, 3)
    orders = (Load(0, beside(5)), ExportKV(0, Epoch(5), SECOND, 1, False), AssembleKV(0, Epoch(5)))
    assert all(agent.is_void(one) for one in (*orders, ImportKV(0, end(1, COMES), ())))
    assert is_not_served(hear(agent, task(5)))
    assert hear(agent, hand_over(5)) != []  # is refused
    assert_serves(agent, 3, 501)
    assert pass_time(agent, 100.0) == []
    assert hear(agent, UndoMove(epoch=Epoch(5))) == []
    assert hear(agent, beside(5)) == []
    suspended = phase in ("handover", "assembling", "assembled")
    assert agent.is_void(begun) is suspended


@pytest.mark.parametrize("phase", phases())
def test_lost_session_ends_all_of_it(phase: str) -> None:
    agent = serving_3()
    go_through(agent, phases()[phase])
    actions = do(agent, Disconnected())
    links = [CloseLink(TO_NAS)] if phase not in ("loading", "loaded") else []
    assert actions == [*links, Unload(Epoch(5)), Reconnect()]
    assert agent.next_deadline() is None
    for late in (
        Loaded(0, Epoch(5), 1.0, 1, 1),
        KVExported(ExportKV(0, Epoch(5), SECOND, 1, False), pieces(1), (b"",)),
        KVImported(ImportKV(0, end(2, COMES), ())),
        KVAssembled(AssembleKV(0, Epoch(5))),
        KVOrderFailed(AssembleKV(0, Epoch(5)), StageError("no")),
        LinkUp(TO_NAS, 0.1),
        LinkDown(TO_NAS),
        LinkReceived(TO_NAS, KVTaken(epoch=Epoch(5), layers=SECOND, number=1)),
    ):
        assert do(agent, late) == []


@pytest.mark.parametrize("phase", phases())
def test_new_plan_that_is_not_beside_ends_all_of_it(phase: str) -> None:
    agent = serving_3()
    go_through(agent, phases()[phase])
    links = [CloseLink(TO_NAS)] if phase not in ("loading", "loaded") else []
    assert hear(agent, order(8)) == [*links, Load(0, order(8))]
    assert beats(agent) == (8,)
    assert pass_time(agent, 100.0) == []


# ------------------------------------------------------------------ sending


def test_messages_are_sent_in_a_window_of_two() -> None:
    agent, export = sending()
    assert export == ExportKV(0, Epoch(5), SECOND, 1, rest=False)
    sent, export = exported(agent, export, pieces(1))
    assert sent == SendOverLink(TO_NAS, pieces(1), (b"1234",))
    assert export == ExportKV(0, Epoch(5), SECOND, 2, rest=False)
    assert exported(agent, export, pieces(2)) == [SendOverLink(TO_NAS, pieces(2), (b"1234",))]
    (export,) = taken(agent, 1)
    assert export == ExportKV(0, Epoch(5), SECOND, 3, rest=False)
    assert taken(agent, 1) == taken(agent, 9) == []  # told again, or of nothing
    assert taken(agent, 2) == []  # the next message is being exported
    assert isinstance(export, ExportKV)
    assert not agent.is_void(export)
    assert_serves(agent, 3)


def test_acknowledgment_of_nothing_opens_no_window() -> None:
    agent, export = sending()
    _, export = exported(agent, export, pieces(1))
    exported(agent, export, pieces(2))
    for number in (0, 3, 9):
        assert taken(agent, number) == []
    assert len(taken(agent, 1)) == 1


def test_hello_to_the_receiver_is_repeated_and_proves_the_key() -> None:
    agent = serving_3()
    assert hear(agent, copy()) == [OpenLink(TO_NAS, NAS.addresses)]
    hello = Greet(
        TO_NAS, PeerHello(epoch=Epoch(5), key=proof("new", Epoch(5), "nas")), NAS.addresses
    )
    assert do(agent, LinkReached(TO_NAS, NAS.addresses[0]), 0.1) == [hello]
    assert pass_time(agent, 1.0) == [(0.4, [hello]), (0.7, [hello]), (1.0, [hello])]


def test_all_was_copied_is_told_once_when_it_was_acknowledged() -> None:
    agent, export = sending()
    _, export = exported(agent, export, pieces(1))
    assert exported(agent, export, None, now=1.0) == []
    assert taken(agent, 1, 1.1) == [Send(KVCopied(epoch=Epoch(5), bytes_sent=4))]
    look = ExportKV(0, Epoch(5), SECOND, 2, rest=False)
    assert pass_time(agent, 5.0) == [(2.0, [look])]  # steps go on adding to it
    sent, export = exported(agent, look, pieces(2), 5.0)
    assert isinstance(sent, SendOverLink)
    assert exported(agent, export, None, 5.0) == []
    assert taken(agent, 2, 5.1) == []


def test_nothing_to_copy_is_copied() -> None:
    agent, export = sending()
    assert exported(agent, export, None) == [Send(KVCopied(epoch=Epoch(5), bytes_sent=0))]


def test_copied_is_told_when_the_last_transfer_is_done() -> None:
    agent = serving_3()
    hear(agent, copy(NAS, TO_MAC))
    other = LinkId(Epoch(5), FIRST)
    (export,) = do(agent, LinkUp(TO_NAS, 0.001))
    assert exported(agent, export, None, 0.5) == []
    (second,) = do(agent, LinkUp(other, 0.001), 0.6)
    assert second == ExportKV(0, Epoch(5), FIRST, 1, rest=False)
    _, third = exported(agent, second, pieces(1, FIRST), 0.7)
    assert exported(agent, third, None, 0.8) == []
    assert taken(agent, 1, 0.9, FIRST) == [Send(KVCopied(epoch=Epoch(5), bytes_sent=4))]


def test_rest_is_sent_with_the_end_after_the_handover_began() -> None:
    agent, export = sending()
    exported(agent, export, None)
    (export,) = hear(agent, hand_over(5))
    assert export == ExportKV(0, Epoch(5), SECOND, 1, rest=True)
    assert hear(agent, task(3, step=9)) == []
    _, export = exported(agent, export, pieces(1))
    assert exported(agent, export, end(2)) == [SendOverLink(TO_NAS, end(2), (b"1234",))]
    assert taken(agent, 2) == []
    assert pass_time(agent, 100.0) == []
    assert hear(agent, DropStage(epoch=Epoch(3))) == [CloseLink(TO_NAS), Drop()]


def test_the_rest_names_the_sequences_that_were_set_back() -> None:
    agent, export = sending()
    exported(agent, export, None)
    set_back = (SequenceId(3), SequenceId(8))
    (export,) = hear(agent, msgspec.structs.replace(hand_over(5), set_back=set_back))
    _, export = exported(agent, export, pieces(1))
    assert export == ExportKV(0, Epoch(5), SECOND, 2, rest=True, set_back=set_back)


def test_handover_while_an_export_is_under_way() -> None:
    agent, export = sending()
    assert hear(agent, hand_over(5)) == []
    (export,) = exported(agent, export, None)
    assert export == ExportKV(0, Epoch(5), SECOND, 1, rest=True)


def test_handover_before_the_receiver_was_reached() -> None:
    agent = serving_3()
    hear(agent, copy())
    assert hear(agent, hand_over(5)) == []
    assert do(agent, LinkUp(TO_NAS, 0.001)) == [ExportKV(0, Epoch(5), SECOND, 1, rest=True)]


def test_rest_waits_for_the_window() -> None:
    agent, export = sending()
    _, export = exported(agent, export, pieces(1))
    exported(agent, export, pieces(2))
    assert hear(agent, hand_over(5)) == []
    assert taken(agent, 1) == [ExportKV(0, Epoch(5), SECOND, 3, rest=True)]


# ------------------------------------------------------------------ sending fails


def test_receiver_that_cannot_be_reached() -> None:
    agent = serving_3()
    hear(agent, copy(), 10.0)
    ((at, actions),) = pass_time(agent, 100.0)
    assert at == 15.0
    assert actions[0] == CloseLink(TO_NAS)
    told = failure(actions)
    assert (told.epoch, told.worker, told.code) == (5, "nas", "connection_failed")
    assert "nas cannot be reached within 5 s" in told.message
    assert hear(agent, UndoMove(epoch=Epoch(5))) == [Unload(Epoch(5))]
    assert_serves(agent, 3)


def test_receiver_that_never_welcomes() -> None:
    agent = serving_3()
    hear(agent, copy())
    do(agent, LinkReached(TO_NAS, NAS.addresses[0]), 0.1)
    told = pass_time(agent, 100.0)
    assert told[-1][0] == 5.0
    assert failure(told[-1][1]).worker == "nas"
    assert all(isinstance(action, Greet) for _, actions in told[:-1] for action in actions)


@pytest.mark.parametrize("after_handover", [False, True])
def test_receiver_that_does_not_acknowledge(after_handover: bool) -> None:
    agent, export = sending()
    if after_handover:
        hear(agent, hand_over(5))
    _, export = exported(agent, export, pieces(1), 2.0)
    exported(agent, export, end(2) if after_handover else pieces(2), 4.0)
    taken(agent, 1, 6.0)
    ((at, actions),) = pass_time(agent, 100.0)
    assert at == 16.0
    told = failure(actions)
    assert (told.worker, told.code) == ("nas", "connection_failed")
    assert "took none of the KV cache of layer 2 for 10 s" in told.message


def test_receiver_that_acknowledges_nothing_at_all() -> None:
    agent, export = sending()
    _, export = exported(agent, export, pieces(1), 2.0)
    exported(agent, export, pieces(2), 4.0)
    ((at, actions),) = pass_time(agent, 100.0)
    assert at == 12.0
    assert failure(actions).worker == "nas"


def test_lost_link_while_copying() -> None:
    agent, export = sending()
    close, said = do(agent, LinkDown(TO_NAS))
    assert close == CloseLink(TO_NAS)
    assert failure([said]).worker == "nas"
    assert isinstance(export, ExportKV)
    assert agent.is_void(export)
    assert exported(agent, export, pieces(1)) == []
    assert pass_time(agent, 100.0) == []
    assert hear(agent, hand_over(5)) == []
    assert_not_run(agent, 3)
    hear(agent, UndoMove(epoch=Epoch(5)))
    assert_serves(agent, 3)


def is_not_served(actions: list[Action]) -> bool:
    """Return whether the coordinator is told, and only that, that the plan is not served here."""
    (send,) = actions
    assert isinstance(send, Send)
    return isinstance(send.message, TaskFailed) and send.message.code == NOT_SERVED


def assert_not_run(agent: Agent, epoch: int) -> None:
    assert hear(agent, task(epoch, step=400)) == []


def test_export_that_fails_names_whom_it_was_for() -> None:
    agent, export = sending()
    assert isinstance(export, ExportKV)
    actions = do(agent, KVOrderFailed(export, StageError("no such layers")))
    told = failure(actions)
    assert (told.worker, told.code, told.message) == ("nas", "stage_error", "no such layers")
    assert do(agent, KVOrderFailed(export, StageError("again"))) == []


def test_failure_ends_all_transfers_and_is_told_once() -> None:
    agent = serving_3()
    hear(agent, copy(NAS, TO_MAC))
    do(agent, LinkUp(TO_NAS, 0.001))
    actions = do(agent, LinkDown(TO_NAS))
    assert actions[:2] == [CloseLink(TO_NAS), CloseLink(LinkId(Epoch(5), FIRST))]
    assert do(agent, LinkUp(LinkId(Epoch(5), FIRST), 0.001)) == []
    assert pass_time(agent, 100.0) == []


def test_coordinator_may_commit_after_a_failure() -> None:
    agent = both()
    (assemble,) = hear(agent, hand_over(5))
    do(agent, KVOrderFailed(assemble, StageError("no")))  # type: ignore[arg-type]
    assert hear(agent, DropStage(epoch=Epoch(3))) == [Serve(Epoch(5))]
    assert_serves(agent, 5)


@pytest.mark.parametrize(
    "wrong",
    [
        copy(NAS, KVTransfer(layers=COMES, worker="mac", addresses=("a:1",))),
        copy(KVTransfer(layers=LayerRange(1, 3), worker="mac", addresses=("a:1",))),
    ],
)
def test_order_to_copy_layers_that_are_not_here(wrong: CopyKV) -> None:
    agent = serving_3()
    told = failure(hear(agent, wrong))
    assert (told.epoch, told.worker, told.code) == (5, "", "bad_order")
    assert_serves(agent, 3)


def test_order_to_copy_where_nothing_is_served() -> None:
    assert failure(hear(joined(), copy())).code == "bad_order"
    agent = joined()
    hear(agent, order(3))  # still loading
    assert failure(hear(agent, copy())).code == "bad_order"


def test_orders_of_wrong_epochs() -> None:
    agent = both()
    assert hear(agent, copy(epoch=3)) == hear(agent, copy(epoch=2)) == []
    assert failure(hear(agent, copy(epoch=9))).epoch == 9
    assert hear(agent, hand_over(3)) == []
    assert failure(hear(agent, hand_over(9))).epoch == 9
    for epoch in (2, 3, 4, 9):
        assert hear(agent, UndoMove(epoch=Epoch(epoch))) == []
    assert_serves(agent, 3)


def test_second_order_to_copy_is_ignored() -> None:
    agent, _ = sending()
    assert hear(agent, copy()) == []


# ------------------------------------------------------------------ being sent


def receiving(imports: Sequence[LayerRange] = (COMES,)) -> Agent:
    agent = both(imports)
    do(agent, PeerReceived(SENDER, PeerHello(epoch=Epoch(5), key=proof("new", Epoch(5), "pc-2"))))
    return agent


def arrive(agent: Agent, message: KVPieces | KVEnd, peer: PeerId = SENDER) -> list[Action]:
    return do(agent, PeerReceived(peer, message, (b"1234",)))


def importing(agent: Agent, message: KVPieces | KVEnd) -> ImportKV:
    (order,) = arrive(agent, message)
    assert order == ImportKV(0, message, (b"1234",))
    assert not agent.is_void(order)
    return order


def unread(kind: type | None = None, epoch: int = 5) -> RemoteProtocolError:
    """The error of reading a message of which no more can be told than these."""
    outline = Outline(type=tag_of(kind), epoch=Epoch(epoch)) if kind else Outline()
    return RemoteProtocolError("bad_field", "too long", outline)


@pytest.mark.parametrize("kind", [KVPieces, KVEnd])
def test_kv_cache_that_cannot_be_read_fails_the_move_at_once(kind: type) -> None:
    agent = receiving()
    assert do(agent, PeerGarbage(unread(kind), PeerId(b"stranger"))) == []
    assert do(agent, PeerGarbage(unread(kind, epoch=3), SENDER)) == []
    said = failure(do(agent, PeerGarbage(unread(kind), SENDER)))
    assert (said.epoch, said.worker, said.code) == (5, "", "remote_protocol")
    assert "cannot be read" in said.message
    assert "too long" in said.message
    assert do(agent, PeerGarbage(unread(kind), SENDER)) == []  # it is told once


def test_whatever_cannot_be_read_of_who_sends_kv_cache_is_a_part_of_it() -> None:
    """Though not even that can be told of it; nothing else comes over that connection."""
    agent = receiving()
    assert do(agent, PeerGarbage(unread(), SENDER)) == []
    arrive(agent, pieces(1, COMES))
    assert "too long" in failure(do(agent, PeerGarbage(unread(), SENDER))).message


def test_a_task_of_the_new_epoch_that_cannot_be_read_fails_its_step_only() -> None:
    agent = receiving()
    outline = Outline(type=tag_of(Task), epoch=Epoch(5), step=StepNumber(7))
    error = RemoteProtocolError("bad_field", "too long", outline)
    (told,) = do(agent, PeerGarbage(error, SENDER))
    assert isinstance(told, Send)
    assert isinstance(told.message, TaskFailed)


@pytest.mark.parametrize("error", [unread(KVTaken), unread(), ProtocolMismatch("version 9")])
def test_a_receipt_that_cannot_be_read_fails_the_move_at_once(error: DistributedLLMError) -> None:
    agent, export = sending()
    exported(agent, export, pieces(1))
    assert do(agent, PeerGarbage(error)) == []
    assert do(agent, PeerGarbage(error, link=LinkId(Epoch(5)))) == []
    assert do(agent, PeerGarbage(error, link=LinkId(Epoch(3), SECOND))) == []
    said = failure(do(agent, PeerGarbage(error, link=TO_NAS)))
    assert (said.epoch, said.worker, said.code) == (5, "nas", error.code)
    assert str(error) in said.message


def test_what_arrives_is_acknowledged_once_it_is_kept() -> None:
    agent = receiving()
    for number in (1, 2):
        order = importing(agent, pieces(number, COMES))
        ack = KVTaken(epoch=Epoch(5), layers=COMES, number=number)
        assert do(agent, KVImported(order)) == [SendToPeer(SENDER, ack)]
    assert arrive(agent, pieces(2, COMES)) == []  # came twice
    assert_serves(agent, 3)


@pytest.mark.parametrize("end_first", [False, True])
def test_it_assembles_once_all_has_arrived(end_first: bool) -> None:
    other = LayerRange(1, 2)
    agent = receiving([COMES, other])
    assert without_answers(hear(agent, hand_over(5)) if not end_first else []) == []
    for layers in (COMES, other):
        order = importing(agent, end(1, layers))
        actions = without_answers(do(agent, KVImported(order)))
    if end_first:
        assert actions == []
        actions = hear(agent, hand_over(5))
    assert actions == [AssembleKV(0, Epoch(5))]
    assert not agent.is_void(actions[0])  # type: ignore[arg-type]
    assert hear(agent, hand_over(5)) == []
    assert hear(agent, task(3)) == []
    assert do(agent, KVAssembled(AssembleKV(0, Epoch(5)))) == [Send(HandedOver(epoch=Epoch(5)))]
    with pytest.raises(IllegalTransition):
        do(agent, KVAssembled(AssembleKV(0, Epoch(5))))


def without_answers(actions: list[Action]) -> list[Action]:
    return [action for action in actions if not isinstance(action, SendToPeer)]


def test_it_does_not_assemble_before_the_end_is_kept() -> None:
    agent = receiving()
    first, last = importing(agent, pieces(1, COMES)), importing(agent, end(2, COMES))
    assert hear(agent, hand_over(5)) == []
    assert without_answers(do(agent, KVImported(first))) == []
    assert without_answers(do(agent, KVImported(last))) == [AssembleKV(0, Epoch(5))]


def test_idle_worker_without_imports_assembles_at_once() -> None:
    agent = only_new()
    assert hear(agent, hand_over(5)) == [AssembleKV(0, Epoch(5))]


def test_sender_with_new_layers_of_its_own_does_both() -> None:
    agent = both([COMES])
    hear(agent, copy())
    do(agent, LinkUp(TO_NAS, 0.001))
    exported(agent, ExportKV(0, Epoch(5), SECOND, 1, False), None)
    assert hear(agent, hand_over(5)) == [ExportKV(0, Epoch(5), SECOND, 1, rest=True)]


@pytest.mark.parametrize("what", ["stranger", "other epoch", "old epoch", "other range"])
def test_kv_cache_that_nobody_asked_for_is_dropped(what: str) -> None:
    agent = receiving()
    if what == "old epoch":
        do(
            agent,
            PeerReceived(SENDER, PeerHello(epoch=Epoch(3), key=proof("secret", Epoch(3), "pc-2"))),
        )
    epoch = {"other epoch": 6, "old epoch": 3}.get(what, 5)
    layers = SECOND if what == "other range" else COMES
    peer = PeerId(b"stranger") if what == "stranger" else SENDER
    assert arrive(agent, pieces(1, layers, epoch), peer) == []
    importing(agent, pieces(1, COMES))


def test_range_comes_of_one_worker_only() -> None:
    agent = receiving()
    other = PeerId(b"other")
    do(agent, PeerReceived(other, PeerHello(epoch=Epoch(5), key=proof("new", Epoch(5), "pc-2"))))
    importing(agent, pieces(1, COMES))
    assert arrive(agent, pieces(1, COMES), other) == arrive(agent, pieces(2, COMES), other) == []
    importing(agent, pieces(2, COMES))


@pytest.mark.parametrize("how", ["gap", "window", "after the end"])
def test_sender_that_breaks_the_rules(how: str) -> None:
    agent = receiving()
    importing(agent, end(1, COMES) if how == "after the end" else pieces(1, COMES))
    if how == "window":
        importing(agent, pieces(2, COMES))
    wrong = {"gap": 3, "window": 3, "after the end": 2}[how]
    told = failure(arrive(agent, pieces(wrong, COMES)))
    assert (told.worker, told.code) == ("", "bad_transfer")
    assert arrive(agent, pieces(wrong, COMES)) == []


def test_kv_cache_before_the_layers_are_loaded_is_refused() -> None:
    agent = serving_3()
    hear(agent, beside(5, [COMES]))
    do(agent, PeerReceived(SENDER, PeerHello(epoch=Epoch(5), key=proof("new", Epoch(5), "pc-2"))))
    assert failure(arrive(agent, pieces(1, COMES))).code == "not_ready"


def test_handover_before_the_layers_are_loaded_is_refused() -> None:
    agent = serving_3()
    hear(agent, beside())
    assert failure(hear(agent, hand_over(5))).code == "not_ready"
    assert_serves(agent, 3)


@pytest.mark.parametrize("what", ["import", "assemble"])
def test_what_cannot_be_assembled_is_told(what: str) -> None:
    agent = receiving()
    order: ImportKV | AssembleKV = importing(agent, end(1, COMES))
    if what == "assemble":
        do(agent, KVImported(order))  # type: ignore[arg-type]
        (order,) = hear(agent, hand_over(5))  # type: ignore[assignment]
    (said,) = do(agent, KVOrderFailed(order, StageError("is not whole")))
    told = failure([said])
    assert (told.epoch, told.worker, told.code) == (5, "", "stage_error")
    assert told.message == "is not whole"
    assert agent.is_void(order)
    assert do(agent, KVAssembled(AssembleKV(0, Epoch(5)))) == []


def test_sender_that_falls_silent_after_the_handover_began() -> None:
    agent = receiving()
    assert pass_time(agent, 200.0) == []  # nothing is waited for yet
    hear(agent, hand_over(5), 200.0)
    do(agent, PeerReceived(SENDER, pieces(1, COMES), (b"1234",)), 210.0)
    ((at, actions),) = pass_time(agent, 1000.0)
    assert at == 240.0
    told = failure(actions)
    assert (told.worker, told.code) == ("", "deadline_exceeded")
    assert "layers 3-4" in told.message


def test_kv_cache_that_comes_after_the_commit_is_dropped() -> None:
    agent = receiving()
    hear(agent, DropStage(epoch=Epoch(3)))
    assert arrive(agent, pieces(1, COMES)) == []


# ------------------------------------------------------------------ tasks before the handover


def test_tasks_from_before_the_handover_stay_void_when_the_move_is_undone() -> None:
    agent = both()
    waiting = run_of(agent, task(3, step=7), b"1234")
    hear(agent, hand_over(5, first_step=9))
    assert agent.is_void(waiting)
    assert hear(agent, task(3, step=8)) == [], "it was sent before, and came over a slow link"
    hear(agent, UndoMove(epoch=Epoch(5)))
    assert agent.is_void(waiting)
    assert do(agent, ComputeFailed(waiting, StageError("no"))) == []
    assert hear(agent, task(3, step=8)) == []
    assert_serves(agent, 3, 9)


@pytest.mark.parametrize("phase", ["handover", "assembling", "assembled"])
def test_a_task_from_after_the_handover_overtakes_the_news_that_the_move_is_undone(
    phase: str,
) -> None:
    """It comes from the worker before, the news from the coordinator; it must not be lost."""
    agent = serving_3()
    go_through(agent, phases()[phase])
    close, unload, run = hear(agent, task(3, step=450))
    assert (close, unload) == (CloseLink(TO_NAS), Unload(Epoch(5)))
    assert isinstance(run, Run)
    assert not agent.is_void(run)
    assert beats(agent) == (3,)
    assert hear(agent, UndoMove(epoch=Epoch(5))) == []
    assert_serves(agent, 3)


def test_as_many_tasks_as_before_may_wait_after_the_move_is_undone() -> None:
    agent = both()
    for step in range(32):
        run_of(agent, task(3, step=step), b"1234")
    hear(agent, hand_over(5, first_step=32))
    hear(agent, UndoMove(epoch=Epoch(5)))
    for step in range(32, 64):
        run_of(agent, task(3, step=step), b"1234")
