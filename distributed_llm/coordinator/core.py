"""The coordinator's decisions: events in, actions out. Pure.

It joins the registry (who is there), the planner (who serves what), the desk (what was asked) and
the pipeline (steps under way).

    waiting --enough workers--> loading --every stage ready--> serving
       ^                        |  ^                              |
       '---nobody can hold it---'  '---a worker came or was lost--'

When a worker of the plan is lost, the layers are planned anew over those that are left, under a
larger epoch; answers of the old epoch are dropped, and every running request computes its tokens
again on the new stages. Sampling depends on nothing but the tokens, so no answer changes. A worker
that joins is used as soon as no request is under way.
"""

from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, assert_never

from distributed_llm.common.codec import encode_payload
from distributed_llm.common.errors import (
    ConfigError,
    DistributedLLMError,
    NotEnoughMemory,
    NotReady,
    ProtocolMismatch,
    UnsupportedModel,
    WorkerLost,
)
from distributed_llm.common.messages import (
    Cancel,
    ClientHello,
    ClientWelcome,
    ClusterStatus,
    DropStage,
    Generate,
    GetStatus,
    Goodbye,
    Heartbeat,
    LoadStage,
    Ping,
    Pong,
    Refused,
    ReleaseSequences,
    StageFailed,
    StageReady,
    StatusReport,
    TaskFailed,
    TaskResult,
    Welcome,
    WorkerHello,
)
from distributed_llm.common.tensors import frame_of_bytes
from distributed_llm.common.types import LayerRange, PeerId, WorkerId, size_text
from distributed_llm.coordinator.desk import Desk
from distributed_llm.coordinator.events import (
    Action,
    ConnectionClosed,
    Detokenized,
    Event,
    Garbage,
    Log,
    Received,
    Send,
    Stop,
    Tokenized,
    TokenizeFailed,
    Unreachable,
)
from distributed_llm.coordinator.model import ServedModel
from distributed_llm.coordinator.pipeline import (
    Dropped,
    Pipeline,
    SendTask,
    StepBroken,
    StepDone,
)
from distributed_llm.coordinator.planner import Offer, Plan, Strategy, kv_tokens_of, make_plan
from distributed_llm.coordinator.registry import Registry, Worker
from distributed_llm.coordinator.scheduler import Scheduler, Step

_MAX_EVENTS = 50
_RELEASE_BATCH = 1024


@dataclass(frozen=True)
class CoreSettings:
    """How the coordinator decides; times in seconds.

    Attributes:
        layers: the layers of each worker, for strategy "custom".
        min_workers: workers to wait for before the first plan.
        settle_s: quiet time after a join before planning.
        max_batch_tokens: tokens in one step.
        min_kv_tokens: positions of KV cache that a plan must have room for.
        task_timeout_s: without progress, after which a task is sent again.
    """

    strategy: Strategy = "memory"
    layers: Mapping[str, LayerRange] = field(default_factory=dict)
    min_workers: int = 1
    settle_s: float = 0.5
    max_batch_sequences: int = 64
    max_batch_tokens: int = 512
    max_waiting_requests: int = 256
    min_kv_tokens: int = 1024
    heartbeat_interval_s: float = 1.0
    silence_timeout_s: float = 4.0
    task_timeout_s: float = 30.0


