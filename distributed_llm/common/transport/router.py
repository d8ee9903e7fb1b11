"""A ROUTER: a listening socket, the coordinator's or a worker's.

Peers choose no identities: the ROUTER makes one up per connection. A worker that reconnects is
heard at once, and no peer can take the place of another. A peer may choose one nevertheless;
ZeroMQ aborts the process if it is the next one that a ROUTER makes up, so where those begin is
drawn (`_scatter_identities`).
"""

import asyncio
import contextlib
import ctypes
import secrets
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

import zmq

from distributed_llm.common.errors import AddressInUse
from distributed_llm.common.keys import NOBODY, KeyPair, PublicKey
from distributed_llm.common.tensors import Frame
from distributed_llm.common.transport.authenticator import USER_ID, Authenticator, be_curve_server
from distributed_llm.common.transport.pump import Monitor, Pump
from distributed_llm.common.transport.sockets import LINGER_MS, open_socket, tcp_endpoint
from distributed_llm.common.transport.unfinished import CHECK_S, Unfinished
from distributed_llm.common.types import PeerId

_MAX_BACKLOG_BYTES = 8 << 20
"""Size of the messages to one peer of a ROUTER above which no more are queued."""

_RETRY_S = 0.005
"""Time after which a ROUTER tries again to send what a peer had no room for."""

_NOTICE_S = 0.05
"""Time from the loss of a peer until `on_disconnect` is called."""


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


@dataclass(frozen=True)
class Door:
    """Who may connect to a ROUTER, and what proves to them that it is the right one.

    Attributes:
        keys: of the ROUTER; who connects has to know the public one.
        admits: returns whether the holder of a key may connect, and whether what it sends is heard.
    """

    keys: KeyPair
    admits: Callable[[PublicKey], bool]


class Router:
    """A listening socket: the coordinator's, and each worker's for other workers.

    Args:
        bind: "HOST:PORT" to listen on; port 0 takes any free port.
        on_message: called with each message, the peer that sent it and the key of that; the key is
            empty if `door` is None.
        on_disconnect: called soon after one or more peers have disconnected. It is not told which;
            a `send` to a peer that has returns GONE.
        door: who may connect; None lets everybody in, and encrypts nothing.
        setting: name of the setting for `bind`, for the error message.

    Attributes:
        address: "HOST:PORT" that it listens on.

    Raises:
        AddressInUse: the address is taken or does not belong to this machine.
    """

    def __init__(
        self,
        bind: str,
        on_message: Callable[[PeerId, PublicKey, list[Frame]], None],
        on_disconnect: Callable[[], None],
        *,
        door: Door | None,
        setting: str = "--bind",
    ) -> None:
        self._on_message = on_message
        self._on_disconnect = on_disconnect
        self._notice: asyncio.TimerHandle | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._backlogs: dict[PeerId, _Backlog] = {}
        self._context = zmq.Context()
        _scatter_identities()
        self._socket = open_socket(self._context, zmq.ROUTER)
        self._door = door
        self._authenticator: Authenticator | None = None
        if door:
            self._authenticator = Authenticator(self._context, door.admits)
            be_curve_server(self._socket, door.keys)
        self._socket.router_mandatory = True
        self._socket.router_handover = False
        try:
            self._socket.bind(tcp_endpoint(bind, self._socket))
        except zmq.ZMQError as exc:
            if self._authenticator:
                self._authenticator.close()
            self._context.destroy(linger=0)
            why = zmq.strerror(exc.errno or 0)
            raise AddressInUse(
                f"Cannot listen on {bind}: {why}. Another program may be listening there, or the "
                f"address is not one of this machine; choose another with {setting}."
            ) from exc
        endpoint = self._socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(endpoint, bytes)
        self.address = endpoint.rstrip(b"\0").decode().removeprefix("tcp://")
        self._pump = Pump(self._socket, self._receive)
        self._unfinished = Unfinished()
        watched = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED
        self._monitor = Monitor(self._socket, watched, self._watch)
        self._look = asyncio.get_running_loop().call_later(CHECK_S, self._look_again)

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

    def close(self, *, linger_ms: int = LINGER_MS) -> None:
        """Close the socket; block for at most `linger_ms` to send what is queued."""
        for timer in (self._notice, self._retry, self._look):
            if timer:
                timer.cancel()
        self._monitor.close()
        self._pump.close()
        if self._authenticator:
            self._authenticator.close()
        self._context.destroy(linger=linger_ms)

    def _receive(self, parts: list[zmq.Frame]) -> None:
        with contextlib.suppress(zmq.ZMQError):  # ZeroMQ 2 tells no connection
            self._unfinished.heard(int(parts[-1].get(zmq.SRCFD)))
        key = PublicKey(str(parts[1].get(USER_ID))) if self._door else NOBODY
        if self._door and not self._door.admits(key):  # it was admitted when it connected
            return
        self._on_message(PeerId(parts[0].bytes), key, [part.buffer for part in parts[1:]])

    def _watch(self, event: int, value: int) -> None:
        if event == zmq.EVENT_ACCEPTED:
            self._unfinished.accepted(value)
            return
        self._unfinished.closed(value)
        # ZeroMQ reports it before it forgets the peer: a send right now would still succeed.
        # Waiting also merges the notices of many peers into one.
        if not self._notice:
            self._notice = asyncio.get_running_loop().call_later(_NOTICE_S, self._notify)

    def _look_again(self) -> None:
        self._look = asyncio.get_running_loop().call_later(CHECK_S, self._look_again)
        self._end_unfinished()

    def _end_unfinished(self) -> None:
        if self._pump.has_delivered_all():  # else one that is complete would count as unfinished
            self._unfinished.end_longest()

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


def _scatter_identities() -> None:
    """Draw the number from which the next ROUTER of this thread counts its peers.

    ZeroMQ draws it by C's `rand` and leaves that unseeded, so it is the same in every process.
    """
    c = ctypes.CDLL("ucrtbase" if sys.platform == "win32" else None)
    c.srand(secrets.randbits(32))
