"""Steps on their way through the stages of one plan. Pure.

A step is handed to the first stage as a task that carries its route. Stages pass it on among
themselves where they reach each other, and through here where they do not; the last one answers.
No more steps are under way than every stage has granted credits for.

Every step has a lease, which is renewed by each answer and by the progress that stages report. When
a lease runs out, or a link breaks, or a stage fails, all steps under way are abandoned: later
tasks say so (`oldest`), and stages drop what is void. Nothing is lost by that but time, because
tasks are idempotent. After a lease ran out once, steps go through here at every hop, so that it is
known where they are; if one runs out before any has ended, the worker that holds the step is given
up. If they end it may be a link that swallows what it is given and tells nobody: links are used
again after more and more steps.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from distributed_llm.common.messages import (
    MAX_RELEASED,
    StageTime,
    Task,
    TaskFailed,
    TaskResult,
    TokenLogprobs,
)
from distributed_llm.common.tensors import (
    Frame,
    TensorSpec,
    floats_of_frame,
    frame_of_token_ids,
    token_ids_of_frame,
)
from distributed_llm.common.types import PeerId
from distributed_llm.coordinator.model import ServedModel
from distributed_llm.coordinator.plan import PipelineStage
from distributed_llm.coordinator.requests.request import Request
from distributed_llm.coordinator.serving.scheduler import Step

_RELAY_STEPS, _MAX_RELAY_STEPS = 64, 1 << 20
"""How many steps go through the coordinator after a lease ran out: at first, and at most."""


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
        token_ids: one for each slice that samples.
        logprobs: likewise, or None where none were asked for.
        timings: of each stage.
        depth: steps that were under way when this one began, itself included.
        round_trip_s: from its beginning to its end.
    """

    step: Step
    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    timings: tuple[StageTime, ...]
    depth: int
    round_trip_s: float


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
class _Flight:
    """A step on its way.

    Attributes:
        route: of each hop, whether stages pass the step on themselves.
        stage: the last one that it is known to have been sent to.
    """

    number: int
    step: Step
    ids: tuple[TensorSpec, Frame]
    released: tuple[int, ...]
    route: tuple[bool, ...]
    stage: int
    depth: int
    began_at: float
    deadline: float


