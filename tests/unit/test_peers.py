"""The neighbours of a stage: dialling, hellos, reports, and who is believed."""

import math

import pytest

from distributed_llm.common.messages import (
    LinkReport,
    LoadStage,
    ModelSource,
    NextStage,
    PeerHello,
    PeerWelcome,
)
from distributed_llm.common.types import LayerRange, PeerId
from distributed_llm.worker.events import (
    Action,
    CloseLink,
    Greet,
    Log,
    OpenLink,
    PeerSay,
    Say,
)
from distributed_llm.worker.peers import Peers, proof

LAN, LOOPBACK = "10.0.0.2:7000", "127.0.0.1:7000"
MAC = NextStage(worker="mac", addresses=(LAN, LOOPBACK))
HELLO = PeerHello(epoch=3, key=proof("secret", 3, "mac"))
DOWN = Say(LinkReport(epoch=3, up=False))


def order(epoch: int = 3, next_stage: NextStage | None = MAC, key: str = "secret") -> LoadStage:
    return LoadStage(
        epoch=epoch,
        source=ModelSource(kind="builtin", name=""),
        layers=LayerRange(0, 2),
        dtype="float32",
        wire_dtype="float32",
        digest="d",
        kv_tokens=100,
        link_key=key,
        next_stage=next_stage,
    )


def dialling(now: float = 0.0) -> Peers:
    peers = Peers()
    assert peers.begin(order(), "pc", now) == [OpenLink(3, (LAN, LOOPBACK))]
    return peers


def without_logs(actions: list[Action]) -> list[Action]:
    return [action for action in actions if not isinstance(action, Log)]


def story(peers: Peers, until: float) -> list[tuple[float, list[Action]]]:
    """Let time pass; return what is done and when, log lines left out."""
    told = []
    while (at := peers.next_deadline()) <= until:
        assert peers.on_timer(at - 1e-6) == []
        told.append((round(at, 6), without_logs(peers.on_timer(at))))
    return told


# ------------------------------------------------------------------ to the next worker


def test_unreachable_worker_is_reported_once_and_dialled_for_ever() -> None:
    dial: list[Action] = [OpenLink(3, (LAN, LOOPBACK))]
    assert story(dialling(now=10.0), until=26.0) == [
        (13.0, [DOWN]),
        (15.0, dial),
        (20.0, dial),
        (25.0, dial),
    ]


def test_hello_is_said_where_something_answers_until_it_is_welcome() -> None:
    peers = dialling()
    assert peers.reached(3, LOOPBACK, 0.1) == [Greet(HELLO, (LOOPBACK,))]
    assert peers.reached(3, LAN, 0.2) == [Greet(HELLO, (LAN,))]
    again: list[Action] = [Greet(HELLO, (LOOPBACK, LAN))]
    assert story(peers, until=1.0) == [(0.5, again), (0.8, again)]
    up = without_logs(peers.welcomed(3, 0.25))
    assert up == [Say(LinkReport(epoch=3, up=True, rtt_s=0.25))]
    assert peers.link_up
    assert peers.next_deadline() == math.inf


def test_link_that_comes_up_late_is_reported_again() -> None:
    peers = dialling()
    assert story(peers, until=5.0) == [(3.0, [DOWN]), (5.0, [OpenLink(3, (LAN, LOOPBACK))])]
    peers.reached(3, LAN, 5.1)
    assert without_logs(peers.welcomed(3, 0.5)) == [Say(LinkReport(epoch=3, up=True, rtt_s=0.5))]


def test_dialling_anew_forgets_what_was_reached() -> None:
    peers = dialling()
    peers.reached(3, LAN, 4.9)
    (_, reports), (_, dials) = story(peers, until=5.0)
    assert (reports, dials) == ([DOWN], [OpenLink(3, (LAN, LOOPBACK))])
    assert story(peers, until=9.0) == []
    peers.reached(3, LOOPBACK, 9.1)
    assert story(peers, until=9.5) == [(9.4, [Greet(HELLO, (LOOPBACK,))])]


