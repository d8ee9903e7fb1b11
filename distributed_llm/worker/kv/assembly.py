"""Assembles the KV cache of a new layer range from the old stage's cache and from imports.

An abandoned step may have reached some stages and not others. So the sources may differ in the
length of a sequence, and even in where its segments begin. The new cache holds, of each sequence,
the tokens that all sources have in common; a task that needs more is answered with what is missing.
Its segments are those of the first source, so shared ones stay shared.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

from distributed_llm.common.types import LayerRange, SequenceId
from distributed_llm.common.wording import layers_text
from distributed_llm.worker.kv.cache import KVCache
from distributed_llm.worker.kv.layer_memory import ArrivedLayers
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
    """Positions `[start, stop)` of a sequence that have not arrived in one layer of the model."""

    sequence_id: SequenceId
    layer: int
    start: int
    stop: int

    def __str__(self) -> str:
        return (
            f"positions {self.start} to {self.stop} of sequence {self.sequence_id} in layer "
            f"{self.layer}"
        )


class KVIncomplete(KVTransferError):
    """Positions that the manifests name have not arrived. No cache was changed.

    Args:
        missing: by segment and layer.

    Attributes:
        missing: as given.
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
    beside: Callable[[Mapping[SequenceId, int]], None] = lambda lengths: None,
) -> None:
    """Fill an empty cache, while no step runs.

    Args:
        cache: to fill.
        layers: of `cache`.
        own: the cache that this worker used so far, and its layers. Its buffers are shared, not
            copied. Either of the two caches may run the next step; the other one must not be used
            after that.
        imports: of the layers that `own` lacks, with their senders' manifests; must not be used
            after success.
        beside: called with how many positions the cache will hold of each sequence, before anything
            changes; what it raises, this raises.

    Raises:
        KVIncomplete: positions that a sender's manifest names have not arrived.
        KVTransferError: one of the layers has no source, a sender sent no manifest, or keeps keys
            and values in another way than `cache`.
        ValueError: the cache is not empty.
    """
    if cache.sequence_ids:
        raise ValueError("the KV cache is not empty")
    mine = _numbers_in_both(own[1], layers) if own else range(0)
    imported = {n: each for each in imports for n in _numbers(each.layers) if n not in mine}
    used = list(dict.fromkeys(imported.values()))
    manifests = [own[0].manifest()] if own and mine else []
    manifests += [_manifest_of(source) for source in used]
    if not manifests:
        return
    for one in manifests:
        if one.kv_dtype != cache.kv_dtype:
            raise KVTransferError(
                f"the KV cache that arrived is kept as {one.kv_dtype}, but this one as "
                f"{cache.kv_dtype}"
            )
    manifest = reduce(KVManifest.common_with, manifests)
    numbers = _numbers(layers)
    kept = [layer for layer in numbers if cache.knows(layer - layers.start)]
    orphans = [layer for layer in kept if layer not in mine and layer not in imported]
    if orphans and manifest.sequences:
        raise KVTransferError(f"nobody sent the KV cache of layers {orphans}")
    windowed = {layer for layer in numbers if cache.windows[layer - layers.start]}
    sources = {source: _Source(source, manifest, windowed) for source in used}
    arriving = [(layer, source) for layer, source in imported.items() if layer in kept]
    missing = [gap for layer, source in arriving for gap in sources[source].missing(layer)]
    if missing:
        raise KVIncomplete(tuple(missing))

    def arrived() -> ArrivedLayers:
        for layer, source in arriving:
            place = layer - layers.start
            layout, found = cache.layout(place), sources[source]
            yield place, {s.number: found.buffers(s, layer, layout) for s in manifest.segments}
            source.forget(layer)  # where it was copied there is no room for both

    beside({sequence.sequence_id: sequence.length for sequence in manifest.sequences})
    shared = None
    if own and mine:
        shared = own[0], {n - layers.start: n - own[1].start for n in mine}
    cache.restore(manifest, shared, arrived())


