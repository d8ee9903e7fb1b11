"""States of layers that are no softmax attention: what they keep of sequences, at some positions.

A state cannot be cut back like keys and values: computing goes on only from a position where one
stands. Of each sequence stand the state that was committed last, the one that its step began with,
and those that were asked for (*snapshots*), for as long as the sequence is held. A sequence that
begins with positions of another one shares that one's state there, and keeps it as a snapshot.

States are immutable. A step makes new ones, and nothing changes before it is committed, so it may
fail half way or run twice. Then states behind its start are dropped: another text follows.

States that one step made for several sequences lie in the same tensors, where the next step finds
them together. Once less than half of them is held, those are copied, and the tensors are freed.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor

from distributed_llm.common.messages import SequenceSlice
from distributed_llm.common.types import SequenceId
from distributed_llm.worker.kv.manifest import ManifestState, ManifestStates

StateTensors = dict[str, Tensor]
"""Tensors of one layer's states by what they are; [rows, ...], a row for each sequence."""


class StateTensor(NamedTuple):
    """One tensor of a layer's state.

    Attributes:
        name: what it is.
        shape: of one sequence.
        dtype: of its numbers.
        device: where it is.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def size(self) -> int:
        """Numbers of one sequence."""
        return math.prod(self.shape)


StateLayout = tuple[StateTensor, ...]
"""The tensors of a layer's state by name; empty if it keeps none."""


def layout_of(made: StateTensors) -> StateLayout:
    """Return the layout of a layer's states."""
    return tuple(
        StateTensor(name, tuple(tensor.shape[1:]), tensor.dtype, tensor.device)
        for name, tensor in sorted(made.items())
    )


class StateBatch:
    """States of several sequences that were made together.

    Attributes:
        layers: tensors of each layer of the stage; empty where a layer has no state.
        rows: sequences.
    """

    __slots__ = ("__weakref__", "held", "layers", "rows")

    def __init__(self, layers: Sequence[StateTensors], rows: int) -> None:
        self.layers = tuple(layers)
        self.rows = rows
        self.held: WeakSet[SequenceState] = WeakSet()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.values())

    def alone(self, row: int) -> "StateBatch":
        """Return a copy of one row."""
        copies = [
            {name: tensor[row : row + 1].clone() for name, tensor in layer.items()}
            for layer in self.layers
        ]
        return StateBatch(copies, 1)


class SequenceState:
    """The state of one sequence in all layers of a stage.

    Attributes:
        batch: with the tensors.
        row: in these.
        position: of the sequence, which comes next.
        number: identifies it in its store; later ones have larger numbers.
    """

    __slots__ = ("__weakref__", "batch", "number", "position", "row")

    def __init__(self, batch: StateBatch, row: int, position: int, number: int) -> None:
        self.batch = batch
        self.row = row
        self.position = position
        self.number = number
        batch.held.add(self)

    def move_out(self) -> None:
        """Copy the tensors, so that those of others may be freed."""
        self.batch, self.row = self.batch.alone(self.row), 0
        self.batch.held.add(self)


def joined(states: Sequence[SequenceState], layer: int) -> StateTensors:
    """Return the tensors of several states in one layer, not to be written: a row for each."""
    batch = states[0].batch
    if len(states) == batch.rows and all(
        state.batch is batch and state.row == row for row, state in enumerate(states)
    ):
        return batch.layers[layer]
    return {
        name: torch.cat([s.batch.layers[layer][name][s.row : s.row + 1] for s in states])
        for name in batch.layers[layer]
    }


class _Held:
    """What stands of one sequence."""

    __slots__ = ("committed", "former", "snapshots")

    def __init__(self) -> None:
        self.committed: SequenceState | None = None
        self.former: SequenceState | None = None
        self.snapshots: dict[int, SequenceState] = {}

    def states(self) -> Iterator[SequenceState]:
        yield from self.snapshots.values()
        yield from self.latest()

    def latest(self) -> Iterator[SequenceState]:
        yield from (state for state in (self.committed, self.former) if state is not None)


