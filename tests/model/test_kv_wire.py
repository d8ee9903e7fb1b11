"""Pieces of a KV cache over the wire: whole, in bounds, and nothing but an error if damaged."""

import contextlib
from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distributed_llm.common import codec
from distributed_llm.common.errors import RemoteProtocolError
from distributed_llm.common.messages import KVEnd, KVPart, KVPieces, StatePart
from distributed_llm.common.tensors import Frame, TensorSpec
from distributed_llm.common.types import KV_BLOCK, Epoch, LayerRange, SequenceId
from distributed_llm.worker.kv import wire as kv_wire
from distributed_llm.worker.kv.assembly import assemble
from distributed_llm.worker.kv.cache import KVCache
from distributed_llm.worker.kv.manifest import KVTransferError
from distributed_llm.worker.kv.segments import KVLayout
from distributed_llm.worker.kv.transfer import KVExporter, KVImporter, KVPiece
from distributed_llm.worker.kv.wire import (
    MAX_MESSAGE_BYTES,
    MAX_PIECES_BYTES,
    MAX_PIECES_SENT,
    decode_end,
    decode_pieces,
    encode_end,
    encode_pieces,
)
from tests.model.test_kv_transfer import ALL, LAYOUT, compute, contents, importer, new_cache

LAYOUTS = dict.fromkeys(range(ALL.start, ALL.stop), LAYOUT)
HIGHEST = 2**53


def cache() -> KVCache:
    """Sequence 0 has 100 positions, 1 began as 70 of them and has 80."""
    made = new_cache(ALL)
    compute(made, ALL, 0, 0, list(range(100)))
    made.share(SequenceId(1), SequenceId(0), 70)
    compute(made, ALL, 1, 70, list(range(200, 210)))
    return made


def sent(source: KVCache, max_pieces: int = MAX_PIECES_SENT) -> list[list[Frame]]:
    """Return the messages of a whole transfer, as they leave."""
    out = KVExporter(source, ALL, ALL)
    messages: list[tuple[KVPieces | KVEnd, tuple[Frame, ...]]] = []
    while (pieces := out.next_chunk(MAX_PIECES_BYTES, max_pieces)) is not None:
        messages.append(encode_pieces(Epoch(2), ALL, len(messages) + 1, pieces))
    messages.append(encode_end(Epoch(2), ALL, len(messages) + 1, source.manifest()))
    return [codec.encode(message, frames) for message, frames in messages]


def take(into: KVImporter, arrived: list[Frame], layouts: Mapping[int, KVLayout]) -> None:
    message, frames = codec.to_next_worker.decode(arrived)
    if isinstance(message, KVPieces):
        for piece in decode_pieces(message, frames, layouts, {}):
            assert isinstance(piece, KVPiece)
            into.add(piece)
    elif isinstance(message, KVEnd):
        into.update(decode_end(message, frames))