def _numbers(layers: LayerRange) -> range:
    return range(layers.start, layers.stop)


def _manifest_of(source: KVImporter) -> KVManifest:
    if source.manifest is None:
        raise KVTransferError(f"the sender of {layers_text(source.layers)} has sent no manifest")
    return source.manifest


def _numbers_in_both(one: LayerRange, other: LayerRange) -> range:
    return range(max(one.start, other.start), min(one.stop, other.stop))


@dataclass(frozen=True)
class _SourceRange:
    """Consecutive positions of a sequence, and where they are in a segment of the sender.

    Attributes:
        segment: its number at the sender.
        offset: of the first position in that segment.
        count: number of positions.
        position: the first position in the sequence.
    """

    segment: int
    offset: int
    count: int
    position: int


class _Source:
    """Finds the positions of a manifest's segments in one importer, whose segments may differ.

    Keys and values of a position depend on the sequence alone, not on the segment they are in. So
    positions are looked up by sequence.
    """

    def __init__(
        self, importer: KVImporter, manifest: KVManifest, windowed: Collection[int]
    ) -> None:
        self._importer = importer
        self._windowed = windowed
        self._extents = manifest.extents()
        chains = _manifest_of(importer).chains()
        unseen = manifest.unseen()
        self._parts = {
            number: list(_parts(extent, extent.start, chains[extent.sequence_id]))
            for number, extent in self._extents.items()
        }
        self._seen = {
            number: list(_parts(extent, extent.start + unseen[number], chains[extent.sequence_id]))
            for number, extent in self._extents.items()
        }
        self._taken: set[tuple[int, int]] = set()

    def _parts_in(self, layer: int) -> dict[int, list[_SourceRange]]:
        """Return what `layer` needs of each segment."""
        return self._seen if layer in self._windowed else self._parts

    def missing(self, layer: int) -> Iterator[MissingKV]:
        """Yield the positions that have not arrived in `layer`."""
        for number, parts in self._parts_in(layer).items():
            for part in parts:
                first, stop = self._importer.arrived(part.segment, layer)
                filled = stop - part.offset if first <= part.offset else 0
                if filled < part.count:
                    yield MissingKV(
                        self._extents[number].sequence_id,
                        layer,
                        part.position + max(0, filled),
                        part.position + part.count,
                    )

    def buffers(self, segment: ManifestSegment, layer: int, layout: KVLayout) -> KVBuffers | None:
        """Return buffers with the segment's positions, or None if none of them count.

        The importer's own buffers are returned where they fit, each of them only once; else a copy.
        """
        parts = self._parts_in(layer)[segment.number]
        if not parts:
            return None
        arrived = self._importer.buffers(parts[0].segment, layer)
        key = (parts[0].segment, layer)
        begins = parts[0].position - parts[0].offset == segment.start
        fits = arrived.room == segment.capacity and begins
        if len(parts) == 1 and fits and key not in self._taken:
            self._taken.add(key)
            return arrived
        first = parts[0].position - segment.start
        return self._copied(parts, layer, layout.allocate(segment.capacity, first))

    def _copied(self, parts: Sequence[_SourceRange], layer: int, made: KVBuffers) -> KVBuffers:
        first = 0
        for part in parts:
            held = self._importer.buffers(part.segment, layer)
            theirs = held.cut(part.offset, part.offset + part.count)
            mine = slice(first, first + part.count)
            made.keys[:, mine] = theirs.keys
            made.values[:, mine] = theirs.values
            first += part.count
        return made


def _parts(
    extent: Extent, first: int, chain: tuple[ManifestSegment, ...]
) -> Iterator[_SourceRange]:
    """Yield where the positions of `extent` are from `first` on."""
    for segment, stop in spans(chain, extent.stop):
        start = max(segment.start, first)
        if start < stop:
            yield _SourceRange(segment.number, start - segment.start, stop - start, start)
