"""Exporting, importing and assembling KV caches: what is refused, and how much travels."""

from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from distributed_llm.common.messages import MAX_PIECES, KVPart
from distributed_llm.common.types import KV_BLOCK, LayerRange, SequenceId
from distributed_llm.worker.kv.assembly import KVIncomplete, MissingKV, assemble
from distributed_llm.worker.kv.cache import KVCache, as_token_ids
from distributed_llm.worker.kv.import_room import ImportRoom
from distributed_llm.worker.kv.manifest import KVManifest, KVTransferError
from distributed_llm.worker.kv.segments import KVLayout
from distributed_llm.worker.kv.transfer import KVExporter, KVImporter, KVPiece

HEADS, KEY_DIM, VALUE_DIM = 2, 4, 6
LAYOUT = KVLayout(HEADS, KEY_DIM, VALUE_DIM, torch.float32, torch.device("cpu"))
TOKEN_BYTES = LAYOUT.token_bytes
ALL = LayerRange(4, 7)
MUCH = 2**30


@pytest.fixture(params=["buffers", "pages"])
def in_pages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run a test with both kinds of memory."""
    monkeypatch.setitem(KIND, "in_pages", request.param == "pages")
    return KIND["in_pages"]


KIND = {"in_pages": False}
"""Of the caches that are made."""


def new_cache(layers: LayerRange, *, in_pages: bool | None = None) -> KVCache:
    """Return an empty cache that knows its layouts, as after the warm-up of a stage."""
    cache = KVCache(len(layers), in_pages=KIND["in_pages"] if in_pages is None else in_pages)
    compute(cache, layers, 99, 0, [0])
    cache.free([SequenceId(99)])
    return cache


def compute(
    cache: KVCache, layers: LayerRange, sequence_id: int, start: int, tokens: list[int]
) -> None:
    """Run a step: keys are tokens plus a part that tells the layer."""
    cache.begin(SequenceId(sequence_id), start, as_token_ids(tokens))
    for layer in range(len(layers)):
        column = torch.tensor(tokens, dtype=torch.float32)[None, :, None]
        column = column + (layers.start + layer) / 16
        cache.append(
            layer,
            SequenceId(sequence_id),
            start,
            column.expand(HEADS, -1, KEY_DIM),
            -column.expand(HEADS, -1, VALUE_DIM),
        )
    cache.commit(SequenceId(sequence_id), start + len(tokens))


def contents(cache: KVCache, layers: LayerRange, sequence_id: int) -> list[list[float]]:
    """Return the keys of a sequence, by layer, less the part that tells the layer."""
    rows = []
    for layer in range(len(layers)):
        row: list[float] = []
        for segment, count in cache._sequences[SequenceId(sequence_id)].spans():
            if count:
                held = cache.read(layer, segment, 0, count)
                keys, values = held.keys, held.values
                assert torch.equal(values[..., :KEY_DIM], -keys)
                assert bool((keys == keys[:1, :, :1]).all())
                row += (keys[0, :, 0] - (layers.start + layer) / 16).tolist()
        rows.append(row)
    return rows


@pytest.fixture
def source(in_pages: bool) -> KVCache:
    """Sequence 0 has 100 positions, 1 began as 70 of them and has 80, 2 has 64."""
    cache = new_cache(ALL)
    compute(cache, ALL, 0, 0, list(range(100)))
    cache.share(SequenceId(1), SequenceId(0), 70)
    compute(cache, ALL, 1, 70, list(range(200, 210)))
    compute(cache, ALL, 2, 0, list(range(300, 364)))
    return cache


def exporter(cache: KVCache, layers: LayerRange = ALL) -> KVExporter:
    return KVExporter(cache, ALL, layers)


def importer(layers: LayerRange = ALL, max_bytes: int = MUCH) -> KVImporter:
    layouts = dict.fromkeys(range(layers.start, layers.stop), LAYOUT)
    return KVImporter(layers, layouts, ImportRoom(max_bytes))


def pump(out: KVExporter, into: KVImporter, max_bytes: int = MUCH) -> int:
    """Move everything that is committed; return how many bytes that were."""
    total = 0
    while (pieces := out.next_chunk(max_bytes, MAX_PIECES)) is not None:
        assert pieces
        size = sum(piece.nbytes for piece in pieces)
        assert size <= max(max_bytes, TOKEN_BYTES)
        for piece in pieces:
            into.add(piece)
        total += size
    return total


def piece(keys: Tensor | None = None, values: Tensor | None = None, **changes: int) -> KVPiece:
    """Return three positions of layer 4, with changes to the part or the tensors."""
    part = KVPart(segment=7, layer=4, offset=0, count=3, capacity=KV_BLOCK)
    return KVPiece(
        msgspec.structs.replace(part, **changes),
        torch.zeros(2, 3, 4) if keys is None else keys,
        torch.zeros(2, 3, 6) if values is None else values,
    )


# ------------------------------------------------------------------ exporting


@pytest.mark.parametrize("max_bytes", [1, TOKEN_BYTES, 1000, 20_000, MUCH])
def test_each_position_travels_once(source: KVCache, max_bytes: int) -> None:
    out, into = exporter(source), importer()
    positions = 100 + 10 + 64  # what sequence 1 shares, once
    assert out.remaining_bytes == positions * 3 * TOKEN_BYTES
    assert pump(out, into, max_bytes) == positions * 3 * TOKEN_BYTES
    assert out.remaining_bytes == 0
    assert out.next_chunk(max_bytes, MAX_PIECES) is None
    compute(source, ALL, 0, 100, [400])
    assert out.remaining_bytes == 3 * TOKEN_BYTES
    assert pump(out, into, max_bytes) == 3 * TOKEN_BYTES


def test_steps_between_chunks_are_caught_up_with(source: KVCache) -> None:
    out, into = exporter(source), importer()
    for number in range(60):
        for part in out.next_chunk(700, MAX_PIECES) or []:
            into.add(part)
        compute(source, ALL, 0, 100 + number, [500 + number])
    pump(out, into, 700)
    into.update(source.manifest())
    made = new_cache(ALL)
    assemble(made, ALL, None, [into])
    for sequence_id in (0, 1, 2):
        assert contents(made, ALL, sequence_id) == contents(source, ALL, sequence_id)


def test_what_is_written_anew_travels_again_and_nothing_else(source: KVCache) -> None:
    out, into = exporter(source), importer()
    pump(out, into)
    compute(source, ALL, 2, 40, list(range(600, 610)))  # 24 positions of it are gone
    assert out.remaining_bytes == 10 * 3 * TOKEN_BYTES
    source.begin(SequenceId(0), 90, as_token_ids([1, 2, 3]))  # a step that fails in the middle
    assert pump(out, into) == 10 * 3 * TOKEN_BYTES
    compute(source, ALL, 0, 88, [7, 7, 7, 7])
    assert pump(out, into) == 4 * 3 * TOKEN_BYTES
    into.update(source.manifest())
    made = new_cache(ALL)
    assemble(made, ALL, None, [into])
    for sequence_id in (0, 1, 2):
        assert contents(made, ALL, sequence_id) == contents(source, ALL, sequence_id)


def test_released_segments_are_forgotten(source: KVCache) -> None:
    out, into = exporter(source), importer()
    pump(out, into)
    before = into.nbytes
    source.free([SequenceId(2)])
    assert out.next_chunk(MUCH, MAX_PIECES) is None
    into.update(source.manifest())
    assert before - into.nbytes == KV_BLOCK * 3 * TOKEN_BYTES
    source.free([SequenceId(0)])  # what sequence 1 shares of it stays
    into.update(source.manifest())
    assert into.nbytes == source.nbytes
    source.free([SequenceId(1)])
    assert (out.remaining_bytes, out.next_chunk(MUCH, MAX_PIECES)) == (0, None)


@pytest.mark.parametrize("max_pieces", [1, 2, 4])
def test_no_more_pieces_than_asked_for_come_at_once(source: KVCache, max_pieces: int) -> None:
    out, into, made = exporter(source), importer(), new_cache(ALL)
    while (pieces := out.next_chunk(MUCH, max_pieces)) is not None:
        assert 1 <= len(pieces) <= max_pieces
        for part in pieces:
            into.add(part)
    into.update(source.manifest())
    assemble(made, ALL, None, [into])
    for sequence_id in (0, 1, 2):
        assert contents(made, ALL, sequence_id) == contents(source, ALL, sequence_id)


def test_an_exporter_that_nobody_knows_any_more_is_not_told(source: KVCache) -> None:
    out = exporter(source)
    assert list(source._watchers) == [out]
    del out
    assert not list(source._watchers)


def test_only_layers_of_the_cache_are_exported(source: KVCache) -> None:
    for start, stop, named in ((3, 5, "layers 4-5"), (6, 8, "layers 7-8"), (0, 1, "layer 1")):
        with pytest.raises(ValueError, match=f"layers 5-7 has no {named}"):
            exporter(source, LayerRange(start, stop))


# ------------------------------------------------------------------ importing

NONSENSE: dict[str, tuple[dict[str, Any], str]] = {
    "layer": ({"layer": 7}, r"layer 7 is not among \[4, 5, 6\]"),
    "gap": ({"offset": 1}, "begins at 1, but 0 positions have arrived"),
    "negative": ({"offset": -1}, "begins at -1"),
    "heads": ({"keys": torch.zeros(1, 3, 4)}, "expected are"),
    "key width": ({"keys": torch.zeros(2, 3, 5)}, "expected are"),
    "value width": ({"values": torch.zeros(2, 3, 4)}, "expected are"),
    "one key too many": ({"keys": torch.zeros(2, 4, 4)}, "expected are"),
    "dimensions": ({"keys": torch.zeros(2, 12)}, "expected are"),
    "nothing": (
        {"count": 0, "keys": torch.zeros(2, 0, 4), "values": torch.zeros(2, 0, 6)},
        "expected are",
    ),
    "key dtype": ({"keys": torch.zeros(2, 3, 4, dtype=torch.float16)}, "expected are"),
    "value dtype": ({"values": torch.zeros(2, 3, 6, dtype=torch.float64)}, "expected are"),
    "capacity": ({"capacity": 0}, "positions from 0 to 3 of a segment with room for 0"),
    "blocks": ({"capacity": KV_BLOCK + 1}, "with room for 65"),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_refused(name: str) -> None:
    changes, message = NONSENSE[name]
    into = importer()
    with pytest.raises(KVTransferError, match=message):
        into.add(piece(**changes))
    assert into.nbytes == 0
    into.add(piece())


def test_pieces_follow_each_other_or_begin_again() -> None:
    into = importer()
    into.add(piece())
    into.add(piece(offset=3))
    with pytest.raises(KVTransferError, match="begins at 7, but 6 positions have arrived"):
        into.add(piece(offset=7))
    into.add(piece(offset=1))
    assert into.arrived(7, 4) == (0, 4)
    with pytest.raises(KVTransferError, match="begins at 5, but 4 positions"):
        into.add(piece(offset=5))


def test_an_importer_takes_no_more_than_it_may() -> None:
    block = KV_BLOCK * TOKEN_BYTES
    into = importer(max_bytes=2 * block)
    into.add(piece())
    into.add(piece(layer=5))
    with pytest.raises(KVTransferError, match=f"more than the {2 * block} bytes"):
        into.add(piece(layer=6))
    with pytest.raises(KVTransferError, match="more than"):
        into.add(piece(capacity=2 * KV_BLOCK))
    into.add(piece(offset=3))
    assert into.nbytes == 2 * block


def manifest() -> KVManifest:
    cache = KVCache(1)
    layers = LayerRange(0, 1)
    compute(cache, layers, 0, 0, [1, 2, 3])
    cache.share(SequenceId(1), SequenceId(0), 2)
    compute(cache, layers, 1, 2, [4])
    return cache.manifest()


def test_a_manifest_crosses_the_wire() -> None:
    told = manifest()
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(told), type=KVManifest) == told
    assert [sequence.tokens().tolist() for sequence in told.sequences] == [[1, 2, 3], [1, 2, 4]]
    assert told.sequences[0].tokens().dtype == np.int32
    told.check()


change = msgspec.structs.replace
CONTRADICTIONS: dict[str, Any] = {
    "a segment twice": lambda t: {"segments": (*t.segments, t.segments[0])},
    "a segment too few": lambda t: {"segments": t.segments[:1]},
    "a segment too many": lambda t: {"sequences": t.sequences[:1]},
    "a sequence twice": lambda t: {"sequences": (*t.sequences, t.sequences[0])},
    "part of a block": lambda t: {"segments": (change(t.segments[0], capacity=65), t.segments[1])},
    "no room": lambda t: {"segments": (change(t.segments[0], capacity=0), t.segments[1])},
    "an owner from nowhere": lambda t: {
        "segments": (t.segments[0], change(t.segments[1], owner=5))
    },
    "a gap": lambda t: {"segments": (change(t.segments[0], start=1), t.segments[1])},
    "a start beyond the end": lambda t: {
        "segments": (t.segments[0], change(t.segments[1], start=4))
    },
    "two at one place": lambda t: {"segments": (t.segments[0], change(t.segments[1], start=0))},
    "half a token": lambda t: {
        "sequences": (change(t.sequences[0], token_ids=b"\1\0\0\0\2"), t.sequences[1])
    },
    "a read too few": lambda t: {"sequences": (change(t.sequences[0], reads=()), t.sequences[1])},
    "no segment": lambda t: {
        "sequences": (t.sequences[1], change(t.sequences[0], segments=(), reads=()))
    },
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_manifest_that_contradicts_itself_is_refused(name: str) -> None:
    told = manifest()
    with pytest.raises(KVTransferError, match="contradicts itself"):
        importer().update(change(told, **CONTRADICTIONS[name](told)))


# ------------------------------------------------------------------ assembling


def test_what_has_not_arrived_is_named(source: KVCache) -> None:
    out, into = exporter(source), importer()
    pump(out, into)
    compute(source, ALL, 1, 80, [1, 2])
    into.update(source.manifest())
    made = new_cache(ALL)
    with pytest.raises(KVIncomplete, match="positions 80 to 82 of sequence 1 in layer 4") as caught:
        assemble(made, ALL, None, [into])
    assert caught.value.missing == tuple(
        MissingKV(SequenceId(1), layer, 80, 82) for layer in (4, 5, 6)
    )
    assert made.sequence_ids == ()
    pump(out, into)
    assemble(made, ALL, None, [into])
    assert contents(made, ALL, 1) == contents(source, ALL, 1)


def test_a_layer_that_nobody_sent_is_named(source: KVCache) -> None:
    into = importer(LayerRange(4, 6))
    pump(exporter(source, LayerRange(4, 6)), into)
    into.update(source.manifest())
    with pytest.raises(KVTransferError, match=r"nobody sent the KV cache of layers \[6\]"):
        assemble(new_cache(ALL), ALL, None, [into])
    with pytest.raises(KVTransferError, match=r"layers \[2, 3\]"):
        assemble(new_cache(LayerRange(2, 6)), LayerRange(2, 6), (source, ALL), [])


def test_an_empty_cache_is_assembled_of_nothing(source: KVCache) -> None:
    made = new_cache(ALL)
    into = importer(LayerRange(6, 7))
    with pytest.raises(KVTransferError, match="the sender of layer 7 has sent no manifest"):
        assemble(made, ALL, (source, LayerRange(3, 6)), [into])
    into.update(new_cache(ALL).manifest())
    assemble(made, ALL, (source, LayerRange(3, 6)), [into])
    assemble(made, ALL, None, [])
    assemble(made, ALL, (new_cache(ALL), ALL), [importer()])
    assemble(made, ALL, (source, LayerRange(0, 3)), [])
    assert made.sequence_ids == ()


def test_only_an_empty_cache_is_filled(source: KVCache) -> None:
    with pytest.raises(ValueError, match="not empty"):
        assemble(source, ALL, (source, ALL), [])


def test_memory_is_used_and_not_copied(source: KVCache, in_pages: bool) -> None:
    """That of this worker, and buffers that arrived; shared segments stay shared."""
    layers = LayerRange(5, 8)
    sender = new_cache(layers)
    for sequence_id, start, tokens in ((0, 0, list(range(100))), (2, 0, list(range(300, 364)))):
        compute(sender, layers, sequence_id, start, tokens)
    sender.share(SequenceId(1), SequenceId(0), 70)
    compute(sender, layers, 1, 70, list(range(200, 210)))
    into = importer(LayerRange(7, 8))
    pump(KVExporter(sender, layers, LayerRange(7, 8)), into)
    into.update(sender.manifest())
    made = new_cache(layers)
    arrived = {one.buffers.keys.data_ptr() for one in into._arrived.values()}
    assemble(made, layers, (source, ALL), [into])
    assert not into._arrived
    if made.pages and source.pages:
        for layer in (0, 1):
            assert made.pages.tensors_of(layer) == source.pages.tensors_of(layer + 1)
    own = {held.keys.data_ptr() for s in source.extents() for held in s.layers if held}
    for segment in () if in_pages else made.extents():
        assert [held is not None and held.keys.data_ptr() in own for held in segment.layers] == [
            True,
            True,
            False,
        ]
        last = segment.layers[2]
        assert last is not None
        assert last.keys.data_ptr() in arrived
    assert (made.capacity, made.nbytes) == (source.capacity, source.nbytes)
    for sequence_id in (0, 1, 2):
        assert contents(made, layers, sequence_id) == contents(sender, layers, sequence_id)


def test_blocks_that_nobody_has_are_freed_before_pages_are_handed_on() -> None:
    source, made = new_cache(ALL, in_pages=True), new_cache(ALL, in_pages=True)
    compute(source, ALL, 0, 0, list(range(1000)))
    compute(source, ALL, 1, 0, list(range(64)))
    source.free([SequenceId(0)])
    assemble(made, ALL, (source, ALL), [])
    block_bytes = KV_BLOCK * 3 * TOKEN_BYTES
    assert source.memory_bytes == made.memory_bytes == (1 + 1) * block_bytes
    for cache in (source, made):
        assert contents(cache, ALL, 1) == [list(range(64))] * 3


def test_sources_that_differ_give_what_they_have_in_common(source: KVCache) -> None:
    """An abandoned step ran here alone, and another one there."""
    layers = LayerRange(7, 8)
    sender = new_cache(layers)
    compute(sender, layers, 0, 0, [*range(90), 900, 901])
    sender.share(SequenceId(1), SequenceId(0), 70)
    compute(sender, layers, 1, 70, list(range(200, 210)))
    compute(sender, layers, 3, 0, [1, 2, 3])
    compute(source, ALL, 1, 40, list(range(40, 70)))  # now its segment begins at 40, not at 70
    into = importer(layers)
    pump(KVExporter(sender, layers, layers), into)
    into.update(sender.manifest())
    both = LayerRange(4, 8)
    made = new_cache(both)
    assemble(made, both, (source, ALL), [into])
    assert contents(made, both, 0) == [list(range(90))] * 4
    assert contents(made, both, 1) == [list(range(70))] * 4
    assert made.sequence_ids == (0, 1)
    assert made.capacity == (2 + 1) * KV_BLOCK
    compute(made, both, 1, 70, [5])
    compute(made, both, 0, 90, [6])
    assert contents(made, both, 0) == [[*range(90), 6]] * 4
    assert contents(made, both, 1) == [[*range(70), 5]] * 4


def test_one_segment_there_may_become_two_here(source: KVCache) -> None:
    """Here the parent was computed again, to the same end; its child kept the old segment."""
    layers = LayerRange(7, 8)
    sender = new_cache(layers)
    compute(sender, layers, 0, 0, list(range(100)))
    sender.share(SequenceId(1), SequenceId(0), 64)
    here = new_cache(ALL)
    compute(here, ALL, 0, 0, list(range(100)))
    here.share(SequenceId(1), SequenceId(0), 64)
    compute(here, ALL, 0, 0, list(range(100)))
    into = importer(layers)
    pump(KVExporter(sender, layers, layers), into)
    into.update(sender.manifest())
    both = LayerRange(4, 8)
    made = new_cache(both)
    assemble(made, both, (here, ALL), [into])
    compute(made, both, 0, 50, [7] * 10)
    compute(made, both, 1, 64, [8])
    assert contents(made, both, 0) == [[*range(50), *[7] * 10]] * 4
    assert contents(made, both, 1) == [[*range(64), 8]] * 4


def test_what_others_read_is_not_overwritten_afterwards(source: KVCache) -> None:
    """As in a cache that did not move, a child that went back counts with all it was given."""
    compute(source, ALL, 1, 40, list(range(200, 210)))
    source.share(SequenceId(3), SequenceId(0), 30)
    into = importer()
    pump(exporter(source), into)
    into.update(source.manifest())
    made = new_cache(ALL)
    assemble(made, ALL, None, [into])
    for cache in (source, made):
        compute(cache, ALL, 0, 70, [7])
        assert cache.capacity == (2 + 1 + 1) * KV_BLOCK
        compute(cache, ALL, 0, 60, [8] * 80)
        assert cache.capacity == (2 + 2 + 1 + 1) * KV_BLOCK
        compute(cache, ALL, 0, 20, [9])
        assert contents(cache, ALL, 1) == [[*range(40), *range(200, 210)]] * 3
        assert contents(cache, ALL, 3) == [list(range(30))] * 3
        assert contents(cache, ALL, 0) == [[*range(20), 9]] * 3


def test_segments_beyond_what_is_common_are_let_go(source: KVCache) -> None:
    """The child's own segment begins where the sender does not hold it any more."""
    layers = LayerRange(7, 8)
    sender = new_cache(layers)
    compute(sender, layers, 1, 0, list(range(50)))
    into = importer(layers)
    pump(KVExporter(sender, layers, layers), into)
    into.update(sender.manifest())
    both = LayerRange(4, 8)
    made = new_cache(both)
    assemble(made, both, (source, ALL), [into])
    assert contents(made, both, 1) == [list(range(50))] * 4
    assert made.capacity == 2 * KV_BLOCK
    assert made.manifest().segments[0].owner is None
    compute(made, both, 1, 50, [5])
    assert contents(made, both, 1) == [[*range(50), 5]] * 4