@pytest.mark.parametrize("max_pieces", [1, 2, 5, 100])
def test_a_cache_crosses_the_wire_in_messages_of_any_size(max_pieces: int) -> None:
    source, into, made = cache(), importer(), new_cache(ALL)
    messages = sent(source, max_pieces)
    assert len(messages) == -(-2 * len(ALL) // max_pieces) + 1
    for arrived in messages:
        odd = [memoryview(b"\0" + bytes(frame))[1:] for frame in arrived]  # at odd addresses
        take(into, list(odd), into.layouts)
    assemble(made, ALL, None, [into])
    for sequence_id in (0, 1):
        assert contents(made, ALL, sequence_id) == contents(source, ALL, sequence_id)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_numbers_arrive_bit_by_bit(dtype: torch.dtype) -> None:
    layout = KVLayout(2, 4, 6, dtype, torch.device("cpu"))
    keys = torch.randn(2, 9, 4).to(dtype)
    values = torch.randn(2, 9, 6).to(dtype)
    keys[0, 0, 0], values[0, 0, 0] = float("nan"), float("inf")
    parts = [
        KVPart(segment=7, layer=layer, offset=0, count=count, capacity=64)
        for layer, count in ((1, 2), (2, 7))
    ]
    pieces = [KVPiece(parts[0], keys[:, :2], values[:, :2])]
    pieces += [KVPiece(parts[1], keys[:, 2:], values[:, 2:])]
    message, frames = encode_pieces(Epoch(2), LayerRange(1, 3), 1, pieces)
    back = list(decode_pieces(message, frames, {1: layout, 2: layout}, {}))
    for given_, got in zip(pieces, back, strict=True):
        assert isinstance(got, KVPiece)
        for one, other in ((given_.keys, got.keys), (given_.values, got.values)):
            assert one.dtype == other.dtype
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def one_piece(dtype: torch.dtype) -> tuple[KVPieces, tuple[Frame, ...], KVPiece]:
    part = KVPart(segment=7, layer=1, offset=0, count=3, capacity=64)
    keys, values = torch.randn(2, 3, 4).to(dtype), torch.randn(2, 3, 6).to(dtype)
    keys[0, 0, 0] = 70000.0  # more than float16 has
    piece = KVPiece(part, keys, values)
    return *encode_pieces(Epoch(2), LayerRange(1, 2), 1, [piece]), piece


@pytest.mark.parametrize("sent_in", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kept_in", [torch.bfloat16, torch.float16, torch.float32])
def test_numbers_become_those_of_the_worker_they_come_to(
    sent_in: torch.dtype, kept_in: torch.dtype
) -> None:
    """A worker without bfloat16 computes in float16, or in float32, beside others that do not."""
    message, frames, piece = one_piece(sent_in)
    layout = KVLayout(2, 4, 6, kept_in, torch.device("cpu"))
    (back,) = decode_pieces(message, frames, {1: layout}, {})
    assert isinstance(back, KVPiece)
    assert torch.equal(back.keys, piece.keys.to(kept_in))
    assert torch.equal(back.values, piece.values.to(kept_in))
    assert bool(back.keys[0, 0, 0].isinf()) == (kept_in == torch.float16)


@pytest.mark.parametrize(
    ("sent_in", "kept_in"), [(torch.float16, torch.uint8), (torch.uint8, torch.bfloat16)]
)
def test_rows_of_bytes_do_not_become_numbers(sent_in: torch.dtype, kept_in: torch.dtype) -> None:
    part = KVPart(segment=7, layer=1, offset=0, count=3, capacity=64)
    ones = KVPiece(part, *(torch.ones(2, 3, dim, dtype=sent_in) for dim in (4, 6)))
    message, frames = encode_pieces(Epoch(2), LayerRange(1, 2), 1, [ones])
    layout = KVLayout(2, 4, 6, kept_in, torch.device("cpu"))
    with pytest.raises(KVTransferError, match="is kept as"):
        list(decode_pieces(message, frames, {1: layout}, {}))


def test_a_message_does_not_change_with_the_cache() -> None:
    source = cache()
    pieces = KVExporter(source, ALL, ALL).next_chunk(MAX_PIECES_BYTES, MAX_PIECES_SENT) or []
    _, (frame,) = encode_pieces(Epoch(2), ALL, 1, pieces)
    before = bytes(frame)
    compute(source, ALL, 0, 0, [9] * 64)
    assert bytes(frame) == before


def test_the_largest_message_is_in_bounds() -> None:
    """Thousands of sequences with a position more each, or a few with many."""
    source = new_cache(ALL)
    for number in range(600):
        compute(source, ALL, number, 0, [number])
    compute(source, ALL, 999, 0, [1] * 40_000)
    messages = sent(source)
    assert len(messages) > 3
    assert max(sum(map(len, frames)) for frames in messages) <= MAX_MESSAGE_BYTES
    assert max(sum(map(len, frames)) for frames in messages) > MAX_MESSAGE_BYTES // 2
    part = KVPart(segment=HIGHEST, layer=65535, offset=HIGHEST, count=2**31 - 1, capacity=HIGHEST)
    parts = (part,) * MAX_PIECES_SENT
    specs = (TensorSpec("uint8", (1,)),)
    codec.encode(
        KVPieces(
            epoch=Epoch(HIGHEST),
            layers=ALL,
            number=HIGHEST,
            dtype="bfloat16",
            parts=parts,
            tensors=specs,
        ),
        (b"\0",),
    )
    state = StatePart(
        state=HIGHEST, layer=65535, tensor=255, offset=HIGHEST, count=2**31 - 1, dtype="bfloat16"
    )
    codec.encode(
        KVPieces(
            epoch=Epoch(HIGHEST),
            layers=ALL,
            number=HIGHEST,
            dtype="bfloat16",
            parts=(),
            states=(state,) * MAX_PIECES_SENT,
            tensors=specs,
        ),
        (b"\0",),
    )
    into = importer()
    for frames in messages:
        take(into, frames, into.layouts)


def test_a_manifest_that_is_too_long_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    told = cache().manifest()
    message, frames = encode_end(Epoch(2), ALL, 1, told)
    assert decode_end(message, frames) == told
    monkeypatch.setattr(kv_wire, "MAX_MANIFEST_BYTES", len(frames[0]) - 1)
    with pytest.raises(KVTransferError, match="they are to be computed again"):
        encode_end(Epoch(2), ALL, 1, told)
    with pytest.raises(KVTransferError, match="manifest has"):
        decode_end(message, frames)


def test_a_manifest_of_more_than_there_is_room_for_is_refused() -> None:
    told = cache().manifest()
    segment, *others = told.segments
    huge = msgspec.structs.replace(segment, capacity=HIGHEST // KV_BLOCK * KV_BLOCK)
    with pytest.raises(KVTransferError, match="more than the"):
        importer().update(msgspec.structs.replace(told, segments=(huge, *others)))


# ------------------------------------------------------------------ damage

MESSAGES = [[bytes(frame) for frame in frames] for frames in sent(cache(), 2)]
PIECES, END = MESSAGES[0], MESSAGES[-1]


def survives(arrived: list[Any]) -> None:
    """Take a message and go on; nothing but an error that is said comes of it."""
    into, made = importer(max_bytes=1 << 22), new_cache(ALL)
    transfer: list[Any] = [*MESSAGES[:-1], arrived, END]
    for frames in transfer:
        with contextlib.suppress(RemoteProtocolError, KVTransferError):
            take(into, frames, into.layouts)
    assert into.nbytes <= 1 << 22
    with contextlib.suppress(KVTransferError):
        assemble(made, ALL, None, [into])


@given(which=st.sampled_from([PIECES, END]), data=st.data())
def test_damaged_bytes_are_refused(which: list[bytes], data: st.DataObject) -> None:
    frames = [bytearray(frame) for frame in which]
    for _ in range(data.draw(st.integers(1, 4))):
        frame = frames[data.draw(st.integers(1, 2))]
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    survives(frames)


counts = st.one_of(st.integers(0, 300), st.integers(0, HIGHEST))
parts = st.builds(
    KVPart,
    segment=st.integers(0, 3),
    layer=st.integers(3, 8),
    offset=counts,
    count=st.one_of(st.integers(1, 200), st.integers(1, 2**31 - 1)),
    capacity=st.one_of(st.sampled_from([0, 64, 128, 192]), counts),
)


@given(st.lists(parts, min_size=1, max_size=5), st.data())
def test_parts_that_make_no_sense_are_refused(made: list[KVPart], data: st.DataObject) -> None:
    size = sum(part.count for part in made) * LAYOUT.token_bytes
    if size > 1 << 20 or data.draw(st.booleans()):
        size = data.draw(st.integers(1, 1000))
    spec = TensorSpec("uint8", (size,))
    message = KVPieces(
        epoch=Epoch(2), layers=ALL, number=1, dtype="float32", parts=tuple(made), tensors=(spec,)
    )
    survives(codec.encode(message, (bytes(size),)))


segments = st.tuples(
    st.integers(0, 3), st.integers(0, 130), st.sampled_from([0, 64, 128, HIGHEST - 63]), st.none()
)
sequences = st.tuples(
    st.integers(0, 3),
    st.integers(0, 130).map(lambda count: bytes(4 * count)),
    st.lists(st.integers(0, 3), max_size=3),
    st.lists(counts, max_size=3),
)
owned = st.one_of(segments, segments.map(lambda s: (*s[:3], s[0])))
manifests = st.tuples(st.lists(sequences, max_size=3), st.lists(owned, max_size=3))


@given(st.one_of(manifests.map(msgspec.msgpack.encode), st.binary(min_size=1, max_size=60)))
def test_manifests_that_make_no_sense_are_refused(data: bytes) -> None:
    spec = TensorSpec("uint8", (len(data),))
    arrived = codec.encode(KVEnd(epoch=Epoch(2), layers=ALL, number=1, tensors=(spec,)), (data,))
    into, made = importer(max_bytes=1 << 22), new_cache(ALL)
    transfer: list[Any] = [*MESSAGES[:-1], arrived]
    for frames in transfer:
        with contextlib.suppress(KVTransferError):
            take(into, frames, into.layouts)
    with contextlib.suppress(KVTransferError):
        assemble(made, ALL, None, [into])
