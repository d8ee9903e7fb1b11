"""Steps on their way through the stages of one plan. Pure.

A task is sent only against a credit of its worker; every task has a lease, which the worker's
progress extends. A lease that runs out sends the task once more (tasks are idempotent, so
whichever answer comes first is right); when it runs out again the worker is given up. Sending again
costs no credit, so only the first answer to a task grants any.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from distributed_llm.common.messages import Task, TaskFailed, TaskResult
from distributed_llm.common.tensors import (
    DtypeName,
    Frame,
    TensorSpec,
    frame_of_token_ids,
    token_ids_of_frame,
)
from distributed_llm.common.types import LayerRange, PeerId
from distributed_llm.coordinator.scheduler import Step

_MAX_ATTEMPTS = 2
_MAX_CREDITS = 64


@dataclass(frozen=True)
class SendTask:
    """Action: send a task to the worker at `peer`."""

    peer: PeerId
    task: Task
    frames: tuple[Frame, ...]


@dataclass(frozen=True)
class StepDone:
    """Outcome: a step left the last stage.

    Attributes:
        token_ids: one for each of `step.sampling`.
    """

    step: Step
    token_ids: list[int]


@dataclass(frozen=True)
class StepBroken:
    """Outcome: a stage could not run a step.

    Attributes:
        failure: what the worker said.
    """

    step: Step
    failure: TaskFailed


@dataclass(frozen=True)
class Dropped:
    """Outcome: an answer that nobody waits for; `reason` is a counter's name."""

    reason: str


@dataclass
class _Stage:
    peer: PeerId
    layers: LayerRange
    credits: int
    waiting: deque[int] = field(default_factory=deque)


@dataclass
class _Travel:
    """A step on its way: the stage it is at, what that stage is given, and the lease if sent."""

    number: int
    step: Step
    stage: int
    specs: tuple[TensorSpec, ...]
    frames: tuple[Frame, ...]
    attempt: int = 0
    deadline: float | None = None


