"""The routes of the steps of one pipeline: where stages pass them on directly, and where not. Pure.

A stage passes a step on to the next one over a link, where one is up, and through the coordinator
where none is. A step uses a link only if all that are in flight do: it would overtake one that is
relayed there.

The first time that a step may be lost, it is not known which worker has it. From then on steps pass
through the coordinator at every hop, so that this is known the second time. If steps do end, a link
may be losing what it is given: links are used again after a number of steps, which doubles each
time.
"""

from collections.abc import Collection

Route = tuple[bool, ...]
"""For each hop from one stage to the next, whether a step passes it directly."""

_RELAY_STEPS = 64
"""Steps that are relayed at every hop after the first that may have been lost."""

_MAX_RELAY_STEPS = 1 << 20
"""Most steps that are relayed at every hop after a later one, as the number doubles each time."""


class Routes:
    """Chooses the routes of steps.

    Args:
        num_hops: from one stage to the next.
    """

    def __init__(self, num_hops: int) -> None:
        self._linked = [False] * num_hops
        self._suspected = False
        self._relay_steps = 0  # number of next steps that are relayed at every hop
        self._next_relay_steps = _RELAY_STEPS

    @property
    def suspected(self) -> bool:
        """Whether a step may have been lost, and none has ended since."""
        return self._suspected

    @property
    def relays_all(self) -> bool:
        """Whether the next step is relayed at every hop, whatever links are up."""
        return self._relay_steps > 0

    def set_link(self, hop: int, up: bool) -> bool:
        """Record whether there is a link at a hop; return whether there was one until now."""
        broken = self._linked[hop] and not up
        self._linked[hop] = up
        return broken

    def choose(self, in_flight: Collection[Route]) -> Route:
        """Return the route of a step that begins now.

        Args:
            in_flight: routes of the steps in flight.
        """
        return tuple(
            linked and not self.relays_all and all(route[hop] for route in in_flight)
            for hop, linked in enumerate(self._linked)
        )

    def may_overtake(self, in_flight: Collection[Route]) -> bool:
        """Return whether a step on the links that are up would overtake one of these."""
        return not self.relays_all and any(
            linked and not direct
            for route in in_flight
            for linked, direct in zip(self._linked, route, strict=True)
        )

    def suspect(self) -> None:
        """Relay the next steps at every hop, as one may have been lost."""
        self._suspected = True
        self._relay_steps = self._next_relay_steps
        self._next_relay_steps = min(2 * self._relay_steps, _MAX_RELAY_STEPS)

    def step_ended(self) -> None:
        """Count a step that has come through all stages."""
        self._suspected = False
        self._relay_steps = max(0, self._relay_steps - 1)
