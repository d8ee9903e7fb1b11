"""One worker's part in a move: the KV cache that it sends and receives for a new epoch. Pure.

A worker may send, receive, or both. Each range of layers is sent by a `KVSender` of its own, and
received from one other worker. Before the handover steps run, and what they add is copied again and
again. The handover begins when the coordinator says that no step runs: senders send the rest, and a
new stage assembles its KV cache as soon as everything has arrived for it.

The first failure is reported, and nothing more is done here: the coordinator then undoes the move.
"""

import math
from dataclasses import dataclass
from enum import Enum
from typing import assert_never

from distributed_llm.common.errors import DistributedLLMError, RemoteProtocolError
from distributed_llm.common.messages import (
    CopyKV,
    HandedOver,
    KVCopied,
    KVEnd,
    KVFailed,
    KVPieces,
    KVTaken,
    PeerProbed,
)
from distributed_llm.common.states import StateTable
from distributed_llm.common.tensors import Frame
from distributed_llm.common.types import Epoch, LayerRange, PeerId, SequenceId
from distributed_llm.common.wording import layers_text, size_text
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
from distributed_llm.worker.session.kv_sender import WINDOW, KVSender
from distributed_llm.worker.session.link_events import (
    LinkChange,
    LinkDown,
    LinkId,
    LinkReached,
    LinkReceived,
    LinkUp,
    SendToPeer,
)

_ARRIVAL_TIMEOUT_S = 30.0
"""How long a receiver waits for the next message in the handover, seconds.

A sender gives up long before that.
"""


class KVMoveState(Enum):
    """How far a worker is with the KV cache of a move.

    Attributes:
        COPYING: steps run; it sends what is in the KV cache and keeps what arrives.
        COPIED: has reported that everything was sent once; steps run, so copying goes on.
        HANDOVER: no step runs; it sends the rest, and waits for the rest from others.
        ASSEMBLING: all has arrived; the compute thread assembles the new stage's KV cache.
        ASSEMBLED: the new stage has its KV cache.
        FAILED: has reported a failure, and does nothing more.
    """

    COPYING = "copying"
    COPIED = "copied"
    HANDOVER = "handover"
    ASSEMBLING = "assembling"
    ASSEMBLED = "assembled"
    FAILED = "failed"


class KVMoveCause(Enum):
    """What changes the state of the KV cache of a move.

    Attributes:
        ALL_COPIED: everything that was in the KV cache was sent and acknowledged.
        STEPS_ENDED: the coordinator ordered the handover; no step runs.
        ALL_ARRIVED: every range for the new stage is here to its end.
        ASSEMBLED: the compute thread has assembled the new stage's KV cache.
        FAILED: something could not be sent, received or assembled.
    """

    ALL_COPIED = "all copied"
    STEPS_ENDED = "steps ended"
    ALL_ARRIVED = "all arrived"
    ASSEMBLED = "assembled"
    FAILED = "failed"


