"""Layers that move between workers while requests run: no token changes, no request fails."""

from collections.abc import Callable

import pytest

from distributed_llm.common.errors import NotEnoughMemory, UnsupportedModel, WorkerLost
from distributed_llm.common.messages import (
    CopyKV,
    DrainWorker,
    DropStage,
    HandedOver,
    HandOver,
    KVCopied,
    KVEnd,
    KVFailed,
    KVPieces,
    KVTaken,
    LoadStage,
    StageFailed,
    StageReady,
    StageTime,
    StageTrial,
    UndoMove,
    WorkerDrained,
)
from distributed_llm.common.sampling_params import SamplingParams
from distributed_llm.common.types import Epoch, WorkerId
from distributed_llm.coordinator import events
from distributed_llm.coordinator.cluster.move import MoveState
from tests.unit.fake_client import Answer, SimClient
from tests.unit.fake_model import BIG, MODEL
from tests.unit.fake_worker import SimWorker
from tests.unit.simulation import Fault, World, finish, with_settings

LAYER_S = 0.01
ROOM = 4000
"""Memory for the whole model and the KV cache of many requests."""


def cluster(count: int, *, memory_bytes: int = ROOM, replicas: int = 1) -> tuple[World, SimClient]:
    """Return a cluster in which all workers are equally fast, and serve."""
    world = World(with_settings(strategy="speed", objective="throughput", replicas=replicas))
    for number in range(count):
        join(world, f"w{number}", memory_bytes)
    assert world.run(lambda: world.state == "serving")
    return world, world.client()


def join(world: World, name: str, memory_bytes: int = ROOM) -> SimWorker:
    worker = world.worker(name, memory_bytes)
    worker.layer_s = LAYER_S
    worker.load_s = 0.3
    return worker


def asked(client: SimClient, number: int = 4, answer: int = 100) -> list[Answer]:
    return [client.submit(list(range(n, n + 9)), params(answer)) for n in range(number)]


def params(answer: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=answer, ignore_eos=True)


def moves(world: World) -> int:
    return world.core._moves.num_moves


def layers(world: World) -> dict[str, str]:
    """Return who has which layers."""
    status = world.core.status(now=world.now)
    return {worker.name: str(worker.layers) for worker in status.workers if worker.layers}


def moved(world: World, times: int = 1) -> None:
    """Run until so many moves were made."""
    assert world.run(lambda: moves(world) >= times, for_s=60.0), world.logs[-9:]


def computed(world: World) -> int:
    return sum(worker.num_tasks for worker in world.workers)


# ------------------------------------------------------------------ when layers move


def test_a_worker_that_became_slower_gets_fewer_layers() -> None:
    world, client = cluster(3)
    answers = asked(client, answer=200)
    assert world.run(lambda: computed(world) > 60)
    assert sorted(layers(world).values()) == ["1-2", "3-4", "5-6"]
    slow = world.plan()[1]
    slow.layer_s = 4 * LAYER_S
    moved(world)
    held = next(w.layers for w in world.core.status(now=world.now).workers if w.name == slow.name)
    assert held is None or len(held) == 1
    finish(world, *answers)
    assert world.core.status(now=world.now).requests_failed == 0


def test_a_worker_that_joins_is_used_while_requests_run() -> None:
    world, client = cluster(2)
    answers = asked(client, 8, answer=200)
    assert world.run(lambda: computed(world) > 40)
    join(world, "late")
    moved(world)
    assert "late" in layers(world)
    assert not world.all_ended()
    finish(world, *answers)
    assert moves(world) <= 2


def test_a_worker_that_only_hurts_is_not_used() -> None:
    world, client = cluster(2)
    answers = asked(client, answer=200)
    assert world.run(lambda: computed(world) > 40)
    for worker in world.workers:  # so that its probe promises what it does not hold
        worker.layer_s = LAYER_S
    join(world, "late").layer_s = 40 * LAYER_S
    world.run(for_s=20.0)
    finish(world, *answers)
    world.run(for_s=10.0)
    again = asked(client, answer=200)
    finish(world, *again)
    assert "late" not in layers(world), world.logs


