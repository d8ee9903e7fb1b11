"""ROUTER and DEALER sockets under asyncio. The only module that uses ZeroMQ.

Both sockets call back on the event loop's thread. ZeroMQ signals readiness by edges, and any call
on the socket may consume an edge; therefore the socket's state is checked again after every send,
even a refused one. After `_BATCH` messages the socket yields to the event loop, so that a backlog
does not starve timers and other tasks.

Peers choose no identities: the ROUTER makes one up per connection. A worker that reconnects is
heard at once, and no peer can take the place of another. A stranger may choose one nevertheless;
ZeroMQ aborts the process if it is the next one that a ROUTER makes up, so where those begin is
drawn (`_scatter_identities`).

A ZeroMQ context has threads of its own, and closing it blocks until queued messages are sent. All
DEALERs of a process share one context, which is closed with the last of them, so that opening and
closing links does not block while others are in use.
"""

import asyncio
import contextlib
import ctypes
import os
import secrets
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum, auto

import zmq
from zmq.utils.monitor import parse_monitor_message

from distributed_llm.common.errors import AddressInUse, ConnectionFailed, LocalProtocolError
from distributed_llm.common.tensors import MAX_FRAME_BYTES, Frame
from distributed_llm.common.types import PeerId

_BATCH = 64
"""Messages that a socket calls back with before it yields to the event loop."""

_MAX_WAITING = 4096
"""Messages that are delivered at once when somebody wants to know what has arrived."""

_LINGER_MS = 300
"""Time that a closed socket goes on sending what is queued, milliseconds."""

_MAX_OUTBOX = 10_000
"""Messages that may wait in a DEALER."""

_MAX_SOCKETS = 16_384
"""Sockets in the context that DEALERs share."""

_MAX_BACKLOG_BYTES = 8 << 20
"""Size of the messages to one peer of a ROUTER above which no more are queued."""

_RETRY_S = 0.005
"""Time after which a ROUTER tries again to send what a peer had no room for."""

_NOTICE_S = 0.05
"""Time from the loss of a peer until `on_disconnect` is called."""

_HANDSHAKE_MS = 3000
"""Time that a new connection has for ZeroMQ's handshake, milliseconds."""

_HEARTBEAT_MS = 1000
"""Interval of ZeroMQ's own heartbeats, milliseconds."""

_HEARTBEAT_TIMEOUT_MS = 3000
"""Time without an answer to a heartbeat after which a connection is closed, milliseconds."""


class Delivery(Enum):
    """What happened to a message given to a ROUTER.

    Attributes:
        SENT: it is queued; it may still not arrive.
        GONE: the peer has disconnected.
        STUCK: too much waits to be sent to the peer already.
    """

    SENT = auto()
    GONE = auto()
    STUCK = auto()