_S, _C = KVMoveState, KVMoveCause
KV_MOVE_STATES = StateTable(
    "the KV cache of a move on one worker",
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
        peer: that sent the first message; no other one may send. None before it.
        received: number of the latest message that has arrived.
        imported: number of the latest message that the compute thread has kept.
        ended: the latest message is the last.
    """

    peer: PeerId | None = None
    received: int = 0
    imported: int = 0
    ended: bool = False


class KVMove:
    """One worker's part in one move.

    Args:
        session: of the worker, for orders.
        epoch: to which the layers move.
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
        self._state = KV_MOVE_STATES.initial
        self._arrivals = {layers: _Arrival() for layers in imports}
        self._senders: dict[LayerRange, KVSender] = {}
        self._arrive_by = math.inf

    @property
    def has_failed(self) -> bool:
        """Whether a failure was reported."""
        return self._state is _S.FAILED

    @property
    def is_assembling(self) -> bool:
        """Whether the new stage waits for its KV cache, so that no task may run on it."""
        return self._has_new_stage and self._state in (_S.HANDOVER, _S.ASSEMBLING)

    def copy(self, order: CopyKV, now: float) -> list[Action]:
        """Begin to copy."""
        if self.has_failed or self._senders:
            return [Log(f"ignored a second order to copy for plan {self.epoch}", "warning")]
        for transfer in order.transfers:
            self._senders[transfer.layers] = KVSender(
                self._session, self.epoch, order.link_key, transfer, now
            )
        named = ", ".join(
            f"{layers_text(each.layers)} to {each.worker}" for each in order.transfers
        )
        actions: list[Action] = [Log(f"sending the KV cache of {named} (plan {self.epoch})")]
        for sender in self._senders.values():
            actions += sender.begin()
        return actions

    def hand_over(self, set_back: tuple[SequenceId, ...], now: float) -> list[Action]:
        """Begin the handover: no step of the served epoch runs any more.

        Args:
            set_back: see `HandOver`.
            now: clock seconds.
        """
        if self._state not in (_S.COPYING, _S.COPIED):
            return []
        self._change(_C.STEPS_ENDED)
        self._wait_for_arrivals(now)
        actions: list[Action] = []
        for sender in self._senders.values():
            actions += sender.send_rest(set_back)
        return [*actions, *self._assemble()]

    def end(self) -> list[Action]:
        """Close the links; this must not be used any more."""
        senders, self._senders = self._senders, {}
        return [action for sender in senders.values() for action in sender.end()]

    def fail(self, code: str, message: str, worker: str = "") -> list[Action]:
        """Report a failure and do nothing more; later failures are not reported.

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

    def _change(self, cause: KVMoveCause) -> None:
        self._state = KV_MOVE_STATES.after(self._state, cause)

    def _order_failed(self, event: KVOrderFailed) -> list[Action]:
        worker = ""
        if isinstance(event.order, ExportKV) and event.order.layers in self._senders:
            worker = self._senders[event.order.layers].worker
        return self.fail(event.error.code, str(event.error), worker)

    # -------------------------------------------------------------- sending

    def link_changed(self, event: LinkChange, now: float) -> list[Action]:
        """Handle an event of the link to a receiver."""
        sender = self._senders.get(event.link.layers) if event.link.layers else None
        if sender is None:
            return []
        match event:
            case LinkReached(address=address):
                return sender.reached(address, now)
            case LinkUp():
                return sender.welcomed()
            case LinkReceived(message=message):
                return self._receiver_said(sender, message, now)
            case LinkDown():
                why = f"The connection to {sender.worker} was lost while KV cache was sent there."
                return self.fail("connection_failed", why, sender.worker)
            case _:
                assert_never(event)

    def _receiver_said(
        self, sender: KVSender, message: KVTaken | PeerProbed, now: float
    ) -> list[Action]:
        match message:
            case KVTaken():
                return [*sender.acknowledged(message, now), *self._report_copied()]
            case PeerProbed():
                return []  # nothing was probed over this link
            case _:
                assert_never(message)

    def unread_answer(self, link: LinkId, error: DistributedLLMError) -> list[Action]:
        """Give up: a receiver answered over its link what cannot be read."""
        sender = self._senders.get(link.layers) if link.layers else None
        if sender is None or link.epoch != self.epoch:
            return []
        why = f"What {sender.worker} answers to KV cache cannot be read ({error})."
        return self.fail(error.code, why, sender.worker)

    def _exported(self, event: KVExported, now: float) -> list[Action]:
        sender = self._senders.get(event.order.layers)
        if sender is None:
            return []
        return [*sender.exported(event, now), *self._report_copied()]

    def _report_copied(self) -> list[Action]:
        all_idle = all(sender.is_idle for sender in self._senders.values())
        if self._state is not _S.COPYING or not all_idle:
            return []
        self._change(_C.ALL_COPIED)
        sent_bytes = sum(sender.sent_bytes for sender in self._senders.values())
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
        if arrival.peer is None:
            arrival.peer = peer
        if arrival.peer != peer or message.number <= arrival.received:
            return []
        in_order = message.number == arrival.received + 1
        if not in_order or message.number - arrival.imported > WINDOW or arrival.ended:
            why = (
                f"Message {message.number} with KV cache of {layers_text(message.layers)} came "
                f"after message {arrival.received}, and {arrival.imported} are kept."
            )
            return self.fail("bad_transfer", why)
        arrival.received = message.number
        arrival.ended = isinstance(message, KVEnd)
        if self._state not in (_S.COPYING, _S.COPIED):
            self._wait_for_arrivals(now)
        return [ImportKV(self._session, message, frames)]

    def comes_from(self, peer: PeerId) -> bool:
        """Return whether `peer` has sent KV cache; over its connection comes nothing else."""
        return any(arrival.peer == peer for arrival in self._arrivals.values())

    def unread(self, error: RemoteProtocolError) -> list[Action]:
        """Give up: a message of a transfer to this worker cannot be read."""
        return self.fail(error.code, f"KV cache from another worker cannot be read ({error}).")

    def _imported(self, event: KVImported) -> list[Action]:
        """Acknowledge a message that is kept; it may have been the last one."""
        message = event.order.message
        arrival = self._arrivals.get(message.layers)
        if arrival is None or arrival.peer is None:
            return []
        arrival.imported = message.number
        taken = KVTaken(epoch=self.epoch, layers=message.layers, number=message.number)
        return [SendToPeer(arrival.peer, taken), *self._assemble()]

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
            Send(HandedOver(epoch=self.epoch)),
            Log(f"the KV cache of its layers has arrived (plan {self.epoch})"),
        ]

    def _wait_for_arrivals(self, now: float) -> None:
        waits = not all(arrival.ended for arrival in self._arrivals.values())
        self._arrive_by = now + _ARRIVAL_TIMEOUT_S if waits else math.inf

    # -------------------------------------------------------------- time

    def next_deadline(self) -> float:
        """Return when `on_timer` is next due, clock seconds; infinity if never."""
        if self.has_failed:
            return math.inf
        dues = [sender.next_deadline() for sender in self._senders.values()]
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
        for sender in self._senders.values():
            if why := sender.why_failed(now):
                return self.fail("connection_failed", f"{sender.worker} {why}.", sender.worker)
            actions += sender.on_timer(now)
        return actions