# ------------------------------------------------------------------ before anything was asked


def load_orders(world: World) -> list[LoadStage]:
    return [order for worker in world.workers for order in worker.loaded]


def test_first_layers_are_tried_and_later_ones_are_not() -> None:
    world, client = cluster(3)
    assert [order.trials for order in load_orders(world)] == [True] * 3
    answers = asked(client, answer=200)
    assert world.run(lambda: computed(world) > 60)
    world.plan()[1].layer_s = 4 * LAYER_S
    moved(world)
    late = join(world, "late")
    moved(world, times=2)
    finish(world, *answers)
    tried = [order.trials for order in load_orders(world)]
    assert tried.count(True) == 4
    assert [order.trials for order in late.loaded][:1] == [True]
    assert {order.kv_dtype for order in load_orders(world)} == {MODEL.kv_dtype}
    context = MODEL.defaults.context_length
    assert {order.context_length for order in load_orders(world)} == {context}
    shown = world.core.status(now=world.now).pipelines
    assert {pipeline.kv_dtype for pipeline in shown} == {MODEL.kv_dtype}


def test_other_strategies_want_no_trials() -> None:
    world = World(with_settings(strategy="even"))
    for name in ("a", "b"):
        join(world, name)
    assert world.run(lambda: world.state == "serving")
    assert [order.trials for order in load_orders(world)] == [False] * 2


def test_layers_go_to_the_fastest_before_anything_is_asked() -> None:
    """All probes say the same, and the trials how fast each worker really is."""
    world = World(with_settings(strategy="speed", objective="throughput", replicas=1))
    for number in range(3):
        join(world, f"w{number}").layer_s = LAYER_S * (1, 2, 6)[number]
    assert world.run(lambda: world.state == "serving")
    assert sorted(layers(world).values()) == ["1-2", "3-4", "5-6"]
    moved(world)
    assert set(layers(world)) == {"w0", "w1"}
    assert world.run(lambda: moves(world) > 1, for_s=60.0) is False


def test_trials_that_promise_little_move_nothing() -> None:
    """Other layers would be 50 % faster; but others may have used the machines meanwhile."""
    world = World(with_settings(strategy="speed", objective="throughput", replicas=1))
    for number in range(3):
        join(world, f"w{number}").layer_s = LAYER_S * (1.0, 1.0, 2.5)[number]
    assert world.run(lambda: world.state == "serving")
    assert world.run(lambda: moves(world) > 0, for_s=30.0) is False


def test_trials_of_an_older_plan_tell_nothing() -> None:
    world = World(with_settings(strategy="even"))
    join(world, "a")
    assert world.run(lambda: world.state == "serving")
    (peer,) = (worker.peer for worker in world.core._registry.workers)
    time = StageTime(compute_us=9000, layers_us=8000, queued_us=0)
    trial = StageTrial(sequences=1, start=8, num_tokens=1, time=time)
    for epoch, known in ((0, False), (world.core.status(now=world.now).epoch, True)):
        ready = StageReady(
            epoch=Epoch(epoch), credits=8, load_s=0.1, weight_bytes=1, kv_tokens=64, trials=(trial,)
        )
        world.core.handle(events.Received(peer, ready), now=world.now)
        status = world.core.status(now=world.now)
        assert status.workers[0].prediction_error is None
        assert (world.core._cluster.measurements.doubt(WorkerId("a")) > 0.0) == known


# ------------------------------------------------------------------ when layers stay


def test_nothing_moves_while_nothing_changes() -> None:
    world, client = cluster(3)
    for _ in range(10):
        finish(world, *asked(client))
    assert moves(world) == 0


def test_other_strategies_do_not_move_layers() -> None:
    world = World(with_settings(strategy="even"))
    for name in ("a", "b", "c"):
        join(world, name)
    assert world.run(lambda: world.state == "serving")
    answers = asked(world.client())
    assert world.run(lambda: computed(world) > 30)
    world.plan()[0].layer_s = 9 * LAYER_S
    finish(world, *answers)
    assert moves(world) == 0


