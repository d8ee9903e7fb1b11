"""What attention and embeddings of encoder-decoders make of positions."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from distributed_llm.worker.devices import sent
from distributed_llm.worker.model.packed_step import PackedStep, running_step


class RelativeBias:
    """What T5 adds to the scores of each head, by how far a key is from the query.

    Args:
        table: embedding of buckets of distances, [buckets, heads].
        bucket_of: returns the buckets of distances (position of the key less that of the query).
    """

    def __init__(self, table: nn.Embedding, bucket_of: Callable[[Tensor], Tensor]) -> None:
        self._table = table
        self._bucket_of = bucket_of
        self._made: Tensor | None = None  # [heads, 2 * reach + 1], from -reach on

    def between(self, queries: range, keys: range) -> Tensor:
        """Return what is added to scores, [heads, queries, keys].

        Args:
            queries: their positions.
            keys: their positions, counted from the same start.
        """
        furthest = max(abs(keys.start - queries.stop + 1), abs(keys.stop - 1 - queries.start))
        by_distance = self._up_to(furthest)
        reach = by_distance.shape[1] // 2
        if len(queries) == 1:  # as in decoding: the biases lie side by side
            first = reach + keys.start - queries.start
            return by_distance[:, None, first : first + len(keys)]
        return by_distance[:, sent(distances(queries, keys) + reach, by_distance.device)]

    def until(self, position: int) -> Tensor:
        """Return what is added to the scores of the last keys, float32 [heads, keys].

        There are at least as many as there are positions up to this one; the last is the query's.
        """
        by_distance = self._up_to(position)
        return by_distance[:, : by_distance.shape[1] // 2 + 1].float().contiguous()

    def _up_to(self, distance: int) -> Tensor:
        """Return the biases of all distances up to one, at least; they are kept.

        Stages that share a layer may ask in several threads at once: each gets a whole table.
        """
        made = self._made
        reach = 0 if made is None else made.shape[1] // 2
        if made is None or distance > reach:
            reach = max(distance, 2 * reach, 128)
            every = torch.arange(-reach, reach + 1, device=self._table.weight.device)
            self._made = made = self._table(self._bucket_of(every)).T.contiguous()
        return made


def use_packed_positions(module: nn.Module) -> nn.Module:
    """Return a module that embeds the positions of the packed sequences of a step.

    Args:
        module: of transformers, which embeds the positions of one text.
    """
    name = type(module).__name__
    if "Sinusoidal" not in name:
        return LearnedPositions(cast(nn.Embedding, module))
    if isinstance(module, nn.Embedding):
        count, size = module.num_embeddings, module.embedding_dim
        return ComputedPositions(_half_and_half, count, size, module.weight.dtype)
    return PositionsPastPadding(module)


class LearnedPositions(nn.Module):
    """Embeds positions by a matrix of the checkpoint."""

    def __init__(self, module: nn.Embedding) -> None:
        super().__init__()
        self.weight = module.weight
        self._offset = int(getattr(module, "offset", 0))

    def forward(self, *_: object, **__: object) -> Tensor:
        """Return [1, tokens, size]."""
        positions = positions_of(running_step()) + self._offset
        return self.weight[sent(positions, self.weight.device)][None]


class AbsentPositions(nn.Module):
    """Stands for the positions of another stage."""

    def forward(self, *_: object, **__: object) -> Tensor:
        """Return zero, for what it is added to is discarded."""
        return torch.zeros(())


class ComputedPositions(nn.Module):
    """Embeds positions by sines and cosines of them, which are no weights.

    Attributes:
        device: of the embeddings.

    Args:
        make: returns them, float32 [positions, size].
        count: positions that a model has.
        size: numbers of one position.
        dtype: of the embeddings.
    """

    def __init__(
        self, make: Callable[[int, int], Tensor], count: int, size: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self._make = make
        self._count = count
        self._size = size
        self._dtype = dtype
        self._table: Tensor | None = None
        self.device = torch.device("cpu")

    def forward(self, given: Any, *_: object, **__: object) -> Tensor:
        """Return [1, tokens, size]."""
        positions = positions_of(running_step())
        return self._embedded(sent(positions, self.device), int(positions.max()) + 1)[None]

    def _embedded(self, rows: Tensor, stop: int) -> Tensor:
        """Return rows of the table, which has `stop` of them at least."""
        if self._table is None or stop > len(self._table):
            made = self._make(max(self._count, stop), self._size)
            self._table = sent(made.to(self._dtype), self.device)
        return self._table[rows]


class PositionsPastPadding(ComputedPositions):
    """Embeds positions as M2M100 does, which begins to count after the id of padding.

    Padding tokens in a source are not counted, and wherever they are, they get zeros. Tokens of an
    answer are counted all: transformers, which generates them one by one, knows only how many there
    are before each.

    Args:
        module: of transformers.
    """

    def __init__(self, module: Any) -> None:
        padding, make = int(module.padding_idx), type(module).get_embedding

        def table(count: int, size: int) -> Tensor:
            made: Tensor = make(count, size, padding)
            return made

        count = module.num_positions + padding + 1
        super().__init__(table, count, module.embedding_dim, module.weights.dtype)
        self._padding = padding

    def forward(self, given: Any, *_: object, **__: object) -> Tensor:
        """Return [1, tokens, size]."""
        step, first = running_step(), self._padding + 1
        positions = positions_of(step)
        rows = sent(positions, self.device) + first
        is_padding = given[0] == self._padding  # token ids, [1, tokens]
        for part in step.slices:
            if part.is_source:
                own = slice(part.row, part.row + part.num_tokens)
                rows[own] -= is_padding[own].cumsum(0)
        rows = rows.masked_fill(is_padding, self._padding)
        return self._embedded(rows, int(positions.max()) + 1 + first)[None]


def _half_and_half(count: int, size: int) -> Tensor:
    """Return the sines of all positions, and the cosines after them, as Marian and Pegasus do."""
    halves = torch.arange(size, dtype=torch.float64) // 2
    angles = torch.arange(count, dtype=torch.float64)[:, None] / torch.pow(
        10_000.0, 2 * halves / size
    )
    sines, cosines = angles[:, 0::2].sin(), angles[:, 1::2].cos()
    return torch.cat((sines, cosines), dim=1).float()


def distances(queries: range, keys: range) -> Tensor:
    """Return how far each key is after each query, int64 [queries, keys], on the CPU."""
    of_keys, of_queries = (torch.arange(one.start, one.stop) for one in (keys, queries))
    return of_keys - of_queries[:, None]


def positions_of(step: PackedStep) -> Tensor:
    """Return the positions of a step's tokens in their sources, or in their answers, [tokens]."""
    return torch.cat(
        [
            torch.arange(start, start + part.num_tokens)
            for part in step.slices
            for start in (part.start if part.is_source else part.start - part.source,)
        ]
    )
