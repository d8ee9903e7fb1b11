"""What a worker takes for a task, as it follows from what it reported. Pure.

A layer takes base + per token + per position. These three are followed by a Kalman filter, which is
recursive least squares with a choice of what is forgotten: how fast the machine is may change
(somebody else uses it), so that is soon forgotten; how its time grows with the size of a step is a
matter of its hardware and hardly is. So slopes once learnt stay known while all steps have one
size, where forgetting everything alike would lose them.

Before anything is measured there is only a prior from bandwidth and operations per second. Its
scale means little, its shape more: as long as all steps have one size, other sizes are predicted in
proportion to it. Noise is taken to be in proportion to the time.
"""

import copy
from collections import deque
from dataclasses import dataclass
from math import sqrt
from statistics import median

from distributed_llm.common.messages import Capabilities
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.partition_tables import Speed

_NOISE = 0.12
"""Standard deviation of a task's time, of its mean; that of a uniform +-20 % is 0.115."""

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

_LATEST = 64
"""Predictions that the error is the median of."""

_TASK_S = 0.0005
"""What a task is taken to cost beside layers and head where that was not measured."""

_RESCALED_TASKS = 0.5
"""Tasks that all that was rescaled counts as much as: a probe tells only about how fast it is."""

_QUERIES = 4
"""Query heads that share a KV head: 1 to 8, where models differ."""

_LEAST_S = 1e-9
"""No task takes less, so that there are ratios of times."""


@dataclass(frozen=True)
class Work:
    """What a step computes.

    Attributes:
        positions: that its tokens attend to, summed over the tokens.
    """

    tokens: float
    positions: float


@dataclass(frozen=True)
class Load:
    """The steps that are planned for.

    Attributes:
        decode: an average step in which every sequence computes one token.
        prefill: an average step with chunks of prompts, None if there are none.
        prefill_share: steps with prompts per step that decodes.
    """

    decode: Work
    prefill: Work | None = None
    prefill_share: float = 0.0


@dataclass(frozen=True)
class Prior:
    """What a worker should take by what it can do, seconds.

    Attributes:
        layer_s: to read a layer of mean size.
        token_s: to compute a layer for one token.
        position_s: to read one position of KV cache in one layer.
        prompt_position_s: to attend to one in a prompt; it is read once for many tokens.
        head_s: to read norm and head.
        head_token_s: to compute them for one token.
    """

    layer_s: float
    token_s: float
    position_s: float
    prompt_position_s: float
    head_s: float
    head_token_s: float

    @classmethod
    def of(cls, found: Capabilities, cost: ModelCost, item_bytes: float) -> "Prior":
        """Return the prior of a machine for a model.

        Args:
            item_bytes: of one parameter, and of one number in the KV cache.
        """
        byte_s = 1 / found.memory_bandwidth_bytes_per_s
        item_s = 2 / found.flops_per_s / item_bytes  # multiply and add, per byte of parameters
        layer_bytes = sum(cost.layer_bytes) / cost.num_layers
        head_bytes = cost.last_bytes + cost.shared_bytes
        return cls(
            layer_s=layer_bytes * byte_s,
            token_s=layer_bytes * item_s,
            position_s=cost.kv_bytes_per_token * byte_s,
            prompt_position_s=cost.kv_bytes_per_token * item_s * _QUERIES,
            head_s=head_bytes * byte_s,
            head_token_s=head_bytes * item_s,
        )


_Coefficients = tuple[float, float, float]  # seconds: base, per token, per position
_Covariance = tuple[float, float, float, float, float, float]  # of these: 00, 01, 02, 11, 12, 22
_State = tuple[_Coefficients, _Covariance]


