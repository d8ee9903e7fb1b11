"""What a stage holds of sequences: keys and values of positions, and states of layers."""

from collections.abc import Collection, Iterable, Sequence

import msgspec

from distributed_llm.common.messages import SequenceSlice
from distributed_llm.common.types import LayerRange, SequenceId
from distributed_llm.common.wording import layers_text
from distributed_llm.worker.kv.assembly import assemble
from distributed_llm.worker.kv.cache import KVCache
from distributed_llm.worker.kv.held_transfer import HeldExporter, HeldImporter
from distributed_llm.worker.kv.import_room import ImportRoom
from distributed_llm.worker.kv.manifest import KVManifest
from distributed_llm.worker.kv.state_assembly import assemble_states
from distributed_llm.worker.kv.state_transfer import StateExporter, StateImporter
from distributed_llm.worker.kv.states import SequenceState, StateStore, StateTensors, layout_of
from distributed_llm.worker.kv.transfer import KVExporter, KVImporter


class HeldSequences:
    """The KV cache and the states of one stage, of which a step changes both or none.

    Args:
        cache: of all layers; it also counts positions where no layer keeps any.
        state_bytes: by layer, what the state of one sequence takes; 0: it keeps none.
        attentions: how many places a layer has in the cache, one for each time it attends.
    """

    def __init__(self, cache: KVCache, state_bytes: Sequence[int], attentions: int = 1) -> None:
        self._cache = cache
        self._attentions = attentions
        self._states = StateStore()
        self.state_bytes = sum(state_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and states."""
        return self._cache.nbytes + self._states.nbytes

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory that they take."""
        return self._cache.memory_bytes + self._states.nbytes

    @property
    def tensors(self) -> list[object]:
        """All buffers, each once."""
        return [*self._cache.buffers(), *self._states.tensors()]

    def have(self, part: SequenceSlice) -> int | None:
        """Return None if all is held that a slice goes on from, else where computing can go on.

        Computing can go on from any position that is held, but where layers have a state of their
        own: there only from where one stands.
        """
        known = part.sequence_id in self._cache
        prefix = None if known else part.prefix
        whose, start = (
            (part.sequence_id, part.start)
            if prefix is None
            else (prefix.sequence_id, prefix.length)
        )
        have = self._cache.length(whose)
        stands = self.state_at(whose, start) is not None or not self.state_bytes or not start
        if have >= start and stands:
            in_cache = whose in self._cache
            return None if not in_cache or self._cache.sees(whose, start) else 0
        if prefix is not None:
            return 0
        return self._states.newest(whose, min(have, start)) if self.state_bytes else have

    def state_at(self, sequence_id: SequenceId, position: int) -> SequenceState | None:
        """Return the state of a sequence at a position, if one stands there."""
        return self._states.at(sequence_id, position)

    def learn(self, made: Sequence[StateTensors]) -> None:
        """Learn what states look like from those of one sequence.

        Args:
            made: tensors of each layer.
        """
        self._states.layouts = tuple(map(layout_of, made))

    def admit(self, step: Sequence[SequenceSlice]) -> None:
        """Check that a step fits, and create its new sequences; see `KVCache.admit`.

        Raises:
            KVCacheFull: the step does not fit; nothing was changed.
        """
        states = self._states.number_after(step) if self.state_bytes else 0
        begins = [part for part in step if part.prefix and part.sequence_id not in self._cache]
        self._cache.admit(step, states * self.state_bytes)
        self._states.begin(step)
        most, new_bytes = self._cache.max_bytes, len(step) * self.state_bytes
        if new_bytes and most is not None and self.nbytes + new_bytes > most:
            self._states.tighten()
        for part in begins:
            assert part.prefix is not None
            self._states.share(part.sequence_id, part.prefix.sequence_id, part.prefix.length)

    def commit(
        self,
        step: Sequence[SequenceSlice],
        groups: Iterable[tuple[Sequence[SequenceId], Sequence[StateTensors]]],
    ) -> None:
        """Have a step count as held: every layer of it succeeded.

        Args:
            step: what was computed.
            groups: sequences whose states were made together, and the tensors of each layer.
        """
        parts = {part.sequence_id: part for part in step}
        if self.state_bytes:
            for sequence_ids, layers in groups:
                self._states.commit([parts[whose] for whose in sequence_ids], layers)
        for part in step:
            self._cache.commit(part.sequence_id, part.start + part.num_tokens)

    def manifest(self, set_back: Collection[SequenceId]) -> KVManifest:
        """Return a description of what is held; not to be called in a step.

        Args:
            set_back: sequences of which what their latest steps began with is told, too.
        """
        states = self._states.standing(set_back)
        return msgspec.structs.replace(self._cache.manifest(), states=states)

    def exporter(self, held: LayerRange, layers: LayerRange) -> HeldExporter:
        """Return an exporter of what is held in some layers; steps may go on.

        Args:
            held: the layers of the stage.
            layers: those to export.

        Raises:
            ValueError: the stage does not have these layers.
        """
        positions = KVExporter(self._cache, self._places(held), self._places(layers))
        return HeldExporter(positions, StateExporter(self._states, held, layers))

    def importer(self, held: LayerRange, layers: LayerRange, max_bytes: int) -> HeldImporter:
        """Return an importer for what others hold in some layers.

        Args:
            held: the layers of the stage.
            layers: to expect.
            max_bytes: of memory for the importer.

        Raises:
            ValueError: the stage does not have these layers.
        """
        if layers.start < held.start or layers.stop > held.stop:
            raise ValueError(f"a stage of {layers_text(held)} has no {layers_text(layers)}")
        room, places, first = ImportRoom(max_bytes), self._places(layers), self._places(held).start
        kept = [n for n in range(places.start, places.stop) if self._cache.knows(n - first)]
        layouts = {n: self._cache.layout(n - first) for n in kept}
        windowed = [n for n in kept if self._cache.windows[n - first]]
        numbers = range(layers.start, layers.stop)
        states = {n: layout for n in numbers if (layout := self._states.layouts[n - held.start])}
        return HeldImporter(
            KVImporter(places, layouts, room, windowed), StateImporter(states, room)
        )

    def assemble(
        self,
        layers: LayerRange,
        own: tuple["HeldSequences", LayerRange] | None,
        imports: Sequence[HeldImporter],
    ) -> None:
        """Fill this with what other stages hold; nothing is held, and no step runs.

        Args:
            layers: of the stage.
            own: what this worker has held so far, and its layers; see `assembly.assemble`.
            imports: for the layers that `own` lacks, with their senders' manifests.

        Raises:
            KVTransferError: something has not arrived, or a layer has no source.
            ValueError: something is held.
        """
        mine = (own[0]._cache, self._places(own[1])) if own else None
        states = (own[0]._states, own[1]) if own else None
        assemble(
            self._cache,
            self._places(layers),
            mine,
            [each.positions for each in imports],
            lambda lengths: assemble_states(self._states, layers, lengths, states, imports),
        )

    def _places(self, layers: LayerRange) -> LayerRange:
        """Return where the cache has these layers."""
        return LayerRange(layers.start * self._attentions, layers.stop * self._attentions)

    def free(self, sequence_ids: Iterable[SequenceId]) -> None:
        """Drop all that is held of these sequences; ignore unknown ones."""
        dropped = tuple(sequence_ids)
        self._cache.free(dropped)
        self._states.free(dropped)
