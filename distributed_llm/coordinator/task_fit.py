"""Seconds for a work, followed as they change: base + per token + per position. Pure.

A Kalman filter over the three, which is recursive least squares with a choice of what is forgotten:
how fast the machine is may change (somebody else uses it), so that is soon forgotten; how its time
grows with the size of a step is a matter of its hardware and hardly is. So slopes once learnt stay
known while all steps have one size, where forgetting everything alike would lose them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import median

_NOISE = 0.12
"""Standard deviation of a task's time, of its mean; that of a uniform +-20 % is 0.115."""

_NOISE_OF_TRIALS = 0.04
"""That of a trial, which is a median."""

_ANY_SHAPE = 100.0
"""Variance of the coefficients before trials, over that of a prior."""

_WINDOW = 32.0
"""Tasks that a speed is the mean of if they come fast; fewer if time passes between them."""

_SHAPE_LOSS = 1e-5
"""Share of what is known of the shape that is forgotten with every task."""

_TRUST = (0.7, 0.7, 2.0)
"""Standard deviation of the coefficients of a prior, of themselves (attention is far from its
limit in many ways) ..."""

_UNKNOWN = (0.0, 0.03, 0.0)
"""... and of the base, since a token costs more than arithmetic."""

_ANY_SCALE = 100.0
"""Variance of a prior's scale before anything is measured."""

_LIMIT = 2.0
"""A task counts at most as if it were so many standard deviations off."""

_SUSPECT = 6.0
"""By a factor of 1 + so many standard deviations off, a task may show a change. That is 1.72 at
least; a noise of +-20 % can differ from itself by 1.2 / 0.8 = 1.5."""

_IN_A_ROW = 4
"""Suspect tasks one after another, all slow or all fast, that show a change."""


LEAST_S = 1e-9
"""No task takes less, so that there are ratios of times."""


@dataclass(frozen=True)
class Work:
    """What a step computes.

    Attributes:
        positions: that its tokens attend to, summed over the tokens.
    """

    tokens: float
    positions: float


Coefficients = tuple[float, float, float]  # seconds: base, per token, per position
_Covariance = tuple[float, float, float, float, float, float]  # of these: 00, 01, 02, 11, 12, 22
_State = tuple[Coefficients, _Covariance]


