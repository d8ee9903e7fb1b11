"""What the coordinator tells a worker's operator: a line of the log, now and then. Pure."""

import math

from distributed_llm.worker.session.events import Log

_EVERY_S = 1.0
"""Least seconds between two lines."""

_MAX_CHARS = 1000
"""Characters of a line; the rest is cut off."""


class Notices:
    """Passes notices on to the log: the first at once, and at most one per second after it.

    Of several that come within a second, the latest one is what is so; it replaces the others.
    """

    def __init__(self) -> None:
        self._next_at = -math.inf
        self._held: str | None = None

    def add(self, text: str, now: float) -> list[Log]:
        """Take a notice that came at `now`, clock seconds; return the line that is due."""
        self._held = " ".join(text.split())[:_MAX_CHARS]
        return self.on_timer(now)

    def next_deadline(self) -> float:
        """Return when a notice that is held is due, clock seconds; infinity if there is none."""
        return math.inf if self._held is None else self._next_at

    def on_timer(self, now: float) -> list[Log]:
        """Return the line that is due."""
        if self._held is None or now < self._next_at:
            return []
        text, self._held, self._next_at = self._held, None, now + _EVERY_S
        return [Log(f"the coordinator says: {text}")]
