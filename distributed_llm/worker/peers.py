"""The neighbours of a stage: who may hand it tasks, and whether it reaches the next one. Pure.

    down --reached, hello said, welcomed--> up --lost--> down

While the link to the next worker is down, all of its addresses are dialled anew every few seconds,
and a hello is repeated where something answers: the next worker may not know the epoch yet, or a
firewall may have been opened. The coordinator is told of every change, and once at the beginning if
the link does not come up; it relays what cannot be handed on.

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
    LinkReport,
    LoadStage,
    NextStage,
    PeerHello,
    PeerWelcome,
)
from distributed_llm.common.types import PeerId
from distributed_llm.worker.events import Action, CloseLink, Greet, Log, OpenLink, PeerSay, Say

_DIAL_S = 5.0
_GREET_S = 0.3
_REPORT_S = 3.0
_MAX_KNOWN = 64
_NONE = -1


def proof(key: str, epoch: int, worker: str) -> str:
    """Return what a hello of `epoch` to `worker` says instead of the key."""
    return hmac.new(key.encode(), f"{epoch} {worker}".encode(), hashlib.sha256).hexdigest()


class Peers:
    """What one worker knows of its neighbours in the epoch that it serves.

    Attributes:
        link_up: tasks can be handed to the next worker.
    """

    def __init__(self) -> None:
        self.link_up = False
        self._epoch = _NONE
        self._proof = ""
        self._known: deque[PeerId] = deque(maxlen=_MAX_KNOWN)
        self._next: NextStage | None = None
        self._hello = PeerHello(epoch=0, key="")
        self._reached: list[Address] = []
        self._dial_at = self._greet_at = self._report_at = math.inf

    def begin(self, order: LoadStage, worker: str, now: float) -> list[Action]:
        """Forget the neighbours of older epochs and dial the next worker; `worker` is this one."""
        closing = self.end()
        self._epoch, self._proof = order.epoch, proof(order.link_key, order.epoch, worker)
        self._next = order.next_stage
        if self._next is None:
            return closing
        self._hello = PeerHello(
            epoch=order.epoch, key=proof(order.link_key, order.epoch, self._next.worker)
        )
        if not self._next.addresses:
            return [*closing, *self._report_down("it has no address")]
        self._report_at = now + _REPORT_S
        return self._dial(now)

    def end(self) -> list[Action]:
        """Forget the neighbours; there is no epoch."""
        had_link = self._next is not None
        self.link_up, self._epoch, self._next = False, _NONE, None
        self._known.clear()
        self._stop_timers()
        return [CloseLink()] if had_link else []

    def is_forged(self, hello: PeerHello) -> bool:
        """Return whether the hello is of this epoch and does not prove that it knows the key."""
        return hello.epoch == self._epoch and not hmac.compare_digest(
            hello.key.encode(), self._proof.encode()
        )

    def greeted(self, peer: PeerId, hello: PeerHello) -> list[Action]:
        """Welcome `peer` if its hello is right; others get no answer."""
        if hello.epoch != self._epoch or self.is_forged(hello):
            return []
        if peer not in self._known:
            self._known.append(peer)
        return [PeerSay(peer, PeerWelcome(epoch=hello.epoch))]

    def may_hand_tasks(self, peer: PeerId) -> bool:
        """Return whether `peer` was welcomed in this epoch."""
        return peer in self._known

    def reached(self, epoch: int, address: Address, now: float) -> list[Action]:
        """Say hello where something answers."""
        if epoch != self._epoch or self.link_up:
            return []
        if address not in self._reached:
            self._reached.append(address)
        self._greet_at = now + _GREET_S
        return [Greet(self._hello, (address,))]

    def welcomed(self, epoch: int, rtt_s: float) -> list[Action]:
        """Hand tasks on from now."""
        if epoch != self._epoch or self._next is None or self.link_up:
            return []
        self.link_up = True
        self._stop_timers()
        return [
            Say(LinkReport(epoch=epoch, up=True, rtt_s=rtt_s)),
            Log(f"hands its results to {self._next.worker} ({rtt_s * 1000:.1f} ms)"),
        ]

    def lost(self, epoch: int, now: float) -> list[Action]:
        """Hand no more tasks on; dial again after a while."""
        if epoch != self._epoch or not self.link_up:
            return []
        self.link_up = False
        self._dial_at = now + _DIAL_S
        return self._report_down("the connection was lost or is too slow")

    def next_deadline(self) -> float:
        """Return when `on_timer` is next due, clock seconds; infinity if never."""
        return min(self._dial_at, self._greet_at, self._report_at)

    def on_timer(self, now: float) -> list[Action]:
        """Do what is due."""
        actions: list[Action] = []
        if self._report_at <= now:
            self._report_at = math.inf
            actions += self._report_down("nobody answers at its addresses")
        if self._dial_at <= now:
            actions += self._dial(now)
        elif self._greet_at <= now:
            self._greet_at = now + _GREET_S
            actions.append(Greet(self._hello, tuple(self._reached)))
        return actions

    def _dial(self, now: float) -> list[Action]:
        assert self._next is not None
        self._reached.clear()
        self._greet_at, self._dial_at = math.inf, now + _DIAL_S
        return [OpenLink(self._epoch, self._next.addresses)]

    def _report_down(self, why: str) -> list[Action]:
        assert self._next is not None
        text = f"cannot hand its results to {self._next.worker}: {why}; the coordinator relays them"
        return [Say(LinkReport(epoch=self._epoch, up=False)), Log(text)]

    def _stop_timers(self) -> None:
        self._reached.clear()
        self._dial_at = self._greet_at = self._report_at = math.inf
