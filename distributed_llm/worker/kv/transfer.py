"""The KV cache of some layers, piece by piece, from a stage that runs to one that shall take over.

While steps run, an exporter hands out what is committed and was not yet handed out; what a later
step writes anew it hands out again. So what is left for the end, when no step runs, is little. An
importer at the other end puts the pieces into buffers like those they came from. Nothing here does
any I/O.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from distributed_llm.common.types import KV_BLOCK, LayerRange
from distributed_llm.worker.kv.cache import KVCache
from distributed_llm.worker.kv.manifest import KVManifest, KVTransferError
from distributed_llm.worker.kv.segments import KVBuffers, KVLayout, Segment


@dataclass(frozen=True)
class KVPiece:
    """Consecutive positions of one segment in one layer.

    What an exporter hands out are views of its cache: copy them before the next step runs.

    Attributes:
        segment: its number in the exporting cache.
        layer: number of the layer in the model.
        offset: of the first position, after the segment's start.
        capacity: positions that the segment has room for by now.
        keys: [heads, positions, head_dim].
        values: [heads, positions, value_dim].
    """

    segment: int
    layer: int
    offset: int
    capacity: int
    keys: Tensor
    values: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes


class KVExporter:
    """Hands out what a cache holds in some layers, in the thread that runs the cache's steps.

    Args:
        cache: what is exported; it goes on as if it were not.
        held: the layers of the cache.
        layers: those to be exported.

    Raises:
        ValueError: the cache does not have these layers.
    """

    def __init__(self, cache: KVCache, held: LayerRange, layers: LayerRange) -> None:
        if not held.start <= layers.start < layers.stop <= held.stop:
            raise ValueError(f"a cache of layers {held} has no layers {layers}")
        self._cache = cache
        self._first = held.start
        self._layers = range(layers.start - held.start, layers.stop - held.start)
        self._done: dict[int, list[int]] = {}  # positions handed out, by segment and layer
        cache.watch(self)

    @property
    def remaining_bytes(self) -> int:
        """Bytes of what is committed and not handed out."""
        total = 0
        for segment, extent in self._cache.extents().items():
            for layer, done in zip(self._layers, self._done_of(segment), strict=True):
                if done < extent:
                    total += (extent - done) * self._cache.layout(layer).token_bytes
        return total

    def next_chunk(self, max_bytes: int, max_pieces: int) -> list[KVPiece] | None:
        """Return pieces that were not handed out yet; None if there are none. Not during a step.

        Args:
            max_bytes: of all pieces together; one position of one layer may be more.
            max_pieces: at least one.
        """
        extents = self._cache.extents()
        held = {segment.number for segment in extents}
        self._done = {number: done for number, done in self._done.items() if number in held}
        pieces: list[KVPiece] = []
        room = max_bytes
        for segment, extent in extents.items():
            done = self._done.setdefault(segment.number, self._done_of(segment))
            if min(done) >= extent:
                continue
            for index, layer in enumerate(self._layers):
                count = min(extent - done[index], room // self._cache.layout(layer).token_bytes)
                if done[index] < extent and not pieces:
                    count = max(count, 1)
                if count > 0:
                    pieces.append(self._piece(segment, layer, done[index], count))
                    done[index] += count
                    room -= pieces[-1].nbytes
                if done[index] < extent or len(pieces) == max_pieces:
                    return pieces
        return pieces or None

    def written(self, segment: int, offset: int) -> None:
        """Hand positions from `offset` on out again once they are committed."""
        done = self._done.get(segment)
        if done is not None and max(done) > offset:
            self._done[segment] = [min(count, offset) for count in done]

    def _done_of(self, segment: Segment) -> list[int]:
        return self._done.get(segment.number) or [0] * len(self._layers)

    def _piece(self, segment: Segment, layer: int, offset: int, count: int) -> KVPiece:
        held = segment.layers[layer]
        assert held is not None
        return KVPiece(
            segment.number,
            self._first + layer,
            offset,
            segment.capacity,
            held.keys[:, offset : offset + count],
            held.values[:, offset : offset + count],
        )


@dataclass
class _Buffer:
    """One layer of one segment, of which the first `filled` positions have arrived."""

    held: KVBuffers
    filled: int


class KVImporter:
    """Collects what an exporter of another worker hands out.

    Args:
        layouts: what to expect, by number of the layer in the model.
        max_bytes: what the buffers may take.

    Attributes:
        layouts: what it expects.
        manifest: what the sender holds, as it told last; None before that.
        nbytes: what the buffers take.
    """

    def __init__(self, layouts: Mapping[int, KVLayout], max_bytes: int) -> None:
        self.manifest: KVManifest | None = None
        self.nbytes = 0
        self.layouts = dict(layouts)
        self._max_bytes = max_bytes
        self._buffers: dict[tuple[int, int], _Buffer] = {}

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that it takes, by their numbers in the model."""
        return tuple(self.layouts)

    def add(self, piece: KVPiece) -> None:
        """Put a piece where it belongs; what was there from its first position on is forgotten.

        Raises:
            KVTransferError: it is of no layer that is expected, does not look like one, does not
                follow what has arrived of its segment, or does not fit `max_bytes`.
        """
        layout = self.layouts.get(piece.layer)
        if layout is None:
            raise KVTransferError(f"layer {piece.layer} is not among {sorted(self.layouts)}")
        count = _count(piece, layout)
        buffer = self._buffers.get((piece.segment, piece.layer))
        filled = buffer.filled if buffer else 0
        if not 0 <= piece.offset <= filled:
            raise KVTransferError(
                f"a piece of segment {piece.segment} in layer {piece.layer} begins at "
                f"{piece.offset}, but {filled} positions have arrived"
            )
        if buffer is None or buffer.held.keys.shape[1] < piece.capacity:
            buffer = self._grow(buffer, piece, layout)
        stop = piece.offset + count
        buffer.held.keys[:, piece.offset : stop] = piece.keys
        buffer.held.values[:, piece.offset : stop] = piece.values
        buffer.filled = stop

    def update(self, manifest: KVManifest) -> None:
        """Note what the sender holds by now; what it does not hold any more is forgotten.

        Raises:
            KVTransferError: the manifest contradicts itself, or tells of more than `max_bytes`.
        """
        manifest.check()
        token_bytes = sum(layout.token_bytes for layout in self.layouts.values())
        if sum(segment.capacity for segment in manifest.segments) * token_bytes > self._max_bytes:
            raise self._too_much()
        self.manifest = manifest
        held = {segment.number for segment in manifest.segments}
        gone = [key for key in self._buffers if key[0] not in held]
        self.nbytes -= sum(self._buffers.pop(key).held.nbytes for key in gone)

    def filled(self, segment: int, layer: int) -> int:
        """Return how many positions of a segment have arrived."""
        buffer = self._buffers.get((segment, layer))
        return buffer.filled if buffer else 0

    def buffer(self, segment: int, layer: int) -> KVBuffers:
        """Return what has arrived of a segment, with room for more; something has."""
        return self._buffers[segment, layer].held

    def _grow(self, old: _Buffer | None, piece: KVPiece, layout: KVLayout) -> _Buffer:
        growth = piece.capacity * layout.token_bytes - (old.held.nbytes if old else 0)
        if self.nbytes + growth > self._max_bytes:
            raise self._too_much()
        new = _Buffer(layout.allocate(piece.capacity), 0)
        if old is not None:
            new.filled = old.filled
            new.held.keys[:, : old.filled] = old.held.keys[:, : old.filled]
            new.held.values[:, : old.filled] = old.held.values[:, : old.filled]
        self.nbytes += growth
        self._buffers[piece.segment, piece.layer] = new
        return new

    def _too_much(self) -> KVTransferError:
        return KVTransferError(
            f"the KV cache that arrives takes more than the {self._max_bytes} bytes that are left "
            "for it"
        )


def _count(piece: KVPiece, layout: KVLayout) -> int:
    """Return how many positions a piece has.

    Raises:
        KVTransferError: it does not look like one of its layer.
    """
    count = piece.keys.shape[1] if piece.keys.dim() == 3 else 0
    found: tuple[Any, ...] = (
        tuple(piece.keys.shape),
        tuple(piece.values.shape),
        piece.keys.dtype,
        piece.values.dtype,
    )
    expected = (
        (layout.heads, count, layout.key_dim),
        (layout.heads, count, layout.value_dim),
        layout.dtype,
        layout.dtype,
    )
    if count < 1 or found != expected:
        raise KVTransferError(
            f"a piece of layer {piece.layer} has keys and values {found}; expected are {expected}"
        )
    if piece.capacity % KV_BLOCK or piece.capacity < piece.offset + count:
        raise KVTransferError(
            f"a piece of layer {piece.layer} has positions from {piece.offset} to "
            f"{piece.offset + count} of a segment with room for {piece.capacity}"
        )
    return count