def test_the_kv_cache_goes_along_and_no_token_is_computed_again() -> None:
    world, client = cluster(3)
    answers = asked(client, answer=150)
    assert world.run(lambda: computed(world) > 60)
    world.plan()[1].layer_s = 4 * LAYER_S
    moved(world)
    assert world.counts["across", KVPieces] > 0
    finish(world, *answers)
    status = world.core.status(now=world.now)
    assert status.preemptions == 0
    assert "missing_positions" not in str(world.logs)
    assert not any("computing its KV cache again" in line for line in world.logs)


def test_requests_stand_still_for_hardly_more_than_a_step() -> None:
    world, client = cluster(3)
    answers = asked(client, answer=230)
    assert world.run(lambda: computed(world) > 20)
    world.plan()[1].layer_s = 4 * LAYER_S
    moved(world)
    finish(world, *answers)
    step_s = 0.02 + 4 * 0.02 + 0.02
    assert 0 < world.core.status(now=world.now).move_stall_s < 1.5 * step_s


# ------------------------------------------------------------------ what may go wrong


def slow_down(world: World) -> list[SimWorker]:
    """Make one stage slow, so that a move begins; return its workers."""
    plan = world.plan()
    plan[1].layer_s = 4 * LAYER_S
    return plan


def undone(world: World) -> bool:
    return any("the move was undone" in line for line in world.logs)


def fail_loading(worker: SimWorker) -> None:
    worker.load_error = NotEnoughMemory("no room")


def fail_exports(worker: SimWorker) -> None:
    worker.fail_exports = 1


def fail_imports(worker: SimWorker) -> None:
    worker.fail_imports = 1


def fail_assemblies(worker: SimWorker) -> None:
    worker.fail_assemblies = 1


@pytest.mark.parametrize("failure", [fail_loading, fail_exports, fail_imports, fail_assemblies])
def test_a_move_that_fails_is_undone_and_the_requests_go_on(
    failure: Callable[[SimWorker], None],
) -> None:
    world, client = cluster(3)
    answers = asked(client, answer=200)
    assert world.run(lambda: computed(world) > 60)
    before = layers(world)
    for worker in slow_down(world):
        failure(worker)
    assert world.run(lambda: undone(world), for_s=60.0), world.logs
    assert layers(world) == before
    finish(world, *answers)
    assert world.core.status(now=world.now).requests_failed == 0


@pytest.mark.parametrize("message", [LoadStage, CopyKV, HandOver])
@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("silently", [False, True])
def test_any_worker_may_die_in_any_phase(
    message: type[LoadStage | CopyKV | HandOver], index: int, silently: bool
) -> None:
    world, client = cluster(4)
    answers = asked(client, answer=200)
    assert world.run(lambda: computed(world) > 60)
    plan = slow_down(world)
    told = world.counts["down", message]
    assert world.run(lambda: world.counts["down", message] > told, for_s=60.0)
    plan[index].kill(silently=silently)
    finish(world, *answers)


@pytest.mark.parametrize("message", [LoadStage, CopyKV, HandOver, UndoMove])
def test_an_order_that_is_lost_stops_nothing(message: type) -> None:
    world, client = cluster(3)
    answers = asked(client, answer=200)
    assert world.run(lambda: computed(world) > 60)
    for worker in slow_down(world):
        worker.fail_assemblies = 1 if message is UndoMove else 0
    world.faults.append(Fault(message, "drop"))
    assert world.run(world.all_ended)
    world.run(for_s=200.0)
    finish(world, *answers)
    assert world.core.status(now=world.now).requests_failed == 0


