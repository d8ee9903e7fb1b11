"""The speed of one worker, learned from what it reports. Pure.

The time of a step is linear in its work: sequences that decode, prompt tokens, and the positions
that these attend to (`speed_fit`). A worker with its first layers tries steps of several sizes, so
sizes that were not served yet are known too.

Before anything is measured there is only a prior, from bandwidth and operations per second. Its
scale means little, its ratios more: while all steps have one size, other sizes are predicted in
proportion to the prior. Noise is taken to be proportional to the time.
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
"""Number of latest predictions of which `error` is the median."""

_TASK_S = 0.0005
"""Assumed time of a task beside layers and head, until measured."""

_ERROR_OF_TRIALS = 2.0
"""Assumed relative error after trials alone. It is large because other workers may have used the
machine at the time; so before there are tasks, only nearly twice the rate is worth a move."""

_OWN_SHARE = 0.1
"""Share of the seconds in layers that were computing at least, whatever else they are expected to
have taken: weights that are not on the device come while others compute, or faster than once."""

_QUERIES = 4
"""Assumed query heads per KV head; models have 1 to 8."""


@dataclass(frozen=True)
class Prior:
    """Seconds that a worker should take, by memory bandwidth and FLOPS of its machine.

    Attributes:
        layer_s: for reading the weights of a layer of mean size.
        token_s: for the arithmetic of one token in such a layer.
        position_s: for reading one position of KV cache in one layer.
        prompt_position_s: for attending to one position from a prompt; reads are shared by tokens.
        head_s: for reading norm and head.
        head_token_s: for their arithmetic for one token.
        reads_sources: whether the model is an encoder-decoder: its encoder layers read sources in
            steps of their own, and decoder layers do the rest.
    """

    layer_s: float
    token_s: float
    position_s: float
    prompt_position_s: float
    head_s: float
    head_token_s: float
    reads_sources: bool = False

    @classmethod
    def from_capabilities(
        cls, capabilities: Capabilities, cost: ModelCost, item_bytes: float
    ) -> "Prior":
        """Return the prior of a machine for a model.

        Args:
            capabilities: of the machine, as a probe measured them.
            cost: of the model.
            item_bytes: size of one parameter, and of one number in the KV cache.
        """
        byte_s = 1 / capabilities.memory_bandwidth_bytes_per_s
        item_s = (
            2 / capabilities.flops_per_s / item_bytes
        )  # multiply and add, per byte of parameters
        layer_bytes = sum(cost.read_bytes) / cost.num_layers
        kv_bytes = sum(cost.layer_kv_bytes) / (cost.num_layers - cost.encoder_layers)
        tied = cost.num_layers - 1 in cost.sharers  # not where it is a matrix of both stacks alone
        head_bytes = cost.last_bytes + cost.shared_bytes * tied
        return cls(
            layer_s=layer_bytes * byte_s,
            token_s=layer_bytes * item_s,
            position_s=kv_bytes * byte_s,
            prompt_position_s=kv_bytes * item_s * _QUERIES,
            head_s=head_bytes * byte_s,
            head_token_s=head_bytes * item_s,
            reads_sources=cost.encoder_layers > 0,
        )


class WorkerSpeed:
    """Learns what one worker takes per layer, per task, and as the last stage.

    What was not measured is predicted by the prior, scaled like the layers. Of an encoder-decoder,
    what prompts take is learned from encoder layers, and the rest from decoder layers; the speed of
    the machine, as how much slower than before it is, from both.

    Args:
        prior: times by the probe of the machine.
        half_life_s: time without tasks after which the next one counts as much as all before.
    """

    def __init__(self, prior: Prior, half_life_s: float = 30.0) -> None:
        self._reads_sources = prior.reads_sources
        task_s = _TASK_S if prior.reads_sources else 0.0  # of a step that only reads sources
        self._layers = SpeedFit(
            Coefficients(
                step=prior.layer_s,
                token=prior.token_s,
                position=prior.position_s,
                prompt=max(prior.layer_s, LEAST_S) if prior.reads_sources else 0.0,
                prompt_token=prior.token_s,
                prompt_position=prior.prompt_position_s,
            ),
            half_life_s,
        )
        self._tasks = SpeedFit(Coefficients(_TASK_S, prompt=task_s), half_life_s)
        self._lasts = SpeedFit(
            Coefficients(
                step=_TASK_S + prior.head_s,
                token=prior.head_token_s,
                prompt=task_s or prior.head_token_s,  # about one prompt ends in a step
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
        """Return the first measured time of a layer relative to the prior's, None if unknown.

        It shows how far priors are off for this model, independent of later changes of this worker.
        """
        return self._layers.first_scale(work) if self._layers.measured else None

    @property
    def error(self) -> float | None:
        """Median of |predicted - measured| / measured for whole stages, over the latest tasks.

        Predictions were made before their tasks were observed, and not by a prior alone. None
        before there are any.
        """
        return median(self._errors) if self._errors else None

    @property
    def doubt(self) -> float:
        """Relative error to reckon with: `error`, an assumption after trials alone, else 0."""
        return self.error or (_ERROR_OF_TRIALS if self._tried else 0.0)

    def try_out(
        self,
        trials: Sequence[StageTrial],
        *,
        layers: float,
        is_last: bool,
        now: float,
        source_layers: float = 0.0,
        away_s: float = 0.0,
    ) -> None:
        """Learn from steps that were tried on new layers.

        Args:
            trials: what was tried, and how long it took.
            layers: as for `observe`.
            is_last: likewise.
            now: likewise.
            source_layers: as `layers`, for trials with sources.
            away_s: as for `observe`.
        """
        if not trials:
            return
        works = [work_of_trial(trial) for trial in trials]
        seconds = [
            (work, _computed_s(trial.time.layers_us / 1e6, away_s) / length)
            for work, trial in zip(works, trials, strict=True)
            if (length := source_layers if trial.is_source else layers)
        ]
        other_us = [max(0, trial.time.compute_us - trial.time.layers_us) for trial in trials]
        beside = self._lasts if is_last else self._tasks
        self._layers.try_out(seconds, now)
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
        away_s: float = 0.0,
    ) -> float | None:
        """Learn from one task; return how long it was expected to take, None if that is unknown.

        Args:
            work: of the step.
            layers: layers of the stage that have to do with the step, in layers of mean size; 0: it
                teaches nothing about layers.
            is_last: whether the stage also has norm, head and sampling.
            layers_s: seconds inside the layers.
            other_s: the other seconds of its compute time.
            now: clock seconds.
            away_s: seconds of `layers_s` that weights are expected to take that are not on its
                device. They say nothing of its speed, and are gone with the next layers.
        """
        beside, unseen = self._tasks, self._lasts
        if is_last:
            beside, unseen = unseen, beside
        own_s = _computed_s(layers_s, away_s)
        layer_s = self._layers.add(work, own_s / layers, now) if layers else None
        beside_s = beside.add(work, other_s, now)
        if layers and self._layers.jumped != 1.0:
            unseen.rescale(self._layers.jumped)
        self._tried = False
        if layer_s is None or beside_s is None:
            return None
        expected_s = layers * layer_s + away_s + beside_s
        taken_s = max(layers_s + other_s, LEAST_S)
        self._errors.append(abs(expected_s - taken_s) / taken_s)
        return expected_s

    def snapshot(self) -> "WorkerSpeed":
        """Return a copy that does not change when this does; it costs microseconds."""
        copied = copy.copy(self)
        copied._layers = self._layers.snapshot()
        copied._tasks = self._tasks.snapshot()
        copied._lasts = self._lasts.snapshot()
        copied._errors = self._errors.copy()
        return copied

    def rescaled(self, factor: float) -> "WorkerSpeed":
        """Return a copy for a machine that takes `factor` times as long as before.

        Later tasks soon outweigh the factor. What was not measured stays as it is.
        """
        changed = self.snapshot()
        for fit in (changed._layers, changed._tasks, changed._lasts):
            fit.rescale(factor)
        return changed

    def layer_s(self, work: Work, *, scale: float = 1.0) -> float:
        """Return the seconds of one layer of mean size.

        Args:
            work: of the step.
            scale: factor on the prior if nothing was measured, such as that of other workers.
        """
        return self._layers(work) if self.measured else scale * self._layers.prior_s(work)

    def times(self, work: Work, *, scale: float = 1.0) -> WorkerTimes:
        """Return the times of a step.

        Args:
            work: of the step.
            scale: factor on the prior if nothing was measured, such as that of other workers.
        """
        task_s, last_s = self._beside_layers(work, scale)
        if not self._reads_sources:
            return WorkerTimes(task_s, self.layer_s(work, scale=scale), last_s)
        reading_s = min(task_s, self._tasks(work.reading))
        return WorkerTimes(
            task_s=reading_s,
            layer_s=self.layer_s(work.answering, scale=scale),
            last_s=last_s,
            source_s=self.layer_s(work.reading, scale=scale),
            answer_s=task_s - reading_s,
        )

    def _beside_layers(self, work: Work, scale: float) -> tuple[float, float]:
        """Return the seconds of a task beside its layers, and of norm, head and sampling."""
        tasks, lasts = self._tasks, self._lasts
        task_s = tasks(work)
        if not lasts.measured:
            scale = self._layers.scale(work) if self.measured else scale
            return task_s, scale * (lasts.prior_s(work) - tasks.prior_s(work))
        whole_s = lasts(work)
        if not tasks.measured:
            task_s = min(task_s, whole_s)
        return task_s, max(0.0, whole_s - task_s)


def _computed_s(layers_s: float, away_s: float) -> float:
    """Return the seconds in layers without those that weights took to come."""
    return max(layers_s - away_s, _OWN_SHARE * layers_s)
