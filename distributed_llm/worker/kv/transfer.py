"""The two ends of a KV cache transfer: exports pieces of a cache in use, and imports them.

An exporter returns committed positions piece by piece, while the stage goes on running steps. It
returns a position again when a later step has overwritten it, so little is left when steps stop. An
importer on the other worker puts the pieces into buffers of the same shapes. Neither does any I/O.

(Pre-copy, as in live migration of virtual machines: Clark et al., NSDI 2005.)
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from distributed_llm.common.messages import KVPart
from distributed_llm.common.types import KV_BLOCK, LayerRange
from distributed_llm.common.wording import layers_text
from distributed_llm.worker.kv.cache import KVCache
from distributed_llm.worker.kv.import_room import ImportRoom
from distributed_llm.worker.kv.manifest import KVManifest, KVTransferError
from distributed_llm.worker.kv.segments import KVBuffers, KVLayout, Segment


@dataclass(frozen=True)
class KVPiece:
    """A `KVPart`, which says where it belongs, with its tensors.

    Those of an exporter may be views of its cache: copy them before the next step runs.

    Attributes:
        part: segment, layer, positions.
        keys: [heads, part.count, key_dim].
        values: [heads, part.count, value_dim].
    """

    part: KVPart
    keys: Tensor
    values: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes


class KVExporter:
    """Exports what a cache holds in some layers, in the thread that runs the cache's steps.

    Args:
        cache: to export from; its steps go on.
        held: the layers of the cache.
        layers: the layers to export.

    Raises:
        ValueError: the cache does not have these layers.
    """

    def __init__(self, cache: KVCache, held: LayerRange, layers: LayerRange) -> None:
        if not held.start <= layers.start < layers.stop <= held.stop:
            raise ValueError(f"a cache of {layers_text(held)} has no {layers_text(layers)}")
        self._cache = cache
        self._first = held.start
        inside = range(layers.start - held.start, layers.stop - held.start)
        self._layers = [layer for layer in inside if cache.knows(layer)]
        self._done: dict[int, list[int]] = {}  # exported positions, by segment and layer
        cache.watch(self)

    @property
    def remaining_bytes(self) -> int:
        """Bytes of keys and values that are committed and not exported."""
        total = 0
        for segment, extent in self._cache.extents().items():
            for layer, sent in zip(self._layers, self._done_of(segment), strict=True):
                done = max(sent, self._unseen(segment, layer))
                if done < extent:
                    total += (extent - done) * self._cache.layout(layer).token_bytes
        return total

    def next_chunk(self, max_bytes: int, max_pieces: int) -> list[KVPiece] | None:
        """Return the next pieces, or None if everything is exported. Not to be called in a step.

        Args:
            max_bytes: of all pieces together; exceeded only by a single position of one layer.
            max_pieces: at least one.
        """
        extents = self._cache.extents()
        held = {segment.number for segment in extents}
        self._done = {number: done for number, done in self._done.items() if number in held}
        pieces: list[KVPiece] = []
        room = max_bytes
        for segment, extent in extents.items():
            done = self._done.setdefault(segment.number, self._done_of(segment))
            for index, layer in enumerate(self._layers):
                done[index] = max(done[index], self._unseen(segment, layer))
            if min(done, default=extent) >= extent:
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
        """Export positions from `offset` on again once they are committed."""
        done = self._done.get(segment)
        if done and max(done) > offset:
            self._done[segment] = [min(count, offset) for count in done]

    def _unseen(self, segment: Segment, layer: int) -> int:
        """Return where the positions begin that a layer keeps of a segment."""
        return segment.unseen if self._cache.windows[layer] else 0

    def _done_of(self, segment: Segment) -> list[int]:
        return self._done.get(segment.number) or [0] * len(self._layers)

    def _piece(self, segment: Segment, layer: int, offset: int, count: int) -> KVPiece:
        part = KVPart(
            segment=segment.number,
            layer=self._first + layer,
            offset=offset,
            count=count,
            capacity=segment.capacity,
        )
        cut = self._cache.read(layer, segment, offset, offset + count)
        return KVPiece(part, cut.keys, cut.values)


@dataclass
class _Arrived:
    """One layer of one segment, of which the positions `[first, filled)` have arrived."""

    buffers: KVBuffers
    first: int
    filled: int


class KVImporter:
    """Collects the pieces of one exporter on another worker.

    Args:
        layers: to expect; some may keep no keys and values.
        layouts: of those that keep some, by their numbers in the model.
        room: for the buffers.
        windowed: those of the layers that have a window.

    Attributes:
        layers: as given.
        layouts: as given.
        manifest: what the sender holds, as its latest manifest says; None before the first.
        nbytes: bytes of memory that the buffers take.
    """

    def __init__(
        self,
        layers: LayerRange,
        layouts: Mapping[int, KVLayout],
        room: ImportRoom,
        windowed: Collection[int] = (),
    ) -> None:
        self.manifest: KVManifest | None = None
        self.nbytes = 0
        self.layers = layers
        self.layouts = dict(layouts)
        self._room = room
        self._windowed = windowed
        self._arrived: dict[tuple[int, int], _Arrived] = {}  # by segment and layer

    def add(self, piece: KVPiece) -> None:
        """Keep a piece; forget what had arrived of its segment from its first position on.

        A layer with a window may begin anywhere, and leave a gap: it drops positions meanwhile.
        Then only what follows the gap counts; `assemble` knows what may be missing.

        Raises:
            KVTransferError: the piece is of a layer that is not expected, does not fit the layout,
                leaves a gap after what has arrived of its segment, or exceeds `max_bytes`.
        """
        part = piece.part
        layout = self.layouts.get(part.layer)
        if layout is None:
            raise KVTransferError(f"layer {part.layer} is not among {sorted(self.layouts)}")
        _check_piece(piece, layout)
        arrived = self._arrived.get((part.segment, part.layer))
        filled = arrived.filled if arrived else 0
        least = arrived.buffers.first if arrived else 0
        if part.offset < least or (part.offset > filled and part.layer not in self._windowed):
            raise KVTransferError(
                f"a piece of segment {part.segment} in layer {part.layer} begins at "
                f"{part.offset}, but {filled} positions have arrived"
            )
        if arrived is None or arrived.buffers.room < part.capacity:
            arrived = self._grow(arrived, part, layout)
        if not arrived.first <= part.offset <= arrived.filled:
            arrived.first = part.offset
        arrived.filled = part.offset + part.count
        into = arrived.buffers.cut(part.offset, arrived.filled)
        into.keys.copy_(piece.keys)
        into.values.copy_(piece.values)

    def update(self, manifest: KVManifest) -> None:
        """Set the sender's manifest, and free segments that are not in it.

        Raises:
            KVTransferError: the manifest contradicts itself, or describes more than there is room
                for.
        """
        manifest.check()
        unseen = manifest.unseen()
        needed = sum(
            (segment.capacity - (unseen[segment.number] if layer in self._windowed else 0))
            * layout.token_bytes
            for layer, layout in self.layouts.items()
            for segment in manifest.segments
        )
        self._room.ensure(needed)
        self.manifest = manifest
        held = {segment.number for segment in manifest.segments}
        gone = [key for key in self._arrived if key[0] not in held]
        freed = sum(self._arrived.pop(key).buffers.nbytes for key in gone)
        self._room.give_back(freed)
        self.nbytes -= freed

    def arrived(self, segment: int, layer: int) -> tuple[int, int]:
        """Return the positions of a segment, `[first, stop)`, that have arrived in a layer."""
        arrived = self._arrived.get((segment, layer))
        return (arrived.first, arrived.filled) if arrived else (0, 0)

    def buffers(self, segment: int, layer: int) -> KVBuffers:
        """Return the buffers of a segment in a layer.

        Raises:
            KeyError: nothing of it has arrived.
        """
        return self._arrived[segment, layer].buffers

    def forget(self, layer: int) -> None:
        """Drop what has arrived in a layer; the importer only goes on with the others."""
        self._arrived = {key: one for key, one in self._arrived.items() if key[1] != layer}

    def _grow(self, old: _Arrived | None, part: KVPart, layout: KVLayout) -> _Arrived:
        first = old.first if old else part.offset
        growth = (part.capacity - first) * layout.token_bytes
        growth -= old.buffers.nbytes if old else 0
        self._room.take(growth)
        new = _Arrived(layout.allocate(part.capacity, first), part.offset, part.offset)
        if old is not None:
            new.first, new.filled = old.first, old.filled
            new.buffers.copy_from(old.buffers, old.first, old.filled)
        self.nbytes += growth
        self._arrived[part.segment, part.layer] = new
        return new


def _check_piece(piece: KVPiece, layout: KVLayout) -> None:
    """Refuse a piece that does not fit the layout of its layer.

    Raises:
        KVTransferError: with what was found and what was expected.
    """
    part = piece.part
    actual: tuple[Any, ...] = (
        tuple(piece.keys.shape),
        tuple(piece.values.shape),
        piece.keys.dtype,
        piece.values.dtype,
    )
    expected = (
        (layout.heads, part.count, layout.key_dim),
        (layout.heads, part.count, layout.value_dim),
        layout.dtype,
        layout.dtype,
    )
    if part.count < 1 or actual != expected:
        raise KVTransferError(
            f"a piece of layer {part.layer} has keys and values {actual}; expected are {expected}"
        )
    if part.capacity % KV_BLOCK or part.capacity < part.offset + part.count:
        raise KVTransferError(
            f"a piece of layer {part.layer} has positions from {part.offset} to "
            f"{part.offset + part.count} of a segment with room for {part.capacity}"
        )
