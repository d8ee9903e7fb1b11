"""What a move costs, and how it is carried out or undone."""

from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from distributed_llm.common.messages import (
    CopyKV,
    DropStage,
    HandedOver,
    HandOver,
    KVCopied,
    KVFailed,
    LoadStage,
    StageFailed,
    UndoMove,
)
from distributed_llm.common.types import KV_BLOCK, Epoch, LayerRange, PeerId
from distributed_llm.coordinator.cluster.move import Move, MoveState
from distributed_llm.coordinator.cluster.move_price import Price
from distributed_llm.coordinator.cluster.worker import WorkerState
from distributed_llm.coordinator.events import Action
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.serving.pipeline import Pipeline, PipelineState
from tests.unit.coordinator_parts import COST, Parts, ranges_of, ready, sent

Held = tuple[str, int, int]

OLD: tuple[Held, ...] = (("a", 0, 3), ("b", 3, 6))
SHIFTED: tuple[Held, ...] = (("a", 0, 2), ("b", 2, 6))


def moving(*old: Held, memory: int = 10_000, prompt: int = 100, **given: Any) -> Parts:
    """Return workers that serve these layers, or `OLD`, with an answer that takes two blocks.

    A layer takes a quarter of a second on `a`, and half of one on `b`.
    """
    parts = Parts({"a": memory, "b": memory, "c": memory}, **given)
    parts.measurements.layer_times = {"a": 0.25, "b": 0.5}
    pipeline = parts.serve(*(old or OLD))
    if prompt:
        parts.ask(pipeline, prompt)
    return parts


def price(parts: Parts, *new: Held) -> Price:
    return parts.moves.prices.price(parts.pipelines.all[0], parts.plan(*(new or SHIFTED)))


# ------------------------------------------------------------------ what it would cost


def test_the_price_of_a_shifted_cut() -> None:
    """128 positions of one layer go to b, at 64 bytes per second; it reads 1000 bytes at 500.

    To compute them again takes b, with four layers, as long as one chunk: 4 x 0.5 s.
    """
    parts = moving()
    parts.worker("b").load_bytes_per_s = 500.0
    found = price(parts)
    assert found.copies
    assert found.copy_s == pytest.approx(2.0)
    assert found.standstill_s == pytest.approx(0.3 + 0.5 * (2.0 + 2.0))


def test_what_is_cheaper_to_compute_again_is_not_copied() -> None:
    """Copying takes 8 s at half the speed, computing again 2 s: a second more would be borne."""
    parts = moving()
    parts.worker("b").load_bytes_per_s = 500.0
    parts.measurements.rate = 16.0
    found = price(parts)
    assert not found.copies
    assert found.copy_s == pytest.approx(8.0)
    assert found.standstill_s == pytest.approx(0.3 + 0.5 * 2.0 + 2.0)


@pytest.mark.parametrize(("rate", "copies"), [(21.4, True), (21.2, False)])
def test_copying_may_cost_a_second_more_than_computing_again(rate: float, copies: bool) -> None:
    parts = moving()
    parts.measurements.rate = rate  # 128 / 21.33 is 6 s, of which half the speed is lost
    assert price(parts).copies == copies


def test_an_encoder_needs_no_room_beside_its_layers() -> None:
    """For 40 positions there are bytes left on c; it keeps none, so that all others stay."""
    cost = replace(COST, layer_kv_bytes=(0, 0, 1, 1, 1, 1), encoder_layers=2)
    just = cost.weight_bytes(LayerRange(0, 2)) + 40
    parts = Parts({"a": 10_000, "b": 10_000, "c": just}, cost)
    pipeline = parts.serve(("a", 0, 2), ("b", 2, 6))
    parts.ask(pipeline, 100)
    found = price(parts, ("c", 0, 2), ("b", 2, 6))
    assert found.kv_tokens == pipeline.kv_tokens > 100
    assert found.copy_s == 0.0


