"""Who is connected, and who has been silent for too long."""

from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributed_llm.common.messages import Capabilities, Heartbeat, WorkerHello, WorkerStatus
from distributed_llm.common.states import IllegalTransition
from distributed_llm.common.types import Epoch, LayerRange, PeerId
from distributed_llm.coordinator.cluster.registry import CLIENT_SILENCE_S, Registry
from distributed_llm.coordinator.cluster.worker import Worker, WorkerState
from tests.unit.coordinator_parts import ready

A, B, C = PeerId(b"a"), PeerId(b"b"), PeerId(b"c")
CAPABILITIES = Capabilities(
    device="cpu",
    device_name="none",
    platform="none",
    memory_bytes=1 << 30,
    cores=1,
    threads=1,
    memory_bandwidth_bytes_per_s=1e9,
    flops_per_s=1e9,
)


@pytest.fixture
def registry() -> Iterator[Registry]:
    made = Registry(silence_timeout_s=4.0, task_timeout_s=30.0)
    yield made
    made.validate()


def join(registry: Registry, peer: PeerId, name: str = "pc", now: float = 0.0) -> Worker:
    hello = WorkerHello(
        name=name,
        instance="one",
        capabilities=CAPABILITIES,
        peer_addresses=("10.0.0.1:7",),
    )
    return registry.add_worker(peer, hello, now=now)


def test_knows_who_said_hello(registry: Registry) -> None:
    assert not registry.knows(A)
    worker = join(registry, A)
    registry.add_client(B, now=0.0)
    assert registry.knows(A)
    assert registry.knows(B)
    assert registry.worker(A) is worker
    assert registry.worker(B) is None
    assert registry.is_client(B)
    assert not registry.is_client(A)
    assert list(registry.peers) == [A, B]
    assert registry.workers == [worker]


def test_taken_names_get_a_number_and_free_ones_do_not(registry: Registry) -> None:
    assert [join(registry, p).id for p in (A, B, C)] == ["pc", "pc-2", "pc-3"]
    registry.remove(B)
    assert join(registry, B).id == "pc-2"


def test_the_first_without_layers_gets_the_name_that_is_free_again(registry: Registry) -> None:
    first, second, third = (join(registry, p) for p in (A, B, C))
    assert registry.give_names_back() == []
    second.assign(LayerRange(0, 3), epoch=Epoch(5))
    registry.remove(A)
    assert registry.give_names_back() == [(third, "pc-3")]
    assert [first.id, second.id, third.id] == ["pc", "pc-2", "pc"]
    second.unassign()
    assert registry.give_names_back() == []
    registry.remove(C)
    second.leaving = True
    assert registry.give_names_back() == [], "whoever asked for it to leave knows it as this"
    second.leaving = False
    assert registry.give_names_back() == [(second, "pc-2")]


def test_longest_names_stay_names(registry: Registry) -> None:
    first, second = join(registry, A, "x" * 64), join(registry, B, "x" * 64)
    assert first.id != second.id
    assert len(second.id) <= 64


def test_remove(registry: Registry) -> None:
    worker = join(registry, A)
    registry.add_client(B, now=0.0)
    assert registry.remove(A) is worker
    assert registry.remove(A) is None
    assert registry.remove(B) is None
    assert not registry.knows(B)
    assert registry.next_deadline() is None


def test_worker_is_silent_after_the_timeout(registry: Registry) -> None:
    join(registry, A, now=10.0)
    assert registry.next_deadline() == 14.0
    assert registry.silent(now=13.999) == []
    assert registry.silent(now=14.0) == [A]


def test_any_message_is_a_sign_of_life(registry: Registry) -> None:
    join(registry, A, now=10.0)
    join(registry, B, now=11.0)
    registry.heard(A, now=13.0)
    registry.heard(C, now=13.0)  # nobody
    assert registry.next_deadline() == 15.0
    assert registry.silent(now=15.0) == [B]
    assert registry.silent(now=17.0) == [B, A]
    assert registry.silent(now=17.0) == [B, A]  # until they are removed


def test_clients_may_be_silent_for_longer(registry: Registry) -> None:
    registry.add_client(A, now=10.0)
    assert registry.silent(now=10.0 + CLIENT_SILENCE_S - 0.001) == []
    registry.heard(A, now=20.0)
    assert registry.next_deadline() == 20.0 + CLIENT_SILENCE_S
    assert registry.silent(now=20.0 + CLIENT_SILENCE_S) == [A]


def beat(*, waiting: int = 0, age_s: float = 0.0, loading: bool = False) -> Heartbeat:
    return Heartbeat(
        epochs=(Epoch(1),),
        progress_age_s=age_s,
        tasks_waiting=waiting,
        memory_used_bytes=5,
        kv_bytes=7,
        loading=loading,
    )