class Fit:
    """Seconds for a work: base + per token + per position, none negative.

    A Kalman filter over the three. Between two tasks they wander together (the machine gets slower
    or faster: noise along the coefficients themselves) and a little each by itself.

    Attributes:
        measured: anything was added.
        latest: the work added last.
        changed: the task added last showed that the speed is another from now on.
    """

    def __init__(self, prior: Coefficients, half_life_s: float) -> None:
        base = max(prior[0], LEAST_S)
        self._prior = (base, prior[1], prior[2])
        self._half_life_s = half_life_s
        doubts = [
            trust * own + share * base
            for trust, own, share in zip(_TRUST, self._prior, _UNKNOWN, strict=True)
        ]
        self._doubts = (doubts[0] ** 2, doubts[1] ** 2, doubts[2] ** 2)
        self._found: Coefficients = self._prior
        self._covariance: _Covariance = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        self.latest = Work(0.0, 0.0)
        self._at = 0.0
        self._run: list[float] = []  # suspect tasks in a row: measured over expected before them
        self._slow = False  # or else these were fast
        self._before: _State = self._found, self._covariance
        self.measured = False
        self.changed = False

    def __call__(self, work: Work) -> float:
        """Return the seconds that a work is expected to take."""
        base, token, position = self._found
        return base + token * work.tokens + position * work.positions

    def prior_s(self, work: Work) -> float:
        """Return the seconds by the prior alone."""
        base, token, position = self._prior
        return base + token * work.tokens + position * work.positions

    @property
    def scale(self) -> float:
        """How many times the prior the measured time is, at the work added last."""
        return max(self(self.latest), LEAST_S) / self.prior_s(self.latest)

    def add(self, work: Work, seconds: float, now: float) -> float | None:
        """Take what a task took; return what was expected of it, None of the first."""
        seconds = max(seconds, LEAST_S)
        first = not self.measured
        if first:
            self._begin(seconds / self.prior_s(work))
        expected = max(self(work), LEAST_S)
        if not first:
            self._forget(expected / self.prior_s(work), now - self._at)
        before = self._found, self._covariance
        deviation = self._learn(work, seconds - expected, expected)
        suspect = 1 + _SUSPECT * deviation / expected
        self.changed = False
        if 1 / suspect <= seconds / expected <= suspect:
            self._run = []
        else:
            self._suspect(work, seconds, seconds > expected, before)
        self.latest, self._at = work, now
        return None if first else expected

    def try_out(self, trials: Sequence[tuple[Work, float]], now: float) -> None:
        """Take what works of several sizes took that were done once, seconds.

        They tell the shape. Of the speed they tell as much as one task does.
        """
        self._run = []
        for work, seconds in trials:
            seconds = max(seconds, LEAST_S)
            if not self.measured:
                self._begin(seconds / self.prior_s(work), _ANY_SHAPE)
            expected = max(self(work), LEAST_S)
            self._learn(work, seconds - expected, expected, _NOISE_OF_TRIALS)
            self.latest, self._at = work, now
        self.doubt()

    def doubt(self, tasks: float = 1.0) -> None:
        """Let all before count as much as so many tasks to come."""
        self._wander(_NOISE * _NOISE / tasks, (0.0, 0.0, 0.0))

    def _begin(self, scale: float, variance: float = 1.0) -> None:
        self.measured = True
        self.rescale(scale)
        square = variance * scale * scale
        a, b, c = self._doubts
        self._wander(_ANY_SCALE, (square * a, square * b, square * c))

    def _forget(self, scale: float, elapsed_s: float) -> None:
        """Let the coefficients wander, together and each by itself towards what it was at first."""
        idle = min(max(elapsed_s / self._half_life_s, 0.0), 1.0)
        together = _NOISE * _NOISE * (idle + 1 / (_WINDOW * _WINDOW))
        square = scale * scale
        v, d = self._covariance, self._doubts
        each = (
            _SHAPE_LOSS * max(0.0, square * d[0] - v[0]),
            _SHAPE_LOSS * max(0.0, square * d[1] - v[3]),
            _SHAPE_LOSS * max(0.0, square * d[2] - v[5]),
        )
        self._wander(together, each)

    def _wander(self, together: float, each: Coefficients) -> None:
        """Add variance: `together` of all coefficients in proportion, and of each by itself."""
        a, b, c = self._found
        v00, v01, v02, v11, v12, v22 = self._covariance
        self._covariance = (
            v00 + together * a * a + each[0],
            v01 + together * a * b,
            v02 + together * a * c,
            v11 + together * b * b + each[1],
            v12 + together * b * c,
            v22 + together * c * c + each[2],
        )

    def _learn(self, work: Work, error: float, expected: float, share: float = _NOISE) -> float:
        """Correct the coefficients; return the standard deviation of `error`, seconds."""
        n, p = work.tokens, work.positions
        v00, v01, v02, v11, v12, v22 = self._covariance
        g0 = v00 + v01 * n + v02 * p
        g1 = v01 + v11 * n + v12 * p
        g2 = v02 + v12 * n + v22 * p
        noise = share * expected
        variance = g0 + g1 * n + g2 * p + noise * noise
        deviation = sqrt(variance)
        variance *= max(1.0, abs(error) / (_LIMIT * deviation))  # Huber's weight
        step = error / variance
        a, b, c = self._found
        self._found = (max(0.0, a + g0 * step), max(0.0, b + g1 * step), max(0.0, c + g2 * step))
        self._covariance = (
            v00 - g0 * g0 / variance,
            v01 - g0 * g1 / variance,
            v02 - g0 * g2 / variance,
            v11 - g1 * g1 / variance,
            v12 - g1 * g2 / variance,
            v22 - g2 * g2 / variance,
        )
        return deviation

    def _suspect(self, work: Work, seconds: float, slow: bool, before: _State) -> None:
        """Take a task far off; if it is one of some in a row, the speed is another from now on.

        Then what these tasks have done to the coefficients is undone: they tell of the speed, and
        nothing of the shape.

        Args:
            before: the state before this task.
        """
        if not self._run or slow != self._slow:
            self._run, self._slow, self._before = [], slow, before
        base, token, position = self._before[0]
        expected = base + token * work.tokens + position * work.positions
        self._run.append(seconds / max(expected, LEAST_S))
        if len(self._run) == _IN_A_ROW:
            self._found, self._covariance = self._before
            self.rescale(median(self._run))
            self.doubt(_IN_A_ROW - 1)
            self.changed = True

    def rescale(self, factor: float) -> None:
        """Let all take so many times as long."""
        self._run = []
        a, b, c = self._found
        self._found = (factor * a, factor * b, factor * c)
        v00, v01, v02, v11, v12, v22 = self._covariance
        f = factor * factor
        self._covariance = (f * v00, f * v01, f * v02, f * v11, f * v12, f * v22)
