"""The fake workers of a simulation: the production agent with a fake machine around it."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Literal, assert_never

import msgspec

from distributed_llm.common import codec
from distributed_llm.common.errors import DistributedLLMError, RemoteProtocolError, StageError
from distributed_llm.common.keys import PublicKey, key_text
from distributed_llm.common.messages import (
    Capabilities,
    FromWorker,
    Goodbye,
    Heartbeat,
    LoadStage,
    PeerWelcome,
    ReadChunk,
    Renamed,
    StageTime,
    StageTrial,
    Task,
    ToNextWorker,
    Welcome,
)
from distributed_llm.common.tensors import Frame, TensorSpec
from distributed_llm.common.types import Epoch, LayerRange, PeerId
from distributed_llm.worker.session import events as agents
from distributed_llm.worker.session import link_events as links
from distributed_llm.worker.session.agent import Agent
from distributed_llm.worker.session.epoch_stage import CREDITS
from distributed_llm.worker.session.link_events import LinkId
from tests.unit.fake_kv import FakeExporter, FakeImporter, assemble_kv
from tests.unit.fake_model import (
    BIG,
    WINDOW,
    FakeStage,
    Missing,
    Void,
    windowed_layers,
)

_instances = count()

if TYPE_CHECKING:
    from tests.unit.simulation import Link, World

Specs = tuple[TensorSpec, ...]
Frames = tuple[Frame, ...]


@dataclass
class Beside:
    """A stage that was loaded beside the served one, and what came for it."""

    order: LoadStage
    stage: FakeStage
    imports: dict[LayerRange, FakeImporter]


class SimWorker:
    """A machine: the production agent, a fake compute thread, and what may happen to both.

    Attributes:
        load_error: why it cannot load any layers.
        load_s: time to load.
        key: by which it is known.
        fetches: it gets weights from other machines, and gives them to others.
        task_s: time that every task takes.
        token_s: time that every token of it takes beside.
        layer_s: time that every layer of it takes beside.
        base_s: of `layer_s`, at which a probe finds what `capabilities` has; 0 is the first
            `layer_s` that a probe meets.
        probe_noise: returns how many times too fast the next probe finds the machine.
        memory_bytes: that it has for weights and KV cache now.
        num_probes: that were made.
        load_stalls: its loads begin and make no progress, until `resume_loads`.
        num_loads: orders to load that it began to carry out.
        busy_s: time that was spent on tasks.
        num_tasks: that were computed.
        loaded: orders that were carried out.
        fail_tasks: how many of the next tasks fail.
        fail_exports: how many of the next orders to export fail; `fail_imports` and
            `fail_assemblies` likewise.
        transfer_s: time that every message of a transfer takes its compute thread.
        max_positions: of a layer in one message of a transfer.
        layers_share: of the time of a task, what its layers take.
        beside: what was loaded beside `stage`.
        ended: the signal that it ended by, 0 if it was let go; None while it has not.
        hung: its compute thread does nothing.
        before_task: called before each task is computed.
        after_task: called after each task, before the answer is sent.
    """

    def __init__(
        self, world: "World", name: str, memory_bytes: int, *, bfloat16: bool = True
    ) -> None:
        self.world = world
        self.name = name
        self.state: Literal["up", "frozen", "dead"] = "up"
        self.exit: DistributedLLMError | None = None
        self.worker_id = ""
        self.load_error: DistributedLLMError | None = None
        self.load_s = 0.01
        self.key = PublicKey(key_text(hashlib.sha256(name.encode()).digest()))
        self.fetches = False
        self.fail_tasks = 0
        self.fail_exports = self.fail_imports = self.fail_assemblies = 0
        self.transfer_s = 0.001
        self.max_positions = 8
        self.layers_share = 0.5
        self.hung = False
        self.before_task: Callable[[Task], None] = lambda task: None
        self.after_task: Callable[[Task], None] = lambda task: None
        self.stage: FakeStage | None = None
        self.beside: Beside | None = None
        self.ended: int | None = None
        self._loading: agents.Load | None = None  # beside
        self._exports: dict[tuple[int, LayerRange], FakeExporter] = {}
        self._ran = (-1, 0)  # the newest session and epoch of which a task was computed
        self.orders: deque[agents.Order] = deque()
        self.num_sessions = 0
        self._progress_at = world.now
        self._busy = False
        self._stuck = False
        self._thawed: list[Callable[[], None]] = []
        self.task_s = 0.001
        self.token_s = self.layer_s = 0.0
        self.base_s = 0.0
        self.probe_noise: Callable[[], float] = lambda: 1.0
        self.num_probes = self.num_loads = 0
        self.memory_bytes = memory_bytes
        self.load_stalls = False
        self._stalled: list[Callable[[], None]] = []  # the ends of loads that make no progress
        self.busy_s = 0.0
        self.num_tasks = 0
        self.loaded: list[LoadStage] = []
        self._spoils: list[Callable[[Specs, Frames], tuple[Specs, Frames]]] = []
        self._arrivals: deque[float] = deque()  # of the orders
        self._timer_at: float | None = None
        self._closing_takes_s = 0.0
        self.address = f"{name}:1"
        self._links: dict[LinkId, Link | None] = {}  # to other workers; None while it is dialled
        self._up: set[LinkId] = set()
        self._hellos: dict[PeerId, SimWorker] = {}  # who dialled this worker
        self.agent = Agent(
            name,
            msgspec.structs.replace(capabilities(memory_bytes), bfloat16=bfloat16),
            instance=f"process-{next(_instances)}",
            address="simulated:1",
            connect_timeout_s=10.0,
            leave_timeout_s=60.0,
            now=world.now,
        )
        self._connect()

    # -------------------------------------------------------------- fate

    def kill(self, *, silently: bool = False) -> None:
        """Die; silently if nobody closes the connection (power loss)."""
        self.state = "dead"
        if not silently:
            self.world.close(self.link)
        after_s = 3.0 if silently else 0.001  # what heartbeats of the transport take
        for dialer in self._hellos.values():
            self.world.at(after_s, lambda dialer=dialer: dialer.lost(self))  # type: ignore[misc]

    def freeze(self) -> None:
        """Stop (SIGSTOP); the connection stays."""
        self.state = "frozen"

    def thaw(self) -> None:
        """Go on with all that has come meanwhile."""
        self.state = "up"
        calls, self._thawed = self._thawed, []
        for call in calls:
            self._when_up(call)

    def resume(self) -> None:
        """Hang no longer."""
        self.hung = False
        if self._stuck:
            self._stuck = False
            self._when_up(self._finish)

    def resume_loads(self) -> None:
        """Have loads go on."""
        self.load_stalls = False
        calls, self._stalled = self._stalled, []
        for call in calls:
            self._when_up(call)

    def spoil(self, times: int, change: Callable[[Specs, Frames], tuple[Specs, Frames]]) -> None:
        """Change what the next `times` tasks give."""
        self._spoils += [change] * times

    def lose_connection(self) -> None:
        """Notice that the connection is lost, and be back before the coordinator notices."""
        self._closing_takes_s = 0.05
        self._apply(agents.Disconnected())
        self._closing_takes_s = 0.0

    @property
    def epoch(self) -> int:
        """The newest epoch that it was told to load or to drop in this session."""
        return self.agent._stages._newest

    @property
    def dial_at(self) -> float:
        """When it dials the next worker anew, clock seconds."""
        served = self.agent._stages._served
        assert served is not None
        return served.peers._dial_at

    def leave_kindly(self, number: int = 15) -> None:
        """Be told to end by a signal: leave only once others have its layers, if it has any."""
        self._apply(agents.Signalled(number))

    def leave(self) -> None:
        """Say goodbye and end."""
        self._say(Goodbye())
        self.kill()

    def _when_up(self, call: Callable[[], None]) -> None:
        """Do it now, or once it is thawed, or never."""
        if self.state == "up":
            call()
        elif self.state == "frozen":
            self._thawed.append(call)

    # -------------------------------------------------------------- edge

    def _arm(self) -> None:
        """Have the agent's timer run when it is due."""
        at = self.agent.next_deadline()
        if at is not None and (self._timer_at is None or at < self._timer_at):
            self._timer_at = at
            self.world.at_time(at, lambda: self._on_timer(at))

    def _on_timer(self, at: float) -> None:
        if at == self._timer_at:  # else another one runs earlier
            self._timer_at = None
            self._when_up(self._due)

    def _due(self) -> None:
        due_at = self.agent.next_deadline()
        if due_at is not None and due_at <= self.world.now:
            self._perform(self.agent.on_timer(reached=True, now=self.world.now))
        self._arm()

    def receive(self, link: "Link", wire: list[Frame]) -> None:
        """Take a message of a connection that may be an old one."""
        self._when_up(lambda: self._received(link, wire))

    def _received(self, link: "Link", wire: list[Frame]) -> None:
        if link is self.link:
            try:
                message, frames = codec.to_worker.decode(wire)
            except RemoteProtocolError as exc:
                self._apply(agents.Garbage(exc))
                return
            if isinstance(message, Welcome | Renamed):
                self.worker_id = message.worker_id
            self._apply(agents.Received(message, frames))

    def _connect(self) -> None:
        self.link = self.world.connect(self, self.name)
        self.num_sessions += 1
        link = self.link
        self.world.at(
            0.001,
            lambda: self._when_up(
                lambda: (
                    self._apply(agents.Connected((self.address,))) if link is self.link else None
                )
            ),
        )

    def _apply(self, event: agents.Event) -> None:
        self._perform(self.agent.handle(event, now=self.world.now))
        self._arm()

    def _perform(self, actions: Iterable[agents.Action]) -> None:
        for action in actions:
            match action:
                case agents.Send(message=message, frames=frames):
                    self._say(message, frames)
                case agents.SendHeartbeat(epochs=epochs):
                    self._say(self._heartbeat(epochs))
                case (
                    links.OpenLink()
                    | links.Greet()
                    | links.ForwardTask()
                    | links.SendOverLink()
                    | links.CloseLink()
                    | links.SendToPeer()
                ):
                    self._perform_across(action)
                case agents.Reconnect():
                    self.world.close(self.link, after_s=self._closing_takes_s)
                    self._connect()
                case agents.Log(text=text):
                    self.world.logs.append(f"{self.name}: {text}")
                case agents.End(signal=signal):
                    self.ended = signal
                    self.kill()
                case agents.Fail(error=error):
                    self.exit = error
                    self.kill()
                case _:
                    self._order(action)

    def _order(self, order: agents.Order) -> None:
        self.orders.append(order)
        self._arrivals.append(self.world.now)
        waiting = [o for o in self.orders if isinstance(o, agents.Run)]
        assert len([o for o in waiting if not self.agent.is_void(o)]) <= CREDITS
        self._work()

    def _say(self, message: FromWorker, frames: Sequence[Frame] = ()) -> None:
        if self.state == "up":
            self.world.send_up(self.link, message, frames)

    def _heartbeat(self, epochs: tuple[Epoch, ...]) -> Heartbeat:
        waiting = sum(isinstance(order, agents.Run) for order in self.orders)
        loading = self._loads_alone or bool(self._loading or self._stalled)
        return Heartbeat(
            epochs=epochs,
            progress_age_s=self.world.now - self._progress_at if waiting else 0.0,
            tasks_waiting=waiting,
            memory_used_bytes=1,
            kv_bytes=1,
            loading=loading,
            load_progress=round(1e3 * self.world.now) if loading and not self._stalled else 0,
        )

    @property
    def _loads_alone(self) -> bool:
        order = self.orders[0] if self._busy else None
        return isinstance(order, agents.Load) and order.order.beside is None

    # -------------------------------------------------------------- other workers

    def _perform_across(self, action: links.LinkAction) -> None:
        match action:
            case links.OpenLink(link=name, addresses=addresses):
                self._forget(name)
                self._links[name] = None
                self.world.at(0.001, lambda: self._dial(name, addresses))
            case links.Greet(link=name, hello=hello):
                self._transmit(name, hello, ())
            case links.ForwardTask(task=task, frames=frames):
                if LinkId(task.epoch) in self._up:
                    self._transmit(LinkId(task.epoch), task, frames)
            case links.SendOverLink(link=name, message=message, frames=frames):
                if name in self._up:
                    self._transmit(name, message, frames)
            case links.CloseLink(link=name):
                self._forget(name)
            case links.SendToPeer(peer=peer, message=answer):
                dialer = self._hellos[peer]
                self.world.send_back(dialer.link_of(peer), answer, dialer)
            case _:
                assert_never(action)

    def _transmit(self, name: LinkId, message: ToNextWorker, frames: Sequence[Frame]) -> None:
        link = self._links.get(name)
        if link and self.state == "up":
            self.world.send_across(link, message, frames)

    def _forget(self, name: LinkId) -> None:
        self._links.pop(name, None)
        self._up.discard(name)

    def _dial(self, name: LinkId, addresses: Sequence[str]) -> None:
        other = self.world.reach(self, addresses[0])
        if other and self.state == "up" and self._links.get(name, other) is None:
            link = self.world.connect(other, f"{self.name}->{other.name}")
            self._links[name] = link
            other._hellos[link.peer] = self
            self._apply(links.LinkReached(name, addresses[0]))

    def link_of(self, peer: PeerId) -> "Link | None":
        """The link to another worker which that knows as `peer`; None if it is closed."""
        return next((one for one in self._links.values() if one and one.peer == peer), None)

    def answered(self, link: "Link", wire: list[Frame]) -> None:
        """Another worker answered over a link, which may be closed by now."""
        names = [name for name, one in self._links.items() if one is link]
        if names and link.open:
            self._when_up(lambda: self._hear(names[0], wire))

    def _hear(self, name: LinkId, wire: list[Frame]) -> None:
        try:
            message, _ = codec.to_previous_worker.decode(wire)
        except RemoteProtocolError as exc:
            self._apply(links.PeerGarbage(exc, link=name if name in self._up else None))
            return
        if name not in self._links or message.epoch != name.epoch:
            return
        if not isinstance(message, PeerWelcome):
            if name in self._up:
                self._apply(links.LinkReceived(name, message))
        elif name not in self._up:
            self._up.add(name)
            self._apply(links.LinkUp(name, 0.002))

    def lost(self, other: "SimWorker") -> None:
        """The connections to `other`, if there are any, are gone."""
        for name in [name for name, one in self._links.items() if one and one.owner is other]:
            self._lost(name)

    def cut(self, *, transfers: bool = False) -> None:
        """Break the links to next workers, or those of transfers, with all that is on them."""
        for name in [n for n in self._links if (n.layers is not None) is transfers]:
            self._lost(name)

    def _lost(self, name: LinkId) -> None:
        link, up = self._links.get(name), name in self._up
        self._forget(name)
        if link:
            link.open = False
        if up:
            self._when_up(lambda: self._apply(links.LinkDown(name)))

    def receive_across(self, link: "Link", wire: list[Frame]) -> None:
        """Take a message of the worker of the stage before."""
        if link.open:
            event: links.PeerReceived | links.PeerGarbage
            try:
                message, frames = codec.to_next_worker.decode(wire)
                assert not isinstance(message, ReadChunk)
                event = links.PeerReceived(link.peer, message, frames)
            except RemoteProtocolError as exc:
                event = links.PeerGarbage(exc, link.peer)
            self._when_up(lambda: self._apply(event))

    # -------------------------------------------------------------- compute thread

    def _work(self) -> None:
        if self.orders and not self._busy:
            self._busy = True
            self._progress_at = self.world.now
            takes_s = self._takes_s(self.orders[0])
            self.world.at(takes_s, lambda: self._when_up(self._finish))

    def _takes_s(self, order: agents.Order) -> float:
        match order:
            case agents.Load(order=LoadStage(beside=None)):
                return self.load_s
            case agents.Run(task=task) if not self.agent.is_void(order):
                tokens = sum(part.num_tokens for part in task.sequences)
                return self.task_s + self.token_s * tokens + self._layers_s()
            case agents.ExportKV() | agents.ImportKV() | agents.AssembleKV():
                return self.transfer_s
            case _:
                return 0.0

    def _layers_s(self) -> float:
        return self.layer_s * len(self.stage.layers) if self.stage else 0.0

    def _finish(self) -> None:
        if self.hung:
            self._stuck = True
            return
        if self.load_stalls and self._loads_alone:
            self._stalled.append(self._finish)
            return
        event = self._do(self.orders[0])
        self._when_up(lambda: self._finished(event))

    def _finished(self, event: agents.Event | None) -> None:
        self.orders.popleft()
        self._arrivals.popleft()
        self._busy = False
        if event is not None:
            self._apply(event)
        self._work()

    def _do(self, order: agents.Order) -> agents.Event | None:
        match order:
            case agents.Load():
                return self._load(order)
            case agents.Run():
                return self._run(order)
            case agents.Release(epoch=epoch, sequence_ids=ids):
                beside = self.beside if self.beside and self.beside.order.epoch == epoch else None
                stage = beside.stage if beside else self.stage
                if stage:
                    for sequence_id in ids:
                        stage.release(sequence_id)
            case agents.Drop():
                self._drop()
            case agents.Serve(epoch=epoch):
                assert self.beside is not None
                assert self.beside.order.epoch == epoch
                stage = self.beside.stage
                self._drop()
                self.stage = stage
            case agents.Unload(epoch=epoch):
                self._unload(epoch)
            case agents.ExportKV() | agents.ImportKV() | agents.AssembleKV():
                return self._move(order)
            case agents.Probe():
                return self._probe(order)
            case _:
                assert_never(order)
        return None

    def _probe(self, order: agents.Probe) -> agents.Event | None:
        if self.agent.is_void(order):
            return None
        self.num_probes += 1
        self.base_s = self.base_s or self.layer_s
        found = capabilities()
        speed = self.probe_noise() * (self.base_s / self.layer_s if self.layer_s else 1.0)
        return agents.Probed(
            order.session,
            speed * found.memory_bandwidth_bytes_per_s,
            speed * found.flops_per_s,
            self.memory_bytes,
        )

    def _drop(self) -> None:
        self.stage = self.beside = self._loading = None
        self._exports.clear()

    def _unload(self, epoch: int) -> None:
        if self.beside and self.beside.order.epoch == epoch:
            self.beside = None
        if self._loading and self._loading.order.epoch == epoch:
            self._loading = None
        self._exports = {key: one for key, one in self._exports.items() if key[0] != epoch}

    def _load(self, load: agents.Load) -> agents.Event | None:
        if self.agent.is_void(load):
            return None
        self.num_loads += 1
        if load.order.beside is not None:
            self.beside, self._loading = None, load
            self.world.at(self.load_s, lambda: self._when_up(lambda: self._loaded_beside(load)))
            return None
        self._drop()
        if self.load_error is not None:
            return agents.LoadFailed(load.session, load.order.epoch, self.load_error)
        self.stage = self._new_stage(load.order)
        return self._loaded(load)

    def _loaded_beside(self, load: agents.Load) -> None:
        if self.load_stalls:
            self._stalled.append(lambda: self._loaded_beside(load))
            return
        if self._loading is not load:
            return
        self._loading = None
        order = load.order
        if self.load_error is not None:
            self._apply(agents.LoadFailed(load.session, order.epoch, self.load_error))
            return
        imports = {layers: FakeImporter() for layers in order.imports}
        self.beside = Beside(order, self._new_stage(order), imports)
        self._apply(self._loaded(load))

    def _new_stage(self, order: LoadStage) -> FakeStage:
        cost = self.world.model.cost_at(order.quantize)
        state_tokens = cost.state_bytes(order.layers) // max(1, cost.kv_bytes(order.layers))
        return FakeStage(order, order.kv_tokens, state_tokens, cost.encoder_layers)

    def _loaded(self, load: agents.Load) -> agents.Loaded:
        order = load.order
        self.loaded.append(order)
        cost = self.world.model.cost_at(order.quantize)
        weights = cost.weight_bytes(order.layers)
        windowed = 0 if cost.encoder_layers else windowed_layers(order.layers)
        trials = self._trials(order) if order.trials and self.layer_s else ()
        return agents.Loaded(
            load.session,
            order.epoch,
            self.load_s,
            weights,
            order.kv_tokens,
            trials,
            kv_token_bytes=cost.kv_bytes(order.layers),
            kv_windowed_bytes=windowed,
            kv_window=WINDOW if windowed else 0,
            fetched_bytes=weights if self.fetches else 0,
            fetch_s=self.load_s / 2 if self.fetches else 0.0,
            gives_weights=self.fetches,
        )

    def _trials(self, order: LoadStage) -> tuple[StageTrial, ...]:
        layers_s = self.layer_s * len(order.layers)
        return tuple(
            StageTrial(
                sequences=sequences,
                start=start,
                num_tokens=tokens,
                time=StageTime(
                    compute_us=round(1e6 * (self.task_s + self.token_s * tokens + layers_s)),
                    layers_us=round(1e6 * layers_s),
                    queued_us=0,
                ),
            )
            for n in (1, 4)
            for sequences, start, tokens in ((n, 8, 1), (1, 0, 8 * n), (1, 8 * n, 1))
        )

    def _move(self, order: agents.KVOrder) -> agents.Event | None:
        if self.agent.is_void(order):
            return None
        try:
            match order:
                case agents.ExportKV():
                    return self._export(order)
                case agents.ImportKV(message=message):
                    self._inject("fail_imports")
                    self._beside_of(message.epoch).imports[message.layers].take(order)
                    return agents.KVImported(order)
                case agents.AssembleKV(epoch=epoch):
                    self._inject("fail_assemblies")
                    prepared = self._beside_of(epoch)
                    assemble_kv(prepared.stage, self.stage, prepared.imports)
                    return agents.KVAssembled(order)
        except StageError as exc:
            return agents.KVOrderFailed(order, exc)

    def _inject(self, failures: str) -> None:
        """Fail if there is such a failure left to inject."""
        left = getattr(self, failures)
        if left:
            setattr(self, failures, left - 1)
            raise StageError("injected")

    def _export(self, order: agents.ExportKV) -> agents.KVExported:
        self._inject("fail_exports")
        key = (order.epoch, order.layers)
        if key not in self._exports:
            assert self.stage is not None
            self._exports[key] = FakeExporter(self.stage, order.layers, self.max_positions)
        return self._exports[key].next(order)

    def _beside_of(self, epoch: int) -> Beside:
        assert self.beside is not None
        assert self.beside.order.epoch == epoch
        return self.beside

    def _run(self, run: agents.Run) -> agents.Event | None:
        if self.agent.is_void(run):
            return None
        try:
            newest, self._ran = self._ran, (run.session, run.task.epoch)
            assert newest <= self._ran, "it goes back to layers of an older epoch"
            self.before_task(run.task)
            if self.state == "dead":
                return None
            if self.fail_tasks:
                self.fail_tasks -= 1
                raise StageError("injected")
            if self.stage is None:
                raise StageError("no layers are loaded")
            specs, frames = self.stage.run(run.task, run.frames)
            if self._spoils:
                specs, frames = self._spoils.pop()(specs, frames)
        except Void:
            return None
        except Missing as exc:
            return agents.ComputeFailed(run, exc, exc.missing)
        except StageError as exc:
            return agents.ComputeFailed(run, exc)
        self.after_task(run.task)
        took_s = self.world.now - self._progress_at
        queued_s = self._progress_at - self._arrivals[0]
        self.busy_s += took_s
        self.num_tasks += 1
        return agents.Computed(
            run,
            specs,
            frames,
            compute_us=round(1e6 * took_s),
            layers_us=round(
                1e6 * (self._layers_s() + (took_s - self._layers_s()) * self.layers_share)
            ),
            queued_us=round(1e6 * queued_s),
        )


def capabilities(memory_bytes: int = BIG) -> Capabilities:
    """Return those of a machine with this much memory."""
    return Capabilities(
        device="cpu",
        device_name="simulated",
        platform="none",
        memory_bytes=memory_bytes,
        cores=1,
        threads=1,
        memory_bandwidth_bytes_per_s=1e9,
        flops_per_s=1e9,
    )
