"""A cluster in memory: the production core and agents on a virtual clock and a virtual network.

The fake parts are the wires (first in, first out per connection, with delays and faults), the
machines (`fake_worker`) with their model (`fake_model`), the clients and the text process
(`fake_client`). Every message passes the codec, and what must always hold is asserted after every
event (`checker`).
"""

import heapq
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, assert_never

import msgspec

from distributed_llm.common import codec
from distributed_llm.common.errors import DistributedLLMError, RemoteProtocolError
from distributed_llm.common.keys import NOBODY
from distributed_llm.common.messages import (
    Finished,
    FromClient,
    FromWorker,
    ToClient,
    ToNextWorker,
    ToPreviousWorker,
    ToWorker,
    WeightRequest,
)
from distributed_llm.common.settings import CoordinatorSettings
from distributed_llm.common.tensors import Frame, token_ids_of_frame
from distributed_llm.common.types import KV_BLOCK, LayerRange, PeerId
from distributed_llm.coordinator import events
from distributed_llm.coordinator.core import Core
from distributed_llm.coordinator.events import RequestKey
from distributed_llm.coordinator.model import ServedModel
from distributed_llm.coordinator.plan import kv_tokens_of, plan_of
from distributed_llm.coordinator.trust.access import Access
from tests.unit.checker import Checker
from tests.unit.fake_client import Answer, FakeDetokenizer, SimClient
from tests.unit.fake_model import BIG, DRAWN_SEED, MODEL
from tests.unit.fake_worker import SimWorker

SETTINGS = CoordinatorSettings(
    strategy="memory", min_kv_tokens=64, max_batch_tokens=8, task_timeout_s=3.0
)

Message = FromWorker | FromClient | ToWorker | ToClient | ToNextWorker | ToPreviousWorker
FaultKind = Literal["drop", "duplicate", "delay", "spoil"]
"""Spoiled messages have a field that no reader knows."""

Way = Literal["up", "down", "across", "back"]
"""To the coordinator, from it, from a worker to the next one, or back from there."""

LONG = tuple(range(20))
"""A prompt of three chunks."""


# ------------------------------------------------------------------ the wires


@dataclass(eq=False)
class Link:
    """One connection: messages keep their order in each direction."""

    peer: PeerId
    owner: SimWorker | SimClient
    open: bool = True  # seen from the coordinator, or from the next worker
    up_at: float = 0.0
    down_at: float = 0.0


@dataclass
class Fault:
    """What happens to the next `count` messages of a kind.

    Attributes:
        peer_of: the worker to or from whom; None is any.
        way: only on this way; None is any.
    """

    kind: type[Message]
    what: FaultKind
    count: int = 1
    peer_of: SimWorker | None = None
    delay_s: float = 1.0
    way: Way | None = None