class Router:
    """A listening socket: the coordinator's, and each worker's for other workers.

    Args:
        bind: "HOST:PORT" to listen on; port 0 takes any free port.
        on_message: called with each message and the peer that sent it.
        on_disconnect: called soon after one or more peers have disconnected. It is not told which;
            a `send` to a peer that has returns GONE.
        setting: name of the setting for `bind`, for the error message.

    Attributes:
        address: "HOST:PORT" that it listens on.

    Raises:
        AddressInUse: the address is taken or does not belong to this machine.
    """

    def __init__(
        self,
        bind: str,
        on_message: Callable[[PeerId, list[Frame]], None],
        on_disconnect: Callable[[], None],
        *,
        setting: str = "--bind",
    ) -> None:
        self._on_message = on_message
        self._on_disconnect = on_disconnect
        self._notice: asyncio.TimerHandle | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._backlogs: dict[PeerId, _Backlog] = {}
        self._context = zmq.Context()
        _scatter_identities()
        self._socket = _open(self._context, zmq.ROUTER)
        self._socket.router_mandatory = True
        self._socket.router_handover = False
        try:
            self._socket.bind(_endpoint(bind, self._socket))
        except zmq.ZMQError as exc:
            self._context.destroy(linger=0)
            why = zmq.strerror(exc.errno or 0)
            raise AddressInUse(
                f"Cannot listen on {bind}: {why}. Another program may be listening there, or the "
                f"address is not one of this machine; choose another with {setting}."
            ) from exc
        endpoint = self._socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(endpoint, bytes)
        self.address = endpoint.rstrip(b"\0").decode().removeprefix("tcp://")
        self._pump = _Pump(self._socket, self._receive)
        self._monitor = _Monitor(self._socket, zmq.EVENT_DISCONNECTED, self._watch)

    def send(self, peer: PeerId, frames: Sequence[Frame]) -> Delivery:
        """Queue a message to `peer`; never blocks.

        ZeroMQ limits its queues by messages, and a step may give each of hundreds of requests one.
        Messages that do not fit wait here, up to `_MAX_BACKLOG_BYTES`; more are STUCK.
        """
        backlog = self._backlogs.get(peer)
        delivery = Delivery.STUCK if backlog else self._try_send(peer, frames)
        if delivery is not Delivery.STUCK:
            return delivery
        if backlog is None:
            backlog = self._backlogs[peer] = _Backlog()
            self._retry_soon()
        return Delivery.SENT if backlog.add(frames) else Delivery.STUCK

    def deliver_waiting(self) -> None:
        """Call back with the messages that have arrived, now, but for more than a few thousand."""
        self._pump.deliver_waiting()

    def _try_send(self, peer: PeerId, frames: Sequence[Frame]) -> Delivery:
        try:
            self._socket.send_multipart([peer, *frames], zmq.NOBLOCK)
        except zmq.Again:
            return Delivery.STUCK
        except zmq.ZMQError as exc:
            if exc.errno != zmq.EHOSTUNREACH:
                raise
            return Delivery.GONE
        finally:
            self._pump.notice()
        return Delivery.SENT

    def _retry_soon(self) -> None:
        if not self._retry:  # a ROUTER does not say which peer can be written to again
            self._retry = asyncio.get_running_loop().call_later(_RETRY_S, self._flush)

    def _flush(self) -> None:
        self._retry = None
        for peer, backlog in list(self._backlogs.items()):
            while backlog.messages:
                delivery = self._try_send(peer, backlog.messages[0])
                if delivery is Delivery.STUCK:
                    break
                backlog.pop()
                if delivery is Delivery.GONE:  # the next send returns it
                    backlog.messages.clear()
            if not backlog.messages:
                del self._backlogs[peer]
        if self._backlogs:
            self._retry_soon()

    def close(self, *, linger_ms: int = _LINGER_MS) -> None:
        """Close the socket; block for at most `linger_ms` to send what is queued."""
        for timer in (self._notice, self._retry):
            if timer:
                timer.cancel()
        self._monitor.close()
        self._pump.close()
        self._context.destroy(linger=linger_ms)

    def _receive(self, frames: list[Frame]) -> None:
        self._on_message(PeerId(bytes(frames[0])), frames[1:])

    def _watch(self, event: int, value: int) -> None:
        # ZeroMQ reports it before it forgets the peer: a send right now would still succeed.
        # Waiting also merges the notices of many peers into one.
        if not self._notice:
            self._notice = asyncio.get_running_loop().call_later(_NOTICE_S, self._notify)

    def _notify(self) -> None:
        self._notice = None
        self._on_disconnect()


class _Backlog:
    """Messages that wait to be sent to one peer of a ROUTER."""

    def __init__(self) -> None:
        self.messages: deque[list[Frame]] = deque()
        self._nbytes = 0

    def add(self, frames: Sequence[Frame]) -> bool:
        """Queue a message; return False if too many bytes wait already."""
        if self._nbytes >= _MAX_BACKLOG_BYTES:
            return False
        self.messages.append(list(frames))
        self._nbytes += sum(map(len, frames))
        return True

    def pop(self) -> None:
        self._nbytes -= sum(map(len, self.messages.popleft()))


