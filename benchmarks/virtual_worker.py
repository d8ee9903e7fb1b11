"""Workers of a virtual cluster: production agents, and compute threads that only take time."""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from benchmarks.scenario import HIDDEN, LAYER_BYTES
from distributed_llm.common.messages import (
    Capabilities,
    FromWorker,
    Heartbeat,
    Task,
    ToNextWorker,
    ToWorker,
)
from distributed_llm.common.tensors import Frame, TensorSpec, frame_of_token_ids
from distributed_llm.common.types import PeerId
from distributed_llm.coordinator import events
from distributed_llm.worker import events as agents
from distributed_llm.worker.agent import Agent

if TYPE_CHECKING:
    from benchmarks.virtual_cluster import VirtualCluster

CONNECT_S = 0.01
_LOAD_S = 2.0


class VirtualWorker:
    """A machine: the production agent, and a compute thread that only takes time.

    Attributes:
        delay_s: what its end adds to a link.
        layers: how many it has loaded.
        next_worker: of the next stage, if this one dialled it.
        alive: it has not died.
        gone: its connections are closed.
        busy_s: of its compute thread.
    """

    def __init__(self, cluster: "VirtualCluster", name: str) -> None:
        scenario = cluster.scenario
        self.cluster, self.peer = cluster, PeerId(name.encode())
        self.delay_s = cluster.link_delay_s()
        self.layers = 0
        self.next_worker: VirtualWorker | None = None
        self.alive, self.gone = True, False
        self.busy_s = 0.0
        self._apart = cluster.random.random() < scenario.relayed
        self._slowness = cluster.random.lognormvariate(0.0, scenario.spread)
        self._queue: deque[tuple[agents.Run, float]] = deque()
        self._computing = False
        self._progress_at = cluster.now
        self._timer_at = math.inf
        self.agent = Agent(
            name,
            self._capabilities(),
            instance=f"process-{id(self)}",
            address="a:1",
            connect_timeout_s=60.0,
            now=cluster.now,
        )
        self._connect()

    def _capabilities(self) -> Capabilities:
        return Capabilities(
            device="cpu",
            device_name="made up",
            platform="none",
            memory_bytes=self.cluster.scenario.memory_bytes,
            cores=1,
            threads=1,
            memory_bandwidth_bytes_per_s=1e9,
            flops_per_s=1e9,
        )

    # -------------------------------------------------------------- edge

    def _connect(self) -> None:
        event = agents.Connected((self.peer.decode(),))
        self.cluster.at(self.cluster.now + CONNECT_S, self._apply, event)

    def receive(self, message: ToWorker, frames: tuple[Frame, ...]) -> None:
        """Take a message of the coordinator."""
        self._apply(agents.Received(message, frames))

    def _receive_across(
        self, sender: PeerId, message: ToNextWorker, frames: tuple[Frame, ...]
    ) -> None:
        self._apply(agents.PeerReceived(sender, message, frames))

    def _apply(self, event: agents.Event) -> None:
        if self.alive:
            self._perform(self.agent.handle(event, now=self.cluster.now))
            self._set_timer()

    def _on_timer(self) -> None:
        self._timer_at = math.inf
        deadline = self.agent.next_deadline()
        if self.alive and deadline is not None and deadline <= self.cluster.now:
            self._perform(self.agent.on_timer(reached=True, now=self.cluster.now))
        if self.alive:
            self._set_timer()

    def _set_timer(self) -> None:
        deadline = self.agent.next_deadline()
        if deadline is not None and deadline < self._timer_at:
            self._timer_at = deadline
            self.cluster.at(deadline, self._on_timer)

    def _perform(self, actions: Iterable[agents.Action]) -> None:
        for action in actions:
            match action:
                case agents.Run():
                    self._queue.append((action, self.cluster.now))
                    self._work()
                case agents.HandOn(task=message, frames=frames):
                    self._across(message, frames)
                case agents.Say(message=said, frames=frames):
                    self._say(said, frames)
                case agents.Beat(epoch=epoch):
                    self._say(self._heartbeat(epoch))
                case agents.Load():
                    self.cluster.at(self.cluster.now + _LOAD_S, self._loaded, action)
                case agents.Drop():
                    self.layers = 0
                case agents.OpenLink(epoch=epoch, addresses=addresses):
                    self.cluster.at(self.cluster.now + CONNECT_S, self._dialled, epoch, addresses)
                case agents.Greet(hello=hello):
                    self._across(hello)
                case agents.PeerSay(peer=peer, message=welcome):
                    self.cluster.workers[peer].welcomed(welcome.epoch, self)
                case agents.CloseLink():
                    self.next_worker = None
                case agents.Reconnect():
                    self._queue.clear()
                    self._connect()
                case agents.Exit(error=error):
                    raise error

    def _say(self, message: FromWorker, frames: tuple[Frame, ...] = ()) -> None:
        when = self.cluster.now + self.delay_s + self.cluster.coordinator_delay_s
        self.cluster.at(when, self.cluster.apply, events.Received(self.peer, message, frames))

    def _heartbeat(self, epoch: int) -> Heartbeat:
        waiting = len(self._queue) + self._computing
        return Heartbeat(
            epoch=epoch,
            progress_age_s=self.cluster.now - self._progress_at if waiting else 0.0,
            tasks_waiting=waiting,
            memory_used_bytes=1,
            kv_bytes=1,
        )

    # -------------------------------------------------------------- the next worker

    def _dialled(self, epoch: int, addresses: Sequence[str]) -> None:
        other = self.cluster.workers[PeerId(addresses[0].encode())]
        if self.alive and other.alive and not self._apart:
            self.next_worker = other
            self._apply(agents.NextReached(epoch, addresses[0]))

    def _across(self, message: ToNextWorker, frames: tuple[Frame, ...] = ()) -> None:
        other = self.next_worker
        if other is not None:
            when = self.cluster.now + self.delay_s + other.delay_s
            self.cluster.at(when, other._receive_across, self.peer, message, frames)

    def welcomed(self, epoch: int, other: "VirtualWorker") -> None:
        """The next worker answers a hello."""
        delay_s = self.delay_s + other.delay_s
        self.cluster.at(self.cluster.now + delay_s, self._apply, agents.LinkUp(epoch, 2 * delay_s))

    def next_lost(self) -> None:
        """The next worker is gone."""
        self.next_worker = None
        self._apply(agents.LinkDown(self.agent.epoch))

    # -------------------------------------------------------------- compute thread

    def _loaded(self, load: agents.Load) -> None:
        order = load.order
        if self.agent.is_void(load):
            return
        self.layers = len(order.layers)
        room = min(order.kv_tokens, self.cluster.scenario.kv_tokens)
        weights = self.layers * LAYER_BYTES
        self._apply(agents.Loaded(load.session, order.epoch, _LOAD_S, weights, room))

    def _work(self) -> None:
        while self._queue and not self._computing:
            run, arrived_at = self._queue.popleft()
            if not self.agent.is_void(run):
                took_s = self._task_s(run.task)
                queued_s = self.cluster.now - arrived_at
                self._computing, self._progress_at = True, self.cluster.now
                self.cluster.at(self.cluster.now + took_s, self._computed, run, took_s, queued_s)

    def _task_s(self, task: Task) -> float:
        scenario = self.cluster.scenario
        share = self.layers * scenario.workers / (scenario.num_layers * scenario.pipelines)
        tokens = task.tensors[0].shape[0]
        noise = 0.98 + 0.04 * self.cluster.random.random()
        base_ms = scenario.stage_ms + scenario.token_ms * tokens
        return noise * self._slowness * share * base_ms / 1000

    def _computed(self, run: agents.Run, took_s: float, queued_s: float) -> None:
        self._computing, self._progress_at = False, self.cluster.now
        self.busy_s += took_s
        self.cluster.tasks += 1
        specs, frames = _output(run.task)
        self._apply(agents.Computed(run, specs, frames, int(1e6 * took_s), int(1e6 * queued_s)))
        self._work()


def _output(task: Task) -> tuple[tuple[TensorSpec, ...], tuple[Frame, ...]]:
    """Return what a stage makes of a task: token ids on the last one, all alike."""
    if task.route:
        return (TensorSpec("bfloat16", (task.tensors[0].shape[0], HIDDEN)),), (b"",)
    samples = sum(part.sample for part in task.sequences)
    if not samples:
        return (), ()
    spec, frame = frame_of_token_ids([1] * samples)
    return (spec,), (frame,)
