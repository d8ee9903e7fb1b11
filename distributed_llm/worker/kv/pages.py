"""Pages: the keys and values of all sequences in one tensor each per layer, block by block.

On a device whose memory does not come as it is written (`slabs`), a sequence would otherwise have
to be copied as it grows. Here it takes another block of `KV_BLOCK` positions, anywhere. All layers
that keep everything have the same blocks for a segment, and so have those with a window, which drop
them. So where a step writes and reads is worked out once for all layers that are alike.

The tensors grow, a layer at a time, when blocks are needed that they do not have: by a quarter, so
that every position is copied a few times only, and never beyond the limit of the cache where that
can be helped. Where those of one kind of layers have more than they need while the other kind needs
more than there is, they are closed up first.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from distributed_llm.common.types import KV_BLOCK
from distributed_llm.worker.devices import sent
from distributed_llm.worker.kv.blocks import Blocks
from distributed_llm.worker.kv.layer_memory import ArrivedLayers, LayerMemory, SharedLayers
from distributed_llm.worker.kv.manifest import KVManifest
from distributed_llm.worker.kv.segments import KVBuffers, KVLayout, Segment

_DROPPED = -1

_LEAST_MORE = 16
"""Blocks by which tensors grow at least."""

Run = tuple[int, int]
"""Positions of a layer's tensors that follow one another: the first, and how many."""


