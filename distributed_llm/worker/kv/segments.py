"""The parts of a KV cache: buffers of keys and values, segments made of them, and sequences."""

import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distributed_llm.common.types import KV_BLOCK

if TYPE_CHECKING:
    from distributed_llm.worker.kv.slabs import Row

TokenIds = npt.NDArray[np.int32]


@dataclass(frozen=True)
class KVBuffers:
    """Keys and values of consecutive positions in one layer.

    Attributes:
        keys: [heads, positions, head_dim].
        values: [heads, positions, value_dim].
        row: of the slab where they are, which others get once these buffers are dropped; or None.
        first: where the positions begin, counted from the start of their segment.
    """

    keys: Tensor
    values: Tensor
    row: "Row | None" = None
    first: int = 0

    @property
    def room(self) -> int:
        """Where the positions end, counted from the start of their segment."""
        return self.first + self.keys.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors; those in a slab take as much memory as was written of them."""
        return self.keys.nbytes + self.values.nbytes

    @cached_property
    def addresses(self) -> tuple[int, int]:
        """Where keys and values begin in memory."""
        return self.keys.data_ptr(), self.values.data_ptr()

    @cached_property
    def strides(self) -> tuple[int, int, int, int]:
        """Bytes from head to head and from position to position, of keys and then of values."""
        of_keys, of_values = (
            (states.stride(0) * states.element_size(), states.stride(1) * states.element_size())
            for states in (self.keys, self.values)
        )
        return *of_keys, *of_values

    def cut(self, start: int, stop: int) -> "KVBuffers":
        """Return a view of the positions `[start, stop)`, counted from the start of the segment."""
        there = slice(start - self.first, stop - self.first)
        return KVBuffers(self.keys[:, there], self.values[:, there], first=start)

    def narrow(self, key_dim: int) -> "KVBuffers":
        """Return a view with the first `key_dim` numbers of each key."""
        return KVBuffers(self.keys[..., :key_dim], self.values, first=self.first)

    def copy_from(self, other: "KVBuffers", start: int, stop: int) -> None:
        """Copy the positions `[start, stop)`, which both have, from others of the same segment."""
        mine, theirs = self.cut(start, stop), other.cut(start, stop)
        mine.keys.copy_(theirs.keys)
        mine.values.copy_(theirs.values)


class KVLayout(NamedTuple):
    """Shape, dtype and device of the keys and values of one layer."""

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def token_bytes(self) -> int:
        """Bytes of memory that one position takes in this layer."""
        return self.heads * (self.key_dim + self.value_dim) * self.dtype.itemsize

    def allocate(self, capacity: int, first: int = 0) -> KVBuffers:
        """Return uninitialised buffers for the positions from `first` to `capacity`."""
        count = capacity - first
        keys = torch.empty((self.heads, count, self.key_dim), dtype=self.dtype, device=self.device)
        values = keys.new_empty((self.heads, count, self.value_dim))
        return KVBuffers(keys, values, first=first)


class Segment:
    """Buffers for positions from `start` on, in all layers, shared by the sequences that read them.

    `manifest.ManifestSegment` describes a segment to another worker, without its buffers.

    Attributes:
        number: identifies the segment in its cache; never used again.
        start: its first position.
        capacity: positions that the budget is charged for, a multiple of `KV_BLOCK`; never shrinks.
        unseen: positions from its start on that layers with a window have dropped, for no token
            will see them there; a multiple of `KV_BLOCK`.
        token_bytes: of one position in all layers that were written.
        windowed_token_bytes: those of them in layers with a window.
        layers: the buffers by layer, with room for at least the capacity; None until the layer is
            first written, and of an earlier, smaller capacity until it is written again. In pages
            there are none.
        blocks: of pages, the numbers of its blocks, in layers that keep everything and in those
            with a window; -1 for one that these have dropped.
        owner: the sequence that may write the segment; None once it has left.
        holders: by sequence that reads the segment, where the positions that it reads end
            (exclusive); may be out of date for the owner.
    """

    __slots__ = (
        "blocks",
        "capacity",
        "holders",
        "layers",
        "number",
        "owner",
        "start",
        "token_bytes",
        "unseen",
        "windowed_token_bytes",
    )

    def __init__(self, number: int, start: int, num_layers: int) -> None:
        self.number = number
        self.start = start
        self.capacity = 0
        self.unseen = 0
        self.token_bytes = 0
        self.windowed_token_bytes = 0
        self.layers: list[KVBuffers | None] = [None] * num_layers
        self.blocks: tuple[list[int], list[int]] = ([], [])
        self.owner: int | None = None
        self.holders: dict[int, int] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of memory that its positions take."""
        return self.capacity * self.token_bytes - self.unseen * self.windowed_token_bytes

    def may_write(self, writers: Collection[int], start: int, leaving: Collection[int]) -> bool:
        """Return whether `writers` may write from `start` on, once `leaving` are freed.

        Args:
            writers: sequences, one of which has to own the segment.
            start: position in the sequence.
            leaving: sequences to be freed; what they read does not count.
        """
        return self.owner in writers and all(
            read <= start
            for holder, read in self.holders.items()
            if holder not in writers and holder not in leaving
        )


class CachedSequence:
    """One sequence in a KV cache.

    Attributes:
        length: positions that are held in all layers, but for those that are not seen any more.
        seen_from: the first position that layers with a window may still be asked for; before it
            they need not have any.
        segments: in the order of positions; each ends where the next one begins.
        tokens: int32 [capacity]; those of a running step are at positions from `length` on.
    """

    __slots__ = ("length", "seen_from", "segments", "tokens")

    def __init__(self) -> None:
        self.length = 0
        self.seen_from = 0
        self.segments: list[Segment] = []
        self.tokens: TokenIds = np.empty(0, dtype=np.int32)

    def spans(self) -> Iterator[tuple[Segment, int]]:
        """Yield each segment with the number of its positions that belong to this sequence."""
        for segment, following in itertools.pairwise((*self.segments, None)):
            assert segment is not None
            yield segment, (following.start if following else self.length) - segment.start

    def write_tokens(self, start: int, token_ids: TokenIds) -> None:
        """Set the tokens from position `start` on."""
        stop = start + len(token_ids)
        if stop > len(self.tokens):
            grown = np.empty(rounded(stop + stop // 4), dtype=np.int32)
            grown[:start] = self.tokens[:start]
            self.tokens = grown
        self.tokens[start:stop] = token_ids


def segments_before(
    sequence: CachedSequence, start: int, writers: Collection[int], leaving: Collection[int] = ()
) -> tuple[list[Segment], bool]:
    """Return the segments to keep when a sequence is truncated, and whether to write in the last.

    Args:
        sequence: to be truncated.
        start: number of positions to keep.
        writers: the sequence itself, and the prefix that it takes.
        leaving: sequences that are freed.
    """
    kept = [segment for segment in sequence.segments if segment.start <= start]
    if kept and kept[-1].may_write(writers, start, leaving):
        return kept, True
    return [segment for segment in kept if segment.start < start], False


def unseen_in(start: int, capacity: int, seen_from: int) -> int:
    """Return how many first positions of a segment nobody sees any more, in whole blocks.

    Args:
        start: its first position.
        capacity: positions that are charged for it.
        seen_from: the least of those that read it.
    """
    return min(capacity, max(0, seen_from - start) // KV_BLOCK * KV_BLOCK)


def rounded(positions: int) -> int:
    """Return `positions` rounded up to whole blocks."""
    return -(-positions // KV_BLOCK) * KV_BLOCK
