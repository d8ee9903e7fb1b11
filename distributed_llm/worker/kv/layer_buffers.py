"""The buffers of a stage's layers: where they come from, and how they fill."""

import itertools
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from distributed_llm.worker.kv.layer_memory import ArrivedLayers, LayerMemory, SharedLayers
from distributed_llm.worker.kv.manifest import KVManifest
from distributed_llm.worker.kv.segments import KVBuffers, Segment
from distributed_llm.worker.kv.slabs import SlabPool


class LayerBuffers(LayerMemory):
    """Gives the segments of a cache their buffers.

    Args:
        num_layers: of the stage.
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__(num_layers)
        self._pools: list[SlabPool | None] = [None] * num_layers
        self._places = _TokenPlaces()

    def make_room(
        self, segment: Segment, segments: Collection[Segment], max_bytes: int | None
    ) -> None:
        """Do nothing: buffers grow when they are written."""

    def drop(self, segment: Segment) -> None:
        """Do nothing: buffers are freed with the segment."""

    def write(self, layer: int, segment: Segment, first: int, keys: Tensor, values: Tensor) -> None:
        """Write positions of a segment; see `LayerMemory.write`."""
        held = self.with_room(layer, segment, first, keys, values)
        new = held.cut(first, first + keys.shape[1])
        new.keys.copy_(keys)
        new.values.copy_(values)

    def read(self, layer: int, segment: Segment, first: int, stop: int) -> KVBuffers:
        """Return views of positions of a segment."""
        held = segment.layers[layer]
        assert held is not None
        return held.cut(first, stop)

    def with_room(
        self, layer: int, segment: Segment, kept: int, keys: Tensor, values: Tensor
    ) -> KVBuffers:
        """Return a segment's buffers in one layer, with room for its capacity.

        Args:
            layer: number of the layer within the stage.
            segment: whose buffers; they may be replaced.
            kept: positions that have to stay.
            keys: [heads, ..., head_dim], any of this layer, for its layout.
            values: [heads, ..., value_dim].
        """
        held = segment.layers[layer]
        if held is not None and held.room >= segment.capacity:
            return held
        if self._layouts[layer] is None:
            self.learn(layer, keys, values)
        first = self._first(layer, segment)
        grown = self._pool(layer).take(segment.capacity, first)
        if held is None:
            self._count(layer, segment)
        elif first < kept:
            grown.copy_from(held, first, kept)
        segment.layers[layer] = grown
        return grown

    def drop_unseen(self, segment: Segment, before: int) -> None:
        """Free the positions that `segment` counts as unseen, in layers with a window."""
        for layer, window in enumerate(self.windows):
            held = segment.layers[layer]
            if not window or held is None:
                continue
            room = min(held.room, segment.capacity)
            first = min(segment.unseen, room)
            if held.first >= first:
                continue
            if held.row is None or not held.row.slab.drop(held.row, before, first):
                kept = self.layout(layer).allocate(room, first)
                kept.copy_from(held, first, room)
                segment.layers[layer] = kept

    def _first(self, layer: int, segment: Segment) -> int:
        return segment.unseen if self.windows[layer] else 0

    def read_chain(self, layer: int, segments: Sequence[Segment], stop: int) -> list[KVBuffers]:
        """Return views of what a layer keeps of each segment of a sequence."""
        views = []
        for segment, following in itertools.pairwise(segments):
            first, end = self._first(layer, segment), following.start - segment.start
            if first < end:
                views.append(self.read(layer, segment, first, end))
        last = segments[-1]
        return [*views, self.read(layer, last, self._first(layer, last), stop)]

    def write_tokens(
        self, layer: int, places: Sequence[tuple[Segment, int]], keys: Tensor, values: Tensor
    ) -> None:
        """Write one token into each of several segments."""
        held = [self.with_room(layer, one, offset, keys, values) for one, offset in places]
        offsets = [offset for _, offset in places]
        if not self._places.write(held, offsets, keys, values):
            for number, (buffers, offset) in enumerate(zip(held, offsets, strict=True)):
                buffers.keys[:, offset - buffers.first] = keys[:, number]
                buffers.values[:, offset - buffers.first] = values[:, number]

    def adopt(
        self,
        segments: Mapping[int, Segment],
        shared: SharedLayers | None,
        arrived: ArrivedLayers,
        manifest: KVManifest,
    ) -> None:
        """Give new segments buffers that came from elsewhere."""
        if shared is not None:
            for layer, there in shared.layers.items():
                theirs = shared.segments
                self._adopt(layer, segments, {n: theirs[n].layers[there] for n in segments})
        for layer, buffers in arrived:
            self._adopt(layer, segments, buffers)

    def _adopt(
        self,
        layer: int,
        segments: Mapping[int, Segment],
        buffers: Mapping[int, KVBuffers | None],
    ) -> None:
        for number, segment in segments.items():
            held = segment.layers[layer] = buffers[number]
            if held is not None:
                self._count(layer, segment)
                self._pool(layer).adopt(held)

    def _count(self, layer: int, segment: Segment) -> None:
        """Have a segment know that it has buffers of one more layer."""
        token_bytes = self.layout(layer).token_bytes
        segment.token_bytes += token_bytes
        segment.windowed_token_bytes += token_bytes if self.windows[layer] else 0

    def _pool(self, layer: int) -> SlabPool:
        pool = self._pools[layer]
        if pool is None:
            pool = self._pools[layer] = SlabPool(self.layout(layer))
        return pool


class _TokenPlaces:
    """Writes the tokens of several rows of a slab at once.

    Most layers of a step have the same rows, so where the tokens go is kept.
    """

    def __init__(self) -> None:
        self._made_from: object = None
        self._places = torch.empty(0, dtype=torch.int64)

    def write(
        self, held: Sequence[KVBuffers], offsets: Sequence[int], keys: Tensor, values: Tensor
    ) -> bool:
        """Write a token into each of these rows; return False if they are not of one slab.

        Args:
            held: where to write.
            offsets: positions in them.
            keys: [heads, tokens, key_dim].
            values: [heads, tokens, value_dim].
        """
        slab = held[0].row.slab if held[0].row else None
        if slab is None or len(held) == 1:
            return False
        indices = [one.row.index for one in held if one.row and one.row.slab is slab]
        if len(indices) != len(held):
            return False
        heads = keys.shape[0]
        made_from = (indices, offsets, heads, slab.room, slab.row_positions)
        if made_from != self._made_from:
            self._made_from = made_from
            rows = torch.tensor(indices) * slab.row_positions + torch.tensor(offsets)
            self._places = (rows[:, None] + torch.arange(heads) * slab.room).view(-1)
        for places, states in ((slab.flat_keys, keys), (slab.flat_values, values)):
            tokens = states.transpose(0, 1).reshape(-1, states.shape[-1])
            places.index_copy_(0, self._places, tokens)
        return True
