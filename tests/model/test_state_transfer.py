"""Exporting, importing and assembling states: what travels, when, and what is refused."""

from collections.abc import Sequence

import msgspec
import pytest
import torch

from distributed_llm.common import codec
from distributed_llm.common.errors import RemoteProtocolError
from distributed_llm.common.messages import KVPieces, SequenceSlice, StatePart
from distributed_llm.common.types import Epoch, LayerRange, SequenceId
from distributed_llm.worker.kv.held_transfer import HeldImporter
from distributed_llm.worker.kv.import_room import ImportRoom
from distributed_llm.worker.kv.manifest import KVManifest, KVTransferError
from distributed_llm.worker.kv.state_assembly import assemble_states
from distributed_llm.worker.kv.state_transfer import StateExporter, StateImporter, StatePiece
from distributed_llm.worker.kv.states import StateStore, StateTensors, layout_of
from distributed_llm.worker.kv.transfer import KVImporter
from distributed_llm.worker.kv.wire import decode_pieces, encode_pieces

ALL = LayerRange(4, 7)
MUCH = 1 << 20
STATE_BYTES = (6 + 3) * 4
"""Of one sequence in layers 4 and 6; layer 5 keeps none."""


def new_store(layers: LayerRange = ALL) -> StateStore:
    store = StateStore()
    store.layouts = tuple(layout_of(tensors(n, [0.0])) for n in range(layers.start, layers.stop))
    return store


def tensors(layer: int, rows: Sequence[float]) -> StateTensors:
    """Return states whose numbers tell the sequence and position, and the layer."""
    column = torch.tensor(rows).view(-1, 1, 1) + layer / 16
    if layer == 5:
        return {}
    if layer == 6:
        return {"recurrence": column.expand(-1, 1, 3).clone()}
    return {"window0": column[:, 0].expand(-1, 2).clone(), "recurrence": column.repeat(1, 2, 2)}


def step(
    store: StateStore, layers: LayerRange, *parts: tuple[int, int, int], snapshot: bool = False
) -> None:
    """Run a step: of sequences, from and to positions."""
    slices = [
        SequenceSlice(
            sequence_id=SequenceId(i), start=start, num_tokens=stop - start, snapshot=snapshot
        )
        for i, start, stop in parts
    ]
    store.begin(slices)
    rows = [100.0 * i + stop for i, _, stop in parts]
    store.commit(slices, [tensors(n, rows) for n in range(layers.start, layers.stop)])


def check(store: StateStore, layers: LayerRange, sequence_id: int, positions: set[int]) -> None:
    """Check where states of a sequence stand, and that they are what was computed."""
    for position in range(50):
        state = store.at(SequenceId(sequence_id), position)
        assert (state is not None) == (position in positions), position
        if state is not None:
            whose = 1 if (sequence_id, position) == (2, 5) else sequence_id
            for index, held in enumerate(state.batch.layers):
                expected = tensors(layers.start + index, [100.0 * whose + position])
                assert held.keys() == expected.keys()
                assert all(torch.equal(held[n][state.row], expected[n][0]) for n in held)


@pytest.fixture
def source() -> StateStore:
    """Sequence 1 has a snapshot and goes on, 2 began with that, 3 has ended."""
    store = new_store()
    step(store, ALL, (3, 0, 9), (4, 0, 2))
    step(store, ALL, (1, 0, 5), snapshot=True)
    store.share(SequenceId(2), SequenceId(1), 5)
    step(store, ALL, (1, 5, 8), (2, 5, 6))
    return store


def importer(layers: LayerRange = ALL, room: ImportRoom | None = None) -> HeldImporter:
    room = room or ImportRoom(MUCH)
    layouts = {n: layout_of(tensors(n, [0.0])) for n in range(layers.start, layers.stop) if n != 5}
    return HeldImporter(KVImporter(layers, {}, room), StateImporter(layouts, room))


def pump(
    out: StateExporter,
    into: HeldImporter,
    rest: Sequence[int] | None = None,
    most: tuple[int, int] = (MUCH, 100),
) -> set[int]:
    """Move all that is exported now; return the numbers of the states."""
    told = None if rest is None else [SequenceId(i) for i in rest]
    moved: set[int] = set()
    while (pieces := out.next_chunk(*most, told)) is not None:
        assert 0 < len(pieces) <= most[1]
        assert sum(piece.nbytes for piece in pieces) <= max(4, most[0])
        moved.update(piece.part.state for piece in pieces)
        for piece in pieces:
            into.add(piece)
    return moved


def end(store: StateStore, into: HeldImporter, set_back: Sequence[int] = ()) -> None:
    """Send the manifest."""
    states = store.standing([SequenceId(i) for i in set_back])
    into.update(KVManifest(sequences=(), segments=(), states=states))


def assembled(
    imports: Sequence[HeldImporter],
    own: tuple[StateStore, LayerRange] | None = None,
    layers: LayerRange = ALL,
    **lengths: int,
) -> StateStore:
    """Return the states of a new stage; `lengths` by sequence, 20 if none is given."""
    made = new_store(layers)
    of = {SequenceId(i): lengths.get(f"of_{i}", 20) for i in (1, 2, 3, 4)}
    assemble_states(made, layers, of, own, imports)
    return made


