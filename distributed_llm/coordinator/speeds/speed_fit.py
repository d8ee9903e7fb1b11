"""Seconds for a work, followed as they change: linear in what the work consists of. Pure.

A Kalman filter over the coefficients, which is recursive least squares with a choice of what is
forgotten: how fast the machine is may change (somebody else uses it), so that is soon forgotten;
how its time grows with the size of a step is a matter of its hardware and hardly is. So slopes once
learnt stay known while all steps have one size, where forgetting everything alike would lose them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import median

import numpy as np
import numpy.typing as npt

from distributed_llm.coordinator.speeds.work import Work

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

_TRUST = np.array((0.7, 0.7, 2.0, 0.7, 0.7, 2.0))
"""Standard deviation of the coefficients of a prior, of themselves (attention is far from its
limit in many ways) ..."""

_UNKNOWN = np.array((0.0, 0.03, 0.0, 0.3, 0.03, 0.0))
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

_TRIED_TASKS = 0.1
"""Tasks that the speed counts as much as that trials show."""

_RESCALED_TASKS = 0.5
"""Tasks that all that was rescaled counts as much as."""

LEAST_S = 1e-9
"""No task takes less, so that there are ratios of times."""

_Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Coefficients:
    """Seconds: of a step as such, and for each of what it consists of; see `Work`."""

    step: float
    token: float = 0.0
    position: float = 0.0
    prompt: float = 0.0
    prompt_token: float = 0.0
    prompt_position: float = 0.0

    @property
    def vector(self) -> _Array:
        """All of them, float64 [6]."""
        prompts = (self.prompt, self.prompt_token, self.prompt_position)
        return np.array((self.step, self.token, self.position, *prompts))


class SpeedFit:
    """Seconds for a work, linear in it with coefficients of which none is negative.

    A Kalman filter over these. Between two tasks they wander together (the machine gets slower or
    faster: noise along the coefficients themselves) and a little each by itself.

    Attributes:
        measured: anything was added.
        jumped: by how many times the speed changed at once with the task added last, or 1.
    """

    def __init__(self, prior: Coefficients, half_life_s: float) -> None:
        self._prior = prior.vector
        self._prior[0] = max(prior.step, LEAST_S)
        self._half_life_s = half_life_s
        self._doubts: _Array = (_TRUST * self._prior + _UNKNOWN * self._prior[0]) ** 2
        self._found = self._first = self._prior
        self._covariance: _Array = np.zeros((6, 6))
        self._at = 0.0
        self._run: list[float] = []  # suspect tasks in a row: measured over expected before them
        self._slow = False  # or else these were fast
        self._before = self._found, self._covariance
        self.measured = False
        self.jumped = 1.0

    def __call__(self, work: Work) -> float:
        """Return the seconds that a work is expected to take."""
        return float(self._found @ work.vector)

    def prior_s(self, work: Work) -> float:
        """Return the seconds by the prior alone."""
        return float(self._prior @ work.vector)

    def scale(self, work: Work) -> float:
        """Return how many times the prior a work takes."""
        return max(self(work), LEAST_S) / self.prior_s(work)

    def first_scale(self, work: Work) -> float:
        """Return how many times the prior it took when the machine was new."""
        return max(float(self._first @ work.vector), LEAST_S) / self.prior_s(work)

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
        deviation = self._learn(work, seconds - expected, _NOISE * expected)
        suspect = 1 + _SUSPECT * deviation / expected
        self.jumped = 1.0
        if 1 / suspect <= seconds / expected <= suspect:
            self._run = []
        else:
            self._suspect(work, seconds, seconds > expected, before)
        self._at = now
        if first:
            self._first = self._found
        return None if first else expected

    def try_out(self, trials: Sequence[tuple[Work, float]], now: float) -> None:
        """Take what works of several sizes took that were done once, seconds.

        They tell the shape. Of the speed they tell little: while a cluster starts, others may use
        the machine.
        """
        self._run, first = [], not self.measured
        for work, seconds in trials:
            seconds = max(seconds, LEAST_S)
            if not self.measured:
                self._begin(seconds / self.prior_s(work), _ANY_SHAPE)
            expected = max(self(work), LEAST_S)
            self._learn(work, seconds - expected, _NOISE_OF_TRIALS * expected)
            self._at = now
        if first:
            self._first = self._found
        self._doubt(_TRIED_TASKS)

    def _doubt(self, tasks: float) -> None:
        """Let all before count as much as so many tasks to come."""
        self._wander(_NOISE * _NOISE / tasks)

    def _begin(self, scale: float, variance: float = 1.0) -> None:
        self.measured = True
        self._rescale(scale)
        self._wander(_ANY_SCALE)
        self._covariance = self._covariance + np.diag(variance * scale * scale * self._doubts)

    def _forget(self, scale: float, elapsed_s: float) -> None:
        """Let the coefficients wander, together and each by itself towards what it was at first."""
        idle = min(max(elapsed_s / self._half_life_s, 0.0), 1.0)
        lost = scale * scale * self._doubts - np.diagonal(self._covariance)
        self._wander(_NOISE * _NOISE * (idle + 1 / (_WINDOW * _WINDOW)))
        np.fill_diagonal(
            self._covariance,
            np.diagonal(self._covariance) + _SHAPE_LOSS * np.maximum(0.0, lost),
        )

    def _wander(self, together: float) -> None:
        """Add variance to all coefficients in proportion."""
        self._covariance = self._covariance + together * np.outer(self._found, self._found)

    def _learn(self, work: Work, error: float, noise: float) -> float:
        """Correct the coefficients; return the standard deviation of `error`, seconds.

        Args:
            noise: standard deviation of what was measured, seconds.
        """
        gain = self._covariance @ work.vector
        variance = float(gain @ work.vector) + noise * noise
        deviation = sqrt(variance)
        variance *= max(1.0, abs(error) / (_LIMIT * deviation))  # Huber's weight
        self._found = np.maximum(0.0, self._found + gain * (error / variance))
        self._covariance = self._covariance - np.outer(gain, gain) / variance
        return deviation

    def _suspect(
        self, work: Work, seconds: float, slow: bool, before: tuple[_Array, _Array]
    ) -> None:
        """Take a task far off; if it is one of some in a row, the speed is another from now on.

        Then what these tasks have done to the coefficients is undone: they tell of the speed, and
        nothing of the shape.

        Args:
            before: the coefficients before this task, and their covariance.
        """
        if not self._run or slow != self._slow:
            self._run, self._slow, self._before = [], slow, before
        expected = float(self._before[0] @ work.vector)
        self._run.append(seconds / max(expected, LEAST_S))
        if len(self._run) == _IN_A_ROW:
            self._found, self._covariance = self._before
            self.jumped = median(self._run)
            self._rescale(self.jumped)
            self._doubt(_IN_A_ROW - 1)

    def rescale(self, factor: float) -> None:
        """Let all take so many times as long, as far as anything was measured.

        The first tasks after that soon count more.
        """
        if self.measured:
            self._rescale(factor)
            self._doubt(_RESCALED_TASKS)

    def _rescale(self, factor: float) -> None:
        self._run = []
        self._found = factor * self._found
        self._covariance = factor * factor * self._covariance
