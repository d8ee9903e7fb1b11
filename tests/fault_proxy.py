"""A TCP proxy that makes a network bad on purpose: slow, silent, cut, closed.

    with FaultProxy(coordinator_address) as proxy:
        client = DistributedClient(proxy.address)
        proxy.degrade(to_server=Faults(latency_s=0.05), to_client=Faults(black_hole=True))
        proxy.cut()
        proxy.heal()

It runs in a thread of its own. Every call returns once what it asks for is in force.
"""

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from distributed_llm.client.loop_thread import LoopThread
from distributed_llm.common.keyring import Keyring, state_folder
from distributed_llm.common.units import split_address

_READ_BYTES = 64 * 1024
_MAX_PIECES = 64
_RATE_STEP_S = 0.01
_SLICE_GAP_S = 0.001
_TURNS_TO_ACCEPT = 5
"""Turns of asyncio's loop in which a connection that it has taken surely comes to `_accept`."""
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: a close throws away what is unsent, and says so


@dataclass(frozen=True)
class Faults:
    """What is wrong with one direction, with each connection for itself.

    Attributes:
        latency_s: added to the way of every byte; bytes travel one behind the other.
        jitter_s: up to this much more, drawn anew for each piece that is read; order is kept.
        rate_bytes_per_s: no faster than this.
        black_hole: what comes is lost in silence, ends and resets too, and the connection stays.
            Once this is over, connections that lost something are reset.
        slice_bytes: never more than this at once, and 1 ms in between.
        cut_after_bytes: reset the connection that carries the last of so many bytes from now; once.
    """

    latency_s: float = 0.0
    jitter_s: float = 0.0
    rate_bytes_per_s: float | None = None
    black_hole: bool = False
    slice_bytes: int | None = None
    cut_after_bytes: int | None = None


_NONE = Faults()


class FaultProxy:
    """Carries connections on to `target`; a context manager.

    Keys pass through: if this machine has one for `target`, it has the same one for the proxy.

    Args:
        target: "HOST:PORT".
        seed: of the jitter.
        record: keep a copy of all bytes that pass.

    Attributes:
        address: "HOST:PORT" to connect to instead.
    """

    def __init__(self, target: str, *, seed: int = 0, record: bool = False) -> None:
        self._target = split_address(target)
        self._keyring = Keyring(state_folder())
        self._login = self._keyring.kept(target)
        self._to_server = _Direction(random.Random(seed), record=record)
        self._to_client = _Direction(random.Random(seed + 1), record=record)
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.address = ""

    def __enter__(self) -> Self:
        self._thread = LoopThread()
        self._thread.run(self._listen())
        if self._login:
            self._keyring.save(self.address, self._login.server, self._login.keys)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.refuse()
        self.cut()
        self._thread.stop()
        self._keyring.forget(self.address)

    @property
    def num_connections(self) -> int:
        """Connections that are open now."""
        return len(self._connections)

    @property
    def passed_bytes(self) -> tuple[int, int]:
        """Bytes carried so far, of all connections: to the server, to the client."""
        return self._to_server.passed_bytes, self._to_client.passed_bytes

    @property
    def recorded(self) -> bytes:
        """What has passed so far: to the server, then to the client."""
        return bytes(self._to_server.recorded + self._to_client.recorded)

    def degrade(self, *, to_server: Faults = _NONE, to_client: Faults = _NONE) -> None:
        """Let these faults take the place of those before, for open and new connections."""

        async def change() -> None:
            lossy = self._to_server.change(to_server) | self._to_client.change(to_client)
            await _cancel(lossy & self._connections)

        self._thread.run(change())

    def cut(self) -> None:
        """Reset all connections; new ones are taken."""
        self._thread.run(_cancel(self._connections))

    def refuse(self) -> None:
        """Refuse new connections; those that are open stay."""
        self._thread.run(self._stop_listening())

    def heal(self) -> None:
        """End all faults and take new connections, at the same address."""
        self.degrade()
        self._thread.run(self._listen())

    async def _listen(self) -> None:
        if self._server is None:
            port = split_address(self.address)[1] if self.address else 0
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", port)
            self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _stop_listening(self) -> None:
        if self._server:
            # asyncio would lose, unclosed, a connection that it took just before the server closes.
            for listening in self._server.sockets:
                asyncio.get_running_loop().remove_reader(listening.fileno())
            for _ in range(_TURNS_TO_ACCEPT):
                await asyncio.sleep(0)
            self._server.close()
            self._server = None

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def ended(task: asyncio.Task[None]) -> None:
            self._connections.discard(task)
            writer.transport.abort()  # the task may have been cancelled before its first step

        task = asyncio.get_running_loop().create_task(self._carry(reader, writer))
        self._connections.add(task)
        task.add_done_callback(ended)

    async def _carry(
        self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task
        writers = [to_client]
        try:
            from_server, to_server = await asyncio.open_connection(*self._target)
            writers.append(to_server)
            async with asyncio.TaskGroup() as group:
                for reader, writer, way, back in (
                    (from_client, to_server, self._to_server, self._to_client),
                    (from_server, to_client, self._to_client, self._to_server),
                ):
                    flow = _Flow(task, writer, way, back)
                    group.create_task(flow.read(reader))
                    group.create_task(flow.write())
            for writer in writers:
                writer.close()
                await writer.wait_closed()
        except* OSError:
            pass
        finally:
            for writer in writers:  # all of them, before anything is awaited: it may be cut again
                _reset(writer)
            for writer in writers:
                with contextlib.suppress(OSError):
                    await writer.wait_closed()


class _Direction:
    """The faults of one direction, which all connections look at."""

    def __init__(self, luck: random.Random, *, record: bool) -> None:
        self.luck = luck
        self.recorded = bytearray()
        self._record = record
        self.faults = _NONE
        self.passed_bytes = 0
        self.lossy: set[asyncio.Task[None]] = set()
        self._bytes_to_cut: int | None = None
        self._changed = asyncio.Event()

    def change(self, faults: Faults) -> set[asyncio.Task[None]]:
        """Take `faults`; return the connections that cannot live on."""
        self.faults = faults
        self._bytes_to_cut = faults.cut_after_bytes
        self._changed.set()
        self._changed = asyncio.Event()
        lossy: set[asyncio.Task[None]] = set()
        if not faults.black_hole:
            lossy, self.lossy = self.lossy, lossy
        return lossy

    async def wait_until(self, due_at: Callable[[Faults], float]) -> None:
        """Return when it is due, with the faults as they are then."""
        loop = asyncio.get_running_loop()
        while (wait_s := due_at(self.faults) - loop.time()) > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), wait_s)

    def next_bytes(self, waiting_bytes: int) -> int:
        """Return how many bytes may go at once."""
        faults, most = self.faults, waiting_bytes
        if faults.slice_bytes:
            most = min(most, faults.slice_bytes)
        if faults.rate_bytes_per_s:
            most = min(most, max(1, int(faults.rate_bytes_per_s * _RATE_STEP_S)))
        return most if self._bytes_to_cut is None else min(most, self._bytes_to_cut)

    def count(self, data: memoryview) -> bool:
        """Count bytes that go now; return whether they are the last before a cut."""
        size = len(data)
        self.passed_bytes += size
        if self._record:
            self.recorded += data
        if self._bytes_to_cut is None:
            return False
        self._bytes_to_cut -= size
        last = self._bytes_to_cut == 0
        if last:
            self._bytes_to_cut = None
        return last


