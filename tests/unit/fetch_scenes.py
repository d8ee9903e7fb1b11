"""Sources, events and what came of them, for tests of fetching."""

from collections.abc import Sequence

from distributed_llm.weights.fetching.events import (
    Action,
    Ask,
    CloseSource,
    Failed,
    Keep,
    Log,
    Source,
    SourceUp,
    TensorClaimed,
)
from distributed_llm.weights.fetching.fetching import Fetching
from tests.unit.fetch_network import KIB, Network, Peer, sha, tensors

A = sha(0)


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


def logs(actions: list[Action]) -> list[str]:
    return [action.text for action in actions if isinstance(action, Log)]
