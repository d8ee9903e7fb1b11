"""Fetching: each decision by itself, on a made-up network with a virtual clock."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from distributed_llm.common.states import IllegalTransition
from distributed_llm.weights import fetch_book
from distributed_llm.weights.fetch_events import (
    GRAIN_BYTES,
    MAX_CHUNK_BYTES,
    MAX_SOURCES,
    WINDOW_BYTES,
    Action,
    Ask,
    Check,
    ChunkArrived,
    Claim,
    CloseSource,
    Failed,
    Finished,
    Forget,
    Keep,
    Log,
    Source,
    SourceAdded,
    SourceDown,
    SourceFailed,
    SourceUp,
    TensorBusy,
    TensorClaimed,
    TensorHere,
    TensorStored,
    TensorWrong,
    Wanted,
    WantedMore,
    Written,
)
from distributed_llm.weights.fetching import Fetching
from tests.unit.fetch_network import KIB, MIB, MS, Network, Peer, sha, tensors

A, B, C = sha(0), sha(1), sha(2)
EVERYTHING = frozenset(sha(i) for i in range(100))


def run(network: Network, *names: str) -> Network:
    for name in names or network.peers:
        network.up(name)
    return network.run()


def failure(network: Network) -> str:
    assert isinstance(network.end, Failed)
    return network.end.message


def lines(network: Network) -> list[str]:
    return [action.text for _, action in network.told if isinstance(action, Log)]


def closed(network: Network) -> list[str]:
    return [action.source for _, action in network.told if isinstance(action, CloseSource)]


def main_peer(**of_peer: object) -> Peer:
    return Peer("main", trusted=True, **of_peer)  # type: ignore[arg-type]


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


MAIN_AND_PC = (Source("main", lambda _: True, True), Source("pc", lambda _: True))


def three_chunks_asked_of_two_sources(sources: Sequence[Source] = MAIN_AND_PC) -> Fetching:
    """The first two are asked of pc, and the last one of main."""
    fetch = Fetching(tensors(192 * KIB), sources, now=0.0)
    fetch.begin(0.0)
    fetch.handle(SourceUp("pc"), 0.0)
    fetch.handle(TensorClaimed(A, 0), 0.0)
    assert fetch.handle(SourceUp("main"), 0.0) == [Ask("main", A, 128 * KIB, 64 * KIB)]
    return fetch


def keeps(actions: list[Action]) -> int:
    return sum(isinstance(action, Keep) for action in actions)


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


# ------------------------------------------------------------------ sources come and go


def test_what_a_lost_source_owes_is_asked_elsewhere_at_once() -> None:
    peers = [main_peer(bytes_per_s=20 * MIB), Peer("pc", bytes_per_s=20 * MIB)]
    network = Network(tensors(*[10 * MIB] * 8), peers)
    network.down("pc", 1.0)
    owed: list[tuple[str, int]] = []
    network.at(1.0 - 1e-9, lambda: owed.extend(peers[1].asked))
    run(network)
    assert network.finish() == pytest.approx(1.0 + 40 / 20, rel=0.05)
    again = [(at, ask) for at, ask in network.asks if at >= 1.0][: len(owed)]
    assert owed
    assert [(ask.sha256, ask.offset) for _, ask in again] == owed


def test_what_a_silent_source_owes_is_asked_elsewhere() -> None:
    stuck = Peer("pc", bytes_per_s=20 * MIB, silences=[(1.0, math.inf)])
    network = run(Network(tensors(*[10 * MIB] * 8), [main_peer(bytes_per_s=20 * MIB), stuck]))
    assert network.finish() <= 1.0 + 40 / 20 + 0.2
    assert "pc has sent no weights for 1.5 s" in lines(network)


def test_a_source_that_was_silent_is_used_again() -> None:
    stuck = Peer("pc", bytes_per_s=20 * MIB, silences=[(1.0, 4.0)])
    network = run(Network(tensors(*[10 * MIB] * 20), [main_peer(bytes_per_s=20 * MIB), stuck]))
    assert network.finish() == pytest.approx((200 + 60) / 40, rel=0.05)
    during = [at for at, ask in network.asks if ask.source == "pc" and 2.6 < at < 4.0]
    assert during == []


def test_a_pause_of_the_only_source_costs_just_the_pause() -> None:
    network = run(Network(tensors(40 * MIB), [main_peer(silences=[(1.0, 8.0)])]))
    assert network.finish() == pytest.approx(11.0, rel=0.05)
    assert network.given == {"main": 40 * MIB}
    assert sum(ask.length for _, ask in network.asks) == 40 * MIB


def test_a_lost_source_comes_back() -> None:
    network = Network(tensors(40 * MIB), [main_peer()])
    network.down("main", 1.0)
    network.up("main", 20.0)
    run(network)
    assert network.finish() == pytest.approx(23.0, rel=0.05)


def test_large_chunks_of_a_lost_source_are_cut_for_a_slow_one() -> None:
    peers = [Peer("main", trusted=True, bytes_per_s=MIB / 4), Peer("pc", bytes_per_s=100 * MIB)]
    network = Network(tensors(60 * MIB), peers)
    network.down("pc", 0.5)
    run(network).finish()
    assert all(ask.length <= 128 * KIB for _, ask in network.asks if ask.source == "main")


def test_a_source_that_is_added_while_fetching() -> None:
    network = Network(tensors(100 * MIB), [main_peer()])
    network.add(Peer("pc", bytes_per_s=70 * MIB), at=2.0)
    run(network)
    assert network.finish() == pytest.approx(3.0, rel=0.05)


def test_a_source_that_lacked_a_tensor_and_has_it_now() -> None:
    network = Network(tensors(30 * MIB), [Peer("pc", lacks=frozenset([A]))])
    run(network, "pc")
    assert "pc (does not have it)" in failure(network)
    network = Network(tensors(30 * MIB), [Peer("pc", lacks=frozenset([A]))])
    network.announce("pc", at=5.0)
    run(network, "pc")
    assert network.finish() == pytest.approx(8.0, rel=0.05)


def test_sources_are_bounded() -> None:
    sources = [Source(f"pc{i}", lambda _: True) for i in range(MAX_SOURCES + 1)]
    with pytest.raises(ValueError, match="more than 64 sources"):
        Fetching(tensors(1), sources, now=0.0)
    fetch = Fetching(tensors(1), sources[:-1], now=0.0)
    (line,) = logs(fetch.handle(SourceAdded(sources[-1]), 0.0))
    assert line == "pc64 is not asked for weights: there are 64 sources"
    assert len(fetch.bytes_by_source) == MAX_SOURCES


def test_log_lines_are_bounded() -> None:
    fetch = Fetching(tensors(1), [Source(f"pc{i}", lambda _: True) for i in range(64)], now=0.0)
    some = [
        line
        for i in range(1000)
        for line in logs(fetch.handle(SourceAdded(Source(f"x{i}", lambda _: True)), 0.0))
    ]
    assert len(some) == 100
    assert logs(fetch.on_timer(60.0)) == [
        "900 more lines were left out in 60 s: fetching weights",
    ]


def logs(actions: list[Action]) -> list[str]:
    return [action.text for action in actions if isinstance(action, Log)]


# ------------------------------------------------------------------ giving up


def test_nobody_is_there() -> None:
    network = Network(tensors(MIB), [main_peer(), Peer("pc")], patience_s=12.0).run()
    assert network.ended_at == 12.0
    assert failure(network) == (
        "No bytes of layer.0 have come for 12.0 s. "
        "Tried: main (not connected yet), pc (not connected yet)."
    )


def test_who_is_there_lacks_it_and_who_has_it_is_not_there() -> None:
    network = Network(tensors(MIB), [main_peer(), Peer("pc", lacks=EVERYTHING)])
    network.down("main", 0.01)
    run(network)
    assert network.ended_at == pytest.approx(30.0, abs=0.1)
    assert failure(network).endswith(
        "Tried: main (the connection was lost), pc (does not have it)."
    )


def test_who_has_it_is_silent() -> None:
    network = run(Network(tensors(40 * MIB), [main_peer(silences=[(1.0, math.inf)])]))
    assert network.ended_at == pytest.approx(31.0, abs=0.3)
    assert failure(network).endswith("Tried: main (is connected and sends nothing).")
    assert network.fetching.waits_for(20.0) == "waits for main"


def test_nobody_has_it_is_told_at_once() -> None:
    peers = [main_peer(lacks=frozenset([B, C])), Peer("pc", lacks=frozenset([B, C]))]
    network = run(Network(tensors(8 * MIB, MIB, MIB), peers))
    assert network.ended_at < 1.0
    assert failure(network).startswith("Nobody has layer.")
    assert failure(network).endswith("Tried: main (does not have it), pc (does not have it).")


def test_somebody_may_have_it_who_is_not_connected() -> None:
    network = Network(tensors(MIB), [main_peer(lacks=EVERYTHING), Peer("pc")])
    network.up("pc", 20.0)
    run(network, "main")
    assert network.finish() == pytest.approx(20.1, abs=0.1)


def test_bytes_that_come_renew_the_patience() -> None:
    slow = main_peer(bytes_per_s=50 * KIB)
    assert run(Network(tensors(5 * MIB), [slow], patience_s=3.0)).finish() > 100.0


def test_bytes_that_come_early_renew_the_patience_too() -> None:
    fetch = Fetching(tensors(128 * KIB), [Source("main", lambda _: True, True)], now=0.0)
    fetch.begin(0.0)
    fetch.handle(TensorClaimed(A, 0), 0.0)
    fetch.handle(SourceUp("main"), 0.0)
    fetch.on_timer(1.5)
    fetch.handle(ChunkArrived("main", A, 64 * KIB, 64 * KIB), 20.0)
    fetch.on_timer(21.5)
    assert fetch.on_timer(49.0) == []
    (end,) = fetch.on_timer(50.0)
    assert isinstance(end, Failed)


def test_a_source_that_refuses_is_asked_again_a_few_times() -> None:
    network = run(Network(tensors(MIB), [main_peer(refuses=4)]))
    assert network.finish() == pytest.approx(2.1, abs=0.2)
    network = run(Network(tensors(MIB), [main_peer(refuses=9)]))
    assert network.ended_at < 3.0
    assert failure(network) == "Nobody has layer.0. Tried: main (cannot read the file)."
    assert "main refused weights: cannot read the file" in lines(network)


def test_a_source_that_fails_is_not_waited_for() -> None:
    network = Network(tensors(MIB), [main_peer()])
    network.at(1.0, lambda: network.handle(SourceFailed("main", "its key was removed")))
    network.run()
    assert network.ended_at == 1.0
    assert failure(network) == "Nobody has layer.0. Tried: main (its key was removed)."
    assert lines(network) == ["main gives no weights: its key was removed"]


# ------------------------------------------------------------------ wrong bytes


def liar(sha256: str, offset: int) -> bool:
    return offset >= MIB


def test_who_gave_wrong_bytes_among_others_is_found_and_named() -> None:
    peers = [main_peer(), Peer("pc", lies=liar), Peer("mac")]
    network = run(Network(tensors(*[8 * MIB] * 6), peers))
    network.finish()
    assert closed(network) == ["pc"]
    assert "pc is not asked for weights any more: it gave wrong bytes of layer.0" in lines(network)
    assert "layer.0 had wrong bytes, from mac, main and pc, and is fetched again" in lines(network)
    first_wrong = next(at for at, action in network.told if isinstance(action, Log))
    again = {ask.source for at, ask in network.asks if at >= first_wrong and ask.sha256 == A}
    assert again == {"main"}
    assert network.given["mac"] > 8 * MIB


def test_who_alone_gave_wrong_bytes_is_the_liar() -> None:
    peers = [Peer("pc", lies=liar), main_peer()]
    network = Network(tensors(*[8 * MIB] * 3), peers)
    network.up("main", 0.9)
    run(network, "pc")
    network.finish()
    assert closed(network) == ["pc"]
    assert lines(network) == [
        "pc is not asked for weights any more: it gave wrong bytes of layer.0"
    ]


def test_what_a_liar_gave_of_other_tensors_is_dropped() -> None:
    peers = [Peer("pc", lies=liar), main_peer()]
    network = Network(tensors(2 * MIB, 30 * MIB), peers, disk_bytes_per_s=5 * MIB)
    network.up("main", 0.25)
    run(network, "pc")
    network.finish()
    assert [action for _, action in network.told if isinstance(action, Forget)] == [Forget(B)]


def test_the_trusted_source_has_a_second_chance_and_not_a_third() -> None:
    wrong_once = iter([True])
    network = Network(tensors(MIB), [main_peer(lies=lambda *_: next(wrong_once, False))])
    run(network).finish()
    assert lines(network) == [
        "layer.0 had wrong bytes, from main, and is fetched again",
        "main gave wrong bytes of layer.0, and then right ones: its memory or disk may be broken",
    ]
    network = run(Network(tensors(MIB), [main_peer(lies=lambda *_: True), Peer("pc")]))
    assert "layer.0 came from main with wrong bytes twice: memory or disk" in failure(network)


def test_a_wrong_partial_file_is_nobodys_fault() -> None:
    network = Network(tensors(2 * MIB), [Peer("pc"), main_peer()])
    network.files[A].done = MIB
    network.files[A].grains[0] = "", False
    run(network).finish()
    assert closed(network) == []
    assert sum(network.given.values()) >= 3 * MIB


def test_an_empty_tensor_can_be_wrong_too() -> None:
    fetch = Fetching(tensors(0), [], now=0.0)
    fetch.begin(0.0)
    fetch.handle(TensorClaimed(A, 0), 0.0)
    (end,) = fetch.handle(TensorWrong(A), 0.0)
    assert isinstance(end, Failed)
    assert "layer.0 is empty" in end.message


def test_a_liar_that_is_not_compared_ends_the_fetch_after_all() -> None:
    """The edge never says who it was, and nobody gives all of the tensor."""
    fetch = Fetching(tensors(128 * KIB), [Source(n, lambda _: True) for n in ("a", "b")], now=0.0)
    fetch.begin(0.0)
    fetch.handle(TensorClaimed(A, 64 * KIB), 0.0)
    end: list[Action] = []
    for _ in range(9):
        for name in ("a", "b"):
            asks = [x for x in fetch.handle(SourceUp(name), 0.0) if isinstance(x, Ask)]
            end = fetch.handle(ChunkArrived(name, A, asks[0].offset, asks[0].length), 0.0)
            assert keeps(end) == 1
            end = fetch.handle(Written(A, asks[0].offset + asks[0].length), 0.0)
            fetch.handle(SourceDown(name, ""), 0.0)
            if end == [Check(A)]:
                break
        end = fetch.handle(TensorWrong(A), 0.0)
        if end and isinstance(end[0], Failed):
            assert end[0].message.startswith(
                "layer.0 had wrong bytes 5 times, at last from a and b"
            )
            return
    raise AssertionError("the fetch has no end")


def test_a_chunk_of_another_length_than_asked_for() -> None:
    fetch = three_chunks_asked_of_two_sources()
    closing = fetch.handle(ChunkArrived("pc", A, 0, 12), 0.0)
    why = "sent 12 bytes where it was asked for 64.0 KiB"
    assert closing[:2] == [
        CloseSource("pc", why),
        Log(f"pc is not asked for weights any more: it {why}", "warning"),
    ]
    assert fetch.handle(SourceUp("pc"), 0.1) == []
    fetch.validate()


def fetched_again(sources: Sequence[Source]) -> tuple[Fetching, list[Action]]:
    """Main won the race for all chunks and they are wrong; pc still owes the first two."""
    fetch = three_chunks_asked_of_two_sources(sources)
    for offset in (128, 0, 64):
        fetch.handle(ChunkArrived("main", A, offset * KIB, 64 * KIB), 0.02)
    assert fetch.handle(Written(A, 192 * KIB), 0.02) == [Check(A)]
    return fetch, fetch.handle(TensorWrong(A), 0.02)


def test_a_late_answer_is_not_taken_for_that_to_a_new_question() -> None:
    fetch, actions = fetched_again(MAIN_AND_PC)
    assert actions[-1] == Ask("main", A, 0, 192 * KIB)
    assert fetch.handle(ChunkArrived("pc", A, 0, 64 * KIB), 0.03) == []


def test_who_owes_a_late_answer_is_not_asked_for_what_another_lost() -> None:
    fetch, _ = fetched_again(MAIN_AND_PC)
    fetch.handle(SourceDown("main", ""), 0.02)
    assert fetch.handle(ChunkArrived("pc", A, 64 * KIB, 64 * KIB), 0.03) == []
    asks = fetch.handle(ChunkArrived("pc", A, 0, 64 * KIB), 0.04)
    assert [ask for ask in asks if isinstance(ask, Ask) and ask.offset == 0]
    fetch.validate()


def test_who_owes_a_late_answer_is_not_asked_anew_for_its_place() -> None:
    main, pc = MAIN_AND_PC
    fetch, actions = fetched_again((replace(main, trusted=False), replace(pc, trusted=True)))
    assert CloseSource("main", "gave wrong bytes of layer.0") in actions
    assert fetch.handle(ChunkArrived("pc", A, 64 * KIB, 64 * KIB), 0.03) == []
    asks = fetch.handle(ChunkArrived("pc", A, 0, 64 * KIB), 0.04)
    assert asks == [Ask("pc", A, 0, 192 * KIB)]
    fetch.validate()


def test_bytes_that_nobody_asked_for_are_ignored() -> None:
    fetch = three_chunks_asked_of_two_sources()
    assert fetch.handle(ChunkArrived("pc", A, 128 * KIB, 64 * KIB), 0.0) == []
    assert fetch.handle(ChunkArrived("pc", "f" * 64, 0, 64 * KIB), 0.0) == []


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


# ------------------------------------------------------------------ other processes


def test_a_busy_tensor_is_looked_at_again_and_blocks_no_other() -> None:
    network = Network(tensors(MIB, MIB), [main_peer()])
    network.busy_until[A] = 100.0
    claims: list[float] = []
    network.on_claim = lambda sha256: claims.append(network.now) if sha256 == A else None
    run(network).finish()
    at, first = network.told[0]
    assert (at < 0.2, first) == (True, Check(B))
    assert len(claims) == pytest.approx(400, abs=3)


def test_a_tensor_that_another_process_stored() -> None:
    network = Network(tensors(MIB, MIB), [main_peer()])
    network.busy_until[A], network.here_at[A] = 3.0, 3.0
    assert run(network).finish() == pytest.approx(3.0, abs=0.3)
    assert network.given == {"main": MIB}


def test_a_tensor_that_is_here_needs_no_source() -> None:
    fetch = Fetching(tensors(MIB, MIB), [], now=0.0)
    assert fetch.begin(0.0) == [Claim(A)]
    assert fetch.handle(TensorBusy(A), 0.0) == [Claim(B)]
    assert fetch.handle(TensorHere(B), 0.0) == []
    assert fetch.waits_for(0.0) == "another process of this machine fetches 1 tensor"
    assert fetch.next_deadline() == 0.25
    assert fetch.on_timer(0.25) == [Claim(A)]
    assert fetch.handle(TensorHere(A), 0.25) == [Finished()]
    assert fetch.bytes_done == 2 * MIB


def test_a_busy_tensor_does_not_renew_the_patience_with_sources() -> None:
    network = Network(tensors(MIB, MIB), [main_peer()])
    network.busy_until[A] = 1000.0
    network.run()
    assert network.ended_at == 30.0


# ------------------------------------------------------------------ for people


def test_what_is_waited_for() -> None:
    network = Network(tensors(40 * MIB), [main_peer(), Peer("pc")])
    texts: list[str] = []
    for at in (0.5, 1.5, 2.5):
        network.at(at, lambda: texts.append(network.fetching.waits_for(network.now)))
    network.up("main", 1.0)
    network.down("main", 2.0)
    network.run()
    assert texts == ["waits for main and pc", "", "waits for main and pc"]


def test_wrong_bytes_are_told_while_they_are_fetched_again() -> None:
    network = Network(tensors(8 * MIB), [main_peer(), Peer("pc", lies=liar)])
    texts: list[str] = []
    network.at(0.8, lambda: texts.append(network.fetching.waits_for(network.now)))
    run(network)
    assert texts == ["wrong bytes in layer.0: all of it again from main"]


def test_the_rate_is_that_of_the_last_seconds() -> None:
    network = Network(tensors(100 * MIB), [main_peer(silences=[(5.0, 9.0)])])
    rates: list[float] = []
    for at in (1.0, 4.5, 8.9):
        network.at(at, lambda: rates.append(network.fetching.rate(network.now) / MIB))
    run(network)
    assert rates == [pytest.approx(10, rel=0.15), pytest.approx(10, rel=0.15), 0.0]


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
