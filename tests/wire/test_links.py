"""Links between workers over real sockets: hellos, loss, silence, strangers, leaks."""

import asyncio
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import psutil
import pytest
import zmq

from distributed_llm.common import addresses as addresses_module
from distributed_llm.common import codec
from distributed_llm.common.errors import AddressInUse, LocalProtocolError
from distributed_llm.common.keys import NOBODY, PublicKey
from distributed_llm.common.messages import (
    MAX_SLICES,
    KVTaken,
    PeerHello,
    PeerProbed,
    PeerWelcome,
    ReadChunk,
    SequenceSlice,
    Task,
)
from distributed_llm.common.sampling_params import Sampling
from distributed_llm.common.tensors import TensorSpec
from distributed_llm.common.transport import sockets
from distributed_llm.common.types import Epoch, LayerRange, PeerId, SequenceId, StepNumber
from distributed_llm.worker import work
from distributed_llm.worker.links import Links, bind_for, reachable_at
from distributed_llm.worker.session.events import Event
from distributed_llm.worker.session.link_events import (
    LinkDown,
    LinkId,
    LinkReached,
    LinkReceived,
    LinkUp,
    PeerGarbage,
    PeerReceived,
)
from tests.wire.test_transport import come_true, on_loop, process, raw_sockets

pytestmark = pytest.mark.timeout(60)
ANY = "127.0.0.1:0"
LINK = LinkId(Epoch(3))
HELLO = PeerHello(epoch=Epoch(3), key="proof")


class Told(list[Event]):
    """What the edge told, and waiting for it."""

    def events_of(self, kind: type[Event]) -> list[Event]:
        return [event for event in self if isinstance(event, kind)]

    async def until(self, kind: type[Event], count: int = 1) -> Event:
        """Return the last of `count` events of this kind once they are there."""
        await come_true(lambda: len(self.events_of(kind)) >= count)
        return self.events_of(kind)[count - 1]


def unread(peer: PeerId, key: PublicKey, request: ReadChunk) -> None:
    raise AssertionError("nobody asks for weights here")


@contextmanager
def opened(bind: str = ANY) -> Iterator[tuple[Links, Told]]:
    told = Told()
    made = Links(bind, told.append, keys=None, admits=lambda key: False, on_read=unread)
    try:
        yield made, told
    finally:
        made.close()


@asynccontextmanager
async def linked(links: Links, told: Told, after: Links, after_told: Told) -> AsyncIterator[PeerId]:
    """Bring a link up; yield the name under which the next worker knows the one before."""
    links.open(LINK, (after.address,), NOBODY)
    reached = await told.until(LinkReached)
    assert reached == LinkReached(LINK, after.address)
    links.greet(LINK, HELLO, (after.address,))
    heard = await after_told.until(PeerReceived)
    assert isinstance(heard, PeerReceived)
    assert heard.message == HELLO
    after.answer(heard.peer, PeerWelcome(epoch=Epoch(3)))
    up = await told.until(LinkUp)
    assert isinstance(up, LinkUp)
    assert up.link == LINK
    assert 0 < up.rtt_s < 10
    yield heard.peer


def task(step: int = 1, size: int = 4) -> tuple[Task, tuple[bytes, ...]]:
    sequences = (SequenceSlice(sequence_id=SequenceId(1), start=5, num_tokens=1),)
    specs = (TensorSpec("int32", (1,)), TensorSpec("uint8", (size,)))
    made = Task(
        epoch=Epoch(3),
        step=StepNumber(step),
        oldest=StepNumber(0),
        sequences=sequences,
        tensors=specs,
        route=(True,),
    )
    return made, (bytes(4), bytes([step % 256]) * size)


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


# ------------------------------------------------------------------ what is right