@pytest.mark.parametrize("report", [KVCopied, HandedOver])
def test_a_move_of_which_a_report_cannot_be_read_is_undone_at_once(report: type) -> None:
    world, client = cluster(3)
    answers = asked(client, answer=200)
    assert world.run(lambda: computed(world) > 60)
    slow_down(world)
    world.faults.append(Fault(report, "spoil"))
    assert world.run(lambda: not world.faults)

    def undone() -> list[str]:
        events = world.core.status(now=world.now).events
        return [event.text for event in events if "the move was undone" in event.text]

    assert world.run(lambda: bool(undone()), for_s=0.5)
    assert "The coordinator cannot read its report" in undone()[0]
    assert world.run(world.all_ended)
    finish(world, *answers)


@pytest.mark.parametrize("kind", [KVPieces, KVEnd, KVTaken])
def test_kv_cache_that_cannot_be_read_undoes_the_move_at_once(kind: type) -> None:
    """And not after the time in which a receipt should have come."""
    world, client = cluster(3)
    answers = asked(client, answer=240)
    assert world.run(lambda: computed(world) > 60)
    fault = Fault(kind, "spoil")
    world.faults.append(fault)
    slow_down(world)
    assert world.run(lambda: fault not in world.faults, for_s=60.0), "it was sent"
    assert world.run(lambda: undone(world), for_s=0.5)
    assert any("undone" in line and "cannot be read" in line for line in world.logs)
    moved(world)
    finish(world, *answers)
    assert world.core.status(now=world.now).requests_failed == 0


def test_workers_that_cannot_reach_each_other_compute_the_cache_again() -> None:
    world, client = cluster(3)
    answers = asked(client, answer=240)
    assert world.run(lambda: computed(world) > 60)
    world.apart |= {(a, b) for a in world.workers for b in world.workers}
    for worker in world.workers:
        worker.cut(transfers=True)
    slow_down(world)
    assert world.run(lambda: undone(world)), "the first move tries to copy"
    answers += asked(client, answer=240)
    moved(world)
    assert any("computing its KV cache again" in line for line in world.logs)
    finish(world, *answers)
    assert world.core.status(now=world.now).requests_failed == 0


# ------------------------------------------------------------------ leaving


def drained(client: SimClient) -> list[WorkerDrained]:
    return [m for m in client.others if isinstance(m, WorkerDrained)]


def test_a_worker_that_is_drained_leaves_and_no_request_notices() -> None:
    world, client = cluster(3)
    answers = asked(client, 8, answer=200)
    assert world.run(lambda: computed(world) > 30)
    client.say(DrainWorker(worker="w1"))
    assert world.run(lambda: bool(drained(client)))
    assert drained(client) == [WorkerDrained(worker="w1")]
    assert world.workers[1].ended == 0
    assert sorted(layers(world)) == ["w0", "w2"]
    assert not world.all_ended()
    finish(world, *answers)
    assert world.core.status(now=world.now).requests_failed == 0


@pytest.mark.parametrize("strategy", ["speed", "memory", "even"])
def test_a_worker_that_is_told_to_end_hands_its_layers_over(strategy: str) -> None:
    world = World(with_settings(strategy=strategy, replicas=1))
    for name in ("a", "b", "c"):
        join(world, name)
    assert world.run(lambda: world.state == "serving")
    answers = asked(world.client())
    assert world.run(lambda: computed(world) > 30)
    leaving = world.plan()[1]
    leaving.leave_kindly()
    assert world.run(lambda: leaving.ended == 15)
    assert moves(world) == 1
    finish(world, *answers)
    assert world.core.status(now=world.now).requests_failed == 0


def test_a_worker_without_layers_may_leave_at_once() -> None:
    world, client = cluster(2)
    asked(client)
    idle = join(world, "idle", 10)
    world.run(for_s=1.0)
    client.say(DrainWorker(worker="idle"))
    assert world.run(lambda: idle.ended == 0, for_s=1.0)


def test_a_worker_whose_layers_nobody_else_can_hold_is_not_drained() -> None:
    world, client = cluster(2, memory_bytes=BIG)
    answers = asked(client, answer=20)
    client.say(DrainWorker(worker="w1"))
    assert world.run(lambda: bool(drained(client)))
    (answer,) = drained(client)
    assert answer.code == NotEnoughMemory.code
    assert "are missing" in answer.message
    finish(world, *answers)
    assert sorted(layers(world)) == ["w0", "w1"]


