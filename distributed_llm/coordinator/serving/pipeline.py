"""A pipeline: stages that serve the whole model together, and the answers that run on them. Pure.

Each plan that is loaded becomes a `Pipeline`, named by its epoch. While its stages load it has
neither a scheduler nor steps. Then `Scheduler` decides what each step computes, `StepsInFlight`
carries steps through the stages, and `DepthPolicy` says how many there should be.
"""

from collections.abc import Callable
from enum import Enum, auto
from itertools import pairwise
from typing import Literal

from distributed_llm.common.messages import MAX_RELEASED, ReleaseSequences, StageReady
from distributed_llm.common.settings import CoordinatorSettings
from distributed_llm.common.states import StateTable
from distributed_llm.common.types import KV_BLOCK, Epoch, PeerId, SequenceId
from distributed_llm.common.weight_forms import Quantize
from distributed_llm.coordinator.events import Send
from distributed_llm.coordinator.kv_windows import KVWindows, StageKV, margin_tokens
from distributed_llm.coordinator.model import ServedModel
from distributed_llm.coordinator.plan import (
    LayerMap,
    PipelineStage,
    Plan,
    kv_tokens_of,
    num_machines,
)
from distributed_llm.coordinator.requests.request import Answer
from distributed_llm.coordinator.serving.depth_policy import DepthPolicy
from distributed_llm.coordinator.serving.scheduler import Scheduler
from distributed_llm.coordinator.serving.step_meter import StepMeter
from distributed_llm.coordinator.serving.steps import SendTask, StepDone, StepsInFlight


class PipelineState(Enum):
    """What a pipeline does.

    Attributes:
        LOADING: some of its stages have not loaded their layers.
        READY: all stages have loaded; it does not serve yet.
        SERVING: it begins steps.
        PAUSED: it begins no steps and queues sequences to be freed; steps in flight go on.
        ENDED: another pipeline serves in its place, or none.
    """

    LOADING = auto()
    READY = auto()
    SERVING = auto()
    PAUSED = auto()
    ENDED = auto()


class PipelineCause(Enum):
    """What changes the state of a pipeline.

    Attributes:
        STAGES_READY: the last of its stages has loaded its layers.
        SERVED: it begins to serve, with empty KV caches or those of another pipeline.
        PAUSED: a move waits for its steps to end.
        RESUMED: that move was undone.
        CONTINUED_BY_ANOTHER: a move was committed; another has its answers and KV cache.
        DISSOLVED: it serves no more; its answers wait for another one.
    """

    STAGES_READY = auto()
    SERVED = auto()
    PAUSED = auto()
    RESUMED = auto()
    CONTINUED_BY_ANOTHER = auto()
    DISSOLVED = auto()


_S, _C = PipelineState, PipelineCause
PIPELINE_STATES = StateTable(
    "a pipeline",
    _S.LOADING,
    {
        (_S.LOADING, _C.STAGES_READY): _S.READY,
        (_S.READY, _C.SERVED): _S.SERVING,
        (_S.SERVING, _C.PAUSED): _S.PAUSED,
        (_S.PAUSED, _C.RESUMED): _S.SERVING,
        (_S.PAUSED, _C.CONTINUED_BY_ANOTHER): _S.ENDED,
        (_S.LOADING, _C.DISSOLVED): _S.ENDED,
        (_S.READY, _C.DISSOLVED): _S.ENDED,
        (_S.SERVING, _C.DISSOLVED): _S.ENDED,
        (_S.PAUSED, _C.DISSOLVED): _S.ENDED,
    },
)