class Core:
    """One model, its workers and its requests.

    Args:
        model: what is served.
        settings: how.
        draw_seed: gives a seed for a request without one.
    """

    def __init__(
        self, model: ServedModel, settings: CoreSettings, *, draw_seed: Callable[[], int]
    ) -> None:
        self._model = model
        self._settings = settings
        self._registry = Registry(silence_timeout_s=settings.silence_timeout_s)
        scheduler = Scheduler(
            max_sequences=settings.max_batch_sequences, max_tokens=settings.max_batch_tokens
        )
        self._scheduler = scheduler
        self._desk = Desk(
            model.defaults,
            scheduler,
            max_waiting=settings.max_waiting_requests,
            draw_seed=draw_seed,
        )
        self._state: Literal["waiting", "loading", "serving"] = "waiting"
        self._note = "No worker has joined."
        self._epoch = 0
        self._plan: Plan = ()
        self._ready: dict[PeerId, int] = {}  # first credits of the stages that are loaded
        self._pipeline: Pipeline | None = None
        self._next_step = 0
        self._replan_at: float | None = None
        self._rejected: Counter[str] = Counter()
        self._events: deque[str] = deque(maxlen=_MAX_EVENTS)

    # -------------------------------------------------------------- the four doors

    def handle(self, event: Event, *, now: float) -> list[Action]:
        """Apply one event at `now` (clock seconds) and return what to do about it."""
        match event:
            case Received():
                actions = self._received(event, now)
            case Garbage():
                actions = self._garbage(event)
            case ConnectionClosed():
                actions = [Send(peer, Pong()) for peer in self._registry.peers]
            case Unreachable():
                actions = self._gone(event.peer, event.why, now)
            case Tokenized():
                actions = self._desk.tokenized(event)
            case TokenizeFailed():
                actions = self._desk.fail(event.key, event.error)
            case Detokenized():
                actions = self._desk.detokenized(event)
            case _:
                assert_never(event)
        return self._settle(actions, now)

    def next_deadline(self) -> float | None:
        """Return when `on_timer` is next due, clock seconds, or None."""
        deadlines = (
            self._registry.next_deadline(),
            self._pipeline.next_deadline() if self._pipeline else None,
            None if self._desk.busy else self._replan_at,
        )
        return min((at for at in deadlines if at is not None), default=None)

    def on_timer(self, *, now: float) -> list[Action]:
        """Do what is due: peers that fell silent, leases that ran out, a plan for who joined."""
        actions: list[Action] = []
        for peer in self._registry.silent(now=now):
            actions += self._gone(peer, "fell silent", now)
        if self._pipeline:
            sends, given_up = self._pipeline.on_timer(now=now)
            actions += map(_sending, sends)
            for peer in given_up:
                actions += self._give_up(peer, now)
        if self._replan_at is not None and self._replan_at <= now and not self._desk.busy:
            actions += self._replan(now)
        return self._settle(actions, now)

    def status(self, *, now: float) -> ClusterStatus:
        """Return the cluster as it is now."""
        return ClusterStatus(
            model=self._model.name,
            state=self._state,
            note=self._note,
            epoch=self._epoch,
            num_layers=self._model.cost.num_layers,
            context_length=self._model.defaults.context_length,
            kv_tokens=kv_tokens_of(self._plan) if self._plan else 0,
            requests_running=self._desk.num_running,
            requests_waiting=self._desk.num_waiting,
            requests_finished=self._desk.totals.finished,
            requests_failed=self._desk.totals.failed,
            tokens_generated=self._desk.totals.tokens,
            rejected=dict(self._rejected),
            workers=tuple(worker.status(now=now) for worker in self._registry.workers),
            events=tuple(self._events),
        )

    # -------------------------------------------------------------- messages

    def _received(self, event: Received, now: float) -> list[Action]:
        peer, message = event.peer, event.message
        self._registry.heard(peer, now=now)
        match message:
            case WorkerHello():
                return self._worker_joins(peer, message, now)
            case ClientHello():
                return self._client_joins(peer, now)
            case Generate() | Cancel() | GetStatus() | Ping():
                if not self._registry.is_client(peer):
                    return self._stranger(peer)
                return self._from_client(event, now)
            case Heartbeat() | StageReady() | StageFailed() | TaskResult() | TaskFailed():
                worker = self._registry.worker(peer)
                return self._from_worker(worker, event, now) if worker else self._stranger(peer)
            case Goodbye():
                return self._gone(peer, "said goodbye", now)
            case _:
                assert_never(message)

    def _from_client(self, event: Received, now: float) -> list[Action]:
        peer = event.peer
        match event.message:
            case Generate(request_id=request_id) as message:
                if self._desk.has(peer, request_id):
                    self._rejected["duplicate_request"] += 1
                    return []
                if self._state == "waiting":
                    return self._desk.refuse(peer, request_id, NotReady(self._note))
                return self._desk.submit(peer, message, event.frames, now=now)
            case Cancel(request_id=request_id):
                return self._desk.cancel(peer, request_id)
            case GetStatus():
                spec, frame = frame_of_bytes(encode_payload(self.status(now=now)))
                return [Send(peer, StatusReport(tensors=(spec,)), (frame,))]
            case _:
                return [Send(peer, Pong())]

    def _from_worker(self, worker: Worker, event: Received, now: float) -> list[Action]:
        match event.message:
            case Heartbeat() as beat:
                return self._heartbeat(worker, beat, now)
            case StageReady() as ready:
                return self._stage_ready(worker, ready)
            case StageFailed() as failed:
                return self._stage_failed(worker, failed, now)
            case TaskResult() as result:
                return self._task_result(worker, result, event, now)
            case TaskFailed() as task_failed:
                return self._task_failed(worker, task_failed, now)
            case _:
                return []

    def _stranger(self, peer: PeerId) -> list[Action]:
        """Answer one who spoke before its hello, or was given up: it shall say hello again."""
        self._rejected["bad_state"] += 1
        error = NotReady("The coordinator does not know this session. Connect again.")
        return [_refusal(peer, error, "lost")]

    def _garbage(self, event: Garbage) -> list[Action]:
        self._rejected[event.reason] += 1
        actions: list[Action] = [Log(f"dropped a message: {event.error}"[:1000], "warning")]
        if isinstance(event.error, ProtocolMismatch):
            actions.append(_refusal(event.peer, event.error))
        return actions

    # -------------------------------------------------------------- who comes and goes

    def _client_joins(self, peer: PeerId, now: float) -> list[Action]:
        if self._registry.knows(peer):
            self._rejected["bad_state"] += 1
            return []
        self._registry.add_client(peer, now=now)
        welcome = ClientWelcome(
            model=self._model.name,
            heartbeat_interval_s=self._settings.heartbeat_interval_s,
            silence_timeout_s=self._settings.silence_timeout_s,
        )
        return [Send(peer, welcome)]

    def _worker_joins(self, peer: PeerId, hello: WorkerHello, now: float) -> list[Action]:
        if self._registry.knows(peer):
            self._rejected["bad_state"] += 1
            return []
        worker = self._registry.add_worker(peer, hello, now=now)
        self._replan_at = now + self._settings.settle_s
        welcome = Welcome(
            worker_id=worker.id,
            heartbeat_interval_s=self._settings.heartbeat_interval_s,
            silence_timeout_s=self._settings.silence_timeout_s,
        )
        offer = hello.capabilities
        return [
            Send(peer, welcome),
            self._event(
                f"worker {worker.id} joined: {size_text(offer.memory_bytes)} on {offer.device}"
            ),
        ]

    def _gone(self, peer: PeerId, why: str, now: float) -> list[Action]:
        worker = self._registry.remove(peer)
        if worker is None:
            return self._desk.drop_client(peer)
        actions: list[Action] = [self._event(f"worker {worker.id} {why}", "warning")]
        if any(stage.worker == worker.id for stage in self._plan):
            if self._pipeline:
                actions += self._desk.steps_lost(self._pipeline.steps_at(peer), worker.id)
            actions += self._replan(now, lost=worker.id)
        return actions

    def _heartbeat(self, worker: Worker, beat: Heartbeat, now: float) -> list[Action]:
        hung = self._hangs(worker)
        self._registry.heartbeat(worker.peer, beat)
        if self._pipeline and beat.tasks_waiting:
            self._pipeline.progress(worker.peer, beat.progress_age_s, now=now)
        pong = Send(worker.peer, Pong())
        if self._hangs(worker) and worker.state == "loading":
            return [pong, *self._give_up(worker.peer, now)]
        if hung and not self._hangs(worker):
            self._replan_at = now + self._settings.settle_s
        return [pong]

    def _hangs(self, worker: Worker) -> bool:
        """Return whether a worker is stuck in a task, of this session or an earlier one."""
        return worker.progress_age_s >= self._settings.task_timeout_s

    def _give_up(self, peer: PeerId, now: float) -> list[Action]:
        actions = self._gone(peer, "made no progress on a task", now)
        return [*actions, _refusal(peer, NotReady("No progress on a task."), "lost")]

    # -------------------------------------------------------------- plans

    def _replan(self, now: float, *, lost: WorkerId | None = None) -> list[Action]:
        """Plan for the workers that are there and have them load their layers."""
        self._replan_at = None
        fit = [w for w in self._registry.workers if w.state != "unfit" and not self._hangs(w)]
        if self._epoch == 0 and len(fit) < self._settings.min_workers:
            self._note = (
                f"{len(fit)} of {self._settings.min_workers} workers have joined. "
                "Start the others with `dllm worker`."
            )
            return []
        try:
            plan = self._make_plan(fit)
        except (NotEnoughMemory, ConfigError, NotReady) as exc:
            return self._cannot_serve(exc, lost)
        if plan == self._plan and lost is None:
            return []
        return self._load(plan, fit)

    def _make_plan(self, workers: list[Worker]) -> Plan:
        if not workers:
            raise NotReady("No worker is there. Start one with `dllm worker`.")
        return make_plan(
            self._model.cost,
            [Offer(worker.id, worker.capabilities.memory_bytes) for worker in workers],
            strategy=self._settings.strategy,
            kv_tokens=min(self._settings.min_kv_tokens, self._model.defaults.context_length),
            layers=self._settings.layers,
        )

    def _cannot_serve(self, error: DistributedLLMError, lost: WorkerId | None) -> list[Action]:
        if lost is None and self._plan:
            return [self._event(f"the plan stays: {error}", "warning")]
        actions: list[Action] = []
        if lost is not None:
            self._epoch += 1
            for worker in self._registry.workers:
                if worker.layers is not None:
                    worker.assign(None)
                    actions.append(Send(worker.peer, DropStage(epoch=self._epoch)))
            broken = WorkerLost(f"Worker {lost} is gone. {error}")
            actions += self._desk.fail_all(broken)
        self._leave_plan()
        self._state, self._plan, self._note = "waiting", (), str(error)[:4096]
        return [*actions, self._event(f"waiting: {error}", "warning")]

    def _load(self, plan: Plan, workers: list[Worker]) -> list[Action]:
        self._leave_plan()
        self._epoch += 1
        self._state, self._plan, self._note = "loading", plan, ""
        self._ready = {}
        self._desk.expect_capacity(kv_tokens_of(plan))
        stages = {stage.worker: stage for stage in plan}
        actions: list[Action] = []
        for worker in workers:
            stage = stages.get(worker.id)
            if stage is None:
                if worker.layers is not None:
                    actions.append(Send(worker.peer, DropStage(epoch=self._epoch)))
                worker.assign(None)
                continue
            worker.assign(stage.layers)
            load = LoadStage(
                epoch=self._epoch,
                source=self._model.source,
                layers=stage.layers,
                dtype=self._model.dtype,
                digest=self._model.digest(stage.layers),
                kv_tokens=stage.kv_tokens,
            )
            actions.append(Send(worker.peer, load))
        cuts = ", ".join(f"{stage.worker} {stage.layers}" for stage in plan)
        return [*actions, self._event(f"plan {self._epoch}: layers {cuts}")]

    def _leave_plan(self) -> None:
        if self._pipeline:
            self._next_step = self._pipeline.next_step
            self._pipeline = None

    def _stage_ready(self, worker: Worker, ready: StageReady) -> list[Action]:
        if ready.epoch != self._epoch or worker.state != "loading":
            self._rejected["stale_epoch"] += 1
            return []
        worker.state = "serving"
        worker.weight_bytes = ready.weight_bytes
        self._ready[worker.peer] = ready.credits
        actions: list[Action] = [
            self._event(f"worker {worker.id} loaded layers {worker.layers} in {ready.load_s:.1f} s")
        ]
        if len(self._ready) < len(self._plan):
            return actions
        peers = {w.id: w.peer for w in self._registry.workers}
        self._pipeline = Pipeline(
            self._epoch,
            [(peers[s.worker], s.layers, self._ready[peers[s.worker]]) for s in self._plan],
            hidden_size=self._model.hidden_size,
            first_step=self._next_step,
            task_timeout_s=self._settings.task_timeout_s,
        )
        self._state = "serving"
        actions += self._desk.set_capacity(kv_tokens_of(self._plan))
        return [*actions, self._event(f"serving: {kv_tokens_of(self._plan)} positions of KV cache")]

    def _stage_failed(self, worker: Worker, failed: StageFailed, now: float) -> list[Action]:
        if failed.epoch != self._epoch or worker.layers is None:
            self._rejected["stale_epoch"] += 1
            return []
        worker.assign(None)
        worker.state, worker.note = "unfit", failed.message
        actions: list[Action] = [
            self._event(f"worker {worker.id} cannot serve: {failed.message}", "error")
        ]
        if failed.code == UnsupportedModel.code:
            return [*actions, Stop(UnsupportedModel(failed.message))]
        return actions + self._replan(now, lost=worker.id)

    # -------------------------------------------------------------- steps

    def _task_result(
        self, worker: Worker, result: TaskResult, event: Received, now: float
    ) -> list[Action]:
        if self._pipeline is None or result.epoch != self._epoch:
            self._rejected["stale_epoch"] += 1
            return []
        steps = self._pipeline.steps_at(worker.peer)
        sends, outcome = self._pipeline.result(worker.peer, result, event.frames, now=now)
        actions: list[Action] = [*map(_sending, sends)]
        if isinstance(outcome, Dropped):
            self._rejected[outcome.reason] += 1
            return actions
        for step in steps[:1]:
            _count(worker, step, result.compute_s)
        if isinstance(outcome, StepDone):
            done = self._desk.step_done(outcome.step, outcome.token_ids, now=now)
            return [*actions, *self._next_sends(now), *done]
        if isinstance(outcome, StepBroken):
            actions += self._desk.step_broken(outcome.step, outcome.failure, worker.id)
        return actions

    def _task_failed(self, worker: Worker, failed: TaskFailed, now: float) -> list[Action]:
        if self._pipeline is None or failed.epoch != self._epoch:
            self._rejected["stale_epoch"] += 1
            return []
        sends, outcome = self._pipeline.failed(worker.peer, failed, now=now)
        actions: list[Action] = [*map(_sending, sends)]
        if isinstance(outcome, Dropped):
            self._rejected[outcome.reason] += 1
            return actions
        return actions + self._desk.step_broken(outcome.step, outcome.failure, worker.id)

    def _settle(self, actions: list[Action], now: float) -> list[Action]:
        """Start what can be started after any change."""
        return actions + self._next_sends(now)

    def _next_sends(self, now: float) -> list[Action]:
        """Return the messages that free what ended and begin the next step, if none is under way.

        One step at a time: all requests that run go together in it.
        """
        pipeline = self._pipeline
        if pipeline is None:
            return []
        actions: list[Action] = []
        freed = self._desk.take_freed()
        for at in range(0, len(freed), _RELEASE_BATCH):
            release = ReleaseSequences(
                epoch=self._epoch, sequence_ids=tuple(freed[at : at + _RELEASE_BATCH])
            )
            actions += [Send(peer, release) for peer in self._ready]
        if not pipeline.steps:
            step = self._scheduler.next_step(now=now)
            if step is not None:
                actions += map(_sending, pipeline.begin(step, now=now))
        return actions

    def _event(self, text: str, level: Literal["info", "warning", "error"] = "info") -> Log:
        self._events.append(text[:1000])
        return Log(text, level)

    def validate(self) -> None:
        """Assert the invariants; tests call this after every step."""
        self._registry.validate()
        self._desk.validate()
        if self._pipeline:
            self._pipeline.validate()
        assert (self._state == "serving") == (self._pipeline is not None)
        assert (self._state == "waiting") == (not self._plan)
        at = 0
        for stage in self._plan:
            assert stage.layers.start == at
            at = stage.layers.stop
        assert at == (self._model.cost.num_layers if self._plan else 0)


def _sending(send: SendTask) -> Action:
    return Send(send.peer, send.task, send.frames)


def _refusal(peer: PeerId, error: DistributedLLMError, code: str | None = None) -> Send:
    return Send(peer, Refused(code=code or error.code, message=str(error)[:4096]))


def _count(worker: Worker, step: Step, compute_s: float) -> None:
    decodes = all(part.num_tokens == 1 for part in step.slices)
    worker.count_task(compute_s, len(step.slices) if decodes else 0)
    assert worker.layers is not None
    for request in step.requests:
        request.add_stage_time(worker.id, worker.layers, compute_s)
