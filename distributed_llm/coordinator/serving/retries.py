"""Retries: requests whose steps fail are computed again, then alone, then given up. Pure.

A step that fails, or is lost with its worker, makes all its requests suspects. A suspect runs in
steps of its own, so that the request which breaks the stages is found and no other fails with it.
The scheduler clears a request of suspicion when it has got its next token.
"""

from collections.abc import Iterable

from distributed_llm.common.errors import StageError, WorkerLost
from distributed_llm.common.messages import TaskFailed
from distributed_llm.common.types import WorkerId
from distributed_llm.coordinator.events import Action, Log
from distributed_llm.coordinator.requests.lifecycle import RequestState
from distributed_llm.coordinator.serving.event_log import EventKind, EventLog
from distributed_llm.coordinator.serving.request_book import RequestBook
from distributed_llm.coordinator.serving.scheduler import Scheduler
from distributed_llm.coordinator.serving.step import Step

_MAX_LOSSES = 3
"""Workers that may die over a request before its next token; then it is given up."""

_MAX_FAILURES = 2
"""Failed steps in a row after which a request is given up."""

_MAX_MISSING = 3
"""The same, for steps that failed because a stage lacked positions."""


def step_broken(
    book: RequestBook,
    event_log: EventLog,
    scheduler: Scheduler,
    step: Step,
    failure: TaskFailed,
    worker: WorkerId,
) -> list[Action]:
    """Suspect the requests of a step that a stage could not run; fail those that failed too often.

    If the stage lacks positions of some sequences, only their requests are suspected, and all their
    tokens computed again. Call this before the step is abandoned, while it is known which of its
    sequences are current.

    Args:
        scheduler: of the pipeline that ran the step.
        worker: the one that answered `failure`.
    """
    missing = {m.sequence_id for m in failure.missing}
    missing &= {part.sequence_id for part in step.slices}
    actions: list[Action] = [
        Log(f"worker {worker} failed a step: {failure.code}: {failure.message}", "warning")
    ]
    for request, part in zip(step.requests, step.slices, strict=True):
        if request.sequence_id != part.sequence_id or request.state is not RequestState.RUNNING:
            continue
        if missing:
            if part.sequence_id not in missing:
                continue
            scheduler.restart(request)
        request.failures += 1
        request.alone = True
        event_log.trace(
            EventKind.STEP_FAILED,
            request.ticket.key[1],
            worker=worker,
            code=failure.code,
            why=failure.message,
        )
        if request.failures >= (_MAX_MISSING if missing else _MAX_FAILURES):
            error = StageError(
                f"Worker {worker} failed on this request {request.failures} times: "
                f"{failure.message} Look into the worker's log."
            )
            actions += book.fail(request.ticket.key, error)
    return actions


def steps_lost(
    book: RequestBook, event_log: EventLog, steps: Iterable[Step], worker: WorkerId
) -> list[Action]:
    """Suspect the requests of steps that were lost with a worker; fail those lost too often.

    The first loss is taken for chance; after the second in a row a request runs alone.
    """
    requests = {request: None for step in steps for request in step.requests}
    actions: list[Action] = []
    for request in requests:
        request.losses += 1
        event_log.trace(EventKind.STEP_LOST, request.ticket.key[1], worker=worker)
        request.alone = request.losses > 1
        if request.losses >= _MAX_LOSSES:
            error = WorkerLost(
                f"{request.losses} workers in a row died while they worked on this "
                f"request, the last one {worker}. It is not tried again."
            )
            actions += book.fail(request.ticket.key, error)
    return actions
