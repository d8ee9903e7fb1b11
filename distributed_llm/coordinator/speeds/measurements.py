"""How fast workers and links are, as far as it was measured. Pure."""

import copy
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import pairwise

from distributed_llm.common.messages import Capabilities, LinkReport, StageTrial
from distributed_llm.common.types import LayerRange, WorkerId
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.plan import PipelineStage
from distributed_llm.coordinator.serving.depth import Mean
from distributed_llm.coordinator.serving.step import Step
from distributed_llm.coordinator.serving.steps import StepDone
from distributed_llm.coordinator.speeds.links import LinkSpeeds
from distributed_llm.coordinator.speeds.machines import Machines
from distributed_llm.coordinator.speeds.speed_fit import Work
from distributed_llm.coordinator.speeds.worker_speed import Prior, Trial, WorkerSpeed

_HALF_LIFE_S = 30.0
_PROBES = 3
"""Latest probes of a machine of which the median counts."""

_ALIKE = 1.5
"""Probes that differ by a smaller factor show no change: noise of +-20 % is 1.2 / 0.8."""


class Measurements:
    """What is known of the machines of one cluster.

    Args:
        cost: of the model.
        item_bytes: of one parameter, and of one number in the KV cache.
        bytes_per_token: of activations, as they are handed on.
    """

    def __init__(self, cost: ModelCost, *, item_bytes: int, bytes_per_token: int) -> None:
        self._cost = cost
        self._item_bytes = item_bytes
        self._mean_bytes = sum(cost.layer_bytes) / cost.num_layers
        self._costs: dict[WorkerId, WorkerSpeed] = {}
        self._probes: dict[WorkerId, _Probes] = {}  # since the last task of each
        self._weights: dict[LayerRange, float] = {}  # of ranges, in layers of mean size
        self._network = LinkSpeeds(bytes_per_token)
        self._overhead = Mean(_HALF_LIFE_S)  # of a step, beside stages and hops

    def joined(self, worker: WorkerId, found: Capabilities) -> None:
        """A worker is there, of which nothing is known but what its probe found."""
        prior = Prior.of(found, self._cost, self._item_bytes)
        self._probes[worker] = _Probes(WorkerSpeed(prior))
        self._costs[worker] = self._probes[worker].add(prior)

    def remeasured(self, worker: WorkerId, found: Capabilities) -> None:
        """A worker without layers has probed its machine again.

        The first probe after its last task is what its measured costs go with. If later ones differ
        much from that, its costs are expected to differ likewise, until tasks tell.
        """
        if worker not in self._costs:
            return
        if worker not in self._probes:
            self._probes[worker] = _Probes(self._costs[worker])
        prior = Prior.of(found, self._cost, self._item_bytes)
        self._costs[worker] = self._probes[worker].add(prior)

    def untried(self, worker: WorkerId) -> bool:
        """Return whether nothing is known of a worker but what its probes found."""
        costs = self._costs.get(worker)
        return costs is not None and not costs.measured

    def tried(
        self, worker: WorkerId, held: LayerRange, trials: Sequence[StageTrial], *, now: float
    ) -> None:
        """Learn from what a worker has tried on its new layers."""
        costs = self._costs.get(worker)
        if costs is None or not trials:
            return
        self._probes.pop(worker, None)
        costs.try_out(
            [_trial(trial) for trial in trials],
            layers=self._weight(held),
            is_last=held.stop == self._cost.num_layers,
            now=now,
        )

    def left(self, worker: WorkerId) -> None:
        """A worker is gone."""
        self._costs.pop(worker, None)
        self._probes.pop(worker, None)
        self._network.forget(worker)

    def observe(self, stages: Sequence[PipelineStage], done: StepDone, *, now: float) -> None:
        """Learn from a step how long each stage takes, and how long the links at most."""
        inside_us = sum(timing.compute_us + timing.queued_us for timing in done.timings)
        outside_s = max(0.0, done.round_trip_s - inside_us / 1e6)
        hops_s = self._network.bound(pairwise(stage.worker for stage in stages), outside_s)
        self._overhead.add(outside_s - hops_s, now)
        work = work_of(done.step)
        for stage, timing in zip(stages, done.timings, strict=True):
            costs = self._costs.get(stage.worker)
            if costs is not None:
                self._probes.pop(stage.worker, None)
                costs.observe(
                    work,
                    layers=self._weight(stage.layers),
                    is_last=stage.layers.stop == self._cost.num_layers,
                    layers_s=timing.layers_us / 1e6,
                    other_s=max(0, timing.compute_us - timing.layers_us) / 1e6,
                    now=now,
                )

    def observe_link(self, sender: WorkerId, receiver: WorkerId, report: LinkReport) -> None:
        """Learn how fast a link is."""
        if report.up and report.bytes_per_s:
            self._network.observe(
                sender, receiver, rtt_s=report.rtt_s, bytes_per_s=report.bytes_per_s
            )

    @property
    def bytes_per_s(self) -> float:
        """What a link carries, about."""
        return self._network.bytes_per_s

    def layer_s(self, worker: WorkerId, prompt: Work) -> float:
        """Return what a layer takes for a part of a prompt."""
        return self._costs[worker].layer_s(prompt)

    def error(self, worker: WorkerId) -> float | None:
        """Return how far predictions of a worker's tasks are off, as a share; None if unknown."""
        costs = self._costs.get(worker)
        return costs.error if costs else None

    def doubt(self, worker: WorkerId) -> float:
        """Return how far they may be off; a guess where only trials are known."""
        costs = self._costs.get(worker)
        return costs.doubt if costs else 0.0

    def machines(self, memory_bytes: Mapping[WorkerId, int]) -> Machines:
        """Return workers with so much memory as planning sees them; a copy that does not change."""
        costs = {worker: copy.deepcopy(self._costs[worker]) for worker in memory_bytes}
        links = self._network.snapshot().links
        return Machines(dict(memory_bytes), costs, links, self._overhead.value or 0.0)

    def _weight(self, layers: LayerRange) -> float:
        weight = self._weights.get(layers)
        if weight is None:
            weight = sum(self._cost.layer_bytes[layers.start : layers.stop]) / self._mean_bytes
            self._weights[layers] = weight
        return weight


