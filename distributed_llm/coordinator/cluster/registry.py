"""Who is connected, what it can do, and when it was last heard. Pure.

Any message is a sign of life. A peer that is silent for too long is lost, and so is one whose
connection is gone; what it says afterwards comes from a stranger.
"""

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
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
from distributed_llm.common.types import LayerRange, PeerId, WorkerId

CLIENT_SILENCE_S = 30.0
_TELLING_BYTES = 64 << 20
"""Of weights; how long fewer take to load says nothing."""

_DECAY = 0.8
"""Weight of the past in the running mean of a stage's time per token."""


@dataclass
class Worker:
    """One worker session.

    Attributes:
        state: "idle" (no layers), "loading", "serving" or "unfit" (`note` says why).
        leaving: it wants to end, or somebody wants it to; it is given no layers.
        layers: what it serves or loads, under `epoch`.
        next_layers: what it is about to serve instead.
        epoch: of the newest plan that it was told of and still holds layers of; 0 is none.
        instance: of its process, which may come back in another session.
        link: how its results reach the next stage.
        peer_addresses: where other workers may reach it, best first.
        progress_age_s: how long ago its tasks, if it has any, made progress; as it said last.
        seconds_per_token: running mean over steps that only decode, or None before any.
        bytes_per_s: of weights, when it loaded layers last; None before it has.
    """

    peer: PeerId
    id: WorkerId
    capabilities: Capabilities
    last_heard_at: float
    instance: str
    state: Literal["idle", "loading", "serving", "unfit"] = "idle"
    note: str = ""
    leaving: bool = False
    layers: LayerRange | None = None
    next_layers: LayerRange | None = None
    epoch: int = 0
    link: Literal["direct", "relayed", ""] = ""
    peer_addresses: tuple[str, ...] = ()
    weight_bytes: int = 0
    memory_used_bytes: int = 0
    kv_bytes: int = 0
    progress_age_s: float = 0.0
    tasks_done: int = 0
    compute_s: float = 0.0
    seconds_per_token: float | None = None
    bytes_per_s: float | None = None

    def assign(self, layers: LayerRange, *, epoch: int) -> None:
        """Give it layers to load."""
        self._forget_stage()
        self.state, self.layers, self.epoch = "loading", layers, epoch

    def prepare(self, layers: LayerRange) -> None:
        """Have it load layers beside those that it serves."""
        self.next_layers = layers

    def switch(self, *, epoch: int, weight_bytes: int) -> None:
        """The layers that it prepared are the ones that it serves."""
        layers = self.next_layers or self.layers
        self._forget_stage()
        self.state, self.layers, self.epoch = "serving", layers, epoch
        self.weight_bytes = weight_bytes

    def unassign(self) -> None:
        """Take its layers away; `epoch` stays until it is told."""
        self._forget_stage()
        self.state, self.layers = "idle", None

    def _forget_stage(self) -> None:
        self.next_layers, self.link = None, ""
        self.weight_bytes = 0
        self.seconds_per_token = None

    def loaded(self, added_bytes: int, load_s: float) -> None:
        """It has loaded layers, of which `added_bytes` were read."""
        if added_bytes >= _TELLING_BYTES and load_s:
            self.bytes_per_s = added_bytes / load_s

    def remeasured(self, found: Remeasured) -> None:
        """It has measured its machine again."""
        self.capabilities = msgspec.structs.replace(
            self.capabilities,
            memory_bandwidth_bytes_per_s=found.memory_bandwidth_bytes_per_s,
            flops_per_s=found.flops_per_s,
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
        self, *, prediction_error: float | None, gain: float | None, advice: str, now: float
    ) -> WorkerStatus:
        """Return what is known of it.

        Args:
            prediction_error: of its latest tasks, as a share.
            gain: how much more is answered with it than without, as a share, if that is known.
            advice: what that means, for people.
        """
        return WorkerStatus(
            name=self.id,
            state="leaving" if self.leaving else self.state,
            note=self.note,
            layers=self.layers,
            next_layers=self.next_layers,
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
    """

    def __init__(self, *, silence_timeout_s: float) -> None:
        self._silence_timeout_s = silence_timeout_s
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

    def is_client(self, peer: PeerId) -> bool:
        """Return whether `peer` is a client."""
        return peer in self._clients

    def add_worker(self, peer: PeerId, hello: WorkerHello, *, now: float) -> Worker:
        """Return the new worker; a name that is taken gets a number."""
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
        """Take a new client."""
        self._clients[peer] = now
        self._watch(peer)

    def heard(self, peer: PeerId, *, now: float) -> None:
        """A message of `peer` arrived."""
        if peer in self._workers:
            self._workers[peer].last_heard_at = now
        elif peer in self._clients:
            self._clients[peer] = now

    def heartbeat(self, peer: PeerId, beat: Heartbeat) -> None:
        """Take what a worker says of itself."""
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
        found = [worker for worker in self._workers.values() if worker.instance == instance]
        for worker in found:
            self.remove(worker.peer)
        return found

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
        found = []
        while (at := self.next_deadline()) is not None and at <= now:
            found.append(heapq.heappop(self._heap))
        for entry in found:
            heapq.heappush(self._heap, entry)
        return [peer for _, _, peer in found]

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
            assert worker.next_layers is None or worker.state == "serving"
            assert (worker.layers is not None) == (worker.state in ("loading", "serving"))
