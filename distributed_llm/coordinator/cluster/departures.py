"""Departures: a worker leaves after its layers went to others. Pure.

A worker is to leave because it got a signal, or because a client asked to drain it. Its pipeline is
moved to other workers while requests run. If no others can hold the layers, clients that asked are
told why, and the worker stays; one that got a signal leaves all the same.

Where weights may have fewer bits (`quantize: auto`), the others are given fewer if they cannot hold
the layers otherwise: the pipeline is loaded anew, and its requests go on from their tokens so far.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from distributed_llm.common.errors import (
    DistributedLLMError,
    InvalidRequest,
    NotReady,
    WorkerLost,
)
from distributed_llm.common.messages import MayLeave, WorkerDrained
from distributed_llm.common.states import StateTable
from distributed_llm.common.types import PeerId
from distributed_llm.coordinator.cluster.cluster import Cluster
from distributed_llm.coordinator.cluster.move import MoveState
from distributed_llm.coordinator.cluster.moves import Moves
from distributed_llm.coordinator.cluster.replanning import Replanning
from distributed_llm.coordinator.cluster.worker import Worker
from distributed_llm.coordinator.events import Action, Send, Study
from distributed_llm.coordinator.plan import Plan
from distributed_llm.coordinator.planning.plan_question import PlanQuestion, PlanReply
from distributed_llm.coordinator.planning.planner import Planner
from distributed_llm.coordinator.serving.event_log import EventKind
from distributed_llm.coordinator.serving.pipeline import Pipeline

_MOST_MOVES = 2
"""Moves that are tried for one departure; the second one does not copy KV cache."""


class DepartureState(Enum):
    """How far a worker is with leaving.

    Attributes:
        WAITING: nothing is done for it yet, or the move for it has ended.
        PLANNING: a plan without it is being made.
        MOVING: its layers are on their way to others.
        DISMISSED: it was told that it may leave.
        REFUSED: it stays.
    """

    WAITING = "waiting"
    PLANNING = "planning"
    MOVING = "moving"
    DISMISSED = "dismissed"
    REFUSED = "refused"


class DepartureCause(Enum):
    """What changes the state of a departure.

    Attributes:
        ASKED: a plan without the worker was asked for.
        MOVE_BEGAN: its pipeline is being moved to that plan.
        PIPELINE_DISSOLVED: its pipeline was dissolved, since it did not serve or could not move.
        PLAN_OUTDATED: the plan was made for workers that are not those of now.
        MOVE_ENDED: the move was committed or undone.
        HAS_NO_LAYERS: others have its layers, or it had none.
        NOBODY_CAN: no others can hold its layers.
        NOBODY_CAN_BUT_IT_ENDS: likewise, but the worker got a signal and leaves all the same.
    """

    ASKED = "plan asked for"
    MOVE_BEGAN = "move began"
    PIPELINE_DISSOLVED = "pipeline dissolved"
    PLAN_OUTDATED = "plan outdated"
    MOVE_ENDED = "move ended"
    HAS_NO_LAYERS = "has no layers"
    NOBODY_CAN = "nobody can have its layers"
    NOBODY_CAN_BUT_IT_ENDS = "nobody can, and it ends all the same"


_S, _C = DepartureState, DepartureCause
DEPARTURE_STATES = StateTable(
    "a worker that is to leave",
    _S.WAITING,
    {
        (_S.WAITING, _C.ASKED): _S.PLANNING,
        (_S.WAITING, _C.PIPELINE_DISSOLVED): _S.WAITING,
        (_S.WAITING, _C.HAS_NO_LAYERS): _S.DISMISSED,
        (_S.PLANNING, _C.MOVE_BEGAN): _S.MOVING,
        (_S.PLANNING, _C.PIPELINE_DISSOLVED): _S.WAITING,
        (_S.PLANNING, _C.PLAN_OUTDATED): _S.WAITING,
        (_S.PLANNING, _C.NOBODY_CAN): _S.REFUSED,
        (_S.PLANNING, _C.NOBODY_CAN_BUT_IT_ENDS): _S.DISMISSED,
        (_S.MOVING, _C.MOVE_ENDED): _S.WAITING,
    },
)


@dataclass
class _Departure:
    """A worker that is to leave.

    Attributes:
        clients: that asked for it, and are told how it ends.
        wanted: whether the worker itself wants to leave.
        moves: how many were begun for it.
        question: the one about a plan without the worker, while it is not answered.
        farewell: what a worker that may leave was told.
        state: see `DEPARTURE_STATES`.
    """

    clients: list[PeerId] = field(default_factory=list)
    wanted: bool = False
    moves: int = 0
    question: PlanQuestion | None = None
    farewell: MayLeave | None = None
    state: DepartureState = DEPARTURE_STATES.initial

    def enter(self, cause: DepartureCause) -> None:
        """Go to the state that follows."""
        self.state = DEPARTURE_STATES.after(self.state, cause)


class Departures:
    """The departures of one cluster."""

    def __init__(
        self, cluster: Cluster, planner: Planner, replanning: Replanning, moves: Moves
    ) -> None:
        self._cluster = cluster
        self._registry = cluster.registry
        self._pipelines = cluster.pipelines
        self._log = cluster.event_log
        self._planner = planner
        self._replanning = replanning
        self._moves = moves
        self._leaving: dict[PeerId, _Departure] = {}

    # -------------------------------------------------------------- how they begin and end

    def drain(self, client: PeerId, name: str) -> list[Action]:
        """Begin a departure because a client wants it; the client is told how it ends."""
        worker = self._registry.named(name)
        if worker is None:
            names = ", ".join(sorted(worker.id for worker in self._registry.workers)) or "none"
            error = InvalidRequest(f"There is no worker {name!r}. Workers: {names}.")
            return [_reply(client, name, error)]
        departure = self._departure(worker)
        if client not in departure.clients:
            departure.clients.append(client)
        return [self._log.note(EventKind.DRAIN_REQUESTED, worker=worker.id)]

    def leave(self, worker: Worker) -> list[Action]:
        """Begin a departure because the worker wants it."""
        self._departure(worker).wanted = True
        return [self._log.note(EventKind.LEAVE_REQUESTED, worker=worker.id)]

    def _departure(self, worker: Worker) -> _Departure:
        worker.leaving = True
        return self._leaving.setdefault(worker.peer, _Departure())

    def gone(self, worker: Worker) -> list[Action]:
        """Tell the clients that asked how the departure ended: the worker is no longer there."""
        departure = self._leaving.pop(worker.peer, None)
        if departure is None:
            return []
        if departure.state is _S.DISMISSED or departure.wanted:
            return [Send(client, WorkerDrained(worker=worker.id)) for client in departure.clients]
        error = WorkerLost(
            f"Worker {worker.id} was lost before others had its layers. See in `dllm status` "
            "whether it is back."
        )
        return [_reply(client, worker.id, error) for client in departure.clients]

    def still_there(self, worker: Worker) -> list[Action]:
        """Tell a worker again that it may leave, if it was told and has not left."""
        departure = self._leaving.get(worker.peer)
        if departure is None or departure.farewell is None:
            return []
        return [Send(worker.peer, departure.farewell)]

    # -------------------------------------------------------------- plans and moves

    def settle(self, *, now: float) -> list[Action]:
        """Dismiss workers that have no layers any more; have plans made without the others."""
        actions: list[Action] = []
        self._note_ended_moves()
        for peer, departure in list(self._leaving.items()):
            worker = self._registry.worker(peer)
            if worker is not None and departure.state is _S.WAITING:
                actions += self._look_at(worker, departure, now)
        self._note_ended_moves()
        return actions

    def _note_ended_moves(self) -> None:
        for departure in self._leaving.values():
            if departure.state is _S.MOVING and self._moves.move is None:
                departure.enter(_C.MOVE_ENDED)

    def _look_at(self, worker: Worker, departure: _Departure, now: float) -> Sequence[Action]:
        if worker.layers is None:
            return self._dismiss(worker, departure, _C.HAS_NO_LAYERS)
        move = self._moves.move
        if move is None:
            return self._plan(worker, departure)
        if move.state is not MoveState.HANDOVER and move.new_stage(worker.peer):
            undone = self._moves.undo(_why(worker), now=now)
            return [*undone, *self._plan(worker, departure)]
        return []

    def _plan(self, worker: Worker, departure: _Departure) -> list[Action]:
        """Ask for a plan without a worker; dissolve its pipeline instead if that serves nothing."""
        pipeline = self._pipelines.pipeline_of(worker.peer)
        if pipeline is None or not pipeline.in_flight:
            departure.enter(_C.PIPELINE_DISSOLVED)
            return self._replanning.recover(worker)
        others = self._others(worker, pipeline)
        departure.enter(_C.ASKED)
        departure.question = PlanQuestion(
            self._planner_for(pipeline),
            self._cluster.measurements.machines(self._cluster.memory_of(others)),
            used_tokens=self._cluster.needed_tokens(pipeline),
            leaving=worker.id,
        )
        return [Study(departure.question)]

    def _planner_for(self, pipeline: Pipeline) -> Planner:
        """Return the planner: weights keep their bits if requests can go on elsewhere with them."""
        bits = pipeline.quantize
        spare = self._is_spare(pipeline)
        return self._planner.only(bits) if spare else self._planner.at_most(bits)

    def _others(self, worker: Worker, pipeline: Pipeline) -> list[Worker]:
        """Return who may take a worker's layers over: others of its pipeline, and idle workers."""
        own = {stage.peer for stage in pipeline.stages}
        return [
            other
            for other in self._registry.fit
            if other.peer != worker.peer and (other.peer in own or other.layers is None)
        ]

    def _is_spare(self, pipeline: Pipeline) -> bool:
        """Return whether another pipeline serves the model too."""
        return any(other is not pipeline for other in self._pipelines.loaded)

    def planned(self, reply: PlanReply, *, now: float) -> list[Action]:
        """Move to the plan that was made without a worker, or have another one made later."""
        for peer, departure in self._leaving.items():
            worker = self._registry.worker(peer)
            if worker is not None and departure.question is reply.question:
                departure.question = None
                return self._act_on(worker, departure, reply, now)
        return []

    def _act_on(
        self, worker: Worker, departure: _Departure, reply: PlanReply, now: float
    ) -> list[Action]:
        pipeline = self._pipelines.pipeline_of(worker.peer)
        there = self._others(worker, pipeline) if pipeline else []
        if (
            pipeline is None
            or self._moves.move
            or reply.question.planner != self._planner_for(pipeline)
            or self._is_outdated(reply, there)
        ):
            departure.enter(_C.PLAN_OUTDATED)
            return []
        if reply.error is not None and not self._is_spare(pipeline):
            return self._refuse(worker, departure, reply.error, alone=not there)
        plan = reply.plans[0] if reply.plans else None
        if plan is not None and plan[0].quantize != pipeline.quantize:
            departure.enter(_C.PIPELINE_DISSOLVED)
            return self._moves.replace(pipeline, plan, why=_why(worker))
        if plan is not None and departure.moves < _MOST_MOVES and pipeline.in_flight:
            moving = self._move(worker, departure, pipeline, plan, now)
            if moving is not None:
                return moving
        departure.enter(_C.PIPELINE_DISSOLVED)
        return self._replanning.recover(worker)

    def _is_outdated(self, reply: PlanReply, there: Sequence[Worker]) -> bool:
        names = {worker.id for worker in there}
        if reply.error is not None:
            return names != set(reply.question.machines.memory_bytes)
        return any(stage.worker not in names for plan in reply.plans for stage in plan)

    def _move(
        self,
        worker: Worker,
        departure: _Departure,
        pipeline: Pipeline,
        plan: Plan,
        now: float,
    ) -> list[Action] | None:
        """Move a pipeline to a plan without a worker; None if memory does not hold both."""
        price = self._moves.prices.price(pipeline, plan)
        if price.kv_tokens is None:
            return None
        if departure.moves > 0:
            price = replace(price, copies=False)
        departure.moves += 1
        departure.enter(_C.MOVE_BEGAN)
        why = _why(worker)
        return self._moves.begin(pipeline, plan, price, why=why, reason="leaving", now=now)

    def _dismiss(
        self,
        worker: Worker,
        departure: _Departure,
        cause: DepartureCause,
        why: str = "Its layers are served by others.",
    ) -> list[Action]:
        departure.enter(cause)
        departure.farewell = MayLeave(why=why)
        return [Send(worker.peer, departure.farewell)]

    def _refuse(
        self, worker: Worker, departure: _Departure, error: DistributedLLMError, *, alone: bool
    ) -> list[Action]:
        """Tell the clients that asked that no others can hold a worker's layers."""
        if alone:
            error = NotReady(f"Nobody but {worker.id} can serve the model. Add a worker first.")
        actions: list[Action] = [
            self._log.note(EventKind.NOBODY_TAKES_LAYERS, worker=worker.id, why=str(error))
        ]
        if departure.wanted:
            why = f"Nobody can have its layers: {error}"
            cause = _C.NOBODY_CAN_BUT_IT_ENDS
            return [*actions, *self._dismiss(worker, departure, cause, why)]
        departure.enter(_C.NOBODY_CAN)
        worker.leaving = False
        del self._leaving[worker.peer]
        return [*actions, *(_reply(client, worker.id, error) for client in departure.clients)]

    def validate(self) -> None:
        """Assert the invariants; tests call this after every step."""
        for peer, departure in self._leaving.items():
            worker = self._registry.worker(peer)
            assert worker is not None
            assert worker.leaving
            assert (departure.question is not None) == (departure.state is _S.PLANNING)
            assert (departure.farewell is not None) == (departure.state is _S.DISMISSED)
            if departure.state is _S.MOVING:
                assert self._moves.move is not None


def _why(worker: Worker) -> str:
    return f"worker {worker.id} is to leave"


def _reply(client: PeerId, worker: str, error: DistributedLLMError) -> Send:
    message = WorkerDrained(worker=worker[:64], code=error.code, message=str(error)[:4096])
    return Send(client, message)
