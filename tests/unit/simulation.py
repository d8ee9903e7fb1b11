"""A cluster in memory: the production core and agents on a virtual clock and a virtual network.

The fake parts are the wires (first in, first out per connection, with delays and faults), the
compute threads with their model (`fake_model`), the text thread and the clients. Every message
passes the codec, and the core's invariants are asserted after every event.
"""

import heapq
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, assert_never

from distributed_llm.common import codec
from distributed_llm.common.errors import DistributedLLMError, StageError
from distributed_llm.common.messages import (
    Cancel,
    Capabilities,
    ClientHello,
    ClientWelcome,
    Finished,
    FinishReason,
    FromClient,
    FromWorker,
    Generate,
    Goodbye,
    Heartbeat,
    Ping,
    Pong,
    Refused,
    RequestFailed,
    StatusReport,
    Task,
    TaskResult,
    ToClient,
    TokenChunk,
    ToNextWorker,
    ToWorker,
)
from distributed_llm.common.sampling_params import SamplingParams
from distributed_llm.common.tensors import Frame, frame_of_token_ids, token_ids_of_frame
from distributed_llm.common.types import LayerRange, PeerId
from distributed_llm.coordinator import events
from distributed_llm.coordinator.core import Core
from distributed_llm.coordinator.placement import CoreSettings
from distributed_llm.coordinator.requests import RequestKey
from distributed_llm.worker import events as agents
from distributed_llm.worker.agent import Agent
from tests.unit.fake_model import (
    BIG,
    CONTEXT,
    COST,
    DRAWN_SEED,
    MODEL,
    FakeStage,
    Missing,
    Void,
    reference,
)

SETTINGS = CoreSettings(min_kv_tokens=64, max_batch_tokens=8, task_timeout_s=3.0)

Message = FromWorker | FromClient | ToWorker | ToClient | ToNextWorker
FaultKind = Literal["drop", "duplicate", "delay"]


# ------------------------------------------------------------------ the wires


@dataclass(eq=False)
class Link:
    """One connection: messages keep their order in each direction."""

    peer: PeerId
    owner: "SimWorker | SimClient"
    open: bool = True  # seen from the coordinator, or from the next worker
    up_at: float = 0.0
    down_at: float = 0.0


@dataclass
class Fault:
    """What happens to the next `count` messages of a kind.

    Attributes:
        peer_of: the worker to or from whom; None is any.
    """

    kind: type[Message]
    what: FaultKind
    count: int = 1
    peer_of: "SimWorker | None" = None
    delay_s: float = 1.0


