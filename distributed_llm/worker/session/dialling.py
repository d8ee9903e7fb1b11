"""A link to another worker until it is up: dialling, and hellos that prove who sends them. Pure.

The coordinator and the workers of a pipeline know the key of its epoch. A hello does not contain
the key. It contains a proof that the sender knows the key and means this receiver: an address of
another network may belong to a different worker in this one, even to the sender itself.
"""

import hashlib
import hmac
import math

from distributed_llm.common.keys import PublicKey
from distributed_llm.common.messages import Address, Addresses, PeerHello
from distributed_llm.common.types import Epoch
from distributed_llm.worker.session.events import Action
from distributed_llm.worker.session.link_events import Greet, LinkId, OpenLink

_GREET_EVERY_S = 0.3


def proof(key: str, epoch: Epoch, worker: str) -> str:
    """Return what a hello of `epoch` to `worker` contains: an HMAC-SHA256, in hexadecimal."""
    return hmac.new(key.encode(), f"{epoch} {worker}".encode(), hashlib.sha256).hexdigest()


class Dialling:
    """Dials all addresses of a worker, and says hello on every connection until it is stopped.

    Hellos are repeated because the other worker may not know the epoch yet.

    Args:
        link: that is to come up.
        key: of the link's epoch.
        worker: at the other end.
        addresses: where that worker may be reached.
        server: the key that it has to hold.
    """

    def __init__(
        self, link: LinkId, key: str, worker: str, addresses: Addresses, server: PublicKey
    ) -> None:
        self._link = link
        self._hello = PeerHello(epoch=link.epoch, key=proof(key, link.epoch, worker))
        self._addresses = addresses
        self._server = server
        self._reached: list[Address] = []
        self._greet_at = math.inf

    def dial(self) -> list[Action]:
        """Dial all addresses; connections that were dialled before are closed."""
        self.stop()
        return [OpenLink(self._link, self._addresses, self._server)]

    def stop(self) -> None:
        """Say no more hellos."""
        self._reached.clear()
        self._greet_at = math.inf

    def reached(self, address: Address, now: float) -> list[Action]:
        """Say hello at an address that is connected."""
        if address not in self._reached:
            self._reached.append(address)
        self._greet_at = now + _GREET_EVERY_S
        return [Greet(self._link, self._hello, (address,))]

    def next_deadline(self) -> float:
        """Return when `on_timer` is next due, clock seconds; infinity if never."""
        return self._greet_at

    def on_timer(self, now: float) -> list[Action]:
        """Do what is due."""
        if self._greet_at > now:
            return []
        self._greet_at = now + _GREET_EVERY_S
        return [Greet(self._link, self._hello, tuple(self._reached))]