def test_the_stage_that_takes_longest_tells_how_long_it_is_computed_again() -> None:
    """There is no room for both, so that all is loaded anew; 256 positions are two chunks."""
    parts = moving(memory=4400, prompt=200)
    parts.worker("a").load_bytes_per_s = 3300.0
    parts.worker("c").load_bytes_per_s = 350.0
    found = price(parts, ("c", 0, 3), ("a", 3, 6))
    parts.measurements.layer_times = {"a": 0.25, "b": 0.5, "c": 0.5}
    again = price(parts, ("c", 0, 3), ("a", 3, 6))
    assert (found.kv_tokens, again.kv_tokens) == (None, None)
    assert found.standstill_s == pytest.approx(3500 / 350 + 2 * 3 * 1.0)
    assert again.standstill_s == pytest.approx(3500 / 350 + 2 * 3 * 0.5)
    assert not again.copies


def test_the_latest_standstill_is_the_one_that_is_expected() -> None:
    parts = moving()
    before = price(parts).standstill_s
    parts.moves.prices.stall_s = 1.5
    assert price(parts).standstill_s == pytest.approx(before + 1.2)


STATEFUL = replace(COST, layer_state_bytes=(32,) * 6)


def test_states_of_running_answers_are_sent_while_they_stand_still() -> None:
    """At 64 bytes per second: 128 positions of one layer before that, one state meanwhile."""
    parts = moving(cost=STATEFUL)
    parts.worker("b").load_bytes_per_s = 500.0
    found = price(parts)
    assert found.copies
    assert found.copy_s == pytest.approx(2.0, abs=0.1)
    assert found.handover_s == pytest.approx(0.5)
    assert found.standstill_s == pytest.approx(0.3 + 0.5 + 0.5 * (2.0 + found.copy_s))


@pytest.mark.parametrize(("state_bytes", "copies"), [(124, True), (132, False)])
def test_states_that_would_take_too_long_are_computed_again(state_bytes: int, copies: bool) -> None:
    """Half the speed is lost for 2 s, then all of it; to compute all again takes b 2 s."""
    parts = moving(cost=replace(COST, layer_state_bytes=(state_bytes,) * 6))
    found = price(parts)
    assert found.copies == copies
    assert found.handover_s == (pytest.approx(state_bytes / 64) if copies else 0.0)


def test_nothing_is_sent_where_nothing_is_used() -> None:
    parts = moving(prompt=0)
    found = price(parts)
    assert found.copies
    assert found.copy_s == 0.0


# ------------------------------------------------------------------ memory


def whole_blocks(tokens: int) -> int:
    return tokens // KV_BLOCK * KV_BLOCK


def test_room_is_what_both_stages_leave_in_whole_blocks() -> None:
    """b keeps 3300 bytes and reads 1000; the caches of four layers share what is left.

    A request for the rest of a block would be told to wait at the head of the queue for room that
    never comes.
    """
    assert price(moving()).kv_tokens == whole_blocks((10_000 - 3300 - 1000) // 4)


def test_there_is_no_more_room_than_before() -> None:
    """a has 3500 bytes of weights, which leave 6500 for three layers: in whole blocks 2112."""
    assert price(moving(), ("a", 0, 3), ("c", 3, 6)).kv_tokens == 2112


def test_embedding_and_head_count_for_who_did_not_have_them() -> None:
    parts = moving(("a", 0, 2), ("b", 2, 4), ("c", 4, 6))
    turned = (("b", 0, 2), ("a", 2, 6))
    memory = parts.worker("a").capabilities.memory_bytes
    of_a = (memory - 2500 - 4000 - 300) // 6
    of_b = (memory - 2000 - 2000 - 500) // 4
    assert price(parts, *turned).kv_tokens == whole_blocks(min(of_a, of_b))


@pytest.mark.parametrize(("memory", "room"), [(4812, 128), (4811, None)])
def test_a_move_needs_room_for_what_is_used(memory: int, room: int | None) -> None:
    """b holds 4300 bytes of weights, and 128 positions of four layers."""
    assert price(moving(memory=memory)).kv_tokens == room


@pytest.mark.parametrize(("memory", "room"), [(4912, 128), (4911, None)])
def test_a_move_leaves_room_for_what_a_step_takes(memory: int, room: int | None) -> None:
    cost = replace(COST, workspace_bytes=100)
    assert price(moving(memory=memory, cost=cost)).kv_tokens == room


@pytest.mark.parametrize(("memory", "room"), [(4556, 64), (4555, None)])
def test_a_move_needs_room_for_one_block(memory: int, room: int | None) -> None:
    assert price(moving(memory=memory, prompt=0)).kv_tokens == room


@st.composite
def plans(draw: st.DrawFn) -> tuple[Held, ...]:
    names = draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=3, unique=True))
    cuts = sorted(
        draw(st.sets(st.integers(1, 5), min_size=len(names) - 1, max_size=len(names) - 1))
    )
    return tuple(zip(names, [0, *cuts], [*cuts, 6], strict=True))


