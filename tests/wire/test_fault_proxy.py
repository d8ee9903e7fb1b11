"""The fault proxy does to a plain echo server what it says, and leaves nothing behind."""

import asyncio
import gc
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from distributed_llm.client.loop_thread import LoopThread
from tests.fault_proxy import FaultProxy, Faults
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(60)
LIMIT_S = 30.0
"""Time after which a socket of these tests fails, seconds; no test waits for it."""


class Echo:
    """A server that sends back what it gets; it runs in a thread of its own."""

    def __init__(self) -> None:
        self.received: list[bytes] = []
        self.ends: list[str] = []
        self._writers: list[asyncio.StreamWriter] = []
        self._thread = LoopThread()
        self._thread.run(self._open())

    async def _open(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        try:
            while data := await reader.read(65536):
                self.received.append(data)
                writer.write(data)
                await writer.drain()
            self.ends.append("closed")
        except ConnectionResetError:
            self.ends.append("reset")
        finally:
            writer.close()

    def send(self, data: bytes) -> None:
        """Send to the first client, unasked."""

        async def send() -> None:
            self._writers[0].write(data)

        self._thread.run(send())

    def close(self) -> None:
        async def close() -> None:
            self._server.close()
            for writer in self._writers:
                writer.transport.abort()

        self._thread.run(close())
        self._thread.stop()


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[FaultProxy]:
    with FaultProxy(echo.address) as proxy:
        yield proxy


@contextmanager
def connected(proxy: FaultProxy) -> Iterator[socket.socket]:
    host, port = proxy.address.split(":")
    with socket.create_connection((host, int(port)), LIMIT_S) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield client


def receive(client: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (more := client.recv(count - len(data))):
        data += more
    return data


def ask(client: socket.socket, data: bytes) -> float:
    """Send `data` and get it back; return the seconds that took."""
    started = time.monotonic()
    client.sendall(data)
    assert receive(client, len(data)) == data
    return time.monotonic() - started


def is_reset(client: socket.socket) -> bool:
    """Read to the end; return whether that was a reset."""
    try:
        while client.recv(65536):
            pass
    except ConnectionResetError:
        return True
    return False


def test_without_faults_it_is_not_there(proxy: FaultProxy, echo: Echo) -> None:
    data = bytes(range(256)) * 8192
    with connected(proxy) as client, connected(proxy) as other:
        sender = threading.Thread(target=client.sendall, args=(data,))
        sender.start()
        assert receive(client, len(data)) == data
        sender.join()
        ask(other, b"meanwhile")
        assert proxy.num_connections == 2
        assert proxy.passed_bytes == (len(data) + 9, len(data) + 9)
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""  # the end goes through, to the server and back
    eventually(lambda: proxy.num_connections == 0)
    assert echo.ends == ["closed", "closed"]


def test_latency_is_added_per_direction_and_does_not_limit_throughput(proxy: FaultProxy) -> None:
    with connected(proxy) as client:
        proxy.degrade(to_server=Faults(latency_s=0.05))
        assert ask(client, b"x") >= 0.05
        proxy.degrade(to_client=Faults(latency_s=0.05))
        assert ask(client, b"x") >= 0.05
        proxy.degrade(to_server=Faults(latency_s=0.05), to_client=Faults(latency_s=0.05))
        assert ask(client, b"x") >= 0.1
        proxy.degrade(to_server=Faults(latency_s=0.3))
        started = time.monotonic()
        for number in range(20):  # twenty on their way at once, not one after the other
            client.sendall(bytes([number]))
        assert receive(client, 20) == bytes(range(20))
        assert 0.3 <= time.monotonic() - started < 5.0


def test_jitter_follows_from_the_seed(echo: Echo) -> None:
    expected = random.Random(7)
    with FaultProxy(echo.address, seed=7) as proxy, connected(proxy) as client:
        proxy.degrade(to_server=Faults(jitter_s=0.1))
        for _ in range(5):
            assert ask(client, b"x") >= expected.random() * 0.1


def test_order_is_kept_with_jitter(proxy: FaultProxy) -> None:
    proxy.degrade(to_server=Faults(jitter_s=0.05), to_client=Faults(jitter_s=0.05))
    with connected(proxy) as client:
        for number in range(100):
            client.sendall(bytes([number]))
        assert receive(client, 100) == bytes(range(100))


def test_a_rate_is_kept(proxy: FaultProxy) -> None:
    proxy.degrade(to_client=Faults(rate_bytes_per_s=100_000))
    with connected(proxy) as client:
        took_s = ask(client, bytes(20_000))
    assert 0.18 <= took_s < 5.0  # what goes in 10 ms may go at once


def test_a_black_hole_loses_all_in_silence_and_the_connection_stays(
    proxy: FaultProxy, echo: Echo
) -> None:
    with connected(proxy) as client:
        ask(client, b"before")
        proxy.degrade(to_server=Faults(black_hole=True))
        client.sendall(bytes(10_000_000))  # far more than buffers hold: somebody takes it
        assert echo.received == [b"before"]
        assert (proxy.num_connections, proxy.passed_bytes) == (1, (6, 6))
        proxy.heal()
        assert is_reset(client)  # never a stream with a hole in it
    eventually(lambda: echo.ends == ["reset"])
    with connected(proxy) as client:
        ask(client, b"after")


def test_a_black_hole_of_answers_lets_questions_through(proxy: FaultProxy, echo: Echo) -> None:
    with connected(proxy) as client:
        proxy.degrade(to_client=Faults(black_hole=True))
        client.sendall(b"question")
        eventually(lambda: echo.received == [b"question"])
        client.settimeout(0.1)
        with pytest.raises(TimeoutError):
            client.recv(1)


def test_what_was_not_hurt_by_a_black_hole_lives_on(proxy: FaultProxy) -> None:
    with connected(proxy) as client:
        ask(client, b"before")
        proxy.degrade(to_server=Faults(black_hole=True), to_client=Faults(black_hole=True))
        proxy.heal()
        ask(client, b"after")


@pytest.mark.parametrize("how", ["closed", "reset"])
def test_a_black_hole_swallows_the_end_too(proxy: FaultProxy, echo: Echo, how: str) -> None:
    with connected(proxy) as client:
        ask(client, b"before")
        proxy.degrade(to_server=Faults(black_hole=True))
        if how == "reset":
            client.sendall(b"x")
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    eventually(lambda: proxy._to_server.lossy)  # it has been seen, and is not passed on
    assert (echo.ends, proxy.num_connections) == ([], 1)
    proxy.heal()
    assert proxy.num_connections == 0
    eventually(lambda: echo.ends == ["reset"])


def test_a_server_that_sends_to_one_who_is_gone_does_not_hear_of_it(
    proxy: FaultProxy, echo: Echo
) -> None:
    with connected(proxy) as client:
        ask(client, b"before")
        proxy.degrade(to_server=Faults(black_hole=True))
    eventually(lambda: proxy._to_server.lossy)
    echo.send(b"hello?")  # is answered by a reset
    eventually(lambda: proxy.passed_bytes[1] == 12)
    echo.send(b"hello?")  # finds that out
    eventually(lambda: proxy.passed_bytes[1] == 18)
    for _ in range(10):  # time for what follows from it
        proxy.degrade(to_server=Faults(black_hole=True))
    assert (echo.ends, proxy.num_connections) == ([], 1)


def test_cut_resets_both_sides_now(proxy: FaultProxy, echo: Echo) -> None:
    with connected(proxy) as client, connected(proxy) as other:
        ask(client, b"x")
        ask(other, b"x")
        proxy.cut()
        assert proxy.num_connections == 0
        assert is_reset(client)
        assert is_reset(other)
        eventually(lambda: echo.ends == ["reset", "reset"])
    with connected(proxy) as client:
        ask(client, b"new ones are taken")


@pytest.mark.parametrize("count", [0, 1, 1000])
def test_cut_after_so_many_bytes(proxy: FaultProxy, echo: Echo, count: int) -> None:
    with connected(proxy) as client:
        ask(client, b"before")
        proxy.degrade(to_server=Faults(cut_after_bytes=count))
        client.sendall(bytes(5000))
        assert is_reset(client)
    eventually(lambda: echo.ends == ["reset"])
    assert sum(map(len, echo.received)) == 6 + count
    with connected(proxy) as client:
        ask(client, bytes(5000))  # only once


def test_refused_connections_are_refused_and_the_open_ones_stay(proxy: FaultProxy) -> None:
    with connected(proxy) as client:
        ask(client, b"before")
        address = proxy.address
        proxy.refuse()
        proxy.refuse()
        with pytest.raises(ConnectionRefusedError), connected(proxy):
            pass
        ask(client, b"still")
        proxy.heal()
        proxy.heal()
        assert proxy.address == address
        with connected(proxy) as other:
            ask(other, b"again")


def test_a_server_that_is_gone_is_told_by_a_reset() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        with (
            FaultProxy(f"127.0.0.1:{nobody.getsockname()[1]}") as proxy,
            pytest.raises(ConnectionResetError),
            connected(proxy) as client,
        ):
            client.recv(1)


def test_slices_come_one_by_one_and_whole(proxy: FaultProxy, echo: Echo) -> None:
    data = bytes(range(200))
    with connected(proxy) as client:
        ask(client, data)
        assert echo.received == [data]
        proxy.degrade(to_server=Faults(slice_bytes=1))
        ask(client, data)
    assert b"".join(echo.received[1:]) == data
    assert len(echo.received) > 2


def test_healing_ends_what_waits(proxy: FaultProxy) -> None:
    with connected(proxy) as client:
        proxy.degrade(to_server=Faults(rate_bytes_per_s=0.001))
        client.sendall(b"wait")
        assert receive(client, 1) == b"w"  # the next would go in a quarter of an hour
        proxy.heal()
        assert receive(client, 3) == b"ait"


def test_nothing_is_left_behind(echo: Echo) -> None:
    process = psutil.Process()
    threads, sockets = threading.active_count(), process.num_fds()
    for _ in range(3):
        with FaultProxy(echo.address) as proxy, connected(proxy) as client:
            proxy.degrade(to_client=Faults(latency_s=1000.0), to_server=Faults(black_hole=True))
            client.sendall(b"lost")
            proxy.degrade(to_client=Faults(latency_s=1000.0))
    assert threading.active_count() == threads
    eventually(lambda: process.num_fds() <= sockets)  # the server's ends close a little later


def test_connections_that_come_as_it_ends_are_closed(echo: Echo) -> None:
    for _ in range(3):
        with FaultProxy(echo.address) as proxy, socket.socket() as client:
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", int(proxy.address.split(":")[1])))
            proxy.refuse()
    gc.collect()  # what is not closed says so, which fails a test


def test_what_is_cut_again_while_it_ends_is_closed_all_the_same(proxy: FaultProxy) -> None:
    async def cut_again_and_again() -> None:
        carrying = list(proxy._connections)
        for _ in range(8):
            for task in carrying:
                task.cancel()
            await asyncio.sleep(0)  # one step further towards its end
        await asyncio.gather(*carrying, return_exceptions=True)

    proxy.degrade(to_server=Faults(rate_bytes_per_s=1000.0))
    with connected(proxy) as client:
        client.sendall(bytes(200_000))
        eventually(lambda: proxy.passed_bytes[0] > 0)
        proxy._thread.run(cut_again_and_again())
    gc.collect()  # what is not closed says so, which fails a test
    assert proxy.num_connections == 0
