"""The coordinator's decisions: events in, actions out. Pure.

It joins the registry (who is there), the placement (who serves what), the desk (what was asked) and
the stepping (steps under way); the rebalancing says when layers should move, the departures who is
to leave, and the relocation moves them.

When a worker of a plan is lost, the layers are planned anew over those that are left, under a
larger epoch; answers of the old epoch are dropped, and the requests that ran there compute their
tokens again on the new stages. Sampling depends on nothing but the tokens, so no answer changes. A
worker that joins is used, under strategy "speed", as soon as that is faster; under the others as
soon as no request is under way.
"""

from collections.abc import Callable
from typing import Literal, assert_never

from distributed_llm.common.codec import encode_payload
from distributed_llm.common.errors import (
    NotReady,
    ProtocolMismatch,
)
from distributed_llm.common.messages import (
    Cancel,
    CancelStage,
    ClientHello,
    ClusterStatus,
    DrainWorker,
    Generate,
    GetStatus,
    Goodbye,
    Heartbeat,
    KVCopied,
    KVFailed,
    Leaving,
    LinkReport,
    Ping,
    Pong,
    Remeasured,
    StageFailed,
    StageReady,
    StatusReport,
    TaskFailed,
    TaskResult,
    TookOver,
    WorkerHello,
    WorkerStatus,
)
from distributed_llm.common.settings import CoordinatorSettings
from distributed_llm.common.tensors import ITEM_BYTES, frame_of_bytes
from distributed_llm.common.types import PeerId
from distributed_llm.coordinator.cluster.departures import Departures
from distributed_llm.coordinator.cluster.pipelines import Pipelines
from distributed_llm.coordinator.cluster.placement import Placement
from distributed_llm.coordinator.cluster.rebalancing import Rebalancing
from distributed_llm.coordinator.cluster.registry import Registry, Worker
from distributed_llm.coordinator.cluster.relocation import Relocation
from distributed_llm.coordinator.events import (
    Action,
    ConnectionClosed,
    Detokenized,
    Event,
    Garbage,
    Log,
    Received,
    Send,
    Studied,
    StudyFailed,
    Tokenized,
    TokenizeFailed,
    Unreachable,
)
from distributed_llm.coordinator.membership import Membership, refusal
from distributed_llm.coordinator.model import ServedModel
from distributed_llm.coordinator.planning.plan_search import FoundPlans
from distributed_llm.coordinator.planning.planner import Planner
from distributed_llm.coordinator.serving.admission import Admission
from distributed_llm.coordinator.serving.event_log import EventLog
from distributed_llm.coordinator.serving.request_book import RequestBook
from distributed_llm.coordinator.speeds.measurements import Measurements
from distributed_llm.coordinator.stepping import Stepping

_OfClient = Generate | Cancel | GetStatus | DrainWorker | Ping
"""Messages of a client's session, after its hello."""

_OfWorker = (
    Heartbeat
    | StageReady
    | StageFailed
    | TaskResult
    | TaskFailed
    | LinkReport
    | Remeasured
    | KVCopied
    | TookOver
    | KVFailed
    | Leaving
)
"""Messages of a worker's session, between its hello and its goodbye."""


