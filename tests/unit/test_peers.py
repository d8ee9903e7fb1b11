"""The neighbours of a stage: dialling, hellos, reports, and who is believed."""

import math

import pytest

from distributed_llm.common import codec
from distributed_llm.common.messages import (
    LinkReport,
    LoadStage,
    ModelSource,
    NextStage,
    PeerHello,
    PeerProbe,
    PeerProbed,
    PeerWelcome,
)
from distributed_llm.common.tensors import TensorSpec
from distributed_llm.common.types import Epoch, LayerRange, PeerId
from distributed_llm.worker.session.dialling import proof
from distributed_llm.worker.session.events import Action, Log, Send
from distributed_llm.worker.session.link_events import (
    CloseLink,
    Greet,
    LinkId,
    OpenLink,
    SendOverLink,
    SendToPeer,
)
from distributed_llm.worker.session.peers import PROBE_BYTES, Peers

LAN, LOOPBACK = "10.0.0.2:7000", "127.0.0.1:7000"
MAC = NextStage(worker="mac", addresses=(LAN, LOOPBACK))
LINK = LinkId(Epoch(3))
HELLO = PeerHello(epoch=Epoch(3), key=proof("secret", Epoch(3), "mac"))
PROBE = SendOverLink(
    LINK,
    PeerProbe(epoch=Epoch(3), tensors=(TensorSpec("uint8", (PROBE_BYTES,)),)),
    (bytes(PROBE_BYTES),),
)
DOWN = Send(LinkReport(epoch=Epoch(3), up=False))


