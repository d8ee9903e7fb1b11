"""What the stages of a pipeline take, and how many steps should be under way in it. Pure.

All R sequences that decode are under way, spread over d steps of R/d sequences each. A sequence
gets one token per round trip T of its step, so the throughput is R / T (Little's law), and the best
d has the least round trip:

    T(d) = max(sum of t_i(R/d) + overhead, d * largest t_i(R/d))

Either a step finds every stage free, or it waits for the slowest. t_i(n) = a_i + b_i n is what
stage i was measured to take for n sequences. It is measured for every depth by itself: stages that
share one machine slow each other down, and only measuring tells.
"""

from bisect import bisect_left
from collections.abc import Sequence

_WARM_UP = 1
"""Tasks of every stage that do not count when a depth is tried: the pipeline fills or drains."""

_ENOUGH = 2
"""Tasks of every stage that show what a depth is worth."""

_PATIENCE = (4, 16)
"""Half-lives after which a depth is tried again: at first, doubling each time, and at most."""

_MAX_WEIGHT = 64.0
"""Of everything a fit has seen, in tasks: it follows a change within about so many."""

_OUTLIER = 3.0
"""A task that took more than this many times the expected is counted as if it took this."""

_PRIOR = 0.02
"""Weight of a prior slope: as much as that of batches whose sizes vary by its square root."""

_FAST_ENOUGH = 0.9
"""Share of the best throughput."""

_BEARABLE = 1.5
"""With others a step may take so many times what it takes alone, where somebody waits for it."""

_WORTHWHILE = 0.05
"""The depth is changed for a round trip that is this share shorter."""


class Mean:
    """A mean that forgets.

    Attributes:
        value: None before the first observation.
    """

    def __init__(self, half_life_s: float) -> None:
        self._half_life_s = half_life_s
        self._weight = 0.0
        self._at = 0.0
        self.value: float | None = None

    def add(self, value: float, now: float) -> None:
        """Take an observation; one far above the mean is counted as if it were not so far."""
        past = self._weight * _decay(now - self._at, self._half_life_s)
        if self.value is not None:
            value = min(value, _OUTLIER * self.value) if self.value else value
            value = (past * self.value + value) / (past + 1)
        self.value, self._weight, self._at = value, min(past + 1, _MAX_WEIGHT), now


