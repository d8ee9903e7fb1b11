"""Messages that never end, over real sockets: the connection ends before they take all memory."""

import asyncio
import contextlib
import socket
import struct
import sys
from collections.abc import Iterator

import pytest

from distributed_llm.common.transport import Router, unfinished
from tests.wire.test_keys import known_peer, serving
from tests.wire.test_transport import End, come_true, dealing, ended, on_loop, opened, serves, zmtp

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what was received"),
]
MIB = 1 << 20
PART = b"\3" + struct.pack(">Q", MIB) + bytes(MIB)  # long, and more to come
LAST = b"\0\1x"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unfinished, "MOST_BYTES", 8 * MIB)


@contextlib.contextmanager
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    lines: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(
            unfinished.logger, "warning", lambda text, *facts: lines.append(text % facts)
        )
        yield lines


async def pour(raw: socket.socket, data: bytes, times: int) -> None:
    def send() -> None:
        with contextlib.suppress(OSError):
            for _ in range(times):
                raw.sendall(data)

    await asyncio.to_thread(send)


async def arrived(router: Router, total: int) -> None:
    """Return once so many bytes have been received, over all connections."""

    def received() -> int:
        sizes = []
        for fd in router._unfinished._connections:
            with unfinished._borrowed(fd) as connection:
                sizes.append(unfinished._bytes_received(connection))
        return sum(sizes)

    await come_true(lambda: received() >= total)


@on_loop
async def test_a_message_without_an_end_ends_its_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    above = End()
    with (
        opened(above) as router,
        dealing(End(), router.address) as dealer,
        said(monkeypatch) as log,
    ):
        dealer.send([b"hello"])
        await above.heard.until(1)
        known = above.heard[0][0]
        evil = zmtp(router)
        await pour(evil, PART, 12)
        await arrived(router, 12 * MIB)
        router._end_unfinished()
        await ended(evil)
        evil.close()
        assert len(log) == 1
        assert log[0].startswith("a connection from 127.0.0.1 was ended: it sent ")
        assert log[0].endswith(" MiB of a message without an end")
        await serves(router, above)
        router.send(known, [b"x"])
        assert above.heard[0][1] == [b"hello"]
        assert not [one for one in above.heard if len(one[1]) > 2]  # nothing of it was delivered


@on_loop
async def test_a_message_of_the_same_size_that_ends_is_delivered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The positive control: as much as is allowed, again and again."""
    above = End()
    with opened(above) as router, said(monkeypatch) as log:
        right = zmtp(router)
        for number in range(1, 6):
            await pour(right, PART * 6, 1)
            await arrived(router, 6 * MIB * number)
            router._end_unfinished()
            await pour(right, LAST, 1)
            await above.heard.until(number)
            assert len(above.heard[-1][1]) == 7
            router._end_unfinished()
        assert log == []
        right.close()


@on_loop
async def test_several_connections_may_not_hold_more_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    above = End()
    with opened(above) as router, said(monkeypatch) as log:
        several = [zmtp(router) for _ in range(4)]
        for number, raw in enumerate(several):
            await pour(raw, PART, 1 + number)  # 10 MiB, of which 8 may be
        await arrived(router, 10 * MIB)
        router._end_unfinished()
        await ended(several[-1])  # the one with most of it
        router._end_unfinished()
        assert len(log) == 1
        for raw in several[:-1]:
            await pour(raw, LAST, 1)
        await above.heard.until(3)  # the others go on
        assert sorted(len(frames) for _, frames in above.heard) == [2, 3, 4]
        for raw in several:
            raw.close()


@on_loop
async def test_heartbeats_of_zeromq_do_not_add_up() -> None:
    above = End()
    with opened(above) as router, dealing(End(), router.address) as dealer:
        dealer.send([b"hello"])
        await above.heard.until(1)
        watch = router._unfinished
        (known,) = watch._connections.values()
        for received in range(0, 100 * 200, 200):  # of every look, for days
            monkey = known.base_bytes
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(unfinished, "_bytes_received", lambda _, now=received: now)
                watch.end_longest()
            assert known.base_bytes >= monkey
            assert received - known.base_bytes < 4 * 200


@on_loop
async def test_keys_change_nothing_about_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection with keys is known by the same file descriptor when its message is delivered."""
    with serving() as server, said(monkeypatch) as log:
        async with known_peer(server) as known:
            watch = server.router._unfinished
            (connection,) = watch._connections.values()
            for _ in range(3):
                known.client.dealer.send([bytes(6 * MIB)])
                await server.heard.until(len(server.heard) + 1)
                server.router._end_unfinished()
                assert connection.base_bytes > 6 * MIB
            await known.talks()
        assert log == []


@on_loop
async def test_connections_that_are_gone_are_forgotten() -> None:
    above = End()
    with opened(above) as router:
        for _ in range(3):
            raw = zmtp(router)
            await come_true(lambda: len(router._unfinished._connections) == 1)
            raw.close()
            await come_true(lambda: not router._unfinished._connections)
        router._unfinished.end_longest()
        await serves(router, above)


def test_an_fd_that_is_used_again_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeroMQ may close a connection between two looks, and the system give its number away."""
    monkeypatch.setattr(unfinished, "_bytes_received", lambda _: 1 << 40)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        ends = []
        for _ in range(2):
            near = stack.enter_context(socket.create_connection(server.getsockname()))
            ends.append((near, stack.enter_context(server.accept()[0])))
        (_, accepted), (second, other) = ends
        watch = unfinished.Unfinished()
        watch.accepted(accepted.fileno())
        watch._connections[other.fileno()] = watch._connections.pop(accepted.fileno())
        watch.end_longest()
        second.sendall(b"x")
        assert other.recv(1) == b"x"
        watch.accepted(other.fileno())
        watch.end_longest()
        assert second.recv(1) == b""  # what is its own is ended