class StepsInFlight:
    """The stages of one plan, and the steps in them.

    Args:
        epoch: of the plan.
        stages: the stages, in the order of the layers.
        credits: tasks that every stage is ready to hold.
        model: what the stages compute; tells which answers have the right form.
        task_timeout_s: lease of a step without progress.
    """

    def __init__(
        self,
        epoch: int,
        stages: Sequence[PipelineStage],
        *,
        credits: int,
        model: ServedModel,
        task_timeout_s: float,
    ) -> None:
        self.epoch = epoch
        self.stages = tuple(stages)
        self.credits = credits
        self._index = {stage.peer: i for i, stage in enumerate(self.stages)}
        self._model = model
        self._task_timeout_s = task_timeout_s
        self._linked = [False] * (len(self.stages) - 1)
        self._suspected = False  # a lease ran out and nothing has come back since
        self._relay_steps = 0  # that are still to go through here at every hop
        self._next_relay_steps = _RELAY_STEPS
        self._flights: dict[int, _Flight] = {}
        self._to_release: dict[int, None] = {}
        self._next_step = 1
        self._oldest = 1

    @property
    def num_steps(self) -> int:
        """How many steps are under way."""
        return len(self._flights)

    @property
    def drains(self) -> bool:
        """Whether no step should begin before those under way have ended.

        A link is up that they do not use, and later ones must not use before them.
        """
        return not self._relay_steps and any(
            linked and not direct
            for flight in self._flights.values()
            for linked, direct in zip(self._linked, flight.route, strict=True)
        )

    @property
    def num_chunks(self) -> int:
        """How many of them compute more than one token of a sequence."""
        return sum(not flight.step.decodes for flight in self._flights.values())

    @property
    def steps(self) -> list[Step]:
        """The steps under way, oldest first."""
        return [flight.step for flight in self._flights.values()]

    def set_link(self, peer: PeerId, up: bool) -> bool:
        """A stage reaches the next one itself, or not; return whether steps may be lost by that."""
        at = self._index.get(peer, len(self.stages))
        if at >= len(self._linked):
            return False
        broken = self._linked[at] and not up
        self._linked[at] = up
        return broken and bool(self._flights)

    def release(self, sequence_ids: Iterable[int]) -> None:
        """The stages are to free these before the next step."""
        self._to_release.update(dict.fromkeys(sequence_ids))

    @property
    def to_release(self) -> list[int]:
        """Sequences to be freed that no task was told of yet."""
        return list(self._to_release)

    def begin(self, step: Step, *, now: float) -> SendTask:
        """Start a step at the first stage."""
        ids = frame_of_token_ids(step.token_ids)
        depth = len(self._flights) + 1
        deadline = now + self._task_timeout_s
        released = tuple(islice(self._to_release, MAX_RELEASED))
        for sequence_id in released:
            del self._to_release[sequence_id]
        route = self._route()
        flight = _Flight(self._next_step, step, ids, released, route, 0, depth, now, deadline)
        self._next_step += 1
        self._flights[flight.number] = flight
        return self._task(flight, (ids[0],), (ids[1],), ())

    def abandon(self) -> list[Step]:
        """Give up all steps under way and return them; what still comes of them is dropped."""
        steps = self.steps
        for flight in self._flights.values():
            self.release(flight.released)  # some stages may not have heard
        self._flights.clear()
        self._oldest = self._next_step
        return steps

    def result(
        self, peer: PeerId, answer: TaskResult, frames: tuple[Frame, ...], *, now: float
    ) -> StepDone | SendTask | StepBroken | Dropped:
        """Take a stage's answer: the step is done, or goes on to the next stage."""
        stage, flight = self._expected(peer, answer)
        if stage is None or len(answer.timings) != stage + 1:
            return Dropped("foreign_result")
        if flight is None or stage < flight.stage:
            return Dropped("late_result")
        last = stage == len(self.stages) - 1
        wrong = (
            self._wrong_tokens(flight, answer, frames)
            if last
            else self._wrong_activations(flight, answer)
        )
        if wrong:
            failure = TaskFailed(
                epoch=self.epoch, step=flight.number, code="shape_mismatch", message=wrong
            )
            return self._break(flight, failure)
        if last:
            return self._done(flight, answer, frames, now)
        flight.stage = stage + 1
        flight.deadline = now + self._task_timeout_s
        specs = (flight.ids[0], answer.tensors[0])
        return self._task(flight, specs, (flight.ids[1], frames[0]), answer.timings)

    def failed(self, peer: PeerId, answer: TaskFailed) -> StepBroken | Dropped:
        """Take a stage's refusal of a task."""
        stage, flight = self._expected(peer, answer)
        if stage is None:
            return Dropped("foreign_result")
        return self._break(flight, answer) if flight else Dropped("late_result")

    def progress(self, peer: PeerId, age_s: float, *, now: float) -> None:
        """The worker at `peer` made progress `age_s` ago: leases it may hold run from there."""
        stage = self._index.get(peer, -1)
        for flight in self._flights.values():
            if flight.stage <= stage:
                flight.deadline = max(flight.deadline, now - age_s + self._task_timeout_s)

    def next_deadline(self) -> float | None:
        """Return when the next lease runs out, clock seconds."""
        return min((t.deadline for t in self._flights.values()), default=None)

    def expired(self, *, now: float) -> PeerId | Literal["abandon"] | None:
        """Return what to do about leases that ran out: abandon all steps, or give up a worker."""
        late = [t for t in self._flights.values() if t.deadline <= now]
        if not late:
            return None
        if self._suspected:
            return self.stages[late[0].stage].peer
        self._suspected = True
        self._relay_steps = self._next_relay_steps
        self._next_relay_steps = min(2 * self._relay_steps, _MAX_RELAY_STEPS)
        return "abandon"

    def _task(
        self,
        flight: _Flight,
        specs: tuple[TensorSpec, ...],
        frames: tuple[Frame, ...],
        timings: tuple[StageTime, ...],
    ) -> SendTask:
        task = Task(
            epoch=self.epoch,
            step=flight.number,
            oldest=self._oldest,
            sequences=flight.step.slices,
            tensors=specs,
            released=flight.released,
            route=flight.route[flight.stage :],
            timings=timings,
        )
        return SendTask(self.stages[flight.stage].peer, task, frames)

    def _route(self) -> tuple[bool, ...]:
        """Return the route of a step that begins now.

        A link is used once no step is under way that is relayed there: it would be overtaken.
        See `drains`.
        """
        routes = [flight.route for flight in self._flights.values()]
        return tuple(
            linked and not self._relay_steps and all(route[hop] for route in routes)
            for hop, linked in enumerate(self._linked)
        )

    def _done(
        self, flight: _Flight, answer: TaskResult, frames: tuple[Frame, ...], now: float
    ) -> StepDone:
        del self._flights[flight.number]
        self._suspected = False
        self._relay_steps = max(0, self._relay_steps - 1)
        return StepDone(
            step=flight.step,
            token_ids=token_ids_of_frame(frames[0]) if frames else [],
            logprobs=_logprobs(flight.step, answer, frames),
            timings=answer.timings,
            depth=flight.depth,
            round_trip_s=now - flight.began_at,
        )

    def _expected(
        self, peer: PeerId, answer: TaskResult | TaskFailed
    ) -> tuple[int | None, _Flight | None]:
        stage = self._index.get(peer)
        if stage is None or answer.epoch != self.epoch:
            return None, None
        return stage, self._flights.get(answer.step)

    def _break(self, flight: _Flight, failure: TaskFailed) -> StepBroken:
        del self._flights[flight.number]
        self.release(flight.released)
        return StepBroken(flight.step, failure)

    def _wrong_tokens(self, flight: _Flight, answer: TaskResult, frames: tuple[Frame, ...]) -> str:
        count, asked = flight.step.num_samples, _asked(flight.step)
        wanted: tuple[TensorSpec, ...] = (TensorSpec("int32", (count,)),) if count else ()
        if asked is not None:
            shape = (count, 1 + asked)
            wanted += (TensorSpec("float32", shape), TensorSpec("int32", shape))
        if answer.tensors != wanted:
            return f"answers {_specs(answer.tensors)}, expected {_specs(wanted)}"
        ids = [token for frame in frames[::2] for token in token_ids_of_frame(frame)]
        strange = [token for token in ids if not 0 <= token < self._model.defaults.vocab_size]
        if asked is not None and not all(-1e9 <= x <= 1e-3 for x in floats_of_frame(frames[1])):
            return "log-probabilities out of range"
        return f"token id {strange[0]} is not in the vocabulary" if strange else ""

    def _wrong_activations(self, flight: _Flight, answer: TaskResult) -> str:
        shape = (len(flight.step.token_ids), self._model.hidden_size)
        wanted = TensorSpec(self._model.wire_dtype, shape)
        if answer.tensors == (wanted,):
            return ""
        return f"activations {_specs(answer.tensors)}, expected {wanted}"

    def validate(self) -> None:
        """Assert the invariants; tests call this after every step."""
        assert len(self._flights) <= self.credits
        for number, flight in self._flights.items():
            assert flight.number == number
            assert self._oldest <= number < self._next_step
            assert 0 <= flight.stage < len(self.stages)


def _specs(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(map(str, specs)) or "none"


def _asked(step: Step) -> int | None:
    """Return how many likeliest tokens the last stage reports for this step, or None."""
    numbers = [request.sampling.logprobs for request in _samplers(step)]
    return max((number for number in numbers if number is not None), default=None)


def _samplers(step: Step) -> list[Request]:
    pairs = zip(step.requests, step.slices, strict=True)
    return [request for request, part in pairs if part.sample]


def _logprobs(
    step: Step, answer: TaskResult, frames: tuple[Frame, ...]
) -> list[TokenLogprobs | None]:
    samplers = _samplers(step)
    if len(frames) < 3:
        return [None] * len(samplers)
    width = answer.tensors[1].shape[1]
    values, ids = floats_of_frame(frames[1]), token_ids_of_frame(frames[2])
    logprobs: list[TokenLogprobs | None] = []
    for row, request in enumerate(samplers):
        number = request.sampling.logprobs
        if number is None:
            logprobs.append(None)
            continue
        at = row * width
        top = zip(ids[at + 1 : at + 1 + number], values[at + 1 : at + 1 + number], strict=True)
        logprobs.append(TokenLogprobs(logprob=values[at], top=tuple(top)))
    return logprobs
