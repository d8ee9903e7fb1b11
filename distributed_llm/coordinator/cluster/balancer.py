"""Decides whether a pipeline moves to a better plan. Pure.

A plan is changed for a gain that is more than noise, that pays for the move within a horizon, and
that was seen twice, some time apart. Every move makes the next one harder for a while, and a plan
that was left must show twice the gain each time to be taken again: so whatever is measured, even
if it is made to mislead, plans change ever less often and never swing between two. Large changes
pass all of this at once: a machine that became four times slower is worth more than any of it.
"""

import math
from dataclasses import dataclass
from typing import Literal

from distributed_llm.coordinator.plan import LayerMap

_MIN_GAIN = 0.04
_SIGMAS = 2.0
"""A gain counts if it is so many times its uncertainty above the least one."""

_HORIZON_S = 60.0
"""A move has to pay for its standstill within this time."""

_CONFIRM_S = 2.0
"""Between the first and the last of the looks that see a gain."""

_AFTER_A_MOVE = 2.0
"""The gain that is needed right after a move is larger by so many times the usual one, ..."""
_CALM_S = 5.0
"""... and this is halved after each such time."""

_FORGIVEN_S = 120.0
"""After this time a plan has been left once less."""


@dataclass(frozen=True)
class Alternative:
    """A plan that might be moved to.

    Attributes:
        layer_map: of the plan.
        gain: by how much more it gives, as a share of what the plan of now gives.
        uncertainty: standard deviation of `gain`.
        cost_s: how long requests stand still while moving there.
    """

    layer_map: LayerMap
    gain: float
    uncertainty: float
    cost_s: float


@dataclass(frozen=True)
class Verdict:
    """What to do about an offer.

    Attributes:
        what: "move" there, "wait" for it to be confirmed, or "stay".
        why: for people.
    """

    what: Literal["move", "wait", "stay"]
    why: str


class Balancer:
    """Decides for one pipeline."""

    def __init__(self) -> None:
        self._wanted_since: float | None = None
        self._moves = 0.0  # lately, faded
        self._moved_at = 0.0
        self._left: dict[LayerMap, tuple[float, float]] = {}  # how often, faded, and when last

    def consider(self, offer: Alternative, *, now: float) -> Verdict:
        """Look at the best plan that is known of; call it every second or so."""
        needed = self._needed(offer, now)
        if offer.gain < needed:
            self._wanted_since = None
            return Verdict("stay", f"{_percent(offer.gain)} faster; {_percent(needed)} is needed")
        if offer.gain * _HORIZON_S < offer.cost_s:
            self._wanted_since = None
            return Verdict(
                "stay",
                f"{_percent(offer.gain)} faster, but moving stops requests for "
                f"{offer.cost_s:.1f} s, which takes more than {_HORIZON_S:.0f} s to make good",
            )
        if self._wanted_since is None:
            self._wanted_since = now
        if now - self._wanted_since < _CONFIRM_S:
            return Verdict("wait", f"{_percent(offer.gain)} faster, to be confirmed")
        return Verdict("move", f"{_percent(offer.gain)} faster")

    def moved(self, left: LayerMap, *, now: float) -> None:
        """A plan was left for another one."""
        self._moves = self._recent_moves(now) + 1.0
        self._moved_at = now
        self._left[left] = (self._times_left(left, now) + 1.0, now)
        self._left = {plan: at for plan, at in self._left.items() if self._times_left(plan, now)}
        self._wanted_since = None

    def _needed(self, offer: Alternative, now: float) -> float:
        least = _MIN_GAIN + _SIGMAS * offer.uncertainty
        again = math.exp2(self._times_left(offer.layer_map, now))
        return least * again * (1.0 + _AFTER_A_MOVE * self._recent_moves(now))

    def _recent_moves(self, now: float) -> float:
        return self._moves * math.exp2((self._moved_at - now) / _CALM_S)

    def _times_left(self, layer_map: LayerMap, now: float) -> float:
        times, at = self._left.get(layer_map, (0.0, now))
        return max(0.0, times - (now - at) / _FORGIVEN_S)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
