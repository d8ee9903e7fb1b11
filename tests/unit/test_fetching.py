"""Fetching: in what order, how much at a time and how fast, on a made-up network."""

import pytest

from distributed_llm.common.messages import MAX_CHUNK_BYTES
from distributed_llm.common.states import IllegalTransition
from distributed_llm.weights.fetching import book as fetch_book
from distributed_llm.weights.fetching.events import (
    GRAIN_BYTES,
    WINDOW_BYTES,
    Ask,
    Check,
    ChunkArrived,
    Claim,
    Finished,
    Keep,
    Source,
    SourceDown,
    SourceUp,
    TensorBusy,
    TensorClaimed,
    TensorStored,
    Wanted,
    WantedMore,
    Written,
)
from distributed_llm.weights.fetching.fetching import Fetching
from tests.unit.fetch_network import KIB, MIB, MS, Network, Peer, sha, tensors
from tests.unit.fetch_scenes import keeps, main_peer, run, three_chunks_asked_of_two_sources

A, B, C = sha(0), sha(1), sha(2)


# ------------------------------------------------------------------ how a tensor is fetched


def test_the_life_of_a_tensor() -> None:
    fetch = Fetching(tensors(100 * KIB), [Source("main", lambda _: True, True)], now=0.0)
    assert fetch.begin(0.0) == [Claim(A)]
    assert fetch.handle(TensorClaimed(A, 0), 0.0) == []
    assert fetch.handle(SourceUp("main"), 0.1) == [
        Ask("main", A, 0, 64 * KIB),
        Ask("main", A, 64 * KIB, 36 * KIB),
    ]
    assert fetch.handle(ChunkArrived("main", A, 64 * KIB, 36 * KIB), 0.2) == [
        Keep("main", A, 64 * KIB)
    ]
    assert fetch.handle(ChunkArrived("main", A, 0, 64 * KIB), 0.3) == [Keep("main", A, 0)]
    assert fetch.bytes_done == 0
    assert fetch.waits_for(0.3) == "waits for the disk"
    assert fetch.handle(Written(A, 64 * KIB), 0.4) == []
    assert fetch.handle(Written(A, 100 * KIB), 0.4) == [Check(A)]
    assert fetch.waits_for(0.4) == "checks hashes"
    assert fetch.handle(TensorStored(A), 0.5) == [Finished()]
    assert (fetch.bytes_done, fetch.bytes_total) == (100 * KIB, 100 * KIB)
    assert fetch.bytes_by_source == {"main": 100 * KIB}
    assert fetch.next_deadline() is None
    assert fetch.handle(SourceDown("main", ""), 0.6) == []
    assert fetch.on_timer(1.0) == []


def test_a_partial_file_goes_on_at_its_end_and_chunks_keep_to_grains() -> None:
    fetch = Fetching(tensors(200 * KIB), [Source("main", lambda _: True, True)], now=0.0)
    fetch.begin(0.0)
    fetch.handle(TensorClaimed(A, 1000), 0.0)
    assert fetch.bytes_done == 1000
    assert fetch.handle(SourceUp("main"), 0.0) == [
        Ask("main", A, 1000, GRAIN_BYTES - 1000),
        Ask("main", A, GRAIN_BYTES, GRAIN_BYTES),
    ]


def test_empty_and_whole_files_are_checked_without_any_source() -> None:
    fetch = Fetching(tensors(0, 100), [], now=0.0)
    assert fetch.begin(0.0) == [Claim(A)]
    assert fetch.handle(TensorClaimed(A, 0), 0.0) == [Check(A)]
    assert fetch.handle(TensorStored(A), 0.0) == [Claim(B)]
    assert fetch.handle(TensorClaimed(B, 100), 0.0) == [Check(B)]
    assert fetch.handle(TensorStored(B), 0.0) == [Finished()]


def test_tensors_come_in_the_order_in_which_they_are_needed() -> None:
    network = Network(tensors(*[3 * MIB] * 6), [main_peer(), Peer("pc", bytes_per_s=3 * MIB)])
    run(network).finish()
    stored = [action.sha256 for _, action in network.told if isinstance(action, Check)]
    assert stored == [sha(i) for i in range(6)]
    firsts = list(dict.fromkeys((ask.sha256, ask.offset) for _, ask in network.asks))
    assert firsts == sorted(firsts)


def test_what_one_lacks_is_asked_of_others_and_it_gives_the_rest() -> None:
    lacks = Peer("pc", lacks=frozenset([A]))
    network = run(Network(tensors(2 * MIB, 8 * MIB), [main_peer(), lacks]))
    network.finish()
    assert network.given["pc"] > 3 * MIB
    asked = [ask for _, ask in network.asks if ask.source == "pc" and ask.sha256 == A]
    assert 1 <= len(asked) <= 2  # the credit at that time


