"""The round trip of a step by the number of steps in flight, as measured on one pipeline. Pure.

All R sequences that decode are in flight, spread over d steps of R/d sequences each. A sequence
gets one token per round trip T of its step, so the throughput is R / T (Little's law), and the best
d has the least round trip:

    T(d) = max(sum of t_i(R/d) + overhead, d * largest t_i(R/d))

Either a step finds every stage free, or it waits for the slowest. t_i(n) = a_i + b_i n is the
measured time of stage i for n sequences, fitted for each depth by itself. That is the difference to
`speeds`, which learns the time of one layer on one worker, to forecast other plans: here the times
belong to one plan, and include how stages that share a machine slow each other down at that depth,
which only measuring tells (`python -m benchmarks.depth`).
"""

from bisect import bisect_left
from collections.abc import Sequence

from distributed_llm.coordinator.fading_mean import MAX_WEIGHT, OUTLIER, FadingMean, fade

_WARM_UP = 1
"""First tasks of each stage at a new depth that do not count: the pipeline fills or drains."""

_ENOUGH = 2
"""Tasks of each stage after the warm-up with which a depth is known."""

_PATIENCE = 4
"""Half-lives without an observation after which a depth is forgotten, and may be tried again."""

_MAX_PATIENCE = 16
"""Most half-lives for that, which double each time that a depth is forgotten."""

_PRIOR = 0.02
"""Weight of the prior slope: that of batches whose sizes vary by the square root of this share."""

_FAST_ENOUGH = 0.9
"""Share of the best throughput that counts as just as fast."""

_BEARABLE = 1.5
"""Most times that a prefill step may take of its time alone, while others decode."""

_WORTHWHILE = 0.05
"""Least reduction of the round trip, as a share, for which the depth changes."""


class _StageFit:
    """Seconds of one stage for n sequences at one depth: a line, by fading least squares.

    The slope lies between 0 and proportion (time / sequences). While all batches have one size,
    nothing shows where; so two lines are fitted, `flat` with slope 0 as its prior and `steep` with
    proportion, which approach each other as sizes vary. Both pass through the mean. A prediction
    is the smaller of the two, the optimistic one.

    Attributes:
        flat: line with the least slope: base in seconds, slope in seconds per sequence.
        steep: line with the largest slope, likewise.
    """

    def __init__(self, half_life_s: float) -> None:
        self._half_life_s = half_life_s
        self._weight = 0.0
        self._n = self._nn = self._t = self._nt = 0.0  # weighted means
        self._at = 0.0
        self.flat = (0.0, 0.0)
        self.steep = (0.0, 0.0)

    @property
    def seconds_per_token(self) -> float | None:
        """Mean time over mean number of sequences; None before the first observation."""
        return self._t / self._n if self._n else None

    @property
    def mean_s(self) -> float:
        """Mean time of the batches that were seen."""
        return self._t

    def __call__(self, n: float) -> float:
        return min(self.flat[0] + self.flat[1] * n, self.steep[0] + self.steep[1] * n)

    def add(self, n: int, seconds: float, now: float) -> None:
        if self._weight:
            seconds = min(seconds, OUTLIER * max(self(n), self._t))
        past = self._weight * fade(now - self._at, self._half_life_s)
        share = 1 / (past + 1)
        self._n += share * (n - self._n)
        self._nn += share * (n * n - self._nn)
        self._t += share * (seconds - self._t)
        self._nt += share * (n * seconds - self._nt)
        self._weight, self._at = min(past + 1, MAX_WEIGHT), now
        self._fit()

    def _fit(self) -> None:
        proportion, doubt = self._t / self._n, _PRIOR * self._n * self._n
        covariance = self._nt - self._n * self._t
        sure = max(0.0, self._nn - self._n * self._n) + doubt
        flat = min(max(covariance / sure, 0.0), proportion)
        steep = min(max((covariance + doubt * proportion) / sure, 0.0), proportion)
        self.flat = (self._t - flat * self._n, flat)
        self.steep = (self._t - steep * self._n, steep)


