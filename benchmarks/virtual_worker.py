"""Workers of a virtual cluster: production agents, and compute threads that only take time."""

import math
from collections import Counter, deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

from benchmarks.scenario import HIDDEN, LAYER_BYTES, Scenario
from distributed_llm.common.messages import (
    Addresses,
    Capabilities,
    FromWorker,
    Heartbeat,
    KVEnd,
    KVPieces,
    LoadStage,
    PeerProbe,
    PeerWelcome,
    StageTime,
    StageTrial,
    Task,
    ToNextWorker,
    ToPreviousWorker,
    ToWorker,
)
from distributed_llm.common.tensors import Frame, TensorSpec, frame_of_token_ids
from distributed_llm.common.types import Epoch, LayerRange, PeerId
from distributed_llm.coordinator import events
from distributed_llm.worker.session import events as agents
from distributed_llm.worker.session import link_events as links
from distributed_llm.worker.session.agent import Agent

if TYPE_CHECKING:
    from benchmarks.virtual_cluster import VirtualCluster

CONNECT_S = 0.01
_LOAD_S = 2.0

_BESIDE = 0.02
"""Share of a task's time that is not spent in layers."""

_BYTES_PER_S = 100e6
_PROBE_BYTES = 256 * 1024
_PIECES_BYTES = 4 * 2**20
_PIECES = 4
"""Messages that a transfer of KV cache takes, whatever it holds."""

_TRIED = (1, 4, 16, 64)
"""Sequences in the steps that are tried on new layers."""

_ORDER_S = 0.001
"""In the compute thread, for what is no task."""


