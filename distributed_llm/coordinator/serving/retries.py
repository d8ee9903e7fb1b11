"""Requests over which steps fail: computed again, alone if that may help, or given up. Pure.

A request that got its next token is cleared; the scheduler does that.
"""

from collections.abc import Iterable

from distributed_llm.common.errors import StageError, WorkerLost
from distributed_llm.common.messages import TaskFailed
from distributed_llm.common.types import WorkerId
from distributed_llm.coordinator.events import Action, Log
from distributed_llm.coordinator.requests.request import Phase
from distributed_llm.coordinator.serving.request_book import RequestBook
from distributed_llm.coordinator.serving.scheduler import Scheduler, Step

_MAX_LOSSES = 3
_MAX_FAILURES = 2
_MAX_MISSING = 3


def step_broken(
    book: RequestBook, scheduler: Scheduler, step: Step, failure: TaskFailed, worker: WorkerId
) -> list[Action]:
    """A stage could not run a step: suspect its requests, give up the worst.

    If the stage lacks positions of some of them, only these are suspected, and begin anew. Call it
    before the step is abandoned: then it is known which of its sequences still count.

    Args:
        scheduler: of the pipeline.
    """
    missing = {m.sequence_id for m in failure.missing}
    missing &= {part.sequence_id for part in step.slices}
    actions: list[Action] = [
        Log(f"worker {worker} failed a step: {failure.code}: {failure.message}", "warning")
    ]
    for request, part in zip(step.requests, step.slices, strict=True):
        if request.sequence_id != part.sequence_id or request.phase is not Phase.RUNNING:
            continue
        if missing:
            if part.sequence_id not in missing:
                continue
            scheduler.restart(request)
        request.failures += 1
        request.alone = True
        if request.failures >= (_MAX_MISSING if missing else _MAX_FAILURES):
            error = StageError(
                f"Worker {worker} failed on this request {request.failures} times: "
                f"{failure.message} Look into the worker's log."
            )
            actions += book.fail(request.ticket.key, error)
    return actions


def steps_lost(book: RequestBook, steps: Iterable[Step], worker: WorkerId) -> list[Action]:
    """A worker died over these steps: suspect their requests, give up the worst.

    The first loss is taken for bad luck; a request that was there twice runs alone.
    """
    requests = {request: None for step in steps for request in step.requests}
    actions: list[Action] = []
    for request in requests:
        request.losses += 1
        request.alone = request.losses > 1
        if request.losses >= _MAX_LOSSES:
            error = WorkerLost(
                f"{request.losses} workers in a row died while they worked on this "
                f"request, the last one {worker}. It is not tried again."
            )
            actions += book.fail(request.ticket.key, error)
    return actions