class _DepthTimes:
    """Times of all stages, measured at one depth.

    The sum over stages and the slowest stage are kept up to date, so a prediction costs O(1).

    Attributes:
        patience: half-lives without an observation after which the times are stale.
        fits: by stage.
        seen_at: clock seconds of the last observation.
    """

    def __init__(self, num_stages: int, half_life_s: float, patience: int = _PATIENCE) -> None:
        self.patience = patience
        self.fits = [_StageFit(half_life_s) for _ in range(num_stages)]
        self._tasks = [0] * num_stages
        self._lacking = num_stages  # stages without enough tasks
        self._total = [0.0] * 4  # base and slope of flat, then of steep, summed over stages
        self._slowest = 0
        self.seen_at = 0.0

    @property
    def known(self) -> bool:
        """Whether every stage has enough tasks to judge this depth by."""
        return not self._lacking

    def add(self, stage: int, n: int, seconds: float, now: float) -> None:
        self.seen_at = now
        self._tasks[stage] += 1
        if self._tasks[stage] <= _WARM_UP:
            return
        if self._tasks[stage] == _WARM_UP + _ENOUGH:
            self._lacking -= 1
        fit = self.fits[stage]
        flat, steep, total = fit.flat, fit.steep, self._total
        fit.add(n, seconds, now)
        total[0] += fit.flat[0] - flat[0]
        total[1] += fit.flat[1] - flat[1]
        total[2] += fit.steep[0] - steep[0]
        total[3] += fit.steep[1] - steep[1]
        if fit(n) > self.fits[self._slowest](n):
            self._slowest = stage

    @property
    def mean_total_s(self) -> float:
        """Seconds of all stages together for the batches that were seen."""
        return sum(fit.mean_s for fit in self.fits)

    def total_s(self, n: int) -> float:
        """Return the seconds of all stages together for `n` sequences."""
        base, slope, steep_base, steep_slope = self._total
        return min(base + slope * n, steep_base + steep_slope * n)

    def slowest_s(self, n: int) -> float:
        """Return the seconds of the slowest stage for `n` sequences."""
        return self.fits[self._slowest](n)


