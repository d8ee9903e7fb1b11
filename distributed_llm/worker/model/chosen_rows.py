"""What the KV cache keeps of all positions of a sequence, for attention to some of them."""

from collections.abc import Iterator, Sequence

from torch import Tensor
from torch.nn.functional import pad

from distributed_llm.worker.kv.segments import KVBuffers
from distributed_llm.worker.model.chunk_attention import parts_of
from distributed_llm.worker.model.decoded_rows import CodedRows
from distributed_llm.worker.model.packed_step import PackedStep

NOT_CHOSEN = -1
"""In the place of a position where a token has chosen fewer than others."""


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
            chosen: int64 [tokens, positions], or [heads, tokens, positions] where tokens have
                chosen for each head.
        """
        both = [part.keys for part in self._parts], [part.values for part in self._parts]
        keys, values = (self._taken(rows, chosen.flatten(-2)) for rows in both)
        keys, values = (taken.view(len(taken), *chosen.shape[-2:], -1) for taken in (keys, values))
        return self._coded.decoded(keys, values) if self._coded else (keys, values)

    def _taken(self, rows: Sequence[Tensor], chosen: Tensor) -> Tensor:
        """Return rows [heads, positions, dim] of positions, of those of all parts."""
        heads, _, dim = rows[0].shape
        if chosen.dim() > 1:
            taken = rows[0].new_empty((*chosen.shape, dim))
            for head, own in enumerate(chosen):
                taken[head : head + 1] = self._taken([one[head : head + 1] for one in rows], own)
            return taken
        if len(rows) == 1:  # on CPUs, selecting is several times as fast as indexing
            return rows[0].index_select(1, chosen)
        taken = rows[0].new_empty((heads, len(chosen), dim))
        for part, own in zip(self._parts, rows, strict=True):
            inside = ((chosen >= part.start) & (chosen < part.stop)).nonzero()[:, 0]
            taken.index_copy_(1, inside, own.index_select(1, chosen[inside] - part.start))
        return taken


def in_parts(index_keys: Tensor, heads: int) -> Tensor:
    """Return index keys [tokens, dim] as parts for the heads, [heads, tokens, part]."""
    padded = pad(index_keys, (0, -index_keys.shape[-1] % heads))
    return padded.view(len(padded), heads, -1).transpose(0, 1)


def joined(parts: Tensor, dim: int) -> Tensor:
    """Return the index keys [tokens, dim] of which heads have parts, [heads, tokens, part]."""
    return parts.transpose(0, 1).flatten(1)[:, :dim]
