"""What a worker takes for a task, as it follows from what it reported. Pure.

A layer takes base + per token + per position, steps that decode and steps with prompts each their
own (`task_fit`). Steps of several sizes are tried when a worker has its first layers, which tells
what larger batches would take than those of late.

Before anything is measured there is only a prior from bandwidth and operations per second. Its
scale means little, its shape more: as long as all steps have one size, other sizes are predicted in
proportion to it. Noise is taken to be in proportion to the time.
"""

import copy
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from distributed_llm.common.messages import Capabilities
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.partition_tables import Speed
from distributed_llm.coordinator.task_fit import LEAST_S, Coefficients, Fit, Work

_LATEST = 64
"""Predictions that the error is the median of."""

_TASK_S = 0.0005
"""What a task is taken to cost beside layers and head where that was not measured."""

_RESCALED_TASKS = 0.5
"""Tasks that all that was rescaled counts as much as: a probe tells only about how fast it is."""

_ERROR_OF_TRIALS = 0.5
"""Others may have used the machine meanwhile, say workers that tried theirs."""

_QUERIES = 4
"""Query heads that share a KV head: 1 to 8, where models differ."""


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


@dataclass(frozen=True)
class Trial:
    """What a step took that was tried on new layers.

    Attributes:
        decodes: every sequence computes one token.
        layers_s: time inside the layers.
        other_s: the rest of its compute time.
    """

    work: Work
    decodes: bool
    layers_s: float
    other_s: float


_Pair = dict[bool, Fit]  # by whether the step decodes


def _pair(decode: Coefficients, prefill: Coefficients, half_life_s: float) -> _Pair:
    return {True: Fit(decode, half_life_s), False: Fit(prefill, half_life_s)}


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
        self._tried = False  # and no task was observed since
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
        not count. After trials alone a guess; None if nothing is known.
        """
        if self._errors:
            return median(self._errors)
        return _ERROR_OF_TRIALS if self._tried else None

    def try_out(self, trials: Sequence[Trial], *, layers: float, is_last: bool, now: float) -> None:
        """Take what was tried on new layers; arguments as for `observe`."""
        for decodes in (True, False):
            some = [trial for trial in trials if trial.decodes is decodes]
            beside = self._lasts if is_last else self._tasks
            if some:
                of_layers = [(trial.work, trial.layers_s / layers) for trial in some]
                self._layers[decodes].try_out(of_layers, now)
                beside[decodes].try_out([(trial.work, trial.other_s) for trial in some], now)
                self._tried = True

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
        self._tried = False
        if fit.changed:
            self._layers[not decodes].doubt()
        if layer_s is not None and beside_s is not None:
            taken_s = max(layers_s + other_s, LEAST_S)
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
