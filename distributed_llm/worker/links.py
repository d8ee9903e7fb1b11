"""The sockets between workers: one ROUTER for workers that dial this one, and links to others.

This is the edge of `session.peers` and `session.kv_sender`; it decides nothing. A link is dialled
at all of its addresses at once. The connection on which a hello is welcomed first becomes the link,
and the others are closed.
"""

import asyncio
import ipaddress
import logging
from collections.abc import Callable, Sequence
from typing import assert_never

from distributed_llm.common import codec
from distributed_llm.common.addresses import address_text, has_ipv6, hosts_for_others, ip_of
from distributed_llm.common.errors import (
    ConnectionFailed,
    DistributedLLMError,
    LocalProtocolError,
    ProtocolMismatch,
    RemoteProtocolError,
)
from distributed_llm.common.keys import KeyPair, PublicKey
from distributed_llm.common.messages import (
    Address,
    Addresses,
    KVTaken,
    PeerHello,
    PeerProbed,
    PeerWelcome,
    ReadChunk,
    ToNextWorker,
    ToPreviousWorker,
    ToReader,
)
from distributed_llm.common.tensors import Frame
from distributed_llm.common.transport import Dealer, Door, Login, Rejection, Router
from distributed_llm.common.types import PeerId
from distributed_llm.common.units import split_address
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

logger = logging.getLogger(__name__)

_MAX_OUTBOX = 32
"""Messages that may wait for the network on one link; a link with more is closed."""

_MAX_ADDRESSES = 16

_REDIAL_S = 0.1
"""Time until a worker is dialled again that did not admit the key of this one, seconds."""


def bind_for(bind: str, coordinator: str, addresses: Sequence[str], *, alone: bool) -> str:
    """Return the "HOST:PORT" to listen on for other workers.

    Listening on all networks becomes listening on loopback if the coordinator is reached over
    loopback and by nobody else: all other workers are on this machine then, and no port need be
    open to others. It includes IPv6 if the coordinator may be reached over that, and this machine
    has it.

    Args:
        bind: "HOST:PORT" as configured.
        coordinator: "HOST:PORT" of the coordinator.
        addresses: what that stands for, "HOST:PORT"s with IP addresses.
        alone: whether no other machine reaches the coordinator if it is on this one.
    """
    host, port = split_address(bind)
    boss, _ = split_address(coordinator)
    wanted, there = ip_of(host), ip_of("127.0.0.1" if boss == "localhost" else boss)
    if wanted is None or not wanted.is_unspecified:
        return bind
    if there is not None and there.is_loopback and alone:
        return address_text(there, port)
    kinds = {ip.version for one in addresses if (ip := ip_of(split_address(one)[0])) is not None}
    return f"[::]:{port}" if kinds == {6} or (6 in kinds and has_ipv6()) else bind


def reachable_at(bound: str, local_host: str) -> Addresses:
    """Return the "HOST:PORT" at which other workers may reach this one, best first.

    Args:
        bound: "HOST:PORT" that is listened on.
        local_host: IP address of this machine that the coordinator sees. It comes first, then the
            addresses of all networks, and loopback last, for workers on the same machine.
    """
    host, port = split_address(bound)
    hosts = hosts_for_others(ipaddress.ip_address(host), [local_host])
    return tuple(address_text(one, port) for one in hosts)[:_MAX_ADDRESSES]


class Links:
    """The sockets between one worker and others; to be made and used in a running event loop.

    Args:
        bind: "HOST:PORT" to listen on for other workers; port 0 takes any free one.
        on_event: called with each event, never from within a method of this class except `open`.
        keys: of this worker; None without keys.
        admits: returns whether the worker that holds a key may connect.
        on_read: called with each request for weights, its sender and the key of that.

    Attributes:
        address: "HOST:PORT" that is listened on.

    Raises:
        AddressInUse: the address is taken, or is not one of this machine.
    """

    def __init__(
        self,
        bind: str,
        on_event: Callable[[Event], None],
        *,
        keys: KeyPair | None,
        admits: Callable[[PublicKey], bool],
        on_read: Callable[[PeerId, PublicKey, ReadChunk], None],
    ) -> None:
        self._on_event = on_event
        self._links: dict[LinkId, _Link] = {}
        self._keys = keys
        self._on_read = on_read
        self._router = Router(
            bind,
            self._on_message,
            lambda: None,
            door=Door(keys, admits) if keys else None,
            setting="peer_bind",
        )
        self.address = self._router.address

    # -------------------------------------------------------------- to other workers

    def open(self, link: LinkId, addresses: Addresses, key: PublicKey) -> None:
        """Dial another worker at all of `addresses`; close the link of that name.

        Args:
            key: that the other worker has to hold; not used without keys.
        """
        self.close_link(link)
        login = Login(key, self._keys) if self._keys else None
        self._links[link] = _Link(link, addresses, login, self._on_event)

    def greet(self, link: LinkId, hello: PeerHello, addresses: Addresses) -> None:
        """Send a hello to those of `addresses` that are connected."""
        if opened := self._links.get(link):
            opened.greet(hello, addresses)

    def send(self, link: LinkId, message: ToNextWorker, frames: tuple[Frame, ...]) -> None:
        """Send over a link that is up; if it is congested, close it and post `LinkDown`.

        Raises:
            LocalProtocolError: the message's header is too long.
        """
        encoded = codec.encode(message, frames)
        if opened := self._links.get(link):
            opened.send(encoded)

    def close_link(self, link: LinkId) -> None:
        """Close all connections of a link; what waits to be sent is dropped."""
        if opened := self._links.pop(link, None):
            opened.close()

    # -------------------------------------------------------------- from other workers

    def answer(
        self, peer: PeerId, message: ToPreviousWorker | ToReader, frames: tuple[Frame, ...] = ()
    ) -> None:
        """Answer a worker that dialled this one; does nothing if it is gone."""
        self._router.send(peer, codec.encode(message, frames))

    def close(self) -> None:
        """Close all sockets; what waits to be sent is dropped."""
        for link in list(self._links):
            self.close_link(link)
        self._router.close(linger_ms=0)

    def _on_message(self, peer: PeerId, key: PublicKey, frames: list[Frame]) -> None:
        try:
            message, tensors = codec.to_next_worker.decode(frames)
        except (ProtocolMismatch, RemoteProtocolError) as exc:
            self._on_event(PeerGarbage(exc, peer))
        else:
            if isinstance(message, ReadChunk):
                self._on_read(peer, key, message)
            else:
                self._on_event(PeerReceived(peer, message, tensors))


