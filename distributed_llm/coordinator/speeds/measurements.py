"""Measurements: how fast the workers and links of a cluster are. Pure."""

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import pairwise

from distributed_llm.common.messages import Capabilities, LinkReport, StageTime, StageTrial
from distributed_llm.common.types import LayerRange, WorkerId
from distributed_llm.coordinator.fading_mean import FadingMean
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.plan import PipelineStage
from distributed_llm.coordinator.serving.steps import StepDone
from distributed_llm.coordinator.speeds.links import LinkSpeeds
from distributed_llm.coordinator.speeds.machines import Machines, Overflow
from distributed_llm.coordinator.speeds.work import Work, work_of
from distributed_llm.coordinator.speeds.worker_speed import Prior, WorkerSpeed

_HALF_LIFE_S = 30.0
"""Half-life of the mean overhead of steps, seconds."""

_LATEST_PROBES = 3
"""Number of latest probes of a machine whose median counts."""

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
        self._mean_bytes = sum(cost.read_bytes) / cost.num_layers
        self._speeds: dict[WorkerId, WorkerSpeed] = {}
        self._probes: dict[WorkerId, _ProbeHistory] = {}  # since the last task of each worker
        self._overflows: dict[WorkerId, Overflow] = {}
        self._shares: dict[WorkerId, str] = {}  # what stands for the cores that they share
        self._lengths: dict[tuple[LayerRange, bool], float] = {}  # see `_length`
        self._network = LinkSpeeds(bytes_per_token)
        self._overhead = FadingMean(_HALF_LIFE_S)  # of a step, beside stages and hops

    def joined(self, worker: WorkerId, probe: Capabilities) -> None:
        """Add a worker, with the probe of its machine as all that is known."""
        prior = Prior.from_capabilities(probe, self._cost, self._item_bytes)
        self._probes[worker] = _ProbeHistory(WorkerSpeed(prior))
        self._speeds[worker] = self._probes[worker].add(prior)
        self._shares[worker] = probe.shares
        self._overflows.pop(worker, None)
        if (overflow := Overflow.of(probe)) is not None:
            self._overflows[worker] = overflow

    def remeasured(self, worker: WorkerId, probe: Capabilities) -> None:
        """Learn from a new probe of a worker without layers.

        The first probe after its last task is the reference for its measured speed. If later probes
        differ much from it, the speed is expected to differ likewise, until tasks show.
        """
        if worker not in self._speeds:
            return
        if worker not in self._probes:
            self._probes[worker] = _ProbeHistory(self._speeds[worker])
        prior = Prior.from_capabilities(probe, self._cost, self._item_bytes)
        self._speeds[worker] = self._probes[worker].add(prior)

    def untried(self, worker: WorkerId) -> bool:
        """Return whether only probes are known of a worker."""
        speed = self._speeds.get(worker)
        return speed is not None and not speed.measured

    def tried(
        self,
        worker: WorkerId,
        held: LayerRange,
        trials: Sequence[StageTrial],
        *,
        now: float,
        away_s: float = 0.0,
    ) -> None:
        """Learn from the trials of a worker on its new layers.

        Args:
            worker: that tried them.
            held: its layers.
            trials: none if it has tried nothing.
            now: clock seconds.
            away_s: see `PipelineStage`.
        """
        speed = self._speeds.get(worker)
        if speed is None or not trials:
            return
        self._probes.pop(worker, None)
        speed.try_out(
            trials,
            layers=self._length(held),
            source_layers=self._length(held, reading=True),
            is_last=held.stop == self._cost.num_layers,
            now=now,
            away_s=away_s,
        )

    def left(self, worker: WorkerId) -> None:
        """Forget a worker that is gone."""
        self._speeds.pop(worker, None)
        self._probes.pop(worker, None)
        self._shares.pop(worker, None)
        self._overflows.pop(worker, None)
        self._network.forget(worker)

    def observe(
        self, stages: Sequence[PipelineStage], done: StepDone, *, now: float
    ) -> list[float | None]:
        """Learn the times of the stages from a step, and upper bounds of the links.

        Args:
            stages: of the pipeline; the first ones may have had no part in the step.
            done: the step.
            now: clock seconds.

        Returns:
            The seconds that were expected of each stage before; None where nothing was.
        """
        skipped, stages = done.first, stages[done.first :]
        inside_us = sum(timing.compute_us + timing.queued_us for timing in done.timings)
        outside_s = max(0.0, done.round_trip_s - inside_us / 1e6)
        hops_s = self._network.bound(pairwise(stage.worker for stage in stages), outside_s)
        self._overhead.add(outside_s - hops_s, now)
        work = work_of(done.step)
        expected_s = [
            self._observe_stage(stage, timing, work, now)
            for stage, timing in zip(stages, done.timings, strict=True)
        ]
        return [*[None] * skipped, *expected_s]

    def _observe_stage(
        self, stage: PipelineStage, timing: StageTime, work: Work, now: float
    ) -> float | None:
        speed = self._speeds.get(stage.worker)
        if speed is None:
            return None
        self._probes.pop(stage.worker, None)
        return speed.observe(
            work,
            layers=self._length(stage.layers, reading=work.is_source),
            is_last=stage.layers.stop == self._cost.num_layers,
            layers_s=timing.layers_us / 1e6,
            other_s=max(0, timing.compute_us - timing.layers_us) / 1e6,
            now=now,
            away_s=stage.away_s,
        )

    def observe_link(self, sender: WorkerId, receiver: WorkerId, report: LinkReport) -> None:
        """Learn the speed of a link."""
        if report.up and report.bytes_per_s is not None:
            self._network.observe(
                sender, receiver, rtt_s=report.rtt_s, bytes_per_s=report.bytes_per_s
            )

    def link(self, sender: WorkerId, receiver: WorkerId) -> tuple[float, float] | None:
        """Return latency in seconds and bytes per second of a link; None if not measured."""
        return self._network.measured(sender, receiver)

    @property
    def link_bytes_per_s(self) -> float:
        """Median bandwidth of the links."""
        return self._network.bytes_per_s

    def layer_s(self, worker: WorkerId, prompt: Work) -> float:
        """Return the seconds of a layer of mean size for prompt tokens."""
        return self._speeds[worker].layer_s(prompt)

    def error(self, worker: WorkerId) -> float | None:
        """Return the relative error of predictions of a worker's tasks, None if unknown."""
        speed = self._speeds.get(worker)
        return speed.error if speed else None

    def doubt(self, worker: WorkerId) -> float:
        """Return the relative error to reckon with; see `WorkerSpeed.doubt`."""
        speed = self._speeds.get(worker)
        return speed.doubt if speed else 0.0

    def machines(self, memory_bytes: Mapping[WorkerId, int]) -> Machines:
        """Return an immutable copy for planning, of the workers in `memory_bytes`."""
        speeds = {worker: self._speeds[worker].snapshot() for worker in memory_bytes}
        links = self._network.snapshot().links
        shares = {worker: self._shares.get(worker, "") for worker in memory_bytes}
        overflows = {
            worker: own for worker, own in self._overflows.items() if worker in memory_bytes
        }
        overhead_s = self._overhead.value or 0.0
        return Machines(dict(memory_bytes), speeds, links, overhead_s, shares, overflows)

    def _length(self, layers: LayerRange, *, reading: bool = False) -> float:
        """Return how many layers of mean size have to do with a step.

        Args:
            layers: of the stage.
            reading: whether the step reads sources of an encoder-decoder. If so, there are 0 if the
                stage has no encoder layer: nothing about those is to be learned from the little
                that decoder layers do.
        """
        length = self._lengths.get((layers, reading))
        if length is None:
            sizes = self._cost.source_bytes if reading else self._cost.answer_bytes
            if reading and layers.start >= self._cost.encoder_layers:
                sizes = ()
            length = sum(sizes[layers.start : layers.stop]) / self._mean_bytes
            self._lengths[layers, reading] = length
        return length


class _ProbeHistory:
    """The probes of an idle machine since its last task, and the speed that follows from them.

    Args:
        speed: of the worker, learned from its tasks before.
    """

    def __init__(self, speed: WorkerSpeed) -> None:
        self._speed = speed
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
        if not self._speed.measured:
            return WorkerSpeed(self._level)
        return self._speed.rescaled(_token_s(self._level) / _token_s(self._first))


def _token_s(prior: Prior) -> float:
    """Return the seconds of a layer for one token."""
    return prior.layer_s + prior.token_s