class StateStore:
    """The states of all sequences of a stage.

    Attributes:
        layouts: of each layer's states, once they are known.
        num_made: states that were made so far; the numbers of later ones are no smaller.
    """

    def __init__(self) -> None:
        self.layouts: tuple[StateLayout, ...] = ()
        self.num_made = 0
        self._sequences: dict[SequenceId, _Held] = {}
        self._batches: WeakSet[StateBatch] = WeakSet()

    @property
    def nbytes(self) -> int:
        """Bytes of memory that all states take."""
        return sum(batch.nbytes for batch in self._batches)

    def at(self, sequence_id: SequenceId, position: int) -> SequenceState | None:
        """Return the state of a sequence at a position, if one stands there."""
        held = self._sequences.get(sequence_id)
        states = held.states() if held else ()
        return next((state for state in states if state.position == position), None)

    def newest(self, sequence_id: SequenceId, most: int) -> int:
        """Return the last position up to `most` where a state stands; 0: before the first one."""
        held = self._sequences.get(sequence_id)
        states = held.states() if held else ()
        return max((s.position for s in states if s.position <= most), default=0)

    def number_after(self, step: Sequence[SequenceSlice]) -> int:
        """Return how many states are held once a step is committed, shared ones once.

        Args:
            step: positions to compute; each sequence once. A state stands where each begins.
        """
        parts = {part.sequence_id: part for part in step}
        taken = {part.prefix.sequence_id for part in step if part.prefix and part.prefix.take}
        kept: set[int] = set()
        for sequence_id, held in self._sequences.items():
            part = parts.get(sequence_id)
            if part is not None:
                kept.update(id(s) for s in held.snapshots.values() if s.position <= part.start)
            elif sequence_id not in taken:
                kept.update(map(id, held.states()))
        begun = (self._start_of(part) for part in step)
        kept.update(id(state) for state in begun if state is not None)
        return len(kept) + len(step)

    def _start_of(self, part: SequenceSlice) -> SequenceState | None:
        whose = part.sequence_id
        if part.prefix is not None and whose not in self._sequences:
            whose = part.prefix.sequence_id
        return self.at(whose, part.start)

    def share(self, child: SequenceId, parent: SequenceId, position: int) -> None:
        """Have a new sequence begin with another one's state at a position."""
        state = self.at(parent, position)
        if state is not None and child not in self._sequences:
            self._sequences[child] = held = _Held()
            held.committed = held.snapshots[position] = state

    def begin(self, step: Sequence[SequenceSlice]) -> None:
        """Drop all that stands of these sequences but what the step begins with, and snapshots.

        Nobody will ask for it: all stages have computed what led to where a step begins, or it
        would not begin there; and what came after is computed again.
        """
        for part in step:
            held = self._sequences.get(part.sequence_id)
            begun = self.at(part.sequence_id, part.start)
            if held and (begun or not part.start):
                held.committed, held.former = begun, None
        self._free_batches()

    def tighten(self) -> None:
        """Copy what is held of batches of which something is not, which frees the rest."""
        self._free_batches(least=1.0)

    def commit(self, parts: Sequence[SequenceSlice], layers: Sequence[StateTensors]) -> None:
        """Have the states that a step has made for some sequences stand where it ends.

        Args:
            parts: what the step computed of these sequences.
            layers: tensors of each layer, with a row for each of them.
        """
        ends = [part.start + part.num_tokens for part in parts]
        states = self._new_states(StateBatch(layers, len(parts)), ends)
        for part, state in zip(parts, states, strict=True):
            begun = self.at(part.sequence_id, part.start)
            held = self._sequences.setdefault(part.sequence_id, _Held())
            held.former, held.committed = begun, state
            kept = held.snapshots.items()
            held.snapshots = {at: snapshot for at, snapshot in kept if at <= part.start}
            if part.snapshot:
                held.snapshots[state.position] = state
        self._free_batches()

    def _new_states(self, batch: StateBatch, positions: Sequence[int]) -> list[SequenceState]:
        """Return the states of all rows of a new batch, at these positions."""
        self._batches.add(batch)
        first = self.num_made
        self.num_made += batch.rows
        return [SequenceState(batch, row, at, first + row) for row, at in enumerate(positions)]

    def standing(self, set_back: Collection[SequenceId] | None) -> tuple[ManifestStates, ...]:
        """Return what stands of all sequences.

        Args:
            set_back: only of these, what their latest steps began with; None: of all.
        """
        return tuple(
            ManifestStates(
                sequence_id=sequence_id,
                latest=tuple(
                    _told(state)
                    for state in held.latest()
                    if state is held.committed or set_back is None or sequence_id in set_back
                ),
                snapshots=tuple(map(_told, held.snapshots.values())),
            )
            for sequence_id, held in self._sequences.items()
        )

    def by_number(self) -> dict[int, SequenceState]:
        """Return all states that stand, by their numbers."""
        held = (state for one in self._sequences.values() for state in one.states())
        return {state.number: state for state in held}

    def restore(
        self,
        batches: Iterable[tuple[StateBatch, Sequence[int]]],
        standing: Sequence[ManifestStates],
    ) -> None:
        """Fill this empty store with states.

        Args:
            batches: all states with their positions; they are numbered from 0, in this order.
            standing: what stands of each sequence.
        """
        made = [state for batch, at in batches for state in self._new_states(batch, at)]
        states = {state.number: state for state in made}
        for told in standing:
            held = self._sequences[told.sequence_id] = _Held()
            latest = [states[one.number] for one in told.latest]
            held.committed, held.former = (*latest, None, None)[:2]
            held.snapshots = {one.position: states[one.number] for one in told.snapshots}

    def free(self, sequence_ids: Iterable[SequenceId]) -> None:
        """Drop all states of these sequences; ignore unknown ones."""
        for sequence_id in sequence_ids:
            self._sequences.pop(sequence_id, None)
        self._free_batches()

    def _free_batches(self, least: float = 0.5) -> None:
        """Copy what is held of batches of which less than `least` is, which frees them."""
        for batch in list(self._batches):
            if 0 < len(batch.held) < least * batch.rows:
                for state in list(batch.held):
                    state.move_out()
                    self._batches.add(state.batch)

    def tensors(self) -> list[object]:
        """Return all tensors."""
        return [t for batch in self._batches for layer in batch.layers for t in layer.values()]


def _told(state: SequenceState) -> ManifestState:
    return ManifestState(number=state.number, position=state.position)
