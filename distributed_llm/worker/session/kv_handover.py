"""One worker's part in handing the KV cache of moving layers over to a new epoch. Pure.

A worker may send, receive, or both. It sends each range of layers in a `Transfer` of its own, and
receives each range from one other worker. While steps run, what they add is copied again and again.
Once the coordinator says that no step runs, senders send the rest, and a new stage assembles its KV
cache as soon as everything has arrived for it.

The first failure is reported and ends the handover on this worker. The coordinator then undoes the
move, or commits it with empty KV caches.
"""

import math
from dataclasses import dataclass
from enum import Enum
from typing import assert_never

from distributed_llm.common.messages import (
    CopyKV,
    KVCopied,
    KVEnd,
    KVFailed,
    KVPieces,
    KVTaken,
    PeerProbed,
    TookOver,
)
from distributed_llm.common.states import StateTable
from distributed_llm.common.tensors import Frame
from distributed_llm.common.types import Epoch, LayerRange, PeerId, size_text
from distributed_llm.worker.session.events import (
    Action,
    AssembleKV,
    ExportKV,
    ImportKV,
    KVAssembled,
    KVEvent,
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

_ARRIVAL_TIMEOUT_S = 30.0
"""How long nothing may arrive while the handover waits; a sender gives up long before that."""


class HandoverState(Enum):
    """How far a worker is with handing KV cache over.

    Attributes:
        COPYING: steps run; senders copy what is there, receivers keep what arrives.
        COPIED: everything that was there has been copied once, and was reported.
        HANDOVER: no step runs; senders send the rest, receivers wait for it.
        ASSEMBLING: all has arrived; the compute thread assembles the new stage's KV cache.
        ASSEMBLED: the new stage has its KV cache.
        FAILED: a failure was reported; nothing more is done.
    """

    COPYING = "copying"
    COPIED = "copied"
    HANDOVER = "handover"
    ASSEMBLING = "assembling"
    ASSEMBLED = "assembled"
    FAILED = "failed"


class HandoverCause(Enum):
    """What leads to the next state."""

    ALL_COPIED = "all copied"
    STEPS_ENDED = "steps ended"
    ALL_ARRIVED = "all arrived"
    ASSEMBLED = "assembled"
    FAILED = "failed"


_S, _C = HandoverState, HandoverCause
HANDOVER_STATES = StateTable(
    "a worker's handover of KV cache",
    _S.COPYING,
    {
        (_S.COPYING, _C.ALL_COPIED): _S.COPIED,
        (_S.COPYING, _C.STEPS_ENDED): _S.HANDOVER,
        (_S.COPIED, _C.STEPS_ENDED): _S.HANDOVER,
        (_S.HANDOVER, _C.ALL_ARRIVED): _S.ASSEMBLING,
        (_S.ASSEMBLING, _C.ASSEMBLED): _S.ASSEMBLED,
        (_S.COPYING, _C.FAILED): _S.FAILED,
        (_S.COPIED, _C.FAILED): _S.FAILED,
        (_S.HANDOVER, _C.FAILED): _S.FAILED,
        (_S.ASSEMBLING, _C.FAILED): _S.FAILED,
        (_S.ASSEMBLED, _C.FAILED): _S.FAILED,  # it may still be sending to others
    },
)


@dataclass
class _Arrival:
    """The KV cache of one range of layers, on its way from another worker.

    Attributes:
        sender: the peer that sent the first message; no other one may send.
        received: number of the latest message that has arrived.
        imported: number of the latest message that the compute thread has kept.
        ended: the latest message is the last.
    """

    sender: PeerId | None = None
    received: int = 0
    imported: int = 0
    ended: bool = False


class KVHandover:
    """The KV cache that one worker sends and receives for one new epoch.

    Args:
        session: of the worker, for orders.
        epoch: the new one.
        imports: layers whose KV cache other workers send here.
        has_new_stage: a stage of the new epoch is prepared here, and needs a KV cache.
    """

    def __init__(
        self,
        session: int,
        epoch: Epoch,
        imports: tuple[LayerRange, ...] = (),
        *,
        has_new_stage: bool,
    ) -> None:
        self.epoch = epoch
        self._session = session
        self._has_new_stage = has_new_stage
        self._state = HANDOVER_STATES.initial
        self._arrivals = {layers: _Arrival() for layers in imports}
        self._transfers: dict[LayerRange, Transfer] = {}
        self._arrive_by = math.inf

    @property
    def has_failed(self) -> bool:
        """Whether a failure was reported; nothing more is done then."""
        return self._state is _S.FAILED

    @property
    def is_assembling(self) -> bool:
        """Whether the new stage waits for its KV cache, so that no task may run on it."""
        return self._has_new_stage and self._state in (_S.HANDOVER, _S.ASSEMBLING)

    def copy(self, order: CopyKV, now: float) -> list[Action]:
        """Begin to copy."""
        if self.has_failed or self._transfers:
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

    def begin(self, now: float) -> list[Action]:
        """Begin the handover: no step of the served epoch runs any more."""
        if self._state not in (_S.COPYING, _S.COPIED):
            return []
        self._change(_C.STEPS_ENDED)
        self._wait_for_arrivals(now)
        actions: list[Action] = []
        for transfer in self._transfers.values():
            actions += transfer.send_rest()
        return [*actions, *self._assemble()]

    def end(self) -> list[Action]:
        """Close the links; the handover must not be used any more."""
        transfers, self._transfers = self._transfers, {}
        return [action for transfer in transfers.values() for action in transfer.end()]

    def fail(self, code: str, message: str, worker: str = "") -> list[Action]:
        """Report a failure and end the handover; only the first failure is reported.

        Args:
            code: of the error.
            message: for people.
            worker: that could not be sent to; empty if receiving or assembling failed here.
        """
        if self.has_failed:
            return []
        self._change(_C.FAILED)
        told = KVFailed(epoch=self.epoch, worker=worker, code=code, message=message[:4096])
        return [*self.end(), Send(told), Log(f"moving layers failed: {message}", "warning")]

    def order_done(self, event: KVEvent, now: float) -> list[Action]:
        """Go on after an order to the compute thread."""
        match event:
            case KVExported():
                return self._exported(event, now)
            case KVImported():
                return self._imported(event)
            case KVAssembled():
                return self._assembled()
            case KVOrderFailed():
                return self._order_failed(event)
            case _:
                assert_never(event)

    def _change(self, cause: HandoverCause) -> None:
        self._state = HANDOVER_STATES.after(self._state, cause)

    def _order_failed(self, event: KVOrderFailed) -> list[Action]:
        worker = ""
        if isinstance(event.order, ExportKV) and event.order.layers in self._transfers:
            worker = self._transfers[event.order.layers].worker
        return self.fail(event.error.code, str(event.error), worker)

    # -------------------------------------------------------------- sending

    def link_changed(self, event: LinkChange, now: float) -> list[Action]:
        """Handle an event of the link of a transfer."""
        transfer = self._transfers.get(event.link.layers) if event.link.layers else None
        if transfer is None:
            return []
        match event:
            case LinkReached(address=address):
                return transfer.reached(address, now)
            case LinkUp():
                return transfer.welcomed()
            case LinkReceived(message=message):
                return self._receiver_said(transfer, message, now)
            case LinkDown():
                why = f"The connection to {transfer.worker} was lost while KV cache was sent there."
                return self.fail("connection_failed", why, transfer.worker)
            case _:
                assert_never(event)

    def _receiver_said(
        self, transfer: Transfer, message: KVTaken | PeerProbed, now: float
    ) -> list[Action]:
        match message:
            case KVTaken():
                return [*transfer.acknowledged(message, now), *self._report_copied()]
            case PeerProbed():
                return []  # nothing was probed over this link
            case _:
                assert_never(message)

    def _exported(self, event: KVExported, now: float) -> list[Action]:
        transfer = self._transfers.get(event.order.layers)
        if transfer is None:
            return []
        return [*transfer.exported(event, now), *self._report_copied()]

    def _report_copied(self) -> list[Action]:
        all_idle = all(transfer.is_idle for transfer in self._transfers.values())
        if self._state is not _S.COPYING or not all_idle:
            return []
        self._change(_C.ALL_COPIED)
        sent_bytes = sum(transfer.sent_bytes for transfer in self._transfers.values())
        return [
            Send(KVCopied(epoch=self.epoch, bytes_sent=sent_bytes)),
            Log(f"sent {size_text(sent_bytes)} of KV cache (plan {self.epoch})"),
        ]

    # -------------------------------------------------------------- receiving

    def received(
        self, peer: PeerId, message: KVPieces | KVEnd, frames: tuple[Frame, ...], now: float
    ) -> list[Action]:
        """Have a message of a transfer kept, which a welcomed peer sent; ignore repetitions."""
        arrival = self._arrivals.get(message.layers)
        if self.has_failed or arrival is None:
            return []
        if arrival.sender is None:
            arrival.sender = peer
        if arrival.sender != peer or message.number <= arrival.received:
            return []
        in_order = message.number == arrival.received + 1
        if not in_order or message.number - arrival.imported > WINDOW or arrival.ended:
            why = (
                f"Message {message.number} with KV cache of layers {message.layers} came after "
                f"message {arrival.received}, and {arrival.imported} are kept."
            )
            return self.fail("bad_transfer", why)
        arrival.received = message.number
        arrival.ended = isinstance(message, KVEnd)
        if self._state not in (_S.COPYING, _S.COPIED):
            self._wait_for_arrivals(now)
        return [ImportKV(self._session, message, frames)]

    def _imported(self, event: KVImported) -> list[Action]:
        """Acknowledge a message that is kept; it may have been the last one."""
        message = event.order.message
        arrival = self._arrivals.get(message.layers)
        if arrival is None or arrival.sender is None:
            return []
        arrival.imported = message.number
        taken = KVTaken(epoch=self.epoch, layers=message.layers, number=message.number)
        return [SendToPeer(arrival.sender, taken), *self._assemble()]

    def _assemble(self) -> list[Action]:
        """Order the new stage's KV cache, once no step runs and everything is here."""
        arrivals = self._arrivals.values()
        all_here = all(one.ended and one.imported == one.received for one in arrivals)
        if not self._has_new_stage or self._state is not _S.HANDOVER or not all_here:
            return []
        self._change(_C.ALL_ARRIVED)
        return [AssembleKV(self._session, self.epoch)]

    def _assembled(self) -> list[Action]:
        self._change(_C.ASSEMBLED)
        return [
            Send(TookOver(epoch=self.epoch)),
            Log(f"has the KV cache of its layers (plan {self.epoch})"),
        ]

    def _wait_for_arrivals(self, now: float) -> None:
        waits = not all(arrival.ended for arrival in self._arrivals.values())
        self._arrive_by = now + _ARRIVAL_TIMEOUT_S if waits else math.inf

    # -------------------------------------------------------------- time

    def next_deadline(self) -> float:
        """Return when `on_timer` is next due, clock seconds; infinity if never."""
        if self.has_failed:
            return math.inf
        dues = [transfer.next_deadline() for transfer in self._transfers.values()]
        return min([self._arrive_by, *dues])

    def on_timer(self, now: float) -> list[Action]:
        """Do what is due."""
        if self.has_failed:
            return []
        if self._arrive_by <= now:
            late = [str(layers) for layers, one in self._arrivals.items() if not one.ended]
            why = (
                f"Nothing came of the KV cache of layers {', '.join(late)} for "
                f"{_ARRIVAL_TIMEOUT_S:g} s."
            )
            return self.fail("deadline_exceeded", why)
        actions: list[Action] = []
        for transfer in self._transfers.values():
            if why := transfer.why_failed(now):
                return self.fail("connection_failed", f"{transfer.worker} {why}.", transfer.worker)
            actions += transfer.on_timer(now)
        return actions