def weights(cost: ModelCost, layers: LayerRange) -> dict[str, int]:
    """Return the matrices of a stage by name, and what they take."""
    found = {f"layer {i}": cost.layer_bytes[i] for i in range(layers.start, layers.stop)}
    if layers.start == 0:
        found["embedding"] = cost.first_bytes
    if layers.stop == 6:
        found["head"] = cost.last_bytes
    if layers.start == 0 or layers.stop == 6:
        found["tied"] = cost.shared_bytes
    return found


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    old=plans(),
    new=plans(),
    sizes=st.lists(st.integers(1, 900), min_size=6, max_size=6),
    ends=st.tuples(st.integers(0, 900), st.integers(0, 900), st.integers(0, 900)),
    kv_bytes=st.integers(1, 3),
    memory=st.lists(st.integers(1000, 9000), min_size=3, max_size=3),
)
def test_room_is_never_more_than_a_count_of_all_memory_finds(
    old: tuple[Held, ...],
    new: tuple[Held, ...],
    sizes: list[int],
    ends: tuple[int, int, int],
    kv_bytes: int,
    memory: list[int],
) -> None:
    """While both stages are there, a worker holds each matrix and each layer's cache once."""
    cost = ModelCost(tuple(sizes), *ends, (kv_bytes,) * len(sizes))
    parts = Parts(dict(zip("abc", memory, strict=True)), cost)
    was, comes = dict(ranges_of(*old)), dict(ranges_of(*new))
    assume(all(stage.kv_tokens >= 64 for stage in parts.plan(*old)))
    pipeline = parts.serve(*old)

    def fits(tokens: int) -> bool:
        for name, size in zip("abc", memory, strict=True):
            held = [part for part in (was.get(name), comes.get(name)) if part]  # type: ignore[call-overload]
            if held and held[-1] is comes.get(name):  # type: ignore[call-overload]
                matrices = {k: v for part in held for k, v in weights(cost, part).items()}
                layers = {i for part in held for i in range(part.start, part.stop)}
                if sum(matrices.values()) + tokens * kv_bytes * len(layers) > size:
                    return False
        return True

    room = parts.moves.prices.price(pipeline, parts.plan(*new)).kv_tokens
    most = max((t for t in range(pipeline.kv_tokens + 1) if fits(t)), default=-1)
    assert room == (whole_blocks(most) if most >= KV_BLOCK else None)


# ------------------------------------------------------------------ carrying it out


def begun(parts: Parts, *new: Held, copies: bool = True) -> tuple[Pipeline, Move, list[Action]]:
    old = parts.pipelines.all[0]
    found = replace(price(parts, *new), copies=copies)
    plan = parts.plan(*(new or SHIFTED))
    actions = parts.moves.begin(old, plan, found, why="it is better", now=10.0)
    assert parts.moves.move
    return old, parts.moves.move, actions


def loaded(parts: Parts) -> list[Action]:
    """All new stages have loaded."""
    move = parts.moves.move
    assert move
    actions: list[Action] = []
    for stage in move.new.stages:
        worker = parts.registry.worker(stage.peer)
        assert worker
        actions += parts.moves.stage_ready(worker, ready(move.new.epoch), now=11.0) or []
    return actions


