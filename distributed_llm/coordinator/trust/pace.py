"""Counts the messages of each peer in a second, so that none takes all of the time. Pure."""

from distributed_llm.common.types import PeerId

MOST_PER_S = 5000
"""Messages of one peer in a second that are handled.

Signs of life come once per `heartbeat_interval_s`. Who asks again as soon as it has its answer, in
a loop, comes to a fifth of this. What may come faster is not counted: requests, which are answered
one by one, and results of steps, of which none comes that was not asked for.
"""


class Pace:
    """Counts messages by peer, in seconds that begin with a message."""

    def __init__(self) -> None:
        self._counts: dict[PeerId, int] = {}  # in this second
        self._ends_at = 0.0

    def count(self, peer: PeerId, *, now: float) -> int:
        """Count a message; return which one of its peer in this second it is.

        Args:
            now: clock seconds.
        """
        if now >= self._ends_at:
            self._ends_at = now + 1.0
            self._counts.clear()
        number = self._counts[peer] = self._counts.get(peer, 0) + 1
        return number
