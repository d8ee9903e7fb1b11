"""What sequences in a KV cache consist of: buffers of keys and values, and chains of them."""

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
    """Consecutive positions of a sequence in one layer.

    Attributes:
        keys: [heads, positions, head_dim].
        values: [heads, positions, value_dim].
    """

    keys: Tensor
    values: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of memory that both take."""
        return self.keys.nbytes + self.values.nbytes


class KVLayout(NamedTuple):
    """What the keys and values of one layer look like."""

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def token_bytes(self) -> int:
        """Bytes of memory that one position takes."""
        return self.heads * (self.key_dim + self.value_dim) * self.dtype.itemsize

    def allocate(self, capacity: int) -> KVBuffers:
        """Return buffers for `capacity` positions; what is in them is left open."""
        keys = torch.empty(
            (self.heads, capacity, self.key_dim), dtype=self.dtype, device=self.device
        )
        return KVBuffers(keys, keys.new_empty((self.heads, capacity, self.value_dim)))


class Segment:
    """Buffers for positions from `start` on, shared by all sequences that reference it.

    Attributes:
        number: its name in this cache; none has it again.
        capacity: positions that are paid for, a multiple of `KV_BLOCK`; never shrinks.
        layers: by layer, buffers with room for `capacity` positions, or fewer until written again;
            None until first written.
        owner: the sequence that may write it; None once that one let it go.
        holders: sequences that reference it, and the position before which they read it; the
            owner's may be out of date.
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
        """Return whether any of `writers` may, from `start` on, once `leaving` have left."""
        return self.owner in writers and all(
            read <= start
            for holder, read in self.holders.items()
            if holder not in writers and holder not in leaving
        )


class CachedSequence:
    """What is held of one sequence: `length` positions, in all layers.

    Attributes:
        segments: each ends where the next begins, the last at `length` or, in a step, beyond.
        tokens: [capacity] int32; those below `length` count, those of a running step lie beyond.
    """

    __slots__ = ("length", "segments", "tokens")

    def __init__(self) -> None:
        self.length = 0
        self.segments: list[Segment] = []
        self.tokens: TokenIds = np.empty(0, dtype=np.int32)

    def spans(self) -> Iterator[tuple[Segment, int]]:
        """Yield each segment, and how many of its positions count for this sequence."""
        for segment, following in itertools.pairwise((*self.segments, None)):
            assert segment is not None
            yield segment, (following.start if following else self.length) - segment.start

    def write_tokens(self, start: int, token_ids: TokenIds) -> None:
        """Note the tokens from position `start` on."""
        stop = start + len(token_ids)
        if stop > len(self.tokens):
            grown = np.empty(rounded(stop + stop // 4), dtype=np.int32)
            grown[:start] = self.tokens[:start]
            self.tokens = grown
        self.tokens[start:stop] = token_ids


def rounded(positions: int) -> int:
    """Return `positions` filled up to whole blocks."""
    return -(-positions // KV_BLOCK) * KV_BLOCK