class Dealer:
    """A connection to a ROUTER, for one session.

    Args:
        address: "HOST:PORT" of the ROUTER.
        on_message: called with each message.
        on_connect: called when the other end has answered ZeroMQ's handshake.
        on_disconnect: called when the connection is lost, after the last message. The session is
            over then: nothing more is sent, and reconnecting is not reported.
        max_outbox: messages that may wait here, besides those that ZeroMQ and the network hold.

    Attributes:
        reached: whether something accepts connections at the address.
        local_host: IP address of this end of the connection; empty before it was reached.

    Raises:
        ConnectionFailed: the address does not have this form.
    """

    def __init__(
        self,
        address: str,
        on_message: Callable[[list[Frame]], None],
        on_connect: Callable[[], None],
        on_disconnect: Callable[[], None],
        *,
        max_outbox: int = _MAX_OUTBOX,
    ) -> None:
        self._on_connect = on_connect
        self._on_disconnect = on_disconnect
        self._max_outbox = max_outbox
        self._outbox: deque[list[Frame]] = deque()
        self._connected = False
        self._over = False
        self.reached = False
        self.local_host = ""
        self._socket = _open(_dealers.acquire(), zmq.DEALER)
        self._socket.immediate = True
        self._pump = _Pump(self._socket, on_message, self._flush)
        events = zmq.EVENT_CONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        self._monitor = _Monitor(self._socket, events, self._watch)
        try:
            self._socket.connect(_endpoint(address, self._socket))
        except zmq.ZMQError as exc:
            self.close(linger_ms=0)
            raise ConnectionFailed(f"{address!r} is not an address to connect to: {exc}.") from exc

    def send(self, frames: Sequence[Frame]) -> None:
        """Queue a message; never blocks. Does nothing once the session is over.

        Raises:
            LocalProtocolError: too many messages wait already.
        """
        if self._over:
            return
        if len(self._outbox) >= self._max_outbox:
            raise LocalProtocolError(f"{self._max_outbox} messages wait to be sent")
        self._outbox.append(list(frames))
        self._pump.notice(flushed=self._flush())

    def deliver_waiting(self) -> None:
        """Call back with the messages that have arrived, now, but for more than a few thousand."""
        self._pump.deliver_waiting()

    def close(self, *, linger_ms: int = _LINGER_MS) -> None:
        """Close the socket; what is queued is still sent, for at most `linger_ms`.

        Blocks until then only if this is the last DEALER of the process.
        """
        if self._pump.closed:
            return
        self._monitor.close()
        self._pump.close()
        self._socket.close(linger_ms)
        _dealers.release()

    def _flush(self) -> bool:
        while self._outbox:
            try:
                self._socket.send_multipart(self._outbox[0], zmq.NOBLOCK)
            except zmq.Again:
                return False
            self._outbox.popleft()
        return True

    def _watch(self, event: int, value: int) -> None:
        if event == zmq.EVENT_CONNECTED:
            self.reached = True
            self.local_host = _local_host(value)
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED and not self._over:
            self._connected = True
            self._on_connect()
        elif event == zmq.EVENT_DISCONNECTED and self._connected:
            self._connected = False
            self._over = True
            self._outbox.clear()
            self._pump.deliver_all()
            if not self._pump.closed:
                self._on_disconnect()


class _Pump:
    """Calls back with every message of a socket, `_BATCH` messages at a time.

    Args:
        on_frames: called with each message.
        flush: sends what can be sent now; returns whether that was everything.
    """

    def __init__(
        self,
        socket: "zmq.Socket[bytes]",
        on_frames: Callable[[list[Frame]], None],
        flush: Callable[[], bool] = lambda: True,
    ) -> None:
        self._socket = socket
        self._on_frames = on_frames
        self._flush = flush
        self._loop = asyncio.get_running_loop()
        self._again: asyncio.Handle | None = None
        self.closed = False
        self._fd = int(socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self._run)
        self.look_again()

    def notice(self, *, flushed: bool = True) -> None:
        """Check whether sending has consumed an edge; if so, run again soon.

        Args:
            flushed: whether nothing waits to be sent.
        """
        wanted = zmq.POLLIN if flushed else zmq.POLLIN | zmq.POLLOUT
        if self._again is None and not self.closed and self._events() & wanted:
            self.look_again()

    def look_again(self) -> None:
        """Run again soon, without waiting for an edge."""
        if self._again is None and not self.closed:
            self._again = self._loop.call_soon(self._run)

    def deliver_all(self) -> None:
        """Call back with all messages that have arrived, now."""
        while not self.closed and self._take():
            pass

    def deliver_waiting(self) -> None:
        """Call back with what has arrived, now; with at most `_MAX_WAITING` messages."""
        for _ in range(_MAX_WAITING):
            if self.closed or not self._take():
                break
        self.notice()

    def close(self) -> None:
        self.closed = True
        self._loop.remove_reader(self._fd)

    def _run(self) -> None:
        if self._again:  # this run replaces it: otherwise runs would double with every batch
            self._again.cancel()
            self._again = None
        if self.closed:
            return
        flushed = self._flush()
        for _ in range(_BATCH):
            if not self._take():
                break
        else:
            self.look_again()
        self.notice(flushed=flushed)  # receiving may have consumed the edge for writing

    def _take(self) -> bool:
        """Call back with one message, if there is one; return whether there may be more."""
        if not self._events() & zmq.POLLIN:
            return False
        parts = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
        try:
            self._on_frames([part.buffer for part in parts])
        except BaseException:
            self.look_again()  # for the messages that follow
            raise
        return not self.closed

    def _events(self) -> int:
        return int(self._socket.getsockopt(zmq.EVENTS))


