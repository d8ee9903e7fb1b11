"""The phases of a move: what is sent when, and to whom."""

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributed_llm.common.keys import NOBODY
from distributed_llm.common.messages import (
    CopyKV,
    DropStage,
    HandOver,
    KVTransfer,
    StageReady,
    UndoMove,
)
from distributed_llm.common.settings import CoordinatorSettings
from distributed_llm.common.states import IllegalTransition
from distributed_llm.common.types import Epoch, LayerRange, PeerId, SequenceId, WorkerId
from distributed_llm.coordinator.cluster.kv_transfers import transfers_between
from distributed_llm.coordinator.cluster.move import MOVE_STATES, Move, MoveCause, MoveState
from distributed_llm.coordinator.cluster.move_price import Price
from distributed_llm.coordinator.events import Send
from distributed_llm.coordinator.plan import PipelineStage, PlannedStage
from distributed_llm.coordinator.serving.pipeline import Pipeline, PipelineState
from tests.unit.fake_model import MODEL

SETTINGS = CoordinatorSettings(max_batch_sequences=16, max_batch_tokens=32, task_timeout_s=10.0)


def stages(*layers: tuple[str, int, int]) -> tuple[PipelineStage, ...]:
    return tuple(
        PipelineStage(PeerId(name.encode()), WorkerId(name), LayerRange(start, stop))
        for name, start, stop in layers
    )


class Bench:
    """A pipeline that serves, and a move of it."""

    def __init__(
        self,
        old: tuple[PipelineStage, ...],
        new: tuple[PipelineStage, ...],
        *,
        copies: bool,
        handover_s: float = 0.0,
    ) -> None:
        ids = itertools.count()
        self.old, self.new = (
            Pipeline(
                Epoch(epoch),
                tuple(PlannedStage(stage.worker, stage.layers, 1, 640) for stage in some),
                some,
                MODEL,
                SETTINGS,
                lambda: SequenceId(next(ids)),
                lambda pipeline: None,
            )
            for epoch, some in ((3, old), (4, new))
        )
        for stage in old:
            self.old.stage_ready(stage.peer, ready(3))
        self.old.serve()
        addresses = {stage.peer: (f"{stage.worker}:1",) for stage in new}
        self.move = Move(
            self.old,
            self.new,
            addresses=addresses,
            keys=dict.fromkeys(addresses, NOBODY),
            link_key="key",
            price=Price(0.0, copies, 5.0, cached_tokens=0, kv_tokens=640, handover_s=handover_s),
            why="it is better",
            reason="faster",
            now=10.0,
        )

    def load(self, now: float = 11.0) -> list[Send]:
        """All new stages have loaded."""
        for stage in self.new.stages:
            last = self.new.stage_ready(stage.peer, ready(4))
        assert last
        return self.move.loaded(now=now)


def where(move: Move) -> MoveState:
    return move.state


def doing(pipeline: Pipeline) -> PipelineState:
    return pipeline.state


def ready(epoch: int) -> StageReady:
    return StageReady(epoch=Epoch(epoch), credits=4, load_s=1.0, weight_bytes=1, kv_tokens=640)


def told(sends: Sequence[Send], kind: type) -> list[str]:
    assert all(isinstance(send.message, kind) for send in sends)
    return [send.peer.decode() for send in sends]


OLD = stages(("a", 0, 4), ("b", 4, 8))
SHIFTED = stages(("a", 0, 2), ("b", 2, 8))


# ------------------------------------------------------------------ who sends what


def test_a_shifted_cut_sends_what_lies_between() -> None:
    (only,) = transfers_between(OLD, SHIFTED)
    assert (only.sender.worker, only.receiver.worker, only.layers) == ("a", "b", LayerRange(2, 4))


