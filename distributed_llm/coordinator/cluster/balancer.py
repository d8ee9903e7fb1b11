"""Decides whether a pipeline moves to a better layer map. Pure.

It moves for a gain that is more than noise, that pays for the move within a horizon, and that is
seen for a while. Every move makes the next one harder for some time, and a layer map that was left
must show twice the gain each time to be taken again: so whatever is measured, even if it is made to
mislead, layer maps change ever less often and never swing between two. Large changes pass all of
this at once: a machine that became four times slower is worth more than any of it.
"""

import math
from dataclasses import dataclass
from typing import Literal

from distributed_llm.common.wording import faster_text
from distributed_llm.coordinator.plan import LayerMap

_MIN_GAIN = 0.04
"""Least gain that counts, as a share of the rate of now."""

_SIGMAS = 2.0
"""Standard deviations by which a gain must exceed the least one."""

_HORIZON_S = 60.0
"""Seconds within which a move must make good its standstill."""

_CONFIRM_S = 2.0
"""Seconds for which every look must see enough gain before a move."""

_AFTER_A_MOVE = 2.0
"""What a move just now adds to the needed gain, as a multiple of the usual one."""

_CALM_S = 5.0
"""Seconds after which only half of that is added."""

_FORGIVEN_S = 120.0
"""Seconds after which a layer map counts as left one time less."""


@dataclass(frozen=True)
class Alternative:
    """A layer map that the pipeline might move to.

    Attributes:
        layer_map: the layer map.
        gain: by how much its rate exceeds that of the served one, as a share of the latter.
        uncertainty: standard deviation of `gain`.
        standstill_s: how long requests stand still while moving there.
        measured: whether the gain is for what clients ask now, not for what they may ask some day.
    """

    layer_map: LayerMap
    gain: float
    uncertainty: float
    standstill_s: float
    measured: bool


@dataclass(frozen=True)
class Verdict:
    """What to do about an alternative.

    Attributes:
        what: "move" there, "wait" for the gain to be confirmed, or "stay".
        why: for people.
    """

    what: Literal["move", "wait", "stay"]
    why: str


class Balancer:
    """Decides for one pipeline, and for those that take its place by moves."""

    def __init__(self) -> None:
        self._wanted_since: float | None = None  # first look in a row that saw enough gain
        self._moves = 0.0  # recent moves, faded since `_moved_at`
        self._moved_at = 0.0
        self._left: dict[LayerMap, tuple[float, float]] = {}  # times left, faded; last time

    def consider(self, alternative: Alternative, *, now: float) -> Verdict:
        """Return what to do about the best layer map known; call it every second or so."""
        needed = self._needed(alternative, now)
        faster = faster_text(alternative.gain)
        if alternative.gain < needed:
            self._wanted_since = None
            return Verdict("stay", f"{faster}; {100 * needed:.0f} % are needed")
        if alternative.gain * _HORIZON_S < alternative.standstill_s:
            self._wanted_since = None
            return Verdict(
                "stay",
                f"{faster}, but moving stops requests for {alternative.standstill_s:.1f} s, which "
                f"takes more than {_HORIZON_S:.0f} s to make good",
            )
        if self._wanted_since is None:
            self._wanted_since = now
        if now - self._wanted_since < _CONFIRM_S:
            return Verdict("wait", f"{faster}, to be confirmed")
        why = f"this is {faster}" if alternative.measured else f"this should be {faster} under load"
        return Verdict("move", why)

    def moved(self, left: LayerMap, *, now: float) -> None:
        """Record that a move away from a layer map begins; one that is undone counts too."""
        self._moves = self._recent_moves(now) + 1.0
        self._moved_at = now
        self._left[left] = (self._times_left(left, now) + 1.0, now)
        self._left = {
            layer_map: times_and_last
            for layer_map, times_and_last in self._left.items()
            if self._times_left(layer_map, now)
        }
        self._wanted_since = None

    def _needed(self, alternative: Alternative, now: float) -> float:
        least = _MIN_GAIN + _SIGMAS * alternative.uncertainty
        again = math.exp2(self._times_left(alternative.layer_map, now))
        return least * again * (1.0 + _AFTER_A_MOVE * self._recent_moves(now))

    def _recent_moves(self, now: float) -> float:
        return self._moves * math.exp2((self._moved_at - now) / _CALM_S)

    def _times_left(self, layer_map: LayerMap, now: float) -> float:
        times, at = self._left.get(layer_map, (0.0, now))
        return max(0.0, times - (now - at) / _FORGIVEN_S)
