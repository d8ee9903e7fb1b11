"""The coordinator's decisions: events in, actions out. Pure.

It joins the registry (who is there), the placement (who serves what), the desk (what was asked) and
the pipeline (steps under way).

When a worker of the plan is lost, the layers are planned anew over those that are left, under a
larger epoch; answers of the old epoch are dropped, and every running request computes its tokens
again on the new stages. Sampling depends on nothing but the tokens, so no answer changes. A worker
that joins is used as soon as no request is under way.
"""

from collections.abc import Callable
from typing import assert_never

from distributed_llm.common.codec import encode_payload
from distributed_llm.common.errors import (
    DistributedLLMError,
    NotReady,
    ProtocolMismatch,
)
from distributed_llm.common.messages import (
    Cancel,
    ClientHello,
    ClientWelcome,
    ClusterStatus,
    Generate,
    GetStatus,
    Goodbye,
    Heartbeat,
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
from distributed_llm.common.types import PeerId, size_text
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
    Tokenized,
    TokenizeFailed,
    Unreachable,
)
from distributed_llm.coordinator.journal import Journal
from distributed_llm.coordinator.model import ServedModel
from distributed_llm.coordinator.pipeline import (
    Dropped,
    SendTask,
    StepBroken,
    StepDone,
)
from distributed_llm.coordinator.placement import CoreSettings, Placement
from distributed_llm.coordinator.registry import Registry, Worker
from distributed_llm.coordinator.scheduler import Scheduler, Step

