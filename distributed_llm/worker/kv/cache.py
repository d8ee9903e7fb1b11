"""Keys and values of every sequence in every layer of one stage, and the token ids behind them.

A sequence is a chain of segments. A segment is, in each layer, one contiguous buffer of keys
`[heads, capacity, head_dim]` and one of values, so attention reads it without gathering, and a
layer moves to another worker as a few slices. Most sequences have one segment. A sequence that
begins as another (`share`) references that one's segments, copies nothing, and goes on in a segment
of its own. Only the owner of a segment writes it, and only beyond what others were given of it. It
may hand it on: a conversation whose every turn takes over the turn before stays one segment.

Buffers have room for exactly the blocks of `KV_BLOCK` positions that they need: memory is what the
coordinator charges. A buffer that grows is copied, every `KV_BLOCK` tokens; attention has read it
`KV_BLOCK` times meanwhile, so reading and writing it once more costs one part in 32 of that. While
it is copied one layer of one segment exists twice; that much is not counted.

A step is a transaction. `admit` refuses what does not fit before anything is touched, `begin` cuts
a sequence back to where the step starts and notes its tokens, `append` writes one layer's keys and
values beyond the cut, and only `commit` makes the new positions count. A step that fails in between
leaves positions that no one counts; running it again overwrites them. So a task may be run twice,
or half, and never corrupts a sequence.
"""

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol
from weakref import WeakSet

import numpy as np
from torch import Tensor

from distributed_llm.common.errors import StageError
from distributed_llm.common.messages import SequenceSlice
from distributed_llm.common.types import KV_BLOCK
from distributed_llm.worker.kv.manifest import KVManifest, ManifestSegment, held_sequence
from distributed_llm.worker.kv.segments import (
    CachedSequence,
    KVBuffers,
    KVLayout,
    Segment,
    TokenIds,
    rounded,
)


class KVCacheFull(StageError):
    """A step needs more blocks than the budget has left. Nothing was touched.

    It fits once other sequences are released.
    """

    code = "kv_full"


class WriteWatcher(Protocol):
    """Wants to know what is written."""

    def written(self, segment: int, offset: int) -> None:
        """Positions of this segment, from `offset` after its start on, are about to change."""


