"""Who is connected, what each worker can do, and when it was last heard. Pure.

Any message is a sign of life. A peer that is silent for too long is lost, and so is one whose
connection is gone; what it sends afterwards comes from a stranger.
"""

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import count
from typing import Literal

import msgspec

from distributed_llm.common.messages import (
    Capabilities,
    Heartbeat,
    Remeasured,
    WorkerHello,
    WorkerStatus,
)
from distributed_llm.common.states import StateTable
from distributed_llm.common.types import NO_EPOCH, Epoch, LayerRange, PeerId, WorkerId

CLIENT_SILENCE_S = 30.0
"""A client that is silent for so many seconds is lost."""

_FASTEST_LOAD = 1e12
"""Bytes per second at which no machine loads weights; a report of more is no measurement."""

_LEAST_LOADED_BYTES = 64 << 20
"""Bytes of weights below which a load is too short to learn the load speed from."""

_DECAY = 0.8
"""Weight of the past in the running mean of a stage's time per token."""


class WorkerState(Enum):
    """What a worker does for the cluster; the values are shown by `dllm status`.

    Attributes:
        IDLE: it has no layers.
        LOADING: it loads the layers that it was assigned.
        SERVING: its layers are loaded; also while a move loads others beside them.
        UNFIT: it could not load its layers, and is given no others in this session.
    """

    IDLE = "idle"
    LOADING = "loading"
    SERVING = "serving"
    UNFIT = "unfit"


class WorkerCause(Enum):
    """What changes the state of a worker.

    Attributes:
        ASSIGNED: it was told to load layers.
        LOADED: it has loaded them.
        COMMITTED: a move was committed; it serves the layers that it loaded for it.
        UNASSIGNED: its layers were taken away, because its pipeline was dissolved or moved.
        FAILED: it cannot load layers.
    """

    ASSIGNED = "assigned"
    LOADED = "loaded"
    COMMITTED = "committed"
    UNASSIGNED = "unassigned"
    FAILED = "failed"


_S, _C = WorkerState, WorkerCause
WORKER_STATES = StateTable(
    "a worker of the cluster",
    _S.IDLE,
    {
        (_S.IDLE, _C.ASSIGNED): _S.LOADING,
        (_S.LOADING, _C.LOADED): _S.SERVING,
        (_S.LOADING, _C.COMMITTED): _S.SERVING,  # it was idle before the move
        (_S.SERVING, _C.COMMITTED): _S.SERVING,
        (_S.LOADING, _C.UNASSIGNED): _S.IDLE,
        (_S.SERVING, _C.UNASSIGNED): _S.IDLE,
        (_S.IDLE, _C.FAILED): _S.UNFIT,
    },
)


@dataclass
class Worker:
    """One session of a worker: what it reports, and which layers it has.

    Attributes:
        note: why it is unfit.
        leaving: it is to leave, so it is given no layers.
        layers: what it serves or loads, under `epoch`.
        epoch: the newest plan that it was told of and still holds layers of; 0 is none.
        instance: names its process, which may come back in another session.
        link: how its results reach the next stage.
        peer_addresses: where other workers may reach it, best first.
        progress_age_s: since its tasks made progress, by its last heartbeat; 0 without tasks.
        seconds_per_token: running mean over steps that only decode, or None before any.
        load_bytes_per_s: at which it loaded weights last; None before that was measured.
    """

    peer: PeerId
    id: WorkerId
    capabilities: Capabilities
    last_heard_at: float
    instance: str
    note: str = ""
    leaving: bool = False
    layers: LayerRange | None = None
    epoch: Epoch = NO_EPOCH
    link: Literal["direct", "relayed", ""] = ""
    peer_addresses: tuple[str, ...] = ()
    weight_bytes: int = 0
    memory_used_bytes: int = 0
    kv_bytes: int = 0
    progress_age_s: float = 0.0
    tasks_done: int = 0
    compute_s: float = 0.0
    seconds_per_token: float | None = None
    load_bytes_per_s: float | None = None
    _state: WorkerState = field(default=WORKER_STATES.initial)

    @property
    def state(self) -> WorkerState:
        """What the worker does for the cluster."""
        return self._state

    def assign(self, layers: LayerRange, *, epoch: Epoch) -> None:
        """Record that it was told to load layers."""
        self._change(WorkerCause.ASSIGNED)
        self._forget_stage()
        self.layers, self.epoch = layers, epoch

    def loaded(self, *, weight_bytes: int) -> None:
        """Record that it serves the layers that it was assigned."""
        self._change(WorkerCause.LOADED)
        self.weight_bytes = weight_bytes

    def commit(self, layers: LayerRange, *, epoch: Epoch, weight_bytes: int) -> None:
        """Record that it serves what it loaded for a move."""
        self._change(WorkerCause.COMMITTED)
        self._forget_stage()
        self.layers, self.epoch = layers, epoch
        self.weight_bytes = weight_bytes

    def unassign(self) -> None:
        """Take its layers away; `epoch` stays until the worker is told."""
        self._change(WorkerCause.UNASSIGNED)
        self._forget_stage()
        self.layers = None

    def fail(self, why: str) -> None:
        """Record that it cannot serve; it has no layers."""
        self._change(WorkerCause.FAILED)
        self.note = why

    def _change(self, cause: WorkerCause) -> None:
        self._state = WORKER_STATES.after(self._state, cause)

    def _forget_stage(self) -> None:
        self.link = ""
        self.weight_bytes = 0
        self.seconds_per_token = None

    def learn_load_speed(self, added_bytes: int, load_s: float) -> None:
        """Learn from a load that read `added_bytes` of weights."""
        if added_bytes >= _LEAST_LOADED_BYTES and load_s:
            self.load_bytes_per_s = min(added_bytes / load_s, _FASTEST_LOAD)

    def remeasured(self, probe: Remeasured) -> None:
        """Take what the latest probe of its machine measured."""
        self.capabilities = msgspec.structs.replace(
            self.capabilities,
            memory_bandwidth_bytes_per_s=probe.memory_bandwidth_bytes_per_s,
            flops_per_s=probe.flops_per_s,
        )

    def count_task(self, compute_s: float, decode_tokens: int) -> None:
        """Count a task that took `compute_s`; `decode_tokens` is 0 if it held part of a prompt."""
        self.tasks_done += 1
        self.compute_s += compute_s
        if decode_tokens:
            sample = compute_s / decode_tokens
            past = sample if self.seconds_per_token is None else self.seconds_per_token
            self.seconds_per_token = _DECAY * past + (1 - _DECAY) * sample

    def status(
        self,
        *,
        next_layers: LayerRange | None,
        prediction_error: float | None,
        gain: float | None,
        advice: str,
        now: float,
    ) -> WorkerStatus:
        """Return what is known of it.

        Args:
            next_layers: what a move that is under way gives it instead.
            prediction_error: of its latest tasks, as a share.
            gain: how much more is answered with it than without, as a share, if that is known.
            advice: what that means, for people.
        """
        return WorkerStatus(
            name=self.id,
            state="leaving" if self.leaving else self._state.value,
            note=self.note,
            layers=self.layers,
            next_layers=next_layers,
            epoch=self.epoch,
            link=self.link,
            capabilities=self.capabilities,
            memory_used_bytes=self.memory_used_bytes,
            kv_bytes=self.kv_bytes,
            weight_bytes=self.weight_bytes,
            tasks_done=self.tasks_done,
            compute_s=self.compute_s,
            seconds_per_token=self.seconds_per_token,
            prediction_error=prediction_error,
            gain=gain,
            advice=advice,
            last_heard_s=max(0.0, now - self.last_heard_at),
        )


