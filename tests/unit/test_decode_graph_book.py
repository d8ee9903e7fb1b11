"""Which decode steps become graphs, and which graphs are kept."""

import numpy as np
import pytest
import torch

from distributed_llm.worker.kv.page_tables import HostTables, Piece, TableKey, TokenTables
from distributed_llm.worker.model.decode_graphs import book as books
from distributed_llm.worker.model.decode_graphs.book import GraphBook
from distributed_llm.worker.model.decode_graphs.buckets import Bucket, bucket_of

MIB = 1 << 20
PLAIN = TableKey(windowed=False, window=0, section=0, group=4)
WINDOWED = TableKey(windowed=True, window=8, section=0, group=4)


def tables(tokens: int, *, parts: int = 1, length: int = 10, group: int = 4) -> HostTables:
    """Return tables of texts that each lie in some pieces."""
    pieces = [Piece(64, length, (token,)) for token in range(tokens) for _ in range(parts)]
    return HostTables(list(range(64, 64 + tokens)), pieces, group)


@pytest.mark.parametrize(
    ("tokens", "rounded"),
    [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8), (9, 16), (17, 24), (57, 64), (64, 64)],
)
def test_few_sizes_do_for_all_steps(tokens: int, rounded: int) -> None:
    bucket = bucket_of({PLAIN: tables(tokens)})
    assert bucket is not None
    assert bucket.tokens == rounded
    (sizes,) = bucket.tables
    assert sizes.shape.tokens == rounded
    assert sizes.shape.rows >= rounded


def test_a_step_of_many_tokens_is_no_graph() -> None:
    assert bucket_of({PLAIN: tables(65)}) is None


def test_a_step_that_grows_keeps_its_sizes_for_long() -> None:
    found = {bucket_of({PLAIN: tables(3, length=length)}) for length in range(1, 2049)}
    assert len(found) == 4, "up to 256, 512, 1,024 and 2,048 positions"


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_every_step_fits_the_tables_of_its_bucket(parts: int) -> None:
    """Among them a step in which all read what one of them has begun."""
    own = {PLAIN: tables(5, parts=parts), WINDOWED: tables(5)}
    own[PLAIN].pieces.append(Piece(512, 300, (0, 1, 2, 3, 4)))  # type: ignore[attr-defined]
    bucket = bucket_of(own)
    assert bucket is not None
    assert [sizes.key for sizes in bucket.tables] == [PLAIN, WINDOWED]
    for sizes in bucket.tables:
        packed = own[sizes.key].packed(sizes.shape)
        there = TokenTables.of(packed, *sizes[1:])
        assert there.slots[:5].tolist() == own[sizes.key].slots
        assert int(there.lengths.max()) <= there.most_positions
        assert int(there.query_ends.diff().max()) <= there.most_queries
        assert np.prod(there.places.shape) == there.shape.parts * bucket.tokens
        assert there.counts.dtype == torch.bool


# ------------------------------------------------------------------ the book


def bucket(tokens: int) -> Bucket:
    return Bucket(tokens, ())


def test_a_size_has_to_come_twice() -> None:
    book = GraphBook[str](100 * MIB)
    assert not book.wants(bucket(1))
    assert not book.wants(bucket(2))
    assert book.wants(bucket(1))
    book.keep(bucket(1), "one", MIB)
    assert book.graph_for(bucket(1)) == "one"
    assert book.graph_for(bucket(2)) is None


def test_the_graph_goes_that_was_used_longest_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(books, "MOST_GRAPHS", 2)
    book = GraphBook[int](100 * MIB)
    for tokens in (1, 2):
        book.keep(bucket(tokens), tokens, MIB)
    assert book.graph_for(bucket(1)) == 1
    book.keep(bucket(4), 4, MIB)
    assert [book.graph_for(bucket(tokens)) for tokens in (1, 2, 4)] == [1, None, 4]


def test_no_graph_is_made_without_room_for_another_like_the_last() -> None:
    book = GraphBook[int](10 * MIB)
    book.keep(bucket(1), 1, 2 * MIB)
    book.keep(bucket(2), 2, 5 * MIB)
    assert book.refusal == "they take 7 MiB of 10 MiB"
    assert not any(book.wants(bucket(4)) for _ in range(3))
    assert book.graph_for(bucket(1)) == 1
    book.valid_for("other memory")
    assert [book.wants(bucket(4)) for _ in range(2)] == [False, True]


def test_a_graph_that_has_taken_more_than_there_is_goes_with_all_others() -> None:
    book = GraphBook[int](10 * MIB)
    book.valid_for(0)
    book.keep(bucket(1), 1, 4 * MIB)
    book.keep(bucket(2), 2, 7 * MIB)
    assert (len(book), book.taken_bytes) == (0, 0)
    assert book.refusal == "they take 11 MiB of 10 MiB"
    assert not any(book.wants(bucket(1)) for _ in range(3))


def test_memory_that_others_gave_back_meanwhile_is_not_counted() -> None:
    book = GraphBook[int](10 * MIB)
    book.keep(bucket(1), 1, -100 * MIB)
    assert (book.taken_bytes, book.refusal) == (0, "")


def test_graphs_are_forgotten_once_memory_has_moved() -> None:
    book = GraphBook[int](10 * MIB)
    assert not book.valid_for(0)
    assert not book.wants(bucket(1))
    book.keep(bucket(1), 1, MIB)
    assert book.valid_for(0)
    assert len(book) == 1
    assert not book.valid_for(1)
    assert (len(book), book.taken_bytes) == (0, 0)
    assert not book.wants(bucket(1))
    assert book.wants(bucket(1))


def test_what_cannot_be_a_graph_is_not_tried_again() -> None:
    book = GraphBook[int](10 * MIB)
    book.wants(bucket(1))
    book.refuse("it looks at numbers")
    assert not book.wants(bucket(1))
    book.valid_for(1)
    assert not book.wants(bucket(1))
