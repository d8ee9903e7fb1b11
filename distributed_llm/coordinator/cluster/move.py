"""How one pipeline becomes another while requests run: the state of a move, and its messages. Pure.

1. *Prepare*: the new stages load beside the old ones, which go on serving; then the KV cache of
   layers that change hands is copied.
2. *Handover*: the old pipeline is paused. When its steps have ended, senders send what has changed
   since, and the new stages assemble their KV cache. States of layers that have one of their own
   change with every step: of sequences that run, the latest ones are sent only now.
3. *Commit*: the new stages go on where the old ones stopped.

Until the commit everything can be undone, and the old stages go on as if nothing had been. A move
that does not copy is committed as soon as the steps have ended: the new stages begin with empty
caches, and the requests compute their tokens again.

(Live migration of virtual machines by pre-copy: Clark et al., NSDI 2005.)
"""

from collections.abc import Mapping
from enum import Enum
from typing import Literal

from distributed_llm.common.keys import PublicKey
from distributed_llm.common.messages import (
    MAX_RELEASED,
    CopyKV,
    DropStage,
    HandOver,
    KVTransfer,
    UndoMove,
)
from distributed_llm.common.states import StateTable
from distributed_llm.common.types import PeerId
from distributed_llm.coordinator.cluster.kv_transfers import transfers_between
from distributed_llm.coordinator.cluster.move_price import Price
from distributed_llm.coordinator.events import Send
from distributed_llm.coordinator.plan import PipelineStage
from distributed_llm.coordinator.serving.pipeline import Pipeline

MoveReason = Literal["faster", "leaving"]
"""Why layers move: another plan is faster, or a worker is to leave."""


class MoveState(Enum):
    """Where a move is; the values are shown to users.

    Attributes:
        LOADING: new stages load their layers beside the old ones, which serve.
        COPYING: KV cache of layers that change hands is copied; the old pipeline serves.
        FINISHING_STEPS: the old pipeline is paused; its steps in flight are waited for.
        HANDOVER: senders send the rest of the KV cache, and new stages assemble theirs.
        COMMITTED: the new pipeline serves.
        UNDONE: the move was cancelled; the old pipeline serves on.
    """

    LOADING = "loading"
    COPYING = "copying"
    FINISHING_STEPS = "finishing steps"
    HANDOVER = "handover"
    COMMITTED = "committed"
    UNDONE = "undone"


class MoveCause(Enum):
    """What changes the state of a move.

    Attributes:
        LOADED: all new stages are loaded, and there is KV cache to copy.
        LOADED_WITHOUT_COPY: all new stages are loaded, and there is none to copy.
        COPIED: all senders have copied what they had.
        COPY_TIMED_OUT: copying took too long; the rest is sent in the handover.
        STEPS_ENDED: no step is in flight any more, and the KV cache is handed over.
        STEPS_ENDED_WITHOUT_COPY: the same, but requests compute their tokens again.
        HANDED_OVER: all new stages have their KV cache.
        CANCELLED: a failure, a loss, a time limit or another decision ended the move.
    """

    LOADED = "loaded"
    LOADED_WITHOUT_COPY = "loaded without copy"
    COPIED = "copied"
    COPY_TIMED_OUT = "copy timed out"
    STEPS_ENDED = "steps ended"
    STEPS_ENDED_WITHOUT_COPY = "steps ended without copy"
    HANDED_OVER = "handed over"
    CANCELLED = "cancelled"


_S, _C = MoveState, MoveCause
MOVE_STATES = StateTable(
    "a move",
    _S.LOADING,
    {
        (_S.LOADING, _C.LOADED): _S.COPYING,
        (_S.LOADING, _C.LOADED_WITHOUT_COPY): _S.FINISHING_STEPS,
        (_S.COPYING, _C.COPIED): _S.FINISHING_STEPS,
        (_S.COPYING, _C.COPY_TIMED_OUT): _S.FINISHING_STEPS,
        (_S.FINISHING_STEPS, _C.STEPS_ENDED): _S.HANDOVER,
        (_S.FINISHING_STEPS, _C.STEPS_ENDED_WITHOUT_COPY): _S.COMMITTED,
        (_S.HANDOVER, _C.HANDED_OVER): _S.COMMITTED,
        (_S.LOADING, _C.CANCELLED): _S.UNDONE,
        (_S.COPYING, _C.CANCELLED): _S.UNDONE,
        (_S.FINISHING_STEPS, _C.CANCELLED): _S.UNDONE,
        (_S.HANDOVER, _C.CANCELLED): _S.UNDONE,
    },
)

_HANDOVER_LIMIT_S = 10.0
"""Seconds that the handover may take, beside `COPY_SLOWDOWN` times what states should take in it.
Then the move is undone. While it loads, the progress of the loads is watched; while it finishes
steps, leases bound them."""

_COPY_LIMIT_S = 30.0
"""Seconds that copying may take beside `COPY_SLOWDOWN` times what it should. It needs a limit: KV
cache that grows faster than links carry it would never be copied."""

COPY_SLOWDOWN = 4.0
"""How many times as long as expected copying may take."""


