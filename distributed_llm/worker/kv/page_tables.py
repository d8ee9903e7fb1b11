"""Where the single tokens of a step write and read in pages of KV cache, as tensors for a device.

A layer keeps the positions of all sequences in one tensor of keys and one of values, [positions,
kv_heads, dim], in which blocks of `KV_BLOCK` positions belong to segments. What tokens attend to is
taken in *pieces*: positions that follow one another there, so a piece is told by its start and its
length. Each piece is attended to by itself, by all tokens that see it, and the parts of a token are
merged by their log-sum-exp.

All that differs from step to step is in tensors, whose shapes follow from four numbers. They lie in
one buffer, so that a step sends one. Layers that are alike (`TableKey`) share the tables of a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SPARE_SLOT = 0
"""A position of every layer that no sequence has: tokens that make up a number write there."""

_ROWS = 128
"""Queries of a piece that kernels take at once; a bound of them is told in multiples of it."""


class TableKey(NamedTuple):
    """What layers have in common that share tables.

    Attributes:
        windowed: whether they drop what no token sees, and so have blocks of their own.
        window: positions that a token attends to, itself included; 0 is all.
        section: positions of the sections that the text is cut into; 0: it is not cut.
        group: heads of queries for each head of keys.
    """

    windowed: bool
    window: int
    section: int
    group: int


class Piece(NamedTuple):
    """Positions `[start, start + length)` of a layer's tensors, and the tokens that attend to them.

    The tokens are given by their numbers among the step's single tokens.
    """

    start: int
    length: int
    readers: tuple[int, ...]


class TableShape(NamedTuple):
    """What the shapes of tables follow from.

    Attributes:
        tokens: of the step.
        rows: pairs of a piece and a token that attends to it.
        pieces: of which there is at least one.
        parts: pieces of one token, at most.
    """

    tokens: int
    rows: int
    pieces: int
    parts: int

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer of all tables."""
        cells = self.parts * self.tokens
        return 8 * (self.tokens + self.rows + cells) + 4 * (3 * self.pieces + 2) + cells


@dataclass(frozen=True, slots=True)
class TokenTables:
    """The tables of a step, on the device.

    Attributes:
        shape: of which they are.
        slots: int64 [tokens], where each token's key and value are written.
        queries: int64 [rows], the token of each row, piece by piece.
        query_ends: int32 [pieces + 1], where the queries of each piece begin, and the last end:
            `group` of them for each row.
        starts: int32 [pieces + 1], where each piece begins; the last number says nothing.
        lengths: int32 [pieces], positions of each piece, at least one.
        places: int64 [parts, tokens], the rows with the parts of each token; any row where it has
            fewer.
        counts: bool [parts, tokens], whether there is such a part; the first always is.
        most_queries: of a piece, at most.
        most_positions: of a piece, at most.
    """

    shape: TableShape
    slots: Tensor
    queries: Tensor
    query_ends: Tensor
    starts: Tensor
    lengths: Tensor
    places: Tensor
    counts: Tensor
    most_queries: int
    most_positions: int

    @classmethod
    def of(
        cls, packed: Tensor, shape: TableShape, most_queries: int, most_positions: int
    ) -> "TokenTables":
        """Return the tables that lie in a buffer, uint8 [shape.nbytes], as `HostTables` packs it.

        They are views of it, so they change when others are copied into it.
        """
        tokens, rows, pieces, parts = shape
        sizes = [8 * tokens, 8 * rows, 8 * parts * tokens]
        sizes += [4 * (pieces + 1), 4 * (pieces + 1), 4 * pieces, parts * tokens]
        slots, queries, places, ends, starts, lengths, counts = torch.split(packed, sizes)
        return cls(
            shape,
            slots.view(torch.int64),
            queries.view(torch.int64),
            ends.view(torch.int32),
            starts.view(torch.int32),
            lengths.view(torch.int32),
            places.view(torch.int64).view(parts, tokens),
            counts.view(torch.bool).view(parts, tokens),
            most_queries,
            most_positions,
        )


@dataclass(frozen=True, slots=True)
class HostTables:
    """What the tables of a step say, before they are sent to a device.

    Attributes:
        slots: of each token.
        pieces: that they attend to, those of one token in the order of positions.
        group: see `TableKey`.
    """

    slots: Sequence[int]
    pieces: Sequence[Piece]
    group: int

    @property
    def shape(self) -> TableShape:
        """The least shape that has room for them."""
        parts = [0] * len(self.slots)
        for piece in self.pieces:
            for reader in piece.readers:
                parts[reader] += 1
        return TableShape(len(self.slots), sum(parts), len(self.pieces), max(parts))

    @property
    def most_queries(self) -> int:
        """Queries of a piece at most, rounded up to what kernels take at once."""
        most = max(len(piece.readers) for piece in self.pieces) * self.group
        return -(-most // _ROWS) * _ROWS

    @property
    def most_positions(self) -> int:
        """Positions of a piece at most, rounded up to a power of two."""
        return 1 << (max(piece.length for piece in self.pieces) - 1).bit_length()

    def packed(self, shape: TableShape) -> Tensor:
        """Return the buffer of all tables, uint8 [shape.nbytes].

        Args:
            shape: at least as large as `shape` in each number. Tokens that are added write to the
                spare slot, and what their parts say is that of another token; pieces that are added
                have one position and no queries, and nobody looks at the results of added rows.
        """
        tokens, rows, pieces, parts = shape
        slots = np.full(tokens, SPARE_SLOT, np.int64)
        queries, places = np.zeros(rows, np.int64), np.zeros((parts, tokens), np.int64)
        ends, starts = np.zeros(pieces + 1, np.int32), np.full(pieces + 1, SPARE_SLOT, np.int32)
        lengths, counts = np.ones(pieces, np.int32), np.zeros((parts, tokens), np.bool_)
        slots[: len(self.slots)] = self.slots
        counts[0] = True
        filled, row = [0] * len(self.slots), 0
        for number, (start, length, readers) in enumerate(self.pieces):
            starts[number], lengths[number] = start, length
            for reader in readers:
                queries[row] = reader
                places[filled[reader], reader], counts[filled[reader], reader] = row, True
                filled[reader] += 1
                row += 1
            ends[number + 1] = row * self.group
        ends[len(self.pieces) + 1 :] = row * self.group
        tables = (slots, queries, places, ends, starts, lengths, counts)
        return torch.from_numpy(
            np.concatenate([table.reshape(-1).view(np.uint8) for table in tables])
        )
