"""The steps in flight of one pipeline: their tasks, results and leases. Pure.

A step is sent to the first stage as a task that carries its route (`routes.py`). A stage passes it
on to the next one directly where it can, and through the coordinator where it cannot; the last
stage sends its result to the coordinator. No more steps are in flight than the credits that every
stage granted.

Every step has a lease, which is renewed by each result and by progress that stages report. When a
lease runs out, a newer step comes past an older one, a link breaks or a stage fails, all steps in
flight are abandoned: later tasks carry the number of the oldest step that is not (`oldest`), and
stages drop older ones. Only time is lost, because tasks are idempotent. If a lease runs out again
before any step has ended, the worker that has the step is given up.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from distributed_llm.common.messages import (
    StageTime,
    Task,
    TaskFailed,
    TaskResult,
    TokenLogprobs,
)
from distributed_llm.common.tensors import (
    Frame,
    TensorSpec,
    frame_of_masks,
    frame_of_token_ids,
    token_ids_of_frame,
)
from distributed_llm.common.types import Epoch, PeerId, StepNumber
from distributed_llm.coordinator.model import ServedModel
from distributed_llm.coordinator.plan import PipelineStage
from distributed_llm.coordinator.serving.routes import Route, Routes
from distributed_llm.coordinator.serving.step import (
    FloatVector,
    Step,
    embedding_sums,
    token_logprobs,
    wrong_activations,
    wrong_tokens,
)
from distributed_llm.coordinator.serving.to_forget import Forgotten, ToForget, joined

FOREIGN_RESULT = "foreign_result"
"""Counter of results of steps that were never begun, or that another stage runs."""


@dataclass(frozen=True)
class SendTask:
    """Outcome: send a task to the worker at `peer`."""

    peer: PeerId
    task: Task
    frames: tuple[Frame, ...]


@dataclass(frozen=True)
class StepDone:
    """Outcome: all stages have run a step.

    Attributes:
        token_ids: the sampled tokens, one for each slice that samples.
        logprobs: one for each slice that samples; None where none were asked for.
        timings: one for each stage that it passed.
        depth: steps in flight when this one began, itself included.
        round_trip_s: from beginning to end.
        sums: of hidden states, one for each slice that embeds.
        first: index of the first stage that it passed; all after it follow.
    """

    step: Step
    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    timings: tuple[StageTime, ...]
    depth: int
    round_trip_s: float
    sums: list[FloatVector] = field(default_factory=list)
    first: int = 0


@dataclass(frozen=True)
class StepBroken:
    """Outcome: a stage could not run a step, or sent a wrong result.

    Attributes:
        failure: as the worker sent it, or made here to say what was wrong with its result.
    """

    step: Step
    failure: TaskFailed


@dataclass(frozen=True)
class Dropped:
    """Outcome: the message is about no step in flight.

    Attributes:
        reason: name of the counter to increase.
    """

    reason: str


@dataclass
class _StepInFlight:
    """A step in flight, and how far it has come.

    Attributes:
        ids: token ids of the step, as a tensor.
        masks: of the step, as a tensor; None if it has none.
        forgotten: what its task has the stages forget, and no earlier one did.
        said: all that its task has them forget.
        route: of the whole pipeline.
        first: index of the stage where it began.
        stage: index of the last stage that it was sent to by the coordinator.
        depth: steps in flight when it began, itself included.
        deadline: when its lease runs out, clock seconds.
    """

    number: StepNumber
    step: Step
    ids: tuple[TensorSpec, Frame]
    masks: tuple[TensorSpec, Frame] | None
    forgotten: Forgotten
    said: Forgotten
    route: Route
    first: int
    stage: int
    depth: int
    began_at: float
    deadline: float


class StepsInFlight:
    """The steps in flight of one pipeline.

    Args:
        epoch: number of the plan.
        stages: the stages of the plan, in the order of the layers.
        credits: tasks that every stage has granted.
        model: the model that they serve, which determines the tensors of their results.
        task_timeout_s: length of a lease.
        to_forget: what these stages are to forget from the first task on.

    Attributes:
        to_forget: what no task has said yet.
    """

    def __init__(
        self,
        epoch: Epoch,
        stages: Sequence[PipelineStage],
        *,
        credits: int,
        model: ServedModel,
        task_timeout_s: float,
        to_forget: ToForget | None = None,
    ) -> None:
        self.epoch = epoch
        self.stages = tuple(stages)
        self.credits = credits
        self._index = {stage.peer: i for i, stage in enumerate(self.stages)}
        self._model = model
        self._task_timeout_s = task_timeout_s
        self._routes = Routes(len(self.stages) - 1)
        self.to_forget = to_forget or ToForget()
        self._flights: dict[StepNumber, _StepInFlight] = {}
        # Where steps begin that decode: before are stages with layers of an encoder alone.
        self._first = sum(s.layers.stop <= model.cost.encoder_layers for s in self.stages)
        self._passed = self._nothing_passed()
        self._next_step = self._oldest = StepNumber(1)

    @property
    def num_steps(self) -> int:
        """Number of steps in flight."""
        return len(self._flights)

    @property
    def holds_new_steps(self) -> bool:
        """Whether no step may begin before those in flight have ended.

        True when a link is up that they do not use: a step that used it would overtake them.
        """
        return self._routes.may_overtake(self._routes_in_flight())

    @property
    def next_step(self) -> StepNumber:
        """Number of the step that begins next."""
        return self._next_step

    @property
    def num_chunks(self) -> int:
        """Number of steps in flight with prefill chunks."""
        return sum(not flight.step.decodes for flight in self._flights.values())

    @property
    def steps(self) -> list[Step]:
        """The steps in flight, oldest first."""
        return [flight.step for flight in self._flights.values()]

    def set_link(self, peer: PeerId, up: bool) -> bool:
        """Record whether the stage at `peer` reaches the next one directly.

        Returns:
            Whether steps in flight may be lost: the link was up and is no longer.
        """
        stage = self._index.get(peer, len(self.stages))
        if stage >= len(self.stages) - 1:
            return False
        return self._routes.set_link(stage, up) and bool(self._flights)

    def begin(self, step: Step, *, now: float) -> SendTask:
        """Begin a step: return its task for the first stage."""
        ids = frame_of_token_ids(step.token_ids)
        depth = len(self._flights) + 1
        deadline = now + self._task_timeout_s
        first = 0 if step.is_source else self._first
        # Steps that begin elsewhere may come later to a stage than this one, which may need the
        # room that they free.
        beside = joined(one.forgotten for one in self._flights.values() if one.first != first)
        forgotten = self.to_forget.take(beside)
        flight = _StepInFlight(
            number=self._next_step,
            step=step,
            ids=ids,
            masks=frame_of_masks(step.masks) if step.masks else None,
            forgotten=forgotten,
            said=joined([beside, forgotten]),
            route=self._routes.choose(self._routes_in_flight()),
            first=first,
            stage=first,
            depth=depth,
            began_at=now,
            deadline=deadline,
        )
        self._next_step = StepNumber(self._next_step + 1)
        self._flights[flight.number] = flight
        return self._task(flight, [ids], ())

    def abandon(self) -> list[Step]:
        """Give up all steps in flight and return them; results of them will be dropped."""
        steps = self.steps
        for flight in self._flights.values():
            self.to_forget.put_back(flight.forgotten)
        self._flights.clear()
        self._oldest = self._next_step
        self._passed = self._nothing_passed()
        return steps

    def _nothing_passed(self) -> dict[int, list[int]]:
        """Return, by where steps begin, the newest that is known to have left each stage: none."""
        return {first: [0] * len(self.stages) for first in {0, self._first}}

    def result(
        self, peer: PeerId, result: TaskResult, frames: tuple[Frame, ...], *, now: float
    ) -> StepDone | SendTask | StepBroken | Dropped:
        """Take a stage's result of a task.

        Args:
            frames: token ids (and log-probabilities) of the last stage, or activations of another
                one that did not pass them on.
        """
        stage, flight = self._expected(peer, result)
        firsts = {0, self._first} if flight is None else {flight.first}
        if stage is None or stage + 1 - len(result.timings) not in firsts:
            return Dropped(FOREIGN_RESULT)
        if flight is None or stage < flight.stage:
            return Dropped("late_result")
        last = stage == len(self.stages) - 1
        wrong = (
            wrong_tokens(flight.step, result.tensors, frames, self._model)
            if last
            else wrong_activations(flight.step, result.tensors, self._model)
        )
        if wrong:
            failure = TaskFailed(
                epoch=self.epoch, step=flight.number, code="shape_mismatch", message=wrong
            )
            return self._break(flight, failure)
        passed = self._passed[flight.first]
        passed[: stage + 1] = [max(flight.number, newest) for newest in passed[: stage + 1]]
        if last:
            return self._done(flight, result, frames, now)
        flight.stage = stage + 1
        flight.deadline = now + self._task_timeout_s
        return self._task(flight, [flight.ids, (result.tensors[0], frames[0])], result.timings)

    def failed(self, peer: PeerId, failure: TaskFailed) -> StepBroken | Dropped:
        """Take a stage's report that it could not run a task."""
        stage, flight = self._expected(peer, failure)
        if stage is None:
            return Dropped(FOREIGN_RESULT)
        return self._break(flight, failure) if flight else Dropped("late_result")

    def progress(self, peer: PeerId, age_s: float, *, now: float) -> None:
        """Renew the leases of steps that the worker at `peer` may have.

        Args:
            age_s: how long ago it made progress.
        """
        stage = self._index.get(peer, -1)
        for flight in self._flights.values():
            if flight.stage <= stage:
                flight.deadline = max(flight.deadline, now - age_s + self._task_timeout_s)

    def next_deadline(self) -> float | None:
        """Return when the next lease runs out, clock seconds, or None."""
        return min((flight.deadline for flight in self._flights.values()), default=None)

    @property
    def has_overtaken(self) -> bool:
        """Whether a step came past an older one, which is lost: on a route they keep their order.

        But steps that begin at a later stage come past those that began before it.

        Progress on newer steps renews its lease for as long as there are any.
        """
        oldest = next(iter(self._flights.values()), None)
        return oldest is not None and oldest.number < self._passed[oldest.first][oldest.stage]

    def overtaken(self) -> PeerId | Literal["abandon"]:
        """Return what to do about a step that was overtaken; as for `expire`.

        While steps are relayed at every hop, its worker got it and has let a newer one pass.
        """
        oldest = next(iter(self._flights.values()))
        if self._routes.relays_all and not any(oldest.route):
            return self.stages[oldest.stage].peer
        self._routes.suspect()
        return "abandon"

    def expire(self, *, now: float) -> PeerId | Literal["abandon"] | None:
        """End the leases that have run out; return what to do about them, None if none has.

        Returns:
            "abandon": abandon all steps. An address: give up the worker there.
        """
        late = [flight for flight in self._flights.values() if flight.deadline <= now]
        if not late:
            return None
        if self._routes.suspected:
            return self.stages[late[0].stage].peer
        self._routes.suspect()
        return "abandon"

    def _task(
        self,
        flight: _StepInFlight,
        tensors: Sequence[tuple[TensorSpec, Frame]],
        timings: tuple[StageTime, ...],
    ) -> SendTask:
        tensors = [*tensors, flight.masks] if flight.masks else tensors
        task = Task(
            epoch=self.epoch,
            step=flight.number,
            oldest=self._oldest,
            sequences=flight.step.slices,
            tensors=tuple(spec for spec, _ in tensors),
            released=flight.said.released,
            seen_from=flight.said.seen_from,
            route=flight.route[flight.stage :],
            timings=timings,
        )
        frames = tuple(frame for _, frame in tensors)
        return SendTask(self.stages[flight.stage].peer, task, frames)

    def _routes_in_flight(self) -> list[Route]:
        return [flight.route for flight in self._flights.values()]

    def _done(
        self, flight: _StepInFlight, result: TaskResult, frames: tuple[Frame, ...], now: float
    ) -> StepDone:
        del self._flights[flight.number]
        self._routes.step_ended()
        return StepDone(
            step=flight.step,
            token_ids=token_ids_of_frame(frames[0]) if flight.step.num_samples else [],
            logprobs=token_logprobs(flight.step, result.tensors, frames),
            timings=result.timings,
            depth=flight.depth,
            round_trip_s=now - flight.began_at,
            sums=embedding_sums(flight.step, frames),
            first=flight.first,
        )

    def _expected(
        self, peer: PeerId, report: TaskResult | TaskFailed
    ) -> tuple[int | None, _StepInFlight | None]:
        """Return the stage that reports, and its step.

        No stage for what is not of this pipeline, or of a step that was never begun.
        """
        stage = self._index.get(peer)
        was_begun = 1 <= report.step < self._next_step
        if stage is None or report.epoch != self.epoch or not was_begun:
            return None, None
        return stage, self._flights.get(report.step)

    def _break(self, flight: _StepInFlight, failure: TaskFailed) -> StepBroken:
        del self._flights[flight.number]
        self.to_forget.put_back(flight.forgotten)
        return StepBroken(flight.step, failure)

    def validate(self) -> None:
        """Assert the invariants; tests call this after every step."""
        assert len(self._flights) <= self.credits
        for number, flight in self._flights.items():
            assert flight.number == number
            assert self._oldest <= number < self._next_step
            assert 0 <= flight.stage < len(self.stages)
