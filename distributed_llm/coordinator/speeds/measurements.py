"""Measurements: how fast the workers and links of a cluster are. Pure."""

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import pairwise

from distributed_llm.common.messages import Capabilities, LinkReport, StageTrial
from distributed_llm.common.types import LayerRange, WorkerId
from distributed_llm.coordinator.fading_mean import FadingMean
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.plan import PipelineStage
from distributed_llm.coordinator.serving.steps import StepDone
from distributed_llm.coordinator.speeds.links import LinkSpeeds
from distributed_llm.coordinator.speeds.machines import Machines
from distributed_llm.coordinator.speeds.work import Work, work_of
from distributed_llm.coordinator.speeds.worker_speed import Prior, WorkerSpeed

_HALF_LIFE_S = 30.0
_LATEST_PROBES = 3
"""Probes of a machine that count: the median of the latest ones."""

_ALIKE = 1.5
"""Factor between probes up to which nothing has changed; noise of +-20 % gives 1.2 / 0.8."""


class Measurements:
    """Learns the speeds of all workers and links of one cluster.

    Args:
        cost: of the model.
        item_bytes: size of one parameter, and of one number in the KV cache.
        bytes_per_token: size of the activations of one token on the wire.
    """

    def __init__(self, cost: ModelCost, *, item_bytes: int, bytes_per_token: int) -> None:
        self._cost = cost
        self._item_bytes = item_bytes
        self._mean_bytes = sum(cost.layer_bytes) / cost.num_layers
        self._costs: dict[WorkerId, WorkerSpeed] = {}
        self._probes: dict[WorkerId, _ProbeHistory] = {}  # since the last task of each worker
        self._weights: dict[LayerRange, float] = {}  # in layers of mean size
        self._network = LinkSpeeds(bytes_per_token)
        self._overhead = FadingMean(_HALF_LIFE_S)  # of a step, beside stages and hops

    def joined(self, worker: WorkerId, found: Capabilities) -> None:
        """Add a worker, with the probe of its machine as all that is known."""
        prior = Prior.of(found, self._cost, self._item_bytes)
        self._probes[worker] = _ProbeHistory(WorkerSpeed(prior))
        self._costs[worker] = self._probes[worker].add(prior)

    def remeasured(self, worker: WorkerId, found: Capabilities) -> None:
        """Learn from a new probe of a worker without layers.

        The first probe after its last task is the reference for its measured speed. If later probes
        differ much from it, the speed is expected to differ likewise, until tasks show.
        """
        if worker not in self._costs:
            return
        if worker not in self._probes:
            self._probes[worker] = _ProbeHistory(self._costs[worker])
        prior = Prior.of(found, self._cost, self._item_bytes)
        self._costs[worker] = self._probes[worker].add(prior)

    def untried(self, worker: WorkerId) -> bool:
        """Return whether only probes are known of a worker."""
        costs = self._costs.get(worker)
        return costs is not None and not costs.measured

    def tried(
        self, worker: WorkerId, held: LayerRange, trials: Sequence[StageTrial], *, now: float
    ) -> None:
        """Learn from the trials of a worker on its new layers."""
        costs = self._costs.get(worker)
        if costs is None or not trials:
            return
        self._probes.pop(worker, None)
        costs.try_out(
            trials,
            layers=self._weight(held),
            is_last=held.stop == self._cost.num_layers,
            now=now,
        )

    def left(self, worker: WorkerId) -> None:
        """Drop what is known of a worker that is gone."""
        self._costs.pop(worker, None)
        self._probes.pop(worker, None)
        self._network.forget(worker)

    def observe(self, stages: Sequence[PipelineStage], done: StepDone, *, now: float) -> None:
        """Learn the times of the stages from a step, and upper bounds of the links."""
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
        """Learn the speed of a link."""
        if report.up and report.bytes_per_s:
            self._network.observe(
                sender, receiver, rtt_s=report.rtt_s, bytes_per_s=report.bytes_per_s
            )

    @property
    def bytes_per_s(self) -> float:
        """Median bandwidth of the links."""
        return self._network.bytes_per_s

    def layer_s(self, worker: WorkerId, prompt: Work) -> float:
        """Return the seconds of a layer of mean size for prompt tokens."""
        return self._costs[worker].layer_s(prompt)

    def error(self, worker: WorkerId) -> float | None:
        """Return the relative error of predictions of a worker's tasks, None if unknown."""
        costs = self._costs.get(worker)
        return costs.error if costs else None

    def doubt(self, worker: WorkerId) -> float:
        """Return the relative error to reckon with; see `WorkerSpeed.doubt`."""
        costs = self._costs.get(worker)
        return costs.doubt if costs else 0.0

    def machines(self, memory_bytes: Mapping[WorkerId, int]) -> Machines:
        """Return an immutable copy for planning, of the workers in `memory_bytes`."""
        costs = {worker: self._costs[worker].snapshot() for worker in memory_bytes}
        links = self._network.snapshot().links
        return Machines(dict(memory_bytes), costs, links, self._overhead.value or 0.0)

    def _weight(self, layers: LayerRange) -> float:
        weight = self._weights.get(layers)
        if weight is None:
            weight = sum(self._cost.layer_bytes[layers.start : layers.stop]) / self._mean_bytes
            self._weights[layers] = weight
        return weight


class _ProbeHistory:
    """Probes of an idle machine, since its last task.

    Args:
        costs: speed of the worker, from tasks before.
    """

    def __init__(self, costs: WorkerSpeed) -> None:
        self._costs = costs
        self._first: Prior | None = None
        self._latest: deque[Prior] = deque(maxlen=_LATEST_PROBES)

    def add(self, prior: Prior) -> WorkerSpeed:
        """Add a probe; return the speed that is expected now."""
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
    """Return the seconds of a layer for one token."""
    return prior.layer_s + prior.token_s
