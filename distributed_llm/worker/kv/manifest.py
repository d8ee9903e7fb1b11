"""What a KV cache holds, told without tensors: sequences, and the segments that they consist of."""

import itertools
from collections.abc import Iterator, Mapping

import msgspec
import numpy as np

from distributed_llm.common.errors import StageError
from distributed_llm.common.types import KV_BLOCK, Count
from distributed_llm.worker.kv.segments import TokenIds

_WIRE_TOKEN = np.dtype("<i4")


class KVTransferError(StageError):
    """Keys and values of another worker are not what they should be. Nothing was touched."""


class ManifestSegment(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, array_like=True
):
    """Consecutive positions that one sequence wrote and others may read.

    Attributes:
        number: its name in the cache that it is in; none has it again.
        start: its first position.
        capacity: positions that are paid for, a multiple of `KV_BLOCK`.
        owner: the sequence that may write it; None is nobody.
    """

    number: Count
    start: Count
    capacity: Count
    owner: Count | None


class ManifestSequence(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, array_like=True
):
    """What is held of one sequence, in all layers.

    Attributes:
        token_ids: of all positions that count, int32, little-endian.
        segments: numbers; each segment ends where the next begins, the last beyond the last token.
        reads: by segment, the position before which this sequence was given it, and its owner
            leaves it alone; without meaning for its owner.
    """

    sequence_id: Count
    token_ids: bytes
    segments: tuple[Count, ...]
    reads: tuple[Count, ...]

    @property
    def length(self) -> int:
        """How many positions count."""
        return len(self.token_ids) // _WIRE_TOKEN.itemsize

    def tokens(self) -> TokenIds:
        """Return the token ids, int32 [length], not to be written to."""
        return np.frombuffer(self.token_ids, dtype=_WIRE_TOKEN).astype(np.int32, copy=False)


class Extent(msgspec.Struct, frozen=True):
    """Positions `[start, stop)` of a sequence, which are those of a segment from its start on."""

    sequence_id: int
    start: int
    stop: int


class KVManifest(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, array_like=True
):
    """What a KV cache holds between two steps."""

    sequences: tuple[ManifestSequence, ...]
    segments: tuple[ManifestSegment, ...]

    def check(self) -> None:
        """Refuse what no cache holds.

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
        )
        if not sound:
            raise KVTransferError("another worker tells of a KV cache that cannot be")

    def chains(self) -> Mapping[int, tuple[ManifestSegment, ...]]:
        """Return the segments of each sequence, in the order of their positions."""
        segments = {segment.number: segment for segment in self.segments}
        return {
            sequence.sequence_id: tuple(segments[number] for number in sequence.segments)
            for sequence in self.sequences
        }

    def common_with(self, other: "KVManifest") -> "KVManifest":
        """Return what of this the other cache holds too: of each sequence the same first tokens.

        Stages differ by what a step that was abandoned between them left.
        """
        theirs = {sequence.sequence_id: sequence for sequence in other.sequences}
        chains = self.chains()
        kept = []
        for mine in self.sequences:
            their = theirs.get(mine.sequence_id)
            length = 0 if their is None else _common_length(mine, their)
            if length:
                kept.append(_cut(mine, chains[mine.sequence_id], length))
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
        return KVManifest(sequences=tuple(kept), segments=tuple(segments))

    def extents(self) -> dict[int, Extent]:
        """Return, by segment, the positions that count, and a sequence that reads all of them."""
        found: dict[int, Extent] = {}
        chains = self.chains()
        for sequence in self.sequences:
            for segment, stop in spans(chains[sequence.sequence_id], sequence.length):
                if segment.number not in found or stop > found[segment.number].stop:
                    found[segment.number] = Extent(sequence.sequence_id, segment.start, stop)
        return found


def spans(chain: tuple[ManifestSegment, ...], stop: int) -> Iterator[tuple[ManifestSegment, int]]:
    """Yield each segment of a sequence, and where its positions before `stop` end."""
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
    sequence: ManifestSequence, chain: tuple[ManifestSegment, ...], length: int
) -> ManifestSequence:
    """Return what `KVCache.begin` at `length` would leave, before it looks who may write."""
    count = sum(segment.start <= length for segment in chain)
    return ManifestSequence(
        sequence_id=sequence.sequence_id,
        token_ids=sequence.token_ids[: length * _WIRE_TOKEN.itemsize],
        segments=sequence.segments[:count],
        reads=sequence.reads[:count],
    )


def held_sequence(
    sequence_id: int, tokens: TokenIds, segments: tuple[int, ...], reads: tuple[int, ...]
) -> ManifestSequence:
    """Return a sequence of these token ids."""
    return ManifestSequence(
        sequence_id=sequence_id,
        token_ids=tokens.astype(_WIRE_TOKEN, copy=False).tobytes(),
        segments=segments,
        reads=reads,
    )
