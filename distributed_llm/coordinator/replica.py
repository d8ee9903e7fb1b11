"""One pipeline that serves the whole model, and the requests that run on it. Pure.

It is loading until every stage has its layers, and then keeps as many steps under way as are worth
it by the measured times of its stages: one, where stages share a machine and only slow each other
down; about as many as there are stages, where each has a machine of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass

from distributed_llm.common.messages import MAX_RELEASED, ReleaseSequences, StageReady
from distributed_llm.common.tensors import DtypeName
from distributed_llm.common.types import KV_BLOCK, PeerId
from distributed_llm.coordinator.events import Send
from distributed_llm.coordinator.performance import StageTimes
from distributed_llm.coordinator.pipeline import Pipeline, SendTask, StepDone
from distributed_llm.coordinator.planner import Plan, kv_tokens_of
from distributed_llm.coordinator.requests import Seat
from distributed_llm.coordinator.scheduler import Scheduler, Step

_WORTHWHILE = 0.9
"""Of the best speed; more chunks under way than reach it would only delay what answers."""


@dataclass(frozen=True)
class ReplicaSettings:
    """How a pipeline is run.

    Attributes:
        wire_dtype: of what travels between stages.
        max_sequences: that run at the same time.
        max_tokens: in one step.
        task_timeout_s: lease of a step without progress.
    """

    wire_dtype: DtypeName
    hidden_size: int
    vocab_size: int
    max_sequences: int
    max_tokens: int
    task_timeout_s: float


class Replica:
    """A plan that is loaded or served.

    Args:
        epoch: of the plan.
        seats: the workers of the plan, in the order of the layers.
        new_sequence_id: names that no pipeline uses twice.
        on_change: called when steps may be begun, or requests admitted, that could not before.

    Attributes:
        pipeline: None while it is loading; likewise `scheduler`.
    """

    def __init__(
        self,
        epoch: int,
        plan: Plan,
        seats: tuple[Seat, ...],
        settings: ReplicaSettings,
        new_sequence_id: Callable[[], int],
        on_change: Callable[["Replica"], None],
    ) -> None:
        self.epoch = epoch
        self.plan = plan
        self.seats = seats
        self._settings = settings
        self._new_sequence_id = new_sequence_id
        self._on_change = on_change
        self._ready: dict[PeerId, StageReady] = {}
        self._links: dict[PeerId, bool] = {}
        self._released: set[int] = set()  # said in messages, not yet in tasks
        self._decode_times = StageTimes(len(seats))
        self._prefill_times = StageTimes(len(seats))
        self.pipeline: Pipeline | None = None
        self.scheduler: Scheduler | None = None

    @property
    def kv_tokens(self) -> int:
        """Positions of KV cache that every stage has room for, as far as they have told."""
        told = (ready.kv_tokens for ready in self._ready.values())
        tokens = min((kv_tokens_of(self.plan), *told))
        return tokens - tokens % KV_BLOCK

    @property
    def load(self) -> float:
        """How long its requests wait for their tokens, to compare with other pipelines."""
        scheduler = self.scheduler
        running = scheduler.num_running if scheduler else 0
        stages = range(len(self.seats))
        slowest_s = max(self._decode_times.seconds_per_token(stage) or 0.0 for stage in stages)
        return (running + 1) * (slowest_s or 1e-9)

    def stage_ready(self, peer: PeerId, ready: StageReady) -> bool:
        """A stage has loaded its layers; return whether it was the last, and serving begins."""
        self._ready[peer] = ready
        if len(self._ready) < len(self.seats):
            return False
        settings = self._settings
        self.pipeline = Pipeline(
            self.epoch,
            self.seats,
            credits=min(ready.credits for ready in self._ready.values()),
            wire_dtype=settings.wire_dtype,
            hidden_size=settings.hidden_size,
            vocab_size=settings.vocab_size,
            task_timeout_s=settings.task_timeout_s,
        )
        self.scheduler = Scheduler(
            max_sequences=settings.max_sequences,
            max_tokens=settings.max_tokens,
            kv_tokens=self.kv_tokens,
            new_sequence_id=self._new_sequence_id,
            on_change=lambda: self._on_change(self),
        )
        self._on_change(self)
        for peer_id, up in self._links.items():
            self.pipeline.set_link(peer_id, up)
        return True

    def set_link(self, peer: PeerId, up: bool) -> None:
        """A stage reaches the next one itself, or not."""
        self._links[peer] = up
        if self.pipeline and self.pipeline.set_link(peer, up):
            self.abandon_steps()

    def abandon_steps(self) -> None:
        """Steps under way may be lost: compute what they would have, in new ones."""
        if self.pipeline and self.scheduler:
            for step in self.pipeline.abandon():
                self.scheduler.abandon(step)

    def begin_steps(self, *, now: float) -> list[Send]:
        """Return the messages that free what has ended, and that begin what is worth it."""
        pipeline, scheduler = self.pipeline, self.scheduler
        if pipeline is None or scheduler is None:
            return []
        sends: list[Send] = []
        while True:
            pipeline.release(scheduler.take_freed())
            step = self._next_step(pipeline, scheduler, now)
            if step is None:
                break
            sends.append(sending(pipeline.begin(step, now=now)))
        pipeline.release(scheduler.take_freed())
        return [*self._releases(pipeline), *sends]

    def _next_step(self, pipeline: Pipeline, scheduler: Scheduler, now: float) -> Step | None:
        decoding = scheduler.num_decoding
        depth = self._depth(decoding, scheduler, now)
        if pipeline.num_steps >= min(depth, pipeline.credits):
            return None
        return scheduler.next_step(max_decodes=-(-decoding // depth), idle=not pipeline.num_steps)

    def observe(self, done: StepDone, *, now: float) -> None:
        """Learn from a step how long the stages take."""
        times = self._decode_times if done.step.decodes else self._prefill_times
        tokens = len(done.step.token_ids)
        for stage, timing in enumerate(done.timings):
            times.observe(stage, tokens, timing.compute_us / 1e6, depth=done.depth, now=now)
        inside_s = sum(t.compute_us + t.queued_us for t in done.timings) / 1e6
        times.observe_overhead(max(0.0, done.round_trip_s - inside_s), now=now)

    def _depth(self, decoding: int, scheduler: Scheduler, now: float) -> int:
        limit = min(2 * len(self.seats), self.pipeline.credits if self.pipeline else 1)
        depth = 1
        if decoding:
            depth = self._decode_times.best_depth(decoding, limit=min(limit, decoding), now=now)
        if scheduler.num_running > decoding:
            depth = max(depth, self._chunk_depth(limit))
        return depth

    def _chunk_depth(self, limit: int) -> int:
        """Return how many chunks of prompts should be under way: no more than it is faster for."""
        round_trips = [
            self._prefill_times.step_s(self._settings.max_tokens, depth)
            for depth in range(1, limit + 1)
        ]
        rates = [depth / s for depth, s in enumerate(round_trips, 1) if s]
        if not rates:
            return min(limit, len(self.seats))
        return next(d for d, rate in enumerate(rates, 1) if rate >= _WORTHWHILE * max(rates))

    def _releases(self, pipeline: Pipeline) -> list[Send]:
        """Return the messages that free what no task will for now.

        While steps are under way the next one tells: a message would overtake those that go from
        worker to worker, and take a prefix away from a sequence that is about to begin with it.
        """
        if pipeline.num_steps:
            return []
        freed = [i for i in pipeline.to_release if i not in self._released]
        self._released = set(pipeline.to_release)
        return [
            Send(seat.peer, ReleaseSequences(epoch=self.epoch, sequence_ids=tuple(batch)))
            for at in range(0, len(freed), MAX_RELEASED)
            for batch in (freed[at : at + MAX_RELEASED],)
            for seat in self.seats
        ]

    def validate(self) -> None:
        """Assert the invariants; tests call this after every step."""
        assert (self.pipeline is None) == (self.scheduler is None)
        at = 0
        for seat in self.seats:
            assert seat.layers.start == at
            at = seat.layers.stop
        if self.pipeline and self.scheduler:
            self.pipeline.validate()
            self.scheduler.validate()
            if self.scheduler.num_running:
                assert self.pipeline.num_steps, "requests run, but no step is under way"


def sending(task: SendTask) -> Send:
    """Return the action that sends a task."""
    return Send(task.peer, task.task, task.frames)
