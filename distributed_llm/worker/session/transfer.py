"""One transfer: the KV cache of some layers on its way to the worker that takes them over. Pure.

    dialling --welcomed--> copying <--> idle --TakeOver--> the rest --KVEnd--> acknowledged

Messages are numbered from 1, and no more than `WINDOW` are unacknowledged: what waits in sockets is
bounded, and tasks of both workers run between. A transfer that has nothing to send looks again now
and then, because steps go on adding to the KV cache; so little is left for when they stand still.
"""

import math

from distributed_llm.common.messages import Address, KVEnd, KVTaken, KVTransfer
from distributed_llm.worker.session.events import Action, ExportKV, KVExported
from distributed_llm.worker.session.link_events import CloseLink, LinkId, SendOverLink
from distributed_llm.worker.session.peers import Dialling

WINDOW = 2
"""Messages of a transfer that may be unacknowledged."""

_REACH_S = 5.0
_TAKE_S = 10.0
_LOOK_S = 1.0


class Transfer:
    """What one worker sends of some layers.

    Args:
        key: of the epoch.

    Attributes:
        worker: to whom.
        link: over which it goes.
        sent_bytes: so far.
    """

    def __init__(self, session: int, epoch: int, key: str, what: KVTransfer, now: float) -> None:
        self.worker = what.worker
        self.link = LinkId(epoch, what.layers)
        self.sent_bytes = 0
        self._session = session
        self._layers = what.layers
        self._dialling = Dialling(self.link, key, what.worker, what.addresses)
        self._reach_by = now + _REACH_S
        self._take_by = self._look_at = math.inf
        self._up = self._exporting = self._rest = self._ended = False
        self._sent = self._taken = 0

    @property
    def is_idle(self) -> bool:
        """Whether all that there is to send just now was sent and acknowledged."""
        return self._look_at < math.inf and self._taken == self._sent

    def begin(self) -> list[Action]:
        """Dial the worker."""
        return self._dialling.dial()

    def end(self) -> list[Action]:
        """Send no more; this is not used any more."""
        return [CloseLink(self.link)]

    def take_rest(self) -> list[Action]:
        """No step runs any more: send what has changed, and what is held."""
        self._rest = True
        return self._export()

    def reached(self, address: Address, now: float) -> list[Action]:
        """Say hello where something answers."""
        return [] if self._up else self._dialling.reached(address, now)

    def welcomed(self) -> list[Action]:
        """Begin to send."""
        if self._up:
            return []
        self._up, self._reach_by = True, math.inf
        self._dialling.stop()
        return self._export()

    def exported(self, done: KVExported, now: float) -> list[Action]:
        """Send what was exported, or look again in a while."""
        self._exporting = False
        if done.message is None:
            if done.order.rest:
                raise ValueError(f"an export of the rest of layers {self._layers} has no end")
            self._look_at = now + _LOOK_S
            return self._export() if self._rest else []
        if self._sent == self._taken:
            self._take_by = now + _TAKE_S
        self._sent = done.order.number
        self._ended = isinstance(done.message, KVEnd)
        self.sent_bytes += sum(len(frame) for frame in done.frames)
        return [SendOverLink(self.link, done.message, done.frames), *self._export()]

    def taken(self, answer: KVTaken, now: float) -> list[Action]:
        """The other worker has what was sent up to this message."""
        if not self._taken < answer.number <= self._sent:
            return []
        self._taken = answer.number
        self._take_by = math.inf if self._taken == self._sent else now + _TAKE_S
        return [] if self._look_at < math.inf and not self._rest else self._export()

    def why_failed(self, now: float) -> str:
        """Return what has taken too long; empty if nothing has."""
        if self._reach_by <= now:
            return f"cannot be reached within {_REACH_S:g} s, or has no such layers to load"
        if self._take_by <= now:
            return f"took none of the KV cache of layers {self._layers} for {_TAKE_S:g} s"
        return ""

    def next_deadline(self) -> float:
        """Return when `why_failed` or `on_timer` is next due, clock seconds; infinity if never."""
        dial_at = self._dialling.next_deadline()
        return min(dial_at, self._reach_by, self._take_by, self._look_at)

    def on_timer(self, now: float) -> list[Action]:
        """Do what is due."""
        if self._look_at <= now:
            return self._export()
        return self._dialling.on_timer(now)

    def _export(self) -> list[Action]:
        """Ask for the next message, unless that has to wait."""
        full = self._sent - self._taken >= WINDOW
        if not self._up or self._exporting or self._ended or full:
            return []
        self._exporting, self._look_at = True, math.inf
        return [
            ExportKV(self._session, self.link.epoch, self._layers, self._sent + 1, self._rest),
        ]