_MAX_EVENTS = 50
_RELEASE_BATCH = 1024


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
        self._journal = Journal()
        self._placement = Placement(model, settings, self._registry, self._desk, self._journal)

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
            self._placement.pipeline.next_deadline() if self._placement.pipeline else None,
            None if self._desk.busy else self._placement.replan_at,
        )
        return min((at for at in deadlines if at is not None), default=None)

    def on_timer(self, *, now: float) -> list[Action]:
        """Do what is due: peers that fell silent, leases that ran out, a plan for who joined."""
        actions: list[Action] = []
        for peer in self._registry.silent(now=now):
            actions += self._gone(peer, "fell silent", now)
        if self._placement.pipeline:
            sends, given_up = self._placement.pipeline.on_timer(now=now)
            actions += map(_sending, sends)
            for peer in given_up:
                actions += self._give_up(peer, "made no progress on a task", now)
        replan_at = self._placement.replan_at
        if replan_at is not None and replan_at <= now and not self._desk.busy:
            actions += self._placement.replan()
        return self._settle(actions, now)

    def status(self, *, now: float) -> ClusterStatus:
        """Return the cluster as it is now."""
        return ClusterStatus(
            model=self._model.name,
            state=self._placement.state,
            note=self._placement.note,
            epoch=self._placement.epoch,
            num_layers=self._model.cost.num_layers,
            context_length=self._model.defaults.context_length,
            kv_tokens=self._placement.kv_tokens,
            requests_running=self._desk.num_running,
            requests_waiting=self._desk.num_waiting,
            requests_finished=self._desk.totals.finished,
            requests_failed=self._desk.totals.failed,
            tokens_generated=self._desk.totals.tokens,
            rejected=dict(self._journal.rejected),
            workers=tuple(worker.status(now=now) for worker in self._registry.workers),
            events=tuple(self._journal.events),
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
                    self._journal.rejected["duplicate_request"] += 1
                    return []
                if self._placement.state == "waiting":
                    return self._desk.refuse(peer, request_id, NotReady(self._placement.note))
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
                return self._placement.stage_ready(worker, ready)
            case StageFailed() as failed:
                return self._placement.stage_failed(worker, failed)
            case TaskResult() as result:
                return self._task_result(worker, result, event, now)
            case TaskFailed() as task_failed:
                return self._task_failed(worker, task_failed, now)
            case _:
                return []

    def _stranger(self, peer: PeerId) -> list[Action]:
        """Answer one who spoke before its hello, or was given up: it shall say hello again."""
        self._journal.rejected["bad_state"] += 1
        error = NotReady("The coordinator does not know this session. Connect again.")
        return [_refusal(peer, error, "lost")]

    def _garbage(self, event: Garbage) -> list[Action]:
        self._journal.rejected[event.reason] += 1
        actions: list[Action] = [Log(f"dropped a message: {event.error}"[:1000], "warning")]
        if isinstance(event.error, ProtocolMismatch):
            actions.append(_refusal(event.peer, event.error))
        return actions

    # -------------------------------------------------------------- who comes and goes

    def _client_joins(self, peer: PeerId, now: float) -> list[Action]:
        if self._registry.knows(peer):
            self._journal.rejected["bad_state"] += 1
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
            self._journal.rejected["bad_state"] += 1
            return []
        worker = self._registry.add_worker(peer, hello, now=now)
        self._placement.replan_at = now + self._settings.settle_s
        welcome = Welcome(
            worker_id=worker.id,
            heartbeat_interval_s=self._settings.heartbeat_interval_s,
            silence_timeout_s=self._settings.silence_timeout_s,
        )
        offer = hello.capabilities
        return [
            Send(peer, welcome),
            self._journal.note(
                f"worker {worker.id} joined: {size_text(offer.memory_bytes)} on {offer.device}"
            ),
        ]

    def _gone(self, peer: PeerId, why: str, now: float) -> list[Action]:
        worker = self._registry.remove(peer)
        if worker is None:
            return self._desk.drop_client(peer)
        actions: list[Action] = [self._journal.note(f"worker {worker.id} {why}", "warning")]
        if self._placement.uses(worker.id):
            if self._placement.pipeline:
                actions += self._desk.steps_lost(self._placement.pipeline.steps_at(peer), worker.id)
            actions += self._placement.replan(lost=worker.id)
        return actions

    def _heartbeat(self, worker: Worker, beat: Heartbeat, now: float) -> list[Action]:
        hung = self._placement.hangs(worker)
        self._registry.heartbeat(worker.peer, beat)
        if self._placement.pipeline and beat.tasks_waiting:
            self._placement.pipeline.progress(worker.peer, beat.progress_age_s, now=now)
        pong = Send(worker.peer, Pong())
        if worker.state == "serving" and beat.epoch != self._placement.epoch:
            return self._give_up(worker.peer, "serves another plan", now)
        if self._placement.hangs(worker) and worker.state == "loading":
            return [pong, *self._give_up(worker.peer, "hangs", now)]
        if hung and not self._placement.hangs(worker):
            self._placement.replan_at = now + self._settings.settle_s
        return [pong]

    def _give_up(self, peer: PeerId, why: str, now: float) -> list[Action]:
        error = NotReady(f"The coordinator gave this worker up because it {why}.")
        return [*self._gone(peer, why, now), _refusal(peer, error, "lost")]

    # -------------------------------------------------------------- steps

    def _task_result(
        self, worker: Worker, result: TaskResult, event: Received, now: float
    ) -> list[Action]:
        if self._placement.pipeline is None or result.epoch != self._placement.epoch:
            self._journal.rejected["stale_epoch"] += 1
            return []
        step = self._placement.pipeline.step_at(worker.peer, result.step)
        sends, outcome = self._placement.pipeline.result(worker.peer, result, event.frames, now=now)
        actions: list[Action] = [*map(_sending, sends)]
        if isinstance(outcome, Dropped):
            self._journal.rejected[outcome.reason] += 1
            return actions
        if step is not None:
            _count(worker, step, result.compute_s)
        if isinstance(outcome, StepDone):
            done = self._desk.step_done(outcome.step, outcome.token_ids, now=now)
            return [*actions, *self._next_sends(now), *done]
        if isinstance(outcome, StepBroken):
            actions += self._desk.step_broken(outcome.step, outcome.failure, worker.id)
        return actions

    def _task_failed(self, worker: Worker, failed: TaskFailed, now: float) -> list[Action]:
        if self._placement.pipeline is None or failed.epoch != self._placement.epoch:
            self._journal.rejected["stale_epoch"] += 1
            return []
        sends, outcome = self._placement.pipeline.failed(worker.peer, failed, now=now)
        actions: list[Action] = [*map(_sending, sends)]
        if isinstance(outcome, Dropped):
            self._journal.rejected[outcome.reason] += 1
            return actions
        return actions + self._desk.step_broken(outcome.step, outcome.failure, worker.id)

    def _settle(self, actions: list[Action], now: float) -> list[Action]:
        """Start what can be started after any change."""
        return actions + self._next_sends(now)

    def _next_sends(self, now: float) -> list[Action]:
        """Return the messages that free what ended and begin the next step, if none is under way.

        One step at a time: all requests that run go together in it.
        """
        pipeline = self._placement.pipeline
        if pipeline is None:
            return []
        actions: list[Action] = []
        freed = self._desk.take_freed()
        for at in range(0, len(freed), _RELEASE_BATCH):
            release = ReleaseSequences(
                epoch=self._placement.epoch, sequence_ids=tuple(freed[at : at + _RELEASE_BATCH])
            )
            actions += [Send(peer, release) for peer in pipeline.peers]
        if not pipeline.steps:
            step = self._scheduler.next_step(now=now)
            if step is not None:
                actions += map(_sending, pipeline.begin(step, now=now))
        return actions

    def validate(self) -> None:
        """Assert the invariants; tests call this after every step."""
        self._registry.validate()
        self._desk.validate()
        self._placement.validate()


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