class Core:
    """One model, its workers and its requests.

    Args:
        model: what is served.
        settings: how.
        draw_seed: gives a seed for a request without one.
    """

    def __init__(
        self, model: ServedModel, settings: CoordinatorSettings, *, draw_seed: Callable[[], int]
    ) -> None:
        self._model = model
        self._settings = settings
        self._registry = Registry(silence_timeout_s=settings.silence_timeout_s)
        self._book = RequestBook(
            model.defaults, max_waiting=settings.max_waiting_requests, draw_seed=draw_seed
        )
        self._event_log = event_log = EventLog()
        self._measurements = Measurements(
            model.cost,
            item_bytes=ITEM_BYTES[model.dtype],
            bytes_per_token=model.activation_bytes,
        )
        planner = Planner.of(model, settings)
        self._pipelines = Pipelines(
            model,
            settings,
            self._registry,
            self._book,
            event_log,
            draw_key=lambda: f"{draw_seed():016x}{draw_seed():016x}",
            wants_trials=lambda worker: (
                settings.strategy == "speed" and self._measurements.untried(worker)
            ),
        )
        self._placement = Placement(
            settings,
            self._registry,
            self._book,
            event_log,
            planner,
            self._measurements,
            self._pipelines,
        )
        self._relocation = Relocation(
            model.cost, self._pipelines, self._registry, event_log, self._measurements
        )
        self._departures = Departures(
            self._placement,
            planner,
            self._measurements,
            self._relocation,
            self._registry,
            event_log,
        )
        self._rebalancing = Rebalancing(
            model.cost,
            settings,
            self._placement,
            planner,
            self._relocation,
            self._measurements,
            self._registry,
            event_log,
        )
        self._membership = Membership(
            model.name,
            settings,
            self._registry,
            self._placement,
            self._book,
            self._relocation,
            self._departures,
            self._measurements,
            event_log,
        )
        self._stepping = Stepping(
            self._placement,
            self._book,
            self._registry,
            event_log,
            self._measurements,
            self._rebalancing,
            task_timeout_s=settings.task_timeout_s,
            give_up=lambda peer, now: self._membership.give_up(
                peer, "made no progress on a task", now=now
            ),
        )
        self._admission = Admission(self._book)

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
                actions = self._membership.gone(event.peer, event.why, now=now)
            case Studied(result=FoundPlans() as found):
                actions = self._rebalancing.studied(found, now=now)
            case Studied(result=result):
                raise TypeError(f"a study returned {result!r}")
            case StudyFailed():
                self._rebalancing.study_failed()
                actions = [Log(f"looking for a better plan failed: {event.error}", "error")]
            case Tokenized():
                actions = self._book.tokenized(event)
            case TokenizeFailed():
                actions = self._book.fail(event.key, event.error)
            case Detokenized():
                actions = self._book.detokenized(event, now=now)
            case _:
                assert_never(event)
        return self._settle(actions, now)

    def next_deadline(self) -> float | None:
        """Return when `on_timer` is next due, clock seconds, or None."""
        waits = self._book.busy and self._placement.complete
        deadlines = (
            self._registry.next_deadline(),
            self._book.next_deadline(),
            self._stepping.next_deadline(),
            self._rebalancing.next_deadline(),
            self._relocation.next_deadline(),
            None if waits else self._placement.replan_at,
        )
        return min([at for at in deadlines if at is not None], default=None)

    def on_timer(self, *, now: float) -> list[Action]:
        """Do what is due: peers that fell silent, leases that ran out, a plan for who joined."""
        actions: list[Action] = []
        for peer in self._registry.silent(now=now):
            actions += self._membership.gone(peer, "fell silent", now=now)
        actions += self._book.on_timer(now=now)
        actions += self._stepping.on_timer(now=now)
        actions += self._relocation.on_timer(now=now)
        actions += self._rebalancing.on_timer(now=now)
        replan_at = self._placement.replan_at
        if replan_at is not None and replan_at <= now:
            actions += self._use_joined()
        return self._settle(actions, now)

    def _use_joined(self) -> list[Action]:
        """Plan for workers that joined; under strategy "speed" the rebalancing sees to them."""
        if self._settings.strategy == "speed" and self._placement.state != "waiting":
            actions = [] if self._placement.complete else self._placement.add()
            self._placement.replan_at, self._placement.replan_when_idle = None, False
            return actions
        if self._relocation.move is not None:  # when it is over
            self._placement.replan_at, self._placement.replan_when_idle = None, True
            return []
        if not self._book.busy:
            return self._placement.replan()
        return [] if self._placement.complete else self._placement.add()

    def status(self, *, now: float) -> ClusterStatus:
        """Return the cluster as it is now."""
        schedulers = [r.scheduler for r in self._placement.pipelines if r.scheduler]
        return ClusterStatus(
            model=self._model.name,
            state=self._placement.state,
            note=self._placement.note,
            epoch=self._pipelines.epoch,
            num_layers=self._model.cost.num_layers,
            context_length=self._model.defaults.context_length,
            kv_tokens=self._pipelines.kv_tokens,
            kv_tokens_used=sum(s.kv_tokens_used for s in schedulers),
            kv_tokens_cached=sum(s.kv_tokens_cached for s in schedulers),
            prefix_hit_tokens=self._book.totals.prefix_hit_tokens,
            preemptions=self._book.totals.preemptions,
            moves=self._relocation.num_moves,
            move_stall_s=self._relocation.stall_s,
            requests_running=self._book.num_running,
            requests_waiting=self._book.num_waiting,
            requests_finished=self._book.totals.finished,
            requests_failed=self._book.totals.failed,
            tokens_generated=self._book.totals.tokens,
            rejected=dict(self._event_log.rejected),
            workers=tuple(self._worker_status(worker, now) for worker in self._registry.workers),
            events=tuple(self._event_log.events),
        )

    def _worker_status(self, worker: Worker, now: float) -> WorkerStatus:
        advice = self._rebalancing.advice.get(worker.id)
        return worker.status(
            prediction_error=self._measurements.error(worker.id),
            gain=advice.gain if advice else None,
            advice=advice.text if advice else "",
            now=now,
        )

    # -------------------------------------------------------------- messages

    def _received(self, event: Received, now: float) -> list[Action]:
        peer, message = event.peer, event.message
        self._registry.heard(peer, now=now)
        if isinstance(message, _OfClient):
            if not self._registry.is_client(peer):
                return self._stranger(peer)
            return self._from_client(message, event, now)
        if isinstance(message, _OfWorker):
            worker = self._registry.worker(peer)
            if worker is None:
                return self._stranger(peer)
            return self._from_worker(worker, message, event, now)
        match message:
            case WorkerHello():
                return self._membership.worker_joins(peer, message, now=now)
            case ClientHello():
                return self._membership.client_joins(peer, now=now)
            case Goodbye():
                return self._membership.gone(peer, "said goodbye", now=now)
            case _:
                assert_never(message)

    def _from_client(self, message: _OfClient, event: Received, now: float) -> list[Action]:
        peer = event.peer
        match message:
            case Generate(request_id=request_id):
                if self._book.has(peer, request_id):
                    self._event_log.rejected["duplicate_request"] += 1
                    return []
                if self._placement.state == "waiting":
                    return self._book.refuse(peer, request_id, NotReady(self._placement.note))
                return self._book.submit(peer, message, event.frames, now=now)
            case Cancel(request_id=request_id):
                return self._book.cancel(peer, request_id)
            case GetStatus():
                spec, frame = frame_of_bytes(encode_payload(self.status(now=now)))
                return [Send(peer, StatusReport(tensors=(spec,)), (frame,))]
            case DrainWorker(worker=name):
                return self._departures.drain(peer, name)
            case Ping():
                return [Send(peer, Pong())]
            case _:
                assert_never(message)

    def _from_worker(
        self, worker: Worker, message: _OfWorker, event: Received, now: float
    ) -> list[Action]:
        match message:
            case Heartbeat() as beat:
                return self._membership.heartbeat(worker, beat, now=now)
            case StageReady() as ready:
                self._rebalancing.wake(now=now)
                if worker.layers and worker.epoch == ready.epoch:
                    self._measurements.tried(worker.id, worker.layers, ready.trials, now=now)
                moving = self._relocation.stage_ready(worker, ready, now=now)
                return self._placement.stage_ready(worker, ready) if moving is None else moving
            case StageFailed() as failed:
                return self._stage_failed(worker, failed, now)
            case TaskResult() as result:
                return self._stepping.result(worker, result, event, now=now)
            case TaskFailed() as task_failed:
                return self._stepping.failed(worker, task_failed)
            case LinkReport() as report:
                return self._link_report(worker, report)
            case Remeasured() as remeasured:
                return self._membership.remeasured(worker, remeasured)
            case KVCopied() as copied:
                return self._relocation.copied(worker, copied, now=now)
            case TookOver(epoch=epoch):
                return self._relocation.took_over(worker, epoch)
            case KVFailed() as kv_failed:
                return self._relocation.kv_failed(worker, kv_failed, now=now)
            case Leaving():
                return self._departures.leave(worker)
            case _:
                assert_never(message)

    def _stranger(self, peer: PeerId) -> list[Action]:
        """Answer one who spoke before its hello, or was given up: it shall say hello again."""
        self._event_log.rejected["bad_state"] += 1
        error = NotReady("The coordinator does not know this session. Connect again.")
        return [refusal(peer, error, "lost")]

    def _garbage(self, event: Garbage) -> list[Action]:
        self._event_log.rejected[event.reason] += 1
        actions: list[Action] = [Log(f"dropped a message: {event.error}"[:1000], "warning")]
        if isinstance(event.error, ProtocolMismatch):
            actions.append(refusal(event.peer, event.error))
        return actions

    def _stage_failed(self, worker: Worker, failed: StageFailed, now: float) -> list[Action]:
        moving = self._relocation.stage_failed(worker, failed, now=now)
        return self._placement.stage_failed(worker, failed) if moving is None else moving

    def _link_report(self, worker: Worker, report: LinkReport) -> list[Action]:
        pipeline = self._relocation.loading(report.epoch) or self._placement.pipeline_of(
            worker.peer
        )
        if pipeline is None or pipeline.epoch != report.epoch:
            self._event_log.rejected["stale_epoch"] += 1
            return []
        pipeline.set_link(worker.peer, report.up)
        following = pipeline.following(worker.peer)
        if following is not None:
            self._measurements.observe_link(worker.id, following.worker, report)
        if pipeline.in_flight is None and worker.next_layers:
            return []  # the link of what it serves is another one
        link: Literal["direct", "relayed"] = "direct" if report.up else "relayed"
        if link == worker.link:
            return []
        worker.link = link
        how = (
            f"hands its results on itself ({1000 * report.rtt_s:.1f} ms)"
            if report.up
            else "does not reach the next worker; its results go through the coordinator"
        )
        return [self._event_log.note(f"worker {worker.id} {how}")]

    # -------------------------------------------------------------- what can be started

    def _settle(self, actions: list[Action], now: float) -> list[Action]:
        """Start what can be started after any change; stages wait for it, so it goes first."""
        if self._placement.replan_when_idle and not self._book.busy:
            actions += self._use_joined()
        actions += self._relocation.settle(now=now)
        actions += self._departures.settle(now=now)
        sends: list[Action] = []
        self._admission.admit(now=now)
        while self._pipelines.changed:
            _, pipeline = self._pipelines.changed.popitem()
            sends += pipeline.begin_steps(now=now)
            if pipeline.scheduler:
                self._book.collect(pipeline.scheduler)
                self._admission.may_have_room(pipeline)
            self._admission.admit(now=now)
        if sends:
            self._stepping.began(now=now)
        first = [action for action in actions if _undoes(action)]
        return [*first, *sends, *(action for action in actions if not _undoes(action))]

    def validate(self) -> None:
        """Assert the invariants; tests call this after every step."""
        self._registry.validate()
        self._book.validate()
        self._pipelines.validate()
        waiting = self._book.next_waiting()
        needed = waiting.ticket.reserved_tokens if waiting else 0
        replicas = [r for r in self._placement.pipelines if r.kv_tokens >= needed]
        all_in_flight = [r.in_flight for r in replicas if r.in_flight]
        if all_in_flight and waiting and not self._relocation.move:
            assert any(p.num_steps for p in all_in_flight), "requests wait while nothing runs"


def _undoes(action: Action) -> bool:
    """Return whether tasks that are sent now are void until this has arrived."""
    return isinstance(action, Send) and isinstance(action.message, CancelStage)
