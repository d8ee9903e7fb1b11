"""Retries: answers whose steps fail are computed again, in smaller groups, then given up. Pure.

A step that fails makes its answers suspects: those that the worker names, else all. They run again
in two halves, each in steps of its own, until the answer that breaks the stages is found; no other
fails with it. A worker that dies costs more than a step, so answers that were lost with two run one
by one. The scheduler clears an answer of suspicion when it has got its next token.
"""

from collections.abc import Iterable

from distributed_llm.common.errors import InvalidRequest, StageError, WorkerLost
from distributed_llm.common.messages import TaskFailed
from distributed_llm.common.types import WorkerId
from distributed_llm.coordinator.events import Action, Log
from distributed_llm.coordinator.requests.answer_states import AnswerState
from distributed_llm.coordinator.requests.request import Suspects
from distributed_llm.coordinator.serving.event_log import EventKind, EventLog
from distributed_llm.coordinator.serving.request_book import RequestBook
from distributed_llm.coordinator.serving.scheduler import Scheduler
from distributed_llm.coordinator.serving.step import Step

_MAX_LOSSES = 3
"""Workers lost in a row over one token of an answer, after which its request fails."""

_MAX_FAILURES = 2
"""Failures in a row that are for certain because of an answer, after which its request fails."""

_MAX_MISSING = 3
"""Failures in a row for lack of positions in a KV cache, after which a request fails."""


def step_broken(
    book: RequestBook,
    event_log: EventLog,
    scheduler: Scheduler,
    step: Step,
    failure: TaskFailed,
    worker: WorkerId,
) -> list[Action]:
    """Suspect the answers in a step that a stage could not run; end those that failed too often.

    If the stage names sequences, only their answers are suspected. Those of which it lacks
    positions compute all their tokens again, and those whose parameters allow no token are ended.
    Call this before the step is abandoned, while it is known which of its sequences are current.

    Args:
        scheduler: of the pipeline that ran the step.
        worker: the one that reported `failure`.
    """
    answers = {
        part.sequence_id: answer
        for answer, part in zip(step.answers, step.slices, strict=True)
        if answer.sequence_id == part.sequence_id and answer.state is AnswerState.RUNNING
    }
    in_step = {part.sequence_id for part in step.slices}
    missing = {lack.sequence_id for lack in failure.missing} & in_step
    named = missing or set(failure.sequence_ids) & in_step
    suspects = [answer for key, answer in answers.items() if not named or key in named]
    actions: list[Action] = [
        Log(f"worker {worker} failed a step: {failure.code}: {failure.message}", "warning")
    ]
    for answer in suspects:
        if missing:
            scheduler.restart(answer)
        if named or len(in_step) == 1:
            answer.failures += 1
        event_log.trace(
            EventKind.STEP_FAILED,
            answer.request.key[1],
            worker=worker,
            code=failure.code,
            why=failure.message,
        )
    half = (len(suspects) + 1) // 2
    for group in (suspects[:half], suspects[half:]):
        together = Suspects()
        for answer in group:
            answer.suspects = together
    for answer in suspects:
        if named and failure.code == InvalidRequest.code:
            actions += book.fail(answer.request.key, InvalidRequest(failure.message))
        elif answer.failures >= (_MAX_MISSING if missing else _MAX_FAILURES):
            error = StageError(
                f"Worker {worker} failed on this request {answer.failures} times: "
                f"{failure.message} Look into the worker's log."
            )
            actions += book.fail(answer.request.key, error)
    return actions


def steps_lost(
    book: RequestBook, event_log: EventLog, steps: Iterable[Step], worker: WorkerId
) -> list[Action]:
    """Suspect the answers in steps that were lost with a worker; end those lost too often.

    The first loss is taken for chance; after the second in a row an answer runs alone.
    """
    answers = {answer: None for step in steps for answer in step.answers}
    actions: list[Action] = []
    for answer in answers:
        answer.losses += 1
        event_log.trace(EventKind.STEP_LOST, answer.request.key[1], worker=worker)
        answer.suspects = Suspects() if answer.losses > 1 else None
        if answer.losses >= _MAX_LOSSES:
            error = WorkerLost(
                f"{answer.losses} workers in a row died while they worked on this "
                f"request, the last one {worker}. It is not tried again."
            )
            actions += book.fail(answer.request.key, error)
    return actions