@pytest.mark.parametrize("most", [(1, 100), (8, 1), (13, 2), (100, 3), (MUCH, 100)])
def test_states_travel_in_pieces_of_any_size(source: StateStore, most: tuple[int, int]) -> None:
    out, into = StateExporter(source, ALL, ALL), importer()
    assert pump(out, into, [], most) == {0, 1, 2, 3, 4}
    assert pump(out, into, [], most) == set(), "each of them once"
    end(source, into)
    made = assembled([into])
    check(made, ALL, 1, {5, 8})
    check(made, ALL, 2, {5, 6})
    check(made, ALL, 3, {9})
    assert made.at(SequenceId(1), 5) is made.at(SequenceId(2), 5)
    assert made.nbytes == 5 * STATE_BYTES, "what was shared is shared again"
    step(made, ALL, (1, 8, 9), (2, 6, 7))
    check(made, ALL, 1, {5, 8, 9})
    made.free(map(SequenceId, (1, 2, 3, 4)))
    assert made.nbytes == 0


def test_while_steps_run_only_what_lasts_travels(source: StateStore) -> None:
    out, into = StateExporter(source, ALL, ALL), importer()
    step(source, ALL, (1, 8, 9))
    step(source, ALL, (4, 2, 6), snapshot=True)
    assert pump(out, into) == {0, 2, 4, 6}, "that of 3, snapshots, and that of 2, which waits"
    step(source, ALL, (2, 6, 7))
    assert pump(out, into) == {5}, "that of 1 stood when last looked"
    step(source, ALL, (1, 9, 10))
    assert pump(out, into) == {7}
    assert pump(out, into, []) == {8}
    end(source, into)
    check(assembled([into]), ALL, 1, {5, 10})


def test_what_no_longer_stands_is_freed(source: StateStore) -> None:
    room = ImportRoom(MUCH)
    out, into = StateExporter(source, ALL, ALL), importer(room=room)
    pump(out, into)
    assert into.nbytes == room.nbytes == 5 * STATE_BYTES
    step(source, ALL, (1, 8, 9))
    source.free([SequenceId(3)])
    pump(out, into, [])
    end(source, into)
    assert into.nbytes == room.nbytes == 4 * STATE_BYTES


@pytest.mark.parametrize("set_back", [(), (1,)])
def test_a_sequence_goes_on_where_all_have_a_state(
    source: StateStore, set_back: tuple[int, ...]
) -> None:
    """A step of 1 was abandoned: it was run by the sender, and not by this worker."""
    left, right = LayerRange(4, 6), LayerRange(6, 7)
    mine = new_store(right)
    for start, stop in ((0, 5), (5, 8)):
        step(mine, right, (1, start, stop), snapshot=stop == 5)
    step(source, ALL, (1, 8, 9))
    out, into = StateExporter(source, ALL, left), importer(left)
    pump(out, into, set_back)
    end(source, into, set_back)
    made = assembled([into], (mine, right))
    check(made, ALL, 1, {5, 8} if set_back else {5})
    check(made, ALL, 3, set())
    check(assembled([into], (mine, right), of_1=7), ALL, 1, {5})


def test_states_of_this_worker_are_used_and_not_copied() -> None:
    """Those that lie in the same tensors do so again, unless one of them is of no use."""
    own, sender = new_store(LayerRange(4, 6)), new_store(LayerRange(6, 7))
    for store, layers in ((own, LayerRange(4, 6)), (sender, LayerRange(6, 7))):
        step(store, layers, (1, 0, 4), (2, 0, 7), (3, 0, 2))
    out, into = (
        StateExporter(sender, LayerRange(6, 7), LayerRange(6, 7)),
        importer(LayerRange(6, 7)),
    )
    pump(out, into, [])
    end(sender, into)
    for of_2, kept in ((20, {1, 2, 3}), (6, {1, 3})):
        made = assembled([into], (own, LayerRange(4, 6)), of_2=of_2)
        batches = {id(state.batch): state.batch for state in made.by_number().values()}
        (batch,) = batches.values()
        assert batch.rows == len(kept)
        before = own.by_number()[0].batch.layers[0]["window0"]
        same = batch.layers[0]["window0"].data_ptr() == before.data_ptr()
        assert same == (len(kept) == 3)
        for sequence_id in kept:
            check(made, ALL, sequence_id, {{1: 4, 2: 7, 3: 2}[sequence_id]})


def test_what_has_not_arrived_is_said(source: StateStore) -> None:
    out, into = StateExporter(source, ALL, ALL), importer()
    for piece in (out.next_chunk(MUCH, 100, []) or [])[:-1]:
        into.add(piece)
    end(source, into)
    made = new_store()
    with pytest.raises(KVTransferError, match="lack state 4 of another worker in layer 6"):
        assemble_states(made, ALL, {SequenceId(2): 20}, None, [into])
    assert made.by_number() == {}
    assemble_states(made, ALL, {SequenceId(3): 20}, None, [into])
    with pytest.raises(KVTransferError, match=r"nobody sent the states of layers \[4, 6\]"):
        assemble_states(new_store(), ALL, {SequenceId(2): 20}, None, [])


