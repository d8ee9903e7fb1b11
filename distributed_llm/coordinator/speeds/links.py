"""Link speeds: how fast activations get from worker to worker, as measured. Pure."""

from collections.abc import Iterable
from statistics import median

from distributed_llm.common.types import WorkerId
from distributed_llm.coordinator.partition.tables import Hop, Links

_LATENCY_S = 0.0005
"""Assumed latency before any link was measured, one way: that of a local network."""

_BYTES_PER_S = 100e6
"""Assumed bandwidth before any link was measured: 1 Gbit/s, less what protocols take."""


class LinkSpeeds:
    """Latency and bandwidth of the links between workers.

    Args:
        bytes_per_token: size of the activations of one token on the wire.
    """

    def __init__(self, bytes_per_token: int) -> None:
        self._bytes_per_token = bytes_per_token
        self._measured: dict[tuple[WorkerId, WorkerId], tuple[float, float]] = {}

    def observe(
        self, sender: WorkerId, receiver: WorkerId, *, rtt_s: float, bytes_per_s: float
    ) -> None:
        """Store what `sender` measured of its link to `receiver`; the latest counts.

        Args:
            sender: of activations.
            receiver: of activations.
            rtt_s: round-trip time of a small message.
            bytes_per_s: bandwidth.
        """
        self._measured[sender, receiver] = (rtt_s / 2, bytes_per_s)

    def measured(self, sender: WorkerId, receiver: WorkerId) -> tuple[float, float] | None:
        """Return latency, one way, and bandwidth of a link; None if it was not measured."""
        return self._measured.get((sender, receiver))

    def bound(self, hops: Iterable[tuple[WorkerId, WorkerId]], seconds: float) -> float:
        """Lower latencies so that they do not exceed what a step showed; return their sum.

        A busy worker measures too long a round trip. The time of a step outside of its stages is an
        upper bound for all of its hops together.

        Args:
            hops: (sender, receiver) of each hop of the step.
            seconds: time of the step outside of its stages.
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
        """Forget the links of a worker that is gone."""
        gone = [pair for pair in self._measured if worker in pair]
        for pair in gone:
            del self._measured[pair]

    @property
    def latency_s(self) -> float:
        """Median latency of the measured links, one way."""
        return median(latency for latency, _ in self._measured.values() or [(_LATENCY_S, 0.0)])

    @property
    def bytes_per_s(self) -> float:
        """Median bandwidth of the measured links."""
        return median(rate for _, rate in self._measured.values() or [(0.0, _BYTES_PER_S)])

    def links(self, tokens: float) -> Links:
        """Return the hops for the activations of `tokens` tokens.

        A link that was not measured is expected to have the median latency and bandwidth.
        """
        known = {pair: self._hop(tokens, *link) for pair, link in self._measured.items()}
        return Links(self._hop(tokens, self.latency_s, self.bytes_per_s), known)

    def snapshot(self) -> "LinkSpeeds":
        """Return a copy that does not change."""
        copied = LinkSpeeds(self._bytes_per_token)
        copied._measured = dict(self._measured)
        return copied

    def _hop(self, tokens: float, latency_s: float, bytes_per_s: float) -> Hop:
        return Hop(latency_s, tokens * self._bytes_per_token / bytes_per_s)
