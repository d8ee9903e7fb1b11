"""The parts of a KV cache: buffers of keys and values, segments made of them, and sequences."""

import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distributed_llm.common.types import KV_BLOCK

if TYPE_CHECKING:
    from distributed_llm.worker.kv.slabs import Row

TokenIds = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class KVBuffers:
    """Keys and values of consecutive positions in one layer.

    Attributes:
        keys: [heads, positions, head_dim].
        values: [heads, positions, value_dim].
        row: of the slab where they are, which others get once these buffers are dropped; or None.
    """

    keys: Tensor
    values: Tensor
    row: "Row | None" = None

    @property
    def room(self) -> int:
        """Number of positions."""
        return self.keys.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors; those in a slab take as much memory as was written of them."""
        return self.keys.nbytes + self.values.nbytes


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

    def allocate(self, capacity: int) -> KVBuffers:
        """Return uninitialised buffers for `capacity` positions."""
        keys = torch.empty(
            (self.heads, capacity, self.key_dim), dtype=self.dtype, device=self.device
        )
        return KVBuffers(keys, keys.new_empty((self.heads, capacity, self.value_dim)))


class Segment:
    """Buffers for positions from `start` on, in all layers, shared by the sequences that read them.

    `manifest.ManifestSegment` describes a segment to another worker, without its buffers.

    Attributes:
        number: identifies the segment in its cache; never used again.
        start: its first position.
        capacity: positions that the budget is charged for, a multiple of `KV_BLOCK`; never shrinks.
        token_bytes: of one position in all layers that were written.
        layers: the buffers by layer, with room for at least the capacity; None until the layer is
            first written, and of an earlier, smaller capacity until it is written again.
        owner: the sequence that may write the segment; None once it has left.
        holders: by sequence that reads the segment, where the positions that it reads end
            (exclusive); may be out of date for the owner.
    """

    __slots__ = ("capacity", "holders", "layers", "number", "owner", "start", "token_bytes")

    def __init__(self, number: int, start: int, num_layers: int) -> None:
        self.number = number
        self.start = start
        self.capacity = 0
        self.token_bytes = 0
        self.layers: list[KVBuffers | None] = [None] * num_layers
        self.owner: int | None = None
        self.holders: dict[int, int] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of memory that its positions take."""
        return self.capacity * self.token_bytes

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
        length: positions that are held in all layers.
        segments: in the order of positions; each ends where the next one begins.
        tokens: int32 [capacity]; those of a running step are at positions from `length` on.
    """

    __slots__ = ("length", "segments", "tokens")

    def __init__(self) -> None:
        self.length = 0
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


def rounded(positions: int) -> int:
    """Return `positions` rounded up to whole blocks."""
    return -(-positions // KV_BLOCK) * KV_BLOCK