def test_a_move_from_beginning_to_end() -> None:
    parts = moving()
    old, move, actions = begun(parts)
    assert sent(actions) == [("b", LoadStage), ("a", LoadStage)]
    assert (
        parts.event_log.entries[-1].text
        == "moving to plan 2: layers 1-2 of 6 on a, 3-6 on b; until now layers 1-3 of 6 on a, 4-6 "
        "on b; because it is better"
    )
    assert parts.moves.next_layers(parts.worker("b")) == LayerRange(2, 6)
    assert sent(loaded(parts)) == [("a", CopyKV)]
    said = KVCopied(epoch=Epoch(2), bytes_sent=128)
    assert sent(parts.moves.copied(parts.worker("a"), said, now=12.0)) == [
        ("a", HandOver),
        ("b", HandOver),
    ]
    assert old.state is PipelineState.PAUSED
    assert parts.moves.settle(now=12.1) == []
    for name in ("a", "b"):
        parts.moves.handed_over(parts.worker(name), HandedOver(epoch=Epoch(2)))
    assert sent(parts.moves.settle(now=12.5)) == [("a", DropStage), ("b", DropStage)]
    assert parts.moves.move is None
    assert parts.moves.num_moves == 1
    assert parts.moves.prices.stall_s == pytest.approx(0.5)
    assert parts.pipelines.all == [move.new]
    assert parts.worker("b").layers == LayerRange(2, 6)
    parts.goes_on()


def test_what_states_should_have_taken_is_no_standstill_to_be_learnt() -> None:
    parts = moving(cost=replace(COST, layer_state_bytes=(16,) * 6))
    _, move, _ = begun(parts)
    assert move.price.handover_s == pytest.approx(0.25)
    loaded(parts)
    parts.moves.copied(parts.worker("a"), KVCopied(epoch=Epoch(2), bytes_sent=128), now=12.0)
    for name in ("a", "b"):
        parts.moves.handed_over(parts.worker(name), HandedOver(epoch=Epoch(2)))
    parts.moves.settle(now=12.6)
    assert parts.moves.stall_s == pytest.approx(0.6)
    assert parts.moves.prices.stall_s == pytest.approx(0.35)


def test_a_move_without_the_cache_says_so_and_keeps_what_was_learnt() -> None:
    parts = moving()
    old, move, _ = begun(parts, copies=False)
    assert "computing its KV cache again; because it is better" in parts.event_log.entries[-1].text
    loaded(parts)
    parts.moves.settle(now=12.0)
    assert parts.pipelines.all == [move.new]
    assert move.new.lineage == old.lineage == 1
    assert move.new.num_running == 0
    assert parts.book.num_waiting == 1


def test_while_it_moves_the_old_pipeline_has_less_room() -> None:
    """Beside both stages b has room for (5000 - 3300 - 1000) / 4 = 175 positions."""
    parts = moving(memory=5000)
    old, _, _ = begun(parts)
    assert old.scheduler
    assert old.kv_tokens == 448
    parts.waiting(150)
    assert not parts.book.admit(old.scheduler, now=11.0)
    parts.moves.undo("a test", now=12.0)
    assert parts.book.admit(old.scheduler, now=12.0), "it has all of it again"


def test_prefixes_go_along_as_far_as_that_is_quick() -> None:
    """At 64 bytes per second 128 positions take two seconds; of two prefixes the older one goes."""
    parts = moving()
    old = parts.pipelines.all[0]
    for _ in range(2):
        parts.keep(old, 100)
    assert old.scheduler
    assert old.scheduler.kv_tokens_cached == 256
    found = price(parts)
    assert found.cached_tokens == 128
    assert found.copy_s == pytest.approx((128 + 128) / 64)
    begun(parts)
    assert old.scheduler.kv_tokens_cached == 128


