"""The buffers of a stage's layers: what they look like, where they come from, and how they fill."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from distributed_llm.worker.kv.segments import KVBuffers, KVLayout, Segment
from distributed_llm.worker.kv.slabs import SlabPool


class LayerBuffers:
    """Gives the segments of a cache their buffers.

    Args:
        num_layers: of the stage.

    Attributes:
        bytes_per_token: of one position in all layers that were written.
        windows: by layer, how many positions a token sees, itself included; 0: all.
    """

    def __init__(self, num_layers: int) -> None:
        self.bytes_per_token = 0
        self.windows = (0,) * num_layers
        self._layouts: list[KVLayout | None] = [None] * num_layers
        self._pools: list[SlabPool | None] = [None] * num_layers
        self._places = _TokenPlaces()

    @property
    def windowed_bytes_per_token(self) -> int:
        """Bytes of one position in the layers with a window."""
        windowed = [n for n, window in enumerate(self.windows) if window]
        return sum(self.layout(layer).token_bytes for layer in windowed)

    def knows(self, layer: int) -> bool:
        """Return whether a layer has been written."""
        return self._layouts[layer] is not None

    def layout(self, layer: int) -> KVLayout:
        """Return the layout of a layer that has been written at least once."""
        layout = self._layouts[layer]
        assert layout is not None
        return layout

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
            self._learn_layout(layer, keys, values)
        first = self._first(layer, segment)
        grown = self._pool(layer).take(segment.capacity, first)
        if held is None:
            self._count(layer, segment)
        elif first < kept:
            grown.copy_from(held, first, kept)
        segment.layers[layer] = grown
        return grown

    def drop_unseen(self, segment: Segment, before: int) -> None:
        """Free the positions that `segment` counts as unseen, in layers with a window.

        Args:
            segment: whose `unseen` has grown.
            before: what `unseen` was.
        """
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

    def views(self, layer: int, segments: Sequence[Segment]) -> list[KVBuffers]:
        """Return what a layer keeps in all segments of a sequence but the last."""
        views = []
        for segment, following in itertools.pairwise(segments):
            first, stop = self._first(layer, segment), following.start - segment.start
            if first < stop:
                held = segment.layers[layer]
                assert held is not None
                views.append(held.cut(first, stop))
        return views

    def newest(self, layer: int, segment: Segment, stop: int) -> KVBuffers:
        """Return what a layer keeps of a segment, up to `stop` positions after its start."""
        held = segment.layers[layer]
        assert held is not None
        return held.cut(self._first(layer, segment), stop)

    def write_tokens(
        self, layer: int, places: Sequence[tuple[Segment, int]], keys: Tensor, values: Tensor
    ) -> None:
        """Write one token into each of several segments.

        Args:
            layer: number of the layer within the stage.
            places: segments with room for the token, and how far after their starts it belongs.
            keys: [heads, tokens, head_dim].
            values: [heads, tokens, value_dim].
        """
        held = [self.with_room(layer, one, offset, keys, values) for one, offset in places]
        offsets = [offset for _, offset in places]
        if not self._places.write(held, offsets, keys, values):
            for number, (buffers, offset) in enumerate(zip(held, offsets, strict=True)):
                buffers.keys[:, offset - buffers.first] = keys[:, number]
                buffers.values[:, offset - buffers.first] = values[:, number]

    def adopt(self, segment: Segment, layers: Sequence[KVBuffers | None]) -> None:
        """Give a new segment buffers that came from elsewhere; all layers were written before."""
        segment.layers = list(layers)
        for layer, held in enumerate(layers):
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

    def _learn_layout(self, layer: int, keys: Tensor, values: Tensor) -> None:
        layout = KVLayout(keys.shape[0], keys.shape[-1], values.shape[-1], keys.dtype, keys.device)
        self._layouts[layer] = layout
        self.bytes_per_token += layout.token_bytes


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
