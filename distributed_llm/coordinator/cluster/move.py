"""How one pipeline becomes another while requests run: the phases of a move. Pure.

    loading --all are ready--> copying --all are copied--> draining --no step is left-->
    handing over --all took over--> done

The new stages load beside the old ones, which go on serving, and the KV cache of layers that change
hands is copied meanwhile. Then no more steps begin; when those under way have ended, what changed
since is copied too, and the new stages go on where the old ones stopped. Until the last of them has
said so everything can be undone, and the old stages go on as if nothing had been.

A move without copying goes from loading to draining, and ends there: the new stages begin with
empty caches, and the requests compute their tokens again.

(Live migration of virtual machines by pre-copy: Clark et al., NSDI 2005.)
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from distributed_llm.common.messages import (
    CancelStage,
    CopyKV,
    DropStage,
    KVTransfer,
    TakeOver,
)
from distributed_llm.common.types import LayerRange, PeerId
from distributed_llm.coordinator.events import Send
from distributed_llm.coordinator.plan import PipelineStage
from distributed_llm.coordinator.serving.pipeline import Pipeline

_LIMITS_S = {"loading": 900.0, "handing_over": 10.0}
"""After which a phase is taken for stuck. While steps drain their leases run."""

_COPY_S = 30.0
SLOW = 4.0
"""Copying ends after so long, and so many times what it should take: where the caches grow faster
than the links carry them, it would never."""


@dataclass(frozen=True)
class Transfer:
    """Layers whose KV cache goes from one worker to another."""

    sender: PipelineStage
    receiver: PipelineStage
    layers: LayerRange


def transfers_between(old: Sequence[PipelineStage], new: Sequence[PipelineStage]) -> list[Transfer]:
    """Return what has to be sent so that the new stages have what the old ones have."""
    held = {stage.peer: stage.layers for stage in old}
    return [
        Transfer(sender, receiver, part)
        for receiver in new
        for missing in _without(receiver.layers, held.get(receiver.peer))
        for sender in old
        for part in _common(missing, sender.layers)
    ]


class Move:
    """One move.

    Args:
        old: the pipeline that serves.
        new: the one that is loading.
        addresses: where the workers of `new` may be reached.
        link_key: of the epoch of `new`.
        copies: whether the KV cache goes along.
        copy_s: how long that should take.
        now: clock seconds.

    Attributes:
        transfers: of KV cache.
        phase_at: since when it is in its phase, clock seconds.
        held_at: since when no steps begin, clock seconds; None before that.
    """

    def __init__(
        self,
        old: Pipeline,
        new: Pipeline,
        *,
        addresses: Mapping[PeerId, tuple[str, ...]],
        link_key: str,
        copies: bool,
        copy_s: float,
        now: float,
    ) -> None:
        self.old = old
        self.new = new
        self.copies = copies
        self.transfers = transfers_between(old.stages, new.stages) if copies else []
        self.began_at = now
        self.held_at: float | None = None
        self.phase: Literal["loading", "copying", "draining", "handing_over", "done"] = "loading"
        self._addresses = addresses
        self._link_key = link_key
        self._copy_limit_s = _COPY_S + SLOW * copy_s
        self._waits_for: set[PeerId] = set()
        self.phase_at = now

    def concerns(self, peer: PeerId) -> bool:
        """Return whether a worker has a part in it."""
        return any(stage.peer == peer for stage in (*self.old.stages, *self.new.stages))

    def next_deadline(self) -> float | None:
        """Return when the phase has taken too long, clock seconds."""
        copying = self.phase == "copying"
        limit_s = self._copy_limit_s if copying else _LIMITS_S.get(self.phase)
        return None if limit_s is None else self.phase_at + limit_s

    def loaded(self, *, now: float) -> list[Send]:
        """All new stages have their layers: copy what they need, or let the steps end."""
        senders = {transfer.sender.peer: transfer.sender for transfer in self.transfers}
        if not senders:
            return self._drain(now)
        self._enter("copying", now, set(senders))
        return [
            Send(peer, CopyKV(epoch=self.new.epoch, link_key=self._link_key, transfers=sent))
            for peer in senders
            for sent in (self._sent_by(peer),)
        ]

    def copied(self, peer: PeerId, *, now: float) -> list[Send]:
        """A worker has sent what it has; it will send again what changes."""
        if self.phase != "copying" or peer not in self._waits_for:
            return []
        self._waits_for.remove(peer)
        return [] if self._waits_for else self._drain(now)

    def copied_enough(self, *, now: float) -> list[Send]:
        """Copying has taken long: what is left is sent while steps stand still."""
        return self._drain(now)

    def settle(self, *, now: float) -> list[Send]:
        """Look whether the last step has ended; `is_over` may be true then."""
        in_flight = self.old.in_flight
        if self.phase != "draining" or in_flight is None or in_flight.num_steps:
            return []
        if not self.copies:
            self.phase = "done"
            return []
        receivers = {stage.peer for stage in self.new.stages}
        involved = receivers | {transfer.sender.peer for transfer in self.transfers}
        self._enter("handing_over", now, receivers)
        return [Send(peer, TakeOver(epoch=self.new.epoch)) for peer in sorted(involved)]

    def took_over(self, peer: PeerId) -> None:
        """A new stage has its KV cache; `is_over` may be true then."""
        if self.phase == "handing_over":
            self._waits_for.discard(peer)
            if not self._waits_for:
                self.phase = "done"

    @property
    def is_over(self) -> bool:
        """Whether the new stages are to go on, and the old ones to go."""
        return self.phase == "done"

    def commit(self) -> list[Send]:
        """Return the messages that free what is served no more, and say that the new is."""
        return [Send(peer, DropStage(epoch=self.old.epoch)) for peer in self._peers]

    def undo(self) -> list[Send]:
        """Let the old stages go on; return the messages that free the new ones."""
        self.old.resume()
        return [Send(peer, CancelStage(epoch=self.new.epoch)) for peer in self._peers]

    @property
    def _peers(self) -> list[PeerId]:
        return sorted({stage.peer for stage in (*self.old.stages, *self.new.stages)})

    def _drain(self, now: float) -> list[Send]:
        self._enter("draining", now, set())
        self.held_at = now
        self.old.pause()
        return self.settle(now=now)

    def _enter(
        self, phase: Literal["copying", "draining", "handing_over"], now: float, waits: set[PeerId]
    ) -> None:
        self.phase, self.phase_at, self._waits_for = phase, now, waits

    def _sent_by(self, peer: PeerId) -> tuple[KVTransfer, ...]:
        return tuple(
            KVTransfer(
                layers=transfer.layers,
                worker=transfer.receiver.worker,
                addresses=self._addresses[transfer.receiver.peer],
            )
            for transfer in self.transfers
            if transfer.sender.peer == peer
        )


def _without(layers: LayerRange, held: LayerRange | None) -> Iterator[LayerRange]:
    """Yield the parts of `layers` that are not in `held`."""
    if held is None or held.stop <= layers.start or layers.stop <= held.start:
        yield layers
        return
    if layers.start < held.start:
        yield LayerRange(layers.start, held.start)
    if held.stop < layers.stop:
        yield LayerRange(held.stop, layers.stop)


def _common(left: LayerRange, right: LayerRange) -> Iterator[LayerRange]:
    start, stop = max(left.start, right.start), min(left.stop, right.stop)
    if start < stop:
        yield LayerRange(start, stop)
