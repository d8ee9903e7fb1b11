"""A DEALER: one connection to a ROUTER.

A ZeroMQ context has threads of its own, and closing it blocks until queued messages are sent. All
DEALERs of a process share one context, which is closed with the last of them, so that opening and
closing links does not block while others are in use.
"""

import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

import zmq

from distributed_llm.common.errors import ConnectionFailed, LocalProtocolError
from distributed_llm.common.keys import KeyPair, PublicKey, key_bytes
from distributed_llm.common.tensors import Frame
from distributed_llm.common.transport.pump import Monitor, Pump
from distributed_llm.common.transport.sockets import LINGER_MS, open_socket, tcp_endpoint

_MAX_OUTBOX = 10_000
"""Messages that may wait in a DEALER."""

_MAX_SOCKETS = 16_384
"""Sockets in the context that DEALERs share."""


_HANG_UPS = 3
"""Handshakes in a row that the other end breaks off in silence, as it does if it holds another key
than it should, until that is taken for the reason."""

_WATCHED = (
    zmq.EVENT_CONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_DISCONNECTED
)


class Rejection(Enum):
    """Why the two ends of a connection do not accept each other.

    Attributes:
        OUR_KEY: the ROUTER does not admit the key of this end.
        SERVER_KEY: the ROUTER does not hold the key that it should; or it uses none, and hung up
            before its greeting, which shows that, was read.
        NO_KEYS: one end uses keys and the other does not, or the other speaks no ZeroMQ.
    """

    OUR_KEY = auto()
    SERVER_KEY = auto()
    NO_KEYS = auto()


@dataclass(frozen=True)
class Login:
    """The keys of both ends of a connection.

    Attributes:
        server: the key that the ROUTER has to hold: nobody else can read what is sent.
        keys: of this end.
    """

    server: PublicKey
    keys: KeyPair

    def put_on(self, socket: "zmq.Socket[bytes]") -> None:
        """Have a DEALER use the keys."""
        socket.curve_serverkey = key_bytes(self.server)
        socket.curve_publickey = key_bytes(self.keys.public)
        socket.curve_secretkey = key_bytes(self.keys.secret)


class Dealer:
    """A connection to a ROUTER, for one session.

    Args:
        address: "HOST:PORT" of the ROUTER.
        on_message: called with each message.
        on_connect: called when the other end has answered ZeroMQ's handshake.
        on_disconnect: called when the connection is lost, after the last message. The session is
            over then: nothing more is sent, and reconnecting is not reported.
        login: the keys of both ends; None connects to a ROUTER without keys.
        on_rejected: called at most once if the two ends do not accept each other, in place of
            `on_connect`. What the other end does is known by its silence only: it may as well be
            starting or ending while it is `Rejection.SERVER_KEY`.
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
        login: Login | None,
        on_rejected: Callable[[Rejection], None],
        max_outbox: int = _MAX_OUTBOX,
    ) -> None:
        self._on_message = on_message
        self._on_connect = on_connect
        self._on_rejected = on_rejected
        self._hung_up = 0
        self._on_disconnect = on_disconnect
        self._max_outbox = max_outbox
        self._outbox: deque[list[Frame]] = deque()
        self._connected = False
        self._over = False
        self.reached = False
        self.local_host = ""
        self._socket = open_socket(_dealers.acquire(), zmq.DEALER)
        self._socket.immediate = True
        self._has_keys = login is not None
        if login:
            login.put_on(self._socket)
        self._pump = Pump(self._socket, self._receive, self._flush)
        self._monitor = Monitor(self._socket, _WATCHED, self._watch)
        try:
            self._socket.connect(tcp_endpoint(address, self._socket))
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

    def close(self, *, linger_ms: int = LINGER_MS) -> None:
        """Close the socket; what is queued is still sent, for at most `linger_ms`.

        Blocks until then only if this is the last DEALER of the process.
        """
        if self._pump.closed:
            return
        self._monitor.close()
        self._pump.close()
        self._socket.close(linger_ms)
        _dealers.release()

    def _receive(self, parts: list[zmq.Frame]) -> None:
        self._on_message([part.buffer for part in parts])

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
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self._reject(Rejection.OUR_KEY)
        elif event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            self._reject(Rejection.NO_KEYS)
        elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
            self._hung_up += 1
            if self._hung_up == _HANG_UPS:
                self._reject(Rejection.SERVER_KEY if self._has_keys else Rejection.NO_KEYS)
        elif event == zmq.EVENT_DISCONNECTED and self._connected:
            self._connected = False
            self._over = True
            self._outbox.clear()
            self._pump.deliver_all()
            if not self._pump.closed:
                self._on_disconnect()

    def _reject(self, why: Rejection) -> None:
        if not self._over:
            self._over = True
            self._on_rejected(why)


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