PART = StatePart(state=1, layer=6, tensor=0, offset=0, count=2, dtype="float32")


@pytest.mark.parametrize(
    ("changes", "numbers"),
    [
        ({"layer": 5}, torch.zeros(2)),
        ({"layer": 7}, torch.zeros(2)),
        ({"tensor": 1}, torch.zeros(2)),
        ({"offset": 1}, torch.zeros(2)),
        ({"count": 4}, torch.zeros(4)),
        ({}, torch.zeros(3)),
        ({}, torch.zeros(2, dtype=torch.float64)),
    ],
)
def test_pieces_that_do_not_fit_are_refused(changes: dict[str, int], numbers: torch.Tensor) -> None:
    into = importer()
    with pytest.raises(KVTransferError):
        into.add(StatePiece(msgspec.structs.replace(PART, **changes), numbers))
    into.add(StatePiece(PART, torch.zeros(2)))
    with pytest.raises(KVTransferError, match="expected are those from 2 to 3"):
        into.add(StatePiece(PART, torch.zeros(2)))


def test_no_more_than_there_is_room_for_is_kept() -> None:
    into = importer(room=ImportRoom(2 * 12))
    for state in (1, 2):
        into.add(StatePiece(msgspec.structs.replace(PART, state=state), torch.zeros(2)))
    with pytest.raises(KVTransferError, match="more than the 24 bytes"):
        into.add(StatePiece(msgspec.structs.replace(PART, state=3), torch.zeros(2)))


def test_a_manifest_that_contradicts_itself_is_refused(source: StateStore) -> None:
    first, *others = source.standing([])
    moved = msgspec.structs.replace(first, sequence_id=SequenceId(9))
    elsewhere = msgspec.structs.replace(
        moved, latest=(msgspec.structs.replace(first.latest[0], position=1),)
    )
    for states in ((first, first), (first, elsewhere)):
        with pytest.raises(KVTransferError, match="contradicts itself"):
            KVManifest(sequences=(), segments=(), states=states).check()
    KVManifest(sequences=(), segments=(), states=(first, moved, *others)).check()


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float16, torch.float32])
def test_numbers_become_those_of_the_worker_they_come_to(kept: torch.dtype) -> None:
    """Also where they begin at an odd byte of the message."""
    made = [torch.randn(3).to(torch.bfloat16), torch.randn(2), torch.randn(5).to(torch.float16)]
    names = ("bfloat16", "float32", "float16")
    pieces = [
        StatePiece(StatePart(state=7, layer=6, tensor=n, offset=n, count=len(one), dtype=name), one)  # type: ignore[arg-type]
        for n, (one, name) in enumerate(zip(made, names, strict=True))
    ]
    sent = codec.encode(*encode_pieces(Epoch(2), ALL, 1, pieces))
    message, frames = codec.to_next_worker.decode(sent)
    assert isinstance(message, KVPieces)
    layout = layout_of({str(n): torch.zeros(1, 9, dtype=kept) for n in range(3)})
    back = list(decode_pieces(message, frames, {}, {6: layout}))
    for piece, one in zip(back, made, strict=True):
        assert isinstance(piece, StatePiece)
        assert torch.equal(piece.numbers, one.to(kept))
    whole = layout_of({str(n): torch.zeros(1, 9, dtype=torch.int32) for n in range(3)})
    for layouts in ({}, {6: layout[:1]}, {6: whole}):
        with pytest.raises(KVTransferError):
            list(decode_pieces(message, frames, {}, layouts))
    with pytest.raises(KVTransferError, match="bytes, but"):
        list(
            decode_pieces(
                msgspec.structs.replace(message, states=message.states[:2]), frames, {}, {6: layout}
            )
        )


def test_damaged_messages_are_refused_or_kept_within_bounds(source: StateStore) -> None:
    """Every byte of the header; nothing but an error that is said comes of it."""
    out = StateExporter(source, ALL, ALL)
    pieces = out.next_chunk(100, 5, []) or []
    sent = map(bytes, codec.encode(*encode_pieces(Epoch(2), ALL, 1, pieces)))
    version, header, *packed = sent
    refused = 0
    for at in range(len(header)):
        for value in (0, 1, 0x7F, 0xFF):
            into = importer(room=ImportRoom(1000))
            damaged = header[:at] + bytes([value]) + header[at + 1 :]
            try:
                message, frames = codec.to_next_worker.decode([version, damaged, *packed])
                if isinstance(message, KVPieces):
                    of_states = into.states.layouts
                    for piece in decode_pieces(message, frames, {}, of_states):
                        into.add(piece)
            except (RemoteProtocolError, KVTransferError):
                refused += 1
            assert into.nbytes <= 1000
    assert refused > len(header)