def test_prefixes_do_not_count_against_copying() -> None:
    """The answer's own KV cache may be copied; prefixes that go along take the rest of the time."""
    parts = moving()
    parts.keep(parts.pipelines.all[0], 100)
    parts.measurements.rate = 21.4
    found = price(parts)
    assert found.cached_tokens > 0
    assert found.copies


def test_a_move_that_is_carried_out_makes_good_those_that_were_undone() -> None:
    parts = moving()
    parts.moves.failures = 3
    begun(parts, copies=False)
    loaded(parts)
    parts.moves.settle(now=12.0)
    assert parts.moves.failures == 0


@pytest.mark.parametrize(("prompt", "stood_still"), [(0, False), (100, True)])
def test_nothing_stands_still_where_nothing_runs(prompt: int, stood_still: bool) -> None:
    parts = moving(prompt=prompt)
    begun(parts, copies=False)
    loaded(parts)
    parts.moves.settle(now=12.0)
    assert parts.moves.num_moves == 1
    assert (parts.moves.stall_s > 0) == stood_still
    assert ("stood still" in parts.event_log.entries[-1].text) == stood_still


def test_steps_under_way_end_before_anything_is_handed_over() -> None:
    parts = moving()
    old, move, _ = begun(parts, copies=False)
    assert old.begin_steps(now=10.5)
    loaded(parts)
    assert parts.moves.settle(now=12.0) == []
    assert move.state is MoveState.FINISHING_STEPS
    assert parts.moves.next_deadline() is None, "leases see to them"
    old.abandon_steps()
    parts.moves.settle(now=12.5)
    assert parts.pipelines.all == [move.new]
    assert parts.moves.prices.stall_s == pytest.approx(1.5)


def test_a_move_to_stages_without_room_for_what_runs_is_undone() -> None:
    """b turns out to have room for one block; the answer has two, and may take no less."""
    parts = moving()
    old, _, _ = begun(parts)
    for name, tokens in (("a", 640), ("b", 64)):
        said = msgspec.structs.replace(ready(2), kv_tokens=tokens)
        parts.moves.stage_ready(parts.worker(name), said, now=11.0)
    actions = parts.moves.settle(now=11.0)
    assert sent(actions) == [("a", UndoMove), ("b", UndoMove)]
    assert "have room for 64 tokens, and requests need" in parts.event_log.entries[-1].text
    assert (old.state, parts.book.num_running) == (PipelineState.SERVING, 1)
    parts.goes_on()


def test_states_are_counted_as_the_new_stages_charge_them() -> None:
    """Two take 640 of what there is room for now, and 512 where stages have fewer layers."""
    cost = replace(COST, layer_kv_bytes=(0,) * 6, layer_state_bytes=(100,) * 6)
    parts = moving(cost=cost)
    old, move, _ = begun(parts, ("a", 0, 2), ("b", 2, 4), ("c", 4, 6))
    assert old.scheduler
    assert old.scheduler.kv_tokens_used >= 640
    for name in ("a", "b", "c"):
        said = msgspec.structs.replace(ready(2), kv_tokens=512 + 2 * KV_BLOCK)
        parts.moves.stage_ready(parts.worker(name), said, now=11.0)
    move.copy_timed_out(now=12.0)
    assert parts.moves.settle(now=12.0) == []
    assert move.state is MoveState.HANDOVER


def test_a_move_is_undone_for_a_larger_request_that_came_before_the_commit() -> None:
    parts = moving(prompt=50)
    old, move, _ = begun(parts)
    for name in ("a", "b"):
        said = msgspec.structs.replace(ready(2), kv_tokens=128)
        parts.moves.stage_ready(parts.worker(name), said, now=11.0)
    move.copy_timed_out(now=12.0)
    assert move.state is MoveState.HANDOVER
    assert parts.moves.settle(now=12.0) == []
    parts.waiting(100, 60)
    assert sent(parts.moves.settle(now=12.1)) == [("a", UndoMove), ("b", UndoMove)]
    assert old.state is PipelineState.SERVING


