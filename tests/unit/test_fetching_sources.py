"""Fetching: sources and other processes come and go, and when to give up."""

import math

import pytest

from distributed_llm.weights.fetching.events import (
    MAX_SOURCES,
    Check,
    ChunkArrived,
    Claim,
    Failed,
    Finished,
    Source,
    SourceAdded,
    SourceFailed,
    SourceUp,
    TensorBusy,
    TensorClaimed,
    TensorHere,
)
from distributed_llm.weights.fetching.fetching import Fetching
from tests.unit.fetch_network import KIB, MIB, Network, Peer, sha, tensors
from tests.unit.fetch_scenes import (
    failure,
    lines,
    logs,
    main_peer,
    run,
)

A, B, C = sha(0), sha(1), sha(2)
EVERYTHING = frozenset(sha(i) for i in range(100))


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


def test_the_rate_is_that_of_the_last_seconds() -> None:
    network = Network(tensors(100 * MIB), [main_peer(silences=[(5.0, 9.0)])])
    rates: list[float] = []
    for at in (1.0, 4.5, 8.9):
        network.at(at, lambda: rates.append(network.fetching.rate(network.now) / MIB))
    run(network)
    assert rates == [pytest.approx(10, rel=0.15), pytest.approx(10, rel=0.15), 0.0]
