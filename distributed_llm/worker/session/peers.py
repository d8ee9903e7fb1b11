"""The neighbours of a stage: who may send it tasks, and its link to the next worker. Pure.

    down --connected, hello said, welcomed--> up --lost--> down

While the link is down, all addresses of the next worker are dialled again every few seconds, for a
firewall may have been opened meanwhile. Every change is reported to the coordinator, and once at
the beginning that the link has not come up; the coordinator then relays the results. When the link
comes up, its bandwidth is measured with one large message, and reported as well.
"""

import hmac
import math
from collections import deque

from distributed_llm.common.keys import PublicKey
from distributed_llm.common.messages import (
    Address,
    LinkReport,
    LoadStage,
    PeerHello,
    PeerProbe,
    PeerProbed,
    PeerWelcome,
)
from distributed_llm.common.tensors import frame_of_bytes
from distributed_llm.common.types import PeerId
from distributed_llm.common.wording import duration_text
from distributed_llm.worker.session.dialling import Dialling, proof
from distributed_llm.worker.session.events import Action, Log, Send
from distributed_llm.worker.session.link_events import (
    CloseLink,
    LinkId,
    SendOverLink,
    SendToPeer,
)

PROBE_BYTES = 256 * 1024
"""Size of the message that measures the bandwidth of a link, bytes."""

_DIAL_EVERY_S = 5.0
_REPORT_DOWN_AFTER_S = 3.0
_MAX_WELCOMED = 64
_MAX_BYTES_PER_S = 1e12


class Peers:
    """The neighbours of a stage of one epoch.

    Args:
        order: to load the stage; it names the next worker, and the key of the epoch's links.
        worker: the name of this worker.

    Attributes:
        link_up: whether tasks can be sent to the next worker directly.
    """

    def __init__(self, order: LoadStage, worker: str) -> None:
        self.link_up = False
        self._epoch = order.epoch
        self._link = LinkId(order.epoch)
        self._proof = proof(order.link_key, order.epoch, worker)
        self._welcomed: deque[PeerId] = deque(maxlen=_MAX_WELCOMED)
        self._next = order.next_stage
        self._senders = frozenset(order.senders)
        self._dialling: Dialling | None = None
        if self._next is not None and self._next.addresses:
            self._dialling = Dialling(
                self._link,
                order.link_key,
                self._next.worker,
                self._next.addresses,
                self._next.key,
            )
        self._dial_at = self._report_at = math.inf
        self._rtt_s = 0.0
        self._probed_at: float | None = None

    def begin(self, now: float) -> list[Action]:
        """Dial the next worker."""
        if self._dialling is None:
            return self._report_down("it has no address") if self._next else []
        self._report_at = now + _REPORT_DOWN_AFTER_S
        return self._dial(now)

    def end(self) -> list[Action]:
        """Close the link and forget the neighbours; this must not be used any more."""
        self._welcomed.clear()
        self.link_up = False
        self._stop_timers()
        return [CloseLink(self._link)] if self._next else []

    # -------------------------------------------------------------- workers that dialled this one

    def admits(self, key: PublicKey) -> bool:
        """Return whether the worker that holds `key` may connect, to send what is of this epoch."""
        return key in self._senders

    def is_forged(self, hello: PeerHello) -> bool:
        """Return whether a hello of this epoch does not prove that its sender knows the key."""
        return not hmac.compare_digest(hello.key.encode(), self._proof.encode())

    def greeted(self, peer: PeerId, hello: PeerHello) -> list[Action]:
        """Welcome `peer` if its hello proves that it knows the key; else do not answer."""
        if self.is_forged(hello):
            return []
        if peer not in self._welcomed:
            self._welcomed.append(peer)
        return [SendToPeer(peer, PeerWelcome(epoch=self._epoch))]

    def knows(self, peer: PeerId) -> bool:
        """Return whether `peer` was welcomed, and so may send messages of this epoch."""
        return peer in self._welcomed

    def probed_by(self, peer: PeerId) -> list[Action]:
        """Confirm that a probe of `peer` has arrived."""
        return [SendToPeer(peer, PeerProbed(epoch=self._epoch))]

    # -------------------------------------------------------------- the link to the next worker

    def reached(self, address: Address, now: float) -> list[Action]:
        """Say hello at an address that is connected."""
        if self.link_up or self._dialling is None:
            return []
        return self._dialling.reached(address, now)

    def welcomed(self, rtt_s: float, now: float) -> list[Action]:
        """Use the link from now on, and measure its bandwidth.

        Args:
            rtt_s: round-trip time of the handshake, seconds.
        """
        if self._next is None or self.link_up:
            return []
        self.link_up, self._rtt_s, self._probed_at = True, rtt_s, now
        self._stop_timers()
        spec, zeros = frame_of_bytes(bytes(PROBE_BYTES))
        return [
            Send(LinkReport(epoch=self._epoch, up=True, rtt_s=rtt_s)),
            Log(f"sending results to {self._next.worker} directly ({duration_text(rtt_s)})"),
            SendOverLink(self._link, PeerProbe(epoch=self._epoch, tensors=(spec,)), (zeros,)),
        ]

    def probed(self, now: float) -> list[Action]:
        """Report the link's bandwidth: the next worker has received the probe.

        The round-trip time of the handshake is taken off the time that the probe took, for it is
        latency; but never more than nine tenths of it.
        """
        if not self.link_up or self._probed_at is None:
            return []
        took_s, self._probed_at = now - self._probed_at, None
        took_s = max(took_s - self._rtt_s, took_s / 10, PROBE_BYTES / _MAX_BYTES_PER_S)
        rate = PROBE_BYTES / took_s
        report = LinkReport(epoch=self._epoch, up=True, rtt_s=self._rtt_s, bytes_per_s=rate)
        return [Send(report)]

    def lost(self, now: float) -> list[Action]:
        """Stop using the link, and dial again after a while."""
        if not self.link_up:
            return []
        self.link_up = False
        self._dial_at = now + _DIAL_EVERY_S
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
        self._dial_at = now + _DIAL_EVERY_S
        return self._dialling.dial()

    def _report_down(self, why: str) -> list[Action]:
        assert self._next is not None
        text = f"{self._next.worker} is not reached: {why}; results go through the coordinator"
        return [Send(LinkReport(epoch=self._epoch, up=False)), Log(text)]

    def _stop_timers(self) -> None:
        if self._dialling:
            self._dialling.stop()
        self._dial_at = self._report_at = math.inf
