"""ROUTER and DEALER over loopback TCP: both directions, back pressure, lost peers, strangers.

Tests wait for events, never for time; what never happens is ended by pytest's own time limit.
"""

import asyncio
import contextlib
import ctypes
import functools
import os
import secrets
import select
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import psutil
import pytest
import zmq

from distributed_llm.common import codec
from distributed_llm.common.errors import (
    AddressInUse,
    ConnectionFailed,
    LocalProtocolError,
    RemoteProtocolError,
)
from distributed_llm.common.keys import PublicKey
from distributed_llm.common.tensors import MAX_FRAME_BYTES
from distributed_llm.common.transport import Dealer, Delivery, Router, sockets
from distributed_llm.common.transport import dealer as dealer_module
from distributed_llm.common.transport.dealer import _MAX_OUTBOX
from distributed_llm.common.transport.pump import _BATCH, Monitor
from distributed_llm.common.types import PeerId

pytestmark = pytest.mark.timeout(60)
ANY = "127.0.0.1:0"


def on_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an async test in an event loop of its own."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        async def main() -> None:
            await test(*args, **kwargs)

        asyncio.run(main())

    return run


class Inbox(list[Any]):
    """What a callback was called with, and waiting for it."""

    def __init__(self) -> None:
        super().__init__()
        self._grown = asyncio.Event()

    def put(self, *item: Any) -> None:
        self.append(item)
        self._grown.set()

    async def until(self, count: int) -> None:
        """Return once there are `count` items."""
        while len(self) < count:
            self._grown.clear()
            await self._grown.wait()


class End:
    """One end of a connection, and what it was told. Frames are copied to bytes."""

    def __init__(self) -> None:
        self.heard = Inbox()
        self.connects = Inbox()
        self.losses = Inbox()
        self.rejections = Inbox()

    def router(self, bind: str = ANY) -> Router:
        return Router(
            bind,
            lambda peer, _, frames: self.heard.put(peer, [bytes(frame) for frame in frames]),
            self.losses.put,
            door=None,
        )

    def dealer(self, address: str) -> Dealer:
        return Dealer(
            address,
            lambda frames: self.heard.put([bytes(frame) for frame in frames]),
            self.connects.put,
            self.losses.put,
            login=None,
            on_rejected=self.rejections.put,
        )


@contextmanager
def opened(end: End, bind: str = ANY) -> Iterator[Router]:
    router = end.router(bind)
    try:
        yield router
    finally:
        router.close()


@contextmanager
def dealing(end: End, address: str) -> Iterator[Dealer]:
    dealer = end.dealer(address)
    try:
        yield dealer
    finally:
        dealer.close()


@contextmanager
def raw_sockets() -> Iterator[Callable[..., "zmq.Socket[bytes]"]]:
    """Plain ZeroMQ sockets, for peers that misbehave."""
    context = zmq.Context()
    kept = []  # a socket is closed when nobody refers to it

    def make(kind: int, **options: int) -> "zmq.Socket[bytes]":
        made = context.socket(kind)
        made.linger = 0
        for name, value in options.items():
            setattr(made, name, value)
        kept.append(made)
        return made

    try:
        yield make
    finally:
        context.destroy(linger=0)


