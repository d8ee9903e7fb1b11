"""The coordinator's decisions: events in, actions out. Pure.

`Core` joins the rooms: who is there and who serves what (`cluster`), what was asked and is computed
(`serving`), and how fast everything is (`speeds`). It dispatches every event once; then it starts
whatever can be started.

When a worker of a pipeline is lost, the layers are planned anew over those that are left, under a
larger epoch; results of the old epoch are dropped, and the answers that ran there compute their
tokens again on the new stages. Sampling depends on nothing but the tokens, so no answer changes.
"""

from collections.abc import Callable
from typing import assert_never

from distributed_llm.common.codec import encode_payload
from distributed_llm.common.errors import (
    DistributedLLMError,
    InvalidRequest,
    NotReady,
    ProtocolMismatch,
    RemoteProtocolError,
)
from distributed_llm.common.keys import PublicKey
from distributed_llm.common.log_limit import LogLimit, left_out_text
from distributed_llm.common.messages import (
    Cancel,
    ClientHello,
    ClientRequest,
    ClusterStatus,
    CreateToken,
    DecodeTokens,
    DescribeModel,
    DrainWorker,
    Embed,
    EncodePrompt,
    Enrol,
    Generate,
    GetMembers,
    GetStatus,
    Goodbye,
    HandedOver,
    Heartbeat,
    KVCopied,
    KVFailed,
    Leaving,
    LinkReport,
    ModelDescribed,
    NotUnderstood,
    Ping,
    Pong,
    ReadmitMachine,
    Remeasured,
    RemoveMachine,
    RequestId,
    RevokeToken,
    StageFailed,
    StageReady,
    StatusReport,
    TaskFailed,
    TaskResult,
    UndoMove,
    WeightRequest,
    WorkerHello,
    WorkerReport,
    tag_of,
)
from distributed_llm.common.settings import CoordinatorSettings
from distributed_llm.common.tensors import Frame, frame_of_bytes
from distributed_llm.common.types import PeerId
from distributed_llm.coordinator.cluster.cluster import Cluster
from distributed_llm.coordinator.cluster.departures import Departures
from distributed_llm.coordinator.cluster.moves import Moves
from distributed_llm.coordinator.cluster.newcomers import Newcomers
from distributed_llm.coordinator.cluster.rebalancing import Rebalancing
from distributed_llm.coordinator.cluster.replanning import Replanning
from distributed_llm.coordinator.cluster.worker import Worker
from distributed_llm.coordinator.events import (
    Action,
    AnswerAboutWeights,
    ConnectionClosed,
    Detokenized,
    Event,
    Garbage,
    Log,
    Received,
    Send,
    Stalled,
    Studied,
    StudyFailed,
    TextAnswered,
    TextFailed,
    Tokenized,
    Unreachable,
)
from distributed_llm.coordinator.gate import Gate
from distributed_llm.coordinator.membership import Membership, refusal
from distributed_llm.coordinator.model import ServedModel
from distributed_llm.coordinator.planning.plan_question import PlanQuestion, PlanReply
from distributed_llm.coordinator.planning.plan_search import PlanSearch, SearchResult
from distributed_llm.coordinator.planning.planner import Planner
from distributed_llm.coordinator.reporting import Reporting
from distributed_llm.coordinator.serving.admission import Admission
from distributed_llm.coordinator.serving.event_log import Entry, EventKind
from distributed_llm.coordinator.serving.pipeline import PipelineState
from distributed_llm.coordinator.stepping import Stepping
from distributed_llm.coordinator.trust.access import Access
from distributed_llm.coordinator.trust.conduct import Fault
from distributed_llm.coordinator.unread import failure_of

_REQUESTS = tuple(tag_of(kind) for kind in (Generate, Embed, EncodePrompt, DecodeTokens))
"""Messages of clients that are answered by an id of the client's making."""

_DROPPED = "dropped messages"
_MOST_DROPPED = 5
"""Messages that could not be read of which the log tells in a minute; the others are counted."""


