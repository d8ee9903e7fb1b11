"""Handles peers that join, report, leave or are lost. Pure."""

from distributed_llm.common.errors import DistributedLLMError, NotEnrolled, NotReady, StageError
from distributed_llm.common.keys import PublicKey
from distributed_llm.common.messages import (
    ClientWelcome,
    DropStage,
    Heartbeat,
    MayLeave,
    NotUnderstood,
    Pong,
    Refused,
    Remeasured,
    Renamed,
    StageFailed,
    UndoMove,
    Welcome,
    WorkerHello,
    tag_of,
)
from distributed_llm.common.roles import Role
from distributed_llm.common.types import NO_EPOCH, PeerId
from distributed_llm.coordinator.cluster.cluster import Cluster
from distributed_llm.coordinator.cluster.departures import Departures
from distributed_llm.coordinator.cluster.moves import Moves
from distributed_llm.coordinator.cluster.replanning import Replanning
from distributed_llm.coordinator.cluster.telling import tell
from distributed_llm.coordinator.cluster.worker import Worker, WorkerState
from distributed_llm.coordinator.events import Action, Send
from distributed_llm.coordinator.serving.event_log import EventKind
from distributed_llm.coordinator.serving.retries import steps_lost
from distributed_llm.coordinator.trust.members import Machine

_NOTABLE_STALL_S = 1.0
"""Time for which the coordinator stood still that is worth a line in the log, seconds."""

_MUST_BE_READ = frozenset({tag_of(UndoMove), tag_of(DropStage), tag_of(MayLeave)})
"""Messages without which a worker does what nobody wants; others are repeated or missed."""