class World:
    """The coordinator's edge, the network, and the clock.

    Args:
        settings: of the core.
        seed: of the delays.
        delay_s: of a message, between these.
        text_delay_s: of the text thread for each thing it does.
    """

    def __init__(
        self,
        settings: CoreSettings = SETTINGS,
        *,
        seed: int = 0,
        delay_s: tuple[float, float] = (0.001, 0.002),
        text_delay_s: float = 0.0005,
    ) -> None:
        self.core = Core(MODEL, settings, draw_seed=lambda: DRAWN_SEED)
        self.now = 100.0
        self.workers: list[SimWorker] = []
        self.clients: list[SimClient] = []
        self.faults: list[Fault] = []
        self.logs: list[str] = []
        self.stopped: DistributedLLMError | None = None
        self.num_arrived = 0
        self.text_delay_s = text_delay_s
        self._delay_s = delay_s
        self._random = random.Random(seed)
        self.apart: set[tuple[SimWorker, SimWorker]] = set()  # cannot reach each other, this way
        self._links: dict[PeerId, Link] = {}
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0
        self._texts: dict[RequestKey, list[FakeDetokenizer]] = {}
        self._text_at = 0.0
        self._forgotten: set[RequestKey] = set()

    # -------------------------------------------------------------- people

    def worker(self, name: str, memory_bytes: int = BIG) -> "SimWorker":
        """Return a worker that is about to join."""
        worker = SimWorker(self, name, memory_bytes)
        self.workers.append(worker)
        return worker

    def client(self) -> "SimClient":
        """Return a client that says hello."""
        client = SimClient(self)
        self.clients.append(client)
        return client

    def serving(self, count: int = 3, memory_bytes: int = BIG) -> list["SimWorker"]:
        """Return that many workers once they serve."""
        workers = []
        for i in range(count):
            workers.append(self.worker(f"w{i}", memory_bytes))
            self.run(for_s=0.01)
        assert self.run(lambda: self.state == "serving")
        return workers

    @property
    def state(self) -> str:
        """The core's."""
        return self.core.status(now=self.now).state

    @property
    def epoch(self) -> int:
        """The core's."""
        return self.core.status(now=self.now).epoch

    @property
    def rejected(self) -> dict[str, int]:
        """How many messages were dropped, by reason."""
        return self.core.status(now=self.now).rejected

    def plan(self) -> list["SimWorker"]:
        """Return the workers that serve or load, in the order of their layers."""
        held = [w for w in self.core.status(now=self.now).workers if w.layers is not None]
        names = [w.name for w in sorted(held, key=lambda w: w.layers or LayerRange(0, 1))]
        by_id = {w.worker_id: w for w in self.workers if w.state != "dead"}
        return [by_id[name] for name in names]

    # -------------------------------------------------------------- the clock

    def at(self, delay_s: float, call: Callable[[], None]) -> None:
        """Call `call` in `delay_s`."""
        self.at_time(self.now + delay_s, call)

    def at_time(self, when: float, call: Callable[[], None]) -> None:
        """Call `call` at `when`."""
        self._serial += 1
        heapq.heappush(self._heap, (when, self._serial, call))

    def run(self, until: Callable[[], bool] = lambda: False, *, for_s: float = 120.0) -> bool:
        """Let time pass until `until` or for `for_s`; return whether `until` came true."""
        stop_at = self.now + for_s
        turns, turns_at = 0, self.now
        while not until():
            when, call = self._next()
            if when > stop_at:
                self.now = stop_at
                return False
            if when > turns_at:
                turns, turns_at = 0, when
            turns += 1
            assert turns < 5000, "time stands still"
            self.now = max(self.now, when)
            call()
        return True

    def _next(self) -> tuple[float, Callable[[], None]]:
        due: list[tuple[float, Callable[[], None]]] = []
        if self._heap and self._heap[0][0] <= self.now:
            return self._heap[0][0], self._pop
        if self._heap:
            due.append((self._heap[0][0], self._pop))
        core_at = self.core.next_deadline()
        if core_at is not None:
            due.append((core_at, self._core_timer))
        for worker in self.workers:
            at = worker.next_deadline()
            if at is not None:
                due.append((at, worker.on_timer))
        return min(due, key=lambda item: item[0], default=(float("inf"), self._pop))

    def _pop(self) -> None:
        heapq.heappop(self._heap)[2]()

    def _core_timer(self) -> None:
        actions = self.core.on_timer(now=self.now)
        self.core.validate()
        self._perform(actions)

    # -------------------------------------------------------------- the coordinator's edge

    def apply(self, event: events.Event) -> list[events.Action]:
        """Give the core an event and do what it says."""
        stale = (
            isinstance(event, events.Received)
            and isinstance(event.message, TaskResult)
            and event.message.epoch not in {r.epoch for r in self.core._placement.replicas}
        )
        actions = self.core.handle(event, now=self.now)
        self.core.validate()
        if stale:
            applied = [a for a in actions if isinstance(a, events.Detokenize) or _is_task(a)]
            assert not applied, f"a result of an older epoch was applied: {applied}"
        self._perform(actions)
        return actions

    def _perform(self, actions: Iterable[events.Action]) -> None:
        for action in actions:
            match action:
                case events.Send(peer=peer, message=message, frames=frames):
                    self._send_down(peer, message, frames)
                case events.Tokenize() | events.Detokenize() | events.Forget():
                    assert action.key not in self._forgotten, f"{action} after the end"
                    if isinstance(action, events.Forget):
                        self._forgotten.add(action.key)
                    self._text_at = max(self._text_at, self.now) + self.text_delay_s
                    self.at_time(self._text_at, lambda order=action: self._text(order))  # type: ignore[misc]
                case events.Log(text=text):
                    self.logs.append(text)
                case events.Stop(error=error):
                    self.stopped = error
                case _:
                    assert_never(action)

    def _text(self, order: events.Tokenize | events.Detokenize | events.Forget) -> None:
        match order:
            case events.Tokenize(key=key, payload=payload, stop_strings=stops):
                self._texts[key] = [FakeDetokenizer(stops) for _ in range(order.num_choices)]
                self.apply(events.Tokenized(key, token_ids_of_frame(payload)))
            case events.Forget(key=key):
                self._texts.pop(key, None)
            case events.Detokenize(key=key, choice=choice, token_ids=ids, last=last):
                if texts := self._texts.get(key):
                    self.apply(texts[choice].feed(key, choice, ids, last=last))

    # -------------------------------------------------------------- the network

    def connect(self, owner: "SimWorker | SimClient", name: str) -> Link:
        """Return a new connection."""
        link = Link(PeerId(f"{name}#{len(self._links)}".encode()), owner)
        self._links[link.peer] = link
        return link

    def close(self, link: Link) -> None:
        """Close a connection; the coordinator's socket notices."""
        if link.open:
            link.open = False
            closed_at = max(link.up_at, self.now + self._delay())
            self.at_time(closed_at, lambda: self._do(events.ConnectionClosed()))

    def send_up(
        self, link: Link, message: FromWorker | FromClient, frames: Sequence[Frame]
    ) -> None:
        """Send a message to the coordinator."""
        copies, extra_s = self._fate(message, link)
        decoded, tensors = codec.to_coordinator.decode(codec.encode(message, frames))
        for _ in range(copies):
            link.up_at = max(link.up_at, self.now + self._delay() + extra_s)
            self.at_time(
                link.up_at, lambda: self._arrive(events.Received(link.peer, decoded, tensors))
            )

    def _arrive(self, event: events.Received) -> None:
        known = self.core._registry.is_client(event.peer)
        self.num_arrived += known and isinstance(event.message, Generate)
        self.apply(event)

    def _do(self, event: events.Event) -> None:
        self.apply(event)

    def _send_down(
        self, peer: PeerId, message: ToWorker | ToClient, frames: Sequence[Frame]
    ) -> None:
        wire = codec.encode(message, frames)
        link = self._links.get(peer)
        if link is None or not link.open:
            self.at(0.0, lambda: self._do(events.Unreachable(peer, "is gone")))
            return
        copies, extra_s = self._fate(message, link)
        for _ in range(copies):
            link.down_at = max(link.down_at, self.now + self._delay() + extra_s)
            self.at_time(link.down_at, lambda: link.owner.receive(link, wire))

    def reach(self, dialer: "SimWorker", address: str) -> "SimWorker | None":
        """Return the worker at an address, if `dialer` gets through to it."""
        for other in self.workers:
            if other.address == address and other.state == "up":
                return None if (dialer, other) in self.apart else other
        return None

    def send_across(self, link: Link, message: ToNextWorker, frames: Sequence[Frame]) -> None:
        """Send a message to the next worker, the link's owner."""
        copies, extra_s = self._fate(message, link)
        wire = codec.encode(message, frames)
        owner = link.owner
        assert isinstance(owner, SimWorker)
        for _ in range(copies):
            link.down_at = max(link.down_at, self.now + self._delay() + extra_s)
            self.at_time(link.down_at, lambda: owner.receive_across(link, wire))

    def _fate(self, message: Message, link: Link) -> tuple[int, float]:
        """Return how many copies arrive, and how much later."""
        for fault in self.faults:
            if isinstance(message, fault.kind) and fault.peer_of in (None, link.owner):
                fault.count -= 1
                if fault.count == 0:
                    self.faults.remove(fault)
                copies = {"drop": 0, "duplicate": 2, "delay": 1}[fault.what]
                return copies, fault.delay_s if fault.what == "delay" else 0.0
        return 1, 0.0

    def _delay(self) -> float:
        return self._random.uniform(*self._delay_s)

    # -------------------------------------------------------------- the checker

    def all_ended(self) -> bool:
        """Return whether every request of a client that is there has its last message."""
        return all(
            answer.end is not None
            for client in self.clients
            if not client.gone
            for answer in client.answers.values()
        )

    def check_drained(self) -> None:
        """Assert that nothing is left of any request, anywhere."""
        status = self.core.status(now=self.now)
        assert (status.requests_running, status.requests_waiting) == (0, 0)
        assert (
            status.requests_finished + status.requests_failed
            == self.num_arrived - status.rejected.get("duplicate_request", 0)
        )
        assert not self._texts
        for replica in self.core._placement.replicas:
            assert replica.scheduler is not None
            ledger = replica.scheduler._ledger
            assert set(ledger.sequence_ids) == set(ledger._ended)
            for seat in replica.seats:
                worker = self._links[seat.peer].owner
                assert isinstance(worker, SimWorker)
                assert worker.stage is not None
                assert set(worker.stage.kv) <= set(ledger.sequence_ids)
                assert not worker.orders


