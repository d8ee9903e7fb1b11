"""Handles the ends of steps: results, failures, leases that run out, links that break. Pure."""

from collections.abc import Callable
from typing import Literal, assert_never

from distributed_llm.common.messages import NOT_SERVED, LinkReport, TaskFailed, TaskResult
from distributed_llm.common.tensors import Frame
from distributed_llm.common.types import Epoch, PeerId
from distributed_llm.coordinator.cluster.cluster import Cluster
from distributed_llm.coordinator.cluster.moves import Moves
from distributed_llm.coordinator.cluster.rebalancing import Rebalancing
from distributed_llm.coordinator.cluster.worker import Worker
from distributed_llm.coordinator.events import Action
from distributed_llm.coordinator.serving.event_log import EventKind
from distributed_llm.coordinator.serving.pipeline import Pipeline, sending
from distributed_llm.coordinator.serving.retries import step_broken
from distributed_llm.coordinator.serving.steps import Dropped, SendTask, StepBroken, StepDone
from distributed_llm.coordinator.tracing import trace_step


class Stepping:
    """Handles results, failures and leases of the steps in flight, and reports of links.

    Args:
        give_up: called with a worker that is of no use, why, and the time.
        of_no_use: called with a worker whose report nobody waits for, the name of the counter of
            such reports, and the time.
    """

    def __init__(
        self,
        cluster: Cluster,
        moves: Moves,
        rebalancing: Rebalancing,
        *,
        give_up: Callable[[PeerId, str, float], list[Action]],
        of_no_use: Callable[[Worker, str, float], list[Action]],
    ) -> None:
        self._cluster = cluster
        self._pipelines = cluster.pipelines
        self._book = cluster.book
        self._log = cluster.event_log
        self._moves = moves
        self._rebalancing = rebalancing
        self._give_up = give_up
        self._of_no_use = of_no_use
        self._leases_at: float | None = None  # no lease runs out earlier

    def began(self, *, now: float) -> None:
        """Watch the leases of steps that were begun."""
        if self._leases_at is None:
            self._leases_at = now + self._cluster.settings.task_timeout_s

    def result(
        self, worker: Worker, result: TaskResult, frames: tuple[Frame, ...], *, now: float
    ) -> list[Action]:
        """Take a result: send the step to the next stage, or take its tokens if it is done."""
        pipeline = self._pipeline_at(worker, result.epoch)
        if pipeline is None:
            return self._of_no_use(worker, "stale_epoch", now)
        if pipeline.in_flight is None or pipeline.scheduler is None:
            return []
        outcome = pipeline.in_flight.result(worker.peer, result, frames, now=now)
        overtaken = pipeline.in_flight.has_overtaken
        match outcome:
            case SendTask():
                return self._overtaken(pipeline, now) if overtaken else [sending(outcome)]
            case StepDone():
                are_current = pipeline.scheduler.complete(outcome.step, outcome.sums)
                pipeline.observe(outcome, now=now)
                self._rebalancing.observe(pipeline, outcome, now=now)
                predicted_s = self._cluster.measurements.observe(pipeline.stages, outcome, now=now)
                pipeline.meter.observe(outcome, predicted_s, now=now)
                self._count(pipeline, outcome)
                trace_step(self._cluster, pipeline, outcome, now=now)
                actions = self._book.step_done(outcome, are_current, now=now)
                return [*actions, *self._overtaken(pipeline, now)] if overtaken else actions
            case StepBroken():
                return self._broken(pipeline, outcome, worker)
            case Dropped():
                return self._of_no_use(worker, outcome.reason, now)
            case _:
                assert_never(outcome)

    def failed(self, worker: Worker, failed: TaskFailed, *, now: float) -> list[Action]:
        """Retry the answers in a step that a stage could not run."""
        pipeline = self._pipeline_at(worker, failed.epoch)
        if pipeline is None:
            return self._of_no_use(worker, "stale_epoch", now)
        if pipeline.in_flight is None:
            return []
        outcome = pipeline.in_flight.failed(worker.peer, failed)
        if isinstance(outcome, Dropped):
            return self._of_no_use(worker, outcome.reason, now)
        if failed.code == NOT_SERVED:
            return self._give_up(worker.peer, "serves another plan", now)
        return self._broken(pipeline, outcome, worker)

    def link_report(self, worker: Worker, report: LinkReport) -> list[Action]:
        """Use the link from a stage to the next one if it is up, else relay results past it."""
        loading = self._moves.loading(report.epoch)
        pipeline = loading or self._pipelines.pipeline_of(worker.peer)
        if pipeline is None or pipeline.epoch != report.epoch:
            self._log.rejected["stale_epoch"] += 1
            return []
        pipeline.set_link(worker.peer, report.up)
        following = pipeline.following(worker.peer)
        if following is not None:
            measurements = self._cluster.measurements
            measurements.observe_link(worker.id, following.worker, report)
        if loading is not None and self._pipelines.pipeline_of(worker.peer) is not loading:
            return []  # the pipeline that it serves has another link
        link: Literal["direct", "relayed"] = "direct" if report.up else "relayed"
        if link == worker.link:
            return []
        worker.link = link
        if report.up:
            return [self._log.note(EventKind.LINK_DIRECT, worker=worker.id, rtt_s=report.rtt_s)]
        return [self._log.note(EventKind.LINK_RELAYED, worker=worker.id)]

    def next_deadline(self) -> float | None:
        """Return when to look at the leases, clock seconds."""
        return self._leases_at

    def on_timer(self, *, now: float) -> list[Action]:
        """Handle leases that have run out, if any may have."""
        if self._leases_at is None or self._leases_at > now:
            return []
        actions: list[Action] = []
        for pipeline in self._pipelines.loaded:
            if pipeline.in_flight is None:
                continue  # it lost a worker that was given up in this loop
            due = pipeline.in_flight.expire(now=now)
            if due is not None:
                actions += self._lost(pipeline, due, now)
        leases = (
            pipeline.in_flight.next_deadline()
            for pipeline in self._pipelines.loaded
            if pipeline.in_flight
        )
        self._leases_at = min((at for at in leases if at is not None), default=None)
        return actions

    def _overtaken(self, pipeline: Pipeline, now: float) -> list[Action]:
        """Handle the loss of a step that a newer one came past."""
        assert pipeline.in_flight is not None
        return self._lost(pipeline, pipeline.in_flight.overtaken(), now)

    def _lost(
        self, pipeline: Pipeline, due: PeerId | Literal["abandon"], now: float
    ) -> list[Action]:
        """Compute steps again, or give up the worker at `due` that made no progress on one."""
        if due != "abandon":
            return self._give_up(due, "made no progress on a task", now)
        pipeline.abandon_steps()
        return [self._log.note(EventKind.STEPS_STUCK, epoch=pipeline.epoch)]

    def _broken(self, pipeline: Pipeline, broken: StepBroken, worker: Worker) -> list[Action]:
        """Suspect the answers in a broken step, and abandon all steps in flight."""
        scheduler = pipeline.scheduler
        assert scheduler is not None
        actions = step_broken(
            self._book, self._log, scheduler, broken.step, broken.failure, worker.id
        )
        scheduler.abandon(broken.step)
        pipeline.abandon_steps()
        return actions

    def _pipeline_at(self, worker: Worker, epoch: Epoch) -> Pipeline | None:
        pipeline = self._pipelines.pipeline_of(worker.peer)
        return pipeline if pipeline and pipeline.epoch == epoch else None

    def _count(self, pipeline: Pipeline, done: StepDone) -> None:
        hops, step = len(done.timings) - 1, done.step
        model = self._cluster.model
        each_bytes = model.source_bytes if step.is_source else model.activation_bytes
        sent_bytes = hops * len(step.token_ids) * each_bytes
        self._book.totals.count_step(sent_bytes, decodes=step.decodes)
        tokens = len(step.slices) if step.decodes else 0
        for stage, timing in zip(pipeline.stages[done.first :], done.timings, strict=True):
            worker = self._cluster.registry.worker(stage.peer)
            if worker is not None:
                worker.count_task(timing.compute_us / 1e6, tokens)
        for answer in done.step.answers:
            answer.stage_times.add(pipeline.epoch, pipeline.stages, done.timings, done.first)