class Move:
    """One move of a pipeline that serves.

    Args:
        old: the pipeline that serves.
        new: the one that takes its place.
        addresses: where the workers of `new` may be reached.
        keys: that they hold.
        link_key: the secret by which the workers of `new` know each other.
        price: what it is expected to cost, and whether the KV cache goes along.
        why: what it is for, for people.
        reason: the same, one of a few.
        now: clock seconds.

    Attributes:
        state: where it is; see `MOVE_STATES`.
        state_at: since when, clock seconds.
        transfers: of KV cache, between workers.
        began_at: when it began, clock seconds.
        paused_at: since when no steps begin, clock seconds; None before that.
        copied_bytes: KV cache that workers have copied.
    """

    def __init__(
        self,
        old: Pipeline,
        new: Pipeline,
        *,
        addresses: Mapping[PeerId, tuple[str, ...]],
        keys: Mapping[PeerId, PublicKey],
        link_key: str,
        price: Price,
        why: str,
        reason: MoveReason,
        now: float,
    ) -> None:
        self.old = old
        self.new = new
        self.price = price
        self.why = why
        self.reason = reason
        self.copies = price.copies
        self.copied_bytes = 0
        self.transfers = (
            transfers_between(old.stages, new.stages, old.encoder_layers) if self.copies else []
        )
        self.began_at = now
        self.paused_at: float | None = None
        self.state = MOVE_STATES.initial
        self.state_at = now
        self._addresses = addresses
        self._keys = keys
        self._link_key = link_key
        self._limits_s = {
            _S.COPYING: _COPY_LIMIT_S + COPY_SLOWDOWN * price.copy_s,
            _S.HANDOVER: _HANDOVER_LIMIT_S + COPY_SLOWDOWN * price.handover_s,
        }
        self._awaited: set[PeerId] = set()  # who has not copied, or handed over, yet

    # -------------------------------------------------------------- who has a part in it

    def concerns(self, peer: PeerId) -> bool:
        """Return whether a worker has a part in it."""
        return any(stage.peer == peer for stage in (*self.old.stages, *self.new.stages))

    def new_stage(self, peer: PeerId) -> PipelineStage | None:
        """Return what a worker is to serve once it is committed."""
        return next((stage for stage in self.new.stages if stage.peer == peer), None)

    # -------------------------------------------------------------- from state to state

    def next_deadline(self) -> float | None:
        """Return when its state has lasted too long, clock seconds."""
        limit_s = self._limits_s.get(self.state)
        return None if limit_s is None else self.state_at + limit_s

    def loaded(self, *, now: float) -> list[Send]:
        """Copy KV cache, or pause if there is none to copy; all new stages are loaded."""
        senders = {transfer.sender.peer for transfer in self.transfers}
        if not senders:
            return self._finish_steps(_C.LOADED_WITHOUT_COPY, now)
        self._enter(_C.LOADED, now, senders)
        epoch, key = self.new.epoch, self._link_key
        return [
            Send(peer, CopyKV(epoch=epoch, link_key=key, transfers=self._sent_by(peer)))
            for peer in dict.fromkeys(transfer.sender.peer for transfer in self.transfers)
        ]

    def copied(self, peer: PeerId, *, now: float) -> list[Send]:
        """Record that a worker has copied the KV cache that it had; pause once all have."""
        if self.state is not _S.COPYING or peer not in self._awaited:
            return []
        self._awaited.remove(peer)
        return [] if self._awaited else self._finish_steps(_C.COPIED, now)

    def copy_timed_out(self, *, now: float) -> list[Send]:
        """Pause before all is copied; the rest of the KV cache is sent in the handover."""
        return self._finish_steps(_C.COPY_TIMED_OUT, now)

    def settle(self, *, now: float) -> list[Send]:
        """Hand over, or commit, if no step is in flight any more."""
        in_flight = self.old.in_flight
        if self.state is not _S.FINISHING_STEPS or in_flight is None or in_flight.num_steps:
            return []
        if not self.copies:
            self._enter(_C.STEPS_ENDED_WITHOUT_COPY, self.state_at, set())
            return []
        receivers = {stage.peer for stage in self.new.stages}
        involved = receivers | {transfer.sender.peer for transfer in self.transfers}
        self._enter(_C.STEPS_ENDED, now, receivers)
        set_back = self.old.scheduler.were_set_back if self.old.scheduler else []
        order = HandOver(
            epoch=self.new.epoch,
            first_step=in_flight.next_step,
            set_back=tuple(set_back[-MAX_RELEASED:]),
        )
        return [Send(peer, order) for peer in sorted(involved)]

    def handed_over(self, peer: PeerId) -> None:
        """Record that a new stage has its KV cache; once all have, the move is committed."""
        if self.state is _S.HANDOVER:
            self._awaited.discard(peer)
            if not self._awaited:
                self._enter(_C.HANDED_OVER, self.state_at, set())

    def commit_orders(self) -> list[Send]:
        """Return the messages by which workers free the old stages and serve the new ones."""
        return [Send(peer, DropStage(epoch=self.old.epoch)) for peer in self._peers]

    def undo(self) -> list[Send]:
        """Let the old stages go on; return the messages that free the new ones."""
        self._enter(_C.CANCELLED, self.state_at, set())
        self.old.resume()
        return [Send(peer, UndoMove(epoch=self.new.epoch)) for peer in self._peers]

    @property
    def _peers(self) -> list[PeerId]:
        return sorted({stage.peer for stage in (*self.old.stages, *self.new.stages)})

    def _finish_steps(self, cause: MoveCause, now: float) -> list[Send]:
        self._enter(cause, now, set())
        self.paused_at = now
        self.old.pause()
        return self.settle(now=now)

    def _enter(self, cause: MoveCause, now: float, awaited: set[PeerId]) -> None:
        self.state = MOVE_STATES.after(self.state, cause)
        self.state_at, self._awaited = now, awaited

    def _sent_by(self, peer: PeerId) -> tuple[KVTransfer, ...]:
        return tuple(
            KVTransfer(
                layers=transfer.layers,
                worker=transfer.receiver.worker,
                addresses=self._addresses[transfer.receiver.peer],
                key=self._keys[transfer.receiver.peer],
            )
            for transfer in self.transfers
            if transfer.sender.peer == peer
        )
