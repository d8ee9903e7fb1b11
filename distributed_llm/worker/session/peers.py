"""The neighbours of a stage: who may hand it tasks, and whether it reaches the next one. Pure.

    down --reached, hello said, welcomed--> up --lost--> down

While the link to the next worker is down, all of its addresses are dialled anew every few seconds,
and a hello is repeated where something answers: the next worker may not know the epoch yet, or a
firewall may have been opened. The coordinator is told of every change, and once at the beginning if
the link does not come up; it relays what cannot be handed on. When the link is up it is probed with
one large message, and how fast that was is told as well.

The key of an epoch is known to the coordinator and the workers of a pipeline. A hello does not show
it: it proves that its sender knows it, and to whom it speaks, because behind an address of another
network may be somebody else in this one, even this worker itself.
"""

import hashlib
import hmac
import math
from collections import deque

from distributed_llm.common.messages import (
    Address,
    Addresses,
    LinkReport,
    LoadStage,
    PeerHello,
    PeerProbe,
    PeerProbed,
    PeerWelcome,
)
from distributed_llm.common.tensors import frame_of_bytes
from distributed_llm.common.types import PeerId
from distributed_llm.worker.session.events import Action, Log, Send
from distributed_llm.worker.session.link_events import (
    CloseLink,
    Greet,
    LinkId,
    OpenLink,
    SendOverLink,
    SendToPeer,
)

PROBE_BYTES = 256 * 1024

_DIAL_S = 5.0
_GREET_S = 0.3
_REPORT_S = 3.0
_MAX_KNOWN = 64
_MAX_BYTES_PER_S = 1e12


def proof(key: str, epoch: int, worker: str) -> str:
    """Return what a hello of `epoch` to `worker` says instead of the key."""
    return hmac.new(key.encode(), f"{epoch} {worker}".encode(), hashlib.sha256).hexdigest()


class Dialling:
    """A link until it is up: hellos, repeated where something answers.

    Args:
        key: of the link's epoch.
        worker: at the other end.
        addresses: where that may be reached.
    """

    def __init__(self, link: LinkId, key: str, worker: str, addresses: Addresses) -> None:
        self._link = link
        self._hello = PeerHello(epoch=link.epoch, key=proof(key, link.epoch, worker))
        self._addresses = addresses
        self._reached: list[Address] = []
        self._greet_at = math.inf

    def dial(self) -> list[Action]:
        """Dial all addresses, anew if they were dialled before."""
        self.stop()
        return [OpenLink(self._link, self._addresses)]

    def stop(self) -> None:
        """Say no more hellos."""
        self._reached.clear()
        self._greet_at = math.inf

    def reached(self, address: Address, now: float) -> list[Action]:
        """Say hello where something answers."""
        if address not in self._reached:
            self._reached.append(address)
        self._greet_at = now + _GREET_S
        return [Greet(self._link, self._hello, (address,))]

    def next_deadline(self) -> float:
        """Return when `on_timer` is next due, clock seconds; infinity if never."""
        return self._greet_at

    def on_timer(self, now: float) -> list[Action]:
        """Do what is due."""
        if self._greet_at > now:
            return []
        self._greet_at = now + _GREET_S
        return [Greet(self._link, self._hello, tuple(self._reached))]


