"""Sends the KV cache of some layers to the worker that gets them: one transfer of a move. Pure.

The receiver is dialled; once it welcomes the sender, the compute thread is asked for one message
after the other, which are numbered from 1. At most `WINDOW` messages are unacknowledged, so little
waits in sockets, and both workers run tasks in between. When everything has been sent, the sender
looks for more every second, because steps go on adding to the KV cache: little is left to be sent
in the handover. Then the rest is sent, and `KVEnd` ends the transfer.

How far the link is and whether steps still run are independent of each other; that is why these are
flags and not one table of states.
"""

import math

from distributed_llm.common.messages import Address, KVEnd, KVTaken, KVTransfer
from distributed_llm.common.types import Epoch, SequenceId
from distributed_llm.common.wording import layers_text
from distributed_llm.worker.session.dialling import Dialling
from distributed_llm.worker.session.events import Action, ExportKV, KVExported
from distributed_llm.worker.session.link_events import CloseLink, LinkId, SendOverLink

WINDOW = 2
"""Messages of a transfer that may be unacknowledged."""

_CONNECT_TIMEOUT_S = 5.0
_ACKNOWLEDGE_TIMEOUT_S = 10.0
_LOOK_EVERY_S = 1.0


class KVSender:
    """The sending side of one transfer.

    Args:
        session: of this worker, for orders.
        epoch: to which the layers move.
        key: of that epoch's links.
        transfer: the layers, the receiver and its addresses.
        now: clock seconds.

    Attributes:
        worker: the receiver.
        link: the link to it.
        sent_bytes: of keys, values, states and manifest so far.
    """

    def __init__(
        self, session: int, epoch: Epoch, key: str, transfer: KVTransfer, now: float
    ) -> None:
        self.worker = transfer.worker
        self.link = LinkId(epoch, transfer.layers)
        self.sent_bytes = 0
        self._session = session
        self._layers = transfer.layers
        self._dialling = Dialling(self.link, key, transfer.worker, transfer.addresses, transfer.key)
        self._connect_by = now + _CONNECT_TIMEOUT_S
        self._acknowledge_by = math.inf
        self._look_at = math.inf  # finite while everything that was there has been exported
        self._link_up = False
        self._exporting = False  # an order to export is under way
        self._steps_ended = False
        self._set_back: tuple[SequenceId, ...] = ()
        self._end_exported = False
        self._sent = self._acknowledged = 0  # numbers of messages

    @property
    def is_idle(self) -> bool:
        """Whether all that was in the KV cache when last looked was sent and acknowledged."""
        return self._look_at < math.inf and self._acknowledged == self._sent

    def begin(self) -> list[Action]:
        """Dial the receiver."""
        return self._dialling.dial()

    def end(self) -> list[Action]:
        """Close the link; the sender must not be used any more."""
        return [CloseLink(self.link)]

    def send_rest(self, set_back: tuple[SequenceId, ...]) -> list[Action]:
        """Send what is not sent yet, and then `KVEnd`: no step runs any more.

        Args:
            set_back: see `HandOver`.
        """
        self._steps_ended, self._set_back = True, set_back
        return self._export()

    def reached(self, address: Address, now: float) -> list[Action]:
        """Say hello at an address that is connected."""
        return [] if self._link_up else self._dialling.reached(address, now)

    def welcomed(self) -> list[Action]:
        """Begin to send, unless it has begun: the receiver has accepted the hello."""
        if self._link_up:
            return []
        self._link_up, self._connect_by = True, math.inf
        self._dialling.stop()
        return self._export()

    def exported(self, event: KVExported, now: float) -> list[Action]:
        """Send what was exported; if that is nothing, look again in a while.

        Raises:
            ValueError: the rest was to be exported, and there is not even a `KVEnd`.
        """
        self._exporting = False
        if event.message is None:
            if event.order.rest:
                raise ValueError(f"an export of the rest of {layers_text(self._layers)} has no end")
            self._look_at = now + _LOOK_EVERY_S
            return self._export() if self._steps_ended else []
        if self._sent == self._acknowledged:
            self._acknowledge_by = now + _ACKNOWLEDGE_TIMEOUT_S
        self._sent = event.order.number
        self._end_exported = isinstance(event.message, KVEnd)
        self.sent_bytes += sum(len(frame) for frame in event.frames)
        return [SendOverLink(self.link, event.message, event.frames), *self._export()]

    def acknowledged(self, answer: KVTaken, now: float) -> list[Action]:
        """Go on sending: the receiver has kept all messages up to this one."""
        if not self._acknowledged < answer.number <= self._sent:
            return []
        self._acknowledged = answer.number
        all_acknowledged = self._acknowledged == self._sent
        self._acknowledge_by = math.inf if all_acknowledged else now + _ACKNOWLEDGE_TIMEOUT_S
        waits_to_look = self._look_at < math.inf and not self._steps_ended
        return [] if waits_to_look else self._export()

    def why_failed(self, now: float) -> str:
        """Return what has taken too long; empty if nothing has."""
        if self._connect_by <= now:
            return (
                f"cannot be reached within {_CONNECT_TIMEOUT_S:g} s, or has no such layers to load"
            )
        if self._acknowledge_by <= now:
            return (
                f"took none of the KV cache of {layers_text(self._layers)} for "
                f"{_ACKNOWLEDGE_TIMEOUT_S:g} s"
            )
        return ""

    def next_deadline(self) -> float:
        """Return when `why_failed` or `on_timer` is next due, clock seconds; infinity if never."""
        dial_at = self._dialling.next_deadline()
        return min(dial_at, self._connect_by, self._acknowledge_by, self._look_at)

    def on_timer(self, now: float) -> list[Action]:
        """Do what is due."""
        if self._look_at <= now:
            return self._export()
        return self._dialling.on_timer(now)

    def _export(self) -> list[Action]:
        """Order the next message, unless one is ordered, the window is full, or all is exported."""
        full = self._sent - self._acknowledged >= WINDOW
        if not self._link_up or self._exporting or self._end_exported or full:
            return []
        self._exporting, self._look_at = True, math.inf
        return [
            ExportKV(
                self._session,
                self.link.epoch,
                self._layers,
                self._sent + 1,
                self._steps_ended,
                self._set_back,
            )
        ]