class LayerPages(LayerMemory):
    """Gives the segments of a cache their blocks.

    Args:
        num_layers: of the stage.

    Attributes:
        generation: grows whenever tensors of layers are replaced.
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__(num_layers)
        self.generation = 0
        self._blocks = (Blocks(), Blocks())  # of layers without and with a window
        self._tensors: list[tuple[Tensor, Tensor] | None] = [None] * num_layers
        self._indices: dict[object, Tensor] = {}
        self._whole: dict[tuple[int, bool], list[tuple[int, int, int]]] = {}
        self._fits = True  # or memory was short when tensors were to grow

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(states.nbytes for states in self.tensors)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, each once."""
        return [states for both in self._tensors if both for states in both]

    def tensors_of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values, [positions, heads, dim].

        They are valid until `generation` grows.
        """
        both = self._tensors[layer]
        assert both is not None
        return both

    def give_back(self) -> None:
        """Free all tensors; no segment has blocks."""
        self._tensors = [None] * len(self._tensors)
        self._blocks = (Blocks(), Blocks())
        self._whole.clear()
        self._changed()

    # -------------------------------------------------------------- blocks of segments

    def make_room(
        self, segment: Segment, segments: Collection[Segment], max_bytes: int | None
    ) -> None:
        """Give a segment blocks for its capacity, and layers tensors that have them.

        All tensors together take more than `max_bytes` only if the segments do, and by one block of
        each layer, which nobody has.
        """
        wanted = segment.capacity // KV_BLOCK
        self._indices.clear()
        kinds = [kind for kind in self._kinds() if len(segment.blocks[kind]) < wanted]
        for windowed in kinds:
            own, limit = segment.blocks[windowed], self._limit(windowed, max_bytes)
            self._whole.pop((segment.number, windowed), None)
            while len(own) < wanted:
                before = own[-1] if own and own[-1] != _DROPPED else None
                held = max(len(own), wanted - len(own))
                own.append(self._blocks[windowed].take(before, held, limit))
            self._fits = False
        if not self._fits:
            self._fit(segments, max_bytes)
            self._fits = True

    def drop_unseen(self, segment: Segment, before: int) -> None:
        """Let others take the blocks that `segment` counts as unseen, in layers with a window."""
        own = segment.blocks[True]
        there = slice(before // KV_BLOCK, min(segment.unseen // KV_BLOCK, len(own)))
        self._free(own[there], windowed=True)
        own[there] = [_DROPPED] * len(own[there])

    def drop(self, segment: Segment) -> None:
        """Let others take the blocks of a segment that nobody reads any more."""
        for windowed in (False, True):
            self._free(segment.blocks[windowed], windowed=windowed)
            self._whole.pop((segment.number, windowed), None)
        segment.blocks = ([], [])

    def _free(self, numbers: Iterable[int], *, windowed: bool) -> None:
        self._blocks[windowed].free([number for number in numbers if number != _DROPPED])

    def runs(self, segment: Segment, first: int, stop: int, *, windowed: bool) -> list[Run]:
        """Return where positions `[first, stop)` of a segment are, in their order.

        Args:
            segment: with these positions.
            first: counted from the segment's start.
            stop: likewise.
            windowed: whether in layers with a window, or in the others.
        """
        runs = []
        for at, start, count in self._runs_of(segment, windowed):
            low, high = max(first, at), min(stop, at + count)
            if low < high:
                runs.append((start + low - at, high - low))
        return runs

    def _runs_of(self, segment: Segment, windowed: bool) -> list[tuple[int, int, int]]:
        """Return all runs of a segment: which position, where that is, and how many follow."""
        key = segment.number, windowed
        whole = self._whole.get(key)
        if whole is None:
            whole = self._whole[key] = []
            for place, number in enumerate(segment.blocks[windowed]):
                if place and number == segment.blocks[windowed][place - 1] + 1:
                    at, start, count = whole[-1]
                    whole[-1] = at, start, count + KV_BLOCK
                elif number != _DROPPED:
                    whole.append((place * KV_BLOCK, number * KV_BLOCK, KV_BLOCK))
        return whole

    def slot(self, segment: Segment, offset: int, *, windowed: bool) -> int:
        """Return where one position of a segment is, counted from its start; see `runs`."""
        return segment.blocks[windowed][offset // KV_BLOCK] * KV_BLOCK + offset % KV_BLOCK

    # -------------------------------------------------------------- keys and values

    def write(self, layer: int, segment: Segment, first: int, keys: Tensor, values: Tensor) -> None:
        """Write positions of a segment; see `LayerMemory.write`."""
        self._prepare(layer, keys, values)
        runs = self.runs(segment, first, first + keys.shape[1], windowed=self._windowed(layer))
        self._put(layer, runs, keys, values)

    def write_tokens(
        self, layer: int, places: Sequence[tuple[Segment, int]], keys: Tensor, values: Tensor
    ) -> None:
        """Write one token into each of several segments."""
        self._prepare(layer, keys, values)
        windowed = self._windowed(layer)
        runs = [(self.slot(*place, windowed=windowed), 1) for place in places]
        self._put(layer, runs, keys, values)

    def write_slots(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write tokens as `write_tokens` does, where `slots` says, int64 [tokens] on the device."""
        self._prepare(layer, keys, values)
        for held, states in zip(self.tensors_of(layer), (keys, values), strict=True):
            held.index_copy_(0, slots, states.transpose(0, 1).to(held.dtype))

    def _put(self, layer: int, runs: list[Run], keys: Tensor, values: Tensor) -> None:
        if len(runs) > 1:
            self.write_slots(layer, self._index(runs, keys.device), keys, values)
            return
        ((start, count),) = runs
        for held, states in zip(self.tensors_of(layer), (keys, values), strict=True):
            held[start : start + count].copy_(states.transpose(0, 1))

    def read(self, layer: int, segment: Segment, first: int, stop: int) -> KVBuffers:
        """Return positions of a segment: views where they lie in one piece, else copies."""
        runs = self.runs(segment, first, stop, windowed=self._windowed(layer))
        return self._got(layer, runs, first)

    def read_chain(self, layer: int, segments: Sequence[Segment], stop: int) -> list[KVBuffers]:
        """Return what a layer keeps of a sequence, in one piece."""
        windowed = self._windowed(layer)
        runs = self.runs_of_chain(segments, 0, segments[-1].start + stop, windowed=windowed)
        return [self._got(layer, runs, 0)]

    def runs_of_chain(
        self, segments: Sequence[Segment], first: int, stop: int, *, windowed: bool
    ) -> list[Run]:
        """Return where positions `[first, stop)` of a sequence are, if they are kept, in order.

        Args:
            segments: of the sequence, in order.
            first: counted from its start.
            stop: likewise.
            windowed: whether in layers with a window, or in the others.
        """
        runs: list[Run] = []
        ends = [*(segment.start for segment in segments[1:]), stop]
        for segment, end in zip(segments, ends, strict=True):
            low, high = max(first - segment.start, 0), min(end, stop) - segment.start
            runs += self.runs(segment, max(low, segment.unseen * windowed), high, windowed=windowed)
        return _joined(runs)

    def _got(self, layer: int, runs: list[Run], first: int) -> KVBuffers:
        both = self.tensors_of(layer)
        if len(runs) == 1:
            ((start, count),) = runs
            found = [states[start : start + count] for states in both]
        else:
            index = self._index(runs, both[0].device)
            found = [states.index_select(0, index) for states in both]
        keys, values = (states.transpose(0, 1) for states in found)
        return KVBuffers(keys, values, first=first)

    def _index(self, runs: list[Run], device: torch.device) -> Tensor:
        """Return all positions of runs, int64 on the device; layers that are alike share it."""
        key = tuple(runs)
        index = self._indices.get(key)
        if index is None:
            whole = torch.cat([torch.arange(start, start + count) for start, count in runs])
            index = self._indices[key] = sent(whole, device)
        return index

    # -------------------------------------------------------------- moves

    def adopt(
        self,
        segments: Mapping[int, Segment],
        shared: SharedLayers | None,
        arrived: ArrivedLayers,
        manifest: KVManifest,
    ) -> None:
        """Give new segments blocks: those that they have in the memory that is shared, else new."""
        self.give_back()
        if shared is not None:
            self._share(segments, shared)
        unseen, extents = manifest.unseen(), manifest.extents()
        for number, segment in segments.items():
            if any(self.windows) and not segment.blocks[True]:
                segment.blocks[True].extend([_DROPPED] * (unseen[number] // KV_BLOCK))
            self.make_room(segment, segments.values(), None)
        for layer, buffers in arrived:
            for number, held in buffers.items():
                if held is None or number not in extents:
                    continue
                first = max(held.first, unseen[number] if self.windows[layer] else 0)
                stop = extents[number].stop - segments[number].start
                if first < stop:
                    there = held.cut(first, stop)
                    self.write(layer, segments[number], first, there.keys, there.values)

    def _share(self, segments: Mapping[int, Segment], shared: SharedLayers) -> None:
        """Take tensors of other pages, and the blocks that segments have there."""
        assert isinstance(shared.memory, LayerPages)
        shared.memory.trim(shared.segments.values())
        for layer, there in shared.layers.items():
            self._tensors[layer] = shared.memory._tensors[there]
        for windowed in {bool(self.windows[layer]) for layer in shared.layers}:
            for number, segment in segments.items():
                segment.blocks[windowed][:] = shared.segments[number].blocks[windowed]
                taken = (n for n in segment.blocks[windowed] if n != _DROPPED)
                self._blocks[windowed].set_taken(taken)

    # -------------------------------------------------------------- tensors

    def _windowed(self, layer: int) -> bool:
        return bool(self.windows[layer])

    def _kinds(self) -> list[bool]:
        """Return whether there are layers without a window, and with one."""
        return sorted({bool(window) for window in self.windows})

    def _block_bytes(self, windowed: bool) -> int:
        return KV_BLOCK * sum(
            layout.token_bytes
            for layout, window in zip(self._layouts, self.windows, strict=True)
            if layout and bool(window) == windowed
        )

    def _limit(self, windowed: bool, max_bytes: int | None) -> int | None:
        """Return how many blocks the layers of one kind may have, with that which nobody has."""
        if max_bytes is None or not (block_bytes := self._block_bytes(windowed)):
            return None
        return max_bytes // block_bytes + 1

    def _prepare(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Make a layer's tensors, if it is written for the first time."""
        if self._layouts[layer] is None:
            self.learn(layer, keys, values)
        if self._tensors[layer] is None:
            self._resize(layer, self._blocks[bool(self.windows[layer])].end)

    def _fit(self, segments: Collection[Segment], max_bytes: int | None) -> None:
        """Have all tensors have the blocks that are taken."""
        for windowed in self._kinds():
            layers, held = self._layers(windowed), self._held(windowed)
            if not layers or held >= self._blocks[windowed].end:
                continue
            limit = self._limit(windowed, max_bytes)
            wanted = held + max(held // 4, _LEAST_MORE)
            wanted = wanted if limit is None else min(wanted, limit)
            wanted = max(wanted, self._blocks[windowed].end)
            if self._excess(windowed, wanted, max_bytes) > 0:
                self._close_up(not windowed, segments)
                more = self._excess(windowed, wanted, max_bytes) // self._block_bytes(windowed)
                wanted = max(wanted - max(0, more + 1), self._blocks[windowed].end)
            if self._excess(windowed, wanted, max_bytes) > 0:
                self._close_up(windowed, segments)
            for layer in layers:
                if self._count(layer) < self._blocks[windowed].end:
                    self._resize(layer, wanted)

    def _excess(self, windowed: bool, wanted: int, max_bytes: int | None) -> int:
        """Return by how much tensors exceed the limit once one kind has so many blocks."""
        if max_bytes is None:
            return 0
        counts = ((windowed, wanted), (not windowed, self._held(not windowed)))
        return sum(self._block_bytes(kind) * (n - 1) for kind, n in counts if n) - max_bytes

    def _layers(self, windowed: bool) -> list[int]:
        """Return the layers of one kind that have tensors."""
        own = enumerate(zip(self._tensors, self.windows, strict=True))
        return [n for n, (both, window) in own if both and bool(window) == windowed]

    def _held(self, windowed: bool) -> int:
        """Return how many blocks all layers of one kind have."""
        return min(map(self._count, self._layers(windowed)), default=0)

    def _count(self, layer: int) -> int:
        """Return how many blocks a layer has."""
        return min(map(len, self.tensors_of(layer))) // KV_BLOCK

    def _resize(self, layer: int, count: int) -> None:
        """Give a layer tensors of so many blocks, of which the first have what they had."""
        layout = self.layout(layer)
        with torch.inference_mode(False):  # else only steps could write them
            self._replace(layer, layout, count)
        self._changed()

    def _replace(self, layer: int, layout: KVLayout, count: int) -> None:
        if self._tensors[layer] is None:
            empty = torch.empty(0, dtype=layout.dtype, device=layout.device)
            self._tensors[layer] = empty, empty
        for place, dim in enumerate((layout.key_dim, layout.value_dim)):
            both = list(self.tensors_of(layer))
            shape = (count * KV_BLOCK, layout.heads, dim)
            # Kernels may multiply what follows a piece by zero, so it has to be finite.
            made = torch.zeros(shape, dtype=layout.dtype, device=layout.device)
            kept = min(len(made), len(both[place]))
            if kept:
                made[:kept].copy_(both[place][:kept])
            both[place] = made
            self._tensors[layer] = both[0], both[1]  # one after the other, for memory may be short

    def trim(self, segments: Iterable[Segment]) -> None:
        """Free the blocks that nobody has, where they are a fifth of all or more; no step runs.

        Args:
            segments: all of the cache.
        """
        for windowed in self._kinds():
            taken = sum(n != _DROPPED for each in segments for n in each.blocks[windowed]) + 1
            if 4 * self._held(windowed) > 5 * taken:
                self._close_up(windowed, segments)

    def _close_up(self, windowed: bool, segments: Iterable[Segment]) -> None:
        """Have the layers of one kind have no blocks but those that are taken.

        Whenever a device has no memory for that, everybody has the blocks that he had, or others
        with the same content.
        """
        own = [segment.blocks[windowed] for segment in segments]
        taken = {n for each in own for n in each if n != _DROPPED}
        count = len(taken)
        above = sorted(n for n in taken if n > count)
        moved = dict(zip(above, sorted(set(range(1, count + 1)) - taken), strict=True))
        held = self._held(windowed)
        filled = [n for n in above if n < held]  # nothing is in the others yet
        for layer in self._layers(windowed) if filled else ():
            for states in self.tensors_of(layer):
                blocks = states.view(-1, KV_BLOCK, *states.shape[1:])
                there = sent(torch.tensor([moved[n] for n in filled]), states.device)
                here = sent(torch.tensor(filled), states.device)
                blocks.index_copy_(0, there, blocks.index_select(0, here))
        for each in own:
            each[:] = [moved.get(n, n) for n in each]
        self._whole.clear()
        self._blocks[windowed].close_up(count)
        for layer in self._layers(windowed):
            self._resize(layer, count + 1)

    def _changed(self) -> None:
        self.generation += 1
        self._indices.clear()


def _joined(runs: Iterable[Run]) -> list[Run]:
    """Return runs, those that follow one another as one."""
    joined: list[Run] = []
    for start, count in runs:
        if joined and sum(joined[-1]) == start:
            joined[-1] = joined[-1][0], joined[-1][1] + count
        else:
            joined.append((start, count))
    return joined