class DepthEstimator:
    """Learns the stage times of one pipeline at each depth, and chooses the depth.

    "Depth" is the number of steps in flight. Memory is O(depths * stages).

    Args:
        half_life_s: time after which an observation counts half.
    """

    def __init__(self, num_stages: int, half_life_s: float = 30.0) -> None:
        self._num_stages = num_stages
        self._half_life_s = half_life_s
        self._depths: dict[int, _DepthTimes] = {}
        self._overhead = FadingMean(half_life_s)
        self._latest: _DepthTimes | None = None
        self._choice = 0  # 0: none was made

    def observe(self, stage: int, tokens: int, compute_s: float, *, depth: int, now: float) -> None:
        """Learn from one task, a step on one stage.

        Args:
            stage: index in the pipeline.
            tokens: tokens of the step.
            compute_s: seconds that the stage computed.
            depth: steps in flight when the step began, including itself.
            now: clock seconds.
        """
        times = self._depths.get(depth)
        if times is None:
            times = self._depths[depth] = _DepthTimes(self._num_stages, self._half_life_s)
        elif self._is_stale(times, now):
            patience = min(2 * times.patience, _MAX_PATIENCE)
            times = self._depths[depth] = _DepthTimes(self._num_stages, self._half_life_s, patience)
        times.add(stage, tokens, compute_s, now)
        self._latest = times

    def observe_overhead(self, seconds: float, now: float) -> None:
        """Learn the part of a step's round trip in which it was neither computed nor queued."""
        self._overhead.add(seconds, now)

    def best_depth(self, sequences: int, *, limit: int, now: float) -> int:
        """Return the depth with the shortest round trip, for steps that decode.

        A depth without recent measurements gets the most optimistic prediction that its measured
        neighbours allow; so it is tried if it could be the best, and then judged by its own times.
        The choice changes only for a gain above noise (`_WORTHWHILE`).

        Args:
            sequences: that decode, in all steps together.
            limit: most steps that may be in flight.
            now: clock seconds.
        """
        most = max(1, min(limit, sequences))
        known = self._known(now)
        if not known:
            return min(most, self._num_stages)
        round_trips = self._round_trips(sequences, most, known)
        best = min(range(most), key=round_trips.__getitem__) + 1
        current = min(self._choice or self._num_stages, most)
        if round_trips[best - 1] < (1 - _WORTHWHILE) * round_trips[current - 1]:
            current = best
        self._choice = current
        return current

    def best_chunks(
        self, tokens: int, *, limit: int, try_up_to: int, frugal: bool, now: float
    ) -> int:
        """Return the depth for steps that compute chunks of prompts.

        It is the least depth that keeps the slowest stage busy. More steps only delay each other,
        and the answers that are decoded meanwhile.

        Args:
            tokens: of each step.
            limit: most steps that may be in flight.
            try_up_to: most steps, unless measurements show that more are faster.
            frugal: whether answers that decode wait for these steps. Then fewer steps are tried
                too, and taken if they are as fast, or if a step takes much longer beside others.
            now: clock seconds.
        """
        known = self._known(now)
        if not known:
            return min(limit, try_up_to, self._num_stages)

        def rate(depth: int) -> float:
            return depth / max(self._predict(tokens, depth, known), 1e-9)

        best = known[0]
        for depth in known:
            best = depth if _FAST_ENOUGH * rate(depth) > rate(best) else best
        most = min(limit, max(best, try_up_to))
        depths = list(range(min(best, most), most + 1))
        if frugal:
            bearable_s = _BEARABLE * self._predict(tokens, 1, known)
            waits = {d: self._predict(tokens, d, known) for d in range(1, most + 1)}
            depths = [d for d, wait_s in waits.items() if d == 1 or wait_s <= bearable_s]
        fast = _FAST_ENOUGH * max(map(rate, depths))
        return min(depth for depth in depths if rate(depth) >= fast)

    def seconds_per_token(self, stage: int) -> float | None:
        """Return the seconds of a stage per token in the latest batches, None if unknown."""
        return self._latest.fits[stage].seconds_per_token if self._latest else None

    @property
    def share_between(self) -> float:
        """Time of the latest steps between their stages, as a share of that on all of them."""
        if self._latest is None or not self._latest.known:
            return 0.0
        return (self._overhead.value or 0.0) / max(self._latest.mean_total_s, 1e-9)

    # -------------------------------------------------------------- predictions

    def _known(self, now: float) -> Sequence[int]:
        """Return the depths with enough recent measurements, ascending."""
        return sorted(
            depth
            for depth, times in self._depths.items()
            if times.known and not self._is_stale(times, now)
        )

    def _is_stale(self, times: _DepthTimes, now: float) -> bool:
        return now - times.seen_at > times.patience * self._half_life_s

    def _round_trips(self, sequences: int, most: int, known: Sequence[int]) -> Sequence[float]:
        """Return T(1) to T(`most`), seconds."""
        return [self._predict(-(-sequences // d), d, known) for d in range(1, most + 1)]

    def _predict(self, tokens: int, depth: int, known: Sequence[int]) -> float:
        """Return T(depth), seconds: as measured, or the least that the nearest known depths allow.

        From a known depth below: with more steps in flight no stage gets faster. From one above:
        with fewer steps, stages get faster at most in proportion to how many can be busy at once.
        """
        above = bisect_left(known, depth)
        if above < len(known) and known[above] == depth:
            return self._round_trip_s(tokens, depth, depth, 1.0)
        bounds = []
        if above:
            bounds.append(self._round_trip_s(tokens, depth, known[above - 1], 1.0))
        if above < len(known):
            relief = min(depth, self._num_stages) / min(known[above], self._num_stages)
            bounds.append(self._round_trip_s(tokens, depth, known[above], relief))
        return max(bounds)

    def _round_trip_s(self, tokens: int, depth: int, source: int, factor: float) -> float:
        """Return T(depth) if stages take `factor` times as long as measured at depth `source`."""
        times = self._depths[source]
        overhead_s = self._overhead.value or 0.0
        alone = factor * times.total_s(tokens) + overhead_s
        return max(alone, depth * factor * times.slowest_s(tokens))
