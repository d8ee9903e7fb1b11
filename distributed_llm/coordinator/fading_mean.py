"""A mean of what was observed lately. Pure.

What both models of speed share: the one that plans (`speeds`) and the one that chooses how many
steps are in flight (`serving.depth_estimator`).
"""

MAX_WEIGHT = 64.0
"""Upper bound of the weight of the past, in observations: a change is followed within about 64."""

OUTLIER = 3.0
"""An observation counts as at most this many times the value expected of it."""


def fade(elapsed_s: float, half_life_s: float) -> float:
    """Return the share of its weight that an observation of `elapsed_s` ago still has."""
    return float(0.5 ** (elapsed_s / half_life_s))


class FadingMean:
    """A mean whose older observations count less and less. Outliers upwards are cut off.

    Attributes:
        value: None before the first observation.
    """

    def __init__(self, half_life_s: float) -> None:
        self._half_life_s = half_life_s
        self._weight = 0.0
        self._at = 0.0
        self.value: float | None = None

    def add(self, value: float, now: float) -> None:
        """Take an observation; more than `OUTLIER` times the mean counts as that much."""
        past = self._weight * fade(now - self._at, self._half_life_s)
        if self.value is not None:
            value = min(value, OUTLIER * self.value) if self.value else value
            value = (past * self.value + value) / (past + 1)
        self.value, self._weight, self._at = value, min(past + 1, MAX_WEIGHT), now