class VirtualWorker:
    """A machine: the production agent, and a compute thread that only takes time.

    Attributes:
        delay_s: what its end adds to a link.
        slowness: how many times longer than usual its tasks take; may be changed.
        served: the order for the stage that it serves.
        alive: it has not died.
        gone: its connections are closed.
        busy_s: of its compute thread.
    """

    def __init__(self, cluster: "VirtualCluster", name: str) -> None:
        scenario = cluster.scenario
        self.cluster, self.peer = cluster, PeerId(name.encode())
        self.delay_s = cluster.link_delay_s()
        self.served: LoadStage | None = None
        self.alive, self.gone = True, False
        self.busy_s = 0.0
        self._apart = cluster.random.random() < scenario.relayed
        self.slowness = cluster.random.lognormvariate(0.0, scenario.spread)
        self._beside: LoadStage | None = None
        self._exported: Counter[tuple[int, LayerRange]] = Counter()
        self._links: dict[links.LinkId, VirtualWorker] = {}
        self._queue: deque[tuple[_Order, float]] = deque()
        self._computing = False
        self._progress_at = cluster.now
        self._timer_at = math.inf
        self.agent = Agent(
            name,
            self._capabilities(scenario),
            instance=f"process-{id(self)}",
            address="a:1",
            connect_timeout_s=60.0,
            now=cluster.now,
        )
        self._connect()

    def _capabilities(self, scenario: Scenario) -> Capabilities:
        bytes_per_s, flops_per_s = self._speeds()
        return Capabilities(
            device="cpu",
            device_name="made up",
            platform="none",
            memory_bytes=scenario.memory_bytes,
            cores=1,
            threads=1,
            memory_bandwidth_bytes_per_s=bytes_per_s,
            flops_per_s=flops_per_s,
        )

    def _speeds(self) -> tuple[float, float]:
        """Return what a probe finds: bytes and operations per second."""
        return 1e9 / self.slowness, 1e9 / self.slowness

    @property
    def epoch(self) -> int:
        """Of the stage that it serves; 0 is none."""
        return self.served.epoch if self.served else 0

    # -------------------------------------------------------------- edge

    def _connect(self) -> None:
        event = agents.Connected((self.peer.decode(),))
        self.cluster.at(self.cluster.now + CONNECT_S, self._apply, event)

    def receive(self, message: ToWorker, frames: tuple[Frame, ...]) -> None:
        """Take a message of the coordinator."""
        self._apply(agents.Received(message, frames))

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
                case (
                    agents.Run()
                    | agents.ExportKV()
                    | agents.ImportKV()
                    | agents.AssembleKV()
                    | agents.Probe()
                ):
                    self._queue.append((action, self.cluster.now))
                    self._work()
                case agents.Load():
                    self.cluster.at(self.cluster.now + _LOAD_S, self._loaded, action)
                case agents.Serve():
                    self.served, self._beside = self._beside, None
                case agents.Unload():
                    self._beside = None
                case agents.Drop():
                    self.served = self._beside = None
                case agents.Send(message=said, frames=frames):
                    self._say(said, frames)
                case agents.SendHeartbeat(epochs=epochs):
                    self._say(self._heartbeat(epochs))
                case agents.Reconnect():
                    self._queue.clear()
                    self._connect()
                case agents.End():
                    self.alive = False
                    self.cluster.at(self.cluster.now + CONNECT_S, self.cluster.noticed, self)
                case agents.Fail(error=error):
                    raise error
                case agents.Release() | agents.Log():
                    pass
                case _:
                    self._perform_link(action)

    def _perform_link(self, action: links.LinkAction) -> None:
        match action:
            case links.OpenLink(link=link, addresses=addresses):
                self._links.pop(link, None)
                self.cluster.at(self.cluster.now + CONNECT_S, self._dialled, link, addresses)
            case links.Greet(link=link, hello=hello):
                self._across(link, hello)
            case links.ForwardTask(task=task, frames=frames):
                self._across(links.LinkId(task.epoch), task, frames)
            case links.SendOverLink(link=link, message=message, frames=frames):
                self._across(link, message, frames)
            case links.CloseLink(link=link):
                self._links.pop(link, None)
            case links.SendToPeer(peer=peer, message=answer):
                dialler, link = self.cluster.dials[peer]
                delay_s = self.delay_s + dialler.delay_s
                when = self.cluster.now + delay_s
                self.cluster.at(when, dialler._answered, link, answer, 2 * delay_s)

    def _say(self, message: FromWorker, frames: tuple[Frame, ...] = ()) -> None:
        when = self.cluster.now + self.delay_s + self.cluster.coordinator_delay_s
        self.cluster.at(when, self.cluster.apply, events.Received(self.peer, message, frames))

    def _heartbeat(self, epochs: tuple[Epoch, ...]) -> Heartbeat:
        waiting = len(self._queue) + self._computing
        return Heartbeat(
            epochs=epochs,
            progress_age_s=self.cluster.now - self._progress_at if waiting else 0.0,
            tasks_waiting=waiting,
            memory_used_bytes=1,
            kv_bytes=1,
        )

    # -------------------------------------------------------------- other workers

    def _dialled(self, link: links.LinkId, addresses: Addresses) -> None:
        other = self.cluster.workers[PeerId(addresses[0].encode())]
        if self.alive and other.alive and not self._apart:
            self._links[link] = other
            self._apply(links.LinkReached(link, addresses[0]))

    def _across(
        self, link: links.LinkId, message: ToNextWorker, frames: tuple[Frame, ...] = ()
    ) -> None:
        other = self._links.get(link)
        if other is not None:
            connection = PeerId(f"{self.peer.decode()} {link.epoch} {link.layers}".encode())
            self.cluster.dials[connection] = self, link
            delay_s = self.delay_s + other.delay_s + _size(message) / _BYTES_PER_S
            event = links.PeerReceived(connection, message, frames)
            self.cluster.at(self.cluster.now + delay_s, other._apply, event)

    def _answered(self, link: links.LinkId, message: ToPreviousWorker, rtt_s: float) -> None:
        if link not in self._links:
            return
        if isinstance(message, PeerWelcome):
            self._apply(links.LinkUp(link, rtt_s))
        else:
            self._apply(links.LinkReceived(link, message))

    def lost(self, other: "VirtualWorker") -> None:
        """Another worker is gone."""
        for link in [link for link, end in self._links.items() if end is other]:
            del self._links[link]
            self._apply(links.LinkDown(link))

    # -------------------------------------------------------------- compute thread

    def _loaded(self, load: agents.Load) -> None:
        order = load.order
        if self.agent.is_void(load):
            return
        if order.beside is None:
            self.served, self._beside = order, None
        else:
            self._beside = order
        room = min(order.kv_tokens, self.cluster.scenario.kv_tokens)
        weights = len(order.layers) * LAYER_BYTES
        trials = self._trials(order) if order.trials else ()
        self._apply(agents.Loaded(load.session, order.epoch, _LOAD_S, weights, room, trials))

    def _trials(self, order: LoadStage) -> tuple[StageTrial, ...]:
        return tuple(
            StageTrial(
                sequences=sequences,
                start=start,
                num_tokens=tokens,
                time=_time(self._step_s(len(order.layers), sequences * tokens)),
            )
            for tried in _TRIED
            for sequences, start, tokens in ((tried, 8, 1), (1, 0, 8 * tried), (1, 8 * tried, 1))
        )

    def _work(self) -> None:
        while self._queue and not self._computing:
            order, arrived_at = self._queue.popleft()
            if not self.agent.is_void(order):
                took_s = self._task_s(order.task) if isinstance(order, agents.Run) else _ORDER_S
                queued_s = self.cluster.now - arrived_at
                self._computing, self._progress_at = True, self.cluster.now
                self.cluster.at(self.cluster.now + took_s, self._done, order, took_s, queued_s)

    def _task_s(self, task: Task) -> float:
        return self._step_s(len(self.served.layers) if self.served else 0, task.tensors[0].shape[0])

    def _step_s(self, layers: int, tokens: int) -> float:
        scenario = self.cluster.scenario
        share = layers * scenario.workers / (scenario.num_layers * scenario.pipelines)
        noise = 1.0 + scenario.noise * (2.0 * self.cluster.random.random() - 1.0)
        base_ms = scenario.stage_ms + scenario.token_ms * tokens
        return noise * self.slowness * share * base_ms / 1000

    def _done(self, order: "_Order", took_s: float, queued_s: float) -> None:
        self._computing, self._progress_at = False, self.cluster.now
        match order:
            case agents.Run():
                self.busy_s += took_s
                self.cluster.tasks += 1
                specs, frames = _output(order.task)
                time, queued_us = _time(took_s), int(1e6 * queued_s)
                self._apply(
                    agents.Computed(
                        order, specs, frames, time.compute_us, time.layers_us, queued_us
                    )
                )
            case agents.ExportKV():
                self._apply(self._export(order))
            case agents.ImportKV():
                self._apply(agents.KVImported(order))
            case agents.AssembleKV():
                self._apply(agents.KVAssembled(order))
            case agents.Probe(session=session):
                self._apply(
                    agents.Probed(session, *self._speeds(), self.cluster.scenario.memory_bytes)
                )
        self._work()

    def _export(self, order: agents.ExportKV) -> agents.KVExported:
        """Return the next message of a transfer: some with KV cache, and one when it ends."""
        epoch, layers, number = order.epoch, order.layers, order.number
        message: KVPieces | KVEnd | None = None
        if self._exported[epoch, layers] < _PIECES:
            self._exported[epoch, layers] += 1
            message = KVPieces(
                epoch=epoch, layers=layers, number=number, dtype="uint8", parts=(), tensors=()
            )
        elif order.rest:
            message = KVEnd(epoch=epoch, layers=layers, number=number, tensors=())
        return agents.KVExported(order, message)


_Order = agents.Run | agents.ExportKV | agents.ImportKV | agents.AssembleKV | agents.Probe


def _time(took_s: float) -> StageTime:
    layers_us = int(1e6 * (1 - _BESIDE) * took_s)
    return StageTime(compute_us=int(1e6 * took_s), layers_us=layers_us, queued_us=0)


def _size(message: ToNextWorker) -> int:
    """Return the bytes of what is large."""
    match message:
        case PeerProbe():
            return _PROBE_BYTES
        case KVPieces():
            return _PIECES_BYTES
        case _:
            return 0


def _output(task: Task) -> tuple[tuple[TensorSpec, ...], tuple[Frame, ...]]:
    """Return what a stage makes of a task: token ids on the last one, all alike."""
    if task.route:
        return (TensorSpec("bfloat16", (task.tensors[0].shape[0], HIDDEN)),), (b"",)
    samples = sum(part.sample for part in task.sequences)
    if not samples:
        return (), ()
    spec, frame = frame_of_token_ids([1] * samples)
    return (spec,), (frame,)
