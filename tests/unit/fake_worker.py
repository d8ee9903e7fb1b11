"""The fake workers of a simulation: the production agent with a fake machine around it."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import TYPE_CHECKING, Literal, assert_never

from distributed_llm.common import codec
from distributed_llm.common.errors import DistributedLLMError, StageError
from distributed_llm.common.messages import (
    Capabilities,
    FromWorker,
    Goodbye,
    Heartbeat,
    Task,
    Welcome,
)
from distributed_llm.common.tensors import Frame, TensorSpec
from distributed_llm.common.types import PeerId
from distributed_llm.worker import events as agents
from distributed_llm.worker.agent import CREDITS, Agent
from tests.unit.fake_model import BIG, COST, FakeStage, Missing, Void

_instances = count()

if TYPE_CHECKING:
    from tests.unit.simulation import Link, World

Specs = tuple[TensorSpec, ...]
Frames = tuple[Frame, ...]
Order = agents.Load | agents.Run | agents.Release | agents.Drop


class SimWorker:
    """A machine: the production agent, a fake compute thread, and what may happen to both.

    Attributes:
        load_error: why it cannot load any layers.
        load_s: time to load.
        task_s: time that every task takes.
        token_s: time that every token of it takes beside.
        busy_s: time that was spent on tasks.
        num_tasks: that were computed.
        fail_tasks: how many of the next tasks fail.
        hung: its compute thread does nothing.
        before_task: called before each task is computed.
        after_task: called after each task, before the answer is sent.
    """

    def __init__(self, world: "World", name: str, memory_bytes: int) -> None:
        self.world = world
        self.name = name
        self.state: Literal["up", "frozen", "dead"] = "up"
        self.exit: DistributedLLMError | None = None
        self.worker_id = ""
        self.load_error: DistributedLLMError | None = None
        self.load_s = 0.01
        self.fail_tasks = 0
        self.hung = False
        self.before_task: Callable[[Task], None] = lambda task: None
        self.after_task: Callable[[Task], None] = lambda task: None
        self.stage: FakeStage | None = None
        self.orders: deque[Order] = deque()
        self.num_sessions = 0
        self._progress_at = world.now
        self._busy = False
        self._stuck = False
        self._thawed: list[Callable[[], None]] = []
        self.task_s = 0.001
        self.token_s = 0.0
        self.busy_s = 0.0
        self.num_tasks = 0
        self._spoils: list[Callable[[Specs, Frames], tuple[Specs, Frames]]] = []
        self._arrivals: deque[float] = deque()  # of the orders
        self._timer_at: float | None = None
        self._closing_takes_s = 0.0
        self.address = f"{name}:1"
        self._next: Link | None = None  # the link to the worker of the next stage
        self._hellos: dict[PeerId, SimWorker] = {}  # who dialled this worker
        self.agent = Agent(
            name,
            capabilities(memory_bytes),
            instance=f"process-{next(_instances)}",
            address="simulated:1",
            connect_timeout_s=10.0,
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

    def spoil(self, times: int, change: Callable[[Specs, Frames], tuple[Specs, Frames]]) -> None:
        """Change what the next `times` tasks give."""
        self._spoils += [change] * times

    def lose_connection(self) -> None:
        """Notice that the connection is lost, and be back before the coordinator notices."""
        self._closing_takes_s = 0.05
        self._apply(agents.Disconnected())
        self._closing_takes_s = 0.0

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
            message, frames = codec.to_worker.decode(wire)
            if isinstance(message, Welcome):
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
                case agents.Say(message=message, frames=frames):
                    self._say(message, frames)
                case agents.Beat(epoch=epoch):
                    self._say(self._heartbeat(epoch))
                case agents.Load() | agents.Run() | agents.Release() | agents.Drop():
                    self.orders.append(action)
                    self._arrivals.append(self.world.now)
                    waiting = [o for o in self.orders if isinstance(o, agents.Run)]
                    assert len([o for o in waiting if not self.agent.is_void(o)]) <= CREDITS
                    self._work()
                case agents.OpenLink(epoch=epoch, addresses=addresses):
                    self._next = None
                    self.world.at(0.001, lambda: self._dial(epoch, addresses))
                case agents.Greet(hello=hello):
                    if self._next:
                        self.world.send_across(self._next, hello, ())
                case agents.HandOn(task=task, frames=frames):
                    if self._next and self.state == "up":
                        self.world.send_across(self._next, task, frames)
                case agents.CloseLink():
                    self._next = None
                case agents.PeerSay(peer=peer, message=welcome):
                    dialer = self._hellos[peer]
                    self.world.at(0.001, lambda: dialer.welcomed(peer, welcome.epoch))  # noqa: B023
                case agents.Reconnect():
                    self.world.close(self.link, after_s=self._closing_takes_s)
                    self._connect()
                case agents.Log(text=text):
                    self.world.logs.append(f"{self.name}: {text}")
                case agents.Exit(error=error):
                    self.exit = error
                    self.kill()
                case _:
                    assert_never(action)

    def _say(self, message: FromWorker, frames: Sequence[Frame] = ()) -> None:
        if self.state == "up":
            self.world.send_up(self.link, message, frames)

    def _heartbeat(self, epoch: int) -> Heartbeat:
        waiting = sum(isinstance(order, agents.Run) for order in self.orders)
        return Heartbeat(
            epoch=epoch,
            progress_age_s=self.world.now - self._progress_at if waiting else 0.0,
            tasks_waiting=waiting,
            memory_used_bytes=1,
            kv_bytes=1,
        )

    # -------------------------------------------------------------- other workers

    def _dial(self, epoch: int, addresses: Sequence[str]) -> None:
        other = self.world.reach(self, addresses[0])
        if other and self.state == "up":
            self._next = self.world.connect(other, f"{self.name}->{other.name}")
            other._hellos[self._next.peer] = self
            self._apply(agents.NextReached(epoch, addresses[0]))

    def welcomed(self, peer: PeerId, epoch: int) -> None:
        """The next worker answered the hello of a link."""
        if self._next and self._next.peer == peer:
            self._when_up(lambda: self._apply(agents.LinkUp(epoch, 0.002)))

    def lost(self, other: "SimWorker") -> None:
        """The connection to `other`, if there is one, is gone."""
        if self._next and self._next.owner is other:
            self._next = None
            self._when_up(lambda: self._apply(agents.LinkDown(self.agent.epoch)))

    def cut(self) -> None:
        """Break the link to the next worker, with all that is on it."""
        if self._next:
            self._next.open = False
            owner = self._next.owner
            assert isinstance(owner, SimWorker)
            self.lost(owner)

    def receive_across(self, link: "Link", wire: list[Frame]) -> None:
        """Take a message of the worker of the stage before."""
        if link.open:
            message, frames = codec.to_next_worker.decode(wire)
            event = agents.PeerReceived(link.peer, message, frames)
            self._when_up(lambda: self._apply(event))

    # -------------------------------------------------------------- compute thread

    def _work(self) -> None:
        if self.orders and not self._busy:
            self._busy = True
            self._progress_at = self.world.now
            takes_s = self._takes_s(self.orders[0])
            self.world.at(takes_s, lambda: self._when_up(self._finish))

    def _takes_s(self, order: Order) -> float:
        match order:
            case agents.Load():
                return self.load_s
            case agents.Run(task=task) if not self.agent.is_void(order):
                tokens = sum(part.num_tokens for part in task.sequences)
                return self.task_s + self.token_s * tokens
            case _:
                return 0.0

    def _finish(self) -> None:
        if self.hung:
            self._stuck = True
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

    def _do(self, order: Order) -> agents.Event | None:
        match order:
            case agents.Load():
                return self._load(order)
            case agents.Run():
                return self._run(order)
            case agents.Release(sequence_ids=ids):
                for sequence_id in ids:
                    if self.stage:
                        self.stage.release(sequence_id)
            case agents.Drop():
                self.stage = None
        return None

    def _load(self, load: agents.Load) -> agents.Event | None:
        order = load.order
        if self.agent.is_void(load):
            return None
        if self.load_error is not None:
            self.stage = None
            return agents.LoadFailed(load.session, order.epoch, self.load_error)
        self.stage = FakeStage(order, order.kv_tokens)
        weights = COST.weight_bytes(order.layers)
        return agents.Loaded(load.session, order.epoch, self.load_s, weights, order.kv_tokens)

    def _run(self, run: agents.Run) -> agents.Event | None:
        if self.agent.is_void(run):
            return None
        try:
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
            return agents.Broke(run, exc, exc.missing)
        except StageError as exc:
            return agents.Broke(run, exc)
        self.after_task(run.task)
        took_s = self.world.now - self._progress_at
        queued_s = self._progress_at - self._arrivals[0]
        self.busy_s += took_s
        self.num_tasks += 1
        return agents.Computed(
            run, specs, frames, compute_us=round(1e6 * took_s), queued_us=round(1e6 * queued_s)
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