class _Line:
    """Seconds for n sequences, by least squares over observations that fade.

    The slope lies between none and proportion. While all batches have the same size it could be
    any of these; the more sizes vary, the nearer `flat` and `steep`, made with either as a prior,
    come to each other. Both pass through the mean, so the smaller one is the optimistic guess.

    Attributes:
        flat: base and slope, seconds and seconds per sequence.
        steep: the same.
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
        """Mean time over mean number of sequences, each of which gets one token."""
        return self._t / self._n if self._n else None

    def __call__(self, n: float) -> float:
        return min(self.flat[0] + self.flat[1] * n, self.steep[0] + self.steep[1] * n)

    def add(self, n: int, seconds: float, now: float) -> None:
        if self._weight:
            seconds = min(seconds, _OUTLIER * max(self(n), self._t))
        past = self._weight * _decay(now - self._at, self._half_life_s)
        share = 1 / (past + 1)
        self._n += share * (n - self._n)
        self._nn += share * (n * n - self._nn)
        self._t += share * (seconds - self._t)
        self._nt += share * (n * seconds - self._nt)
        self._weight, self._at = min(past + 1, _MAX_WEIGHT), now
        self._fit()

    def _fit(self) -> None:
        proportion, doubt = self._t / self._n, _PRIOR * self._n * self._n
        covariance = self._nt - self._n * self._t
        sure = max(0.0, self._nn - self._n * self._n) + doubt
        flat = min(max(covariance / sure, 0.0), proportion)
        steep = min(max((covariance + doubt * proportion) / sure, 0.0), proportion)
        self.flat = (self._t - flat * self._n, flat)
        self.steep = (self._t - steep * self._n, steep)


class _Depth:
    """What was measured with one number of steps under way.

    Sum and slowest stage are kept up to date, so that a prediction does not look at all stages.

    Attributes:
        patience: half-lives without observations after which it is tried again.
        seen_at: clock seconds of the last observation.
    """

    def __init__(self, num_stages: int, half_life_s: float, patience: int = _PATIENCE[0]) -> None:
        self.patience = patience
        self.lines = [_Line(half_life_s) for _ in range(num_stages)]
        self._tasks = [0] * num_stages
        self._lacking = num_stages  # stages without enough tasks
        self._total = [0.0] * 4  # of flat and steep of all lines
        self._slowest = 0
        self.seen_at = 0.0

    @property
    def known(self) -> bool:
        """Whether there is enough to judge by."""
        return not self._lacking

    def add(self, stage: int, n: int, seconds: float, now: float) -> None:
        self.seen_at = now
        self._tasks[stage] += 1
        if self._tasks[stage] <= _WARM_UP:
            return
        if self._tasks[stage] == _WARM_UP + _ENOUGH:
            self._lacking -= 1
        line = self.lines[stage]
        flat, steep, total = line.flat, line.steep, self._total
        line.add(n, seconds, now)
        total[0] += line.flat[0] - flat[0]
        total[1] += line.flat[1] - flat[1]
        total[2] += line.steep[0] - steep[0]
        total[3] += line.steep[1] - steep[1]
        if line(n) > self.lines[self._slowest](n):
            self._slowest = stage

    def total_s(self, n: int) -> float:
        """Return the seconds that all stages together take for `n` sequences."""
        base, slope, steep_base, steep_slope = self._total
        return min(base + slope * n, steep_base + steep_slope * n)

    def slowest_s(self, n: int) -> float:
        """Return the seconds that the slowest stage takes for `n` sequences."""
        return self.lines[self._slowest](n)


class DepthEstimator:
    """Measured times of the stages of one pipeline. Its memory is constant.

    Args:
        half_life_s: after which an observation counts half.
    """

    def __init__(self, num_stages: int, half_life_s: float = 30.0) -> None:
        self._num_stages = num_stages
        self._half_life_s = half_life_s
        self._depths: dict[int, _Depth] = {}
        self._overhead = Mean(half_life_s)
        self._latest: _Depth | None = None
        self._choice = 0  # 0: none was made

    def observe(self, stage: int, tokens: int, compute_s: float, *, depth: int, now: float) -> None:
        """Take what a task of a step took that only decodes.

        Args:
            tokens: sequences in the step; each decodes one token.
            depth: steps under way when it began, itself included.
            now: clock seconds.
        """
        at = self._depths.get(depth)
        if at is None:
            at = self._depths[depth] = _Depth(self._num_stages, self._half_life_s)
        elif self._is_stale(at, now):
            patience = min(2 * at.patience, _PATIENCE[1])
            at = self._depths[depth] = _Depth(self._num_stages, self._half_life_s, patience)
        at.add(stage, tokens, compute_s, now)
        self._latest = at

    def observe_overhead(self, seconds: float, now: float) -> None:
        """Take the part of a step's round trip in which it was neither computed nor queued."""
        self._overhead.add(seconds, now)

    def best_depth(self, sequences: int, *, limit: int, now: float) -> int:
        """Return how many steps should be under way, of `ceil(sequences / depth)` sequences each.

        A depth that was not tried lately is expected to be as good as those next to it allow. So it
        is tried if it could be the best, and judged by what it shows. The choice stays until
        another is better by more than noise.

        Args:
            sequences: that decode.
            limit: steps that may be under way.
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
        """Return how many steps of `tokens` tokens should be under way.

        Beyond what keeps the slowest stage busy they only delay each other, and what answers
        beside them.

        Args:
            tokens: in each step.
            limit: steps that may be under way.
            try_up_to: of them, if it was not measured that they are worth it.
            frugal: others wait for these steps: fewer are tried as well, and taken if they are as
                fast, or if a step among others takes much longer than alone.
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
        """Return what a stage takes per decoded token in batches as they are now, or None."""
        return self._latest.lines[stage].seconds_per_token if self._latest else None

    # -------------------------------------------------------------- predictions

    def _known(self, now: float) -> Sequence[int]:
        """Return the depths that can be judged, in order."""
        found = self._depths.items()
        return sorted(d for d, at in found if at.known and not self._is_stale(at, now))

    def _is_stale(self, at: _Depth, now: float) -> bool:
        return now - at.seen_at > at.patience * self._half_life_s

    def _round_trips(self, sequences: int, most: int, known: Sequence[int]) -> Sequence[float]:
        """Return T(1) to T(most)."""
        return [self._predict(-(-sequences // d), d, known) for d in range(1, most + 1)]

    def _predict(self, tokens: int, depth: int, known: Sequence[int]) -> float:
        """Return T, measured or as low as the nearest depths on either side allow.

        With fewer steps under way no stage is faster than in proportion to the number of stages
        that can be busy at once; with more of them none is faster at all.
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
        """Return T at `depth` if stages take `factor` times what they took at depth `source`."""
        at = self._depths[source]
        overhead_s = self._overhead.value or 0.0
        alone = factor * at.total_s(tokens) + overhead_s
        return max(alone, depth * factor * at.slowest_s(tokens))


def _decay(elapsed_s: float, half_life_s: float) -> float:
    return float(0.5 ** (elapsed_s / half_life_s))
