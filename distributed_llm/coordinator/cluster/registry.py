"""Who is connected, what each worker can do, and when it was last heard. Pure.

Any message is a sign of life. A peer that is silent for too long is lost, and so is one whose
connection is gone; what it sends afterwards comes from a stranger.
"""

import heapq
import math
from collections.abc import Iterator, Sequence
from itertools import count

from distributed_llm.common.keys import NOBODY, PublicKey
from distributed_llm.common.messages import (
    Heartbeat,
    WorkerHello,
)
from distributed_llm.common.types import PeerId, WorkerId
from distributed_llm.coordinator.cluster.worker import Worker, WorkerState

_S = WorkerState

CLIENT_SILENCE_S = 30.0
"""A client that is silent for so many seconds is lost."""

_LEAST_ENTRIES = 64
"""Entries of the heap of deadlines that are kept, at least, before outdated ones are looked for."""

_MOST_LEFT = 4096
"""Sessions that ended which are remembered, those that ended last."""


class Registry:
    """The peers that said hello.

    Args:
        silence_timeout_s: after which a silent worker is lost.
        task_timeout_s: after which a worker without progress on its tasks hangs.
    """

    def __init__(self, *, silence_timeout_s: float, task_timeout_s: float) -> None:
        self._silence_timeout_s = silence_timeout_s
        self._task_timeout_s = task_timeout_s
        self._workers: dict[PeerId, Worker] = {}
        self._clients: dict[PeerId, float] = {}  # last heard, clock seconds
        self._keys: dict[PeerId, PublicKey] = {}
        self._left: dict[PeerId, None] = {}  # that said hello once
        self._misnamed: dict[PeerId, None] = {}  # workers with another name than they asked for
        self._watches: dict[PeerId, int] = {}
        self._heap: list[tuple[float, int, PeerId]] = []  # not after the deadline, watch, peer
        self._most_entries = _LEAST_ENTRIES
        self._numbers = count()
        self._listens_since = -math.inf

    @property
    def workers(self) -> Sequence[Worker]:
        """All workers, in the order in which they joined."""
        return list(self._workers.values())

    @property
    def fit(self) -> list[Worker]:
        """Workers that may be given layers."""
        return [
            worker
            for worker in self._workers.values()
            if worker.state is not _S.UNFIT and not worker.leaving and not self.hangs(worker)
        ]

    @property
    def idle(self) -> list[Worker]:
        """Workers that may be given layers and have none."""
        return [worker for worker in self.fit if worker.layers is None]

    def hangs(self, worker: Worker) -> bool:
        """Return whether a worker made no progress on its tasks for `task_timeout_s`.

        The tasks may be those of an earlier session.
        """
        return worker.progress_age_s >= self._task_timeout_s

    @property
    def peers(self) -> Iterator[PeerId]:
        """All peers, workers and clients."""
        yield from self._workers
        yield from self._clients

    def knows(self, peer: PeerId) -> bool:
        """Return whether `peer` said hello."""
        return peer in self._workers or peer in self._clients

    def has_left(self, peer: PeerId) -> bool:
        """Return whether `peer` said hello, and its session ended lately."""
        return peer in self._left

    def peers_with(self, key: PublicKey) -> list[PeerId]:
        """Return the peers that hold a key."""
        return [peer for peer, held in self._keys.items() if held == key]

    def worker(self, peer: PeerId) -> Worker | None:
        """Return the worker at `peer`."""
        return self._workers.get(peer)

    def named(self, name: str) -> Worker | None:
        """Return the worker of this name."""
        return next((worker for worker in self._workers.values() if worker.id == name), None)

    def is_client(self, peer: PeerId) -> bool:
        """Return whether `peer` is a client."""
        return peer in self._clients

    def add_worker(
        self,
        peer: PeerId,
        hello: WorkerHello,
        *,
        key: PublicKey = NOBODY,
        reserved: frozenset[str] = frozenset(),
        now: float,
    ) -> Worker:
        """Add a worker and return it; a name that is taken gets a number.

        Args:
            key: that it holds; `NOBODY` without keys.
            reserved: names of other machines, which it does not get.
        """
        taken = {*reserved, *(str(worker.id) for worker in self._workers.values())}
        name, number = hello.name, 2
        while name in taken:
            name = f"{hello.name[:58]}-{number}"
            number += 1
        worker = Worker(peer, WorkerId(name), hello.capabilities, now, hello.instance, hello.name)
        worker.peer_addresses = hello.peer_addresses
        worker.key = key
        self._workers[peer] = worker
        self._keys[peer] = key
        if name != hello.name:
            self._misnamed[peer] = None
        self._watch(peer)
        return worker

    def give_names_back(self) -> list[tuple[Worker, WorkerId]]:
        """Rename workers whose name was taken and is free now; return each and its earlier name.

        Only workers without layers: others are known by their name to plans and neighbours.
        """
        renamed = []
        for peer in list(self._misnamed):  # the first to join is the first to be served
            worker = self._workers[peer]
            free = self.named(worker.wanted_name) is None
            if free and worker.layers is None and not worker.leaving:
                renamed.append((worker, worker.id))
                worker.id = WorkerId(worker.wanted_name)
                del self._misnamed[peer]
        return renamed

    def add_client(self, peer: PeerId, *, key: PublicKey = NOBODY, now: float) -> None:
        """Add a client."""
        self._clients[peer] = now
        self._keys[peer] = key
        self._watch(peer)

    def heard(self, peer: PeerId, *, now: float) -> None:
        """Record that a message of `peer` arrived."""
        if peer in self._workers:
            self._workers[peer].last_heard_at = now
        elif peer in self._clients:
            self._clients[peer] = now

    def forgive_silence(self, *, now: float) -> None:
        """Count nobody's silence before `now`, until when nobody was listened to."""
        self._listens_since = now

    def heartbeat(self, peer: PeerId, beat: Heartbeat) -> None:
        """Record what a worker reports of itself."""
        worker = self._workers[peer]
        worker.memory_used_bytes = beat.memory_used_bytes
        worker.kv_bytes = beat.kv_bytes
        worker.loading = beat.loading
        worker.stock.progress = beat.fetch
        worker.progress_age_s = beat.progress_age_s if beat.tasks_waiting else 0.0

    def remove(self, peer: PeerId) -> Worker | None:
        """Forget `peer`; return the worker it was, or None."""
        if peer in self._keys:
            self._left[peer] = None
            if len(self._left) > _MOST_LEFT:
                del self._left[next(iter(self._left))]
        self._watches.pop(peer, None)
        self._keys.pop(peer, None)
        self._clients.pop(peer, None)
        self._misnamed.pop(peer, None)
        return self._workers.pop(peer, None)

    def remove_instance(self, instance: str, key: PublicKey) -> list[Worker]:
        """Forget the sessions of a worker process that holds `key`; return them."""
        sessions = [
            worker
            for worker in self._workers.values()
            if worker.instance == instance and worker.key == key
        ]
        for worker in sessions:
            self.remove(worker.peer)
        return sessions

    def next_deadline(self) -> float | None:
        """Return when the next peer will have been silent for too long, clock seconds.

        Deadlines move with every message. An entry of the heap is brought up to date only when it
        comes to the top, so that a message costs nothing here.
        """
        while self._heap:
            at, watch, peer = self._heap[0]
            if self._watches.get(peer) != watch:
                heapq.heappop(self._heap)
            elif at < (deadline := self._deadline(peer)):
                heapq.heapreplace(self._heap, (deadline, watch, peer))
            else:
                return at
        return None

    def silent(self, *, now: float) -> list[PeerId]:
        """Return the peers that have been silent for too long, those overdue most first."""
        overdue = []
        while (at := self.next_deadline()) is not None and at <= now:
            overdue.append(heapq.heappop(self._heap))
        for entry in overdue:
            heapq.heappush(self._heap, entry)
        return [peer for _, _, peer in overdue]

    def _watch(self, peer: PeerId) -> None:
        self._left.pop(peer, None)
        if len(self._heap) >= self._most_entries:  # some may be of peers that are gone
            self._heap = [entry for entry in self._heap if self._watches.get(entry[2]) == entry[1]]
            heapq.heapify(self._heap)
            self._most_entries = max(_LEAST_ENTRIES, 2 * len(self._heap))
        watch = self._watches[peer] = next(self._numbers)
        heapq.heappush(self._heap, (self._deadline(peer), watch, peer))

    def _deadline(self, peer: PeerId) -> float:
        worker = self._workers.get(peer)
        heard_at = worker.last_heard_at if worker else self._clients[peer]
        timeout_s = self._silence_timeout_s if worker else CLIENT_SILENCE_S
        return max(heard_at, self._listens_since) + timeout_s

    def validate(self) -> None:
        """Assert the invariants; tests call this after every step."""
        names = [worker.id for worker in self._workers.values()]
        assert len(set(names)) == len(names)
        assert not set(self._workers) & set(self._clients)
        misnamed = [peer for peer, w in self._workers.items() if w.id != w.wanted_name]
        assert list(self._misnamed) == misnamed
        assert set(self._watches) == {*self._workers, *self._clients}
        assert not self._left.keys() & self._watches.keys()
        assert len(self._left) <= _MOST_LEFT
        assert len(self._heap) <= self._most_entries
        watched = {peer: at for at, watch, peer in self._heap if self._watches.get(peer) == watch}
        assert set(watched) == set(self._watches)
        assert all(at <= self._deadline(peer) for peer, at in watched.items())
        for worker in self._workers.values():
            assert (worker.layers is not None) == (worker.state in (_S.LOADING, _S.SERVING))