def _is_task(action: events.Action) -> bool:
    return isinstance(action, events.Send) and isinstance(action.message, Task)


class FakeDetokenizer:
    """One letter per token; what may be the beginning of a stop string waits."""

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._stops = stop_strings
        self._text = ""
        self._given = 0
        self._count = 0

    def feed(
        self, key: RequestKey, choice: int, ids: Iterable[int], *, last: bool
    ) -> events.Detokenized:
        """Return what the core is told."""
        for token in ids:
            self._text += text_of([token])
            self._count += 1
            found = [at for stop in self._stops if (at := self._text.find(stop)) >= 0]
            if found:
                text = self._text[self._given : min(found)]
                return events.Detokenized(key, choice, text, self._count, stopped=True, last=last)
        end = len(self._text) if last else len(self._text) - self._held()
        text, self._given = self._text[self._given : end], end
        return events.Detokenized(key, choice, text, self._count, stopped=False, last=last)

    def _held(self) -> int:
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        return next(
            (
                n
                for n in range(min(longest, len(self._text) - self._given), 0, -1)
                if any(stop.startswith(self._text[-n:]) for stop in self._stops)
            ),
            0,
        )


def text_of(token_ids: Iterable[int]) -> str:
    """Return the text of tokens, one letter for each."""
    return "".join(chr(0x4E00 + token) for token in token_ids)