def test_a_worker_that_ends_though_nobody_can_hold_its_layers_is_let_go() -> None:
    world, client = cluster(2, memory_bytes=BIG)
    asked(client, 1, 20)
    world.workers[0].leave_kindly()
    assert world.run(lambda: world.workers[0].ended == 15, for_s=5.0)
    assert world.run(lambda: world.state == "waiting", for_s=5.0)


def test_nobody_is_drained_who_is_not_there() -> None:
    world, client = cluster(2)
    client.say(DrainWorker(worker="nobody"))
    assert world.run(lambda: bool(drained(client)))
    (answer,) = drained(client)
    assert answer.code == "invalid_request"
    assert "Workers: w0, w1." in answer.message


def test_all_but_the_needed_workers_can_leave_one_after_the_other() -> None:
    world, client = cluster(5)
    answers = asked(client, answer=200)
    assert world.run(lambda: computed(world) > 30)
    for worker in world.workers[:3]:
        worker.leave_kindly()
    assert world.run(lambda: all(w.ended == 15 for w in world.workers[:3]))
    assert sorted(layers(world)) == ["w3", "w4"]
    finish(world, *answers)
    assert world.core.status(now=world.now).requests_failed == 0


def test_a_worker_leaves_in_the_middle_of_a_move() -> None:
    world, client = cluster(4)
    answers = asked(client, answer=200)
    assert world.run(lambda: computed(world) > 60)
    plan = slow_down(world)
    told = world.counts["down", CopyKV]
    assert world.run(lambda: world.counts["down", CopyKV] > told, for_s=60.0)
    plan[0].leave_kindly()
    assert world.run(lambda: plan[0].ended == 15)
    finish(world, *answers)
    assert world.core.status(now=world.now).requests_failed == 0


def test_a_worker_that_dies_while_it_leaves_costs_no_request() -> None:
    world, client = cluster(4)
    answers = asked(client, answer=200)
    assert world.run(lambda: computed(world) > 30)
    leaving = world.plan()[0]
    leaving.leave_kindly()
    assert world.run(lambda: world.counts["down", CopyKV] > 0)
    leaving.kill()
    finish(world, *answers)


# ------------------------------------------------------------------ several pipelines


def test_idle_workers_that_can_hold_the_model_serve_it_once_more() -> None:
    world = World(with_settings(strategy="speed", objective="throughput", replicas="auto"))
    for name in ("a", "b"):
        join(world, name, BIG)
    assert world.run(lambda: world.state == "serving")
    client = world.client()
    answers = asked(client, 1, 50)
    assert world.run(lambda: computed(world) > 10)
    for name in ("c", "d"):
        join(world, name, BIG)
    assert world.run(lambda: sorted(layers(world)) == ["a", "b", "c", "d"], for_s=30.0)
    assert sorted(layers(world).values()) == ["1-3", "1-3", "4-6", "4-6"]
    more = asked(client, 8, 20)
    finish(world, *answers, *more)


# ------------------------------------------------------------------ memory


def test_layers_move_although_prefixes_fill_the_cache() -> None:
    world, client = cluster(3)
    for first in range(0, 88, 4):
        finish(
            world,
            *(
                client.submit([(first + n) % 90] * 70 + list(range(40)), params(4))
                for n in range(4)
            ),
        )
    assert world.core.status(now=world.now).kv_tokens_cached > 1500
    answers = asked(client, answer=150)
    assert world.run(lambda: computed(world) > 400)
    slow_down(world)
    moved(world)
    finish(world, *answers)


# ------------------------------------------------------------------ what was wrong once


def generated(world: World) -> int:
    return world.core.status(now=world.now).tokens_generated


