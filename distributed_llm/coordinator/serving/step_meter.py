"""Measures the steps of one pipeline for those who look at it: stage times, bubbles. Pure.

Nothing is decided by these numbers.
"""

from collections.abc import Sequence

from distributed_llm.coordinator.fading_mean import MAX_WEIGHT, fade
from distributed_llm.coordinator.serving.steps import StepDone

_HALF_LIFE_S = 10.0
"""Time after which a step counts half, seconds."""


class StepMeter:
    """Means over the latest steps of one pipeline, and sums over all.

    All but `compute_s`, `tokens` and `bubble_ratio` are of steps that only decode. A stage that a
    step does not reach, since it has layers of an encoder only, takes no time for it.

    Attributes:
        step_s: mean time that each stage computes a step; empty before the first.
        predicted_s: mean of what was expected of each stage before; None where nothing was.
        queued_s: mean time that a step waits at each stage; empty before the first.
        round_trip_s: mean time of a step; None before the first, like the following.
        outside_s: mean part of that which is neither computed nor queued at a stage.
        step_tokens: mean tokens of a step.
        compute_s: time that each stage has computed in all.
        tokens: of all steps, by stage.
        source_tokens: likewise, of those that an encoder reads.
    """

    def __init__(self, num_stages: int) -> None:
        self.step_s: list[float] = []
        self.queued_s: list[float] = []
        self.predicted_s: list[float | None] = [None] * num_stages
        self.round_trip_s: float | None = None
        self.outside_s: float | None = None
        self.step_tokens: float | None = None
        self.compute_s = [0.0] * num_stages
        self.tokens = [0] * num_stages
        self.source_tokens = [0] * num_stages
        self._num_stages = num_stages
        self._weight = 0.0
        self._decoded_at = 0.0
        self._ended_at: float | None = None
        self._computing_s = self._in_flight_s = 0.0  # fading sums

    @property
    def bubble_ratio(self) -> float | None:
        """Share of the stages' time that they were idle, while any step was in flight."""
        available_s = self._num_stages * self._in_flight_s
        if not available_s:
            return None
        return min(1.0, max(0.0, 1.0 - self._computing_s / available_s))

    @property
    def slowest(self) -> int | None:
        """Index of the stage that computes longest; None before the first step that decodes."""
        return max(range(len(self.step_s)), key=self.step_s.__getitem__, default=None)

    def observe(self, done: StepDone, predicted_s: Sequence[float | None], *, now: float) -> None:
        """Learn from a step that has ended.

        Args:
            done: the step.
            predicted_s: what was expected of each stage before; None where nothing was.
            now: clock seconds.
        """
        skipped = [0.0] * done.first
        compute_s = [*skipped, *(timing.compute_us / 1e6 for timing in done.timings)]
        for stage in range(done.first, self._num_stages):
            self.compute_s[stage] += compute_s[stage]
            self.tokens[stage] += len(done.step.token_ids)
            self.source_tokens[stage] += len(done.step.token_ids) * done.step.is_source
        self._observe_bubbles(sum(compute_s), done.round_trip_s, now)
        if done.step.decodes:
            self._observe_decode(done, compute_s, predicted_s, now)

    def _observe_bubbles(self, computing_s: float, round_trip_s: float, now: float) -> None:
        """Count the time since the last step ended, or since this one began if that is later."""
        since_s = round_trip_s if self._ended_at is None else now - self._ended_at
        keep = fade(since_s, _HALF_LIFE_S)
        self._computing_s = keep * self._computing_s + computing_s
        self._in_flight_s = keep * self._in_flight_s + min(since_s, round_trip_s)
        self._ended_at = now

    def _observe_decode(
        self,
        done: StepDone,
        compute_s: Sequence[float],
        predicted_s: Sequence[float | None],
        now: float,
    ) -> None:
        past = self._weight * fade(now - self._decoded_at, _HALF_LIFE_S)
        share = 1 / (past + 1)
        self._weight, self._decoded_at = min(past + 1, MAX_WEIGHT), now
        skipped = [0.0] * done.first
        queued_s = [*skipped, *(timing.queued_us / 1e6 for timing in done.timings)]
        outside_s = max(0.0, done.round_trip_s - sum(compute_s) - sum(queued_s))
        tokens = float(len(done.step.token_ids))
        self.step_s = _means(self.step_s, compute_s, share)
        self.queued_s = _means(self.queued_s, queued_s, share)
        self.predicted_s = [
            _mean(mean, seconds, share)
            for mean, seconds in zip(self.predicted_s, predicted_s, strict=True)
        ]
        self.round_trip_s = _mean(self.round_trip_s, done.round_trip_s, share)
        self.outside_s = _mean(self.outside_s, outside_s, share)
        self.step_tokens = _mean(self.step_tokens, tokens, share)


def _means(means: Sequence[float], values: Sequence[float], share: float) -> list[float]:
    if not means:
        return list(values)
    return [mean + share * (value - mean) for mean, value in zip(means, values, strict=True)]


def _mean(mean: float | None, value: float | None, share: float) -> float | None:
    if mean is None or value is None:
        return mean if value is None else value
    return mean + share * (value - mean)