class Pipeline:
    """The stages of one plan, and the steps in them.

    Args:
        epoch: of the plan.
        stages: worker, layers and first credits of each stage, in the order of the layers.
        dtype: of what travels between stages.
        hidden_size: numbers per token between stages.
        vocab_size: token ids are below this.
        first_step: number of the first step.
        task_timeout_s: lease of a task without progress.
    """

    def __init__(
        self,
        epoch: int,
        stages: Sequence[tuple[PeerId, LayerRange, int]],
        *,
        dtype: DtypeName,
        hidden_size: int,
        vocab_size: int,
        first_step: int,
        task_timeout_s: float,
    ) -> None:
        self.epoch = epoch
        self._stages = [_Stage(*stage) for stage in stages]
        self._index = {stage.peer: i for i, stage in enumerate(self._stages)}
        self._dtype = dtype
        self._hidden_size = hidden_size
        self._vocab_size = vocab_size
        self.next_step = first_step
        self._task_timeout_s = task_timeout_s
        self._travels: dict[int, _Travel] = {}

    @property
    def steps(self) -> list[Step]:
        """The steps in flight."""
        return [travel.step for travel in self._travels.values()]

    @property
    def peers(self) -> list[PeerId]:
        """The workers of all stages, in the order of the layers."""
        return [stage.peer for stage in self._stages]

    def step_at(self, peer: PeerId, number: int) -> Step | None:
        """Return the step of this number if the worker at `peer` is computing it."""
        travel = self._travels.get(number)
        here = travel is not None and travel.stage == self._index.get(peer)
        return travel.step if travel and here and travel.deadline is not None else None

    def steps_at(self, peer: PeerId) -> list[Step]:
        """Return the steps that the worker at `peer` was given."""
        stage = self._index.get(peer)
        return [
            t.step for t in self._travels.values() if t.stage == stage and t.deadline is not None
        ]

    def begin(self, step: Step, *, now: float) -> list[SendTask]:
        """Start a step at the first stage."""
        spec, frame = frame_of_token_ids(step.token_ids)
        travel = _Travel(self.next_step, step, 0, (spec,), (frame,))
        self.next_step += 1
        self._travels[travel.number] = travel
        self._stages[0].waiting.append(travel.number)
        return self._dispatch(0, now)

    def result(
        self, peer: PeerId, answer: TaskResult, frames: tuple[Frame, ...], *, now: float
    ) -> tuple[list[SendTask], StepDone | StepBroken | Dropped | None]:
        """Take a stage's answer: on to the next stage, or done."""
        stage, travel = self._expected(peer, answer)
        if stage is None:
            return [], Dropped("foreign_result")
        if travel is None:
            return [], Dropped("late_result")
        sends = self._grant(stage, answer.credits, now)
        if stage == len(self._stages) - 1:
            wrong = self._wrong_tokens(travel, answer, frames)
        else:
            wrong = self._wrong_activations(travel, answer)
        if wrong:
            failure = TaskFailed(
                epoch=self.epoch,
                step=travel.number,
                attempt=travel.attempt,
                credits=0,
                code="shape_mismatch",
                message=wrong,
            )
            return sends, self._break(travel, failure)
        if stage == len(self._stages) - 1:
            del self._travels[travel.number]
            ids = token_ids_of_frame(frames[0]) if frames else []
            return sends, StepDone(travel.step, ids)
        travel.stage += 1
        travel.attempt = 0
        travel.deadline = None
        travel.specs = (travel.specs[0], answer.tensors[0])
        travel.frames = (travel.frames[0], frames[0])
        self._stages[travel.stage].waiting.append(travel.number)
        return sends + self._dispatch(travel.stage, now), None

    def failed(
        self, peer: PeerId, answer: TaskFailed, *, now: float
    ) -> tuple[list[SendTask], StepBroken | Dropped]:
        """Take a stage's refusal of a task."""
        stage, travel = self._expected(peer, answer)
        if stage is None:
            return [], Dropped("foreign_result")
        if travel is None:
            return [], Dropped("late_result")
        sends = self._grant(stage, answer.credits, now)
        return sends, self._break(travel, answer)

    def progress(self, peer: PeerId, age_s: float, *, now: float) -> None:
        """The worker at `peer` made progress `age_s` ago: its leases run from there."""
        stage = self._index.get(peer)
        for travel in self._travels.values():
            if travel.stage == stage and travel.deadline is not None:
                travel.deadline = max(travel.deadline, now - age_s + self._task_timeout_s)

    def next_deadline(self) -> float | None:
        """Return when the next lease runs out, clock seconds."""
        return min(
            (t.deadline for t in self._travels.values() if t.deadline is not None), default=None
        )

    def on_timer(self, *, now: float) -> tuple[list[SendTask], list[PeerId]]:
        """Return the tasks to send again, and the workers to give up."""
        sends, given_up = [], []
        for travel in self._travels.values():
            if travel.deadline is None or travel.deadline > now:
                continue
            if travel.attempt + 1 >= _MAX_ATTEMPTS:
                given_up.append(self._stages[travel.stage].peer)
            else:
                travel.attempt += 1
                sends.append(self._send(travel, now))
        return sends, given_up

    def _grant(self, stage: int, credits: int, now: float) -> list[SendTask]:
        at = self._stages[stage]
        at.credits = min(_MAX_CREDITS, at.credits + credits)
        return self._dispatch(stage, now)

    def _dispatch(self, stage: int, now: float) -> list[SendTask]:
        at = self._stages[stage]
        sends = []
        while at.waiting and at.credits:
            travel = self._travels.get(at.waiting.popleft())
            if travel is not None:
                at.credits -= 1
                sends.append(self._send(travel, now))
        return sends

    def _send(self, travel: _Travel, now: float) -> SendTask:
        travel.deadline = now + self._task_timeout_s
        task = Task(
            epoch=self.epoch,
            step=travel.number,
            attempt=travel.attempt,
            sequences=travel.step.slices,
            tensors=travel.specs,
        )
        return SendTask(self._stages[travel.stage].peer, task, travel.frames)

    def _expected(
        self, peer: PeerId, answer: TaskResult | TaskFailed
    ) -> tuple[int | None, _Travel | None]:
        stage = self._index.get(peer)
        if stage is None or answer.epoch != self.epoch:
            return None, None
        travel = self._travels.get(answer.step)
        if travel is None or travel.stage != stage or travel.deadline is None:
            return stage, None
        return stage, travel

    def _break(self, travel: _Travel, failure: TaskFailed) -> StepBroken:
        del self._travels[travel.number]
        return StepBroken(travel.step, failure)

    def _wrong_tokens(self, travel: _Travel, answer: TaskResult, frames: tuple[Frame, ...]) -> str:
        count = len(travel.step.sampling)
        wanted = (TensorSpec("int32", (count,)),) if count else ()
        if answer.tensors != wanted:
            return f"token ids {_specs(answer)}, expected {count}"
        ids = token_ids_of_frame(frames[0]) if frames else []
        strange = [token for token in ids if not 0 <= token < self._vocab_size]
        return f"token id {strange[0]} is not in the vocabulary" if strange else ""

    def _wrong_activations(self, travel: _Travel, answer: TaskResult) -> str:
        wanted = TensorSpec(self._dtype, (len(travel.step.token_ids), self._hidden_size))
        if answer.tensors == (wanted,):
            return ""
        return f"activations {_specs(answer)}, expected {wanted}"

    def validate(self) -> None:
        """Assert the invariants; tests call this after every step."""
        for stage in self._stages:
            assert 0 <= stage.credits <= _MAX_CREDITS
        for number, travel in self._travels.items():
            assert travel.number == number
            queued = number in self._stages[travel.stage].waiting
            assert queued == (travel.deadline is None)


def _specs(answer: TaskResult) -> str:
    return ", ".join(map(str, answer.tensors)) or "none"
