"""What it takes to hand activations from worker to worker, as far as it was measured. Pure."""

from statistics import median

from distributed_llm.common.types import WorkerId
from distributed_llm.coordinator.partition_tables import Hop, Links

_LATENCY_S = 0.0005
_BYTES_PER_S = 100e6
"""Of a link while none was measured: a local network of a gigabit per second."""


class Network:
    """The links between workers.

    Args:
        bytes_per_token: of activations, as they are handed on.
    """

    def __init__(self, bytes_per_token: int) -> None:
        self._bytes_per_token = bytes_per_token
        self._measured: dict[tuple[WorkerId, WorkerId], tuple[float, float]] = {}

    def observe(
        self, sender: WorkerId, receiver: WorkerId, *, rtt_s: float, bytes_per_s: float
    ) -> None:
        """Take what a worker measured of its link to another; the latest counts.

        Args:
            rtt_s: of a small message there and back.
            bytes_per_s: of a large one.
        """
        self._measured[sender, receiver] = (rtt_s / 2, bytes_per_s)

    def forget(self, worker: WorkerId) -> None:
        """A worker is gone."""
        gone = [pair for pair in self._measured if worker in pair]
        for pair in gone:
            del self._measured[pair]

    def links(self, tokens: float) -> Links:
        """Return what the activations of so many tokens take on each link.

        One that was not measured is expected to be as the others are.
        """
        known = {pair: self._hop(tokens, *found) for pair, found in self._measured.items()}
        latency_s, bytes_per_s = _LATENCY_S, _BYTES_PER_S
        if self._measured:
            latency_s = median(latency for latency, _ in self._measured.values())
            bytes_per_s = median(rate for _, rate in self._measured.values())
        return Links(self._hop(tokens, latency_s, bytes_per_s), known)

    def _hop(self, tokens: float, latency_s: float, bytes_per_s: float) -> Hop:
        return Hop(latency_s, tokens * self._bytes_per_token / bytes_per_s)