class World:
    """The coordinator's edge, the network, and the clock.

    Args:
        settings: of the core.
        seed: of the delays.
        delay_s: of a message, between these.
        text_delay_s: of the text process for each thing it does.
        access: who may do what; everybody may do everything unless given.
        model: that is served.

    Attributes:
        counts: messages that were sent, by way and kind.
        unreadable: whether a message is spoiled, every time.
        question_s: how long it takes to answer a question about plans.
    """

    def __init__(
        self,
        settings: CoordinatorSettings = SETTINGS,
        *,
        seed: int = 0,
        delay_s: tuple[float, float] = (0.001, 0.002),
        text_delay_s: float = 0.0005,
        access: Access | None = None,
        model: ServedModel = MODEL,
    ) -> None:
        self.model = model
        self.core = Core(model, settings, draw_seed=lambda: DRAWN_SEED, access=access)
        self.now = 100.0
        self.workers: list[SimWorker] = []
        self.clients: list[SimClient] = []
        self.faults: list[Fault] = []
        self.unreadable: Callable[[Message], bool] = lambda _: False
        self.logs: list[str] = []
        self.stopped: DistributedLLMError | None = None
        self.counts: Counter[tuple[Way, type[Message]]] = Counter()
        self.checker = Checker(self.core, settings)
        self.text_delay_s = text_delay_s
        self.question_s = 0.01
        self._delay_s = delay_s
        self._random = random.Random(seed)
        self.apart: set[tuple[SimWorker, SimWorker]] = set()  # cannot reach each other, this way
        self._links: dict[PeerId, Link] = {}
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._timer_at: float | None = None
        self._serial = 0
        self._texts: dict[RequestKey, list[FakeDetokenizer]] = {}
        self._text_at = 0.0

    # -------------------------------------------------------------- people

    def worker(self, name: str, memory_bytes: int = BIG, *, bfloat16: bool = True) -> SimWorker:
        """Return a worker that is about to join."""
        worker = SimWorker(self, name, memory_bytes, bfloat16=bfloat16)
        self.workers.append(worker)
        return worker

    def client(self) -> SimClient:
        """Return a client that says hello."""
        client = SimClient(self)
        self.clients.append(client)
        return client

    def serving(self, count: int = 3, memory_bytes: int = BIG) -> list[SimWorker]:
        """Return that many workers once they serve."""
        workers = []
        for i in range(count):
            workers.append(self.worker(f"w{i}", memory_bytes))
            self.run(for_s=0.01)
        assert self.run(lambda: self.state == "serving")
        return workers

    def linked(self, count: int = 3, memory_bytes: int = BIG) -> list[SimWorker]:
        """Return that many workers once they serve and reach each other."""
        workers = self.serving(count, memory_bytes)
        assert self.run(lambda: self.links == ["direct"] * (count - 1), for_s=2.0)
        return workers

    @property
    def links(self) -> list[str]:
        """How each stage but the last of each pipeline reaches the next one, by layers."""
        held = [w for w in self.core.status(now=self.now).workers if w.layers is not None]
        ranked = sorted(held, key=lambda w: w.layers or LayerRange(0, 1))
        return [w.link for w in ranked if w.layers and w.layers.stop < self.model.cost.num_layers]

    @property
    def state(self) -> str:
        """The core's, without all else that a status says: it is asked after every event."""
        return self.core._pipelines.state

    @property
    def epoch(self) -> int:
        """The core's, likewise."""
        return self.core._pipelines.epoch

    @property
    def rejected(self) -> dict[str, int]:
        """How many messages were dropped, by reason."""
        return self.core.status(now=self.now).rejected

    @property
    def tokens_computed(self) -> int:
        """Tokens that first stages computed since they were loaded."""
        first = [w for w in self.workers if w.stage and w.stage.layers.start == 0]
        return sum(w.stage.num_computed for w in first if w.stage)

    def plan(self) -> list[SimWorker]:
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
            if not self._heap or self._heap[0][0] > stop_at:
                self.now = stop_at
                return False
            when, _, call = heapq.heappop(self._heap)
            if when > turns_at:
                turns, turns_at = 0, when
            turns += 1
            assert turns < 5000, "time stands still"
            self.now = max(self.now, when)
            call()
        return True

    def _arm(self) -> None:
        """Have the core's timer run when it is due."""
        at = self.core.next_deadline()
        if at is not None and (self._timer_at is None or at < self._timer_at):
            self._timer_at = at
            self.at_time(at, lambda: self._on_timer(at))

    def _on_timer(self, at: float) -> None:
        if at != self._timer_at:  # another one runs earlier
            return
        self._timer_at = None
        due_at = self.core.next_deadline()
        if due_at is not None and due_at <= self.now:
            actions = self.core.on_timer(now=self.now)
            self.checker.check(None, actions, now=self.now)
            later = self.core.next_deadline()
            assert later is None or later > self.now, "what was due is due again at once"
            self._perform(actions)
        self._arm()

    # -------------------------------------------------------------- the coordinator's edge

    def apply(self, event: events.Event) -> list[events.Action]:
        """Give the core an event and do what it says."""
        self.checker.before(event, now=self.now)
        actions = self.core.handle(event, now=self.now)
        self.checker.check(event, actions, now=self.now)
        self._perform(actions)
        self._arm()
        return actions

    def _perform(self, actions: Iterable[events.Action]) -> None:
        for action in actions:
            match action:
                case events.Send(peer=peer, message=message, frames=frames):
                    self._send_down(peer, message, frames)
                case events.Tokenize() | events.Detokenize() | events.Forget() | events.AskText():
                    self._text_at = max(self._text_at, self.now) + self.text_delay_s
                    self.at_time(self._text_at, lambda order=action: self._text(order))  # type: ignore[misc]
                case events.Study():
                    self._study(action)
                case events.Log(text=text):
                    self.logs.append(text)
                case events.Stop(error=error):
                    self.stopped = error
                case events.KeepMembers():
                    pass  # nothing outlives a simulation
                case events.AnswerAboutWeights():
                    raise AssertionError("nobody asks for weights here")
                case _:
                    assert_never(action)

    def _study(self, study: events.Study) -> None:
        self.at(self.question_s, lambda: self._do(events.Studied(study.question.reply())))

    def _text(
        self, order: events.Tokenize | events.Detokenize | events.Forget | events.AskText
    ) -> None:
        match order:
            case events.Tokenize(key=key, payload=payload, rules=rules):
                texts = [FakeDetokenizer(rules) for _ in range(order.num_choices)]
                self._texts[key] = texts
                ids = token_ids_of_frame(payload)
                self.apply(events.Tokenized(key, ids, texts[0].mask() if texts else b""))
            case events.Forget(key=key):
                self._texts.pop(key, None)
            case events.AskText(key=key, payload=payload):
                self.apply(events.TextAnswered(key, payload))
            case events.Detokenize(key=key, choice=choice, token_ids=ids, last=last):
                if made := self._texts.get(key):
                    self.apply(made[choice].feed(key, choice, ids, last=last))

    # -------------------------------------------------------------- the network

    def connect(self, owner: SimWorker | SimClient, name: str) -> Link:
        """Return a new connection."""
        link = Link(PeerId(f"{name}#{len(self._links)}".encode()), owner)
        self._links[link.peer] = link
        return link

    def close(self, link: Link, *, after_s: float = 0.0) -> None:
        """Close a connection; the coordinator's socket notices after a while."""
        if link.open:
            link.open = False
            closed_at = max(link.up_at, self.now + self._delay() + after_s)
            self.at_time(closed_at, lambda: self._do(events.ConnectionClosed()))

    def send_up(
        self, link: Link, message: FromWorker | FromClient, frames: Sequence[Frame]
    ) -> None:
        """Send a message to the coordinator."""
        wire = codec.encode(message, frames)
        copies, extra_s = self._fate("up", message, link, wire)
        event: events.Event
        try:
            decoded, tensors = codec.to_coordinator.decode(wire)
            assert not isinstance(decoded, WeightRequest)
            key = link.owner.key if isinstance(link.owner, SimWorker) else NOBODY
            event = events.Received(link.peer, decoded, tensors, key)
        except RemoteProtocolError as exc:
            event = events.Garbage(link.peer, exc.reason, exc)
        for _ in range(copies):
            link.up_at = max(link.up_at, self.now + self._delay() + extra_s)
            self.at_time(link.up_at, lambda: self._do(event))

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
        copies, extra_s = self._fate("down", message, link, wire)
        for _ in range(copies):
            link.down_at = max(link.down_at, self.now + self._delay() + extra_s)
            self.at_time(link.down_at, lambda: link.owner.receive(link, wire))

    def reach(self, dialer: SimWorker, address: str) -> SimWorker | None:
        """Return the worker at an address, if `dialer` gets through to it."""
        for other in self.workers:
            if other.address == address and other.state == "up":
                return None if (dialer, other) in self.apart else other
        return None

    def send_across(self, link: Link, message: ToNextWorker, frames: Sequence[Frame]) -> None:
        """Send a message to the next worker, the link's owner."""
        wire = codec.encode(message, frames)
        copies, extra_s = self._fate("across", message, link, wire)
        owner = link.owner
        assert isinstance(owner, SimWorker)
        for _ in range(copies):
            link.down_at = max(link.down_at, self.now + self._delay() + extra_s)
            self.at_time(link.down_at, lambda: owner.receive_across(link, wire))

    def send_back(self, link: Link | None, message: ToPreviousWorker, dialer: SimWorker) -> None:
        """Answer over a link, whose owner is not `dialer`; None is one that is closed."""
        if link is None:
            return
        wire = codec.encode(message)
        copies, extra_s = self._fate("back", message, link, wire)
        for _ in range(copies):
            link.up_at = max(link.up_at, self.now + self._delay() + extra_s)
            self.at_time(link.up_at, lambda: dialer.answered(link, wire))

    def _fate(self, way: Way, message: Message, link: Link, wire: list[Frame]) -> tuple[int, float]:
        """Return how many copies arrive, and how much later; spoil the wire if need be."""
        self.counts[way, type(message)] += 1
        if self.unreadable(message):
            _spoil(wire)
        for fault in self.faults:
            if (
                isinstance(message, fault.kind)
                and fault.peer_of in (None, link.owner)
                and fault.way in (None, way)
            ):
                fault.count -= 1
                if fault.count == 0:
                    self.faults.remove(fault)
                if fault.what == "spoil":
                    _spoil(wire)
                copies = {"drop": 0, "duplicate": 2, "delay": 1, "spoil": 1}[fault.what]
                return copies, fault.delay_s if fault.what == "delay" else 0.0
        return 1, 0.0

    def _delay(self) -> float:
        return self._random.uniform(*self._delay_s)

    # -------------------------------------------------------------- the end

    def all_ended(self) -> bool:
        """Return whether every request of a client that is there has its last message."""
        return all(
            answer.end is not None
            for client in self.clients
            if not client.gone
            for answer in client.answers.values()
        )

    def move(self, cuts: Sequence[int], shift: int) -> None:
        """Have the layers cut there and moved to some workers, if a move can begin now.

        Args:
            cuts: between layers, in order.
            shift: who comes first.
        """
        core = self.core
        pipeline = next(iter(core._pipelines.loaded), None)
        if pipeline is None or core._moves.move:
            return
        own = {stage.peer for stage in pipeline.stages}
        idle = core._registry.idle
        workers = [w for w in core._registry.fit if w.peer in own or w in idle]
        edges = [0, *cuts, self.model.cost.num_layers]
        held = [LayerRange(*pair) for pair in pairwise(edges)]
        if len(workers) < len(held):
            return
        first = shift % len(workers)
        pairs = zip(workers[first:] + workers[:first], held, strict=False)
        layer_map = tuple((worker.id, layers) for worker, layers in pairs)
        memory = core._cluster.memory_of(workers)
        plan = plan_of(self.model.cost_at(pipeline.quantize), memory, layer_map)
        price = core._moves.prices.price(pipeline, plan)
        if price.kv_tokens is not None and kv_tokens_of(plan) >= KV_BLOCK:
            actions = core._moves.begin(pipeline, plan, price, why="a test", now=self.now)
            actions = core._settle(actions, self.now)
            self.checker.check(None, actions, now=self.now)
            self._perform(actions)
            self._arm()

    def settle(self) -> None:
        """Run until it serves and no layers have moved for a second."""
        for _ in range(100):
            moving, before = self.core._moves.move, self.epoch
            self.run(for_s=1.0)
            if not moving and (self.epoch, self.state) == (before, "serving"):
                return
        raise AssertionError("layers move for ever")

    def check_drained(self) -> None:
        """Assert that nothing is left of any request, anywhere."""
        assert not self._texts
        self.checker.check_drained()
        for pipeline in self.core._pipelines.loaded:
            assert pipeline.scheduler is not None
            assert pipeline.in_flight is not None
            ledger = pipeline.scheduler._ledger
            known = {*ledger.sequence_ids, *pipeline.in_flight.to_forget.released}
            for stage in pipeline.stages:
                worker = self._links[stage.peer].owner
                assert isinstance(worker, SimWorker)
                assert worker.stage is not None
                assert set(worker.stage.kv) <= known
                if not pipeline.in_flight.to_forget.released:
                    assert worker.stage.memory_tokens <= ledger.used_tokens
                assert not worker.orders


def finish(world: World, *answers: Answer) -> None:
    """Run until all requests ended; these must be finished, and nothing be left of any."""
    assert world.run(world.all_ended)
    for answer in answers:
        assert isinstance(answer.end, Finished), answer.end
        answer.check()
    world.run(for_s=4.0)  # what is late arrives
    assert world.run(lambda: world.state != "loading")
    if world.state == "serving":
        world.settle()
    world.check_drained()


def _spoil(wire: list[Frame]) -> None:
    header = msgspec.msgpack.decode(wire[1])
    wire[1] = msgspec.msgpack.encode({**header, "unheard_of": 1})


def with_settings(**changes: object) -> CoordinatorSettings:
    """Return the usual settings with these changes."""
    return CoordinatorSettings.model_validate(dict(SETTINGS) | changes)