class _Fit:
    """Seconds for a work: base + per token + per position, none negative.

    A Kalman filter over the three. Between two tasks they wander together (the machine gets slower
    or faster: noise along the coefficients themselves) and a little each by itself.

    Attributes:
        measured: anything was added.
        changed: the task added last showed that the speed is another from now on.
    """

    def __init__(self, prior: _Coefficients, half_life_s: float) -> None:
        base = max(prior[0], _LEAST_S)
        self._prior = (base, prior[1], prior[2])
        self._half_life_s = half_life_s
        doubts = [
            trust * own + share * base
            for trust, own, share in zip(_TRUST, self._prior, _UNKNOWN, strict=True)
        ]
        self._doubts = (doubts[0] ** 2, doubts[1] ** 2, doubts[2] ** 2)
        self._found: _Coefficients = self._prior
        self._covariance: _Covariance = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        self._latest = Work(0.0, 0.0)
        self._at = 0.0
        self._run: list[float] = []  # suspect tasks in a row: measured over expected before them
        self._slow = False  # or else these were fast
        self._before: _State = self._found, self._covariance
        self.measured = False
        self.changed = False

    def __call__(self, work: Work) -> float:
        base, token, position = self._found
        return base + token * work.tokens + position * work.positions

    def prior_s(self, work: Work) -> float:
        """Return the seconds by the prior alone."""
        base, token, position = self._prior
        return base + token * work.tokens + position * work.positions

    @property
    def scale(self) -> float:
        """How many times the prior the measured time is, at the work added last."""
        return self(self._latest) / self.prior_s(self._latest)

    def add(self, work: Work, seconds: float, now: float) -> float | None:
        """Take what a task took; return what was expected of it, None of the first."""
        seconds = max(seconds, _LEAST_S)
        first = not self.measured
        if first:
            self._begin(seconds / self.prior_s(work))
        expected = max(self(work), _LEAST_S)
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
        self._latest, self._at = work, now
        return None if first else expected

    def doubt(self, tasks: float = 1.0) -> None:
        """Let all before count as much as so many tasks to come."""
        self._wander(_NOISE * _NOISE / tasks, (0.0, 0.0, 0.0))

    def _begin(self, scale: float) -> None:
        self.measured = True
        self.rescale(scale)
        square = scale * scale
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

    def _wander(self, together: float, each: _Coefficients) -> None:
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

    def _learn(self, work: Work, error: float, expected: float) -> float:
        """Correct the coefficients; return the standard deviation of `error`, seconds."""
        n, p = work.tokens, work.positions
        v00, v01, v02, v11, v12, v22 = self._covariance
        g0 = v00 + v01 * n + v02 * p
        g1 = v01 + v11 * n + v12 * p
        g2 = v02 + v12 * n + v22 * p
        noise = _NOISE * expected
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
        self._run.append(seconds / max(expected, _LEAST_S))
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


_Pair = dict[bool, _Fit]  # by whether the step decodes


def _pair(decode: _Coefficients, prefill: _Coefficients, half_life_s: float) -> _Pair:
    return {True: _Fit(decode, half_life_s), False: _Fit(prefill, half_life_s)}


def _scale(pair: _Pair, decodes: bool) -> float | None:
    """Return how many times its prior this kind of step takes, or else the other kind."""
    for fit in (pair[decodes], pair[not decodes]):
        if fit.measured:
            return fit.scale
    return None


def _seconds(pair: _Pair, work: Work, decodes: bool, scale: float) -> float:
    """Return what this kind of step takes, by the prior if it was not measured.

    Args:
        scale: of the prior, if neither kind was measured.
    """
    fit = pair[decodes]
    if fit.measured:
        return fit(work)
    found = _scale(pair, decodes)
    return fit.prior_s(work) * (scale if found is None else found)


