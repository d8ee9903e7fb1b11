"""The KV cache of one stage: keys and values of every sequence in every layer, and its token ids.

A sequence is a chain of segments. Most sequences have one segment. A sequence whose prefix is
another sequence (`share`) references the segments of that one, copies nothing, and continues in a
segment of its own. Only the owner of a segment writes it, and only behind the positions that others
read. It may pass ownership on: a conversation in which every turn takes the turn before stays in
one segment.

The coordinator accounts for memory in blocks of `KV_BLOCK` positions. It is of one of two kinds. In
*pages* (`pages.py`) a layer has one tensor each, of which every block belongs to a segment; they
are for a GPU with a kernel that reads them. In *buffers* each segment has one of keys and one of
values in each layer, so attention reads it without gathering. On a CPU they are rows of slabs
(`slabs.py`): they have room for more, and take memory for what is written. One that is full is
copied to a row of twice the room. Elsewhere a buffer has room for exactly the blocks that it needs,
and is copied once per `KV_BLOCK` tokens. Attention has read it `KV_BLOCK` times by then, so reading
and writing it once more adds one part in 32. During a copy one layer exists twice, of one segment
or of all pages; that is not accounted for.

A step is a transaction. `admit` refuses a step that does not fit before anything changes. `begin`
truncates a sequence to where the step starts and sets its tokens. `append` writes the keys and
values of one layer behind that. Only `commit` makes the new positions count. A step that fails in
between leaves positions that do not count, and that the next attempt overwrites. So a task may run
twice, or half, without corrupting a sequence.

A layer with a window sees the last positions only. Which ones it may still be asked for, the
coordinator says (`forget`), because it knows how far sequences may be set back; the others are
dropped in such layers, in whole blocks. A sequence that has lost positions in this way can neither
be truncated to where they would be seen again, nor share a prefix that ends there (`sees`).
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol
from weakref import WeakSet

import numpy as np
from torch import Tensor

from distributed_llm.common.errors import StageError
from distributed_llm.common.kv_dtypes import KVDtype
from distributed_llm.common.messages import SequenceSlice
from distributed_llm.common.types import SequenceId
from distributed_llm.worker.kv.coding import coding_of
from distributed_llm.worker.kv.layer_buffers import LayerBuffers
from distributed_llm.worker.kv.layer_memory import ArrivedLayers, LayerMemory, SharedLayers
from distributed_llm.worker.kv.manifest import KVManifest, ManifestSegment, manifest_sequence
from distributed_llm.worker.kv.pages import LayerPages
from distributed_llm.worker.kv.segments import (
    CachedSequence,
    KVBuffers,
    KVLayout,
    Segment,
    TokenIds,
    rounded,
    segments_before,
    unseen_in,
)


class KVCacheFull(StageError):
    """A step needs more blocks than are left; the cache is unchanged. Releasing sequences helps."""

    code = "kv_full"


class WriteWatcher(Protocol):
    """Is told before positions of existing segments are overwritten."""

    def written(self, segment: int, offset: int) -> None:
        """Handle that a segment is about to change from `offset` positions after its start on."""


class KVCache:
    """The KV cache of one stage.

    Args:
        num_layers: layers of the stage, numbered from 0.
        max_bytes: limit of `nbytes`, or None; layers count once they were written.
        kv_dtype: how keys and values are kept.
        in_pages: whether in pages, or else in buffers.

    Attributes:
        max_bytes: as given; may be changed at any time, and frees nothing.
        kv_dtype: as given.
        coding: how keys and values become the rows of bytes that buffers then hold instead; None
            if they are kept as they are computed.
        pages: where keys and values are; None: they are in buffers.
    """

    def __init__(
        self,
        num_layers: int,
        max_bytes: int | None = None,
        kv_dtype: KVDtype = "auto",
        *,
        in_pages: bool = False,
    ) -> None:
        self.max_bytes = max_bytes
        self.kv_dtype: KVDtype = kv_dtype
        self.coding = coding_of(kv_dtype)
        self._num_layers = num_layers
        self._sequences: dict[SequenceId, CachedSequence] = {}
        self.pages = LayerPages(num_layers) if in_pages else None
        self._buffers = LayerBuffers(num_layers)
        self._layers: LayerMemory = self.pages or self._buffers
        self._segments: set[Segment] = set()
        self._capacity = 0
        self._unseen = 0
        self._numbers = itertools.count()
        self._watchers: WeakSet[WriteWatcher] = WeakSet()

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, each segment once, with the unfilled positions of blocks."""
        if self.pages is not None:
            unseen_bytes = self._unseen * self.windowed_bytes_per_token if self._unseen else 0
            return self._capacity * self.bytes_per_token - unseen_bytes
        return sum(segment.nbytes for segment in self._segments)

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory that are taken: of pages, with those that no sequence has now."""
        return self.nbytes if self.pages is None else self.pages.nbytes

    @property
    def capacity(self) -> int:
        """Positions that the budget is charged for, each segment once: a multiple of `KV_BLOCK`."""
        return self._capacity

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one position in all layers that were written; some may keep none."""
        return self._layers.bytes_per_token

    @property
    def windows(self) -> tuple[int, ...]:
        """By layer, how many positions a token sees, itself included; 0: all."""
        return self._layers.windows

    @windows.setter
    def windows(self, windows: Sequence[int]) -> None:
        self._layers.windows = tuple(windows)
        self.give_back()

    @property
    def windowed_bytes_per_token(self) -> int:
        """Bytes of one position in the layers with a window; all layers were written once."""
        return self._layers.windowed_bytes_per_token

    @property
    def sequence_ids(self) -> tuple[SequenceId, ...]:
        """The sequences that the cache holds."""
        return tuple(self._sequences)

    def __contains__(self, sequence_id: SequenceId) -> bool:
        return sequence_id in self._sequences

    def length(self, sequence_id: SequenceId) -> int:
        """Return how many positions of the sequence are held in all layers; 0 if unknown."""
        sequence = self._sequences.get(sequence_id)
        return sequence.length if sequence else 0

    def sees(self, sequence_id: SequenceId, position: int) -> bool:
        """Return whether all is held that a token at `position` of a known sequence sees."""
        before = max(0, position + 1 - max(self.windows))
        return not any(self.windows) or self._sequences[sequence_id].seen_from <= before

    def forget(self, seen_from: Mapping[SequenceId, int]) -> None:
        """Drop what layers with a window are not asked for any more; not to be called in a step.

        Args:
            seen_from: by sequence, the first position that is seen from now on. Unknown sequences
                are ignored, and so are positions before those told earlier.
        """
        changed: dict[Segment, None] = {}
        for sequence_id, position in seen_from.items():
            sequence = self._sequences.get(sequence_id)
            if sequence is not None and position > sequence.seen_from:
                sequence.seen_from = position
                changed |= dict.fromkeys(sequence.segments)
        for segment in changed:
            self._drop_unseen(segment)

    def _drop_unseen(self, segment: Segment) -> None:
        """Drop the positions of a segment that none of its holders sees any more."""
        holders = map(SequenceId, segment.holders)
        seen_from = min(self._sequences[holder].seen_from for holder in holders)
        before = segment.unseen
        unseen = unseen_in(segment.start, segment.capacity, seen_from)
        if unseen > before:
            segment.unseen = unseen
            self._unseen += unseen - before
            self._layers.drop_unseen(segment, before)

    def knows(self, layer: int) -> bool:
        """Return whether a layer has been written; others keep nothing."""
        return self._layers.knows(layer)

    def layout(self, layer: int) -> KVLayout:
        """Return the layout of a layer that has been written at least once."""
        return self._layers.layout(layer)

    def tokens(self, sequence_id: SequenceId, length: int) -> TokenIds:
        """Return the first `length` token ids, int32 [length]; those of a running step count."""
        return self._sequences[sequence_id].tokens[:length]

    def admit(self, step: Sequence[SequenceSlice], beside_bytes: int = 0) -> None:
        """Check that a step fits, and create its new sequences from their prefixes.

        Prefixes that are taken are freed. Sequences that exist already are left alone, so a step
        may be admitted again.

        Args:
            step: the positions to compute; each sequence once, none of them taken. The positions
                before them are held.
            beside_bytes: of the limit that something else takes.

        Raises:
            KVCacheFull: the step does not fit; the cache is unchanged. The estimate is on the safe
                side: positions that several sequences of the step share and all truncate are not
                counted as free.
        """
        taken = {part.prefix.sequence_id for part in step if part.prefix and part.prefix.take}
        children = []
        for part in step:
            if part.prefix and part.sequence_id not in self:
                self.share(part.sequence_id, part.prefix.sequence_id, part.prefix.length)
                children.append(part.sequence_id)
        missing = self._missing_bytes(step, taken, beside_bytes)
        if missing > 0:
            self.free(children)
            raise KVCacheFull(
                f"The KV cache of this worker is full: the step needs {missing} bytes more than "
                f"its limit of {self.max_bytes} bytes. Release sequences first."
            )
        for part in step:
            if part.prefix and part.prefix.take:
                self._pass_ownership(part.prefix.sequence_id, part.sequence_id)
        self.free(taken)

    def share(self, child: SequenceId, parent: SequenceId, length: int) -> None:
        """Create the sequence `child` with the first `length` positions of `parent`.

        Raises:
            ValueError: `child` exists, or `parent` has fewer positions.
        """
        held = self._sequences.get(parent)
        if child in self or held is None or length > held.length:
            raise ValueError(f"sequence {child} cannot begin as {length} positions of {parent}")
        sequence = self._sequences[child] = CachedSequence()
        sequence.length, sequence.seen_from = length, held.seen_from
        sequence.tokens = held.tokens[:length].copy()
        for segment, following in itertools.pairwise((*held.segments, None)):
            assert segment is not None
            if segment.start < length:
                sequence.segments.append(segment)
                segment.holders[child] = min(length, following.start if following else length)

    def _pass_ownership(self, parent: SequenceId, child: SequenceId) -> None:
        """Make `child` the owner of the segments that both read and `parent` owns."""
        if parent in self and child in self:
            for segment in self._sequences[child].segments:
                if segment.owner == parent:
                    segment.owner = child

    def begin(self, sequence_id: SequenceId, start: int, token_ids: TokenIds) -> None:
        """Truncate a sequence to `start` positions, and set the tokens of the step after them.

        Other sequences that share the truncated positions keep them.

        Args:
            sequence_id: created if it does not exist.
            start: first position of the step.
            token_ids: int32 [tokens].

        Raises:
            ValueError: positions before `start` are not held.
        """
        if start > self.length(sequence_id):
            raise ValueError(f"sequence {sequence_id} has no position {start - 1}")
        sequence = self._sequences.setdefault(sequence_id, CachedSequence())
        kept, goes_on = segments_before(sequence, start, {sequence_id})
        self._leave(sequence_id, sequence.segments[len(kept) :])
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
        self._layers.make_room(kept[-1], self._segments, self.max_bytes)

    def append(
        self, layer: int, sequence_id: SequenceId, start: int, keys: Tensor, values: Tensor
    ) -> list[KVBuffers]:
        """Write one layer's keys and values of a step; return all positions up to their end.

        Args:
            layer: number of the layer within the stage.
            sequence_id: of a sequence for which `begin` was called.
            start: first position of the step.
            keys: [heads, tokens, head_dim].
            values: [heads, tokens, value_dim].

        Returns:
            The positions up to start + tokens, in order: all of them, or those that a layer with a
            window keeps; the last buffers contain at least the new ones. They are not to be
            written, and valid until the next call for this layer.
        """
        if self.coding:
            keys, values = self.coding.encoded(keys, values)
        segments = self._sequences[sequence_id].segments
        first = start - segments[-1].start
        self._layers.write(layer, segments[-1], first, keys, values)
        return self._layers.read_chain(layer, segments, first + keys.shape[1])

    def read(self, layer: int, segment: Segment, first: int, stop: int) -> KVBuffers:
        """Return positions `[first, stop)` of a segment, counted from its start.

        They are not to be written, and valid until the layer is written.

        Args:
            layer: number of the layer within the stage, which has written them.
            segment: with these positions.
            first: of them.
            stop: where they end.
        """
        return self._layers.read(layer, segment, first, stop)

    def append_tokens(
        self, layer: int, tokens: Sequence[tuple[SequenceId, int]], keys: Tensor, values: Tensor
    ) -> None:
        """Write one layer's keys and values of one token of each of several sequences.

        Args:
            layer: number of the layer within the stage.
            tokens: sequences for which `begin` was called, each with the position of its token.
            keys: [heads, tokens, head_dim].
            values: [heads, tokens, value_dim].
        """
        if self.coding:
            keys, values = self.coding.encoded(keys, values)
        self._layers.write_tokens(layer, self._places(tokens), keys, values)

    def make_room(
        self, layer: int, tokens: Sequence[tuple[SequenceId, int]], keys: Tensor, values: Tensor
    ) -> None:
        """Make room in buffers, where somebody else will write what `append_tokens` would."""
        if self.coding and not self._layers.knows(layer):
            keys, values = self.coding.encoded(keys, values)
        for segment, offset in self._places(tokens):
            self._buffers.with_room(layer, segment, offset, keys, values)

    def _places(self, tokens: Sequence[tuple[SequenceId, int]]) -> list[tuple[Segment, int]]:
        """Return the segments that tokens belong to, and how far after their starts."""
        last = [(self._sequences[whose].segments[-1], position) for whose, position in tokens]
        return [(segment, position - segment.start) for segment, position in last]

    def segments(self, sequence_id: SequenceId) -> Sequence[Segment]:
        """Return the segments of a sequence, in the order of positions."""
        return self._sequences[sequence_id].segments

    def commit(self, sequence_id: SequenceId, length: int) -> None:
        """Count `length` positions of the sequence as held: every layer of the step succeeded."""
        self._sequences[sequence_id].length = length

    def free(self, sequence_ids: Iterable[SequenceId]) -> None:
        """Drop these sequences, and the segments that no other one reads; ignore unknown ones."""
        for sequence_id in sequence_ids:
            sequence = self._sequences.pop(sequence_id, None)
            if sequence is not None:
                self._leave(sequence_id, sequence.segments)

    def _leave(self, sequence_id: SequenceId, segments: Iterable[Segment]) -> None:
        for segment in segments:
            del segment.holders[sequence_id]
            segment.owner = None if segment.owner == sequence_id else segment.owner
            if not segment.holders:
                self._segments.remove(segment)
                self._layers.drop(segment)
                self._capacity -= segment.capacity
                self._unseen -= segment.unseen
            else:
                self._drop_unseen(segment)

    def watch(self, watcher: WriteWatcher) -> None:
        """Tell `watcher` of writes to existing segments, for as long as it exists."""
        self._watchers.add(watcher)

    def extents(self) -> dict[Segment, int]:
        """Return all segments, each with the number of positions that belong to any sequence."""
        extents: dict[Segment, int] = {}
        for sequence in self._sequences.values():
            for segment, count in sequence.spans():
                extents[segment] = max(count, extents.get(segment, 0))
        return extents

    def buffers(self) -> list[object]:
        """Return all that has keys and values, each once."""
        pages = self.pages.tensors if self.pages else []
        return [*pages, *(held for segment in self._segments for held in segment.layers if held)]

    def give_back(self) -> None:
        """Free the memory that no sequence has; there are no sequences."""
        assert not self._segments
        if self.pages:
            self.pages.give_back()

    def manifest(self) -> KVManifest:
        """Return a description of the content; not to be called in a step."""
        return KVManifest(
            kv_dtype=self.kv_dtype,
            sequences=tuple(
                manifest_sequence(
                    sequence_id,
                    sequence.tokens[: sequence.length],
                    tuple(segment.number for segment in sequence.segments),
                    tuple(segment.holders[sequence_id] for segment in sequence.segments),
                    sequence.seen_from,
                )
                for sequence_id, sequence in self._sequences.items()
            ),
            segments=tuple(
                ManifestSegment(number=s.number, start=s.start, capacity=s.capacity, owner=s.owner)
                for s in self.extents()
            ),
        )

    def restore(
        self,
        manifest: KVManifest,
        own: "tuple[KVCache, Mapping[int, int]] | None",
        arrived: ArrivedLayers,
    ) -> None:
        """Fill this empty cache with the content of a manifest, without regard to `max_bytes`.

        Args:
            manifest: of another cache, checked.
            own: that cache, if it is this worker's, and the layers that are shared with it, by
                their numbers here, with theirs there.
            arrived: the other layers that keep anything, and what they keep of each segment, by its
                number; that belongs to this cache from now on.
        """
        assert not self._sequences
        segments = {}
        for told in manifest.segments:
            segment = segments[told.number] = self._new_segment(told.start)
            segment.capacity, segment.owner = told.capacity, told.owner
            self._capacity += segment.capacity
        shared = None
        if own is not None:
            cache, layers = own
            shared = SharedLayers(
                cache._layers, layers, {segment.number: segment for segment in cache._segments}
            )
        self._layers.adopt(segments, shared, arrived, manifest)
        for held in manifest.sequences:
            sequence = self._sequences[held.sequence_id] = CachedSequence()
            sequence.length = held.length
            sequence.segments = [segments[number] for number in held.segments]
            sequence.write_tokens(0, held.tokens())
            for segment, read in zip(sequence.segments, held.reads, strict=True):
                segment.holders[held.sequence_id] = read
        self.forget({held.sequence_id: held.seen_from for held in manifest.sequences})

    def _new_segment(self, start: int) -> Segment:
        segment = Segment(next(self._numbers), start, self._num_layers)
        self._segments.add(segment)
        return segment

    def _missing_bytes(
        self, step: Sequence[SequenceSlice], leaving: set[SequenceId], beside_bytes: int
    ) -> int:
        """Return by how many bytes the step would exceed the limit once `leaving` are freed."""
        if self.max_bytes is None:
            return 0
        gone = self._read_only_by(leaving)
        capacity = self._capacity - sum(segment.capacity for segment in gone)
        unseen = self._unseen - sum(segment.unseen for segment in gone)
        for part in step:
            growth, seen_again = self._growth(part, leaving)
            capacity += growth
            unseen -= seen_again
        needed = capacity * self.bytes_per_token - unseen * self.windowed_bytes_per_token
        return needed + beside_bytes - self.max_bytes

    def _read_only_by(self, leaving: set[SequenceId]) -> set[Segment]:
        """Return the segments that only `leaving` read."""
        sequences = [self._sequences[i] for i in leaving if i in self]
        segments = {segment for sequence in sequences for segment in sequence.segments}
        return {segment for segment in segments if segment.holders.keys() <= leaving}

    def _growth(self, part: SequenceSlice, leaving: set[SequenceId]) -> tuple[int, int]:
        """Return what `begin` will add to the capacity, and take from what is unseen.

        Args:
            part: that will begin.
            leaving: sequences that are freed before.
        """
        sequence = self._sequences.get(part.sequence_id, CachedSequence())
        writers = {part.sequence_id}
        if part.prefix and part.prefix.take:
            writers.add(part.prefix.sequence_id)
        kept, goes_on = segments_before(sequence, part.start, writers, leaving)
        cut = [s for s in sequence.segments[len(kept) :] if len(s.holders.keys() - leaving) == 1]
        growth = -sum(segment.capacity for segment in cut)
        unseen = sum(segment.unseen for segment in cut)
        stop = part.start + part.num_tokens
        if not goes_on:
            return growth + rounded(stop - part.start), unseen
        return growth + max(0, rounded(stop - kept[-1].start) - kept[-1].capacity), unseen


def as_token_ids(token_ids: Sequence[int]) -> TokenIds:
    """Return `token_ids` as the int32 array that the cache keeps."""
    return np.asarray(token_ids, dtype=np.int32)
