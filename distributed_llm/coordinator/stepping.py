"""What comes of steps: answers, failures, leases that run out. Pure."""

from collections.abc import Callable
from typing import assert_never

from distributed_llm.common.messages import TaskFailed, TaskResult
from distributed_llm.common.types import PeerId
from distributed_llm.coordinator.cluster.placement import Placement
from distributed_llm.coordinator.cluster.rebalancing import Rebalancing
from distributed_llm.coordinator.cluster.registry import Registry, Worker
from distributed_llm.coordinator.events import Action, Received
from distributed_llm.coordinator.serving.event_log import EventLog
from distributed_llm.coordinator.serving.pipeline import Pipeline, sending
from distributed_llm.coordinator.serving.request_book import RequestBook
from distributed_llm.coordinator.serving.retries import step_broken
from distributed_llm.coordinator.serving.steps import Dropped, SendTask, StepBroken, StepDone
from distributed_llm.coordinator.speeds.measurements import Measurements


class Stepping:
    """The steps of one cluster.

    Args:
        task_timeout_s: lease of a step without progress.
        give_up: called with a worker that made no progress on a step.
    """

    def __init__(
        self,
        placement: Placement,
        book: RequestBook,
        registry: Registry,
        event_log: EventLog,
        measurements: Measurements,
        rebalancing: Rebalancing,
        *,
        task_timeout_s: float,
        give_up: Callable[[PeerId, float], list[Action]],
    ) -> None:
        self._placement = placement
        self._book = book
        self._registry = registry
        self._event_log = event_log
        self._measurements = measurements
        self._rebalancing = rebalancing
        self._task_timeout_s = task_timeout_s
        self._give_up = give_up
        self._leases_at: float | None = None  # no lease runs out before

    def began(self, *, now: float) -> None:
        """Steps were begun."""
        if self._leases_at is None:
            self._leases_at = now + self._task_timeout_s

    def result(
        self, worker: Worker, result: TaskResult, event: Received, *, now: float
    ) -> list[Action]:
        """Take a stage's answer."""
        pipeline = self._pipeline_at(worker, result.epoch)
        if pipeline is None or pipeline.in_flight is None or pipeline.scheduler is None:
            return []
        outcome = pipeline.in_flight.result(worker.peer, result, event.frames, now=now)
        match outcome:
            case SendTask():
                return [sending(outcome)]
            case StepDone():
                counts = pipeline.scheduler.complete(outcome.step)
                pipeline.observe(outcome, now=now)
                self._rebalancing.observe(pipeline, outcome, now=now)
                self._measurements.observe(pipeline.stages, outcome, now=now)
                self._count(pipeline, outcome)
                return self._book.step_done(outcome, counts, now=now)
            case StepBroken():
                return self._broken(pipeline, outcome, worker)
            case Dropped():
                self._event_log.rejected[outcome.reason] += 1
                return []
            case _:
                assert_never(outcome)

    def failed(self, worker: Worker, failed: TaskFailed) -> list[Action]:
        """Take a stage's refusal of a task."""
        pipeline = self._pipeline_at(worker, failed.epoch)
        if pipeline is None or pipeline.in_flight is None:
            return []
        outcome = pipeline.in_flight.failed(worker.peer, failed)
        if isinstance(outcome, Dropped):
            self._event_log.rejected[outcome.reason] += 1
            return []
        return self._broken(pipeline, outcome, worker)

    def next_deadline(self) -> float | None:
        """Return when to look at the leases, clock seconds."""
        return self._leases_at

    def on_timer(self, *, now: float) -> list[Action]:
        """Look at the leases, if one may have run out."""
        if self._leases_at is None or self._leases_at > now:
            return []
        actions: list[Action] = []
        for pipeline in self._placement.pipelines:
            if pipeline.in_flight is None:
                continue
            due = pipeline.in_flight.expired(now=now)
            if due == "abandon":
                text = f"plan {pipeline.epoch}: no progress; its steps are computed again"
                actions.append(self._event_log.note(text, "warning"))
                pipeline.abandon_steps()
            elif due is not None:
                actions += self._give_up(due, now)
        all_in_flight = (r.in_flight for r in self._placement.pipelines if r.in_flight)
        deadlines = (in_flight.next_deadline() for in_flight in all_in_flight)
        self._leases_at = min((at for at in deadlines if at is not None), default=None)
        return actions

    def _broken(self, pipeline: Pipeline, broken: StepBroken, worker: Worker) -> list[Action]:
        """Suspect the step's requests, and begin anew with all that was under way."""
        assert pipeline.scheduler is not None
        actions = step_broken(
            self._book, pipeline.scheduler, broken.step, broken.failure, worker.id
        )
        pipeline.scheduler.abandon(broken.step)
        pipeline.abandon_steps()
        return actions

    def _pipeline_at(self, worker: Worker, epoch: int) -> Pipeline | None:
        pipeline = self._placement.pipeline_of(worker.peer)
        if pipeline is None or pipeline.epoch != epoch:
            self._event_log.rejected["stale_epoch"] += 1
            return None
        return pipeline

    def _count(self, pipeline: Pipeline, done: StepDone) -> None:
        tokens = len(done.step.slices) if done.step.decodes else 0
        for stage, timing in zip(pipeline.stages, done.timings, strict=True):
            worker = self._registry.worker(stage.peer)
            if worker is not None:
                worker.count_task(timing.compute_us / 1e6, tokens)
        for request in done.step.requests:
            request.stage_times.add(pipeline.epoch, pipeline.stages, done.timings)