class _Probes:
    """What probes of an idle machine found, one after another.

    Args:
        costs: of the worker, from the tasks that it did before.
    """

    def __init__(self, costs: WorkerSpeed) -> None:
        self._costs = costs
        self._first: Prior | None = None
        self._latest: deque[Prior] = deque(maxlen=_PROBES)

    def add(self, prior: Prior) -> WorkerSpeed:
        """Return what the worker is expected to take now."""
        if self._first is None:
            self._first = self._level = prior
        self._latest.append(prior)
        usual = sorted(self._latest, key=_token_s)[len(self._latest) // 2]  # of two the slower
        change = _token_s(usual) / _token_s(self._level)
        if not 1 / _ALIKE <= change <= _ALIKE:
            self._level = usual
        if not self._costs.measured:
            return WorkerSpeed(self._level)
        return self._costs.rescaled(_token_s(self._level) / _token_s(self._first))


def _token_s(prior: Prior) -> float:
    """Return what a layer takes for one token."""
    return prior.layer_s + prior.token_s


def _trial(tried: StageTrial) -> Trial:
    number, tokens, took = tried.sequences, tried.num_tokens, tried.time
    positions = number * _positions(tried.start, tokens)
    return Trial(
        Work(number, positions) if tokens == 1 else Work.of_prompt(number * tokens, positions),
        layers_s=took.layers_us / 1e6,
        other_s=max(0, took.compute_us - took.layers_us) / 1e6,
    )


def work_of(step: Step) -> Work:
    """Return what every layer computes in a step."""
    tokens = positions = prompt_tokens = prompt_positions = 0
    for part in step.slices:
        if part.num_tokens == 1:
            tokens += 1
            positions += part.start + 1
        else:
            prompt_tokens += part.num_tokens
            prompt_positions += _positions(part.start, part.num_tokens)
    return Work(tokens, positions, bool(prompt_tokens), prompt_tokens, prompt_positions)


def _positions(start: int, num_tokens: int) -> int:
    """Return how many positions tokens attend to that follow on `start` others."""
    return num_tokens * start + num_tokens * (num_tokens + 1) // 2
