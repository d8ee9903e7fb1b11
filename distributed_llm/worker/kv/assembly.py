"""Makes the KV cache of a new layer range of what this worker held and what others sent.

The sources may differ by what a step left that was abandoned between their stages, in the lengths
of sequences and even in where their segments begin. What all of them hold of a sequence, token for
token, is held afterwards; a task that needs more is answered with what is missing. Segments are as
in the first source: shared ones once, as long as they were.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

from distributed_llm.common.types import LayerRange
from distributed_llm.worker.kv.cache import KVCache
from distributed_llm.worker.kv.manifest import (
    Extent,
    KVManifest,
    KVTransferError,
    ManifestSegment,
    spans,
)
from distributed_llm.worker.kv.segments import KVBuffers, KVLayout
from distributed_llm.worker.kv.transfer import KVImporter

_MAX_NAMED = 3


@dataclass(frozen=True)
class MissingKV:
    """Positions `[start, stop)` of a sequence in one layer of the model."""

    sequence_id: int
    layer: int
    start: int
    stop: int

    def __str__(self) -> str:
        return (
            f"positions {self.start} to {self.stop} of sequence {self.sequence_id} in layer "
            f"{self.layer}"
        )


class KVIncomplete(KVTransferError):
    """Not all that was to be taken over has arrived. Nothing was touched.

    Args:
        missing: what, by segment and layer.
    """

    def __init__(self, missing: tuple[MissingKV, ...]) -> None:
        named = ", ".join(map(str, missing[:_MAX_NAMED]))
        more = len(missing) - _MAX_NAMED
        super().__init__(
            f"the KV cache that arrived lacks {named}" + (f" and {more} more" if more > 0 else "")
        )
        self.missing = missing


def assemble(
    cache: KVCache,
    layers: LayerRange,
    own: tuple[KVCache, LayerRange] | None,
    imports: Sequence[KVImporter],
) -> None:
    """Fill an empty cache of `layers`. No step runs meanwhile.

    Args:
        own: what this worker held so far, and the layers of that. What it has of `layers` is
            referenced, not copied, and it is not changed: until one of the two caches runs a step,
            either may go on. After that the other must not.
        imports: with the manifests that their senders sent last; they are used up.

    Raises:
        KVIncomplete: not all has arrived of what a sender's manifest tells.
        KVTransferError: there is no source for one of the layers, or a sender told nothing.
        ValueError: the cache is not empty.
    """
    mine = _buffers_of(own, layers)
    imported = {layer: source for source in imports for layer in source.layers if layer not in mine}
    used = list(dict.fromkeys(imported.values()))
    manifests = [own[0].manifest()] if own and mine else []
    manifests += [_manifest_of(source) for source in used]
    if not manifests:
        return
    manifest = reduce(KVManifest.common_with, manifests)
    numbers = range(layers.start, layers.stop)
    orphans = [layer for layer in numbers if layer not in mine and layer not in imported]
    if orphans and manifest.sequences:
        raise KVTransferError(f"nobody sent the KV cache of layers {orphans}")
    sources = {source: _Source(source, manifest) for source in used}
    missing = [gap for layer, source in imported.items() for gap in sources[source].missing(layer)]
    if missing:
        raise KVIncomplete(tuple(missing))

    def buffer(segment: ManifestSegment, layer: int) -> KVBuffers | None:
        if layer in mine:
            return mine[layer][segment.number]
        layout = cache.layout(layer - layers.start)
        return sources[imported[layer]].take(segment, layer, layout)

    cache.restore(
        manifest,
        {s.number: [buffer(s, layer) for layer in numbers] for s in manifest.segments},
    )


def _manifest_of(source: KVImporter) -> KVManifest:
    if source.manifest is None:
        raise KVTransferError(
            f"the sender of layers {list(source.layers)} did not tell what it has"
        )
    return source.manifest


def _buffers_of(
    own: tuple[KVCache, LayerRange] | None, layers: LayerRange
) -> dict[int, dict[int, KVBuffers | None]]:
    """Return what is held of `layers`, by layer of the model and number of the segment."""
    if own is None:
        return {}
    cache, held = own
    segments = list(cache.extents())
    return {
        layer: {segment.number: segment.layers[layer - held.start] for segment in segments}
        for layer in range(max(layers.start, held.start), min(layers.stop, held.stop))
    }


@dataclass(frozen=True)
class _Part:
    """Positions of a sequence from `position` on, in a segment of the sender."""

    segment: int
    offset: int
    count: int
    position: int


class _Source:
    """What one importer gives for the segments of a manifest, in which its own may begin elsewhere.

    A position of a sequence has the same keys and values wherever it lies, so it is looked for by
    the sequence.
    """

    def __init__(self, importer: KVImporter, manifest: KVManifest) -> None:
        self._importer = importer
        self._extents = manifest.extents()
        chains = _manifest_of(importer).chains()
        self._parts = {
            number: list(_parts(extent, chains[extent.sequence_id]))
            for number, extent in self._extents.items()
        }
        self._taken: set[tuple[int, int]] = set()

    def missing(self, layer: int) -> Iterator[MissingKV]:
        """Yield what has not arrived."""
        for number, parts in self._parts.items():
            for part in parts:
                filled = self._importer.filled(part.segment, layer) - part.offset
                if filled < part.count:
                    yield MissingKV(
                        self._extents[number].sequence_id,
                        layer,
                        part.position + max(0, filled),
                        part.position + part.count,
                    )

    def take(self, segment: ManifestSegment, layer: int, layout: KVLayout) -> KVBuffers | None:
        """Return buffers of the segment's capacity; None if none of its positions count.

        They are those of the importer where they fit, so no more than one segment may have them.
        """
        parts = self._parts[segment.number]
        if not parts:
            return None
        arrived = self._importer.buffer(parts[0].segment, layer)
        key = (parts[0].segment, layer)
        fits = arrived.keys.shape[1] == segment.capacity and parts[0].offset == 0
        if len(parts) == 1 and fits and key not in self._taken:
            self._taken.add(key)
            return arrived
        return self._copied(parts, layer, layout.allocate(segment.capacity))

    def _copied(self, parts: Sequence[_Part], layer: int, made: KVBuffers) -> KVBuffers:
        first = 0
        for part in parts:
            held = self._importer.buffer(part.segment, layer)
            theirs = slice(part.offset, part.offset + part.count)
            mine = slice(first, first + part.count)
            made.keys[:, mine] = held.keys[:, theirs]
            made.values[:, mine] = held.values[:, theirs]
            first += part.count
        return made


def _parts(extent: Extent, chain: tuple[ManifestSegment, ...]) -> Iterator[_Part]:
    for segment, stop in spans(chain, extent.stop):
        start = max(segment.start, extent.start)
        if start < stop:
            yield _Part(segment.number, start - segment.start, stop - start, start)
