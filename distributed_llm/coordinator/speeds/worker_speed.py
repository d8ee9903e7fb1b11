"""What a worker takes for a task, as it follows from what it reported. Pure.

A step takes a time as such, and more for each sequence that decodes in it, for each token of the
prompts that it has parts of, and for what these attend to (`task_fit`). Steps of several sizes are
tried when a worker has its first layers, which tells what larger batches would take than those of
late.

Before anything is measured there is only a prior from bandwidth and operations per second. Its
scale means little, its shape more: as long as all steps have one size, other sizes are predicted in
proportion to it. Noise is taken to be in proportion to the time.
"""

import copy
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from distributed_llm.common.messages import Capabilities, StageTrial
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.partition.tables import WorkerTimes
from distributed_llm.coordinator.speeds.speed_fit import LEAST_S, Coefficients, SpeedFit
from distributed_llm.coordinator.speeds.work import Work, work_of_trial

_LATEST = 64
"""Predictions that the error is the median of."""

_TASK_S = 0.0005
"""What a task is taken to cost beside layers and head where that was not measured."""

_ERROR_OF_TRIALS = 2.0
"""Others may have used the machine meanwhile, say workers that loaded and tried their layers on it:
only a plan that promises nearly twice as much is worth a move before there were any tasks."""

_QUERIES = 4
"""Query heads that share a KV head: 1 to 8, where models differ."""


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


class WorkerSpeed:
    """What one worker takes for its layers, for a task as such, and as the last stage.

    Of what was not measured the prior tells, scaled like its layers. Its memory is constant.

    Args:
        prior: what it should take by what it can do.
        half_life_s: after so long without a task the next one counts as much as all before.
    """

    def __init__(self, prior: Prior, half_life_s: float = 30.0) -> None:
        self._layers = SpeedFit(
            Coefficients(
                step=prior.layer_s,
                token=prior.token_s,
                position=prior.position_s,
                prompt_token=prior.token_s,
                prompt_position=prior.prompt_position_s,
            ),
            half_life_s,
        )
        self._tasks = SpeedFit(Coefficients(_TASK_S), half_life_s)
        self._lasts = SpeedFit(
            Coefficients(
                step=_TASK_S + prior.head_s,
                token=prior.head_token_s,
                prompt=prior.head_token_s,  # about one prompt ends in a step
            ),
            half_life_s,
        )
        self._tried = False  # and no task was observed since
        self._errors: deque[float] = deque(maxlen=_LATEST)

    @property
    def measured(self) -> bool:
        """Whether any layers were observed."""
        return self._layers.measured

    def first_scale(self, work: Work) -> float | None:
        """Return how many times the prior its layers took for a step at first; None if unknown.

        How fast it is now is its own matter; this tells how far priors are from this model.
        """
        return self._layers.first_scale(work) if self._layers.measured else None

    @property
    def error(self) -> float | None:
        """Median of |predicted - measured| / measured over the latest tasks, of the whole stage.

        Each prediction was made before its task was observed. Those that rest on a prior alone do
        not count; None if there are no others.
        """
        return median(self._errors) if self._errors else None

    @property
    def doubt(self) -> float:
        """How far predictions may be off, as a share; a guess after trials alone."""
        return self.error or (_ERROR_OF_TRIALS if self._tried else 0.0)

    def try_out(
        self, trials: Sequence[StageTrial], *, layers: float, is_last: bool, now: float
    ) -> None:
        """Learn from steps that were tried on new layers; arguments as for `observe`."""
        if not trials:
            return
        works = [work_of_trial(trial) for trial in trials]
        layer_s = [trial.time.layers_us / 1e6 / layers for trial in trials]
        other_us = [max(0, trial.time.compute_us - trial.time.layers_us) for trial in trials]
        beside = self._lasts if is_last else self._tasks
        self._layers.try_out(list(zip(works, layer_s, strict=True)), now)
        beside.try_out([(work, us / 1e6) for work, us in zip(works, other_us, strict=True)], now)
        self._tried = True

    def observe(
        self,
        work: Work,
        *,
        layers: float,
        is_last: bool,
        layers_s: float,
        other_s: float,
        now: float,
    ) -> None:
        """Take what a task took.

        Args:
            layers: that the stage holds, in layers of mean size; more than none.
            is_last: the stage holds the last layer, so norm, head and sampling as well.
            layers_s: time inside the layers.
            other_s: the rest of its compute time.
            now: clock seconds.
        """
        beside, unseen = self._tasks, self._lasts
        if is_last:
            beside, unseen = unseen, beside
        layer_s = self._layers.add(work, layers_s / layers, now)
        beside_s = beside.add(work, other_s, now)
        if self._layers.jumped != 1.0:
            unseen.rescale(self._layers.jumped)
        self._tried = False
        if layer_s is not None and beside_s is not None:
            taken_s = max(layers_s + other_s, LEAST_S)
            self._errors.append(abs(layers * layer_s + beside_s - taken_s) / taken_s)

    def rescaled(self, factor: float) -> "WorkerSpeed":
        """Return what it takes once its machine is so many times slower than it was.

        The first tasks after that soon count more. What was not measured stays as it is.
        """
        changed = copy.deepcopy(self)
        for fit in (changed._layers, changed._tasks, changed._lasts):
            fit.rescale(factor)
        return changed

    def layer_s(self, work: Work, *, scale: float = 1.0) -> float:
        """Return the seconds of one layer of mean size.

        Args:
            scale: of the prior if nothing was measured, say the median of other workers' scales.
        """
        return self._layers(work) if self.measured else scale * self._layers.prior_s(work)

    def times(self, work: Work, *, scale: float = 1.0) -> WorkerTimes:
        """Return the seconds of a step.

        Args:
            scale: of the prior if nothing was measured, say the median of other workers' scales.
        """
        layer_s = self.layer_s(work, scale=scale)
        tasks, lasts = self._tasks, self._lasts
        task_s = tasks(work) if tasks.measured else tasks.prior_s(work)
        if not lasts.measured:
            found = self._layers.scale(work) if self.measured else scale
            return WorkerTimes(task_s, layer_s, found * (lasts.prior_s(work) - _TASK_S))
        whole_s = lasts(work)
        if not tasks.measured:
            task_s = min(task_s, whole_s)
        return WorkerTimes(task_s, layer_s, max(0.0, whole_s - task_s))
