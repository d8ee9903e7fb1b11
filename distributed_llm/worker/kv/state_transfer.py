"""The two ends of a transfer of states: exports pieces of those that stand, and imports them.

A state never changes, so it travels once; but most are replaced with the next step of their
sequence. While steps run, only those are exported that will last: snapshots, and what has stood for
a while, as with sequences that have ended. Others follow once no step runs any more.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from distributed_llm.common.messages import StatePart
from distributed_llm.common.types import LayerRange, SequenceId
from distributed_llm.worker.kv.import_room import ImportRoom
from distributed_llm.worker.kv.manifest import KVTransferError, ManifestStates
from distributed_llm.worker.kv.states import SequenceState, StateLayout, StateStore, StateTensors
from distributed_llm.worker.tensor_frames import DTYPE_NAMES


@dataclass(frozen=True)
class StatePiece:
    """A `StatePart`, which says where it belongs, with its numbers.

    Attributes:
        part: state, layer, tensor, which numbers of it.
        numbers: [part.count].
    """

    part: StatePart
    numbers: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers."""
        return self.numbers.nbytes


class StateExporter:
    """Exports the states of some layers, in the thread that runs the stage's steps.

    Args:
        store: to export from; its steps go on.
        held: the layers of the store.
        layers: the layers to export, some of `held`.
    """

    def __init__(self, store: StateStore, held: LayerRange, layers: LayerRange) -> None:
        self._store = store
        self._first = held.start
        numbers = range(layers.start - held.start, layers.stop - held.start)
        self._tensors = [
            (layer, tensor) for layer in numbers for tensor in range(len(store.layouts[layer]))
        ]
        self._done: dict[int, tuple[int, int]] = {}  # tensors and numbers, by state
        self._lasting = store.num_made  # earlier states stood when last looked

    def next_chunk(
        self, max_bytes: int, max_pieces: int, rest: Collection[SequenceId] | None
    ) -> list[StatePiece] | None:
        """Return the next pieces, or None if all is exported. Not to be called in a step.

        Args:
            max_bytes: of all pieces together; exceeded only by a single number.
            max_pieces: at least one.
            rest: None while steps run, and only what will last is exported. Then: sequences of
                which what their latest steps began with is exported, too.
        """
        pieces: list[StatePiece] = []
        room = max_bytes
        states = self._store.by_number()
        self._done = {number: done for number, done in self._done.items() if number in states}
        for state in [states[number] for number in self._wanted(rest)]:
            for piece in self._rest_of(state, room, first=not pieces):
                pieces.append(piece)
                room -= piece.nbytes
                if len(pieces) == max_pieces:
                    return pieces
            if self._done[state.number][0] < len(self._tensors):
                return pieces
        if not pieces and rest is None:
            self._lasting = self._store.num_made
        return pieces or None

    def _wanted(self, rest: Collection[SequenceId] | None) -> list[int]:
        """Return the numbers of the states that are to be exported, and of those that were."""
        if not self._tensors:
            return []
        told = self._store.standing(() if rest is None else rest)
        lasting = {one.number for held in told for one in held.snapshots}
        others = {one.number for held in told for one in held.latest}
        if rest is None:
            others = {number for number in others if number < self._lasting}
        return sorted(lasting | others)

    def _rest_of(self, state: SequenceState, room: int, *, first: bool) -> Iterator[StatePiece]:
        """Yield what is left of a state, as far as there is room for it.

        Args:
            room: bytes.
            first: whether a single number is yielded if there is room for none.
        """
        index, done = self._done.setdefault(state.number, (0, 0))
        while index < len(self._tensors):
            layer, tensor = self._tensors[index]
            told = self._store.layouts[layer][tensor]
            count = min(told.size - done, max(0, room) // told.dtype.itemsize)
            if not count and first:
                count = 1
            if not count:
                return
            part = StatePart(
                state=state.number,
                layer=self._first + layer,
                tensor=tensor,
                offset=done,
                count=count,
                dtype=DTYPE_NAMES[told.dtype],
            )
            numbers = state.batch.layers[layer][told.name][state.row].reshape(-1)
            room -= count * told.dtype.itemsize
            done, first = done + count, False
            if done == told.size:
                index, done = index + 1, 0
            self._done[state.number] = index, done
            yield StatePiece(part, numbers[part.offset : part.offset + count])


class StateImporter:
    """Collects the pieces of one exporter on another worker.

    Args:
        layouts: of the layers to expect, by their numbers in the model.
        room: for the tensors.

    Attributes:
        layouts: as given.
        nbytes: bytes of memory that the tensors take.
    """

    def __init__(self, layouts: Mapping[int, StateLayout], room: ImportRoom) -> None:
        self.layouts = dict(layouts)
        self.nbytes = 0
        self._room = room
        self._arrived: dict[int, dict[tuple[int, int], _Arrived]] = {}  # by state

    def add(self, piece: StatePiece) -> None:
        """Keep a piece.

        Raises:
            KVTransferError: the piece is of a tensor that is not expected, does not fit it, leaves
                a gap after what has arrived of it, or exceeds the room.
        """
        part = piece.part
        layout = self.layouts.get(part.layer, ())
        if part.tensor >= len(layout):
            raise KVTransferError(f"layer {part.layer} has no tensor {part.tensor} of a state")
        told = layout[part.tensor]
        arrived = self._arrived.setdefault(part.state, {})
        one = arrived.get((part.layer, part.tensor))
        filled = one.filled if one else 0
        stop = part.offset + part.count
        wrong = piece.numbers.shape != (part.count,) or piece.numbers.dtype != told.dtype
        if part.offset != filled or stop > told.size or wrong:
            raise KVTransferError(
                f"numbers from {part.offset} to {stop} of state {part.state} in layer {part.layer} "
                f"came as {piece.numbers.dtype}; expected are those from {filled} to {told.size} "
                f"as {told.dtype}"
            )
        if one is None:
            nbytes = told.size * told.dtype.itemsize
            self._room.take(nbytes)
            self.nbytes += nbytes
            made = torch.empty((1, *told.shape), dtype=told.dtype, device=told.device)
            one = arrived[part.layer, part.tensor] = _Arrived(made)
        one.tensor.view(-1)[part.offset : stop].copy_(piece.numbers)
        one.filled = stop

    def keep(self, standing: Iterable[ManifestStates]) -> None:
        """Free all states but those that stand at the sender."""
        numbers = {one.number for held in standing for one in (*held.latest, *held.snapshots)}
        for number in self._arrived.keys() - numbers:
            nbytes = sum(one.tensor.nbytes for one in self._arrived.pop(number).values())
            self._room.give_back(nbytes)
            self.nbytes -= nbytes

    def tensors(self, number: int, layer: int) -> StateTensors | None:
        """Return the tensors of a state in a layer, [1, ...]; None if some have not arrived."""
        arrived = self._arrived.get(number, {})
        tensors = {}
        for index, told in enumerate(self.layouts[layer]):
            one = arrived.get((layer, index))
            if one is None or one.filled < told.size:
                return None
            tensors[told.name] = one.tensor
        return tensors


@dataclass
class _Arrived:
    """A tensor, [1, ...], of which the first `filled` numbers have arrived."""

    tensor: Tensor
    filled: int = 0
