"""How the KV cache of layers that move gets from one epoch to the next, on one worker. Pure.

What a worker sends, it sends in one `Transfer` per range of layers; what it is sent arrives in one
`_Arrival` per range, of one worker each. Once it was told that no step runs, the stage of the new
epoch inherits the KV cache as soon as all that arrives has ended.

Whatever fails is told once, and ends all of it here: the coordinator then takes back what it asked
for, or begins the new epoch without.
"""

import math
from dataclasses import dataclass

from distributed_llm.common.messages import (
    CopyKV,
    KVCopied,
    KVEnd,
    KVFailed,
    KVPieces,
    KVTaken,
    TookOver,
)
from distributed_llm.common.tensors import Frame
from distributed_llm.common.types import LayerRange, PeerId, size_text
from distributed_llm.worker.session.events import (
    Action,
    AssembleKV,
    ExportKV,
    ImportKV,
    KVExported,
    KVImported,
    KVOrderFailed,
    Log,
    Send,
)
from distributed_llm.worker.session.link_events import (
    LinkChange,
    LinkDown,
    LinkReached,
    LinkReceived,
    LinkUp,
    SendToPeer,
)
from distributed_llm.worker.session.transfer import WINDOW, Transfer

_ARRIVE_S = 30.0
"""How long nothing may arrive of what is to be inherited; a sender gives up long before."""


@dataclass
class _Arrival:
    """Layers whose KV cache another worker sends.

    Attributes:
        sender: the first that sent any; nobody else may.
        arrived: number of the latest message.
        kept: number of the latest that was imported.
        ended: the latest is the last.
    """

    sender: PeerId | None = None
    arrived: int = 0
    kept: int = 0
    ended: bool = False