def test_a_worker_in_the_middle_gets_both_ends() -> None:
    new = stages(("a", 0, 2), ("c", 2, 6), ("b", 6, 8))
    found = [(t.sender.worker, t.receiver.worker, t.layers) for t in transfers_between(OLD, new)]
    assert found == [("a", "c", LayerRange(2, 4)), ("b", "c", LayerRange(4, 6))]


def test_workers_may_change_places() -> None:
    new = stages(("b", 0, 4), ("a", 4, 8))
    found = [(t.sender.worker, t.receiver.worker, t.layers) for t in transfers_between(OLD, new)]
    assert found == [("a", "b", LayerRange(0, 4)), ("b", "a", LayerRange(4, 8))]


@st.composite
def plans(draw: st.DrawFn) -> tuple[PipelineStage, ...]:
    """Some of six workers, in any order, with all of twelve layers."""
    names = draw(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=6, unique=True))
    cuts = draw(
        st.lists(st.integers(1, 11), min_size=len(names) - 1, max_size=len(names) - 1, unique=True)
    )
    edges = [0, *sorted(cuts), 12]
    return stages(*zip(names, edges, edges[1:], strict=False))


@given(old=plans(), new=plans())
def test_every_layer_is_there_already_or_sent_once_by_who_has_it(
    old: tuple[PipelineStage, ...], new: tuple[PipelineStage, ...]
) -> None:
    had = {stage.peer: set(range(stage.layers.start, stage.layers.stop)) for stage in old}
    sent: dict[PeerId, list[int]] = {stage.peer: [] for stage in new}
    for transfer in transfers_between(old, new):
        layers = range(transfer.layers.start, transfer.layers.stop)
        assert set(layers) <= had[transfer.sender.peer]
        assert transfer.sender.peer != transfer.receiver.peer
        sent[transfer.receiver.peer] += layers
    for stage in new:
        wanted = set(range(stage.layers.start, stage.layers.stop))
        assert sorted(sent[stage.peer]) == sorted(wanted - had.get(stage.peer, set()))


# ------------------------------------------------------------------ phases


def test_a_move_with_its_kv_cache() -> None:
    bench = Bench(OLD, SHIFTED, copies=True)
    move = bench.move
    sends = bench.load()
    assert told(sends, CopyKV) == ["a"]
    transfer = KVTransfer(layers=LayerRange(2, 4), worker="b", addresses=("b:1",))
    assert sends[0].message == CopyKV(epoch=Epoch(4), link_key="key", transfers=(transfer,))
    assert doing(bench.old) is PipelineState.SERVING, "serving goes on while it is copied"
    assert move.copied(PeerId(b"b"), now=12.0) == [], "it has nothing to send"
    assert told(move.copied(PeerId(b"a"), now=12.0), HandOver) == ["a", "b"]
    assert doing(bench.old) is PipelineState.PAUSED
    assert move.paused_at == 12.0
    move.handed_over(PeerId(b"a"))
    assert where(move) is MoveState.HANDOVER
    move.handed_over(PeerId(b"b"))
    assert where(move) is MoveState.COMMITTED
    assert told(move.commit_orders(), DropStage) == ["a", "b"]
    assert {send.message for send in move.commit_orders()} == {DropStage(epoch=Epoch(3))}


def test_who_only_sends_is_told_to_send_the_rest_but_not_waited_for() -> None:
    new = stages(("b", 0, 8))
    bench = Bench(OLD, new, copies=True)
    bench.load()
    assert told(bench.move.copied(PeerId(b"a"), now=12.0), HandOver) == ["a", "b"]
    bench.move.handed_over(PeerId(b"b"))
    assert where(bench.move) is MoveState.COMMITTED
    assert told(bench.move.commit_orders(), DropStage) == ["a", "b"]


def test_without_copying_it_ends_when_the_steps_have() -> None:
    bench = Bench(OLD, SHIFTED, copies=False)
    assert bench.load() == []
    assert doing(bench.old) is PipelineState.PAUSED
    assert where(bench.move) is MoveState.COMMITTED