def test_a_move_that_keeps_a_request_from_running_is_undone() -> None:
    """The room beside both layers is too small for it, and loading may take minutes."""
    parts = moving()
    old, _, _ = begun(parts)
    assert old.scheduler
    room = old.scheduler.kv_tokens
    answer = parts.waiting(room + 1, 20)
    assert answer.request.reserved_tokens <= old.kv_tokens
    loading_until = parts.moves.next_deadline()
    assert parts.book.waiting.next(old.scheduler.kv_tokens, now=20.0) is None
    assert parts.moves.next_deadline() == 30.0 != loading_until
    assert parts.moves.on_timer(now=29.9) == []
    assert sent(parts.moves.on_timer(now=30.0)) == [("a", UndoMove), ("b", UndoMove)]
    assert "waits for the room" in parts.event_log.entries[-1].text
    assert parts.book.waiting.next(old.scheduler.kv_tokens, now=30.0) is answer


@pytest.mark.parametrize("state", [MoveState.LOADING, MoveState.COPYING, MoveState.HANDOVER])
def test_a_move_that_is_undone_leaves_everything_as_it_was(state: MoveState) -> None:
    parts = moving()
    old, move, _ = begun(parts, ("c", 0, 2), ("b", 2, 6))
    if state is not MoveState.LOADING:
        loaded(parts)
    if state is MoveState.HANDOVER:
        parts.moves.copied(parts.worker("a"), KVCopied(epoch=Epoch(2), bytes_sent=1), now=12.0)
    assert move.state is state
    actions = parts.moves.undo("a test", now=13.0)
    assert sent(actions) == [("a", UndoMove), ("b", UndoMove), ("c", UndoMove)]
    assert parts.moves.move is None
    assert (parts.moves.failures, parts.moves.undone_at) == (1, 13.0)
    assert "the move was undone: a test" in parts.event_log.entries[-1].text
    assert old.state is PipelineState.SERVING
    assert move.new.state is PipelineState.ENDED
    assert parts.worker("c").layers is None
    assert parts.moves.next_layers(parts.worker("b")) is None
    assert parts.pipelines.pipeline_of(PeerId(b"c")) is None
    parts.goes_on()


def test_a_lost_worker_undoes_the_move_that_it_has_a_part_in() -> None:
    parts = moving()
    begun(parts)
    assert parts.moves.lost(parts.worker("c"), now=12.0) == []
    assert parts.moves.move
    lost = parts.registry.remove(PeerId(b"b"))
    assert lost
    assert sent(parts.moves.lost(lost, now=12.0)) == [("a", UndoMove)]
    assert parts.moves.move is None


def test_those_that_did_not_reach_each_other_compute_the_cache_again_next_time() -> None:
    parts = moving()
    begun(parts)
    loaded(parts)
    failed = KVFailed(epoch=Epoch(2), worker="b", code="unreachable", message="no answer")
    assert parts.moves.kv_failed(parts.worker("a"), failed, now=12.0)
    assert parts.moves.failures == 0, "the next move goes without, at once"
    assert not price(parts).copies
    assert price(parts, ("a", 0, 4), ("b", 4, 6)).copies, "the other way was not tried"
    parts.moves.lost(parts.worker("b"), now=13.0)
    assert price(parts).copies, "another worker of this name may be reached"


def test_a_failure_of_its_own_counts() -> None:
    parts = moving()
    begun(parts)
    loaded(parts)
    failed = KVFailed(epoch=Epoch(2), worker="", code="stage_error", message="no memory")
    parts.moves.kv_failed(parts.worker("b"), failed, now=12.0)
    assert parts.moves.failures == 1
    assert price(parts).copies


@pytest.mark.parametrize("code", ["stage_error", "unsupported_model"])
def test_an_idle_worker_that_cannot_load_is_not_asked_again(code: str) -> None:
    parts = moving()
    begun(parts, ("a", 0, 3), ("b", 3, 5), ("c", 5, 6))
    failed = StageFailed(epoch=Epoch(2), code=code, message="no room")
    assert parts.moves.stage_failed(parts.worker("c"), failed, now=11.0)
    assert parts.worker("c").state is WorkerState.UNFIT
    assert parts.worker("c").note == "no room"
    assert parts.worker("a").state is WorkerState.SERVING