def test_only_what_a_source_is_expected_to_hold_is_asked_of_it() -> None:
    unexpected = Peer("pc", lacks=frozenset([A]), expected=False)
    network = run(Network(tensors(2 * MIB, 8 * MIB), [main_peer(), unexpected]))
    network.finish()
    assert not [ask for _, ask in network.asks if ask.source == "pc" and ask.sha256 == A]


def test_a_repeated_tensor_is_fetched_once() -> None:
    wanted = tensors(MIB)
    network = run(Network((*wanted, Wanted(A, MIB, "tied")), [main_peer()]))
    network.finish()
    assert network.given == {"main": MIB}
    with pytest.raises(ValueError, match=r"tied and layer\.0 differ in size"):
        Fetching((*wanted, Wanted(A, 1, "tied")), [], now=0.0)


def test_tensors_that_become_known_later() -> None:
    network = Network(tensors(MIB), [main_peer()], last=False)
    run(network)
    assert network.end is None
    assert network.fetching.waits_for(network.now) == "waits to be told of more tensors"
    more = tensors(MIB, 2 * MIB)
    network.want(more, at=100.0)
    assert network.finish() == pytest.approx(100.2, abs=0.05)


# ------------------------------------------------------------------ the window and the credits


def test_the_window_is_kept_and_used() -> None:
    network = run(Network(tensors(200 * MIB), [main_peer(bytes_per_s=5000 * MIB)]))
    network.finish()
    assert 32 * MIB < network.most_bytes <= WINDOW_BYTES


def test_a_slow_disk_holds_the_network_back() -> None:
    peers = [main_peer(bytes_per_s=1000 * MIB), Peer("pc", bytes_per_s=1000 * MIB)]
    network = run(Network(tensors(*[32 * MIB] * 4), peers, disk_bytes_per_s=10 * MIB))
    assert network.finish() == pytest.approx(12.8, rel=0.02)
    assert 32 * MIB < network.most_bytes <= WINDOW_BYTES


