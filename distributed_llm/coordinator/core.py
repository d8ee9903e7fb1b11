"""The coordinator's decisions: events in, actions out. Pure.

It joins the registry (who is there), the placement (who serves what), the desk (what was asked) and
the replicas (steps under way).

When a worker of a plan is lost, the layers are planned anew over those that are left, under a
larger epoch; answers of the old epoch are dropped, and the requests that ran there compute their
tokens again on the new stages. Sampling depends on nothing but the tokens, so no answer changes. A
worker that joins is used as soon as no request is under way.
"""

from collections.abc import Callable
from typing import Literal, assert_never

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
    LinkReport,
    Ping,
    Pong,
    Refused,
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
from distributed_llm.coordinator.admission import Admission
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
from distributed_llm.coordinator.pipeline import Dropped, SendTask, StepBroken, StepDone
from distributed_llm.coordinator.placement import CoreSettings, Placement
from distributed_llm.coordinator.registry import Registry, Worker
from distributed_llm.coordinator.replica import Replica, sending


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
        self._desk = Desk(
            model.defaults, max_waiting=settings.max_waiting_requests, draw_seed=draw_seed
        )
        self._journal = Journal()
        self._placement = Placement(
            model,
            settings,
            self._registry,
            self._desk,
            self._journal,
            draw_key=lambda: f"{draw_seed():016x}{draw_seed():016x}",
        )
        self._admission = Admission(self._desk)
        self._leases_at: float | None = None  # no lease runs out before

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
                actions = self._gone(event.peer, event.why)
            case Tokenized():
                actions = self._desk.tokenized(event)
            case TokenizeFailed():
                actions = self._desk.fail(event.key, event.error)
            case Detokenized():
                actions = self._desk.detokenized(event, now=now)
            case _:
                assert_never(event)
        return self._settle(actions, now)

    def next_deadline(self) -> float | None:
        """Return when `on_timer` is next due, clock seconds, or None."""
        waits = self._desk.busy and self._placement.complete
        deadlines = (
            self._registry.next_deadline(),
            self._desk.next_deadline(),
            self._leases_at,
            None if waits else self._placement.replan_at,
        )
        return min([at for at in deadlines if at is not None], default=None)

    def on_timer(self, *, now: float) -> list[Action]:
        """Do what is due: peers that fell silent, leases that ran out, a plan for who joined."""
        actions: list[Action] = []
        for peer in self._registry.silent(now=now):
            actions += self._gone(peer, "fell silent")
        actions += self._desk.on_timer(now=now)
        if self._leases_at is not None and self._leases_at <= now:
            actions += self._check_leases(now)
        replan_at = self._placement.replan_at
        if replan_at is not None and replan_at <= now:
            if not self._desk.busy:
                actions += self._placement.replan()
            elif not self._placement.complete:
                actions += self._placement.add()
        return self._settle(actions, now)

    def status(self, *, now: float) -> ClusterStatus:
        """Return the cluster as it is now."""
        schedulers = [r.scheduler for r in self._placement.replicas if r.scheduler]
        return ClusterStatus(
            model=self._model.name,
            state=self._placement.state,
            note=self._placement.note,
            epoch=self._placement.epoch,
            num_layers=self._model.cost.num_layers,
            context_length=self._model.defaults.context_length,
            kv_tokens=self._placement.kv_tokens,
            kv_tokens_used=sum(s.kv_tokens_used for s in schedulers),
            kv_tokens_cached=sum(s.kv_tokens_cached for s in schedulers),
            prefix_hit_tokens=self._desk.totals.prefix_hit_tokens,
            preemptions=self._desk.totals.preemptions,
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
            case (
                Heartbeat()
                | StageReady()
                | StageFailed()
                | TaskResult()
                | TaskFailed()
                | LinkReport()
            ):
                worker = self._registry.worker(peer)
                return self._from_worker(worker, event, now) if worker else self._stranger(peer)
            case Goodbye():
                return self._gone(peer, "said goodbye")
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
                return self._task_failed(worker, task_failed)
            case LinkReport() as report:
                return self._link_report(worker, report)
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
        earlier = self._registry.remove_instance(hello.instance)
        worker = self._registry.add_worker(peer, hello, now=now)
        self._placement.replan_at = now + self._settings.settle_s
        welcome = Welcome(
            worker_id=worker.id,
            heartbeat_interval_s=self._settings.heartbeat_interval_s,
            silence_timeout_s=self._settings.silence_timeout_s,
        )
        offer = hello.capabilities
        actions: list[Action] = [
            Send(peer, welcome),
            self._journal.note(
                f"worker {worker.id} joined: {size_text(offer.memory_bytes)} on {offer.device}"
            ),
        ]
        for session in earlier:  # its connection was not yet known to be lost
            actions += self._lost(session, "connected anew")
        return actions

    def _gone(self, peer: PeerId, why: str) -> list[Action]:
        worker = self._registry.remove(peer)
        return self._desk.drop_client(peer) if worker is None else self._lost(worker, why)

    def _lost(self, worker: Worker, why: str) -> list[Action]:
        actions: list[Action] = [self._journal.note(f"worker {worker.id} {why}", "warning")]
        replica = self._placement.replica_of(worker.peer)
        if replica and replica.pipeline:
            actions += self._desk.steps_lost(replica.pipeline.steps, worker.id)
        return actions + self._placement.lose(worker)

    def _heartbeat(self, worker: Worker, beat: Heartbeat, now: float) -> list[Action]:
        hung = self._placement.hangs(worker)
        self._registry.heartbeat(worker.peer, beat)
        replica = self._placement.replica_of(worker.peer)
        if replica and replica.pipeline and beat.tasks_waiting:
            replica.pipeline.progress(worker.peer, beat.progress_age_s, now=now)
        pong = Send(worker.peer, Pong())
        if worker.state == "serving" and beat.epoch != worker.epoch:
            return self._give_up(worker.peer, "serves another plan")
        if self._placement.hangs(worker) and worker.state == "loading":
            return [pong, *self._give_up(worker.peer, "hangs")]
        if hung and not self._placement.hangs(worker):
            self._placement.replan_at = now + self._settings.settle_s
        return [pong]

    def _give_up(self, peer: PeerId, why: str) -> list[Action]:
        error = NotReady(f"The coordinator gave this worker up because it {why}.")
        return [*self._gone(peer, why), _refusal(peer, error, "lost")]

    # -------------------------------------------------------------- steps

    def _task_result(
        self, worker: Worker, result: TaskResult, event: Received, now: float
    ) -> list[Action]:
        replica = self._replica_at(worker, result.epoch)
        if replica is None or replica.pipeline is None or replica.scheduler is None:
            return []
        outcome = replica.pipeline.result(worker.peer, result, event.frames, now=now)
        match outcome:
            case SendTask():
                return [sending(outcome)]
            case StepDone():
                counts = replica.scheduler.complete(outcome.step)
                replica.observe(outcome, now=now)
                self._count(replica, outcome)
                return self._desk.step_done(outcome, counts, replica.scheduler, now=now)
            case StepBroken():
                return self._step_broken(replica, outcome, worker)
            case Dropped():
                self._journal.rejected[outcome.reason] += 1
                return []
            case _:
                assert_never(outcome)

    def _task_failed(self, worker: Worker, failed: TaskFailed) -> list[Action]:
        replica = self._replica_at(worker, failed.epoch)
        if replica is None or replica.pipeline is None:
            return []
        outcome = replica.pipeline.failed(worker.peer, failed)
        if isinstance(outcome, Dropped):
            self._journal.rejected[outcome.reason] += 1
            return []
        return self._step_broken(replica, outcome, worker)

    def _step_broken(self, replica: Replica, broken: StepBroken, worker: Worker) -> list[Action]:
        """Suspect the step's requests, and begin anew with all that was under way."""
        assert replica.scheduler is not None
        actions = self._desk.step_broken(broken.step, broken.failure, worker.id)
        replica.scheduler.abandon(broken.step)
        replica.abandon_steps()
        return actions

    def _link_report(self, worker: Worker, report: LinkReport) -> list[Action]:
        replica = self._replica_at(worker, report.epoch)
        if replica is None:
            return []
        replica.set_link(worker.peer, report.up)
        link: Literal["direct", "relayed"] = "direct" if report.up else "relayed"
        if link == worker.link:
            return []
        worker.link = link
        how = (
            f"hands its results on itself ({1000 * report.rtt_s:.1f} ms)"
            if report.up
            else "does not reach the next worker; its results go through the coordinator"
        )
        return [self._journal.note(f"worker {worker.id} {how}")]

    def _replica_at(self, worker: Worker, epoch: int) -> Replica | None:
        replica = self._placement.replica_of(worker.peer)
        if replica is None or replica.epoch != epoch:
            self._journal.rejected["stale_epoch"] += 1
            return None
        return replica

    def _check_leases(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for replica in self._placement.replicas:
            if replica.pipeline is None:
                continue
            due = replica.pipeline.expired(now=now)
            if due == "abandon":
                text = f"plan {replica.epoch}: no progress; its steps are computed again"
                actions.append(self._journal.note(text, "warning"))
                replica.abandon_steps()
            elif due is not None:
                actions += self._give_up(due, "made no progress on a task")
        pipelines = (r.pipeline for r in self._placement.replicas if r.pipeline)
        deadlines = (pipeline.next_deadline() for pipeline in pipelines)
        self._leases_at = min((at for at in deadlines if at is not None), default=None)
        return actions

    def _count(self, replica: Replica, done: StepDone) -> None:
        tokens = len(done.step.slices) if done.step.decodes else 0
        for seat, timing in zip(replica.seats, done.timings, strict=True):
            worker = self._registry.worker(seat.peer)
            if worker is not None:
                worker.count_task(timing.compute_us / 1e6, tokens)
        for request in done.step.requests:
            request.add_stage_times(replica.epoch, replica.seats, done.timings)

    # -------------------------------------------------------------- what can be started

    def _settle(self, actions: list[Action], now: float) -> list[Action]:
        """Start what can be started after any change; stages wait for it, so it goes first."""
        if self._placement.replan_when_idle and not self._desk.busy:
            actions += self._placement.replan()
        sends: list[Action] = []
        self._admission.admit(now=now)
        while self._placement.changed:
            _, replica = self._placement.changed.popitem()
            sends += replica.begin_steps(now=now)
            if replica.scheduler:
                self._desk.collect(replica.scheduler)
                self._admission.may_have_room(replica)
            self._admission.admit(now=now)
        if self._leases_at is None and sends:
            self._leases_at = now + self._settings.task_timeout_s
        return sends + actions

    def validate(self) -> None:
        """Assert the invariants; tests call this after every step."""
        self._registry.validate()
        self._desk.validate()
        self._placement.validate()
        pipelines = [r.pipeline for r in self._placement.replicas if r.pipeline]
        if pipelines and self._desk.next_waiting():
            assert any(p.num_steps for p in pipelines), "requests wait while nothing runs"


def _refusal(peer: PeerId, error: DistributedLLMError, code: str | None = None) -> Send:
    return Send(peer, Refused(code=code or error.code, message=str(error)[:4096]))