@on_loop
async def test_tasks_go_to_the_next_worker_in_order() -> None:
    with opened() as (links, told), opened() as (after, after_told):
        async with linked(links, told, after, after_told) as peer:
            for step in range(20):
                links.send(LINK, *task(step, size=1 << 16))
            await after_told.until(PeerReceived, 21)
            for step, event in enumerate(after_told.events_of(PeerReceived)[1:]):
                assert isinstance(event, PeerReceived)
                sent, frames = task(step, size=1 << 16)
                assert (event.peer, event.message) == (peer, sent)
                assert [bytes(frame) for frame in event.frames] == list(frames)
            assert told.events_of(LinkDown) == []


@on_loop
async def test_hello_that_is_not_welcome_brings_no_link_up() -> None:
    with opened() as (links, told), opened() as (after, after_told):
        links.open(LINK, (after.address,), NOBODY)
        await told.until(LinkReached)
        for _ in range(3):
            links.greet(LINK, HELLO, (after.address,))
        heard = await after_told.until(PeerReceived, 3)
        links.send(LINK, *task())  # to nobody
        assert isinstance(heard, PeerReceived)
        after.answer(heard.peer, PeerWelcome(epoch=Epoch(2)))
        after.answer(heard.peer, PeerWelcome(epoch=Epoch(4)))
        links.greet(LINK, HELLO, (after.address,))
        await after_told.until(PeerReceived, 4)
        assert told.events_of(LinkUp) == []
        after.answer(heard.peer, PeerWelcome(epoch=Epoch(3)))
        await told.until(LinkUp)
        after.answer(heard.peer, PeerWelcome(epoch=Epoch(3)))  # to one of the other hellos
        links.send(LINK, *task(7))
        last = await after_told.until(PeerReceived, 5)
        assert isinstance(last, PeerReceived)
        assert last.message == task(7)[0]
        assert len(told.events_of(LinkUp)) == 1


@on_loop
async def test_first_welcome_wins_and_the_other_connections_are_closed() -> None:
    with (
        opened() as (links, told),
        opened() as (one, one_told),
        opened() as (two, two_told),
    ):
        links.open(LINK, (one.address, two.address, one.address), NOBODY)
        await told.until(LinkReached, 2)
        links.greet(LINK, HELLO, (one.address, two.address))
        first, second = await two_told.until(PeerReceived), await one_told.until(PeerReceived)
        assert isinstance(first, PeerReceived)
        assert isinstance(second, PeerReceived)
        two.answer(first.peer, PeerWelcome(epoch=Epoch(3)))
        await told.until(LinkUp)
        one.answer(second.peer, PeerWelcome(epoch=Epoch(3)))
        links.send(LINK, *task(7))
        handed = await two_told.until(PeerReceived, 2)
        assert isinstance(handed, PeerReceived)
        assert handed.message == task(7)[0]
        assert list(links._links[LINK]._dials) == [two.address]
        assert len(one_told) == 1
        assert len(told.events_of(LinkUp)) == 1


@on_loop
async def test_new_link_replaces_the_old_one_of_its_name() -> None:
    with (
        opened() as (links, told),
        opened() as (after, after_told),
        opened() as (other, other_told),
    ):
        async with linked(links, told, after, after_told):
            links.open(LINK, (other.address,), NOBODY)
            links.send(LINK, *task())
            reached = await told.until(LinkReached, 2)
            assert reached == LinkReached(LINK, other.address)
            links.close_link(LINK)
            assert told.events_of(LinkDown) == []  # it was no loss
            assert len(after_told) == 1
            assert other_told == []
            links.send(LINK, *task())