class _Monitor:
    """Calls back with each event of a socket's connections, and its value."""

    def __init__(
        self, socket: "zmq.Socket[bytes]", events: int, on_event: Callable[[int, int], None]
    ) -> None:
        self._watched = socket
        self._on_event = on_event
        self._socket = socket.get_monitor_socket(events)
        self._pump = _Pump(self._socket, self._receive)

    def close(self) -> None:
        self._pump.close()
        with contextlib.suppress(zmq.ZMQError):
            self._watched.disable_monitor()
        self._socket.close(0)

    def _receive(self, frames: list[Frame]) -> None:
        said = parse_monitor_message([bytes(frame) for frame in frames])
        self._on_event(int(said["event"]), int(said["value"]))


class _SharedContext:
    """A context that exists while any socket of this process uses it.

    Safe to use from several threads. A forked child gets a context of its own.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._users = 0

    def acquire(self) -> "zmq.Context[zmq.Socket[bytes]]":
        """Return the context for one more socket."""
        with self._lock:
            if self._context is None:
                self._context = zmq.Context()
                self._context.set(zmq.MAX_SOCKETS, _MAX_SOCKETS)
            self._users += 1
            return self._context

    def release(self) -> None:
        """Note that a socket is closed. The last one blocks until all lingering ones are gone."""
        with self._lock:
            self._users -= 1
            unused = None if self._users else self._context
            if unused:
                self._context = None
        if unused:
            unused.term()

    def forget(self) -> None:
        """Forget the context, in a forked child: its threads exist only in the parent."""
        self._lock = threading.Lock()
        self._inherited, self._context, self._users = self._context, None, 0


_dealers = _SharedContext()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_dealers.forget)


def _local_host(fd: int) -> str:
    """Return the local address of a connection; empty if it is closed already.

    Args:
        fd: file descriptor of ZeroMQ's TCP socket.
    """
    try:
        connection = socket.socket(fileno=fd)
    except OSError:
        return ""
    try:
        return str(connection.getsockname()[0])
    except OSError:
        return ""
    finally:
        connection.detach()  # it is not ours to close


def _scatter_identities() -> None:
    """Draw the number from which the next ROUTER of this thread counts its peers.

    ZeroMQ draws it by C's `rand` and leaves that unseeded, so it is the same in every process.
    """
    c = ctypes.CDLL("ucrtbase" if sys.platform == "win32" else None)
    c.srand(secrets.randbits(32))


def _open(context: "zmq.Context[zmq.Socket[bytes]]", kind: int) -> "zmq.Socket[bytes]":
    socket = context.socket(kind)
    socket.maxmsgsize = MAX_FRAME_BYTES
    socket.sndhwm = socket.rcvhwm = 64
    socket.handshake_ivl = _HANDSHAKE_MS
    socket.heartbeat_ivl = _HEARTBEAT_MS
    socket.heartbeat_timeout = _HEARTBEAT_TIMEOUT_MS
    socket.reconnect_ivl = 100
    socket.reconnect_ivl_max = 2000
    socket.backlog = 256
    socket.linger = _LINGER_MS
    return socket


def _endpoint(address: str, socket: "zmq.Socket[bytes]") -> str:
    if address.startswith("["):
        socket.ipv6 = True
    host, _, port = address.rpartition(":")
    return f"tcp://{host}:{port if port != '0' else '*'}"
