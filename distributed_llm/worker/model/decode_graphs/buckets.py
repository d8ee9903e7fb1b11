"""Sizes that decode steps are rounded up to, so that few graphs do for all of them. Pure."""

from collections.abc import Mapping
from typing import NamedTuple

from distributed_llm.worker.kv.page_tables import HostTables, TableKey, TableShape

MOST_TOKENS = 64
"""Sequences up to which steps are graphs; with more, kernels take longer than launching them."""

_FINE = 8
"""From so many on sizes are multiples of it; below, powers of two."""

_LEAST_POSITIONS = 256
"""Positions of a piece that graphs have room for at least: a bound costs nothing, a graph does."""


class TableSizes(NamedTuple):
    """Tables of one key, as a graph has them; all but the key are bounds.

    Attributes:
        key: of the layers that read them.
        shape: of their tensors.
        most_queries: of a piece.
        most_positions: of a piece.
    """

    key: TableKey
    shape: TableShape
    most_queries: int
    most_positions: int


class Bucket(NamedTuple):
    """The sizes of a graph, which smaller steps leave room in.

    Attributes:
        tokens: sequences, of one token each.
        tables: that layers attend by.
    """

    tokens: int
    tables: tuple[TableSizes, ...]


def bucket_of(tables: Mapping[TableKey, HostTables]) -> Bucket | None:
    """Return the sizes of the graph for a step; None: it has too many tokens for any.

    Args:
        tables: of all layers of the stage; not empty.
    """
    tokens = _tokens_of(next(iter(tables.values())).shape.tokens)
    if tokens > MOST_TOKENS:
        return None
    return Bucket(tokens, tuple(_sizes(key, one, tokens) for key, one in sorted(tables.items())))


def _sizes(key: TableKey, tables: HostTables, tokens: int) -> TableSizes:
    shape = tables.shape
    rows = _power_of_two(max(shape.rows, tokens))
    # A piece has at least one row, so as many pieces as rows do for any; those added cost nothing.
    rounded = TableShape(tokens, rows, rows, _power_of_two(shape.parts))
    most_positions = max(_LEAST_POSITIONS, _power_of_two(tables.most_positions))
    return TableSizes(key, rounded, tables.most_queries, most_positions)


def _tokens_of(count: int) -> int:
    return _power_of_two(count) if count <= _FINE else -(-count // _FINE) * _FINE


def _power_of_two(count: int) -> int:
    """Return the least power of two that is not below `count`."""
    return 1 << (count - 1).bit_length()