class Peers:
    """What one worker knows of its neighbours in one epoch.

    Args:
        order: for the stage.
        worker: this one.

    Attributes:
        link_up: tasks can be handed to the next worker.
    """

    def __init__(self, order: LoadStage, worker: str) -> None:
        self.link_up = False
        self._epoch = order.epoch
        self._link = LinkId(order.epoch)
        self._proof = proof(order.link_key, order.epoch, worker)
        self._known: deque[PeerId] = deque(maxlen=_MAX_KNOWN)
        self._next = order.next_stage
        self._dialling: Dialling | None = None
        if self._next is not None and self._next.addresses:
            self._dialling = Dialling(
                self._link, order.link_key, self._next.worker, self._next.addresses
            )
        self._dial_at = self._report_at = math.inf
        self._rtt_s = 0.0
        self._probed_at: float | None = None

    def begin(self, now: float) -> list[Action]:
        """Dial the next worker."""
        if self._dialling is None:
            return self._report_down("it has no address") if self._next else []
        self._report_at = now + _REPORT_S
        return self._dial(now)

    def end(self) -> list[Action]:
        """Forget the neighbours; this is not used any more."""
        self._known.clear()
        self.link_up = False
        self._stop_timers()
        return [CloseLink(self._link)] if self._next else []

    # -------------------------------------------------------------- who hands tasks

    def is_forged(self, hello: PeerHello) -> bool:
        """Return whether a hello of this epoch does not prove that it knows the key."""
        return not hmac.compare_digest(hello.key.encode(), self._proof.encode())

    def greeted(self, peer: PeerId, hello: PeerHello) -> list[Action]:
        """Welcome `peer` if its hello is right; others get no answer."""
        if self.is_forged(hello):
            return []
        if peer not in self._known:
            self._known.append(peer)
        return [SendToPeer(peer, PeerWelcome(epoch=self._epoch))]

    def knows(self, peer: PeerId) -> bool:
        """Return whether `peer` was welcomed in this epoch: only who was may send anything."""
        return peer in self._known

    def probed_by(self, peer: PeerId) -> list[Action]:
        """Tell `peer` that its probe has arrived."""
        return [SendToPeer(peer, PeerProbed(epoch=self._epoch))]

    # -------------------------------------------------------------- to the next worker

    def reached(self, address: Address, now: float) -> list[Action]:
        """Say hello where something answers."""
        if self.link_up or self._dialling is None:
            return []
        return self._dialling.reached(address, now)

    def welcomed(self, rtt_s: float, now: float) -> list[Action]:
        """Hand tasks on from now; see how fast the link is."""
        if self._next is None or self.link_up:
            return []
        self.link_up, self._rtt_s, self._probed_at = True, rtt_s, now
        self._stop_timers()
        spec, zeros = frame_of_bytes(bytes(PROBE_BYTES))
        return [
            Send(LinkReport(epoch=self._epoch, up=True, rtt_s=rtt_s)),
            Log(f"hands its results to {self._next.worker} ({rtt_s * 1000:.1f} ms)"),
            SendOverLink(self._link, PeerProbe(epoch=self._epoch, tensors=(spec,)), (zeros,)),
        ]

    def probed(self, now: float) -> list[Action]:
        """Tell how fast the link is: the probe has arrived."""
        if not self.link_up or self._probed_at is None:
            return []
        took_s, self._probed_at = now - self._probed_at, None
        took_s = max(took_s - self._rtt_s, took_s / 10, PROBE_BYTES / _MAX_BYTES_PER_S)
        rate = PROBE_BYTES / took_s
        report = LinkReport(epoch=self._epoch, up=True, rtt_s=self._rtt_s, bytes_per_s=rate)
        return [Send(report)]

    def lost(self, now: float) -> list[Action]:
        """Hand no more tasks on; dial again after a while."""
        if not self.link_up:
            return []
        self.link_up = False
        self._dial_at = now + _DIAL_S
        return self._report_down("the connection was lost or is too slow")

    def next_deadline(self) -> float:
        """Return when `on_timer` is next due, clock seconds; infinity if never."""
        greet_at = self._dialling.next_deadline() if self._dialling else math.inf
        return min(self._dial_at, greet_at, self._report_at)

    def on_timer(self, now: float) -> list[Action]:
        """Do what is due."""
        actions: list[Action] = []
        if self._report_at <= now:
            self._report_at = math.inf
            actions += self._report_down("nobody answers at its addresses")
        if self._dial_at <= now:
            actions += self._dial(now)
        elif self._dialling:
            actions += self._dialling.on_timer(now)
        return actions

    def _dial(self, now: float) -> list[Action]:
        assert self._dialling is not None
        self._dial_at = now + _DIAL_S
        return self._dialling.dial()

    def _report_down(self, why: str) -> list[Action]:
        assert self._next is not None
        text = f"cannot hand its results to {self._next.worker}: {why}; the coordinator relays them"
        return [Send(LinkReport(epoch=self._epoch, up=False)), Log(text)]

    def _stop_timers(self) -> None:
        if self._dialling:
            self._dialling.stop()
        self._dial_at = self._report_at = math.inf
