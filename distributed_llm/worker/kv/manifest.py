"""Describes a KV cache and states beside it, without tensors, as it is sent to another worker.

The fields of these structs are on the wire: arrays of MessagePack, in this order.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Annotated

import msgspec
import numpy as np

from distributed_llm.common.errors import StageError
from distributed_llm.common.kv_dtypes import KVDtype
from distributed_llm.common.types import KV_BLOCK, Count, SequenceId
from distributed_llm.worker.kv.segments import TokenIds, unseen_in

_WIRE_TOKEN = np.dtype("<i4")


class KVTransferError(StageError):
    """KV cache of another worker is damaged, incomplete or unexpected. No cache was changed."""


class ManifestSegment(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, array_like=True
):
    """A segment of the described cache; see `segments.Segment`.

    Attributes:
        number: identifies the segment in its cache.
        start: its first position.
        capacity: positions that the budget is charged for, a multiple of `KV_BLOCK`.
        owner: the sequence that may write it, or None.
    """

    number: Count
    start: Count
    capacity: Count
    owner: Count | None


class ManifestSequence(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, array_like=True
):
    """A sequence of the described cache; see `segments.CachedSequence`.

    Attributes:
        sequence_id: as in tasks.
        token_ids: of all held positions, int32, little-endian.
        segments: their numbers, in the order of positions; each ends where the next one begins.
        reads: for each segment, where the positions that this sequence reads end (exclusive); the
            owner must not write before it. Has no meaning for the owner itself.
        seen_from: the first position that layers with a window may still be asked for.
    """

    sequence_id: SequenceId
    token_ids: bytes
    segments: tuple[Count, ...]
    reads: tuple[Count, ...]
    seen_from: Count = 0

    @property
    def length(self) -> int:
        """How many positions are held."""
        return len(self.token_ids) // _WIRE_TOKEN.itemsize

    def tokens(self) -> TokenIds:
        """Return the token ids, int32 [length], read-only."""
        return np.frombuffer(self.token_ids, dtype=_WIRE_TOKEN).astype(np.int32, copy=False)


class ManifestState(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, array_like=True
):
    """A state of the layers that have one of their own; see `states.SequenceState`.

    Attributes:
        number: identifies the state at its stage.
        position: of the sequence, which comes next.
    """

    number: Count
    position: Count


class ManifestStates(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, array_like=True
):
    """What stands of a sequence in layers with a state of their own.

    Attributes:
        sequence_id: as in tasks.
        latest: where its latest step ended, then where that began, as far as they are told.
        snapshots: that are kept for as long as the sequence is held.
    """

    sequence_id: SequenceId
    latest: Annotated[tuple[ManifestState, ...], msgspec.Meta(max_length=2)]
    snapshots: tuple[ManifestState, ...]


class Extent(msgspec.Struct, frozen=True):
    """Positions `[start, stop)` of a sequence, held by one segment from its start on."""

    sequence_id: SequenceId
    start: int
    stop: int


class KVManifest(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, array_like=True
):
    """The content of a KV cache between two steps, without tensors.

    Attributes:
        sequences: that the cache holds.
        segments: of these sequences.
        kv_dtype: how keys and values are kept.
        states: that stand beside them, in layers that have one of their own.
    """

    sequences: tuple[ManifestSequence, ...]
    segments: tuple[ManifestSegment, ...]
    kv_dtype: KVDtype = "auto"
    states: tuple[ManifestStates, ...] = ()

    def check(self) -> None:
        """Refuse a manifest that no cache can have.

        Raises:
            KVTransferError: it contradicts itself.
        """
        segments = {segment.number: segment for segment in self.segments}
        held = {number for sequence in self.sequences for number in sequence.segments}
        ids = {sequence.sequence_id for sequence in self.sequences}
        sound = (
            len(segments) == len(self.segments)
            and len(ids) == len(self.sequences)
            and held == segments.keys()
            and all(segment.capacity % KV_BLOCK == 0 for segment in self.segments)
            and all(segment.owner is None or segment.owner in ids for segment in self.segments)
            and all(_is_sound(sequence, segments) for sequence in self.sequences)
            and self._states_are_sound()
        )
        if not sound:
            raise KVTransferError("another worker's manifest contradicts itself")

    def _states_are_sound(self) -> bool:
        states = [one for held in self.states for one in (*held.latest, *held.snapshots)]
        positions = {one.number: one.position for one in states}
        ids = {held.sequence_id for held in self.states}
        return len(ids) == len(self.states) and all(
            positions[one.number] == one.position for one in states
        )

    def chains(self) -> Mapping[int, tuple[ManifestSegment, ...]]:
        """Return the segments of each sequence, in the order of their positions."""
        segments = {segment.number: segment for segment in self.segments}
        return {
            sequence.sequence_id: tuple(segments[number] for number in sequence.segments)
            for sequence in self.sequences
        }

    def common_with(self, other: "KVManifest") -> "KVManifest":
        """Return this manifest cut to the leading tokens of each sequence that `other` has too.

        Two stages differ in this way if a step was abandoned between them.
        """
        theirs = {sequence.sequence_id: sequence for sequence in other.sequences}
        chains = self.chains()
        kept = []
        for mine in self.sequences:
            their = theirs.get(mine.sequence_id)
            length = 0 if their is None else _common_length(mine, their)
            if their is not None and length:
                seen_from = max(mine.seen_from, their.seen_from)
                kept.append(_cut(mine, chains[mine.sequence_id], length, seen_from))
        holders: dict[int, set[int]] = {}
        for sequence in kept:
            for number in sequence.segments:
                holders.setdefault(number, set()).add(sequence.sequence_id)
        segments = (
            segment
            if segment.owner in holders[segment.number]
            else msgspec.structs.replace(segment, owner=None)
            for segment in self.segments
            if segment.number in holders
        )
        return msgspec.structs.replace(self, sequences=tuple(kept), segments=tuple(segments))

    def unseen(self) -> dict[int, int]:
        """Return, by segment, how many of its first positions layers with a window may lack."""
        seen_from: dict[int, int] = {}
        for sequence in self.sequences:
            for number in sequence.segments:
                least = seen_from.get(number, sequence.seen_from)
                seen_from[number] = min(least, sequence.seen_from)
        return {
            s.number: unseen_in(s.start, s.capacity, seen_from[s.number]) for s in self.segments
        }

    def extents(self) -> dict[int, Extent]:
        """Return, by segment, the positions in use, with one sequence that has all of them."""
        extents: dict[int, Extent] = {}
        chains = self.chains()
        for sequence in self.sequences:
            for segment, stop in spans(chains[sequence.sequence_id], sequence.length):
                if segment.number not in extents or stop > extents[segment.number].stop:
                    extents[segment.number] = Extent(sequence.sequence_id, segment.start, stop)
        return extents


def spans(chain: tuple[ManifestSegment, ...], stop: int) -> Iterator[tuple[ManifestSegment, int]]:
    """Yield each segment of a chain with the position where it ends, at most `stop`."""
    for segment, following in itertools.pairwise((*chain, None)):
        assert segment is not None
        yield segment, min(stop, following.start) if following else stop


def _is_sound(sequence: ManifestSequence, segments: Mapping[int, ManifestSegment]) -> bool:
    chain = [segments[number] for number in sequence.segments]
    starts = [segment.start for segment in chain]
    ends = [*starts[1:], sequence.length]
    return (
        len(sequence.token_ids) % _WIRE_TOKEN.itemsize == 0
        and len(sequence.reads) == len(chain)
        and starts[:1] == [0]
        and all(start < end for start, end in itertools.pairwise(starts))
        and starts[-1] <= sequence.length
        and all(s.start + s.capacity >= end for s, end in zip(chain, ends, strict=True))
    )


def _common_length(mine: ManifestSequence, theirs: ManifestSequence) -> int:
    length = min(mine.length, theirs.length)
    differing = np.flatnonzero(mine.tokens()[:length] != theirs.tokens()[:length])
    return int(differing[0]) if differing.size else length


def _cut(
    sequence: ManifestSequence, chain: tuple[ManifestSegment, ...], length: int, seen_from: int
) -> ManifestSequence:
    """Return the sequence cut to `length` tokens, with the segments `KVCache.begin` would keep."""
    count = sum(segment.start <= length for segment in chain)
    return ManifestSequence(
        sequence_id=sequence.sequence_id,
        token_ids=sequence.token_ids[: length * _WIRE_TOKEN.itemsize],
        segments=sequence.segments[:count],
        reads=sequence.reads[:count],
        seen_from=seen_from,
    )


def manifest_sequence(
    sequence_id: SequenceId,
    tokens: TokenIds,
    segments: tuple[int, ...],
    reads: tuple[int, ...],
    seen_from: int,
) -> ManifestSequence:
    """Return the description of a sequence.

    Args:
        tokens: int32 [length].
    """
    return ManifestSequence(
        sequence_id=sequence_id,
        token_ids=tokens.astype(_WIRE_TOKEN, copy=False).tobytes(),
        segments=segments,
        reads=reads,
        seen_from=seen_from,
    )
