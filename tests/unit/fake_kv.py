"""How the KV cache of a fake stage crosses the wire: in pieces, then with what is held of it.

A piece is the state of one layer at consecutive positions of one sequence, so a position that is
lost, doubled or stale on the way changes every later token. Where a stage keeps states to go on
from, those are pieces of their own.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from distributed_llm.common.errors import StageError
from distributed_llm.common.messages import KVEnd, KVPart, KVPieces, StatePart
from distributed_llm.common.tensors import Frame, frame_of_bytes
from distributed_llm.common.types import KV_BLOCK, LayerRange
from distributed_llm.worker.session.events import ExportKV, ImportKV, KVExported
from tests.unit.fake_model import Buffer, FakeSequence, FakeStage

_APART = 1 << 12
"""Between the numbers of sequences on the wire; more than there are positions."""


class KVTransferError(StageError):
    """The fake of the error of that name."""


class HeldBuffer(msgspec.Struct, frozen=True):
    start: int
    owner: int
    readers: dict[int, int]
    length: int
    unseen: int


class HeldTokens(msgspec.Struct, frozen=True):
    tokens: list[int]
    buffers: list[int]
    seen_from: int
    latest: list[int]  # where states are kept
    snapshots: list[int]


class Manifest(msgspec.Struct, frozen=True):
    """What a stage holds: tokens of its sequences, and the memory behind them."""

    sequences: dict[int, HeldTokens]
    buffers: dict[int, HeldBuffer]


def manifest_of(stage: FakeStage, set_back: Collection[int] | None = None) -> Manifest:
    """Return what a stage holds now.

    Args:
        set_back: only of these sequences, where their latest steps began; None: of all.
    """
    numbers: dict[Buffer, int] = {}
    sequences = {}
    for sequence_id, held in stage.kv.items():
        chain = [numbers.setdefault(buffer, len(numbers)) for buffer in held.buffers]
        both = set_back is None or sequence_id in set_back
        latest = [held.latest, held.before] if both else [held.latest]
        sequences[sequence_id] = HeldTokens(
            list(held.tokens), chain, held.seen_from, latest, sorted(held.snapshots)
        )
    buffers = {
        number: HeldBuffer(b.start, b.owner, dict(b.readers), b.length, b.unseen)
        for b, number in numbers.items()
    }
    return Manifest(sequences, buffers)


class FakeExporter:
    """Hands out what a stage holds in some layers, and again what was written anew.

    Args:
        max_positions: of one layer in one message.
    """

    def __init__(self, stage: FakeStage, layers: LayerRange, max_positions: int) -> None:
        held = stage.layers
        if not held.start <= layers.start < layers.stop <= held.stop:
            raise KVTransferError(f"a stage of layers {held} has no layers {layers}")
        self._stage = stage
        self._columns = slice(layers.start - held.start, layers.stop - held.start)
        self._first = layers.start
        self._max_positions = max_positions
        self._done: dict[int, list[list[int]]] = {}
        self._done_states: dict[int, list[int]] = {}
        self._stood = self._states(())

    def next(self, order: ExportKV) -> KVExported:
        """Return the next message of a transfer."""
        for sequence_id, held in self._stage.kv.items():
            states = [list(row[self._columns]) for row in held.states]
            done = self._done.get(sequence_id, [])
            same = 0
            while same < min(len(done), len(states)) and done[same] == states[same]:
                same += 1
            if same < len(states):
                new = states[same : same + self._max_positions]
                self._done[sequence_id] = states[: same + len(new)]
                return self._pieces(order, sequence_id, same, new)
        kept = self._states(order.set_back)
        for number, state in kept.items():
            lasts = self._stood.get(number) == state or self._is_snapshot(number)
            if (order.rest or lasts) and self._done_states.get(number) != state:
                self._done_states[number] = state
                return self._state(order, number, state)
        if not order.rest:
            self._stood = kept
            return KVExported(order, None)
        told = manifest_of(self._stage, order.set_back)
        spec, frame = frame_of_bytes(msgspec.msgpack.encode(told))
        end = KVEnd(epoch=order.epoch, layers=order.layers, number=order.number, tensors=(spec,))
        return KVExported(order, end, (frame,))

    def _states(self, set_back: Collection[int]) -> dict[int, list[int]]:
        """Return the states that are told, in these layers, by their numbers on the wire."""
        told = manifest_of(self._stage, set_back).sequences
        return {
            _number(sequence_id, at): list(
                self._stage.kv[sequence_id].kept_states[at][self._columns]
            )
            for sequence_id, held in told.items()
            for at in {*held.latest, *held.snapshots}
            if at in self._stage.kv[sequence_id].kept_states
        }

    def _is_snapshot(self, number: int) -> bool:
        sequence_id, at = divmod(number, _APART)
        return at in self._stage.kv[sequence_id].snapshots

    def _state(self, order: ExportKV, number: int, state: list[int]) -> KVExported:
        spec, frame = frame_of_bytes(np.asarray(state, dtype="<i4").tobytes())
        parts = tuple(
            StatePart(
                state=number, layer=self._first + n, tensor=0, offset=0, count=1, dtype="int32"
            )
            for n in range(len(state))
        )
        message = KVPieces(
            epoch=order.epoch,
            layers=order.layers,
            number=order.number,
            dtype="uint8",
            parts=(),
            states=parts,
            tensors=(spec,),
        )
        return KVExported(order, message, (frame,))

    def _pieces(
        self, order: ExportKV, sequence_id: int, offset: int, states: list[list[int]]
    ) -> KVExported:
        array = np.asarray(states, dtype="<i4").T  # [layers, positions]
        spec, frame = frame_of_bytes(array.tobytes())
        capacity = -(-(offset + len(states)) // KV_BLOCK) * KV_BLOCK
        parts = tuple(
            KVPart(
                segment=sequence_id,
                layer=self._first + layer,
                offset=offset,
                count=len(states),
                capacity=capacity,
            )
            for layer in range(array.shape[0])
        )
        message = KVPieces(
            epoch=order.epoch,
            layers=order.layers,
            number=order.number,
            dtype="uint8",
            parts=parts,
            tensors=(spec,),
        )
        return KVExported(order, message, (frame,))


@dataclass
class FakeImporter:
    """Collects what an exporter handed out.

    Attributes:
        states: of each sequence and layer, by position.
        kept: states to go on from, by number on the wire and layer.
        manifest: what the sender held at the end; None before that.
    """

    states: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    kept: dict[tuple[int, int], int] = field(default_factory=dict)
    manifest: Manifest | None = None

    def take(self, order: ImportKV) -> None:
        """Keep what one message brings."""
        if isinstance(order.message, KVEnd):
            self.manifest = msgspec.msgpack.decode(bytes(order.frames[0]), type=Manifest)
            return
        self._add(order.message, order.frames[0])

    def _add(self, message: KVPieces, frame: Frame) -> None:
        assert self.manifest is None, "more came after the end"
        values = [int(x) for x in np.frombuffer(frame, dtype="<i4")]
        for part in message.parts:
            held = self.states.setdefault((part.segment, part.layer), [])
            if part.offset > len(held):
                raise KVTransferError(f"a piece of sequence {part.segment} is missing")
            held[part.offset :] = values[: part.count]
            del values[: part.count]
        for state in message.states:
            self.kept[state.state, state.layer] = values.pop(0)
        assert not values


def assemble_kv(
    stage: FakeStage, donor: FakeStage | None, imports: dict[LayerRange, FakeImporter]
) -> None:
    """Fill an empty stage with what all sources hold of each sequence.

    Raises:
        KVTransferError: not all is here. Nothing was touched.
    """
    assert not stage.kv, "it holds something already"
    numbers = range(max(stage.layers.start, stage.encoder_layers), stage.layers.stop)
    if not numbers:
        return
    own = [n for n in numbers if donor and donor.layers.start <= n < donor.layers.stop]
    sources = {n: imports[r] for r in imports for n in range(r.start, r.stop) if n not in own}
    manifests = [manifest_of(donor)] if donor and own else []
    for source in {id(source): source for source in sources.values()}.values():
        if source.manifest is None:
            raise KVTransferError("a sender has sent no manifest")
        manifests.append(source.manifest)
    if not manifests:
        return
    lengths = {id_: _common(manifests, id_) for id_ in manifests[0].sequences}
    lengths = {id_: length for id_, length in lengths.items() if length}
    if lengths and (orphans := [n for n in numbers if n not in own and n not in sources]):
        raise KVTransferError(f"nobody sent layers {orphans}")
    columns: dict[int, list[list[int]]] = {}
    for sequence_id, length in lengths.items():
        nothing = [[0] * length] * (numbers.start - stage.layers.start)
        columns[sequence_id] = nothing + [
            _column(donor if n in own else sources[n], sequence_id, n)[:length] for n in numbers
        ]
        if any(len(column) < length for column in columns[sequence_id]):
            raise KVTransferError(f"positions of sequence {sequence_id} have not arrived")
    buffers = _buffers(manifests[0], set(lengths))
    for sequence_id, length in lengths.items():
        held = manifests[0].sequences[sequence_id]
        chain = [buffers[n] for n in held.buffers if manifests[0].buffers[n].start <= length]
        states = [list(row) for row in zip(*columns[sequence_id], strict=True)]
        everywhere = [m.sequences[sequence_id] for m in manifests]
        latest, snapshots = (
            [at for at in told if at <= length and all(at in _stands(each) for each in everywhere)]
            for told in (held.latest, held.snapshots)
        )
        made = stage.kv[sequence_id] = FakeSequence(
            states=states,
            tokens=list(held.tokens[:length]),
            buffers=chain,
            seen_from=max(each.seen_from for each in everywhere),
            latest=latest[0] if latest else 0,
            before=latest[-1] if latest else 0,
            snapshots=set(snapshots),
        )
        if stage.keeps_states:
            made.kept_states = {
                at: [_kept(donor if n in own else sources[n], sequence_id, at, n) for n in numbers]
                for at in made.kept
                if at
            }


def _common(manifests: Sequence[Manifest], sequence_id: int) -> int:
    """Return how many first tokens of a sequence all of them hold."""
    held = [
        m.sequences[sequence_id].tokens if sequence_id in m.sequences else [] for m in manifests
    ]
    length = 0
    for tokens in zip(*held, strict=False):
        if len(set(tokens)) > 1:
            break
        length += 1
    return length


def _stands(held: HeldTokens) -> set[int]:
    return {*held.latest, *held.snapshots}


def _number(sequence_id: int, position: int) -> int:
    """Return the number of a state on the wire."""
    return sequence_id * _APART + position


def _kept(source: FakeStage | FakeImporter | None, sequence_id: int, at: int, layer: int) -> int:
    if isinstance(source, FakeStage):
        return source.kv[sequence_id].kept_states[at][layer - source.layers.start]
    assert source is not None
    return source.kept[_number(sequence_id, at), layer]


def _column(source: FakeStage | FakeImporter | None, sequence_id: int, layer: int) -> list[int]:
    if isinstance(source, FakeStage):
        return [row[layer - source.layers.start] for row in source.kv[sequence_id].states]
    assert source is not None
    return source.states.get((sequence_id, layer), [])


def _buffers(manifest: Manifest, kept: set[int]) -> dict[int, Buffer]:
    return {
        number: Buffer(
            held.start,
            held.owner,
            {reader: stop for reader, stop in held.readers.items() if reader in kept},
            held.length,
            held.unseen,
        )
        for number, held in manifest.buffers.items()
    }