def test_requests_go_on_at_once_when_a_move_is_undone() -> None:
    world, client = cluster(3)
    answers = asked(client, 8, 240)
    assert world.run(lambda: computed(world) > 60)
    for worker in slow_down(world):
        worker.fail_assemblies = 1
    assert world.run(lambda: undone(world))
    assert not world.all_ended()
    tokens = generated(world)
    assert world.run(lambda: generated(world) > tokens, for_s=0.5)
    finish(world, *answers)


@pytest.mark.parametrize("after_s", [0.15 + 0.03 * step for step in range(20)])
def test_who_joins_while_layers_move_waits_until_they_have(after_s: float) -> None:
    """At any moment of a drain of an idle cluster, whose plan does not go by speed."""
    world = World(with_settings(strategy="memory", replicas=1))
    for name in ("a", "b", "c"):
        join(world, name)
    assert world.run(lambda: world.state == "serving")
    client = world.client()
    world.run(for_s=1.0)
    join(world, "d")
    world.run(for_s=after_s)
    client.say(DrainWorker(worker="b"))
    assert world.run(lambda: bool(drained(client)), for_s=30.0)
    assert world.run(lambda: sorted(layers(world)) == ["a", "c", "d"], for_s=30.0)
    finish(world, client.submit())


def test_a_joiner_that_cannot_run_the_model_does_not_stop_who_serves() -> None:
    world, client = cluster(2)
    answers = asked(client, answer=200)
    assert world.run(lambda: computed(world) > 40)
    join(world, "late").load_error = UnsupportedModel("another version")
    assert world.run(lambda: undone(world), for_s=30.0)
    finish(world, *answers)
    assert world.stopped is None
    assert moves(world) == 0
    assert "late" not in layers(world)


@pytest.mark.parametrize("idle", [True, False])
def test_a_load_beside_that_hangs_is_given_up(idle: bool) -> None:
    world, client = cluster(2 if idle else 3)
    answers = asked(client, answer=200)
    assert world.run(lambda: computed(world) > 60)
    victim = join(world, "late") if idle else world.plan()[0]
    victim.load_stalls = True
    if not idle:
        slow_down(world)
    assert world.run(lambda: world.core._moves.move is not None)
    began_at = world.now
    assert world.run(lambda: undone(world), for_s=125.0)
    assert world.now > began_at + 119.0
    assert any("made no progress for 12" in line for line in world.logs)
    told = f"{victim.name}: the coordinator says: Loading layers"
    assert world.run(lambda: any(line.startswith(told) for line in world.logs), for_s=1.0)
    assert victim.num_sessions == 1
    victim.resume_loads()
    finish(world, *answers)


def test_a_load_beside_may_take_as_long_as_it_makes_progress() -> None:
    world, client = cluster(2)
    answers = asked(client, answer=200)
    assert world.run(lambda: computed(world) > 40)
    join(world, "late").load_s = 1200.0
    assert world.run(lambda: world.core._moves.move is not None)
    assert world.run(lambda: moves(world) == 1 or undone(world), for_s=1210.0)
    assert not undone(world)
    finish(world, *answers)


def test_a_worker_without_part_in_a_move_has_no_say_in_it() -> None:
    world, client = cluster(3)
    answers = asked(client, answer=200)
    assert world.run(lambda: computed(world) > 60)
    stranger = join(world, "stranger", 10)
    slow_down(world)
    assert world.run(lambda: world.core._moves.move is not None)
    assert world.core._moves.move
    epoch = world.core._moves.move.new.epoch
    for message in (
        StageReady(epoch=epoch, credits=1, load_s=1.0, weight_bytes=1, kv_tokens=1),
        KVCopied(epoch=epoch, bytes_sent=1),
        HandedOver(epoch=epoch),
        KVFailed(epoch=epoch, worker="", code="stage_error", message="no"),
        StageFailed(epoch=epoch, code="stage_error", message="no"),
    ):
        world.apply(events.Received(stranger.link.peer, message))
    moved(world)
    assert not undone(world)
    finish(world, *answers)