class Membership:
    """Handles workers and clients that come, go or report how they are."""

    def __init__(
        self, cluster: Cluster, replanning: Replanning, moves: Moves, departures: Departures
    ) -> None:
        self._cluster = cluster
        self._registry = cluster.registry
        self._settings = cluster.settings
        self._log = cluster.event_log
        self._replanning = replanning
        self._moves = moves
        self._departures = departures

    def client_joins(
        self, peer: PeerId, key: PublicKey, identity: Machine | None, *, now: float
    ) -> list[Action]:
        """Welcome a client that says hello.

        Args:
            identity: the machine that holds its key; None without keys.
        """
        self._registry.add_client(peer, key=key, now=now)
        welcome = ClientWelcome(
            model=self._cluster.model.name,
            heartbeat_interval_s=self._settings.heartbeat_interval_s,
            silence_timeout_s=self._settings.silence_timeout_s,
            name=identity.name if identity else "",
            role=identity.role if identity else Role.ADMIN,
        )
        return [Send(peer, welcome)]

    def worker_joins(
        self,
        peer: PeerId,
        key: PublicKey,
        hello: WorkerHello,
        *,
        reserved: frozenset[str],
        now: float,
    ) -> list[Action]:
        """Welcome a worker that says hello; plan with it after `settle_s`."""
        earlier = self._registry.remove_instance(hello.instance, key)
        worker = self._registry.add_worker(peer, hello, key=key, reserved=reserved, now=now)
        self._cluster.measurements.joined(
            worker.id, self._cluster.model.planned(hello.capabilities)
        )
        self._replanning.joined(now=now)
        welcome = Welcome(
            worker_id=worker.id,
            heartbeat_interval_s=self._settings.heartbeat_interval_s,
            silence_timeout_s=self._settings.silence_timeout_s,
        )
        note = self._log.note(
            EventKind.WORKER_JOINED,
            worker=worker.id,
            memory_bytes=hello.capabilities.memory_bytes,
            device=hello.capabilities.device,
        )
        actions: list[Action] = [Send(peer, welcome), note]
        for session in earlier:  # their connections were not yet known to be lost
            actions += self._lost(session, "connected anew", now)
        return actions

    def gone(self, peer: PeerId, why: str, *, now: float) -> list[Action]:
        """End a peer's session: the requests of a client, or the work of a worker."""
        worker = self._registry.remove(peer)
        if worker is None:
            self._cluster.questions.drop_client(peer)
            return self._cluster.book.drop_client(peer)
        return self._lost(worker, why, now)

    def removed(self, machine: Machine, *, now: float) -> list[Action]:
        """End the sessions of a machine that may not connect any more."""
        error = NotEnrolled(f"{machine.name} was removed: it may not connect any more.")
        actions: list[Action] = []
        for peer in self._registry.peers_with(machine.key):
            actions += [*self.gone(peer, "was removed", now=now), refusal(peer, error)]
        return actions

    def give_names_back(self) -> list[Action]:
        """Give workers without layers the names that they asked for, where these are free again."""
        actions: list[Action] = []
        for worker, earlier in self._registry.give_names_back():
            self._cluster.measurements.left(earlier)
            self._cluster.measurements.joined(
                worker.id, self._cluster.model.planned(worker.capabilities)
            )
            self._moves.prices.forget(earlier)
            note = self._log.note(EventKind.WORKER_RENAMED, worker=worker.id, earlier=earlier)
            actions += [Send(worker.peer, Renamed(worker_id=worker.id)), note]
        return actions

    def _lost(self, worker: Worker, why: str, now: float) -> list[Action]:
        kind = EventKind.WORKER_LEFT if worker.leaving else EventKind.WORKER_LOST
        actions: list[Action] = [self._log.note(kind, worker=worker.id, why=why)]
        actions += self._departures.gone(worker)
        actions += self._moves.lost(worker, now=now)
        if all(other.id != worker.id for other in self._registry.workers):
            self._cluster.measurements.left(worker.id)
        pipeline = self._cluster.pipelines.pipeline_of(worker.peer)
        if pipeline and pipeline.in_flight:
            actions += steps_lost(
                self._cluster.book, self._log, pipeline.in_flight.steps, worker.id
            )
        unwanted = "" if worker.leaving else f"was lost: it {why}"
        actions += self._replanning.recover(worker, unwanted)
        self._replanning.left_waiting(now=now)
        return actions

    def heartbeat(self, worker: Worker, beat: Heartbeat, *, now: float) -> list[Action]:
        """Take a worker's report of itself; give it up if it hangs or serves another plan.

        If it did not hear that its layers were dropped, it is told again.
        """
        hung = self._registry.hangs(worker)
        self._registry.heartbeat(worker.peer, beat)
        hangs = self._registry.hangs(worker)
        pipeline = self._cluster.pipelines.pipeline_of(worker.peer)
        if pipeline and pipeline.in_flight and beat.tasks_waiting:
            pipeline.in_flight.progress(worker.peer, beat.progress_age_s, now=now)
        answers: list[Action] = [Send(worker.peer, Pong())]
        if beat.epochs and worker.epoch == NO_EPOCH:
            answers.append(Send(worker.peer, DropStage(epoch=max(beat.epochs))))
        if worker.state is WorkerState.SERVING and worker.epoch not in beat.epochs:
            return self.give_up(worker.peer, "serves another plan", now=now)
        if hangs and worker.state is WorkerState.LOADING:
            return [*answers, *self.give_up(worker.peer, "hangs", now=now)]
        if stalled := self._stalled_load(worker, beat, now):
            return [*answers, *stalled]
        if worker.may_try_again(now=now):
            return [*answers, *self._replanning.try_again(worker)]
        if hung and not hangs:
            self._replanning.replan_at = now + self._settings.settle_s
        return [*answers, *self._departures.still_there(worker)]

    def _stalled_load(self, worker: Worker, beat: Heartbeat, now: float) -> list[Action]:
        """Do without a worker whose load makes no progress, and tell it; else do nothing."""
        pipeline = self._cluster.pipelines.pipeline_of(worker.peer)
        move = self._moves.move
        loading = (pipeline, move.new if move else None)
        awaited = next((one for one in loading if one and one.awaits(worker.peer)), None)
        if awaited is None:
            return []
        age_s = worker.load_age_s(awaited.epoch, beat, now=now)
        if age_s < self._settings.load_timeout_s:
            return []
        layers = next(stage.layers for stage in awaited.stages if stage.peer == worker.peer)
        why = (
            f"Loading layers {layers} made no progress for {age_s:.0f} s, so it is done without "
            f"{worker.id}. Check its disk, network drive or connection to the hub, or raise "
            "load_timeout_s."
        )
        failed = StageFailed(epoch=awaited.epoch, code=StageError.code, message=why)
        return [*tell(worker, why), *self.stage_failed(worker, failed, now=now)]

    def stage_failed(self, worker: Worker, failed: StageFailed, *, now: float) -> list[Action]:
        """Go on without a stage that cannot be loaded, or is no longer served."""
        if self._moves.concerns(worker, failed.epoch):
            return self._moves.stage_failed(worker, failed, now=now)
        undone = self._moves.served_stage_failed(worker, failed, now=now)
        return [*undone, *self._replanning.stage_failed(worker, failed, now=now)]

    def stalled(self, stall_s: float, *, now: float) -> list[Action]:
        """Take nobody for silent because of a time in which the coordinator did not listen."""
        self._registry.forgive_silence(now=now)
        if stall_s < _NOTABLE_STALL_S:
            return []
        return [self._log.note(EventKind.STALLED, stall_s=stall_s)]

    def remeasured(self, worker: Worker, measured: Remeasured) -> list[Action]:
        """Learn what the machine of a worker without layers can do now."""
        worker.remeasured(measured)
        self._cluster.measurements.remeasured(
            worker.id, self._cluster.model.planned(worker.capabilities)
        )
        return []

    def not_understood(self, worker: Worker, message: NotUnderstood, *, now: float) -> list[Action]:
        """Note that a worker cannot read a message; end its session if it goes on as before."""
        note = self._log.note(
            EventKind.NOT_UNDERSTOOD, worker=worker.id, what=message.what, why=message.why
        )
        if message.what not in _MUST_BE_READ:
            return [note]
        return [note, *self.give_up(worker.peer, f"cannot read {message.what}", now=now)]

    def give_up(self, peer: PeerId, why: str, *, now: float) -> list[Action]:
        """End the session of a connected worker that is of no use, and tell it why."""
        error = NotReady(f"The coordinator gave this worker up because it {why}.")
        return [*self.gone(peer, why, now=now), refusal(peer, error, "lost")]


def refusal(peer: PeerId, error: DistributedLLMError, code: str | None = None) -> Send:
    """Return the action that ends a peer's session; `code` is that of `error` unless given."""
    return Send(peer, Refused(code=code or error.code, message=str(error)[:4096]))