def test_lost_link_is_reported_at_once_and_dialled_later() -> None:
    peers = dialling()
    peers.reached(3, LAN, 0.1)
    peers.welcomed(3, 0.5)
    assert without_logs(peers.lost(3, 100.0)) == [DOWN]
    assert not peers.link_up
    assert peers.lost(3, 100.0) == []
    assert story(peers, until=109.0) == [(105.0, [OpenLink(3, (LAN, LOOPBACK))])]


def test_worker_without_addresses_is_reported_and_not_dialled() -> None:
    peers = Peers()
    nowhere = order(next_stage=NextStage(worker="mac", addresses=()))
    assert without_logs(peers.begin(nowhere, "pc", 0.0)) == [DOWN]
    assert peers.next_deadline() == math.inf
    assert peers.end() == [CloseLink()]


def test_nothing_is_due_after_the_end() -> None:
    peers = dialling()
    peers.reached(3, LAN, 0.1)
    assert peers.end() == [CloseLink()]
    assert peers.next_deadline() == math.inf
    assert peers.end() == []


def test_last_stage_dials_nobody() -> None:
    peers = Peers()
    assert peers.begin(order(next_stage=None), "pc", 0.0) == []
    assert peers.next_deadline() == math.inf
    assert peers.end() == []


@pytest.mark.parametrize("up", [False, True])
def test_what_comes_late_of_another_epoch_is_ignored(up: bool) -> None:
    peers = dialling()
    if up:
        peers.welcomed(3, 0.5)
    assert peers.begin(order(4), "pc", 1.0) == [OpenLink(4, (LAN, LOOPBACK))]
    assert not peers.link_up
    assert peers.reached(3, LAN, 1.0) == []
    assert peers.welcomed(3, 0.5) == []
    assert not peers.link_up
    peers.welcomed(4, 0.5)
    assert peers.lost(3, 1.0) == []
    assert peers.link_up
    assert peers.end() == [CloseLink()]
    assert not peers.link_up
    assert peers.next_deadline() == math.inf
    for epoch in (3, 4):
        assert peers.reached(epoch, LAN, 1.0) == peers.welcomed(epoch, 0.5) == []
        assert peers.lost(epoch, 1.0) == []


# ------------------------------------------------------------------ from the worker before


def test_proof_is_of_key_epoch_and_worker() -> None:
    proofs = {
        proof(*what) for what in (("k", 3, "pc"), ("l", 3, "pc"), ("k", 4, "pc"), ("k", 3, "mac"))
    }
    assert len(proofs) == 4
    assert all(len(one) == 64 and "k" not in one for one in proofs)


def test_hello_of_one_worker_is_right_at_the_next() -> None:
    """What one end says is what the other end believes, and nobody else does, not even itself."""
    peers = dialling()
    (greet,) = peers.reached(3, LAN, 0.0)
    assert isinstance(greet, Greet)
    next_peers, other = Peers(), Peers()
    next_peers.begin(order(next_stage=None), "mac", 0.0)
    other.begin(order(next_stage=None), "mac-2", 0.0)
    name = PeerId(b"pc")
    assert next_peers.greeted(name, greet.hello) == [PeerSay(name, PeerWelcome(epoch=3))]
    assert next_peers.may_hand_tasks(name)
    for wrong in (peers, other):
        assert wrong.is_forged(greet.hello)
        assert wrong.greeted(name, greet.hello) == []
        assert not wrong.may_hand_tasks(name)


def test_every_right_hello_is_answered() -> None:
    peers = dialling()
    right = PeerHello(epoch=3, key=proof("secret", 3, "pc"))
    for _ in range(3):
        assert peers.greeted(PeerId(b"x"), right) != []


def test_number_of_those_who_are_known_is_bounded() -> None:
    peers = dialling()
    right = PeerHello(epoch=3, key=proof("secret", 3, "pc"))
    names = [PeerId(b"%d" % number) for number in range(1000)]
    for name in names:
        peers.greeted(name, right)
    known = [name for name in names if peers.may_hand_tasks(name)]
    assert known == names[-len(known) :]
    assert len(known) <= 64
