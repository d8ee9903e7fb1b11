"""What comes of steps: answers, failures, leases that run out. Pure."""

from collections.abc import Callable
from typing import assert_never

from distributed_llm.common.messages import TaskFailed, TaskResult
from distributed_llm.common.types import PeerId
from distributed_llm.coordinator.desk import Desk
from distributed_llm.coordinator.events import Action, Received
from distributed_llm.coordinator.journal import Journal
from distributed_llm.coordinator.measurements import Measurements
from distributed_llm.coordinator.pipeline import Dropped, SendTask, StepBroken, StepDone
from distributed_llm.coordinator.placement import Placement
from distributed_llm.coordinator.registry import Registry, Worker
from distributed_llm.coordinator.replica import Replica, sending
from distributed_llm.coordinator.suspicion import step_broken


class Stepping:
    """The steps of one cluster.

    Args:
        task_timeout_s: lease of a step without progress.
        give_up: called with a worker that made no progress on a step.
    """

    def __init__(
        self,
        placement: Placement,
        desk: Desk,
        registry: Registry,
        journal: Journal,
        measurements: Measurements,
        *,
        task_timeout_s: float,
        give_up: Callable[[PeerId, float], list[Action]],
    ) -> None:
        self._placement = placement
        self._desk = desk
        self._registry = registry
        self._journal = journal
        self._measurements = measurements
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
        replica = self._replica_at(worker, result.epoch)
        if replica is None or replica.pipeline is None or replica.scheduler is None:
            return []
        outcome = replica.pipeline.result(worker.peer, result, event.frames, now=now)
        match outcome:
            case SendTask():
                return [sending(outcome)]
            case StepDone():
                counts = replica.scheduler.complete(outcome.step)
                replica.observe(outcome, now=now)
                self._measurements.observe(replica.seats, outcome, now=now)
                self._count(replica, outcome)
                return self._desk.step_done(outcome, counts, now=now)
            case StepBroken():
                return self._broken(replica, outcome, worker)
            case Dropped():
                self._journal.rejected[outcome.reason] += 1
                return []
            case _:
                assert_never(outcome)

    def failed(self, worker: Worker, failed: TaskFailed) -> list[Action]:
        """Take a stage's refusal of a task."""
        replica = self._replica_at(worker, failed.epoch)
        if replica is None or replica.pipeline is None:
            return []
        outcome = replica.pipeline.failed(worker.peer, failed)
        if isinstance(outcome, Dropped):
            self._journal.rejected[outcome.reason] += 1
            return []
        return self._broken(replica, outcome, worker)

    def next_deadline(self) -> float | None:
        """Return when to look at the leases, clock seconds."""
        return self._leases_at

    def on_timer(self, *, now: float) -> list[Action]:
        """Look at the leases, if one may have run out."""
        if self._leases_at is None or self._leases_at > now:
            return []
        actions: list[Action] = []
        for replica in self._placement.replicas:
            if replica.pipeline is None:
                continue
            due = replica.pipeline.expired(now=now)
            if due == "abandon":
                text = f"plan {replica.epoch}: no progress; its steps are computed again"
                actions.append(self._journal.note(text, "warning"))
                replica.abandon_steps()
            elif due is not None:
                actions += self._give_up(due, now)
        pipelines = (r.pipeline for r in self._placement.replicas if r.pipeline)
        deadlines = (pipeline.next_deadline() for pipeline in pipelines)
        self._leases_at = min((at for at in deadlines if at is not None), default=None)
        return actions

    def _broken(self, replica: Replica, broken: StepBroken, worker: Worker) -> list[Action]:
        """Suspect the step's requests, and begin anew with all that was under way."""
        assert replica.scheduler is not None
        actions = step_broken(self._desk, replica.scheduler, broken.step, broken.failure, worker.id)
        replica.scheduler.abandon(broken.step)
        replica.abandon_steps()
        return actions

    def _replica_at(self, worker: Worker, epoch: int) -> Replica | None:
        replica = self._placement.replica_of(worker.peer)
        if replica is None or replica.epoch != epoch:
            self._journal.rejected["stale_epoch"] += 1
            return None
        return replica

    def _count(self, replica: Replica, done: StepDone) -> None:
        tokens = len(done.step.slices) if done.step.decodes else 0
        for seat, timing in zip(replica.seats, done.timings, strict=True):
            worker = self._registry.worker(seat.peer)
            if worker is not None:
                worker.count_task(timing.compute_us / 1e6, tokens)
        for request in done.step.requests:
            request.add_stage_times(replica.epoch, replica.seats, done.timings)
