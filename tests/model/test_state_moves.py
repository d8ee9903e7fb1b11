"""States of several stages, moved at any time among any steps, stand where they should."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch

from distributed_llm.common.messages import SequenceSlice
from distributed_llm.common.types import LayerRange, SequenceId
from distributed_llm.worker.kv.held_transfer import HeldImporter
from distributed_llm.worker.kv.import_room import ImportRoom
from distributed_llm.worker.kv.manifest import KVManifest
from distributed_llm.worker.kv.state_assembly import assemble_states
from distributed_llm.worker.kv.state_transfer import StateExporter, StateImporter
from distributed_llm.worker.kv.states import StateStore, StateTensors, layout_of
from distributed_llm.worker.kv.transfer import KVImporter

NUM_LAYERS = 4
SPLITS = ((1, 2, 1), (2, 1, 1), (1, 1, 2), (1, 1, 1, 1), (4,), (2, 2), (3, 1), (1, 3))
WORKERS = range(4)


def tensors(layer: int, values: Sequence[float]) -> StateTensors:
    """Return states of a layer; that in the middle keeps none."""
    return (
        {"window0": torch.tensor(values)[:, None].expand(-1, 3) + layer / 8} if layer != 2 else {}
    )


def new_store(layers: LayerRange) -> StateStore:
    store = StateStore()
    store.layouts = tuple(layout_of(tensors(n, [0.0])) for n in range(layers.start, layers.stop))
    return store


def ranges(split: Sequence[int]) -> list[LayerRange]:
    stops = [sum(split[: i + 1]) for i in range(len(split))]
    return [LayerRange(stop - count, stop) for count, stop in zip(split, stops, strict=True)]


@dataclass
class Text:
    """A sequence as the coordinator knows it: where a state of it stands, and which one.

    Attributes:
        values: of states, by position.
        computed: positions that all stages have.
        set_back: whether its latest step was abandoned.
    """

    values: dict[int, float] = field(default_factory=dict)
    computed: int = 0
    set_back: bool = False


class Transfer:
    """Layers on their way from one worker to another."""

    def __init__(self, store: StateStore, held: LayerRange, layers: LayerRange) -> None:
        self.store = store
        self.out = StateExporter(store, held, layers)
        room = ImportRoom(1 << 20)
        numbers = range(layers.start, layers.stop)
        layouts = {n: layout for n in numbers if (layout := layout_of(tensors(n, [0.0])))}
        self.into = HeldImporter(KVImporter(layers, {}, room), StateImporter(layouts, room))

    def pump(self, most_bytes: int, rest: set[SequenceId] | None) -> bool:
        pieces = self.out.next_chunk(most_bytes, 3, rest)
        for piece in pieces or ():
            self.into.add(piece)
        return pieces is not None

    def end(self, rest: set[SequenceId]) -> None:
        while self.pump(20, rest):
            pass
        states = self.store.standing(rest)
        self.into.update(KVManifest(sequences=(), segments=(), states=states))


class Stages:
    """The stages of a pipeline on some workers, and the texts that they hold."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.held = {n: (new_store(layers), layers) for n, layers in enumerate(ranges(SPLITS[0]))}
        self.texts: dict[int, Text] = {}
        self.transfers: list[Transfer] = []
        self.num_texts = self.num_values = self.num_carried = 0

    def step(self) -> None:
        """Compute some texts; maybe the first stages alone, and then it is abandoned."""
        if not self.texts or (len(self.texts) < 6 and self.draw.random() < 0.3):
            self.texts[self.num_texts] = Text()
            self.num_texts += 1
        chosen = self.draw.sample(sorted(self.texts), self.draw.randint(1, len(self.texts)))
        parts, values = list[SequenceSlice](), list[float]()
        for number in chosen:
            self.num_values += 1
            values.append(float(self.num_values))
            parts.append(
                SequenceSlice(
                    sequence_id=SequenceId(number),
                    start=self.texts[number].computed,
                    num_tokens=self.draw.randint(1, 3),
                    snapshot=self.draw.random() < 0.3,
                )
            )
        whole = self.draw.random() < 0.7
        runs = len(self.held) if whole else self.draw.randint(0, len(self.held) - 1)
        for store, layers in list(self.held.values())[:runs]:
            store.begin(parts)
            numbers = range(layers.start, layers.stop)
            store.commit(parts, [tensors(n, values) for n in numbers])
        for part, value in zip(parts, values, strict=True):
            text = self.texts[part.sequence_id]
            if whole:
                if text.computed not in self._snapshots(part.sequence_id):
                    text.values.pop(text.computed, None)
                text.computed = part.start + part.num_tokens
                text.values[text.computed] = value
            text.set_back = not whole
            if not whole and not text.computed:
                self.free(part.sequence_id)

    def _snapshots(self, number: int) -> set[int]:
        store, _ = next(iter(self.held.values()))
        held = [one for one in store.standing(None) if one.sequence_id == number]
        return {one.position for each in held for one in each.snapshots}

    def share(self) -> None:
        """Have a new text begin with one's snapshot."""
        for number, parent in list(self.texts.items()):
            at = [p for p in self._snapshots(number) if p in parent.values and not parent.set_back]
            if at and len(self.texts) < 8:
                position = self.draw.choice(sorted(at))
                child, self.num_texts = self.num_texts, self.num_texts + 1
                for store, _ in self.held.values():
                    store.share(SequenceId(child), SequenceId(number), position)
                self.texts[child] = Text({position: parent.values[position]}, position)
                return

    def free(self, number: int) -> None:
        for store, _ in self.held.values():
            store.free([SequenceId(number)])
        del self.texts[number]

    def move(self) -> None:
        """Move to another split, by any workers in any order, while steps run."""
        split = self.draw.choice(SPLITS)
        order = self.draw.sample(WORKERS, len(split))
        plan = list(zip(order, ranges(split), strict=True))
        transfers: dict[int, list[Transfer]] = {n: [] for n in order}
        for worker, layers in plan:
            for name, (store, held) in self.held.items():
                start, stop = max(held.start, layers.start), min(held.stop, layers.stop)
                if name != worker and start < stop:
                    transfers[worker].append(Transfer(store, held, LayerRange(start, stop)))
        for _ in range(self.draw.randint(0, 4)):
            for transfer in [one for some in transfers.values() for one in some]:
                transfer.pump(self.draw.choice([1, 20, 1000]), None)
            self.step()
        rest = {SequenceId(n) for n, text in self.texts.items() if text.set_back}
        made = {}
        for worker, layers in plan:
            for transfer in transfers[worker]:
                transfer.end(rest)
            made[worker] = (new_store(layers), layers)
            imports = [transfer.into for transfer in transfers[worker]]
            lengths = {SequenceId(n): text.computed for n, text in self.texts.items()}
            own = self.held.get(worker)
            assemble_states(made[worker][0], layers, lengths, own, imports)
        self.held = made
        self.num_carried += len(self.texts)

    def check(self) -> None:
        """What the coordinator goes on from stands on every stage, and is what was computed."""
        for store, layers in self.held.values():
            if layers == LayerRange(2, 3):
                continue
            for number, text in self.texts.items():
                for position, value in text.values.items():
                    state = store.at(SequenceId(number), position)
                    assert state is not None, (number, position)
                    for index, tensor in enumerate(state.batch.layers):
                        expected = tensors(layers.start + index, [value])
                        assert tensor.keys() == expected.keys()
                        assert all(
                            torch.equal(tensor[n][state.row], expected[n][0]) for n in tensor
                        )


@pytest.mark.parametrize("seed", range(6))
def test_states_stand_where_the_coordinator_goes_on(seed: int) -> None:
    stages = Stages(random.Random(seed))
    for _ in range(80):
        act = stages.draw.choice([stages.step, stages.step, stages.share, stages.move])
        act()
        if stages.texts and stages.draw.random() < 0.15:
            stages.free(stages.draw.choice(sorted(stages.texts)))
        stages.check()
    assert stages.num_carried > 20
    for number in list(stages.texts):
        stages.free(number)
    assert all(store.nbytes == 0 for store, _ in stages.held.values())
