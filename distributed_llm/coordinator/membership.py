"""Who comes and goes, and what follows from it. Pure."""

from typing import Literal

from distributed_llm.common.errors import DistributedLLMError, NotReady
from distributed_llm.common.messages import (
    ClientWelcome,
    Heartbeat,
    Pong,
    Refused,
    Remeasured,
    Welcome,
    WorkerHello,
)
from distributed_llm.common.settings import CoordinatorSettings
from distributed_llm.common.types import PeerId, size_text
from distributed_llm.coordinator.cluster.departures import Departures
from distributed_llm.coordinator.cluster.placement import Placement
from distributed_llm.coordinator.cluster.registry import Registry, Worker
from distributed_llm.coordinator.cluster.relocation import Relocation
from distributed_llm.coordinator.events import Action, Send
from distributed_llm.coordinator.serving.event_log import EventLog
from distributed_llm.coordinator.serving.request_book import RequestBook
from distributed_llm.coordinator.serving.retries import steps_lost
from distributed_llm.coordinator.speeds.measurements import Measurements


class Membership:
    """The peers of one cluster.

    Args:
        model: its name, for people.
    """

    def __init__(
        self,
        model: str,
        settings: CoordinatorSettings,
        registry: Registry,
        placement: Placement,
        book: RequestBook,
        relocation: Relocation,
        departures: Departures,
        measurements: Measurements,
        event_log: EventLog,
    ) -> None:
        self._model = model
        self._settings = settings
        self._registry = registry
        self._placement = placement
        self._book = book
        self._relocation = relocation
        self._departures = departures
        self._measurements = measurements
        self._event_log = event_log

    def client_joins(self, peer: PeerId, *, now: float) -> list[Action]:
        """A client says hello."""
        if self._registry.knows(peer):
            self._event_log.rejected["bad_state"] += 1
            return []
        self._registry.add_client(peer, now=now)
        welcome = ClientWelcome(
            model=self._model,
            heartbeat_interval_s=self._settings.heartbeat_interval_s,
            silence_timeout_s=self._settings.silence_timeout_s,
        )
        return [Send(peer, welcome)]

    def worker_joins(self, peer: PeerId, hello: WorkerHello, *, now: float) -> list[Action]:
        """A worker says hello."""
        if self._registry.knows(peer):
            self._event_log.rejected["bad_state"] += 1
            return []
        earlier = self._registry.remove_instance(hello.instance)
        worker = self._registry.add_worker(peer, hello, now=now)
        self._measurements.joined(worker.id, hello.capabilities)
        self._placement.replan_at = now + self._settings.settle_s
        welcome = Welcome(
            worker_id=worker.id,
            heartbeat_interval_s=self._settings.heartbeat_interval_s,
            silence_timeout_s=self._settings.silence_timeout_s,
        )
        offer = hello.capabilities
        actions: list[Action] = [
            Send(peer, welcome),
            self._event_log.note(
                f"worker {worker.id} joined: {size_text(offer.memory_bytes)} on {offer.device}"
            ),
        ]
        for session in earlier:  # its connection was not yet known to be lost
            actions += self._lost(session, "connected anew", now)
        return actions

    def gone(self, peer: PeerId, why: str, *, now: float) -> list[Action]:
        """A peer is no longer there."""
        worker = self._registry.remove(peer)
        return self._book.drop_client(peer) if worker is None else self._lost(worker, why, now)

    def _lost(self, worker: Worker, why: str, now: float) -> list[Action]:
        level: Literal["info", "warning"] = "info" if worker.leaving else "warning"
        actions: list[Action] = [self._event_log.note(f"worker {worker.id} {why}", level)]
        actions += self._departures.gone(worker)
        actions += self._relocation.lost(worker, now=now)
        if all(other.id != worker.id for other in self._registry.workers):
            self._measurements.left(worker.id)
        pipeline = self._placement.pipeline_of(worker.peer)
        if pipeline and pipeline.in_flight:
            actions += steps_lost(self._book, pipeline.in_flight.steps, worker.id)
        return actions + self._placement.lose(worker)

    def heartbeat(self, worker: Worker, beat: Heartbeat, *, now: float) -> list[Action]:
        """A worker tells how it is."""
        hung = self._placement.hangs(worker)
        self._registry.heartbeat(worker.peer, beat)
        pipeline = self._placement.pipeline_of(worker.peer)
        if pipeline and pipeline.in_flight and beat.tasks_waiting:
            pipeline.in_flight.progress(worker.peer, beat.progress_age_s, now=now)
        pong = Send(worker.peer, Pong())
        if worker.state == "serving" and worker.epoch not in beat.epochs:
            return self.give_up(worker.peer, "serves another plan", now=now)
        if self._placement.hangs(worker) and worker.state == "loading":
            return [pong, *self.give_up(worker.peer, "hangs", now=now)]
        if hung and not self._placement.hangs(worker):
            self._placement.replan_at = now + self._settings.settle_s
        return [pong]

    def remeasured(self, worker: Worker, found: Remeasured) -> list[Action]:
        """A worker without layers tells how fast its machine is now."""
        worker.remeasured(found)
        self._measurements.remeasured(worker.id, worker.capabilities)
        return []

    def give_up(self, peer: PeerId, why: str, *, now: float) -> list[Action]:
        """End the session of a worker that is there, but of no use."""
        error = NotReady(f"The coordinator gave this worker up because it {why}.")
        return [*self.gone(peer, why, now=now), refusal(peer, error, "lost")]


def refusal(peer: PeerId, error: DistributedLLMError, code: str | None = None) -> Send:
    """Return the message that ends a session."""
    return Send(peer, Refused(code=code or error.code, message=str(error)[:4096]))