def status_of(worker: Worker, *, now: float) -> WorkerStatus:
    return worker.status(
        next_layers=None,
        prediction_error=None,
        gain=None,
        advice="",
        kv_used_bytes=3,
        kv_room_bytes=4,
        now=now,
    )


def test_what_it_multiplies_by_is_kept_and_shown(registry: Registry) -> None:
    worker = join(registry, A)
    told = msgspec.structs.replace(ready(1), kernels="int8 by blocks")
    worker.learn_load(LayerRange(0, 2), told, 0)
    assert status_of(worker, now=0.0).kernels == "int8 by blocks"


def test_heartbeat_is_kept_and_shown(registry: Registry) -> None:
    worker = join(registry, A, now=1.0)
    registry.heartbeat(A, beat())
    status = status_of(worker, now=3.5)
    assert (status.memory_used_bytes, status.kv_bytes, status.last_heard_s) == (5, 7, 2.5)
    assert (status.kv_used_bytes, status.kv_room_bytes) == (3, 4)
    assert (status.name, status.state, status.layers) == ("pc", "idle", None)
    assert status_of(worker, now=0.5).last_heard_s == 0.0


def test_progress_matters_only_where_there_are_tasks(registry: Registry) -> None:
    worker = join(registry, A)
    registry.heartbeat(A, beat(waiting=1, age_s=9.0))
    assert worker.progress_age_s == 9.0
    registry.heartbeat(A, beat(waiting=0, age_s=9.0))
    assert worker.progress_age_s == 0.0


def test_assign_and_take_away(registry: Registry) -> None:
    worker = join(registry, A)
    worker.count_task(1.0, 1)
    worker.link = "direct"
    worker.assign(LayerRange(0, 3), epoch=Epoch(5))
    status = status_of(worker, now=0.0)
    assert (status.state, status.layers, status.epoch) == ("loading", LayerRange(0, 3), 5)
    assert (status.link, status.seconds_per_token) == ("", None)
    registry.validate()
    worker.link = "relayed"
    assert status_of(worker, now=0.0).link == "relayed"
    worker.unassign()
    assert (worker.state, worker.layers, worker.link) == (WorkerState.IDLE, None, "")


def test_where_other_workers_reach_it_is_kept(registry: Registry) -> None:
    assert join(registry, A).peer_addresses == ("10.0.0.1:7",)


def test_who_comes_back_is_watched_once(registry: Registry) -> None:
    join(registry, A, now=0.0)
    registry.remove(A)
    registry.validate()
    registry.add_client(A, now=1.0)
    registry.validate()
    assert registry.next_deadline() == 1.0 + CLIENT_SILENCE_S
    assert registry.silent(now=100.0) == [A]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["worker", "client", "heard", "heard", "remove"]),
            st.sampled_from([PeerId(bytes([number])) for number in range(6)]),
            st.integers(0, 10),
        )
    )
)
def test_deadlines_are_those_of_a_look_at_everybody(events: list[tuple[str, PeerId, int]]) -> None:
    registry = Registry(silence_timeout_s=4.0, task_timeout_s=30.0)
    timeouts: dict[PeerId, float] = {}
    heard: dict[PeerId, float] = {}
    now = 0.0
    for what, peer, elapsed in events:
        now += elapsed
        if what in ("worker", "client") and not registry.knows(peer):
            timeouts[peer] = 4.0 if what == "worker" else CLIENT_SILENCE_S
            heard[peer] = now
            if what == "worker":
                join(registry, peer, now=now)
            else:
                registry.add_client(peer, now=now)
        elif what == "remove":
            registry.remove(peer)
            heard.pop(peer, None)
        elif what == "heard":
            registry.heard(peer, now=now)
            heard |= {peer: now} if peer in heard else {}
        registry.validate()
        deadlines = {one: at + timeouts[one] for one, at in heard.items()}
        assert registry.next_deadline() == min(deadlines.values(), default=None)
        silent = registry.silent(now=now)
        assert [deadlines[one] for one in silent] == sorted(
            at for at in deadlines.values() if at <= now
        )


def test_who_comes_and_goes_leaves_nothing_behind(registry: Registry) -> None:
    registry.add_client(A, now=0.0)
    for _ in range(1000):
        registry.add_client(B, now=0.0)
        registry.remove(B)
        registry.validate()
    assert len(registry._heap) < 100
    assert registry.next_deadline() == CLIENT_SILENCE_S


def test_time_per_token_is_a_running_mean_over_decodes(registry: Registry) -> None:
    worker = join(registry, A)
    worker.count_task(100.0, 0)  # part of a prompt
    assert worker.seconds_per_token is None
    worker.count_task(4.0, 2)
    assert worker.seconds_per_token == 2.0
    worker.count_task(1.0, 1)
    assert worker.seconds_per_token == pytest.approx(0.8 * 2.0 + 0.2 * 1.0)
    assert (worker.tasks_done, worker.compute_s) == (3, 105.0)


# ------------------------------------------------------------------ what a worker does