def test_one_that_serves_and_cannot_load_serves_on() -> None:
    parts = moving()
    begun(parts)
    failed = StageFailed(epoch=Epoch(2), code="stage_error", message="no room")
    assert parts.moves.stage_failed(parts.worker("b"), failed, now=11.0)
    assert parts.worker("b").state is WorkerState.SERVING


def test_strangers_and_older_plans_change_nothing() -> None:
    parts = moving()
    _, move, _ = begun(parts)
    stranger, own = parts.worker("c"), parts.worker("a")
    for worker, epoch in ((stranger, 2), (own, 1)):
        kv_failed = KVFailed(epoch=Epoch(epoch), worker="b", code="stage_error", message="no")
        assert not parts.moves.is_loading(worker, Epoch(epoch))
        assert parts.moves.stage_ready(worker, ready(epoch), now=11.0) == []
        assert not parts.moves.concerns(worker, Epoch(epoch))
        assert parts.moves.kv_failed(worker, kv_failed, now=11.0) == []
    assert parts.moves.move is move
    assert move.state is MoveState.LOADING


def test_who_only_sends_has_nothing_to_load() -> None:
    parts = moving()
    _, move, _ = begun(parts, ("c", 0, 2), ("b", 2, 6))
    assert not parts.moves.is_loading(parts.worker("a"), Epoch(2))
    assert parts.moves.stage_ready(parts.worker("a"), ready(2), now=11.0) == []
    assert move.state is MoveState.LOADING


def test_copying_that_takes_too_long_ends_and_what_is_left_is_sent() -> None:
    parts = moving()
    begun(parts, ("b", 0, 3), ("a", 3, 6))
    loaded(parts)
    due = parts.moves.next_deadline()
    assert due is not None
    assert due == pytest.approx(11.0 + 30.0 + 4 * 6.0)
    assert sent(parts.moves.on_timer(now=due)) == [("a", HandOver), ("b", HandOver)]
    assert sent(parts.moves.on_timer(now=due + 10.0))[0] == ("a", UndoMove)
    assert "handover took too long" in parts.event_log.entries[-1].text


def test_how_fast_a_worker_loads_is_learnt_from_what_it_had_to_read() -> None:
    parts = moving()
    begun(parts)
    for name in ("a", "b"):  # b reads a layer, of 1000 bytes: that says nothing
        parts.worker(name).load_bytes_per_s = None
        parts.moves.stage_ready(parts.worker(name), ready(2, load_s=4.0), now=11.0)
        assert parts.worker(name).load_bytes_per_s is None
    parts.worker("b").learn_load(LayerRange(0, 1), ready(2, load_s=5.0, fetch_s=1.0), 1 << 30)
    assert parts.worker("b").load_bytes_per_s == (1 << 30) / 4


@pytest.mark.parametrize(("sent_bytes", "rate"), [(4 << 20, 2 << 20), (1000, 30e6)])
def test_how_fast_caches_are_copied_is_learnt_if_it_was_much(sent_bytes: int, rate: float) -> None:
    parts = moving()
    parts.measurements.rate = 1e9
    assert price(parts).copy_s == pytest.approx(128 / 30e6)
    begun(parts)
    loaded(parts)
    said = KVCopied(epoch=Epoch(2), bytes_sent=sent_bytes)
    parts.moves.copied(parts.worker("a"), said, now=13.0)
    parts.moves.undo("a test", now=13.0)
    assert price(parts).copy_s == pytest.approx(128 / rate)


def test_the_cost_of_the_tests_is_what_they_say() -> None:
    assert COST.weight_bytes(LayerRange(0, 3)) == 3500
    assert COST.weight_bytes(LayerRange(3, 6)) == 3300
