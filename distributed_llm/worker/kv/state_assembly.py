"""Assembles the states of a new layer range from those of the old stage and from imports.

A state of the new stage is made where all sources have one at the same position of a sequence.
They differ if a step was abandoned between them. States that lay in the same tensors of the old
stage do so again, and its tensors are shared, not copied, unless some of them are of no use.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from distributed_llm.common.types import LayerRange, SequenceId
from distributed_llm.worker.kv.held_transfer import HeldImporter
from distributed_llm.worker.kv.manifest import KVTransferError, ManifestState, ManifestStates
from distributed_llm.worker.kv.states import (
    SequenceState,
    StateBatch,
    StateStore,
    StateTensors,
    joined,
)


class _Key(NamedTuple):
    """One state of a sequence, as all sources have it.

    Attributes:
        position: of the sequence, which comes next.
        numbers: that the state has at the sources, in their order.
    """

    position: int
    numbers: tuple[int, ...]


class _Own:
    """The states that this worker has held so far."""

    def __init__(self, store: StateStore, held: LayerRange) -> None:
        self.standing = store.standing(None)
        self._held = held
        self._states = store.by_number()

    def state(self, number: int) -> SequenceState:
        return self._states[number]

    def tensors(self, numbers: Sequence[int], layer: int) -> StateTensors:
        return joined([self._states[number] for number in numbers], layer - self._held.start)


class _Imported:
    """The states that another worker has sent."""

    def __init__(self, source: HeldImporter) -> None:
        manifest = source.positions.manifest
        self.standing = manifest.states if manifest else ()
        self._source = source.states

    def tensors(self, numbers: Sequence[int], layer: int) -> StateTensors:
        rows = []
        for number in numbers:
            tensors = self._source.tensors(number, layer)
            if tensors is None:
                raise KVTransferError(
                    f"the states that arrived lack state {number} of another worker in layer "
                    f"{layer}"
                )
            rows.append(tensors)
        if len(rows) == 1:
            return rows[0]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def assemble_states(
    store: StateStore,
    layers: LayerRange,
    lengths: Mapping[SequenceId, int],
    own: tuple[StateStore, LayerRange] | None,
    imports: Sequence[HeldImporter],
) -> None:
    """Fill an empty store, while no step runs.

    Args:
        store: to fill.
        layers: of `store`.
        lengths: positions that the new stage holds of each sequence.
        own: the states that this worker has held so far, and their layers.
        imports: of the layers that `own` lacks, with their senders' manifests; must not be used
            afterwards.

    Raises:
        KVTransferError: a layer has no source, or a state that its manifest names has not arrived.
            Nothing was changed.
    """
    wanted = [n for n in range(layers.start, layers.stop) if store.layouts[n - layers.start]]
    if not wanted or not lengths:
        return
    mine = _Own(*own) if own else None
    senders = {source: _Imported(source) for source in imports}
    sources: dict[int, _Own | _Imported] = {
        n: sender for source, sender in senders.items() for n in source.states.layouts
    }
    if own and mine:
        sources |= {n: mine for n in wanted if own[1].start <= n < own[1].stop}
    orphans = [layer for layer in wanted if layer not in sources]
    if orphans:
        raise KVTransferError(f"nobody sent the states of layers {orphans}")
    used = list(dict.fromkeys(sources[layer] for layer in wanted))
    standing = list(_common([source.standing for source in used], lengths))
    groups = _groups({key: None for one in standing for key in one.states()}, mine, used)

    def batch(group: Sequence[_Key]) -> StateBatch:
        made: list[StateTensors] = [{} for _ in store.layouts]
        for layer in wanted:
            at = used.index(sources[layer])
            numbers = [key.numbers[at] for key in group]
            made[layer - layers.start] = sources[layer].tensors(numbers, layer)
        return StateBatch(made, len(group))

    batches = [(batch(group), [key.position for key in group]) for group in groups]
    numbers = {key: number for number, key in enumerate(key for group in groups for key in group)}
    store.restore(batches, [one.told(numbers) for one in standing])


@dataclass
class _Standing:
    """What stands of a sequence at all sources."""

    sequence_id: SequenceId
    latest: list[_Key]
    snapshots: list[_Key]

    def states(self) -> Iterator[_Key]:
        yield from self.latest
        yield from self.snapshots

    def told(self, numbers: Mapping[_Key, int]) -> ManifestStates:
        """Return it with the numbers that the states have at the new stage."""
        latest, snapshots = (
            tuple(ManifestState(number=numbers[key], position=key.position) for key in keys)
            for keys in (self.latest, self.snapshots)
        )
        return ManifestStates(sequence_id=self.sequence_id, latest=latest, snapshots=snapshots)


def _common(
    told: Sequence[Sequence[ManifestStates]], lengths: Mapping[SequenceId, int]
) -> Iterator[_Standing]:
    """Yield what stands of each sequence within its length, as the first source has it.

    Args:
        told: what stands at each source.
        lengths: positions that count.
    """
    by_source = [{held.sequence_id: held for held in one} for one in told]
    for sequence_id, length in lengths.items():
        held = [one[sequence_id] for one in by_source if sequence_id in one]
        if len(held) < len(told):
            continue
        numbers = [{s.position: s.number for s in (*one.latest, *one.snapshots)} for one in held]
        at_all = {at for at in numbers[0] if at <= length and all(at in one for one in numbers)}
        latest, snapshots = (
            [
                _Key(one.position, tuple(at[one.position] for at in numbers))
                for one in states
                if one.position in at_all
            ]
            for states in (held[0].latest, held[0].snapshots)
        )
        yield _Standing(sequence_id, latest, snapshots)


def _groups(
    keys: Iterable[_Key], mine: _Own | None, used: Sequence["_Own | _Imported"]
) -> list[list[_Key]]:
    """Return which states are made together: those that lie in the same tensors of this worker."""
    if mine is None or mine not in used:
        return [[key] for key in keys]
    at = used.index(mine)
    batches: dict[StateBatch, list[_Key]] = {}
    for key in keys:
        batches.setdefault(mine.state(key.numbers[at]).batch, []).append(key)
    return [
        sorted(group, key=lambda key: mine.state(key.numbers[at]).row) for group in batches.values()
    ]