@pytest.mark.parametrize("state", [MoveState.LOADING, MoveState.COPYING, MoveState.HANDOVER])
def test_a_served_stage_that_fails_during_a_move_takes_the_move_along(state: MoveState) -> None:
    world, client = cluster(3)
    answers = asked(client, answer=200)
    assert world.run(lambda: computed(world) > 60)
    slow_down(world)
    for worker in world.workers:
        worker.load_s = worker.transfer_s = 0.2
    assert world.run(lambda: (move := world.core._moves.move) is not None and move.state is state)
    move = world.core._moves.move
    assert move
    failed = StageFailed(epoch=move.old.epoch, code="stage_error", message="its disk is gone")
    world.apply(events.Received(move.old.stages[1].peer, failed))
    assert world.core._moves.move is None
    assert move.old not in world.core._pipelines.all
    assert world.run(lambda: world.state == "serving")
    finish(world, *answers)


def left_out_unheard() -> tuple[World, SimWorker, Answer]:
    """Return a worker that moved layers have left, and that did not hear of the commit."""
    world = World()
    world.linked(3, ROOM)
    answer = world.client().submit([1, 2, 3], params(200))
    assert world.run(lambda: len(answer.token_ids) > 5)
    left_out = world.plan()[2]
    world.faults.append(Fault(DropStage, "drop", peer_of=left_out))
    world.move([3], 0)
    moved(world)
    assert not world.faults
    assert left_out.stage
    return world, left_out, answer


def test_a_worker_that_did_not_hear_that_its_layers_moved_away_is_told_again() -> None:
    """Otherwise they would take its memory for ever, and it would not be measured again."""
    world, left_out, answer = left_out_unheard()
    assert world.run(lambda: left_out.stage is None, for_s=1.5)
    finish(world, answer)
    assert left_out.num_sessions == 1


def test_a_worker_that_did_not_hear_that_its_layers_moved_away_begins_with_the_new_ones() -> None:
    """It has layers that come back, but not what the answers have become meanwhile."""
    world, left_out, answer = left_out_unheard()
    world.move([2, 4], 0)
    moved(world, times=2)
    assert world.plan()[2] is left_out
    finish(world, answer)
    assert not any("failed a step" in line for line in world.logs)


def test_a_plan_has_room_for_what_the_largest_answer_may_take() -> None:
    world, client = cluster(3, memory_bytes=900)
    answer = client.submit([1, 2, 3], params(250))
    assert world.run(lambda: len(answer.token_ids) > 5)
    world.plan()[1].layer_s = 6 * LAYER_S
    finish(world, answer)
    finish(world, client.submit([1, 2, 3], params(250)))


def test_a_worker_that_both_wants_to_leave_and_is_drained_may_go() -> None:
    world, client = cluster(2, memory_bytes=BIG)
    finish(world, client.submit())
    client.say(DrainWorker(worker="w0"))
    world.workers[0].leave_kindly()
    assert world.run(lambda: world.workers[0].ended == 15, for_s=5.0)
    assert world.run(lambda: bool(drained(client)), for_s=5.0)


def test_a_worker_that_is_lost_while_it_is_drained_was_not_drained() -> None:
    world, client = cluster(3)
    asked(client, answer=50)
    for worker in world.workers:
        worker.load_s = 9.0
    client.say(DrainWorker(worker="w1"))
    world.run(for_s=0.5)
    world.workers[1].kill()
    assert world.run(lambda: bool(drained(client)))
    (answer,) = drained(client)
    assert answer.code == WorkerLost.code
    assert "was lost before" in answer.message


def test_a_search_that_ends_late_takes_nobody_away() -> None:
    world = World(with_settings(strategy="speed", objective="throughput", replicas=3))
    world.question_s = 0.6
    for name in "ab":
        join(world, name, BIG)
    assert world.run(lambda: world.state == "serving")
    client = world.client()
    answers = asked(client, 4, 40)
    for name in "cdef":
        join(world, name, BIG)
        world.run(for_s=0.2)
    assert world.run(lambda: len(layers(world)) == 6, for_s=60.0)
    finish(world, *answers)
