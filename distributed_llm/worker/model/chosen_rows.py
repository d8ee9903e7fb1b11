"""What the KV cache keeps of all positions of a sequence, for attention to some of them."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from distributed_llm.worker.kv.segments import KVBuffers
from distributed_llm.worker.model.chunk_attention import ChunkPart, parts_of
from distributed_llm.worker.model.decoded_rows import CodedRows
from distributed_llm.worker.model.packed_step import PackedStep


class ChosenRows:
    """Keys and values of all positions of a sequence in one layer.

    Args:
        step: that runs.
        held: as the KV cache keeps them.
        keys: of some positions, for their size and dtype.
        values: likewise.
    """

    def __init__(
        self, step: PackedStep, held: Sequence[KVBuffers], keys: Tensor, values: Tensor
    ) -> None:
        self._parts = parts_of(held)
        self._sizes = keys.shape[-1], values.shape[-1]
        coding = step.cache.coding
        self._coded = CodedRows(coding, *self._sizes, values.dtype) if coding else None

    @property
    def heads(self) -> int:
        """Heads of keys and values."""
        return self._parts[0].keys.shape[0]

    @property
    def key_dim(self) -> int:
        """Numbers of a key."""
        return self._sizes[0]

    @property
    def width(self) -> int:
        """Numbers of one position in one head."""
        return sum(self._sizes)

    def index_keys(self, dim: int, every: int = 1) -> list[Tensor]:
        """Return what is kept behind the keys of positions, [heads, positions, dim] each.

        Args:
            dim: numbers of it in each head.
            every: as many positions as there are to one that is returned, the last of them.
        """
        found = []
        for part in self._parts:
            keys = part.keys[:, (every - 1 - part.start) % every :: every]
            if self._coded is None:
                found.append(keys[..., -dim:])
            else:
                found += self._decoded_keys(keys, dim)
        return found

    def _decoded_keys(self, keys: Tensor, dim: int) -> Iterator[Tensor]:
        assert self._coded is not None
        coding, dtype = self._coded.coding, self._coded.dtype
        for first, stop in self._coded.pieces(keys, 0, keys.shape[1]):
            rows = keys[:, first:stop]
            yield coding.turned_back(coding.decoded(rows, self._sizes[0], dtype))[..., -dim:]

    def rotated(self, queries: Tensor) -> Tensor:
        """Return queries turned as the keys of `gathered` are."""
        return self._coded.rotated(queries) if self._coded else queries

    def gathered(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values, [heads, tokens, positions, dim], of what tokens have chosen.

        Args:
            chosen: int64 [tokens, positions].
        """
        first = self._parts[0]
        if len(self._parts) == 1:
            keys, values = first.keys[:, chosen], first.values[:, chosen]
        else:
            shape = (first.keys.shape[0], *chosen.shape)
            keys = first.keys.new_empty((*shape, first.keys.shape[-1]))
            values = first.values.new_empty((*shape, first.values.shape[-1]))
            for part in self._parts:
                self._fill(part, chosen, keys, values)
        return self._coded.decoded(keys, values) if self._coded else (keys, values)

    @staticmethod
    def _fill(part: ChunkPart, chosen: Tensor, keys: Tensor, values: Tensor) -> None:
        inside = (chosen >= part.start) & (chosen < part.stop)
        there = chosen[inside] - part.start
        keys[:, inside], values[:, inside] = part.keys[:, there], part.values[:, there]