class Core:
    """Decides what a coordinator does: about the workers of one model, and its requests.

    Args:
        model: the model that is served.
        draw_seed: draws a seed for a request that has none.
        access: who may do what; everybody may do everything unless given.
    """

    def __init__(
        self,
        model: ServedModel,
        settings: CoordinatorSettings,
        *,
        draw_seed: Callable[[], int],
        access: Access | None = None,
    ) -> None:
        self._access = access or Access(None, wall_clock=lambda: 0.0)
        self._cluster = cluster = Cluster.create(model, settings, draw_seed=draw_seed)
        planner = Planner.from_settings(model, settings)
        self._replanning = Replanning(cluster, planner)
        self._moves = Moves(cluster)
        self._newcomers = Newcomers(cluster, self._replanning, self._moves)
        self._departures = Departures(cluster, planner, self._replanning, self._moves)
        self._rebalancing = Rebalancing(cluster, planner, self._replanning, self._moves)
        self._membership = Membership(cluster, self._replanning, self._moves, self._departures)
        self._gate = Gate(cluster, self._access, self._membership)
        self._stepping = Stepping(
            cluster,
            self._moves,
            self._rebalancing,
            give_up=self._give_up,
            of_no_use=self._of_no_use,
        )
        self._admission = Admission(cluster.book, cluster.event_log)
        self._reporting = Reporting(
            cluster, self._replanning, self._moves, self._rebalancing, self._access
        )
        self._log_limit = LogLimit({_DROPPED: _MOST_DROPPED})
        self._registry = cluster.registry
        self._pipelines = cluster.pipelines
        self._book = cluster.book
        self._questions = cluster.questions
        self._event_log = cluster.event_log

    def _give_up(self, peer: PeerId, why: str, now: float) -> list[Action]:
        return self._membership.give_up(peer, why, now=now)

    def _of_no_use(self, worker: Worker, reason: str, now: float) -> list[Action]:
        return self._gate.of_no_use(worker, reason, now=now)

    # -------------------------------------------------------------- what the edge calls

    def start(self, *, now: float) -> list[Action]:
        """Return what to do before the first event; call it once."""
        self._event_log.now = self._reporting.started_at = now
        names = self._cluster.model.defaults.not_followed
        if not names:
            return []
        kind = EventKind.PARAMETERS_NOT_FOLLOWED
        return [self._event_log.note(kind, names=", ".join(names))]

    def handle(self, event: Event, *, now: float) -> list[Action]:
        """Apply an event that happened at `now`, clock seconds; return what to do about it."""
        self._event_log.now = now
        if isinstance(event, Received | Garbage):
            turned_away = self._gate.turn_away(event, now=now)
            if turned_away is not None:  # a flood of these should cost little
                return self._settle(turned_away, now) if turned_away else []
        return self._settle(self._handle(event, now), now)

    def next_deadline(self) -> float | None:
        """Return when `on_timer` is next due, clock seconds, or None."""
        deadlines = (
            self._registry.next_deadline(),
            self._book.next_deadline(),
            self._stepping.next_deadline(),
            self._rebalancing.next_deadline(),
            self._moves.next_deadline(),
            self._log_limit.next_deadline(),
            self._gate.next_deadline(),
            self._newcomers.next_deadline(),
        )
        return min([at for at in deadlines if at is not None], default=None)

    def on_timer(self, *, now: float) -> list[Action]:
        """Do what is due: about silent peers, timeouts, leases, moves, and workers that joined."""
        self._event_log.now = now
        actions: list[Action] = []
        for peer in self._registry.silent(now=now):
            actions += self._membership.gone(peer, "fell silent", now=now)
        actions += self._gate.on_timer(now=now)
        actions += self._book.on_timer(now=now)
        actions += self._stepping.on_timer(now=now)
        actions += self._moves.on_timer(now=now)
        actions += self._rebalancing.on_timer(now=now)
        actions += self._newcomers.on_timer(now=now)
        left_out = self._log_limit.take_left_out(now=now)
        actions += [Log(left_out_text(kind, count), "warning") for kind, count in left_out]
        return self._settle(actions, now)

    def status(self, *, now: float) -> ClusterStatus:
        """Return the cluster as it is now."""
        return self._reporting.status(now=now)

    def story(self, *, request: str | None = None, worker: str | None = None) -> list[Entry]:
        """Return the events kept of one request or of one worker, oldest first."""
        return self._event_log.story(request=request, worker=worker)

    # -------------------------------------------------------------- dispatch

    def _handle(self, event: Event, now: float) -> list[Action]:
        match event:
            case Received():
                return self._received(event, now)
            case Garbage():
                return self._garbage(event, now)
            case ConnectionClosed():
                return [Send(peer, Pong()) for peer in self._registry.peers]
            case Unreachable():
                return self._membership.gone(event.peer, event.why, now=now)
            case Stalled(stall_s=stall_s):
                return self._membership.stalled(stall_s, now=now)
            case Studied():
                return self._studied(event.reply, now)
            case StudyFailed():
                return self._study_failed(event, now)
            case Tokenized():
                return self._book.tokenized(event)
            case TextFailed() if self._questions.is_asked(event.key):
                return self._questions.answered(event)
            case TextFailed():
                return self._book.fail(event.key, event.error)
            case Detokenized():
                return self._book.detokenized(event, now=now)
            case TextAnswered():
                return self._questions.answered(event)
            case _:
                assert_never(event)

    def _received(self, event: Received, now: float) -> list[Action]:
        peer, message = event.peer, event.message
        if isinstance(message, WeightRequest):  # of no session
            return [AnswerAboutWeights(peer, message)]
        self._registry.heard(peer, now=now)
        if isinstance(message, ClientRequest):
            if not self._registry.is_client(peer):
                return self._gate.out_of_turn(peer, event.key, now=now)
            return self._from_client(peer, event.key, message, event.frames, now)
        if isinstance(message, WorkerReport):
            worker = self._registry.worker(peer)
            if worker is None:
                return self._gate.out_of_turn(peer, event.key, now=now)
            return self._from_worker(worker, message, event.frames, now)
        if isinstance(message, WorkerHello | ClientHello) and self._registry.knows(peer):
            return self._gate.second_hello(peer, event.key, now=now)
        match message:
            case WorkerHello():
                return self._membership.worker_joins(
                    peer,
                    event.key,
                    message,
                    reserved=self._access.names_of_others(event.key),
                    now=now,
                )
            case ClientHello():
                identity = self._access.identity(event.key)
                return self._membership.client_joins(peer, event.key, identity, now=now)
            case Goodbye():
                return self._membership.gone(peer, "said goodbye", now=now)
            case Enrol():
                return self._gate.enrol(event, message)
            case _:
                assert_never(message)

    def _from_client(
        self,
        peer: PeerId,
        key: PublicKey,
        message: ClientRequest,
        frames: tuple[Frame, ...],
        now: float,
    ) -> list[Action]:
        match message:
            case Generate() | Embed():
                return self._begin(peer, key, message, frames, now)
            case EncodePrompt() | DecodeTokens():
                if self._is_known(peer, message.request_id):
                    return []
                return self._questions.ask(peer, message, frames, holder=key)
            case Cancel(request_id=request_id):
                about_text = self._questions.cancel(peer, request_id)
                return about_text or self._book.cancel(peer, request_id)
            case DescribeModel():
                spec, frame = frame_of_bytes(encode_payload(self._cluster.model.info()))
                return [Send(peer, ModelDescribed(tensors=(spec,)), (frame,))]
            case GetStatus():
                spec, frame = frame_of_bytes(encode_payload(self.status(now=now)))
                return [Send(peer, StatusReport(tensors=(spec,)), (frame,))]
            case DrainWorker(worker=name):
                return self._departures.drain(peer, name)
            case GetMembers() | CreateToken() | RevokeToken() | RemoveMachine() | ReadmitMachine():
                return self._gate.administer(peer, key, message, now=now)
            case Ping():
                return [Send(peer, Pong())]
            case _:
                assert_never(message)

    def _begin(
        self,
        peer: PeerId,
        key: PublicKey,
        message: Generate | Embed,
        frames: tuple[Frame, ...],
        now: float,
    ) -> list[Action]:
        if self._is_known(peer, message.request_id):
            return []
        if self._pipelines.state == "waiting":
            error = NotReady(self._reporting.note(now=now))
            return self._book.refuse(peer, message.request_id, error)
        return self._book.submit(peer, message, frames, holder=key, now=now)

    def _is_known(self, peer: PeerId, request_id: RequestId) -> bool:
        """Return whether a client has used an id that it may not use again yet; count that."""
        known = self._has(peer, request_id)
        if known:
            self._event_log.rejected["duplicate_request"] += 1
        return known

    def _has(self, peer: PeerId, request_id: RequestId) -> bool:
        return self._book.has(peer, request_id) or self._questions.has(peer, request_id)

    def _from_worker(
        self, worker: Worker, message: WorkerReport, frames: tuple[Frame, ...], now: float
    ) -> list[Action]:
        match message:
            case Heartbeat():
                return self._membership.heartbeat(worker, message, now=now)
            case StageReady():
                return self._stage_ready(worker, message, now)
            case StageFailed():
                return self._membership.stage_failed(worker, message, now=now)
            case TaskResult():
                return self._stepping.result(worker, message, frames, now=now)
            case TaskFailed():
                return self._stepping.failed(worker, message, now=now)
            case NotUnderstood():
                return self._membership.not_understood(worker, message, now=now)
            case LinkReport():
                return self._stepping.link_report(worker, message)
            case Remeasured():
                return self._membership.remeasured(worker, message)
            case KVCopied():
                return [*self._moves.copied(worker, message, now=now)]
            case HandedOver():
                self._moves.handed_over(worker, message)
                return []
            case KVFailed():
                return self._moves.kv_failed(worker, message, now=now)
            case Leaving():
                return self._departures.leave(worker)
            case _:
                assert_never(message)

    def _garbage(self, event: Garbage, now: float) -> list[Action]:
        """Count a message that cannot be read; have fail, or end, what waits for it."""
        peer, error = event.peer, event.error
        self._event_log.rejected[event.reason] += 1
        log = Log(f"cannot read a message: {error}"[:1000], "warning", _DROPPED)
        if isinstance(error, ProtocolMismatch):
            return [log, refusal(peer, error)]
        if not isinstance(error, RemoteProtocolError):
            return [log]
        answer = self._unread(peer, error, now)
        return [log, *answer, *self._gate.fault(peer, event.key, Fault.UNREADABLE, now=now)]

    def _unread(self, peer: PeerId, error: RemoteProtocolError, now: float) -> list[Action]:
        """Have fail, or end, what waits for a message that cannot be read."""
        worker = self._registry.worker(peer)
        if worker is not None:
            failure = failure_of(error)
            return self._from_worker(worker, failure, (), now) if failure else []
        if not self._registry.is_client(peer):
            says_hello = error.outline.type in (tag_of(WorkerHello), tag_of(ClientHello))
            return [refusal(peer, error)] if says_hello else []
        request_id = error.outline.request_id
        if error.outline.type in _REQUESTS and request_id:
            wrong = InvalidRequest(f"The coordinator cannot read this request ({error}).")
            if not self._has(peer, request_id):
                return self._book.refuse(peer, request_id, wrong)
        gone = self._membership.gone(peer, "sent what cannot be read", now=now)
        return [*gone, refusal(peer, error)]

    def _stage_ready(self, worker: Worker, ready: StageReady, now: float) -> list[Action]:
        self._rebalancing.wake(now=now)
        if worker.layers and worker.epoch == ready.epoch:
            measurements = self._cluster.measurements
            away_s = self._pipelines.away_s(worker)
            measurements.tried(worker.id, worker.layers, ready.trials, now=now, away_s=away_s)
        if self._moves.is_loading(worker, ready.epoch):
            actions = [*self._moves.stage_ready(worker, ready, now=now)]
        else:
            actions = self._pipelines.stage_ready(worker, ready)
        if ready.fetched_bytes:
            actions.append(
                self._event_log.note(
                    EventKind.WEIGHTS_FETCHED,
                    worker=worker.id,
                    fetched_bytes=ready.fetched_bytes,
                    fetch_s=ready.fetch_s,
                )
            )
        return actions

    # -------------------------------------------------------------- replies to questions

    def _studied(self, reply: object, now: float) -> list[Action]:
        match reply:
            case SearchResult():
                return self._rebalancing.search_done(reply, now=now)
            case PlanReply(question=PlanQuestion(leaving=None)):
                moving = self._moves.move is not None
                return self._replanning.replied(reply, moving=moving)
            case PlanReply():
                return self._departures.planned(reply, now=now)
            case _:
                raise TypeError(f"no question has the reply {reply!r}")

    def _study_failed(self, event: StudyFailed, now: float) -> list[Action]:
        log = Log(f"making a plan failed: {event.trace}", "error", "failed plans")
        match event.question:
            case PlanSearch():
                self._rebalancing.search_failed()
                return [log]
            case PlanQuestion() as question:
                why = f"Making a plan failed: {event.error}. Please report it."
                reply = PlanReply(question, error=DistributedLLMError(why))
                return [log, *self._studied(reply, now)]
            case _:
                raise TypeError(f"{event.question!r} was never asked")

    # -------------------------------------------------------------- starting what can be started

    def _settle(self, actions: list[Action], now: float) -> list[Action]:
        """Start whatever a change made possible; put its tasks first, as stages wait for them."""
        actions += self._newcomers.settle()
        actions += self._moves.settle(now=now)
        actions += self._departures.settle(now=now)
        actions += self._membership.give_names_back()
        sends: list[Action] = []
        self._admit(now)
        while (pipeline := self._pipelines.take_changed()) is not None:
            sends += pipeline.begin_steps(now=now)
            if pipeline.scheduler:
                self._book.collect(pipeline.scheduler)
                self._admission.may_have_room(pipeline)
            self._admit(now)
        if sends:
            self._stepping.began(now=now)
        first = [action for action in actions if _must_precede_tasks(action)]
        others = [action for action in actions if not _must_precede_tasks(action)]
        return [*first, *sends, *(action for action in others if self._is_admitted(action, now))]

    def _is_admitted(self, action: Action, now: float) -> bool:
        """Return whether an action is done: all but lines of which the log has got too many."""
        return not isinstance(action, Log) or self._log_limit.admits(action.kind, now=now)

    def _admit(self, now: float) -> None:
        if self._book.num_waiting:
            self._admission.admit(now=now)

    def validate(self) -> None:
        """Assert the invariants; tests call this after every step."""
        for room in (
            self._registry,
            self._book,
            self._questions,
            self._pipelines,
            self._replanning,
            self._moves,
            self._departures,
            self._access.conduct,
        ):
            room.validate()
        idle = [
            pipeline.scheduler.kv_tokens
            for pipeline in self._pipelines.loaded
            if pipeline.scheduler and pipeline.state is PipelineState.SERVING
            if pipeline.in_flight and not pipeline.in_flight.num_steps
            if not pipeline.num_running  # those that run wait for masks
        ]
        for answer in self._book.waiting if idle else ():
            assert answer.request.reserved_tokens > max(idle), "an answer waits for nothing"


def _must_precede_tasks(action: Action) -> bool:
    """Return whether a worker drops new tasks until it has got the message of this action."""
    return isinstance(action, Send) and isinstance(action.message, UndoMove)