@dataclass(frozen=True)
class _Piece:
    """What was read: bytes, nothing at the end, or None if the connection was reset."""

    arrived_at: float
    luck: float
    data: bytes | None

    def due_at(self, faults: Faults) -> float:
        return self.arrived_at + faults.latency_s + self.luck * faults.jitter_s


class _Flow:
    """One direction of one connection.

    Args:
        back: the direction in which the one who reads from `writer` would say that it is gone.
    """

    def __init__(
        self,
        connection: asyncio.Task[None],
        writer: asyncio.StreamWriter,
        way: _Direction,
        back: _Direction,
    ) -> None:
        self._connection = connection
        self._writer = writer
        self._way = way
        self._back = back
        self._pieces: asyncio.Queue[_Piece] = asyncio.Queue(_MAX_PIECES)
        self._sent_at = 0.0
        self._sent_bytes = 0

    async def read(self, reader: asyncio.StreamReader) -> None:
        data: bytes | None = b"..."
        while data:
            try:
                data = await reader.read(_READ_BYTES)
            except OSError:
                data = None
            now = asyncio.get_running_loop().time()
            await self._pieces.put(_Piece(now, self._way.luck.random(), data))

    async def write(self) -> None:
        while True:
            piece = await self._pieces.get()
            await self._way.wait_until(piece.due_at)
            if piece.data:
                await self._write(memoryview(piece.data))
            elif self._way.faults.black_hole:
                await self._stay_without(self._way)
            elif piece.data is None:
                raise ConnectionResetError
            else:
                self._writer.write_eof()
                return

    async def _write(self, data: memoryview) -> None:
        while data:
            await self._way.wait_until(self._next_at)
            if self._way.faults.black_hole:
                self._way.lossy.add(self._connection)
                return
            size = self._way.next_bytes(len(data))
            last = self._way.count(data[:size])
            await self._send(data[:size])
            data = data[size:]
            if last:
                raise ConnectionAbortedError

    def _next_at(self, faults: Faults) -> float:
        gap_s = _SLICE_GAP_S if faults.slice_bytes else 0.0
        if faults.rate_bytes_per_s:
            gap_s = max(gap_s, self._sent_bytes / faults.rate_bytes_per_s)
        return self._sent_at + gap_s

    async def _send(self, data: memoryview) -> None:
        now = asyncio.get_running_loop().time()
        # A timer fires late: what that costs is made up for, not what nobody wanted to send.
        self._sent_at = max(self._next_at(self._way.faults), now - _RATE_STEP_S)
        self._sent_bytes = len(data)
        try:
            if self._writer.is_closing():
                raise ConnectionResetError
            self._writer.write(data)
            await self._writer.drain()
        except OSError:
            if not self._back.faults.black_hole:
                raise
            await self._stay_without(self._back)

    async def _stay_without(self, direction: _Direction) -> None:
        """Wait for ever: the one who would have to hear of an end does not."""
        direction.lossy.add(self._connection)
        await asyncio.get_running_loop().create_future()


async def _cancel(connections: set[asyncio.Task[None]]) -> None:
    cut = list(connections)
    for task in cut:
        task.cancel()
    await asyncio.gather(*cut, return_exceptions=True)


def _reset(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        raw: Any = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
