"""How the KV cache of a fake stage crosses the wire: in pieces, then with what is held of it.

A piece is the state of one layer at consecutive positions of one sequence, so a position that is
lost, doubled or stale on the way changes every later token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from distributed_llm.common.errors import StageError
from distributed_llm.common.messages import KVEnd, KVPart, KVPieces
from distributed_llm.common.tensors import Frame, frame_of_bytes
from distributed_llm.common.types import KV_BLOCK, LayerRange
from distributed_llm.worker.session.events import ExportKV, ImportKV, KVExported
from tests.unit.fake_model import Buffer, FakeSequence, FakeStage


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


class Manifest(msgspec.Struct, frozen=True):
    """What a stage holds: tokens of its sequences, and the memory behind them."""

    sequences: dict[int, HeldTokens]
    buffers: dict[int, HeldBuffer]


def manifest_of(stage: FakeStage) -> Manifest:
    """Return what a stage holds now."""
    numbers: dict[Buffer, int] = {}
    sequences = {}
    for sequence_id, held in stage.kv.items():
        chain = [numbers.setdefault(buffer, len(numbers)) for buffer in held.buffers]
        sequences[sequence_id] = HeldTokens(list(held.tokens), chain, held.seen_from)
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
        if not order.rest:
            return KVExported(order, None)
        spec, frame = frame_of_bytes(msgspec.msgpack.encode(manifest_of(self._stage)))
        end = KVEnd(epoch=order.epoch, layers=order.layers, number=order.number, tensors=(spec,))
        return KVExported(order, end, (frame,))

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
        manifest: what the sender held at the end; None before that.
    """

    states: dict[tuple[int, int], list[int]] = field(default_factory=dict)
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
        stage.kv[sequence_id] = FakeSequence(
            states=states,
            tokens=list(held.tokens[:length]),
            buffers=chain,
            seen_from=max(m.sequences[sequence_id].seen_from for m in manifests),
        )


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