def memory_of(workers: Iterable[Worker]) -> dict[WorkerId, int]:
    """Return what each of these workers offers for weights and KV cache, bytes."""
    return {worker.id: worker.capabilities.memory_bytes for worker in workers}


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
        self._watches: dict[PeerId, int] = {}
        self._heap: list[tuple[float, int, PeerId]] = []  # not after the deadline, watch, peer
        self._numbers = count()

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

    def worker(self, peer: PeerId) -> Worker | None:
        """Return the worker at `peer`."""
        return self._workers.get(peer)

    def named(self, name: str) -> Worker | None:
        """Return the worker of this name."""
        return next((worker for worker in self._workers.values() if worker.id == name), None)

    def is_client(self, peer: PeerId) -> bool:
        """Return whether `peer` is a client."""
        return peer in self._clients

    def add_worker(self, peer: PeerId, hello: WorkerHello, *, now: float) -> Worker:
        """Add a worker and return it; a name that is taken gets a number."""
        taken = {str(worker.id) for worker in self._workers.values()}
        name, number = hello.name, 2
        while name in taken:
            name = f"{hello.name[:58]}-{number}"
            number += 1
        worker = Worker(peer, WorkerId(name), hello.capabilities, now, hello.instance)
        worker.peer_addresses = hello.peer_addresses
        self._workers[peer] = worker
        self._watch(peer)
        return worker

    def add_client(self, peer: PeerId, *, now: float) -> None:
        """Add a client."""
        self._clients[peer] = now
        self._watch(peer)

    def heard(self, peer: PeerId, *, now: float) -> None:
        """Record that a message of `peer` arrived."""
        if peer in self._workers:
            self._workers[peer].last_heard_at = now
        elif peer in self._clients:
            self._clients[peer] = now

    def heartbeat(self, peer: PeerId, beat: Heartbeat) -> None:
        """Record what a worker reports of itself."""
        worker = self._workers[peer]
        worker.memory_used_bytes = beat.memory_used_bytes
        worker.kv_bytes = beat.kv_bytes
        worker.progress_age_s = beat.progress_age_s if beat.tasks_waiting else 0.0

    def remove(self, peer: PeerId) -> Worker | None:
        """Forget `peer`; return the worker it was, or None."""
        self._watches.pop(peer, None)
        self._clients.pop(peer, None)
        return self._workers.pop(peer, None)

    def remove_instance(self, instance: str) -> list[Worker]:
        """Forget the sessions of a worker process; return them."""
        sessions = [worker for worker in self._workers.values() if worker.instance == instance]
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
        watch = self._watches[peer] = next(self._numbers)
        heapq.heappush(self._heap, (self._deadline(peer), watch, peer))

    def _deadline(self, peer: PeerId) -> float:
        worker = self._workers.get(peer)
        if worker:
            return worker.last_heard_at + self._silence_timeout_s
        return self._clients[peer] + CLIENT_SILENCE_S

    def validate(self) -> None:
        """Assert the invariants; tests call this after every step."""
        names = [worker.id for worker in self._workers.values()]
        assert len(set(names)) == len(names)
        assert not set(self._workers) & set(self._clients)
        assert set(self._watches) == {*self._workers, *self._clients}
        watched = {peer: at for at, watch, peer in self._heap if self._watches.get(peer) == watch}
        assert set(watched) == set(self._watches)
        assert all(at <= self._deadline(peer) for peer, at in watched.items())
        for worker in self._workers.values():
            assert (worker.layers is not None) == (worker.state in (_S.LOADING, _S.SERVING))
