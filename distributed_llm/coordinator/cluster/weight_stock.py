"""Which weights a worker has on its disk, and how fast others come. Pure."""

from dataclasses import dataclass, field

from distributed_llm.common.messages import FetchProgress, StageReady
from distributed_llm.common.types import LayerRange

_LEAST_FETCHED_BYTES = 16 << 20
"""Bytes below which a fetch is too short to learn the speed of a link from."""

_FETCH_BYTES_PER_S = 100e6
"""Expected speed of weights from other machines before any was measured: a gigabit network."""


@dataclass
class WeightStock:
    """The weights that one worker has on its disk.

    A worker that has never fetched any reads its own copy of the model, with all layers.

    Attributes:
        fetches: whether it gets weights from other machines.
        layers: whose weights it got so.
        bytes_per_s: at which they came last.
        progress: of those that it is fetching now; None if it fetches none.
    """

    fetches: bool = False
    layers: set[int] = field(default_factory=set)
    bytes_per_s: float = _FETCH_BYTES_PER_S
    progress: FetchProgress | None = None

    def loaded(self, layers: LayerRange, ready: StageReady) -> None:
        """Learn from a load of these layers."""
        self.progress = None
        if not ready.gives_weights:
            return
        self.fetches = True
        self.layers.update(range(layers.start, layers.stop))
        if ready.fetched_bytes >= _LEAST_FETCHED_BYTES and ready.fetch_s:
            self.bytes_per_s = max(1.0, ready.fetched_bytes / ready.fetch_s)

    def fetch_s(self, added_bytes: int, before: LayerRange | None, after: LayerRange) -> float:
        """Return how long fetching what a load needs is expected to take.

        Args:
            added_bytes: of weights that the load reads.
            before: layers that the worker has in memory.
            after: layers that it is to have.
        """
        if not self.fetches:
            return 0.0
        held = range(before.start, before.stop) if before else range(0)
        added = [layer for layer in range(after.start, after.stop) if layer not in held]
        missing = [layer for layer in added if layer not in self.layers]
        share = len(missing) / len(added) if added else 0.0
        return share * added_bytes / self.bytes_per_s

    @property
    def ranges(self) -> tuple[LayerRange, ...]:
        """The layers whose weights it can give, as few ranges as possible."""
        ranges: list[LayerRange] = []
        for layer in sorted(self.layers):
            if ranges and ranges[-1].stop == layer:
                ranges[-1] = LayerRange(ranges[-1].start, layer + 1)
            else:
                ranges.append(LayerRange(layer, layer + 1))
        return tuple(ranges)