@contextmanager
def process(code: str, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    running = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with running:
        try:
            yield running
        finally:
            running.kill()


async def come_true(condition: Callable[[], bool]) -> None:
    """Return once `condition` holds; for what no callback tells."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.001)


def port_of(router: Router) -> int:
    return int(router.address.rpartition(":")[2])


# ------------------------------------------------------------------ messages


@on_loop
async def test_messages_go_both_ways_in_order() -> None:
    above, below = End(), End()
    with opened(above) as router, dealing(below, router.address) as dealer:
        for number in range(1000):
            dealer.send([b"up", b"%d" % number])
        await above.heard.until(1000)
        assert [frames for _, frames in above.heard] == [[b"up", b"%d" % n] for n in range(1000)]
        (peer,) = {peer for peer, _ in above.heard}
        for number in range(32):
            assert router.send(peer, [b"down", b"%d" % number]) is Delivery.SENT
        await below.heard.until(32)
        assert list(below.heard) == [([b"down", b"%d" % n],) for n in range(32)]
        assert len(below.connects) == 1
        assert below.losses == above.losses == []


@pytest.mark.parametrize(
    "frames",
    [[b""], [b"", b"", b""], [b"x"] * 1000, [secrets.token_bytes(16 << 20), b"x", bytes(16 << 20)]],
    ids=["one empty", "three empty", "1000", "16 MiB"],
)
@on_loop
async def test_frames_arrive_as_they_were_sent(frames: list[bytes]) -> None:
    above, below = End(), End()
    with opened(above) as router, dealing(below, router.address) as dealer:
        dealer.send(frames)
        await above.heard.until(1)
        peer, up = above.heard[0]
        assert up == frames
        assert router.send(peer, up) is Delivery.SENT
        await below.heard.until(1)
        assert below.heard[0] == (frames,)


@on_loop
async def test_what_is_said_before_there_is_a_coordinator_arrives_later() -> None:
    above, below = End(), End()
    with opened(End()) as router:
        address = router.address
    with dealing(below, address) as dealer:
        dealer.send([b"early"])
        with opened(above, address):
            await above.heard.until(1)
        assert above.heard[0][1] == [b"early"]


@on_loop
async def test_the_outbox_is_bounded() -> None:
    with opened(End()) as router:
        address = router.address
    with dealing(End(), address) as dealer:
        for _ in range(_MAX_OUTBOX):
            dealer.send([b"x"])
        with pytest.raises(LocalProtocolError):
            dealer.send([b"x"])


FLOOD = """
import sys, zmq
context = zmq.Context()
sockets = []
for _ in range(int(sys.argv[2])):
    s = context.socket(zmq.DEALER)
    s.connect("tcp://" + sys.argv[1])
    sockets.append(s)
for number in range(int(sys.argv[3])):
    for s in sockets:
        s.send(b"%d" % number)
sys.stdin.read()  # leaving now could reset the connection, and lose what is on its way
"""


@pytest.mark.parametrize(("peers", "each"), [(1, 100_000), (50, 400)])
@on_loop
async def test_a_flood_leaves_the_loop_to_others(peers: int, each: int) -> None:
    """Other callbacks run again after at most one batch of each way into the pump."""
    per_turn: list[int] = []
    heard = 0
    turn = 0
    done = asyncio.Event()
    loop = asyncio.get_running_loop()

    def next_turn() -> None:
        nonlocal turn
        per_turn.append(turn)
        turn = 0

    def on_message(peer: PeerId, key: PublicKey, frames: list[Any]) -> None:
        nonlocal heard, turn
        if turn == 0:
            loop.call_soon(next_turn)
        turn += 1
        heard += 1
        if heard == peers * each:
            done.set()

    router = Router(ANY, on_message, lambda: None, door=None)
    try:
        with process(FLOOD, router.address, str(peers), str(each)):
            await done.wait()
    finally:
        router.close()
    assert max(per_turn) <= 2 * _BATCH
    assert len(per_turn) >= peers * each // (2 * _BATCH)


@on_loop
async def test_a_backlog_is_taken_in_batches_however_often_it_is_announced() -> None:
    """Readiness that is told of again in every turn must not multiply the batches of a turn."""
    peers, each = 30, 60
    above = End()
    with opened(above) as router, raw_sockets() as raw:
        backlog = [raw(zmq.DEALER) for _ in range(peers)]
        for peer in backlog:
            peer.connect(f"tcp://{router.address}")
            for _ in range(each):
                peer.send(b"x")
        most = 0
        while len(above.heard) < peers * each:
            select.select([router._pump._fd], [], [], 0 if router._pump._again else None)
            before = len(above.heard)
            router._pump._run()  # as the loop does when the descriptor is readable
            await asyncio.sleep(0)
            most = max(most, len(above.heard) - before)
        assert _BATCH <= most <= 3 * _BATCH


@on_loop
async def test_a_callback_that_raises_loses_one_message_only() -> None:
    above = End()
    complaints = Inbox()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.put(context))
    with opened(above) as router, raw_sockets() as raw:
        put = above.heard.put

        def raise_once(*item: Any) -> None:
            above.heard.put = put  # type: ignore[method-assign]
            raise ValueError("a bug")

        above.heard.put = raise_once  # type: ignore[method-assign]
        peer = raw(zmq.DEALER)
        peer.connect(f"tcp://{router.address}")
        for number in range(10):
            peer.send(b"%d" % number)
        await above.heard.until(9)
        assert [frames for _, frames in above.heard] == [[b"%d" % n] for n in range(1, 10)]
        assert len(complaints) == 1


# ------------------------------------------------------------------ edges that pass unseen


@asynccontextmanager
async def stuck_peer(router: Router, above: End, raw: Any) -> AsyncIterator[PeerId]:
    """A peer that says hello and never reads, with all buffers on the way to it full."""
    peer = raw(zmq.DEALER, rcvhwm=1)
    peer.connect(f"tcp://{router.address}")
    peer.send(b"hello")
    await above.heard.until(len(above.heard) + 1)
    name = above.heard[-1][0]
    refusals = 0
    while refusals < 3:  # the kernel's buffers take what was refused a moment ago
        while router.send(name, [bytes(1 << 20)]) is Delivery.SENT:
            refusals = 0
        refusals += 1
        await asyncio.to_thread(select.select, [], [], [], 0.02)
    yield name


def swallow_edge(fd: int, send: Callable[[], object]) -> None:
    """Wait until `fd` is readable, behind the loop's back, and send until it is no more."""
    select.select([fd], [], [])
    while select.select([fd], [], [], 0)[0]:
        send()


@pytest.mark.parametrize("refusal", [Delivery.STUCK, Delivery.GONE])
@on_loop
async def test_a_refused_send_does_not_swallow_what_arrives(refusal: Delivery) -> None:
    above = End()
    with opened(above) as router, raw_sockets() as raw:
        other = raw(zmq.DEALER)
        other.connect(f"tcp://{router.address}")
        other.send(b"hello")
        await above.heard.until(1)
        async with stuck_peer(router, above, raw) as stuck:
            peer = stuck if refusal is Delivery.STUCK else PeerId(b"nobody")
            count = len(above.heard)
            deliveries: list[Delivery] = []
            for number in range(1, 6):
                other.send(b"%d" % number)
                swallow_edge(
                    router._pump._fd, lambda: deliveries.append(router._try_send(peer, [b"x"]))
                )
                assert set(deliveries) == {refusal}
                await above.heard.until(count + number)
                assert above.heard[-1][1] == [b"%d" % number]


@on_loop
async def test_a_waiting_send_does_not_swallow_what_arrives() -> None:
    below = End()
    with raw_sockets() as raw:
        router = raw(zmq.ROUTER, rcvhwm=1)
        port = router.bind_to_random_port("tcp://127.0.0.1")
        with dealing(below, f"127.0.0.1:{port}") as dealer:
            dealer.send([b"hello"])
            await come_true(lambda: bool(router.poll(0)))
            peer = router.recv_multipart()[0]
            while len(dealer._outbox) < 100:
                dealer.send([bytes(1 << 20)])
                await asyncio.sleep(0)
            for number in range(1, 6):
                router.send_multipart([peer, b"%d" % number])
                swallow_edge(dealer._pump._fd, lambda: dealer.send([b"x"]))
                await below.heard.until(number)
                assert below.heard[-1] == ([b"%d" % number],)


@on_loop
async def test_receiving_does_not_swallow_that_there_is_room_to_send() -> None:
    """The other end makes room at the very moment between trying to send and receiving."""
    total = 400
    connects = Inbox()
    numbers: list[bytes] = []
    with raw_sockets() as raw:
        router = raw(zmq.ROUTER, rcvhwm=1)
        port = router.bind_to_random_port("tcp://127.0.0.1")

        def on_message(frames: list[Any]) -> None:
            while len(numbers) < total - len(dealer._outbox):  # all that is on its way
                numbers.append(router.recv_multipart()[1])
            select.select([dealer._pump._fd], [], [])  # the news that there is room is here

        dealer = Dealer(
            f"127.0.0.1:{port}",
            on_message,
            connects.put,
            lambda: None,
            login=None,
            on_rejected=lambda _: None,
        )
        try:
            await connects.until(1)
            dealer.send([b"hello"])
            await come_true(lambda: bool(router.poll(0)))
            peer = router.recv_multipart()[0]
            for number in range(total):
                dealer.send([b"%d" % number, bytes(1 << 17)])
            assert dealer._outbox
            router.send_multipart([peer, b"read"])
            await come_true(lambda: bool(numbers))
            while len(numbers) < total:
                await come_true(lambda: bool(router.poll(0)))
                numbers.append(router.recv_multipart()[1])
            assert numbers == [b"%d" % number for number in range(total)]
        finally:
            dealer.close()


# ------------------------------------------------------------------ lost peers

PEER = """
import sys, zmq
s = zmq.Context().socket(zmq.DEALER)
s.connect("tcp://" + sys.argv[1])
s.send(b"hello")
sys.stdin.read()
"""
HOST = """
import sys, zmq
s = zmq.Context().socket(zmq.ROUTER)
print(s.bind_to_random_port("tcp://127.0.0.1"), flush=True)
peer = s.recv_multipart()[0]
for word in (b"one", b"two", b"last"):
    s.send_multipart([peer, word])
sys.stdin.read()
"""


async def send_until(router: Router, peer: PeerId, wanted: Delivery) -> None:
    """Send to `peer` until the answer is `wanted`."""
    await come_true(lambda: router.send(peer, [b"x"]) is wanted)


@on_loop
async def test_a_killed_peer_is_noticed_and_gone() -> None:
    above, below = End(), End()
    with (
        opened(above) as router,
        dealing(below, router.address) as dealer,
        process(PEER, router.address) as killed,
    ):
        await above.heard.until(1)
        peer = above.heard[0][0]
        assert router.send(peer, [b"x"]) is Delivery.SENT
        assert above.losses == []
        killed.kill()
        await above.losses.until(1)
        await send_until(router, peer, Delivery.GONE)
        assert router.send(peer, [b"x"]) is Delivery.GONE
        dealer.send([b"still here"])
        await above.heard.until(2)
        assert router.send(above.heard[1][0], [b"x"]) is Delivery.SENT


@on_loop
async def test_a_killed_coordinator_is_noticed() -> None:
    below = End()
    with process(HOST) as killed:
        assert killed.stdout
        port = killed.stdout.readline().strip()
        with dealing(below, f"127.0.0.1:{port}") as dealer:
            dealer.send([b"hello"])
            await below.heard.until(3)
            assert below.losses == []
            killed.kill()
            await below.losses.until(1)
            assert [frames for (frames,) in below.heard] == [[b"one"], [b"two"], [b"last"]]


@on_loop
async def test_messages_come_before_the_loss_of_their_connection() -> None:
    """Even where the loop learns of both at once, and of the loss first."""
    story = Inbox()
    with raw_sockets() as raw:
        router = raw(zmq.ROUTER)
        port = router.bind_to_random_port("tcp://127.0.0.1")
        dealer = Dealer(
            f"127.0.0.1:{port}",
            lambda frames: story.put(bytes(frames[0])),
            lambda: story.put("connected"),
            lambda: story.put("lost"),
            login=None,
            on_rejected=lambda _: None,
        )
        dealer.send([b"hello"])
        await story.until(1)
        await come_true(lambda: not dealer._outbox)
        peer = router.recv_multipart()[0]
        router.send_multipart([peer, b"last"])
        select.select([dealer._pump._fd], [], [])
        dealer._watch(zmq.EVENT_DISCONNECTED, 0)
        assert [*story] == [("connected",), (b"last",), ("lost",)]
        dealer.close()


@on_loop
async def test_a_session_is_over_when_its_connection_is() -> None:
    above, below = End(), End()
    first = above.router()
    with dealing(below, first.address) as dealer:
        dealer.send([b"hello"])
        await above.heard.until(1)
        events = Inbox()
        watch = dealer._monitor._on_event
        dealer._monitor._on_event = lambda event, value: (watch(event, value), events.put(event))[1]  # type: ignore[func-returns-value]
        first.close()
        await below.losses.until(1)
        dealer.send([b"of the old session"])
        again = End()
        with opened(again, first.address) as router:
            while (zmq.EVENT_HANDSHAKE_SUCCEEDED,) not in events:  # ZeroMQ connects again by itself
                await events.until(len(events) + 1)
            await serves(router, again)
            assert len(again.heard) == 1
            assert len(below.connects) == len(below.losses) == 1


@on_loop
async def test_a_peer_that_comes_back_has_another_identity() -> None:
    above = End()
    with opened(above) as router:
        names = set()
        for number in range(1, 6):
            with dealing(End(), router.address) as dealer:
                dealer.send([b"hello"])
                await above.heard.until(number)
            names.add(above.heard[-1][0])
        assert len(names) == 5


@on_loop
async def test_a_living_peer_cannot_be_replaced() -> None:
    above, below = End(), End()
    with opened(above) as router, dealing(below, router.address) as dealer, raw_sockets() as raw:
        dealer.send([b"hello"])
        await above.heard.until(1)
        victim = above.heard[0][0]
        assert victim[:1] == b"\0"  # ZeroMQ lets no peer choose such a name
        forged = zmtp(router, identity=victim)
        forged.sendall(b"\0\x05forge")
        another = raw(zmq.DEALER)
        another.connect(f"tcp://{router.address}")
        another.send(b"later")
        await above.heard.until(2)
        assert above.heard[1][1] == [b"later"]
        assert router.send(victim, [b"yours"]) is Delivery.SENT
        await below.heard.until(1)
        assert below.heard[0] == ([b"yours"],)
        forged.close()


@on_loop
async def test_nobody_can_guess_the_identity_of_the_next_peer() -> None:
    """A stranger that chose it for itself would abort the process when that peer connects."""
    first_peers = set()
    for _ in range(2):
        ctypes.CDLL(None).srand(1)  # as in a new process
        end = End()
        with opened(end) as router, dealing(End(), router.address) as dealer:
            dealer.send([b"hello"])
            await end.heard.until(1)
            first_peers.add(end.heard[0][0])
    assert len(first_peers) == 2


@on_loop
async def test_a_peer_that_never_reads_is_stuck_and_others_are_served() -> None:
    above, below = End(), End()
    with opened(above) as router, dealing(below, router.address) as dealer, raw_sockets() as raw:
        dealer.send([b"hello"])
        await above.heard.until(1)
        other = above.heard[0][0]
        async with stuck_peer(router, above, raw) as stuck:
            for number in range(1, 200):
                assert router.send(stuck, [b"x"]) is Delivery.STUCK
                assert router.send(other, [b"x"]) is Delivery.SENT
                dealer.send([b"y"])
                await below.heard.until(number)
                await above.heard.until(number + 2)


@on_loop
async def test_a_burst_that_zeromq_does_not_take_at_once_arrives_in_order() -> None:
    above, below = End(), End()
    with opened(above) as router, dealing(below, router.address) as dealer:
        dealer.send([b"hello"])
        await above.heard.until(1)
        peer = above.heard[0][0]
        for number in range(5000):
            assert router.send(peer, [b"%d" % number]) is Delivery.SENT
        await below.heard.until(5000)
        assert [frames for (frames,) in below.heard] == [[b"%d" % n] for n in range(5000)]
        assert not router._backlogs


@on_loop
async def test_what_waits_for_a_peer_that_is_gone_is_dropped() -> None:
    above = End()
    with opened(above) as router:
        with raw_sockets() as raw:
            async with stuck_peer(router, above, raw):
                assert router._backlogs
        await come_true(lambda: not router._backlogs)


@on_loop
async def test_nobody_is_gone() -> None:
    with opened(End()) as router:
        assert router.send(PeerId(b"\0\0\0\0\0"), [b"x"]) is Delivery.GONE


# ------------------------------------------------------------------ strangers


def zmtp(router: Router, identity: bytes = b"") -> socket.socket:
    """A hand-made connection after the handshake that a DEALER makes."""
    raw = socket.create_connection(("127.0.0.1", port_of(router)))
    raw.sendall(b"\xff" + bytes(8) + b"\x7f")
    raw.recv(10, socket.MSG_WAITALL)
    raw.sendall(b"\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32))
    raw.recv(54, socket.MSG_WAITALL)
    ready = b"\x05READY"
    for name, value in ((b"Socket-Type", b"DEALER"), (b"Identity", identity)):
        ready += bytes([len(name)]) + name + struct.pack(">I", len(value)) + value
    raw.sendall(b"\x04" + bytes([len(ready)]) + ready)
    raw.recv(raw.recv(2, socket.MSG_WAITALL)[1], socket.MSG_WAITALL)  # the router's READY
    return raw


async def ended(raw: socket.socket) -> None:
    """Return once the other end has closed the connection."""

    def read() -> None:
        with contextlib.suppress(ConnectionError):
            while raw.recv(65536):
                pass

    await asyncio.to_thread(read)


async def serves(router: Router, above: End) -> None:
    """Check that a new peer is heard and answered."""
    below = End()
    with dealing(below, router.address) as dealer:
        word = secrets.token_bytes(8)
        dealer.send([word])
        while not (peers := [peer for peer, frames in list(above.heard) if frames == [word]]):
            await above.heard.until(len(above.heard) + 1)
        assert router.send(peers[0], [word]) is Delivery.SENT
        await below.heard.until(1)
        assert below.heard[0] == ([word],)


STRANGERS = {
    "HTTP": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "TLS": bytes.fromhex("16030100c8010000c40303") + bytes(range(189)),
    "64 KB": b"\x7f" + secrets.token_bytes(65535),
    "64 KB as ZMTP": b"\xff" + bytes(8) + b"\x7f" + secrets.token_bytes(65535),
    "one byte": b"\xff",
    "SSH": b"SSH-2.0-OpenSSH_9.6\r\n",
}


@pytest.mark.parametrize("noise", STRANGERS.values(), ids=STRANGERS)
@on_loop
async def test_strangers_are_served_nothing_and_disturb_nobody(noise: bytes) -> None:
    above = End()
    with opened(above) as router, dealing(End(), router.address) as dealer:
        dealer.send([b"hello"])
        await above.heard.until(1)
        known = above.heard[0][0]
        strangers = [socket.create_connection(("127.0.0.1", port_of(router))) for _ in range(5)]
        for stranger in strangers[:-1]:
            with contextlib.suppress(ConnectionError):  # it was closed before all was said
                stranger.sendall(noise)
        strangers[-1].sendall(noise[:1])
        await serves(router, above)
        assert router.send(known, [b"x"]) is Delivery.SENT
        for stranger in strangers:
            stranger.close()
        await serves(router, above)
        for peer, frames in above.heard:
            if peer != known and len(frames[0]) != 8:
                with pytest.raises(RemoteProtocolError):
                    codec.to_coordinator.decode(frames)


@on_loop
async def test_silent_connections_are_closed_and_serving_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sockets, "_HANDSHAKE_MS", 500)
    above = End()
    with opened(above) as router:
        silent = [socket.create_connection(("127.0.0.1", port_of(router))) for _ in range(50)]
        await serves(router, above)
        served = len(above.losses)
        for one in silent:
            await ended(one)
            one.close()
        await serves(router, above)
        await above.losses.until(served + 1)


@on_loop
async def test_one_notice_tells_of_many_lost_connections() -> None:
    above = End()
    with opened(above) as router:
        for notices in (1, 2):
            for _ in range(50):
                router._watch(zmq.EVENT_DISCONNECTED, 0)
            await above.losses.until(notices)
        assert len(above.losses) == 2


@on_loop
async def test_a_frame_that_claims_too_much_ends_its_connection() -> None:
    above = End()
    with opened(above) as router:
        for claimed in (MAX_FRAME_BYTES + 1, 4 << 30, 1 << 50, (1 << 63) + 1):
            raw = zmtp(router)
            raw.sendall(b"\0\x02hi")  # a legal message first
            count = len(above.heard)
            await above.heard.until(count + 1)
            assert above.heard[-1][1] == [b"hi"]
            raw.sendall(b"\2" + struct.pack(">Q", claimed))
            await ended(raw)
            raw.close()
        await serves(router, above)


# ------------------------------------------------------------------ addresses


@on_loop
async def test_a_taken_port_is_refused_with_what_and_why_and_what_to_do() -> None:
    with opened(End()) as router:
        with pytest.raises(AddressInUse) as caught:
            End().router(router.address)
        text = str(caught.value)
        assert text.startswith(f"Cannot listen on {router.address}: Address already in use. ")
        assert "Another program may be listening there" in text
        assert "--bind" in text
        assert "tcp://" not in text


@on_loop
async def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(AddressInUse, match="not one of this machine"):
        End().router("203.0.113.1:5555")


@on_loop
async def test_a_chosen_port_is_listened_on_and_free_again_after() -> None:
    with opened(End()) as router:
        address = router.address
    above = End()
    with opened(above, address) as router:
        assert router.address == address
        await serves(router, above)


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as bound:
            bound.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")
@on_loop
async def test_ipv6() -> None:
    above = End()
    with opened(above, "[::1]:0") as router:
        assert router.address.startswith("[::1]:")
        await serves(router, above)


@on_loop
async def test_something_else_that_listens_is_told_from_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    below = End()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with dealing(below, f"127.0.0.1:{port}") as dealer:
            dealer.send([b"hello"])
            asker, _ = await asyncio.to_thread(server.accept)
            with asker:
                asker.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                said = b""
                while not said.endswith(b"hello"):  # ZeroMQ takes it for a peer of long ago
                    said += await asyncio.to_thread(asker.recv, 100)
            await come_true(lambda: dealer.reached)
            assert below.connects == below.losses == below.heard == []
    retries = Inbox()

    class Telling(Monitor):
        """Tells the test of refused connections too."""

        def __init__(self, socket: Any, events: int, on_event: Callable[[int, int], None]) -> None:
            def sort(event: int, value: int) -> None:
                (retries.put if event == zmq.EVENT_CONNECT_RETRIED else on_event)(event, value)

            super().__init__(socket, events | zmq.EVENT_CONNECT_RETRIED, sort)

    monkeypatch.setattr(dealer_module, "Monitor", Telling)
    nothing = End()
    with dealing(nothing, f"127.0.0.1:{port}") as dealer:
        await retries.until(2)
        assert dealer.reached is False
        assert nothing.connects == nothing.losses == []


# ------------------------------------------------------------------ several DEALERs


@on_loop
async def test_dealers_share_a_context_that_is_closed_with_the_last() -> None:
    above, below = End(), End()
    with opened(above) as router:
        first, second = below.dealer(router.address), below.dealer(router.address)
        await below.connects.until(2)
        shared = first._socket.context
        assert second._socket.context is shared
        first.send([b"first"])
        first.close()
        assert not shared.closed
        second.send([b"second"])
        second.close()
        assert shared.closed
        await above.heard.until(2)
        assert {frames[0] for _, frames in above.heard} == {b"first", b"second"}
        third = End().dealer(router.address)
        assert third._socket.context is not shared
        third.close()


@on_loop
async def test_one_of_several_closes_without_waiting_for_what_it_said() -> None:
    below = End()
    with raw_sockets() as raw, dealing(End(), "127.0.0.1:1"):
        deaf = raw(zmq.ROUTER, rcvhwm=1)
        port = deaf.bind_to_random_port("tcp://127.0.0.1")
        dealers = [below.dealer(f"127.0.0.1:{port}") for _ in range(10)]
        await below.connects.until(len(dealers))
        for dealer in dealers:
            while not dealer._outbox:
                dealer.send([bytes(1 << 20)])
        started = asyncio.get_running_loop().time()
        for dealer in dealers:
            dealer.close()
        assert asyncio.get_running_loop().time() - started < 0.3 * len(dealers) / 2


@on_loop
async def test_many_dealers() -> None:
    """More than a context has room for by default."""
    resource = pytest.importorskip("resource")
    count = min(400, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8)
    above = End()
    with opened(above) as router, contextlib.ExitStack() as stack:
        dealers = [stack.enter_context(dealing(End(), router.address)) for _ in range(count)]
        for dealer in dealers:
            dealer.send([b"hello"])
        await above.heard.until(count)
        assert len({peer for peer, _ in above.heard}) == count


FORK = """
import asyncio, os, sys
from distributed_llm.common.transport import Dealer, Router

def dial(address, on_message, on_connect):
    nothing = lambda *_: None
    return Dealer(address, on_message, on_connect, nothing, login=None, on_rejected=nothing)

async def speak(address, word):
    over = asyncio.get_running_loop().create_future()
    dealer = dial(address, over.set_result, lambda: dealer.send([word]))
    await over
    dealer.close()

async def main():
    heard = []
    router = Router("127.0.0.1:0", lambda peer, key, frames: (
        heard.append(bytes(frames[0])), router.send(peer, [b"heard"])), lambda: None, door=None)
    dealer = dial(router.address, lambda frames: None, lambda: None)
    child = os.fork()
    if not child:
        asyncio._set_running_loop(None)
        try:
            asyncio.run(speak(router.address, b"child"))
        finally:
            os._exit(0)
    await speak(router.address, b"parent")
    while len(heard) < 2:
        await asyncio.sleep(0.001)
    await asyncio.to_thread(os.waitpid, child, 0)
    dealer.close()
    router.close()
    print(*sorted(heard))

asyncio.run(main())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_child_has_its_own_context() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout == "b'child' b'parent'\n"


@on_loop
async def test_own_address_in_the_connection_is_known() -> None:
    below = End()
    with opened(End()) as router, dealing(below, router.address) as dealer:
        assert dealer.local_host == ""
        await below.connects.until(1)
        assert dealer.local_host == "127.0.0.1"
        gone = os.dup(0)
        os.close(gone)
        assert dealer_module._local_host(gone) == ""


@on_loop
async def test_own_address_is_asked_for_without_touching_the_connection() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as one,
    ):
        other, _ = server.accept()
        with other:
            assert dealer_module._local_host(one.fileno()) == "127.0.0.1"
            one.sendall(b"still open")
            assert other.recv(10) == b"still open"


@pytest.mark.parametrize("address", ["127.0.0.1:0", "127.0.0.1:x", "no port"])
@on_loop
async def test_what_is_no_address_is_refused_and_leaks_nothing(address: str) -> None:
    with pytest.raises(ConnectionFailed, match="is not an address to connect to"):
        End().dealer(address)
    assert dealer_module._dealers._context is None


@on_loop
async def test_outbox_may_be_smaller() -> None:
    with opened(End()) as router:
        address = router.address
    dealer = Dealer(
        address,
        lambda _: None,
        lambda: None,
        lambda: None,
        login=None,
        on_rejected=lambda _: None,
        max_outbox=3,
    )
    try:
        for _ in range(3):
            dealer.send([b"x"])
        with pytest.raises(LocalProtocolError, match="3 messages"):
            dealer.send([b"x"])
    finally:
        dealer.close()


# ------------------------------------------------------------------ options and leaks

OPTIONS = {
    "maxmsgsize": 256 << 20,
    "sndhwm": 64,
    "rcvhwm": 64,
    "handshake_ivl": 3000,
    "heartbeat_ivl": 1000,
    "heartbeat_timeout": 3000,
    "reconnect_ivl": 100,
    "reconnect_ivl_max": 2000,
    "backlog": 256,
    "linger": 300,
}


@on_loop
async def test_the_options_are_those_of_the_security_reference() -> None:
    with opened(End()) as router, dealing(End(), router.address) as dealer:
        for end in (router._socket, dealer._socket):
            assert {name: getattr(end, name) for name in OPTIONS} == OPTIONS
            assert end.routing_id == b""
        assert dealer._socket.immediate == 1
        # ROUTER_MANDATORY and ROUTER_HANDOVER cannot be read back; their effect is tested above


@on_loop
async def test_opening_and_closing_leaks_nothing() -> None:
    me = psutil.Process()

    async def cycle() -> None:
        above = End()
        with opened(above) as router:
            await serves(router, above)
            with pytest.raises(AddressInUse):
                End().router(router.address)

    await cycle()
    await asyncio.to_thread(lambda: None)
    files, threads = me.num_fds() if hasattr(me, "num_fds") else 0, me.num_threads()
    for _ in range(50):
        await cycle()
    assert me.num_threads() == threads
    assert (me.num_fds() if hasattr(me, "num_fds") else 0) == files


@on_loop
async def test_closing_twice_or_from_a_callback_is_harmless() -> None:
    above = End()
    with opened(above) as router:
        heard: list[bytes] = []
        closed = asyncio.Event()

        def on_message(frames: list[Any]) -> None:
            heard.append(bytes(frames[0]))
            dealer.close()
            closed.set()

        dealer = Dealer(
            router.address,
            on_message,
            lambda: None,
            lambda: None,
            login=None,
            on_rejected=lambda _: None,
        )
        dealer.send([b"hello"])
        await above.heard.until(1)
        for _ in range(3):
            router.send(above.heard[0][0], [b"x"])
        await closed.wait()
        assert heard == [b"x"]


@on_loop
async def test_what_has_arrived_is_delivered_at_once_when_asked_for() -> None:
    """Without the event loop: ZeroMQ's own threads receive."""
    here, there = End(), End()
    with opened(here) as router, dealing(there, router.address) as dealer:
        await there.connects.until(1)
        for number in range(48):
            dealer.send([b"%d" % number])
        while len(here.heard) < 48:
            router.deliver_waiting()
        peer = here.heard[0][0]
        assert here.heard == [(peer, [b"%d" % number]) for number in range(48)]
        for number in range(48):
            router.send(peer, [b"%d" % number])
        while len(there.heard) < 48:
            dealer.deliver_waiting()
        router.send(peer, [b"last"])
        await there.heard.until(49)  # no edge was lost
