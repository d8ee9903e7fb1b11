"""Workers that are to leave: first their layers go to others. Pure.

Whoever wants a worker to leave, itself (it got a signal) or somebody with a client: its pipeline
moves to other workers while requests run. If that cannot be, those that asked are told why; a
worker that wants to end does so all the same.
"""

from dataclasses import dataclass, field, replace

from distributed_llm.common.errors import (
    ConfigError,
    DistributedLLMError,
    InvalidRequest,
    NotEnoughMemory,
    NotReady,
    WorkerLost,
)
from distributed_llm.common.messages import MayLeave, WorkerDrained
from distributed_llm.common.types import PeerId
from distributed_llm.coordinator.cluster.placement import Placement
from distributed_llm.coordinator.cluster.registry import Registry, Worker, memory_of
from distributed_llm.coordinator.cluster.relocation import Relocation
from distributed_llm.coordinator.events import Action, Send
from distributed_llm.coordinator.plan import Plan
from distributed_llm.coordinator.planning.planner import Planner
from distributed_llm.coordinator.serving.event_log import EventLog
from distributed_llm.coordinator.speeds.measurements import Measurements

_ATTEMPTS = 2
"""Moves that are tried; the second one without the KV cache."""


@dataclass
class _Departure:
    """A worker that is to leave.

    Attributes:
        clients: who want to know.
        wanted: by the worker itself.
        attempts: moves that were begun for it.
        dismissed: it was told that it may.
    """

    clients: list[PeerId] = field(default_factory=list)
    wanted: bool = False
    attempts: int = 0
    dismissed: bool = False


class Departures:
    """The workers of one cluster that are to leave."""

    def __init__(
        self,
        placement: Placement,
        planner: Planner,
        measurements: Measurements,
        relocation: Relocation,
        registry: Registry,
        event_log: EventLog,
    ) -> None:
        self._placement = placement
        self._planner = planner
        self._measurements = measurements
        self._relocation = relocation
        self._registry = registry
        self._event_log = event_log
        self._leaving: dict[PeerId, _Departure] = {}

    def drain(self, client: PeerId, name: str) -> list[Action]:
        """A client wants a worker to leave."""
        workers = {str(worker.id): worker for worker in self._registry.workers}
        worker = workers.get(name)
        if worker is None:
            error = InvalidRequest(
                f"There is no worker {name!r}. Workers: {', '.join(sorted(workers)) or 'none'}."
            )
            return [_answer(client, name, error)]
        if worker.peer not in self._leaving:
            try:
                self._plan_without(worker)
            except DistributedLLMError as error:
                return [_answer(client, name, error)]
            self._begin(worker)
        clients = self._leaving[worker.peer].clients
        if client not in clients:
            clients.append(client)
        return [self._event_log.note(f"a client wants worker {worker.id} to leave")]

    def leave(self, worker: Worker) -> list[Action]:
        """A worker wants to leave."""
        if worker.peer not in self._leaving:
            self._begin(worker)
        self._leaving[worker.peer].wanted = True
        return [self._event_log.note(f"worker {worker.id} wants to leave")]

    def gone(self, worker: Worker) -> list[Action]:
        """A worker is no longer there."""
        departure = self._leaving.pop(worker.peer, None)
        if departure is None:
            return []
        if departure.dismissed or departure.wanted:
            return [Send(client, WorkerDrained(worker=worker.id)) for client in departure.clients]
        error = WorkerLost(
            f"Worker {worker.id} was lost before others had its layers. See in `dllm status` "
            "whether it is back."
        )
        return [_answer(client, worker.id, error) for client in departure.clients]

    def settle(self, *, now: float) -> list[Action]:
        """Let go who has no layers any more; begin what the others wait for."""
        actions: list[Action] = []
        for peer, departure in list(self._leaving.items()):
            worker = self._registry.worker(peer)
            if worker is None or departure.dismissed:
                continue
            move = self._relocation.move
            if worker.layers is None:
                actions += self._dismiss(worker, departure, "Its layers are served by others.")
            elif move is None:
                actions += self._hand_over(worker, departure, now)
            elif move.phase != "handing_over" and any(s.peer == peer for s in move.new.stages):
                actions += self._relocation.cancel(f"worker {worker.id} is to leave", now=now)
                actions += self._hand_over(worker, departure, now)
        return actions

    def _begin(self, worker: Worker) -> None:
        worker.leaving = True
        self._leaving[worker.peer] = _Departure()

    def _dismiss(self, worker: Worker, departure: _Departure, why: str) -> list[Action]:
        departure.dismissed = True
        return [Send(worker.peer, MayLeave(why=why))]

    def _hand_over(self, worker: Worker, departure: _Departure, now: float) -> list[Action]:
        """Move what a worker serves to others, or let it go as if it were lost."""
        pipeline = self._placement.pipeline_of(worker.peer)
        try:
            plan = self._plan_without(worker)
        except (NotEnoughMemory, ConfigError, NotReady) as exc:
            return self._refuse(worker, departure, exc)
        if plan is None or pipeline is None or pipeline.in_flight is None:
            return self._placement.lose(worker)
        departure.attempts += 1
        price = self._relocation.price(pipeline, plan)
        if departure.attempts > _ATTEMPTS or price.kv_tokens is None:
            return self._placement.lose(worker)
        if departure.attempts > 1:
            price = replace(price, copies=False)
        why = f"worker {worker.id} is to leave"
        return self._relocation.begin(pipeline, plan, price, why=why, now=now)

    def _plan_without(self, worker: Worker) -> Plan | None:
        """Return what its pipeline is to become; None if it may just go.

        Raises:
            NotEnoughMemory, ConfigError, NotReady: the others cannot hold the model.
        """
        pipeline = self._placement.pipeline_of(worker.peer)
        if pipeline is None or worker.layers is None:
            return None
        own = {stage.peer for stage in pipeline.stages} - {worker.peer}
        idle = {other.peer for other in self._placement.idle_workers}
        others = [w for w in self._placement.fit_workers if w.peer in own | idle]
        others = [other for other in others if other.peer != worker.peer]
        try:
            if not others:
                raise NotReady(f"Nobody but {worker.id} can serve the model. Add a worker first.")
            needed = self._placement.needed_tokens(pipeline)
            machines = self._measurements.machines(memory_of(others))
            return self._planner.plan(machines, used_tokens=needed)
        except (NotEnoughMemory, NotReady):
            if any(r.in_flight for r in self._placement.pipelines if r is not pipeline):
                return None  # another pipeline serves its requests
            raise

    def _refuse(
        self, worker: Worker, departure: _Departure, error: DistributedLLMError
    ) -> list[Action]:
        """Nobody can have its layers."""
        text = f"worker {worker.id} cannot hand its layers over: {error}"
        actions: list[Action] = [self._event_log.note(text, "warning")]
        if departure.wanted:
            why = f"Nobody can have its layers: {error}"
            return [*actions, *self._dismiss(worker, departure, why)]
        worker.leaving = False
        del self._leaving[worker.peer]
        return [*actions, *(_answer(client, worker.id, error) for client in departure.clients)]


def _answer(client: PeerId, worker: str, error: DistributedLLMError) -> Send:
    message = WorkerDrained(worker=worker[:64], code=error.code, message=str(error)[:4096])
    return Send(client, message)