# ------------------------------------------------------------------ workers


class SimWorker:
    """A machine: the production agent, a fake compute thread, and what may happen to both.

    Attributes:
        load_error: why it cannot load any layers.
        load_s: time to load.
        fail_tasks: how many of the next tasks fail.
        hung: its compute thread does nothing.
        before_task: called before each task is computed.
        after_task: called after each task, before the answer is sent.
    """

    def __init__(self, world: World, name: str, memory_bytes: int) -> None:
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
        self.orders: deque[agents.Load | agents.Run | agents.Release | agents.Drop] = deque()
        self.num_sessions = 0
        self._progress_at = world.now
        self._busy = False
        self._stuck = False
        self._thawed: list[Callable[[], None]] = []
        self.task_s = 0.001
        self.address = f"{name}:1"
        self._next: Link | None = None  # the link to the worker of the next stage
        self._hellos: dict[PeerId, SimWorker] = {}  # who dialled this worker
        self.agent = Agent(
            name,
            capabilities(memory_bytes),
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

    def leave(self) -> None:
        """Say goodbye and end."""
        self._say(Goodbye())
        self.kill()

    def _when_up(self, call: Callable[[], None]) -> None:
        if self.state == "up":
            call()
        elif self.state == "frozen":
            self._thawed.append(call)

    # -------------------------------------------------------------- edge

    def next_deadline(self) -> float | None:
        """The agent's, while it can act."""
        return self.agent.next_deadline() if self.state == "up" else None

    def on_timer(self) -> None:
        """The agent's."""
        self._perform(self.agent.on_timer(reached=True, now=self.world.now))

    def receive(self, link: Link, wire: list[Frame]) -> None:
        """Take a message of a connection that may be an old one."""
        self._when_up(lambda: self._received(link, wire))

    def _received(self, link: Link, wire: list[Frame]) -> None:
        if link is self.link:
            message, frames = codec.to_worker.decode(wire)
            if type(message).__name__ == "Welcome":
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

    def _perform(self, actions: Iterable[agents.Action]) -> None:
        for action in actions:
            match action:
                case agents.Say(message=message, frames=frames):
                    self._say(message, frames)
                case agents.Beat(epoch=epoch):
                    self._say(self._heartbeat(epoch))
                case agents.Load() | agents.Run() | agents.Release() | agents.Drop():
                    self.orders.append(action)
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
                    self.world.close(self.link)
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

    def receive_across(self, link: Link, wire: list[Frame]) -> None:
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
            takes_s = self.load_s if isinstance(self.orders[0], agents.Load) else self.task_s
            self.world.at(takes_s, lambda: self._when_up(self._finish))

    def _finish(self) -> None:
        if self.hung:
            self._stuck = True
            return
        event = self._do(self.orders[0])
        self._when_up(lambda: self._finished(event))

    def _finished(self, event: agents.Event | None) -> None:
        self.orders.popleft()
        self._busy = False
        if event is not None:
            self._apply(event)
        self._work()

    def _do(
        self, order: agents.Load | agents.Run | agents.Release | agents.Drop
    ) -> agents.Event | None:
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
        except Void:
            return None
        except Missing as exc:
            return agents.Broke(run, exc, exc.missing)
        except StageError as exc:
            return agents.Broke(run, exc)
        self.after_task(run.task)
        return agents.Computed(run, specs, frames, int(1e6 * self.task_s), 0)


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


# ------------------------------------------------------------------ clients


@dataclass
class Answer:
    """What a client got for a request; further choices are answers of their own."""

    prompt: tuple[int, ...]
    params: SamplingParams
    choice: int = 0
    others: list["Answer"] = field(default_factory=list)
    reason: FinishReason | None = None
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    end: Finished | RequestFailed | None = None
    cancelled: bool = False

    @property
    def code(self) -> str:
        """Why it failed; empty if it did not."""
        return self.end.code if isinstance(self.end, RequestFailed) else ""

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it finished."""
        return self.reason if isinstance(self.end, Finished) else None

    @property
    def all(self) -> list["Answer"]:
        """All choices, this one first."""
        return [self, *self.others]

    def expected(self) -> list[int]:
        """Return the answer without faults."""
        room = CONTEXT - len(self.prompt)
        tokens = reference(
            self.prompt, self.params, choice=self.choice, default_max_new_tokens=room
        )
        for count in range(1, len(tokens) + 1):
            if any(stop in text_of(tokens[:count]) for stop in self.params.stop_strings):
                return tokens[:count]
        return tokens

    def check(self) -> None:
        """Assert that all that came is right."""
        for other in self.others:
            other.check()
        expected = self.expected()
        assert self.token_ids == expected[: len(self.token_ids)]
        if isinstance(self.end, Finished):
            assert self.token_ids == expected
            assert self.end.usage.prompt_tokens == len(self.prompt)
            assert self.reason is not None
            if self.choice == 0:
                lengths = [len(one.expected()) for one in self.all]
                assert self.end.usage.completion_tokens == sum(lengths)
            whole = text_of(expected)
            found = [at for s in self.params.stop_strings if (at := whole.find(s)) >= 0]
            assert self.text == whole[: min(found, default=None)]


class SimClient:
    """A client that checks the order of what it is sent."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.gone = False
        self.answers: dict[str, Answer] = {}
        self.others: list[ToClient] = []
        self.link = world.connect(self, "client")
        self.say(ClientHello())
        self._ping()

    def say(self, message: FromClient, frames: Sequence[Frame] = ()) -> None:
        """Send a message."""
        if not self.gone:
            self.world.send_up(self.link, message, frames)

    def submit(
        self,
        prompt: Sequence[int] = (1, 2, 3),
        params: SamplingParams | None = None,
        *,
        request_id: str = "",
    ) -> Answer:
        """Send a request for 8 tokens, or with `params`."""
        name = request_id or f"r{len(self.answers)}"
        answer = Answer(tuple(prompt), params or SamplingParams(max_new_tokens=8))
        answer.others = [
            Answer(answer.prompt, answer.params, choice) for choice in range(1, answer.params.n)
        ]
        self.answers[name] = answer
        spec, frame = frame_of_token_ids(prompt)
        message = Generate(
            request_id=name, prompt="token_ids", params=answer.params, tensors=(spec,)
        )
        self.say(message, (frame,))
        return answer

    def cancel(self, request_id: str) -> None:
        """Cancel a request."""
        self.answers[request_id].cancelled = True
        self.say(Cancel(request_id=request_id))

    def vanish(self, *, silently: bool = False) -> None:
        """End without a word; silently if nobody closes the connection."""
        self.gone = True
        if not silently:
            self.world.close(self.link)

    def receive(self, link: Link, wire: list[Frame]) -> None:
        """Take a message."""
        if self.gone:
            return
        message, _ = codec.to_client.decode(wire)
        match message:
            case TokenChunk(request_id=name, index=index, text=text, token_ids=ids):
                answer = self.answers[name].all[message.choice]
                assert answer.end is None, "a chunk after the end"
                assert answer.reason is None, "a chunk after the last one"
                assert index == len(answer.token_ids), "chunks are not contiguous"
                answer.token_ids += ids
                answer.text += text
                answer.reason = message.finish_reason
            case Finished(request_id=name) | RequestFailed(request_id=name):
                for answer in self.answers[name].all:
                    assert answer.end is None, "a second end"
                    answer.end = message
            case ClientWelcome() | StatusReport() | Pong() | Refused():
                self.others.append(message)
            case _:
                raise AssertionError(f"unexpected {message}")

    def _ping(self) -> None:
        if not self.gone:
            self.say(Ping())
            self.world.at(5.0, self._ping)


def with_settings(**changes: object) -> CoreSettings:
    """Return the usual settings with these changes."""
    return replace(SETTINGS, **changes)  # type: ignore[arg-type]
