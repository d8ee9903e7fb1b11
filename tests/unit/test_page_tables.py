"""Tables of a step say the same once they are packed, whatever they are made up to."""

import pytest

from distributed_llm.worker.kv.page_tables import (
    SPARE_SLOT,
    HostTables,
    Piece,
    TableShape,
    TokenTables,
)

PIECES = (Piece(640, 256, (0, 2)), Piece(64, 3, (0,)), Piece(130, 1, (1,)), Piece(960, 60, (2,)))
TABLES = HostTables(slots=(66, 130, 1019), pieces=PIECES, group=4)


@pytest.mark.parametrize("more", [TableShape(0, 0, 0, 0), TableShape(2, 3, 1, 1)])
def test_what_was_packed_is_what_a_device_reads(more: TableShape) -> None:
    assert TABLES.shape == TableShape(tokens=3, rows=5, pieces=4, parts=2)
    shape = TableShape(*(own + added for own, added in zip(TABLES.shape, more, strict=True)))
    packed = TABLES.packed(shape)
    assert packed.shape == (shape.nbytes,)
    made = TokenTables.of(packed, shape, TABLES.most_queries, TABLES.most_positions)
    assert made.slots.tolist() == [66, 130, 1019] + [SPARE_SLOT] * more.tokens
    assert made.queries[:5].tolist() == [0, 2, 0, 1, 2]
    assert made.query_ends.tolist() == [0, 8, 12, 16, 20] + [20] * more.pieces
    assert made.starts[:4].tolist() == [640, 64, 130, 960]
    assert made.lengths.tolist() == [256, 3, 1, 60] + [1] * more.pieces
    assert (made.most_queries, made.most_positions) == (128, 256)
    parts = [made.places[made.counts[:, token], token].tolist() for token in range(shape.tokens)]
    assert parts == [[0, 2], [3], [1, 4]] + [[0]] * more.tokens
    assert made.queries.numel() == shape.rows
    assert made.places.max() < 5, "nobody looks at the results of rows that were added"


def test_bounds_are_rounded_up_to_what_kernels_take_at_once() -> None:
    many = HostTables((0,), (Piece(64, 257, tuple(range(33))),), group=4)
    assert (many.most_queries, many.most_positions) == (256, 512)
    one = HostTables((0,), (Piece(64, 1, (0,)),), group=1)
    assert (one.most_queries, one.most_positions) == (128, 1)