class KVCache:
    """The KV cache of one stage.

    Args:
        num_layers: layers of the stage, numbered from 0.
        max_bytes: what it may take; None is no limit. It limits from when `bytes_per_token` is
            known.

    Attributes:
        max_bytes: may be set at any time; what is held already is not given up.
    """

    def __init__(self, num_layers: int, max_bytes: int | None = None) -> None:
        self.max_bytes = max_bytes
        self._num_layers = num_layers
        self._sequences: dict[int, CachedSequence] = {}
        self._layouts: list[KVLayout | None] = [None] * num_layers
        self._bytes_per_token = 0
        self._nbytes = 0
        self._capacity = 0
        self._numbers = itertools.count()
        self._watchers: WeakSet[WriteWatcher] = WeakSet()

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values, each buffer once, unfilled positions included."""
        return self._nbytes

    @property
    def capacity(self) -> int:
        """Positions that are paid for, each segment once: a multiple of `KV_BLOCK`."""
        return self._capacity

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one position in all layers; 0 until every layer was written once."""
        return self._bytes_per_token

    @property
    def sequence_ids(self) -> tuple[int, ...]:
        """The sequences of which anything is held."""
        return tuple(self._sequences)

    def __contains__(self, sequence_id: int) -> bool:
        return sequence_id in self._sequences

    def length(self, sequence_id: int) -> int:
        """Return how many positions of the sequence are held in all layers; 0 if unknown."""
        sequence = self._sequences.get(sequence_id)
        return sequence.length if sequence else 0

    def layout(self, layer: int) -> KVLayout:
        """Return what keys and values of this layer look like; it was written once."""
        layout = self._layouts[layer]
        assert layout is not None
        return layout

    def tokens(self, sequence_id: int, length: int) -> TokenIds:
        """Return the first `length` token ids, int32; those of a running step may be among them."""
        return self._sequences[sequence_id].tokens[:length]

    def admit(self, step: Sequence[SequenceSlice]) -> None:
        """Start a step as a whole: begin its new sequences as prefixes of others, if it fits.

        Sequences that are taken are freed. A prefix of a sequence that exists already is passed
        over, so that a step may be admitted again.

        Args:
            step: what positions are to be computed; each sequence once, none of them taken. What
                each of them starts from is held.

        Raises:
            KVCacheFull: it does not fit, or might not: what several of its sequences cut off and
                only they share is not counted as free. Nothing was changed.
        """
        taken = {part.prefix.sequence_id for part in step if part.prefix and part.prefix.take}
        children = []
        for part in step:
            if part.prefix and part.sequence_id not in self:
                self.share(part.sequence_id, part.prefix.sequence_id, part.prefix.length)
                children.append(part.sequence_id)
        missing = self._missing_positions(step, taken)
        if missing > 0:
            self.free(children)
            raise KVCacheFull(
                f"The KV cache of this worker is full: the step needs {missing} positions more "
                f"than its limit of {self.max_bytes} bytes has room for. Release sequences first."
            )
        for part in step:
            if part.prefix and part.prefix.take:
                self._hand_on(part.prefix.sequence_id, part.sequence_id)
        self.free(taken)

    def share(self, child: int, parent: int, length: int) -> None:
        """Let the new sequence `child` begin as the first `length` positions of `parent`.

        Raises:
            ValueError: `child` exists, or these positions of `parent` are not held.
        """
        held = self._sequences.get(parent)
        if child in self or held is None or length > held.length:
            raise ValueError(f"sequence {child} cannot begin as {length} positions of {parent}")
        sequence = self._sequences[child] = CachedSequence()
        sequence.length = length
        sequence.tokens = held.tokens[:length].copy()
        for segment, following in itertools.pairwise((*held.segments, None)):
            assert segment is not None
            if segment.start < length:
                sequence.segments.append(segment)
                segment.holders[child] = min(length, following.start if following else length)

    def _hand_on(self, parent: int, child: int) -> None:
        """Let `child` write where `parent` did."""
        if parent in self and child in self:
            for segment in self._sequences[child].segments:
                if segment.owner == parent:
                    segment.owner = child

    def begin(self, sequence_id: int, start: int, token_ids: TokenIds) -> None:
        """Start a step that computes `token_ids` at positions from `start` on.

        Positions from `start` on are forgotten; other sequences that share them keep them.

        Raises:
            ValueError: positions before `start` are not held.
        """
        if start > self.length(sequence_id):
            raise ValueError(f"sequence {sequence_id} has no position {start - 1}")
        sequence = self._sequences.setdefault(sequence_id, CachedSequence())
        kept, goes_on = _segments_before(sequence, start, {sequence_id})
        self._let_go(sequence_id, sequence.segments[len(kept) :])
        stop = start + len(token_ids)
        if goes_on:
            for watcher in self._watchers:
                watcher.written(kept[-1].number, start - kept[-1].start)
        else:
            kept.append(self._new_segment(start))
            kept[-1].owner = sequence_id
            kept[-1].holders[sequence_id] = start
        growth = max(0, rounded(stop - kept[-1].start) - kept[-1].capacity)
        kept[-1].capacity += growth
        self._capacity += growth
        sequence.segments, sequence.length = kept, start
        sequence.write_tokens(start, token_ids)

    def append(
        self, layer: int, sequence_id: int, start: int, keys: Tensor, values: Tensor
    ) -> list[KVBuffers]:
        """Write one layer's keys and values from position `start` on; return all up to there.

        Args:
            layer: number of the layer within the stage.
            sequence_id: of a sequence whose step was begun.
            start: where the step starts.
            keys: [heads, tokens, head_dim].
            values: [heads, tokens, value_dim].

        Returns:
            Views of the positions [0, start + tokens), in order, the last of them at least the
            tokens; good until the next call for this layer.
        """
        segments = self._sequences[sequence_id].segments
        last = segments[-1]
        first = start - last.start
        stop = first + keys.shape[1]
        held = last.layers[layer]
        if held is None or held.keys.shape[1] < last.capacity:
            held = self._grow(layer, last, first, keys, values)
        held.keys[:, first:stop] = keys
        held.values[:, first:stop] = values
        newest = KVBuffers(held.keys[:, :stop], held.values[:, :stop])
        if len(segments) == 1:
            return [newest]
        return [*_views(layer, segments), newest]

    def commit(self, sequence_id: int, length: int) -> None:
        """Count `length` positions of the sequence as held: every layer of the step succeeded."""
        self._sequences[sequence_id].length = length

    def free(self, sequence_ids: Iterable[int]) -> None:
        """Forget these sequences; unknown ones are passed over.

        What nobody else references gives its memory back.
        """
        for sequence_id in sequence_ids:
            sequence = self._sequences.pop(sequence_id, None)
            if sequence is not None:
                self._let_go(sequence_id, sequence.segments)

    def _let_go(self, sequence_id: int, segments: Iterable[Segment]) -> None:
        for segment in segments:
            del segment.holders[sequence_id]
            segment.owner = None if segment.owner == sequence_id else segment.owner
            if not segment.holders:
                self._capacity -= segment.capacity
                self._nbytes -= segment.nbytes

    def watch(self, watcher: WriteWatcher) -> None:
        """Tell `watcher`, as long as anyone else knows it, what is written to old segments."""
        self._watchers.add(watcher)

    def extents(self) -> dict[Segment, int]:
        """Return all segments, and how many positions of each count."""
        found: dict[Segment, int] = {}
        for sequence in self._sequences.values():
            for segment, count in sequence.spans():
                found[segment] = max(count, found.get(segment, 0))
        return found

    def buffers(self) -> list[Tensor]:
        """Return all keys and values, each buffer once."""
        return [
            states
            for segment in self.extents()
            for held in segment.layers
            if held
            for states in held
        ]

    def manifest(self) -> KVManifest:
        """Tell what is held, while no step runs."""
        return KVManifest(
            sequences=tuple(
                held_sequence(
                    sequence_id,
                    sequence.tokens[: sequence.length],
                    tuple(segment.number for segment in sequence.segments),
                    tuple(segment.holders[sequence_id] for segment in sequence.segments),
                )
                for sequence_id, sequence in self._sequences.items()
            ),
            segments=tuple(
                ManifestSegment(number=s.number, start=s.start, capacity=s.capacity, owner=s.owner)
                for s in self.extents()
            ),
        )

    def restore(
        self, manifest: KVManifest, buffers: Mapping[int, Sequence[KVBuffers | None]]
    ) -> None:
        """Hold what `manifest` tells; `max_bytes` does not limit it.

        Args:
            manifest: of another cache; it was checked.
            buffers: by number of a segment in the manifest, what it has in each layer; they belong
                to this cache from now on.

        Raises:
            ValueError: something is held already.
        """
        if self._sequences:
            raise ValueError("the KV cache is not empty")
        segments = {}
        for told in manifest.segments:
            segment = segments[told.number] = self._new_segment(told.start)
            segment.capacity, segment.owner = told.capacity, told.owner
            segment.layers = list(buffers[told.number])
            self._capacity += segment.capacity
            self._nbytes += segment.nbytes
        for held in manifest.sequences:
            sequence = self._sequences[held.sequence_id] = CachedSequence()
            sequence.length = held.length
            sequence.segments = [segments[number] for number in held.segments]
            sequence.write_tokens(0, held.tokens())
            for segment, read in zip(sequence.segments, held.reads, strict=True):
                segment.holders[held.sequence_id] = read

    def _new_segment(self, start: int) -> Segment:
        return Segment(next(self._numbers), start, self._num_layers)

    def _missing_positions(self, step: Sequence[SequenceSlice], leaving: set[int]) -> int:
        """Return how many positions too few there would be if the step ran and `leaving` left."""
        if self.max_bytes is None or not self.bytes_per_token:
            return 0
        room = self.max_bytes // (self.bytes_per_token * KV_BLOCK) * KV_BLOCK
        needed = self._capacity - self._capacity_without(leaving)
        needed += sum(self._growth(part, leaving) for part in step)
        return needed - room

    def _capacity_without(self, leaving: set[int]) -> int:
        """Return how much of the capacity is of no sequence but `leaving`."""
        sequences = [self._sequences[i] for i in leaving if i in self]
        segments = {segment for sequence in sequences for segment in sequence.segments}
        return sum(segment.capacity for segment in segments if segment.holders.keys() <= leaving)

    def _growth(self, part: SequenceSlice, leaving: set[int]) -> int:
        """Return what `begin` will add to the capacity once `leaving` have left."""
        sequence = self._sequences.get(part.sequence_id, CachedSequence())
        writers = {part.sequence_id}
        if part.prefix and part.prefix.take:
            writers.add(part.prefix.sequence_id)
        kept, goes_on = _segments_before(sequence, part.start, writers, leaving)
        growth = -sum(
            segment.capacity
            for segment in sequence.segments[len(kept) :]
            if len(segment.holders.keys() - leaving) == 1
        )
        stop = part.start + part.num_tokens
        if not goes_on:
            return growth + rounded(stop - part.start)
        return growth + max(0, rounded(stop - kept[-1].start) - kept[-1].capacity)

    def _grow(
        self, layer: int, segment: Segment, kept: int, keys: Tensor, values: Tensor
    ) -> KVBuffers:
        """Give a layer of a segment buffers of its capacity with the first `kept` positions."""
        layout = self._layouts[layer] or self._learn_layout(layer, keys, values)
        grown = layout.allocate(segment.capacity)
        held = segment.layers[layer]
        if held is not None:
            grown.keys[:, :kept] = held.keys[:, :kept]
            grown.values[:, :kept] = held.values[:, :kept]
            self._nbytes -= held.nbytes
        self._nbytes += grown.nbytes
        segment.layers[layer] = grown
        return grown

    def _learn_layout(self, layer: int, keys: Tensor, values: Tensor) -> KVLayout:
        heads, _, key_dim = keys.shape
        layout = KVLayout(heads, key_dim, values.shape[2], keys.dtype, keys.device)
        self._layouts[layer] = layout
        known = [layout for layout in self._layouts if layout]
        if len(known) == self._num_layers:
            self._bytes_per_token = sum(layout.token_bytes for layout in known)
        return layout


def as_token_ids(token_ids: Sequence[int]) -> TokenIds:
    """Return `token_ids` as the int32 array that the cache keeps."""
    return np.asarray(token_ids, dtype=np.int32)


def _segments_before(
    sequence: CachedSequence, start: int, writers: Collection[int], leaving: Collection[int] = ()
) -> tuple[list[Segment], bool]:
    """Return what the sequence keeps if it goes on at `start`, and whether it does so in the last.

    Args:
        writers: the sequence itself, and the one that it takes.
        leaving: sequences that will not be there any more.
    """
    kept = [segment for segment in sequence.segments if segment.start <= start]
    if kept and kept[-1].may_write(writers, start, leaving):
        return kept, True
    return [segment for segment in kept if segment.start < start], False


def _views(layer: int, segments: Sequence[Segment]) -> list[KVBuffers]:
    """Return what the sequence sees of all its segments but the last."""
    views = []
    for segment, following in itertools.pairwise(segments):
        held = segment.layers[layer]
        assert held is not None
        stop = following.start - segment.start
        views.append(KVBuffers(held.keys[:, :stop], held.values[:, :stop]))
    return views
