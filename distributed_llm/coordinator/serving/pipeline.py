"""One pipeline that serves the whole model, and the requests that run on it. Pure.

It is loading until every stage has its layers, and then keeps as many steps under way as are worth
it by the measured times of its stages: one, where stages share a machine and only slow each other
down; about as many as there are stages, where each has a machine of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from distributed_llm.common.messages import MAX_RELEASED, ReleaseSequences, StageReady
from distributed_llm.common.tensors import DtypeName
from distributed_llm.common.types import KV_BLOCK, PeerId
from distributed_llm.coordinator.events import Send
from distributed_llm.coordinator.plan import LayerMap, PipelineStage, Plan, kv_tokens_of
from distributed_llm.coordinator.serving.depth import DepthEstimator
from distributed_llm.coordinator.serving.scheduler import Scheduler
from distributed_llm.coordinator.serving.steps import SendTask, StepDone, StepsInFlight


@dataclass(frozen=True)
class PipelineSettings:
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


class Pipeline:
    """A plan that is loaded or served.

    Args:
        epoch: of the plan.
        seats: the workers of the plan, in the order of the layers.
        new_sequence_id: names that no pipeline uses twice.
        on_change: called when steps may be begun, or requests admitted, that could not before.

    Attributes:
        pipeline: None while it is loading; likewise `scheduler`.
        held: no steps begin; what is said of sequences is kept for later.
        lineage: the epoch of the first pipeline of those that took each other's place, down to it.
        num_decoding: sequences that computed one token at a time when steps were begun last.
    """

    def __init__(
        self,
        epoch: int,
        plan: Plan,
        stages: tuple[PipelineStage, ...],
        settings: PipelineSettings,
        new_sequence_id: Callable[[], int],
        on_change: Callable[["Pipeline"], None],
    ) -> None:
        self.epoch = epoch
        self.plan = plan
        self.stages = stages
        self._settings = settings
        self._new_sequence_id = new_sequence_id
        self._on_change = on_change
        self._ready: dict[PeerId, StageReady] = {}
        self._links: dict[PeerId, bool] = {}
        self._released: set[int] = set()  # said in messages, not yet in tasks
        self._decode_times = DepthEstimator(len(stages))
        self._prefill_times = DepthEstimator(len(stages))
        # What was last asked of the times, and when to ask again: it takes longer than all else.
        self._slowest_s: float | None = None  # per token; None: a step was observed since
        self._chunks: dict[int, int] = {}  # depth for prompts, by what may be tried; likewise
        self._decode_depth = (0, 0)  # and the number of sequences that it is for
        self._decodes_seen = 0  # steps since then
        self.num_decoding = 0
        self.lineage = epoch
        self._pace_s = 1e-9  # per token, on the slowest stage; as measured last
        self.in_flight: StepsInFlight | None = None
        self.scheduler: Scheduler | None = None
        self.held = False

    @property
    def layer_map(self) -> LayerMap:
        """Who serves which layers, in their order."""
        return tuple((stage.worker, stage.layers) for stage in self.stages)

    @property
    def layers_text(self) -> str:
        """Who serves which layers, for people."""
        return ", ".join(f"{stage.worker} {stage.layers}" for stage in self.stages)

    def following(self, peer: PeerId) -> PipelineStage | None:
        """Return the stage after that of the worker at `peer`."""
        pairs = pairwise(self.stages)
        return next((after for stage, after in pairs if stage.peer == peer), None)

    @property
    def kv_tokens(self) -> int:
        """Positions of KV cache that every stage has room for, as far as they have told."""
        told = (ready.kv_tokens for ready in self._ready.values())
        tokens = min((kv_tokens_of(self.plan), *told))
        return tokens - tokens % KV_BLOCK

    @property
    def num_running(self) -> int:
        """Requests that run on it."""
        return self.scheduler.num_running if self.scheduler else 0

    @property
    def load(self) -> float:
        """How long its requests wait for their tokens, to compare with other pipelines."""
        if self._slowest_s is None:
            stages = range(len(self.stages))
            times = (self._decode_times.seconds_per_token(stage) for stage in stages)
            self._pace_s = max((seconds for seconds in times if seconds), default=self._pace_s)
            self._slowest_s = self._pace_s
        return (self.num_running + 1) * self._slowest_s

    def stage_ready(self, peer: PeerId, ready: StageReady) -> bool:
        """A stage has loaded its layers; return whether it was the last."""
        self._ready[peer] = ready
        return len(self._ready) == len(self.stages)

    def serve(self) -> None:
        """Begin to serve; every stage has its layers."""
        settings = self._settings
        self._begin(
            Scheduler(
                max_sequences=settings.max_sequences,
                max_tokens=settings.max_tokens,
                kv_tokens=self.kv_tokens,
                new_sequence_id=self._new_sequence_id,
                on_change=lambda: self._on_change(self),
            )
        )

    def take_over(self, old: "Pipeline") -> None:
        """Go on with the requests of a pipeline whose KV cache the stages of this one have.

        No step of the old one is under way. It serves no more.
        """
        assert old.scheduler is not None
        assert old.in_flight is not None
        scheduler, released = old.scheduler, old.in_flight.to_release
        old.in_flight = old.scheduler = None
        scheduler.on_change = lambda: self._on_change(self)
        scheduler.move(self.kv_tokens)
        self._begin(scheduler, released)

    def _begin(self, scheduler: Scheduler, released: Sequence[int] = ()) -> None:
        settings, self.scheduler = self._settings, scheduler
        self.in_flight = StepsInFlight(
            self.epoch,
            self.stages,
            credits=min(ready.credits for ready in self._ready.values()),
            wire_dtype=settings.wire_dtype,
            hidden_size=settings.hidden_size,
            vocab_size=settings.vocab_size,
            task_timeout_s=settings.task_timeout_s,
        )
        self.in_flight.release(released)
        self._on_change(self)
        for peer, up in self._links.items():
            self.in_flight.set_link(peer, up)

    def hold(self) -> None:
        """Begin no more steps."""
        self.held = True

    def resume(self) -> None:
        """Begin steps again."""
        if self.held:
            self.held = False
            self._on_change(self)

    def set_link(self, peer: PeerId, up: bool) -> None:
        """A stage reaches the next one itself, or not."""
        self._links[peer] = up
        if self.in_flight and self.in_flight.set_link(peer, up):
            self.abandon_steps()

    def weight_bytes_of(self, peer: PeerId) -> int:
        """Return what the weights of a stage take, which has loaded."""
        return self._ready[peer].weight_bytes

    def link_of(self, peer: PeerId) -> Literal["direct", "relayed", ""]:
        """Return how a stage's results reach the next one, as far as it has told."""
        up = self._links.get(peer)
        return "" if up is None else "direct" if up else "relayed"

    def abandon_steps(self) -> None:
        """Steps under way may be lost: compute what they would have, in new ones."""
        if self.in_flight and self.scheduler:
            for step in self.in_flight.abandon():
                self.scheduler.abandon(step)

    def begin_steps(self, *, now: float) -> list[Send]:
        """Return the messages that free what has ended, and that begin what is worth it."""
        in_flight, scheduler = self.in_flight, self.scheduler
        if in_flight is None or scheduler is None:
            return []
        if self.held:
            in_flight.release(scheduler.take_freed())
            return []
        sends: list[Send] = []
        running = decoding = depth = chunks = 0
        while True:
            in_flight.release(scheduler.take_freed())
            if scheduler.num_running != running:  # the first time, or a step cost others their room
                running, decoding = scheduler.num_running, scheduler.num_decoding
                self.num_decoding = decoding
                depth = max(1, self._depth_to_decode(decoding, now))
                chunks = 0
                if running > decoding:
                    chunks = self._depth_to_prefill(now, depth if decoding else 0)
                depth = max(depth, chunks)
            step = None
            if in_flight.num_steps < depth and not in_flight.drains:
                step = scheduler.next_step(
                    max_decodes=-(-decoding // depth),
                    prompts=in_flight.num_chunks < chunks,
                    idle=not in_flight.num_steps,
                )
            if step is None:
                break
            sends.append(sending(in_flight.begin(step, now=now)))
        in_flight.release(scheduler.take_freed())
        return [*self._releases(in_flight), *sends]

    def observe(self, done: StepDone, *, now: float) -> None:
        """Learn from a step how long the stages take."""
        if done.step.decodes:
            times, self._slowest_s = self._decode_times, None
            self._decodes_seen += 1
        else:
            times, self._chunks = self._prefill_times, {}
        tokens = len(done.step.token_ids)
        for stage, timing in enumerate(done.timings):
            times.observe(stage, tokens, timing.compute_us / 1e6, depth=done.depth, now=now)
        inside_s = sum(t.compute_us + t.queued_us for t in done.timings) / 1e6
        times.observe_overhead(max(0.0, done.round_trip_s - inside_s), now=now)

    @property
    def _limit(self) -> int:
        return min(2 * len(self.stages), self.in_flight.credits if self.in_flight else 1)

    def _depth_to_decode(self, decoding: int, now: float) -> int:
        """Return the best depth, as it was a round of steps ago if not much has changed."""
        depth, sequences = self._decode_depth
        if self._decodes_seen >= depth or 8 * abs(decoding - sequences) > sequences:
            limit = min(self._limit, max(1, decoding))
            depth = self._decode_times.best_depth(decoding, limit=limit, now=now)
            self._decode_depth, self._decodes_seen = (depth, decoding), 0
        return min(depth, decoding)

    def _depth_to_prefill(self, now: float, decode_depth: int) -> int:
        """Return how many steps with chunks of prompts should be under way.

        Those that answer wait for chunks, so more are tried only where nobody does, or as many as
        steps that decode were seen not to slow each other down.

        Args:
            decode_depth: how many steps that decode should be; 0 if nobody does.
        """
        chunks = self._chunks.get(decode_depth)
        if chunks is None:
            chunks = self._chunks[decode_depth] = self._prefill_times.best_chunks(
                self._settings.max_tokens,
                limit=self._limit,
                try_up_to=decode_depth or self._limit,
                frugal=decode_depth > 0,
                now=now,
            )
        return chunks

    def _releases(self, in_flight: StepsInFlight) -> list[Send]:
        """Return the messages that free what no task will for now.

        While steps are under way the next one tells: a message would overtake those that go from
        worker to worker, and take a prefix away from a sequence that is about to begin with it.
        """
        if in_flight.num_steps:
            return []
        freed = [i for i in in_flight.to_release if i not in self._released]
        self._released = set(in_flight.to_release)
        return [
            Send(stage.peer, ReleaseSequences(epoch=self.epoch, sequence_ids=tuple(batch)))
            for at in range(0, len(freed), MAX_RELEASED)
            for batch in (freed[at : at + MAX_RELEASED],)
            for stage in self.stages
        ]

    def validate(self) -> None:
        """Assert the invariants; tests call this after every step."""
        assert (self.in_flight is None) == (self.scheduler is None)
        at = 0
        for stage in self.stages:
            assert stage.layers.start == at
            at = stage.layers.stop
        if self.in_flight and self.scheduler:
            self.in_flight.validate()
            self.scheduler.validate()
            if self.scheduler.num_running and not self.held:
                assert self.in_flight.num_steps, "requests run, but no step is under way"


def sending(task: SendTask) -> Send:
    """Return the action that sends a task."""
    return Send(task.peer, task.task, task.frames)