@on_loop
async def test_links_of_two_epochs_and_of_transfers_are_used_side_by_side() -> None:
    """To the same worker too; closing one leaves the others."""
    names = (
        LINK,
        LinkId(Epoch(4)),
        LinkId(Epoch(4), LayerRange(0, 2)),
        LinkId(Epoch(4), LayerRange(2, 3)),
    )
    with opened() as (links, told), opened() as (after, after_told):
        async with linked(links, told, after, after_told):
            for number, name in enumerate(names[1:], 2):
                links.open(name, (after.address,), NOBODY)
                assert await told.until(LinkReached, number) == LinkReached(name, after.address)
                hello = PeerHello(epoch=name.epoch, key="proof")
                links.greet(name, hello, (after.address,))
                heard = await after_told.until(PeerReceived, number)
                assert isinstance(heard, PeerReceived)
                after.answer(heard.peer, PeerWelcome(epoch=name.epoch))
                up = await told.until(LinkUp, number)
                assert isinstance(up, LinkUp)
                assert up.link == name
            links.close_link(LinkId(Epoch(4)))
            after_told.clear()
            for step, name in enumerate(names):
                links.send(name, *task(step))
            await after_told.until(PeerReceived, 3)
            heard_steps = [e.message.step for e in after_told if isinstance(e.message, Task)]  # type: ignore[union-attr]
            assert sorted(heard_steps) == [0, 2, 3]
            assert len({event.peer for event in after_told}) == 3  # type: ignore[union-attr]
            assert told.events_of(LinkDown) == []


@on_loop
async def test_answers_over_a_link_are_told() -> None:
    taken = KVTaken(epoch=Epoch(3), layers=LayerRange(0, 2), number=7)
    with opened() as (links, told), opened() as (after, after_told):
        links.open(LINK, (after.address,), NOBODY)
        await told.until(LinkReached)
        links.greet(LINK, HELLO, (after.address,))
        heard = await after_told.until(PeerReceived)
        assert isinstance(heard, PeerReceived)
        after.answer(heard.peer, taken)  # before the welcome: not of a link
        after.answer(heard.peer, PeerWelcome(epoch=Epoch(3)))
        await told.until(LinkUp)
        after.answer(heard.peer, PeerProbed(epoch=Epoch(4)))
        after.answer(heard.peer, PeerProbed(epoch=Epoch(3)))
        after.answer(heard.peer, taken)
        await told.until(LinkReceived, 2)
        assert told.events_of(LinkReceived) == [
            LinkReceived(LINK, PeerProbed(epoch=Epoch(3))),
            LinkReceived(LINK, taken),
        ]


# ------------------------------------------------------------------ loss


@on_loop
async def test_worker_that_closes_is_told_of_and_found_again() -> None:
    with opened() as (links, told):
        with opened() as (after, after_told):
            address = after.address
            async with linked(links, told, after, after_told):
                pass
        assert await told.until(LinkDown) == LinkDown(LINK)
        links.send(LINK, *task())  # to nobody: no error
        told.clear()
        links.open(LINK, (address,), NOBODY)
        with opened(address) as (again, again_told):
            async with linked(links, told, again, again_told):
                links.send(LINK, *task(7))
                await again_told.until(PeerReceived, 2)


