"""Fetching under random schedules: whatever goes wrong, every fetch ends, and ends rightly.

The network checks after every step that the window is kept, that what is asked for is missing, and
that nothing is written twice.
"""

import math
from dataclasses import replace
from random import Random

import pytest

from distributed_llm.weights.fetching.events import CloseSource, Failed, Finished
from tests.unit.fetch_network import KIB, MIB, File, Network, Peer, sha, tensors

_SPEEDS = (80 * KIB, 200 * MIB)
"""Of the coordinator's link in schedules that have to succeed, bytes per second."""


def log_uniform(rng: Random, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def some_silences(rng: Random, at_most: float) -> list[tuple[float, float]]:
    times, at = [], 0.0
    for _ in range(rng.choice((0, 0, 1, 3))):
        begin = at + rng.uniform(0.0, 3.0)
        at = begin + log_uniform(rng, 0.05, at_most)
        times.append((begin, at))
    return times


def some_tensors(rng: Random) -> list[int]:
    kinds = (0, 100, 64 * KIB, 300_000, MIB, 3 * MIB + 5)
    return [rng.choice(kinds) for _ in range(rng.randint(1, 10))]


def some_peer(rng: Random, name: str, count: int) -> Peer:
    lacks = frozenset(sha(i) for i in range(count) if rng.random() < rng.choice((0.0, 0.3, 1.0)))
    share = rng.choice((0.0, 0.0, 0.2, 1.0))
    lie_seed = rng.random()
    return Peer(
        name,
        bytes_per_s=log_uniform(rng, 10 * KIB, 500 * MIB),
        latency_s=log_uniform(rng, 1e-4, 0.1),
        lacks=lacks,
        expected=rng.random() < 0.5,
        lies=lambda sha256, offset: Random(f"{lie_seed} {sha256} {offset}").random() < share,
        silences=some_silences(rng, 100.0),
        refuses=rng.choice((0, 0, 3, 1000)),
    )


def some_comings_and_goings(rng: Random, network: Network, name: str, longest: float) -> float:
    """Have a source come, go and come back; return how long it is away, seconds."""
    at = rng.choice((0.0, 0.0, rng.uniform(0.0, longest)))
    away = at
    network.up(name, at)
    for _ in range(rng.choice((0, 0, 1, 4))):
        at += rng.uniform(0.0, 2.0)
        network.down(name, at)
        pause = rng.uniform(0.0, longest)
        at, away = at + pause, away + pause
        network.up(name, at)
    return away


def some_network(rng: Random, main: Peer) -> tuple[Network, float]:
    """Return a fetch, and how long it may take if the coordinator alone has to give it all."""
    sizes = some_tensors(rng)
    wanted = tensors(*sizes)
    peers = [main, *(some_peer(rng, f"pc{i}", len(sizes)) for i in range(rng.randint(0, 4)))]
    rng.shuffle(peers)
    limit = rng.choice((None, None, None, log_uniform(rng, 64 * KIB, 50 * MIB)))
    disk = rng.choice((1e12, log_uniform(rng, 300 * KIB, 100 * MIB)))
    later = rng.randint(0, len(sizes)) if rng.random() < 0.3 else None
    network = Network(
        wanted[:later], peers, last=later is None, max_bytes_per_s=limit, disk_bytes_per_s=disk
    )
    total = sum(sizes)
    takes_s = total / min(main.bytes_per_s, limit or math.inf, disk)
    takes_s += len(sizes) * 4 * main.latency_s + sum(stop - at for at, stop in main.silences)
    if later is not None:
        at = rng.uniform(0.0, 5.0)
        takes_s += at
        network.want(wanted[later:], at)
    for each in wanted[:later]:
        if rng.random() < 0.2:
            done = rng.randint(0, each.nbytes)
            network.files[each.sha256] = File(
                done=done, grains={-1: ("", not done or rng.random() < 0.7)}
            )
        if rng.random() < 0.2:
            network.busy_until[each.sha256] = rng.uniform(0.0, 5.0)
            takes_s += 5.5
        if rng.random() < 0.1:
            network.here_at[each.sha256] = rng.uniform(0.0, 5.0)
    for peer in peers:
        if peer is not main:
            some_comings_and_goings(rng, network, peer.name, 40.0)
    return network, takes_s


@pytest.mark.parametrize("seed", range(200))
def test_a_fetch_succeeds_as_long_as_the_coordinator_is_there(seed: int) -> None:
    rng = Random(seed)
    main = Peer(
        "main",
        trusted=True,
        bytes_per_s=log_uniform(rng, *_SPEEDS),
        latency_s=log_uniform(rng, 1e-4, 0.1),
        silences=some_silences(rng, 10.0),
        refuses=rng.choice((0, 0, 2)),
    )
    network, takes_s = some_network(rng, main)
    away_s = some_comings_and_goings(rng, network, "main", 10.0)
    # Whoever lies makes every tensor be fetched twice at worst, and once more for those that are
    # found by it; and each one that stops to send costs 2 s, of its chunks.
    took_s = network.finish(until=1000.0)
    assert took_s <= 4 * takes_s + away_s + 20.0
    liars = {action.source for _, action in network.told if isinstance(action, CloseSource)}
    assert "main" not in liars
    for name in liars:
        assert any(network.peers[name].lies(*asked) for asked in network.kept_from[name])


@pytest.mark.parametrize("seed", range(100))
def test_a_fetch_ends_whatever_the_coordinator_does(seed: int) -> None:
    rng = Random(1000 + seed)
    network, _ = some_network(rng, replace(some_peer(rng, "main", 10), trusted=True))
    some_comings_and_goings(rng, network, "main", 60.0)
    if rng.random() < 0.3:
        network.down("main", rng.uniform(0.0, 3.0))
    network.run(until=20_000.0)
    assert isinstance(network.end, Finished | Failed)
    if isinstance(network.end, Failed):
        assert all(text in network.end.message for text in ("layer.",))
    else:
        assert all(file.whole for file in network.files.values())


@pytest.mark.parametrize("seed", range(20))
def test_two_sources_share_as_their_links_are_fast(seed: int) -> None:
    rng = Random(2000 + seed)
    a, b = (log_uniform(rng, 2 * MIB, 30 * MIB) for _ in "ab")
    sizes = [int((a + b) * rng.uniform(0.5, 1.5)) for _ in range(5)]
    latency_s = log_uniform(rng, 1e-4, 0.02)
    peers = [
        Peer("main", trusted=True, bytes_per_s=a, latency_s=latency_s),
        Peer("pc", bytes_per_s=b, latency_s=latency_s),
    ]
    network = Network(tensors(*sizes), peers)
    network.up("main")
    network.up("pc")
    assert network.finish() <= 1.1 * sum(sizes) / (a + b)
    assert network.given["main"] / network.given["pc"] == pytest.approx(a / b, rel=0.15)


@pytest.mark.parametrize("seed", range(20))
def test_a_source_that_dies_costs_little_more_than_its_bytes(seed: int) -> None:
    rng = Random(3000 + seed)
    a, b = (log_uniform(rng, 2 * MIB, 30 * MIB) for _ in "ab")
    sizes = [int((a + b) * rng.uniform(0.5, 1.5)) for _ in range(3)]
    dies_at = rng.uniform(0.0, sum(sizes) / (a + b))
    silently = rng.random() < 0.5
    peers = [
        Peer("main", trusted=True, bytes_per_s=a),
        Peer("pc", bytes_per_s=b, silences=[(dies_at, math.inf)] if silently else []),
    ]
    network = Network(tensors(*sizes), peers)
    network.up("main")
    network.up("pc")
    if not silently:
        network.down("pc", dies_at)
    assert network.finish() <= dies_at + (sum(sizes) - dies_at * (a + b)) / a + 2.0
