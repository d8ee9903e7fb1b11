"""What the memory of a stage's layers has to do, whichever kind it is, and what both kinds know."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from torch import Tensor

from distributed_llm.worker.kv.manifest import KVManifest
from distributed_llm.worker.kv.segments import KVBuffers, KVLayout, Segment

ArrivedLayers: TypeAlias = Iterable[tuple[int, Mapping[int, KVBuffers | None]]]
"""Layers, and what came of each segment of another worker, by its number."""


class LayerMemory(ABC):
    """Keeps the keys and values of segments, and knows the layouts of layers as they were written.

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

    def learn(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Learn the layout of a layer that is written for the first time.

        Args:
            layer: number of the layer within the stage.
            keys: [heads, ..., head_dim], any of this layer.
            values: [heads, ..., value_dim].
        """
        layout = KVLayout(keys.shape[0], keys.shape[-1], values.shape[-1], keys.dtype, keys.device)
        self._layouts[layer] = layout
        self.bytes_per_token += layout.token_bytes

    @abstractmethod
    def write(self, layer: int, segment: Segment, first: int, keys: Tensor, values: Tensor) -> None:
        """Write positions of a segment from `first` on, counted from its start.

        Args:
            layer: number of the layer within the stage.
            segment: with a capacity for them.
            first: where they begin; those before it stay.
            keys: [heads, positions, head_dim].
            values: [heads, positions, value_dim].
        """

    @abstractmethod
    def write_tokens(
        self, layer: int, places: Sequence[tuple[Segment, int]], keys: Tensor, values: Tensor
    ) -> None:
        """Write one token into each of several segments.

        Args:
            layer: number of the layer within the stage.
            places: segments with a capacity for it, and how far after their starts it belongs.
            keys: [heads, tokens, head_dim].
            values: [heads, tokens, value_dim].
        """

    @abstractmethod
    def read(self, layer: int, segment: Segment, first: int, stop: int) -> KVBuffers:
        """Return positions `[first, stop)` of a segment, counted from its start.

        They are not to be written, and valid until the layer is written.
        """

    @abstractmethod
    def read_chain(self, layer: int, segments: Sequence[Segment], stop: int) -> list[KVBuffers]:
        """Return what a layer keeps of the segments of a sequence, in order, likewise.

        Args:
            layer: number of the layer within the stage.
            segments: of the sequence, in order.
            stop: where it ends, counted from the start of the last one.
        """

    @abstractmethod
    def drop_unseen(self, segment: Segment, before: int) -> None:
        """Free the positions that `segment` counts as unseen, in layers with a window.

        Args:
            segment: whose `unseen` has grown.
            before: what `unseen` was.
        """

    @abstractmethod
    def make_room(
        self, segment: Segment, segments: Collection[Segment], max_bytes: int | None
    ) -> None:
        """Prepare for the capacity of a segment, which may have grown; no step runs.

        Args:
            segment: of these.
            segments: all of the cache.
            max_bytes: that all of them may take, if there is a limit.
        """

    @abstractmethod
    def drop(self, segment: Segment) -> None:
        """Free what nobody reads any more."""

    @abstractmethod
    def adopt(
        self,
        segments: Mapping[int, Segment],
        shared: "SharedLayers | None",
        arrived: ArrivedLayers,
        manifest: KVManifest,
    ) -> None:
        """Fill new segments, which are all of an empty cache; the layers were written before.

        Args:
            segments: by their numbers in the manifest.
            shared: layers of another cache, whose memory is used from now on. Whoever runs the next
                step goes on alone with it.
            arrived: other layers, and what is kept of each segment, which may be used likewise.
            manifest: what the sequences in these segments are.
        """


class SharedLayers(NamedTuple):
    """Layers of another cache.

    Attributes:
        memory: of that cache.
        layers: by their numbers here, their numbers there.
        segments: of that cache, by their numbers.
    """

    memory: LayerMemory
    layers: Mapping[int, int]
    segments: Mapping[int, Segment]