class _Link:
    """The connections to one other worker: several until one of them is welcomed, then that one."""

    def __init__(
        self,
        link: LinkId,
        addresses: Addresses,
        login: Login | None,
        on_event: Callable[[Event], None],
    ) -> None:
        self.link = link
        self.login = login
        self.on_event = on_event
        self._loop = asyncio.get_running_loop()
        self._dials: dict[Address, _Dial] = {}
        self._up: _Dial | None = None
        self._redials: dict[Address, asyncio.TimerHandle] = {}
        for address in dict.fromkeys(addresses):
            self._dial(address)

    def _dial(self, address: Address) -> None:
        self._redials.pop(address, None)
        try:
            if split_address(address)[1]:
                self._dials[address] = _Dial(self, address)
        except (ValueError, ConnectionFailed) as exc:
            logger.warning("cannot dial %r: %s", address, exc)

    def greet(self, hello: PeerHello, addresses: Addresses) -> None:
        for address in addresses:
            if dial := self._dials.get(address):
                dial.greet(hello)

    def send(self, encoded: list[Frame]) -> None:
        if self._up is None:
            return
        try:
            self._up.dealer.send(encoded)
        except LocalProtocolError:
            self._loop.call_soon(self.lose, self._up)

    def close(self) -> None:
        dials, self._dials, self._up = self._dials, {}, None
        for dial in dials.values():
            dial.close()
        self._stop_redialling()

    def received(self, dial: "_Dial", message: ToPreviousWorker, rtt_s: float) -> None:
        if message.epoch != self.link.epoch:
            return
        match message:
            case PeerWelcome():
                self._welcomed(dial, rtt_s)
            case PeerProbed() | KVTaken():
                if dial is self._up:
                    self.on_event(LinkReceived(self.link, message))
            case _:
                assert_never(message)

    def unread(self, dial: "_Dial", error: DistributedLLMError) -> None:
        self.on_event(PeerGarbage(error, link=self.link if dial is self._up else None))

    def _welcomed(self, dial: "_Dial", rtt_s: float) -> None:
        if self._up is None:
            self._up = self._dials.pop(dial.address)
            for other in self._dials.values():
                other.close()
            self._dials = {dial.address: dial}
            self._stop_redialling()
            self.on_event(LinkUp(self.link, rtt_s))

    def rejected(self, dial: "_Dial", why: Rejection) -> None:
        """Dial again after a moment: the other worker may not know yet who is to connect."""
        self.lose(dial)
        if why is Rejection.OUR_KEY and self._up is None:
            again = self._loop.call_later(_REDIAL_S, self._dial, dial.address)
            self._redials[dial.address] = again

    def _stop_redialling(self) -> None:
        for redial in self._redials.values():
            redial.cancel()
        self._redials.clear()

    def lose(self, dial: "_Dial") -> None:
        if self._dials.get(dial.address) is not dial:
            return
        del self._dials[dial.address]
        dial.close()
        if self._up is dial:
            self._up = None
            self.on_event(LinkDown(self.link))


class _Dial:
    """One connection to one address of another worker."""

    def __init__(self, link: _Link, address: Address) -> None:
        self.address = address
        self._link = link
        self._loop = asyncio.get_running_loop()
        self._greeted_at = 0.0
        self.dealer = Dealer(
            address,
            self._on_message,
            lambda: link.on_event(LinkReached(link.link, address)),
            lambda: link.lose(self),
            login=link.login,
            on_rejected=lambda why: link.rejected(self, why),
            max_outbox=_MAX_OUTBOX,
        )

    def greet(self, hello: PeerHello) -> None:
        self._greeted_at = self._loop.time()
        self.dealer.send(codec.encode(hello))

    def close(self) -> None:
        self.dealer.close(linger_ms=0)

    def _on_message(self, frames: list[Frame]) -> None:
        try:
            message, _ = codec.to_previous_worker.decode(frames)
        except (ProtocolMismatch, RemoteProtocolError) as exc:
            self._link.unread(self, exc)
        else:
            self._link.received(self, message, self._loop.time() - self._greeted_at)