class KVHandover:
    """What one worker does about the KV cache of an epoch that is to be.

    Args:
        imports: of the stage that is loaded here for the epoch.
        inherits: there is such a stage.

    Attributes:
        over: something failed, and that was told; nothing more is done.
    """

    def __init__(
        self, session: int, epoch: int, imports: tuple[LayerRange, ...] = (), *, inherits: bool
    ) -> None:
        self.epoch = epoch
        self.over = False
        self._session = session
        self._inherits = inherits
        self._arrivals = {layers: _Arrival() for layers in imports}
        self._transfers: dict[LayerRange, Transfer] = {}
        self._copied = self._taking_over = self._inheriting = self._took_over = False
        self._arrive_by = math.inf

    @property
    def is_inheriting(self) -> bool:
        """Whether the stage was told to take over and has not done so."""
        return self._inherits and self._taking_over and not self._took_over and not self.over

    def copy(self, order: CopyKV, now: float) -> list[Action]:
        """Begin to send."""
        if self.over or self._transfers:
            return [Log(f"ignored a second order to copy for plan {self.epoch}", "warning")]
        for what in order.transfers:
            self._transfers[what.layers] = Transfer(
                self._session, self.epoch, order.link_key, what, now
            )
        named = ", ".join(f"{what.layers} to {what.worker}" for what in order.transfers)
        actions: list[Action] = [Log(f"sends the KV cache of layers {named} (plan {self.epoch})")]
        for transfer in self._transfers.values():
            actions += transfer.begin()
        return actions

    def take_over(self, now: float) -> list[Action]:
        """No step of the served epoch runs any more: send the rest, inherit what has arrived."""
        if self.over or self._taking_over:
            return []
        self._taking_over = True
        self._wait_for_arrivals(now)
        actions: list[Action] = []
        for transfer in self._transfers.values():
            actions += transfer.take_rest()
        return [*actions, *self._inherit()]

    def end(self) -> list[Action]:
        """Close the links; this is not used any more."""
        transfers, self._transfers = self._transfers, {}
        return [action for transfer in transfers.values() for action in transfer.end()]

    def fail(self, code: str, message: str, worker: str = "") -> list[Action]:
        """Tell that it cannot be done, once, and do nothing more.

        Args:
            worker: to whom nothing can be sent; empty if nothing can be taken over here.
        """
        if self.over:
            return []
        self.over = True
        told = KVFailed(epoch=self.epoch, worker=worker, code=code, message=message[:4096])
        return [*self.end(), Send(told), Log(f"moving layers failed: {message}", "warning")]

    def failed(self, event: KVOrderFailed) -> list[Action]:
        """An order could not be carried out."""
        worker = ""
        if isinstance(event.order, ExportKV) and event.order.layers in self._transfers:
            worker = self._transfers[event.order.layers].worker
        return self.fail(event.error.code, str(event.error), worker)

    # -------------------------------------------------------------- sending

    def linked(self, event: LinkChange, now: float) -> list[Action]:
        """Something happened to the link of a transfer."""
        transfer = self._transfers.get(event.link.layers) if event.link.layers else None
        if transfer is None:
            return []
        match event:
            case LinkReached(address=address):
                return transfer.reached(address, now)
            case LinkUp():
                return transfer.welcomed()
            case LinkReceived(message=KVTaken() as taken):
                return [*transfer.taken(taken, now), *self._tell_copied()]
            case LinkReceived():
                return []
            case LinkDown():
                why = f"The connection to {transfer.worker} was lost while KV cache was sent there."
                return self.fail("connection_failed", why, transfer.worker)

    def exported(self, event: KVExported, now: float) -> list[Action]:
        """Send what the compute thread exported."""
        transfer = self._transfers.get(event.order.layers)
        if transfer is None:
            return []
        return [*transfer.exported(event, now), *self._tell_copied()]

    def _tell_copied(self) -> list[Action]:
        done = all(transfer.is_idle for transfer in self._transfers.values())
        if not done or self._copied or self._taking_over:
            return []
        self._copied = True
        sent_bytes = sum(transfer.sent_bytes for transfer in self._transfers.values())
        return [
            Send(KVCopied(epoch=self.epoch, bytes_sent=sent_bytes)),
            Log(f"sent {size_text(sent_bytes)} of KV cache (plan {self.epoch})"),
        ]

    # -------------------------------------------------------------- receiving

    def arrived(
        self, peer: PeerId, message: KVPieces | KVEnd, frames: tuple[Frame, ...], now: float
    ) -> list[Action]:
        """Have kept what a worker sent that was welcomed in this epoch."""
        arrival = self._arrivals.get(message.layers)
        if self.over or arrival is None:
            return []
        if arrival.sender is None:
            arrival.sender = peer
        if arrival.sender != peer or message.number <= arrival.arrived:
            return []
        in_order = message.number == arrival.arrived + 1
        if not in_order or message.number - arrival.kept > WINDOW or arrival.ended:
            why = (
                f"Message {message.number} with KV cache of layers {message.layers} came after "
                f"message {arrival.arrived}, and {arrival.kept} are kept."
            )
            return self.fail("bad_transfer", why)
        arrival.arrived = message.number
        arrival.ended = isinstance(message, KVEnd)
        if self._taking_over:
            self._wait_for_arrivals(now)
        return [ImportKV(self._session, message, frames)]

    def imported(self, event: KVImported) -> list[Action]:
        """Acknowledge what is kept."""
        message = event.order.message
        arrival = self._arrivals.get(message.layers)
        if self.over or arrival is None or arrival.sender is None:
            return []
        arrival.kept = message.number
        taken = KVTaken(epoch=self.epoch, layers=message.layers, number=message.number)
        return [SendToPeer(arrival.sender, taken), *self._inherit()]

    def inherited(self) -> list[Action]:
        """Tell that the stage has its KV cache."""
        if self.over or not self._inheriting or self._took_over:
            return []
        self._took_over = True
        return [
            Send(TookOver(epoch=self.epoch)),
            Log(f"has the KV cache of its layers (plan {self.epoch})"),
        ]

    def _inherit(self) -> list[Action]:
        all_here = all(one.ended and one.kept == one.arrived for one in self._arrivals.values())
        if not (self._inherits and self._taking_over and all_here) or self._inheriting:
            return []
        self._inheriting = True
        return [AssembleKV(self._session, self.epoch)]

    def _wait_for_arrivals(self, now: float) -> None:
        waits = not all(arrival.ended for arrival in self._arrivals.values())
        self._arrive_by = now + _ARRIVE_S if waits else math.inf

    # -------------------------------------------------------------- time

    def next_deadline(self) -> float:
        """Return when `on_timer` is next due, clock seconds; infinity if never."""
        if self.over:
            return math.inf
        dues = [transfer.next_deadline() for transfer in self._transfers.values()]
        return min([self._arrive_by, *dues])

    def on_timer(self, now: float) -> list[Action]:
        """Do what is due."""
        if self.over:
            return []
        if self._arrive_by <= now:
            ranges = [str(layers) for layers, one in self._arrivals.items() if not one.ended]
            why = f"Nothing came of the KV cache of layers {', '.join(ranges)} for {_ARRIVE_S:g} s."
            return self.fail("deadline_exceeded", why)
        actions: list[Action] = []
        for transfer in self._transfers.values():
            if why := transfer.why_failed(now):
                return self.fail("connection_failed", f"{transfer.worker} {why}.", transfer.worker)
            actions += transfer.on_timer(now)
        return actions
