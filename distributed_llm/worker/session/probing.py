"""When an idle worker measures its machine again. Pure.

It does so every ten seconds, because no task would show that it has become faster; and at once when
it loses its layers, to have something to compare with.
"""

from distributed_llm.worker.session.events import Probe

_EVERY_S = 10.0


class Probing:
    """The probes of a worker in one session; asked only while it has no layers.

    Args:
        session: its number.
        now: clock seconds.
    """

    def __init__(self, session: int, *, now: float) -> None:
        self._session = session
        self._due_at = now + _EVERY_S

    def lost_layers(self, now: float) -> None:
        """Have the next probe made at once, as the worker has no layers any more."""
        self._due_at = now

    def next_deadline(self) -> float:
        """Return when the next probe is due, clock seconds."""
        return self._due_at

    def on_timer(self, now: float) -> list[Probe]:
        """Return the probe that is due."""
        if now < self._due_at:
            return []
        self._due_at = now + _EVERY_S
        return [Probe(self._session)]
