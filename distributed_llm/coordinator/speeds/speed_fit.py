"""Fit of seconds linear in the work of a step, which follows changes of speed. Pure.

A Kalman filter over the coefficients, that is recursive least squares with a choice of what to
forget. How fast a machine is may change (somebody else uses it), so the common scale of the
coefficients is forgotten soon. How its time grows with the size of a step depends on its hardware,
so their ratios are hardly forgotten: they stay known while all steps have one size.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import median

import numpy as np
import numpy.typing as npt

from distributed_llm.coordinator.speeds.work import Work

_NOISE = 0.12
"""Standard deviation of a task's time relative to its mean; uniform +-20 % has 0.115."""

_NOISE_OF_TRIALS = 0.04
"""Standard deviation of a trial's time, which is a median, relative to its mean."""

_ANY_SHAPE = 100.0
"""Factor on the variance of the prior's coefficients before trials, which show their ratios."""

_WINDOW = 32.0
"""Tasks over which the speed is averaged if they follow closely; fewer if time passes between."""

_SHAPE_LOSS = 1e-5
"""Share of the knowledge of the ratios that is forgotten with each task."""

_RELATIVE_DOUBTS = np.array((0.7, 0.7, 2.0, 0.7, 0.7, 2.0))
"""Part of the standard deviation of each of the prior's coefficients that is relative to itself.
It is large for positions, for attention is often far from the limit of the hardware."""

_BASE_DOUBTS = np.array((0.0, 0.03, 0.0, 0.3, 0.03, 0.0))
"""Part of the standard deviation of each of the prior's coefficients that is a share of the seconds
of a step: a token takes more than its arithmetic."""

_ANY_SCALE = 100.0
"""Relative variance of the prior's scale before anything was measured."""

_LIMIT = 2.0
"""Standard deviations beyond which an error of a task has no more influence (Huber)."""

_SUSPECT = 6.0
"""Standard deviations beyond which a task is suspect: it may show a change of speed. The factor is
at least 1.72 then, while noise of +-20 % can make up 1.2 / 0.8 = 1.5."""

_IN_A_ROW = 4
"""Consecutive suspect tasks, all slow or all fast, that show a change."""

_TRIED_TASKS = 0.1
"""Weight of the speed that trials show, as a number of tasks."""

_RESCALED_TASKS = 0.5
"""Weight of all that is known once it was rescaled, as a number of tasks."""

LEAST_S = 1e-9
"""Lower bound of all times in seconds, so that ratios exist."""

_Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Coefficients:
    """Seconds of a step by itself, and for each unit of its work; see `Work`."""

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
    """Seconds of a step, linear in its work with non-negative coefficients, by a Kalman filter.

    Between tasks the coefficients wander: all together, because the machine gets slower or faster
    (noise along the coefficients themselves), and a little each by itself.

    Args:
        prior: coefficients before anything is measured.
        half_life_s: time without tasks after which the next one counts as much as all before.

    Attributes:
        measured: whether anything was added.
        jumped: factor by which the last task showed the time to have changed at once, else 1.
    """

    def __init__(self, prior: Coefficients, half_life_s: float) -> None:
        self._prior = prior.vector
        self._prior[0] = max(prior.step, LEAST_S)
        self._half_life_s = half_life_s
        self._doubts: _Array = (_RELATIVE_DOUBTS * self._prior + _BASE_DOUBTS * self._prior[0]) ** 2
        self._coefficients = self._first = self._prior
        self._covariance: _Array = np.zeros((6, 6))
        self._at = 0.0
        self._run: list[float] = []  # suspect tasks in a row: measured over expected before them
        self._slow = False  # or else these were fast
        self._before = self._coefficients, self._covariance
        self.measured = False
        self.jumped = 1.0

    def __call__(self, work: Work) -> float:
        """Return the expected seconds of a work."""
        return float(self._coefficients @ work.vector)

    def prior_s(self, work: Work) -> float:
        """Return the expected seconds of a work by the prior."""
        return float(self._prior @ work.vector)

    def scale(self, work: Work) -> float:
        """Return the expected seconds relative to the prior's."""
        return max(self(work), LEAST_S) / self.prior_s(work)

    def first_scale(self, work: Work) -> float:
        """Return the seconds expected after the first task or trials, relative to the prior's."""
        return max(float(self._first @ work.vector), LEAST_S) / self.prior_s(work)

    def add(self, work: Work, seconds: float, now: float) -> float | None:
        """Learn the seconds of a task; return what was expected, None for the first task."""
        seconds = max(seconds, LEAST_S)
        first = not self.measured
        if first:
            self._begin(seconds / self.prior_s(work))
        expected = max(self(work), LEAST_S)
        if not first:
            self._forget(expected / self.prior_s(work), now - self._at)
        before = self._coefficients, self._covariance
        deviation = self._learn(work, seconds - expected, _NOISE * expected)
        suspect = 1 + _SUSPECT * deviation / expected
        self.jumped = 1.0
        if 1 / suspect <= seconds / expected <= suspect:
            self._run = []
        else:
            self._suspect(work, seconds, seconds > expected, before)
        self._at = now
        if first:
            self._first = self._coefficients
        return None if first else expected

    def try_out(self, trials: Sequence[tuple[Work, float]], now: float) -> None:
        """Learn from trials: works of several sizes and their seconds.

        They show the ratios of the coefficients. They show little of the speed, for others may use
        the machine while a cluster starts.
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
            self._first = self._coefficients
        self._doubt(_TRIED_TASKS)

    def _doubt(self, tasks: float) -> None:
        """Reduce the weight of everything known to that of `tasks` tasks."""
        self._wander(_NOISE * _NOISE / tasks)

    def _begin(self, scale: float, variance: float = 1.0) -> None:
        self.measured = True
        self._rescale(scale)
        self._wander(_ANY_SCALE)
        self._covariance = self._covariance + np.diag(variance * scale * scale * self._doubts)

    def _forget(self, scale: float, elapsed_s: float) -> None:
        """Add the variance of the time since the last task: common, and of each coefficient."""
        idle = min(max(elapsed_s / self._half_life_s, 0.0), 1.0)
        lost = scale * scale * self._doubts - self._covariance.diagonal()
        self._wander(_NOISE * _NOISE * (idle + 1 / (_WINDOW * _WINDOW)))
        diagonal = self._covariance.reshape(-1)[:: len(lost) + 1]
        diagonal += _SHAPE_LOSS * np.maximum(0.0, lost)

    def _wander(self, together: float) -> None:
        """Add variance along the coefficients: a common relative change."""
        products = self._coefficients[:, None] * self._coefficients
        self._covariance = self._covariance + together * products

    def _learn(self, work: Work, error: float, noise: float) -> float:
        """Correct the coefficients; return the expected standard deviation of `error`, seconds.

        Args:
            work: of the task.
            error: measured - expected, seconds.
            noise: standard deviation of the measurement, seconds.
        """
        gain = self._covariance @ work.vector
        variance = float(gain @ work.vector) + noise * noise
        deviation = sqrt(variance)
        variance *= max(1.0, abs(error) / (_LIMIT * deviation))  # Huber's weight
        self._coefficients = np.maximum(0.0, self._coefficients + gain * (error / variance))
        self._covariance = self._covariance - gain[:, None] * gain / variance
        return deviation

    def _suspect(
        self, work: Work, seconds: float, slow: bool, before: tuple[_Array, _Array]
    ) -> None:
        """Handle a suspect task; after `_IN_A_ROW` of them, rescale the coefficients.

        Then the corrections by these tasks are undone, because they show a change of the speed and
        nothing about the ratios.

        Args:
            work: of the task.
            seconds: that it took.
            slow: it took longer than expected, not less.
            before: coefficients and covariance before this task.
        """
        if not self._run or slow != self._slow:
            self._run, self._slow, self._before = [], slow, before
        expected = float(self._before[0] @ work.vector)
        self._run.append(seconds / max(expected, LEAST_S))
        if len(self._run) == _IN_A_ROW:
            self._coefficients, self._covariance = self._before
            self.jumped = median(self._run)
            self._rescale(self.jumped)
            self._doubt(_IN_A_ROW - 1)

    def snapshot(self) -> "SpeedFit":
        """Return a copy that does not change when this does.

        It shares the arrays: a fit replaces them between tasks, and writes into none that is
        shared.
        """
        copied = copy.copy(self)
        copied._run = list(self._run)
        return copied

    def rescale(self, factor: float) -> None:
        """Multiply the expected times, if anything was measured; later tasks soon outweigh it."""
        if self.measured:
            self._rescale(factor)
            self._doubt(_RESCALED_TASKS)

    def _rescale(self, factor: float) -> None:
        self._run = []
        self._coefficients = factor * self._coefficients
        self._covariance = factor * factor * self._covariance