@pytest.mark.parametrize(
    ("a", "b", "seconds"),
    [(20, 5, 6.0), (100, 100, 2.0), (100, 30, 3.0), (3, 1, 8.0), (1000, 500, 0.4)],
)
def test_bytes_spread_as_the_links_are_fast(a: int, b: int, seconds: float) -> None:
    total = int(seconds * (a + b)) * MIB
    peers = [main_peer(bytes_per_s=a * MIB), Peer("pc", bytes_per_s=b * MIB)]
    network = run(Network(tensors(*[total // 6] * 6), peers))
    assert network.finish() == pytest.approx(seconds, rel=0.05)
    assert network.given["main"] / network.given["pc"] == pytest.approx(a / b, rel=0.1)


def test_a_far_source_is_used_as_well() -> None:
    """Its link holds 10 MiB at a time, so its credit has to grow to more than that."""
    peers = [Peer("far", bytes_per_s=50 * MIB, latency_s=0.1)]
    network = run(Network(tensors(*[50 * MIB] * 10), peers))
    assert network.finish() == pytest.approx(10.0, rel=0.2)


def test_a_source_a_thousand_times_slower_costs_nothing() -> None:
    peers = [main_peer(bytes_per_s=100 * MIB), Peer("pc", bytes_per_s=0.1 * MIB)]
    network = run(Network(tensors(*[10 * MIB] * 10), peers))
    assert network.finish() == pytest.approx(1.0, rel=0.05)
    assert sum(ask.length for _, ask in network.asks) <= 102 * MIB


def test_a_slow_chunk_does_not_block_a_long_tensor() -> None:
    """All that is after the slow chunk waits in memory, until the window is full."""
    peers = [main_peer(bytes_per_s=500 * MIB), Peer("pc", bytes_per_s=0.1 * MIB)]
    network = run(Network(tensors(500 * MIB), peers))
    assert network.finish() == pytest.approx(1.0, rel=0.05)


def test_the_late_copy_is_ignored() -> None:
    fetch = three_chunks_asked_of_two_sources()
    copies = fetch.handle(ChunkArrived("main", A, 128 * KIB, 64 * KIB), 0.02)[1:]
    assert copies == [Ask("main", A, 0, 64 * KIB), Ask("main", A, 64 * KIB, 64 * KIB)]
    assert keeps(fetch.handle(ChunkArrived("main", A, 0, 64 * KIB), 0.03)) == 1
    assert keeps(fetch.handle(ChunkArrived("pc", A, 0, 64 * KIB), 0.04)) == 0
    assert fetch.bytes_by_source["pc"] == 0


def test_a_slow_first_copy_that_wins_after_all_is_kept() -> None:
    fetch = three_chunks_asked_of_two_sources()
    fetch.handle(ChunkArrived("main", A, 128 * KIB, 64 * KIB), 0.02)
    assert keeps(fetch.handle(ChunkArrived("pc", A, 0, 64 * KIB), 0.03)) == 1
    assert keeps(fetch.handle(ChunkArrived("main", A, 0, 64 * KIB), 0.04)) == 0


def test_chunks_are_small_for_slow_links_and_large_for_fast_ones() -> None:
    for bytes_per_s, length in [(50 * KIB, 64 * KIB), (2 * MIB, 192 * KIB), (100 * MIB, MIB)]:
        network = run(Network(tensors(8 * int(bytes_per_s)), [main_peer(bytes_per_s=bytes_per_s)]))
        network.finish()
        most = max(ask.length for _, ask in network.asks)
        assert most == pytest.approx(length, rel=0.34)
        assert most / bytes_per_s <= 0.5 or most == GRAIN_BYTES


def test_many_small_tensors_do_not_wait_for_each_other() -> None:
    peer = main_peer(latency_s=10 * MS, bytes_per_s=100 * MIB)
    network = run(Network(tensors(*[8 * KIB] * 200), [peer]))
    assert network.finish() < 0.4  # 4 s if one at a time


def test_copies_stay_within_the_window() -> None:
    """The fast source stalls with all of the window, and the other one may copy only some of it."""
    stalls = Peer("pc", bytes_per_s=1000 * MIB, silences=[(0.1, 1.4)])
    network = run(Network(tensors(300 * MIB), [main_peer(bytes_per_s=100 * MIB), stalls]))
    network.finish()
    assert 40 * MIB < network.most_bytes <= WINDOW_BYTES


def test_what_a_slow_source_would_still_need_long_for_is_copied_at_once() -> None:
    network = Network(tensors(20 * MIB), [main_peer(bytes_per_s=100 * MIB), Peer("pc", 70 * KIB)])
    network.up("main", 3.0)
    run(network, "pc")
    assert network.finish() == pytest.approx(3.2, abs=0.05)


def test_tensors_are_claimed_when_their_turn_is_near() -> None:
    wanted = tensors(*[10 * MIB] * 5)
    fetch = Fetching(wanted, [Source("main", lambda _: True, True)], now=0.0)
    assert [*fetch.begin(0.0), *fetch.handle(SourceUp("main"), 0.0)] == [Claim(A), Claim(B)]


def test_open_files_are_bounded() -> None:
    wanted = tensors(*[KIB] * 200)
    fetch = Fetching(wanted, [Source("main", lambda _: True, True)], now=0.0)
    claims = [*fetch.begin(0.0), *fetch.handle(SourceUp("main"), 0.0)]
    assert claims == [Claim(each.sha256) for each in wanted[: fetch_book.MOST_OPEN]]


# ------------------------------------------------------------------ a limit


@pytest.mark.parametrize("limit", [100 * KIB, MIB, 20 * MIB])
def test_a_limit_is_kept_and_used(limit: int) -> None:
    total = 10 * limit
    peers = [main_peer(bytes_per_s=50 * MIB), Peer("pc", bytes_per_s=50 * MIB)]
    network = run(Network(tensors(*[total // 5] * 5), peers, max_bytes_per_s=limit))
    assert network.finish() == pytest.approx(10.0, rel=0.08)
    chunk = max(64 * KIB, min(MIB, limit // 8))
    assert all(ask.length <= chunk for _, ask in network.asks)
    for times in (
        [(at, ask.length) for at, ask in network.asks],
        [(at, nbytes) for at, _, nbytes in network.arrivals],
    ):
        for begin, _ in times:
            second = sum(nbytes for at, nbytes in times if begin <= at < begin + 1.0)
            assert second <= limit + chunk + 64 * KIB


def test_a_limit_far_below_a_chunk_is_not_taken_for_a_lack_of_sources() -> None:
    network = run(Network(tensors(320 * KIB), [main_peer()], max_bytes_per_s=KIB, patience_s=5.0))
    assert network.finish() == pytest.approx(256.0, rel=0.05)


# ------------------------------------------------------------------ mistakes of the edge


def test_what_cannot_be_raises() -> None:
    fetch = three_chunks_asked_of_two_sources()
    with pytest.raises(ValueError, match=r"65536 bytes of layer\.0 have not come"):
        fetch.handle(Written(A, 64 * KIB), 0.0)
    with pytest.raises(IllegalTransition):
        fetch.handle(TensorStored(A), 0.0)
    with pytest.raises(IllegalTransition):
        fetch.handle(TensorBusy(A), 0.0)
    with pytest.raises(KeyError):
        fetch.handle(SourceUp("nobody"), 0.0)
    fetch = Fetching(tensors(10), [], now=0.0)
    fetch.begin(0.0)
    with pytest.raises(ValueError, match=r"11 bytes of layer\.0"):
        fetch.handle(TensorClaimed(A, 11), 0.0)
    with pytest.raises(ValueError, match="no more tensors"):
        fetch.handle(WantedMore((), last=True), 0.0)


def test_chunks_are_never_above_the_most() -> None:
    network = run(Network(tensors(300 * MIB), [main_peer(bytes_per_s=3000 * MIB)]))
    network.finish()
    assert max(ask.length for _, ask in network.asks) == MAX_CHUNK_BYTES