class Pipeline:
    """The stages of one plan, while they load and while they serve.

    Args:
        epoch: number of the plan.
        plan: layers and KV cache of each worker.
        stages: the stages of the plan, in the order of the layers.
        model: the model that they serve.
        settings: limits of steps, and how long a step may take.
        new_sequence_id: returns ids that no pipeline uses twice.
        on_change: called when a step may be begun, or an answer admitted, that could not before.

    Attributes:
        state: what it does; see `PIPELINE_STATES`.
        scheduler: of its answers, while it serves or is paused; None otherwise.
        in_flight: its steps in flight, while it serves or is paused; None otherwise.
        lineage: epoch of the first of the pipelines that continued one another up to this one.
        num_decoding: answers that were decoding when steps were last begun.
        depth: steps that should be in flight, as decided then.
        meter: what its steps took, for those who look at it.
    """

    def __init__(
        self,
        epoch: Epoch,
        plan: Plan,
        stages: tuple[PipelineStage, ...],
        model: ServedModel,
        settings: CoordinatorSettings,
        new_sequence_id: Callable[[], SequenceId],
        on_change: Callable[["Pipeline"], None],
    ) -> None:
        self.epoch = epoch
        self.plan = plan
        self.stages = stages
        self._model = model
        self._settings = settings
        self._new_sequence_id = new_sequence_id
        self._on_change = on_change
        self._ready: dict[PeerId, StageReady] = {}
        self._links: dict[PeerId, bool] = {}  # whether a stage reaches the next one
        self._released: set[SequenceId] = set()  # released by messages, not yet by a task
        self._depths = DepthPolicy(
            len(stages),
            num_machines=num_machines(stages),
            max_tokens=settings.max_batch_tokens,
        )
        self.lineage = epoch
        self.num_decoding = 0
        self.depth = 0
        self.meter = StepMeter(len(stages))
        self.in_flight: StepsInFlight | None = None
        self.scheduler: Scheduler | None = None
        self.state = PIPELINE_STATES.initial

    @property
    def quantize(self) -> Quantize:
        """What floating-point weights of its stages became while they were loaded."""
        return self.plan[0].quantize

    @property
    def ram_bytes(self) -> int:
        """Bytes that all its stages together copy to their GPUs in every step."""
        return sum(stage.ram_bytes for stage in self.plan)

    @property
    def disk_bytes(self) -> int:
        """Bytes that all its stages together read from disks in every step."""
        return sum(stage.disk_bytes for stage in self.plan)

    @property
    def layer_map(self) -> LayerMap:
        """Workers and their layers, in the order of the layers."""
        return tuple((stage.worker, stage.layers) for stage in self.stages)

    @property
    def layers_text(self) -> str:
        """Workers and their layers as text: "a 0-4, b 4-8"."""
        return ", ".join(f"{stage.worker} {stage.layers}" for stage in self.stages)

    def following(self, peer: PeerId) -> PipelineStage | None:
        """Return the stage after that of the worker at `peer`, if there is one."""
        pairs = pairwise(self.stages)
        return next((after for stage, after in pairs if stage.peer == peer), None)

    @property
    def kv_tokens(self) -> int:
        """Positions of KV cache that every stage has room for: as planned, or less as reported.

        What stages report that keep none, for they have layers of an encoder only, does not matter.
        """
        cost = self._model.cost_at(self.quantize)
        reported = (
            ready.kv_tokens
            for stage in self.stages
            if (ready := self._ready.get(stage.peer)) and not cost.only_encodes(stage.layers)
        )
        tokens = min((kv_tokens_of(self.plan), *reported))
        return tokens - tokens % KV_BLOCK

    @property
    def kv_windows(self) -> KVWindows:
        """Windows and states of the layers, as the stages that are ready have told."""
        margin = margin_tokens(self._settings.max_batch_tokens, len(self.stages))
        cost = self._model.cost_at(self.quantize)
        told = [
            StageKV(
                ready.kv_tokens,
                ready.kv_token_bytes,
                ready.kv_window,
                ready.kv_windowed_bytes,
                cost.state_bytes(stage.layers),
            )
            for stage in self.stages
            if (ready := self._ready.get(stage.peer))
        ]
        return KVWindows.of_stages(told, margin)

    @property
    def encoder_layers(self) -> int:
        """The model's first layers that are an encoder's."""
        return self._model.cost.encoder_layers

    @property
    def longest_tokens(self) -> int:
        """Positions of the longest sequence that has room if it is alone."""
        return self.kv_windows.longest(self.kv_tokens)

    @property
    def most_texts(self) -> int:
        """Texts that may be under way at once; 0 if positions are what limits them."""
        cost = self._model.cost_at(self.quantize)
        return 0 if cost.mean_kv_bytes else self.kv_windows.most_sequences(self.kv_tokens)

    @property
    def num_running(self) -> int:
        """Number of running answers."""
        return self.scheduler.num_running if self.scheduler else 0

    @property
    def expected_round_s(self) -> float:
        """Expected seconds for a token of each answer, if one more runs; compares pipelines."""
        return (self.num_running + 1) * self._depths.seconds_per_token

    def stage_ready(self, peer: PeerId, ready: StageReady) -> bool:
        """Record that a stage has loaded its layers; return whether all have."""
        self._ready[peer] = ready
        all_ready = len(self._ready) == len(self.stages)
        if all_ready and self.state is _S.LOADING:
            self._change(_C.STAGES_READY)
        return all_ready

    def awaits(self, peer: PeerId) -> bool:
        """Return whether the stage at `peer` has not loaded its layers yet."""
        return peer not in self._ready and any(stage.peer == peer for stage in self.stages)

    def serve(self) -> None:
        """Begin to serve, with empty KV caches. Every stage must be ready."""
        settings = self._settings
        self._begin(
            Scheduler(
                max_sequences=settings.max_batch_sequences,
                max_tokens=settings.max_batch_tokens,
                kv_tokens=self.kv_tokens,
                windows=self.kv_windows,
                new_sequence_id=self._new_sequence_id,
                on_change=lambda: self._on_change(self),
            )
        )

    def continue_from(self, old: "Pipeline") -> None:
        """Begin to serve with the answers and the KV cache of another pipeline.

        Every stage must be ready and have the KV cache of its layers, and no step of `old` may be
        in flight. `old` serves no more.
        """
        assert old.scheduler is not None
        assert old.in_flight is not None
        scheduler, in_flight = old.scheduler, old.in_flight
        old._end(_C.CONTINUED_BY_ANOTHER)
        scheduler.on_change = lambda: self._on_change(self)
        scheduler.move(self.kv_tokens, self.kv_windows)
        self._begin(scheduler, in_flight)

    def _begin(self, scheduler: Scheduler, before: StepsInFlight | None = None) -> None:
        self._change(_C.SERVED)
        self.scheduler = scheduler
        self.in_flight = StepsInFlight(
            self.epoch,
            self.stages,
            credits=min(ready.credits for ready in self._ready.values()),
            model=self._model,
            task_timeout_s=self._settings.task_timeout_s,
            to_forget=before.to_forget if before else None,
        )
        self._on_change(self)
        for peer, up in self._links.items():
            self.in_flight.set_link(peer, up)

    def pause(self) -> None:
        """Begin no more steps until `resume`."""
        self._change(_C.PAUSED)

    def resume(self) -> None:
        """Begin steps again, if paused."""
        if self.state is _S.PAUSED:
            self._change(_C.RESUMED)
            self._on_change(self)

    def dissolve(self) -> list[Answer]:
        """End; return the answers that ran, which have lost their KV cache."""
        answers = self.scheduler.evacuate() if self.scheduler else []
        self._end(_C.DISSOLVED)
        return answers

    def _end(self, cause: PipelineCause) -> None:
        self._change(cause)
        self.in_flight = self.scheduler = None

    def _change(self, cause: PipelineCause) -> None:
        self.state = PIPELINE_STATES.after(self.state, cause)

    def set_link(self, peer: PeerId, up: bool) -> None:
        """Record whether the stage at `peer` reaches the next one directly.

        If it no longer does, steps may have been lost, and all in flight are abandoned.
        """
        self._links[peer] = up
        if self.in_flight and self.in_flight.set_link(peer, up):
            self.abandon_steps()

    def weight_bytes_of(self, peer: PeerId) -> int:
        """Return the weights of the stage at `peer`, which is ready, in bytes."""
        return self._ready[peer].weight_bytes

    def link_of(self, peer: PeerId) -> Literal["direct", "relayed", ""]:
        """Return how results of the stage at `peer` reach the next one; "" if not reported."""
        up = self._links.get(peer)
        return "" if up is None else "direct" if up else "relayed"

    def abandon_steps(self) -> None:
        """Give up all steps in flight; later steps compute their tokens again."""
        if self.in_flight and self.scheduler:
            for step in self.in_flight.abandon():
                self.scheduler.abandon(step)

    def begin_steps(self, *, now: float) -> list[Send]:
        """Begin as many steps as are worthwhile; return their tasks and messages to free KV cache.

        While paused, begin none, and queue the sequences to be freed.
        """
        in_flight, scheduler = self.in_flight, self.scheduler
        if in_flight is None or scheduler is None:
            return []
        if self.state is _S.PAUSED:
            self._forget(scheduler, in_flight)
            return []
        sends: list[Send] = []
        limit = min(2 * len(self.stages), in_flight.credits)
        running = decoding = depth = chunks = 0
        while True:
            self._forget(scheduler, in_flight)
            if scheduler.num_running != running:  # the first time, or a step preempted answers
                running, decoding = scheduler.num_running, scheduler.num_decoding
                self.num_decoding = decoding
                depth = max(1, self._depths.decode_depth(decoding, limit=limit, now=now))
                chunks = 0
                if running > decoding:
                    decode_depth = depth if decoding else 0
                    chunks = self._depths.prefill_depth(decode_depth, limit=limit, now=now)
                self.depth = depth = max(depth, chunks)
            step = None
            if in_flight.num_steps < depth and not in_flight.holds_new_steps:
                step = scheduler.next_step(
                    max_decodes=-(-decoding // depth),
                    prompts=in_flight.num_chunks < chunks,
                    idle=not in_flight.num_steps,
                )
            if step is None:
                break
            self._forget(scheduler, in_flight)  # the step may need the room
            sends.append(sending(in_flight.begin(step, now=now)))
        self._forget(scheduler, in_flight)
        return [*self._releases(in_flight), *sends]

    def _forget(self, scheduler: Scheduler, in_flight: StepsInFlight) -> None:
        """Have the next task say what the stages are to free and drop."""
        in_flight.to_forget.release(scheduler.take_freed())
        in_flight.to_forget.drop(scheduler.take_dropped())

    def observe(self, done: StepDone, *, now: float) -> None:
        """Learn from a step how long the stages take."""
        self._depths.observe(done, now=now)

    def _releases(self, in_flight: StepsInFlight) -> list[Send]:
        """Return messages that free sequences on every stage, if no step is in flight.

        While steps are in flight, the next task frees them: a message from here would overtake
        tasks that go from worker to worker, and might free a prefix that one of them shares.
        """
        if in_flight.num_steps:
            return []
        to_free = in_flight.to_forget.released
        freed = [i for i in to_free if i not in self._released]
        self._released = set(to_free)
        return [
            Send(stage.peer, ReleaseSequences(epoch=self.epoch, sequence_ids=tuple(batch)))
            for at in range(0, len(freed), MAX_RELEASED)
            for batch in (freed[at : at + MAX_RELEASED],)
            for stage in self.stages
        ]

    def validate(self) -> None:
        """Assert the invariants; tests call this after every step."""
        assert (self.in_flight is None) == (self.scheduler is None)
        assert (self.in_flight is None) == (self.state not in (_S.SERVING, _S.PAUSED))
        at = 0
        for stage in self.stages:
            assert stage.layers.start == at
            at = stage.layers.stop
        if self.in_flight and self.scheduler:
            self.in_flight.validate()
            self.scheduler.validate()
            runs = self.scheduler.num_running and not self.scheduler.waits_for_masks
            if runs and self.state is _S.SERVING:
                assert self.in_flight.num_steps, "answers run, but no step is in flight"


def sending(task: SendTask) -> Send:
    """Return a task as an action of the coordinator."""
    return Send(task.peer, task.task, task.frames)