CHILD = """
import asyncio, sys
from distributed_llm.common.messages import PeerHello, PeerWelcome
from distributed_llm.worker.session.link_events import PeerReceived
from distributed_llm.worker.links import Links

async def main():
    def on_event(event):
        if isinstance(event, PeerReceived) and isinstance(event.message, PeerHello):
            links.answer(event.peer, PeerWelcome(epoch=event.message.epoch))
    links = Links("127.0.0.1:0", on_event, keys=None, admits=lambda key: False, on_read=print)
    print(links.address, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@asynccontextmanager
async def linked_to_process(links: Links, told: Told) -> AsyncIterator["subprocess.Popen[str]"]:
    """A link to another process that welcomes whoever says hello."""
    with process(CHILD) as child:
        assert child.stdout
        address = (await asyncio.to_thread(child.stdout.readline)).strip()
        links.open(LINK, (address,), NOBODY)
        await told.until(LinkReached)
        links.greet(LINK, HELLO, (address,))
        await told.until(LinkUp)
        yield child


@on_loop
async def test_killed_worker_is_told_of() -> None:
    with opened() as (links, told):
        async with linked_to_process(links, told) as child:
            child.kill()
            assert await told.until(LinkDown) == LinkDown(LINK)


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs SIGSTOP")
@on_loop
async def test_frozen_worker_takes_a_bounded_number_of_tasks() -> None:
    """The link is down as soon as its outbox is full, and nothing blocks."""
    with opened() as (links, told):
        async with linked_to_process(links, told) as child:
            os.kill(child.pid, signal.SIGSTOP)
            sent = 0
            while links._links[LINK]._up is not None:
                links.send(LINK, *task(sent, size=1 << 20))
                sent += 1
                await asyncio.sleep(0)
            assert told.events_of(LinkDown) == [LinkDown(LINK)]
            assert sent < 32 + 64 + 32  # what the outbox, ZeroMQ and the network hold
            os.kill(child.pid, signal.SIGCONT)


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs SIGSTOP")
@on_loop
async def test_frozen_worker_is_noticed_without_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "_HEARTBEAT_MS", 100)
    monkeypatch.setattr(sockets, "_HEARTBEAT_TIMEOUT_MS", 500)
    with opened() as (links, told):
        async with linked_to_process(links, told) as child:
            os.kill(child.pid, signal.SIGSTOP)
            assert await told.until(LinkDown) == LinkDown(LINK)
            os.kill(child.pid, signal.SIGCONT)


# ------------------------------------------------------------------ what is not there


@on_loop
async def test_addresses_where_nobody_is_do_no_harm() -> None:
    with opened() as (links, told), opened() as (after, after_told):
        nobody = (f"127.0.0.1:{free_port()}", "192.0.2.1:7", "[2001:db8::1]:7", "no.such.invalid:7")
        links.open(LINK, (*nobody, after.address), NOBODY)
        assert await told.until(LinkReached) == LinkReached(LINK, after.address)
        links.greet(LINK, HELLO, (*nobody, after.address))
        heard = await after_told.until(PeerReceived)
        assert isinstance(heard, PeerReceived)
        after.answer(heard.peer, PeerWelcome(epoch=Epoch(3)))
        await told.until(LinkUp)
        assert len(told) == 2


@pytest.mark.parametrize(
    "address",
    ["", "x", ":", "x:", "x:y", "x:99999", "tcp://x:1", "127.0.0.1:0", "ipc:///tmp/x:1", "*:5",
     "1.2.3.4;5.6.7.8:9", "[::1:5", "a b:5", "\0:5", "é:5", "inproc://a", "x" * 256, "999.9.9.9:1"],
)  # fmt: skip
@on_loop
async def test_what_is_no_address_is_passed_over(address: str) -> None:
    with opened() as (links, told), opened() as (after, _):
        links.open(LINK, (address, after.address), NOBODY)
        assert await told.until(LinkReached) == LinkReached(LINK, after.address)
        assert list(links._links[LINK]._dials) == [after.address]


@on_loop
async def test_black_hole_says_nothing_and_closes_at_once() -> None:
    """A port that accepts and never answers: no event, and no wait when it is given up."""
    with socket.create_server(("127.0.0.1", 0)) as server, opened() as (links, told):
        address = f"127.0.0.1:{server.getsockname()[1]}"
        links.open(LINK, (address,), NOBODY)
        asker, _ = await asyncio.to_thread(server.accept)
        with asker:
            links.greet(LINK, HELLO, (address,))
            links.send(LINK, *task())
            before = asyncio.get_running_loop().time()
            for _ in range(20):
                links.open(LINK, (address,), NOBODY)
            links.close_link(LINK)
            assert asyncio.get_running_loop().time() - before < 0.3 * 20 / 2
            assert told == []


# ------------------------------------------------------------------ strangers


@on_loop
async def test_noise_is_told_and_serving_goes_on() -> None:
    with opened() as (links, told), opened() as (after, after_told), raw_sockets() as raw:
        noisy = raw(zmq.DEALER)
        noisy.connect(f"tcp://{after.address}")
        noise = [[b"noise"], [b"", b""], [b"DLLM\2", b"\xc1"], [b"DLLM\1", b"\x80"], [b"x"] * 50]
        for frames in noise:
            noisy.send_multipart(frames)
        await after_told.until(PeerGarbage, len(noise))
        with socket.create_connection(("127.0.0.1", int(after.address.split(":")[1]))) as http:
            http.sendall(b"GET / HTTP/1.1\r\n\r\n")
        async with linked(links, told, after, after_told):
            links.send(LINK, *task(7))
            await after_told.until(PeerReceived, 2)


@on_loop
async def test_noise_in_answer_to_a_hello_is_told() -> None:
    with opened() as (links, told), raw_sockets() as raw:
        router = raw(zmq.ROUTER)
        address = f"127.0.0.1:{router.bind_to_random_port('tcp://127.0.0.1')}"
        links.open(LINK, (address,), NOBODY)
        await told.until(LinkReached)
        links.greet(LINK, HELLO, (address,))
        await come_true(lambda: bool(router.poll(0)))
        router.send_multipart([router.recv_multipart()[0], b"noise"])
        await told.until(PeerGarbage)
        assert told.events_of(LinkUp) == []


@on_loop
async def test_noise_over_a_link_that_is_up_is_told_with_the_link() -> None:
    """Whatever waits for an answer over it waits in vain."""
    with opened() as (links, told), raw_sockets() as raw:
        router = raw(zmq.ROUTER)
        address = f"127.0.0.1:{router.bind_to_random_port('tcp://127.0.0.1')}"
        links.open(LINK, (address,), NOBODY)
        await told.until(LinkReached)
        links.greet(LINK, HELLO, (address,))
        await come_true(lambda: bool(router.poll(0)))
        peer = router.recv_multipart()[0]
        router.send_multipart([peer, b"noise"])
        router.send_multipart([peer, *codec.encode(PeerWelcome(epoch=Epoch(3)))])
        router.send_multipart([peer, b"noise"])
        await told.until(PeerGarbage, 2)
        heard = [event for event in told if isinstance(event, PeerGarbage)]
        assert [event.link for event in heard] == [None, LINK]


@on_loop
async def test_answering_somebody_who_is_gone_does_nothing() -> None:
    with opened() as (links, _):
        links.answer(PeerId(b"nobody"), PeerWelcome(epoch=Epoch(3)))


@on_loop
async def test_header_that_grew_too_long_is_an_error_of_its_task_only() -> None:
    with opened() as (links, told), opened() as (after, after_told):
        async with linked(links, told, after, after_told):
            biased = Sampling(logit_bias=tuple((2**30 + i, 0.5) for i in range(300)))
            part = SequenceSlice(
                sequence_id=SequenceId(1), start=5, num_tokens=1, sample=True, sampling=biased
            )
            spec = TensorSpec("int32", (1,))
            long = Task(
                epoch=Epoch(3),
                step=StepNumber(1),
                oldest=StepNumber(0),
                sequences=(part,) * MAX_SLICES,
                tensors=(spec,),
            )
            with pytest.raises(LocalProtocolError):
                links.send(LINK, long, (bytes(4),))
            links.send(LINK, *task(7))
            await after_told.until(PeerReceived, 2)
            assert told.events_of(LinkDown) == []


# ------------------------------------------------------------------ addresses


@pytest.mark.parametrize(
    ("bind", "coordinator", "listens"),
    [
        ("0.0.0.0:7000", "both.lan:5555", "[::]:7000"),
        ("0.0.0.0:7000", "new.lan:5555", "[::]:7000"),
        ("127.0.0.1:7000", "both.lan:5555", "127.0.0.1:7000"),
        ("0.0.0.0:0", "127.0.0.1:5555", "127.0.0.1:0"),
        ("0.0.0.0:7000", "localhost:5555", "127.0.0.1:7000"),
        ("0.0.0.0:0", "[::1]:5555", "[::1]:0"),
        ("[::]:7000", "127.0.0.1:5555", "127.0.0.1:7000"),
        ("0.0.0.0:0", "10.0.0.1:5555", "0.0.0.0:0"),
        ("0.0.0.0:0", "boss.lan:5555", "0.0.0.0:0"),
        ("0.0.0.0:7000", "[2001:db8::1]:5555", "[::]:7000"),
        ("10.0.0.7:0", "[2001:db8::1]:5555", "10.0.0.7:0"),
        ("10.0.0.7:0", "127.0.0.1:5555", "10.0.0.7:0"),
        ("eth0:7000", "127.0.0.1:5555", "eth0:7000"),
    ],
)
def test_port_is_opened_to_other_machines_only_if_there_may_be_any(
    bind: str, coordinator: str, listens: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(addresses_module, "interface_hosts", lambda: HOSTS)
    stands_for = STANDS_FOR.get(coordinator, (coordinator,))
    assert bind_for(bind, coordinator, stands_for, alone=True) == listens
    if bind.startswith("0.0.0.0") and listens.startswith("127.0.0.1"):
        everywhere = bind_for(bind, coordinator, stands_for, alone=False)
        assert everywhere in (bind, bind.replace("0.0.0.0", "[::]")), "others may come"


def test_a_machine_without_ipv6_listens_on_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses_module, "interface_hosts", lambda: ["127.0.0.1", "10.0.0.7"])
    for name, listens in (("both.lan:5555", "0.0.0.0:7000"), ("new.lan:5555", "[::]:7000")):
        assert bind_for("0.0.0.0:7000", name, STANDS_FOR[name], alone=True) == listens


STANDS_FOR = {
    "localhost:5555": ("[::1]:5555", "127.0.0.1:5555"),
    "boss.lan:5555": ("10.0.0.1:5555",),
    "both.lan:5555": ("[2001:db8::1]:5555", "10.0.0.1:5555"),
    "new.lan:5555": ("[2001:db8::1]:5555",),
}


HOSTS = ["127.0.0.1", "192.168.1.5", "10.0.0.7", "::1", "fe80::1%eth0", "2001:db8::7", "02:42:ac"]


@pytest.mark.parametrize(
    ("bound", "seen", "addresses"),
    [
        ("127.0.0.1:7", "10.0.0.7", ["127.0.0.1:7"]),
        ("10.0.0.7:7", "192.168.1.5", ["10.0.0.7:7"]),
        ("[::1]:7", "", ["[::1]:7"]),
        ("0.0.0.0:7", "10.0.0.7", ["10.0.0.7:7", "192.168.1.5:7", "127.0.0.1:7"]),
        ("0.0.0.0:7", "127.0.0.1", ["192.168.1.5:7", "10.0.0.7:7", "127.0.0.1:7"]),
        ("0.0.0.0:7", "", ["192.168.1.5:7", "10.0.0.7:7", "127.0.0.1:7"]),
        ("0.0.0.0:7", "2001:db8::7", ["192.168.1.5:7", "10.0.0.7:7", "127.0.0.1:7"]),
        ("0.0.0.0:7", "::ffff:10.0.0.7", ["10.0.0.7:7", "192.168.1.5:7", "127.0.0.1:7"]),
        ("0.0.0.0:7", "203.0.113.9",
         ["203.0.113.9:7", "192.168.1.5:7", "10.0.0.7:7", "127.0.0.1:7"]),
        ("[::]:7", "2001:db8::7",
         ["[2001:db8::7]:7", "192.168.1.5:7", "10.0.0.7:7", "127.0.0.1:7", "[::1]:7"]),
    ],
)  # fmt: skip
def test_addresses_are_best_first_and_loopback_last(
    monkeypatch: pytest.MonkeyPatch, bound: str, seen: str, addresses: list[str]
) -> None:
    monkeypatch.setattr(addresses_module, "interface_hosts", lambda: HOSTS)
    assert reachable_at(bound, seen) == tuple(addresses)


def test_number_of_addresses_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = [f"10.0.0.{number}" for number in range(100)]
    monkeypatch.setattr(addresses_module, "interface_hosts", lambda: hosts)
    assert len(reachable_at("0.0.0.0:7", "")) == 16


@on_loop
async def test_this_machine_is_reached_at_what_it_says() -> None:
    with opened("0.0.0.0:0") as (links, _), opened() as (before, told):
        addresses = reachable_at(links.address, "")
        assert addresses[-1].startswith("127.0.0.1:")
        before.open(LINK, addresses, NOBODY)
        await told.until(LinkReached, len(addresses))


@on_loop
async def test_taken_address_is_refused_with_what_to_do() -> None:
    with opened() as (links, _), pytest.raises(AddressInUse) as caught:
        Links(links.address, Told().append, keys=None, admits=lambda key: False, on_read=unread)
    assert "choose another with peer_bind" in str(caught.value)


@on_loop
async def test_whether_others_reach_a_coordinator_here_is_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for outside, reached in ((["127.0.0.1"], True), (["127.0.0.2"], False), ([], False)):
            monkeypatch.setattr(
                work, "addresses_for_others", lambda bound, o=outside: [f"{h}:{port}" for h in o]
            )
            assert await work.others_reach(f"127.0.0.1:{port}") == reached


@on_loop
async def test_an_address_that_leads_nowhere_holds_up_nobody() -> None:
    """All addresses are dialled at once, so what lies behind the first does not matter."""
    with opened() as (links, told), opened() as (after, after_told):
        nowhere = (f"192.0.2.1:{free_port()}", f"127.0.0.1:{free_port()}")
        links.open(LINK, (*nowhere, after.address), NOBODY)
        reached = await told.until(LinkReached)
        assert reached == LinkReached(LINK, after.address)
        links.greet(LINK, HELLO, (after.address,))
        heard = await after_told.until(PeerReceived)
        assert isinstance(heard, PeerReceived)
        after.answer(heard.peer, PeerWelcome(epoch=Epoch(3)))
        await told.until(LinkUp)
        links.send(LINK, *task(7))
        await after_told.until(PeerReceived, 2)
        assert told.events_of(LinkDown) == []


# ------------------------------------------------------------------ leaks


def num_fds(process: psutil.Process) -> int:
    return process.num_fds() if hasattr(process, "num_fds") else 0


@on_loop
async def test_opening_and_closing_leaks_nothing() -> None:
    me = psutil.Process()

    async def cycle() -> None:
        with opened() as (links, told), opened() as (after, after_told):
            async with linked(links, told, after, after_told):
                links.send(LINK, *task())
            links.open(LinkId(Epoch(4)), (f"127.0.0.1:{free_port()}", after.address), NOBODY)

    await cycle()
    files, threads = num_fds(me), me.num_threads()
    for _ in range(20):
        await cycle()
    assert me.num_threads() == threads
    assert num_fds(me) == files


@on_loop
async def test_links_of_many_epochs_leave_nothing_behind() -> None:
    """As a worker lives: its own sockets stay, only the link changes."""
    me = psutil.Process()
    with opened() as (links, told), opened() as (after, after_told), opened() as (keep, _):
        keep.open(LinkId(Epoch(1)), (after.address,), NOBODY)

        async def epoch() -> None:
            told.clear()
            after_told.clear()
            async with linked(links, told, after, after_told):
                links.send(LINK, *task())
                await after_told.until(PeerReceived, 2)
            links.close_link(LINK)

        await epoch()
        files, threads = num_fds(me), me.num_threads()
        for _ in range(20):
            await epoch()
        assert me.num_threads() == threads
        await come_true(lambda: num_fds(me) <= files)  # ZeroMQ closes them in its own thread