def order(epoch: int = 3, next_stage: NextStage | None = MAC, key: str = "secret") -> LoadStage:
    return LoadStage(
        epoch=Epoch(epoch),
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
    peers = Peers(order(), "pc")
    assert peers.begin(now) == [OpenLink(LINK, (LAN, LOOPBACK))]
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
    dial: list[Action] = [OpenLink(LINK, (LAN, LOOPBACK))]
    assert story(dialling(now=10.0), until=26.0) == [
        (13.0, [DOWN]),
        (15.0, dial),
        (20.0, dial),
        (25.0, dial),
    ]


def test_hello_is_said_where_something_answers_until_it_is_welcome() -> None:
    peers = dialling()
    assert peers.reached(LOOPBACK, 0.1) == [Greet(LINK, HELLO, (LOOPBACK,))]
    assert peers.reached(LAN, 0.2) == [Greet(LINK, HELLO, (LAN,))]
    again: list[Action] = [Greet(LINK, HELLO, (LOOPBACK, LAN))]
    assert story(peers, until=1.0) == [(0.5, again), (0.8, again)]
    up = without_logs(peers.welcomed(0.25, 0.0))
    assert up == [Send(LinkReport(epoch=Epoch(3), up=True, rtt_s=0.25)), PROBE]
    assert peers.link_up
    assert peers.next_deadline() == math.inf


def test_link_that_comes_up_late_is_reported_again() -> None:
    peers = dialling()
    assert story(peers, until=5.0) == [(3.0, [DOWN]), (5.0, [OpenLink(LINK, (LAN, LOOPBACK))])]
    peers.reached(LAN, 5.1)
    up = without_logs(peers.welcomed(0.5, 5.5))
    assert up == [Send(LinkReport(epoch=Epoch(3), up=True, rtt_s=0.5)), PROBE]


def test_dialling_anew_forgets_what_was_reached() -> None:
    peers = dialling()
    peers.reached(LAN, 4.9)
    (_, reports), (_, dials) = story(peers, until=5.0)
    assert (reports, dials) == ([DOWN], [OpenLink(LINK, (LAN, LOOPBACK))])
    assert story(peers, until=9.0) == []
    peers.reached(LOOPBACK, 9.1)
    assert story(peers, until=9.5) == [(9.4, [Greet(LINK, HELLO, (LOOPBACK,))])]


def test_lost_link_is_reported_at_once_and_dialled_later() -> None:
    peers = dialling()
    peers.reached(LAN, 0.1)
    peers.welcomed(0.5, 0.0)
    assert without_logs(peers.lost(100.0)) == [DOWN]
    assert not peers.link_up
    assert peers.lost(100.0) == []
    assert story(peers, until=109.0) == [(105.0, [OpenLink(LINK, (LAN, LOOPBACK))])]


def test_worker_without_addresses_is_reported_and_not_dialled() -> None:
    peers = Peers(order(next_stage=NextStage(worker="mac", addresses=())), "pc")
    assert without_logs(peers.begin(0.0)) == [DOWN]
    assert peers.next_deadline() == math.inf
    assert peers.end() == [CloseLink(LINK)]


def test_nothing_is_due_after_the_end() -> None:
    peers = dialling()
    peers.reached(LAN, 0.1)
    assert peers.end() == [CloseLink(LINK)]
    assert peers.next_deadline() == math.inf


def test_last_stage_dials_nobody() -> None:
    peers = Peers(order(next_stage=None), "pc")
    assert peers.begin(0.0) == []
    assert peers.next_deadline() == math.inf
    assert peers.end() == []


# ------------------------------------------------------------------ how fast the link is


@pytest.mark.parametrize(
    ("rtt_s", "answered_at", "took_s"),
    [(0.0, 10.5, 0.5), (0.1, 10.5, 0.4), (0.45, 10.5, 0.05), (2.0, 10.5, 0.05)],
)
def test_speed_of_the_link_is_told_once(rtt_s: float, answered_at: float, took_s: float) -> None:
    peers = dialling()
    peers.welcomed(rtt_s, 10.0)
    (said,) = peers.probed(answered_at)
    assert isinstance(said, Send)
    assert isinstance(said.message, LinkReport)
    assert (said.message.up, said.message.rtt_s) == (True, rtt_s)
    assert said.message.bytes_per_s == pytest.approx(PROBE_BYTES / took_s)
    assert peers.probed(answered_at) == []


def test_probe_that_was_answered_at_once_is_within_what_can_be_told() -> None:
    peers = dialling()
    peers.welcomed(0.1, 10.0)
    (said,) = peers.probed(10.0)
    assert isinstance(said, Send)
    codec.to_coordinator.decode(codec.encode(said.message))


def test_speed_is_not_told_of_a_link_that_is_down_or_another_one() -> None:
    peers = dialling()
    assert peers.probed(1.0) == []
    peers.welcomed(0.1, 10.0)
    peers.lost(11.0)
    assert peers.probed(12.0) == []
    peers.welcomed(0.1, 20.0)
    (said,) = peers.probed(21.0)
    assert isinstance(said, Send)
    assert isinstance(said.message, LinkReport)
    assert said.message.bytes_per_s == pytest.approx(PROBE_BYTES / 0.9)


def test_probe_is_answered() -> None:
    name = PeerId(b"before")
    assert dialling().probed_by(name) == [SendToPeer(name, PeerProbed(epoch=Epoch(3)))]


# ------------------------------------------------------------------ from the worker before


def test_proof_is_of_key_epoch_and_worker() -> None:
    proofs = {
        proof(key, Epoch(epoch), worker)
        for key, epoch, worker in (("k", 3, "pc"), ("l", 3, "pc"), ("k", 4, "pc"), ("k", 3, "mac"))
    }
    assert len(proofs) == 4
    assert all(len(one) == 64 and "k" not in one for one in proofs)


def test_hello_of_one_worker_is_right_at_the_next() -> None:
    """What one end says is what the other end believes, and nobody else does, not even itself."""
    peers = dialling()
    (greet,) = peers.reached(LAN, 0.0)
    assert isinstance(greet, Greet)
    next_peers = Peers(order(next_stage=None), "mac")
    other = Peers(order(next_stage=None), "mac-2")
    name = PeerId(b"pc")
    assert next_peers.greeted(name, greet.hello) == [SendToPeer(name, PeerWelcome(epoch=Epoch(3)))]
    assert next_peers.knows(name)
    for wrong in (peers, other):
        assert wrong.is_forged(greet.hello)
        assert wrong.greeted(name, greet.hello) == []
        assert not wrong.knows(name)


def test_every_right_hello_is_answered() -> None:
    peers = dialling()
    right = PeerHello(epoch=Epoch(3), key=proof("secret", Epoch(3), "pc"))
    for _ in range(3):
        assert peers.greeted(PeerId(b"x"), right) != []


def test_number_of_those_who_are_known_is_bounded() -> None:
    peers = dialling()
    right = PeerHello(epoch=Epoch(3), key=proof("secret", Epoch(3), "pc"))
    names = [PeerId(b"%d" % number) for number in range(1000)]
    for name in names:
        peers.greeted(name, right)
    known = [name for name in names if peers.knows(name)]
    assert known == names[-len(known) :]
    assert len(known) <= 64