class WorkerCosts:
    """What one worker takes for its layers, for a task as such, and as the last stage.

    Steps that decode and steps with prompts run other kernels and are measured apart. Of what was
    not measured the prior tells, scaled like what is nearest to it. Its memory is constant.

    Args:
        prior: what it should take by what it can do.
        half_life_s: after so long without a task the next one counts as much as all before.
    """

    def __init__(self, prior: Prior, half_life_s: float = 30.0) -> None:
        self._prior = prior
        self._layers = _pair(
            (prior.layer_s, prior.token_s, prior.position_s),
            (prior.layer_s, prior.token_s, prior.prompt_position_s),
            half_life_s,
        )
        self._tasks = _pair((_TASK_S, 0.0, 0.0), (_TASK_S, 0.0, 0.0), half_life_s)
        base_s = _TASK_S + prior.head_s
        self._lasts = _pair(
            (base_s, prior.head_token_s, 0.0),
            (base_s + prior.head_token_s, 0.0, 0.0),  # about one prompt ends in a step
            half_life_s,
        )
        self._errors: deque[float] = deque(maxlen=_LATEST)

    @property
    def measured(self) -> bool:
        """Whether any layers were observed."""
        return self.scale is not None

    @property
    def scale(self) -> float | None:
        """How many times the prior its layers take in steps like the latest; None if unknown."""
        return _scale(self._layers, True)

    @property
    def error(self) -> float | None:
        """Median of |predicted - measured| / measured over the latest tasks, of the whole stage.

        Each prediction was made before its task was observed. Those that rest on a prior alone do
        not count; None if there are no others.
        """
        return median(self._errors) if self._errors else None

    def observe(
        self,
        work: Work,
        *,
        decodes: bool,
        layers: float,
        is_last: bool,
        layers_s: float,
        other_s: float,
        now: float,
    ) -> None:
        """Take what a task took.

        Args:
            decodes: every sequence computes one token.
            layers: that the stage holds, in layers of mean size; more than none.
            is_last: the stage holds the last layer, so norm, head and sampling as well.
            layers_s: time inside the layers.
            other_s: the rest of its compute time.
            now: clock seconds.
        """
        fit = self._layers[decodes]
        beside = (self._lasts if is_last else self._tasks)[decodes]
        layer_s = fit.add(work, layers_s / layers, now)
        beside_s = beside.add(work, other_s, now)
        if fit.changed:
            self._layers[not decodes].doubt()
        if layer_s is not None and beside_s is not None:
            taken_s = max(layers_s + other_s, _LEAST_S)
            self._errors.append(abs(layers * layer_s + beside_s - taken_s) / taken_s)

    def rescaled(self, factor: float) -> "WorkerCosts":
        """Return what it takes once its machine is so many times slower than it was.

        The first tasks after that soon count more. What was not measured stays as it is.
        """
        changed = copy.deepcopy(self)
        for pair in (changed._layers, changed._tasks, changed._lasts):
            for fit in pair.values():
                if fit.measured:
                    fit.rescale(factor)
                    fit.doubt(_RESCALED_TASKS)
        return changed

    def layer_s(self, work: Work, *, decodes: bool, scale: float = 1.0) -> float:
        """Return the seconds of one layer of mean size.

        Args:
            scale: of the prior if nothing was measured, say the median of other workers' scales.
        """
        return _seconds(self._layers, work, decodes, scale)

    def speed(self, load: Load, *, scale: float = 1.0) -> Speed:
        """Return the seconds of a step that decodes, with its share of the steps with prompts.

        Args:
            scale: of the prior if nothing was measured, say the median of other workers' scales.
        """
        decode = self._speed(load.decode, True, scale)
        if load.prefill is None:
            return decode
        prefill, share = self._speed(load.prefill, False, scale), load.prefill_share
        return Speed(
            task_s=decode.task_s + share * prefill.task_s,
            layer_s=decode.layer_s + share * prefill.layer_s,
            last_s=decode.last_s + share * prefill.last_s,
        )

    def _speed(self, work: Work, decodes: bool, scale: float) -> Speed:
        layer_s = self.layer_s(work, decodes=decodes, scale=scale)
        task_s = _seconds(self._tasks, work, decodes, 1.0)
        if _scale(self._lasts, decodes) is None:
            found = _scale(self._layers, decodes)
            prior_s = self._lasts[decodes].prior_s(work) - _TASK_S
            return Speed(task_s, layer_s, prior_s * (scale if found is None else found))
        whole_s = _seconds(self._lasts, work, decodes, 1.0)
        if _scale(self._tasks, decodes) is None:
            task_s = min(task_s, whole_s)
        return Speed(task_s, layer_s, max(0.0, whole_s - task_s))
