"""A connection to a host by all of its addresses: the first one that answers is used.

A name may stand for addresses of both IPv4 and IPv6, and not all of them need work: the host may
listen on one kind only, or the way to the other be broken. So all are dialled at once. While none
answers, the name is looked up again, for its addresses may change.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import assert_never

from distributed_llm.common.addresses import addresses_of, is_name
from distributed_llm.common.errors import (
    ConnectionFailed,
    CoordinatorUnreachable,
    NotAllowed,
    NotEnrolled,
    WrongServerKey,
)
from distributed_llm.common.keys import fingerprint
from distributed_llm.common.tensors import Frame
from distributed_llm.common.transport import Dealer, Login, Rejection

_LOOK_UP_EVERY_S = 2.0
"""Time between two looks for the addresses of a name of which none answers, seconds."""


class Connection:
    """A connection to a ROUTER, for one session, by whichever address answers first.

    Args:
        address: "HOST:PORT" of the ROUTER.
        addresses: what that stands for as far as is known, "HOST:PORT"s with IP addresses.
        on_message: called with each message.
        on_connect: called when one address has answered ZeroMQ's handshake.
        on_disconnect: called when that connection is lost, as by `Dealer`.
        login: the keys of both ends; None without keys.
        on_rejected: called if no address accepts this end, or is accepted by it, as by `Dealer`.
        look_up: returns what an address stands for now.
        every_s: time between two look-ups of a name of which no address answers.

    Raises:
        ConnectionFailed: none of the addresses has this form.
    """

    def __init__(
        self,
        address: str,
        addresses: Sequence[str],
        on_message: Callable[[list[Frame]], None],
        on_connect: Callable[[], None],
        on_disconnect: Callable[[], None],
        *,
        login: Login | None,
        on_rejected: Callable[[Rejection], None],
        look_up: Callable[[str], Awaitable[Sequence[str]]] = addresses_of,
        every_s: float = _LOOK_UP_EVERY_S,
    ) -> None:
        self._address = address
        self._on_message = on_message
        self._on_connect = on_connect
        self._on_disconnect = on_disconnect
        self._login = login
        self._on_rejected = on_rejected
        self._look_up = look_up
        self._every_s = every_s
        self._dials: dict[str, Dealer] = {}
        self._rejected: dict[str, Rejection] = {}
        self._chosen: Dealer | None = None
        self._was_reached = False  # by a connection that is closed
        self._looking: asyncio.Task[None] | None = None
        self._dial(addresses)
        if is_name(address):
            self._looking = asyncio.get_running_loop().create_task(self._look_again())

    @property
    def reached(self) -> bool:
        """Whether something accepts connections at one of the addresses."""
        return self._was_reached or any(dealer.reached for dealer in self._dials.values())

    @property
    def local_host(self) -> str:
        """IP address of this end of the connection; empty before it was made."""
        return self._chosen.local_host if self._chosen else ""

    def send(self, frames: Sequence[Frame]) -> None:
        """Queue a message; never blocks. Does nothing before it is connected, or after it is over.

        Raises:
            LocalProtocolError: too many messages wait already.
        """
        if self._chosen:
            self._chosen.send(frames)

    def deliver_waiting(self) -> None:
        """Call back with the messages that have arrived, now, but for more than a few thousand."""
        if self._chosen:
            self._chosen.deliver_waiting()

    def close(self) -> None:
        """Close the connection; what is queued is still sent, for a moment, as by `Dealer`."""
        self._stop_looking()
        for dealer in self._dials.values():
            dealer.close()

    def _dial(self, addresses: Sequence[str]) -> None:
        """Dial these addresses and no others any more.

        Raises:
            ConnectionFailed: none of them has the form of an address.
        """
        failure: ConnectionFailed | None = None
        dials: dict[str, Dealer] = {}
        for address in addresses:
            try:
                dials[address] = self._dials.get(address) or self._dialled(address)
            except ConnectionFailed as exc:
                failure = exc
        if failure is not None and not dials:
            raise failure
        before, self._dials = self._dials, dials
        for address, dealer in before.items():
            if address not in dials:
                self._drop(dealer)

    def _dialled(self, address: str) -> Dealer:
        return Dealer(
            address,
            self._on_message,
            lambda: self._connected(address),
            self._on_disconnect,
            login=self._login,
            on_rejected=lambda why: self._reject(address, why),
        )

    def _connected(self, address: str) -> None:
        self._stop_looking()
        self._chosen = self._dials[address]
        self._dial([address])
        self._on_connect()

    def _reject(self, address: str, why: Rejection) -> None:
        self._rejected[address] = why
        if self._rejected.keys() >= self._dials.keys():
            self._stop_looking()
            self._on_rejected(min(self._rejected.values(), key=lambda one: one.value))

    def _drop(self, dealer: Dealer) -> None:
        self._was_reached |= dealer.reached
        dealer.close(linger_ms=0)

    def _stop_looking(self) -> None:
        if self._looking:
            self._looking.cancel()

    async def _look_again(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            with contextlib.suppress(CoordinatorUnreachable, ConnectionFailed):  # for now
                self._dial(await self._look_up(self._address))


def rejection_error(address: str, login: Login | None, why: Rejection) -> NotAllowed:
    """Return what to tell people whose connection was rejected.

    Args:
        address: "HOST:PORT" of the coordinator.
        login: that was used.
    """
    again = "run `dllm token create` where the coordinator runs, and here the line that it prints."
    if login is None:
        return NotAllowed(
            f"The coordinator at {address} uses keys, or is none. Leave --insecure out. To "
            f"enrol this machine, {again}"
        )
    match why:
        case Rejection.OUR_KEY:
            return NotEnrolled(
                f"The coordinator at {address} does not know the key of this machine: it was "
                f"removed there, or all machines have to join anew. To enrol it, {again}"
            )
        case Rejection.SERVER_KEY:
            return WrongServerKey(
                f"What answers at {address} does not hold the key {fingerprint(login.server)} by "
                "which this machine knows the coordinator there: another coordinator has that "
                "address now, it was set up anew, it uses no keys any more (--insecure), or "
                f"somebody is in between. If that is as it should be, {again} Where it was started "
                "with --insecure, give that here as well."
            )
        case Rejection.NO_KEYS:
            return NotAllowed(
                f"What answers at {address} uses no keys: it is no coordinator, or one that was "
                "started with --insecure. Check the address, or give --insecure here as well."
            )
        case _:
            assert_never(why)
