"""The parts of a KV cache: buffers of keys and values, segments made of them, and sequences."""

import itertools
from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distributed_llm.common.types import KV_BLOCK

TokenIds = npt.NDArray[np.int32]


class KVBuffers(NamedTuple):
    """Keys and values of consecutive positions in one layer.

    Attributes:
        keys: [heads, positions, head_dim].
        values: [heads, positions, value_dim].
    """

    keys: Tensor
    values: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of memory that both tensors take."""
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
        layers: the buffers by layer; None until the layer is first written, and of an earlier,
            smaller capacity until it is written again.
        owner: the sequence that may write the segment; None once it has left.
        holders: by sequence that reads the segment, where the positions that it reads end
            (exclusive); may be out of date for the owner.
    """

    __slots__ = ("capacity", "holders", "layers", "number", "owner", "start")

    def __init__(self, number: int, start: int, num_layers: int) -> None:
        self.number = number
        self.start = start
        self.capacity = 0
        self.layers: list[KVBuffers | None] = [None] * num_layers
        self.owner: int | None = None
        self.holders: dict[int, int] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of memory that its buffers take."""
        return sum(held.nbytes for held in self.layers if held)

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
