"""What it takes to hand activations from worker to worker, as far as it was measured. Pure."""

from collections.abc import Iterable
from statistics import median

from distributed_llm.common.types import WorkerId
from distributed_llm.coordinator.partition.tables import Hop, Links

_LATENCY_S = 0.0005
_BYTES_PER_S = 100e6
"""Of a link while none was measured: a local network of a gigabit per second."""


class LinkSpeeds:
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

    def bound(self, hops: Iterable[tuple[WorkerId, WorkerId]], seconds: float) -> float:
        """A step was on its way over these hops for so long: they take no longer than that.

        What a worker measures while it is busy is too long. Returns what the hops take by now.
        """
        known = [pair for pair in hops if pair in self._measured]
        total_s = sum(self._measured[pair][0] for pair in known)
        if total_s <= seconds:
            return total_s
        for pair in known:
            latency_s, bytes_per_s = self._measured[pair]
            self._measured[pair] = (latency_s * seconds / total_s, bytes_per_s)
        return seconds

    def forget(self, worker: WorkerId) -> None:
        """A worker is gone."""
        gone = [pair for pair in self._measured if worker in pair]
        for pair in gone:
            del self._measured[pair]

    @property
    def latency_s(self) -> float:
        """Seconds from one end of a link to the other, the median of those that were measured."""
        return median(latency for latency, _ in self._measured.values() or [(_LATENCY_S, 0.0)])

    @property
    def bytes_per_s(self) -> float:
        """What a link carries, the median of those that were measured."""
        return median(rate for _, rate in self._measured.values() or [(0.0, _BYTES_PER_S)])

    def links(self, tokens: float) -> Links:
        """Return what the activations of so many tokens take on each link.

        One that was not measured is expected to be as the others are.
        """
        known = {pair: self._hop(tokens, *found) for pair, found in self._measured.items()}
        return Links(self._hop(tokens, self.latency_s, self.bytes_per_s), known)

    def snapshot(self) -> "LinkSpeeds":
        """Return what is known now; it does not change when that does."""
        copied = LinkSpeeds(self._bytes_per_token)
        copied._measured = dict(self._measured)
        return copied

    def _hop(self, tokens: float, latency_s: float, bytes_per_s: float) -> Hop:
        return Hop(latency_s, tokens * self._bytes_per_token / bytes_per_s)