def test_where_nothing_changes_hands_nothing_is_copied() -> None:
    bench = Bench(stages(("a", 0, 8)), stages(("a", 0, 8)), copies=True)
    assert told(bench.load(), HandOver) == ["a"]


@pytest.mark.parametrize("state", [MoveState.LOADING, MoveState.COPYING, MoveState.HANDOVER])
def test_a_move_can_be_undone_in_any_state(state: MoveState) -> None:
    bench = Bench(OLD, stages(("c", 0, 2), ("b", 2, 8)), copies=True)
    if state is not MoveState.LOADING:
        bench.load()
    if state is MoveState.HANDOVER:
        bench.move.copied(PeerId(b"a"), now=12.0)
        assert doing(bench.old) is PipelineState.PAUSED
    assert bench.move.state is state
    sends = bench.move.undo()
    assert told(sends, UndoMove) == ["a", "b", "c"]
    assert {send.message for send in sends} == {UndoMove(epoch=Epoch(4))}
    assert doing(bench.old) is PipelineState.SERVING, "steps begin again"


def test_a_phase_has_a_time_limit() -> None:
    bench = Bench(OLD, SHIFTED, copies=True)
    assert bench.move.next_deadline() is None, "the progress of loads is watched"
    bench.load(now=20.0)
    assert bench.move.next_deadline() == 20.0 + 30.0 + 4 * 5.0
    bench.move.copied(PeerId(b"a"), now=30.0)
    assert bench.move.next_deadline() == 30.0 + 10.0


def test_states_have_their_time_in_the_handover() -> None:
    bench = Bench(OLD, SHIFTED, copies=True, handover_s=6.0)
    bench.load(now=20.0)
    bench.move.copied(PeerId(b"a"), now=30.0)
    assert bench.move.next_deadline() == 30.0 + 10.0 + 4 * 6.0


def test_copying_that_does_not_come_to_an_end_is_ended() -> None:
    bench = Bench(OLD, SHIFTED, copies=True)
    bench.load()
    assert told(bench.move.copy_timed_out(now=70.0), HandOver) == ["a", "b"]
    assert doing(bench.old) is PipelineState.PAUSED


def test_answers_at_the_wrong_time_change_nothing() -> None:
    bench = Bench(OLD, SHIFTED, copies=True)
    for state in (MoveState.LOADING, MoveState.COPYING):
        if state is MoveState.LOADING:
            assert bench.move.copied(PeerId(b"a"), now=11.0) == []
        else:
            bench.load()
        for stage in SHIFTED:
            bench.move.handed_over(stage.peer)
        assert bench.move.state is state


def test_who_says_again_that_it_has_copied_has_not_taken_over() -> None:
    bench = Bench(OLD, SHIFTED, copies=True)
    bench.load()
    bench.move.copied(PeerId(b"a"), now=12.0)
    for stage in SHIFTED:
        assert bench.move.copied(stage.peer, now=12.5) == []
    bench.move.handed_over(PeerId(b"a"))
    assert where(bench.move) is MoveState.HANDOVER


# ------------------------------------------------------------------ the table


def test_nothing_happens_to_a_move_that_has_ended() -> None:
    for state in (MoveState.COMMITTED, MoveState.UNDONE):
        assert not any(MOVE_STATES.allows(state, cause) for cause in MoveCause)


def test_every_state_before_the_end_can_be_undone() -> None:
    for state in set(MoveState) - {MoveState.COMMITTED, MoveState.UNDONE}:
        assert MOVE_STATES.after(state, MoveCause.CANCELLED) is MoveState.UNDONE


def test_a_move_that_is_undone_twice_is_a_bug() -> None:
    bench = Bench(OLD, SHIFTED, copies=True)
    bench.move.undo()
    with pytest.raises(IllegalTransition, match="a move: CANCELLED cannot happen while UNDONE"):
        bench.move.undo()