def test_a_worker_goes_from_idle_to_serving_and_back(registry: Registry) -> None:
    worker = join(registry, A)
    worker.assign(LayerRange(0, 3), epoch=Epoch(5))
    assert worker.state is WorkerState.LOADING
    worker.loaded(weight_bytes=7)
    assert (worker.state, worker.weight_bytes) == (WorkerState.SERVING, 7)
    worker.commit(LayerRange(0, 2), epoch=Epoch(6), weight_bytes=4)
    assert (worker.state, worker.layers, worker.epoch) == (
        WorkerState.SERVING,
        LayerRange(0, 2),
        6,
    )
    worker.unassign()
    worker.fail("no room", now=0.0)
    assert (worker.state, worker.note) == (WorkerState.UNFIT, "no room")


def test_one_that_loaded_for_a_move_serves_once_it_is_committed(registry: Registry) -> None:
    worker = join(registry, A)
    worker.assign(LayerRange(0, 3), epoch=Epoch(5))
    worker.commit(LayerRange(0, 3), epoch=Epoch(5), weight_bytes=7)
    assert worker.state is WorkerState.SERVING


def test_one_that_cannot_serve_is_given_no_layers(registry: Registry) -> None:
    worker = join(registry, A)
    worker.fail("no room", now=0.0)
    assert registry.fit == []
    with pytest.raises(IllegalTransition, match="ASSIGNED cannot happen while UNFIT"):
        worker.assign(LayerRange(0, 3), epoch=Epoch(5))


def test_who_failed_may_try_again_after_pauses_that_double(registry: Registry) -> None:
    worker = join(registry, A)
    pauses = []
    now = 0.0
    for _ in range(9):
        worker.fail("no room", now=now)
        assert registry.idle == []
        pauses.append(next(s for s in range(1000) if worker.may_try_again(now=now + s)))
        now += pauses[-1]
        worker.try_again()
        assert registry.idle == [worker]
    assert pauses == [10, 20, 40, 80, 160, 320, 600, 600, 600]
    worker.assign(LayerRange(0, 3), epoch=Epoch(5))
    worker.loaded(weight_bytes=7)
    worker.unassign()
    worker.fail("no room", now=now)
    assert worker.may_try_again(now=now + 10.0)
    worker.try_again()
    worker.assign(LayerRange(0, 3), epoch=Epoch(6))
    worker.commit(LayerRange(0, 3), epoch=Epoch(6), weight_bytes=7)
    worker.unassign()
    worker.fail("no room", now=now)
    assert worker.may_try_again(now=now + 10.0)
    worker.leaving = True
    assert not worker.may_try_again(now=now + 10.0)


def test_who_still_loads_what_it_was_given_up_for_is_not_tried_again(registry: Registry) -> None:
    worker = join(registry, A)
    worker.fail("made no progress", now=0.0)
    registry.heartbeat(A, beat(loading=True))
    assert not worker.may_try_again(now=1000.0)
    assert worker.pause_text(now=1000.0) == "once that load has ended"
    registry.heartbeat(A, beat(loading=False))
    assert worker.may_try_again(now=1000.0)


def test_who_hangs_or_leaves_or_has_layers_is_not_idle(registry: Registry) -> None:
    worker = join(registry, A)
    assert registry.idle == registry.fit == [worker]
    registry.heartbeat(A, beat(waiting=1, age_s=30.0))
    assert registry.hangs(worker)
    assert registry.fit == []
    registry.heartbeat(A, beat(waiting=1, age_s=29.0))
    worker.leaving = True
    assert registry.fit == []
    worker.leaving = False
    worker.assign(LayerRange(0, 3), epoch=Epoch(5))
    assert registry.fit == [worker]
    assert registry.idle == []


def test_a_time_in_which_nobody_listened_makes_nobody_silent(registry: Registry) -> None:
    join(registry, PeerId(b"a"), now=0.0)
    registry.add_client(PeerId(b"c"), now=0.0)
    registry.forgive_silence(now=3.9)
    assert registry.silent(now=7.8) == []
    assert registry.next_deadline() == pytest.approx(7.9)
    assert registry.silent(now=7.9) == [PeerId(b"a")]
    assert registry.silent(now=33.9) == [PeerId(b"a"), PeerId(b"c")]
    registry.validate()


def test_so_many_sessions_that_ended_are_remembered() -> None:
    registry = Registry(silence_timeout_s=4.0, task_timeout_s=3.0)
    peers = [PeerId(b"%d" % number) for number in range(5000)]
    for peer in peers:
        assert not registry.has_left(peer)
        registry.add_client(peer, now=0.0)
        assert not registry.has_left(peer)
        registry.remove(peer)
        assert registry.has_left(peer)
    registry.remove(PeerId(b"a stranger"))
    assert not registry.has_left(PeerId(b"a stranger"))
    assert [registry.has_left(peer) for peer in peers] == [False] * 904 + [True] * 4096
    registry.validate()
