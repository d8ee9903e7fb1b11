"""A cluster of any size on a virtual clock: production core and agents, all else made up.

Made up are the stages (a task takes a time that grows with its tokens), the links (each end adds
its delay), the text process, deaths of workers, and clients. Hidden states have no bytes, and no
message is encoded: what is measured is what the coordinator decides, and how long it takes for it.
"""

import heapq
import math
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from benchmarks.scenario import VOCAB, Scenario, served_model
from benchmarks.virtual_client import Seen, VirtualClient, jain
from benchmarks.virtual_worker import CONNECT_S, VirtualWorker
from distributed_llm.common.messages import ClusterStatus, Task
from distributed_llm.common.settings import CoordinatorSettings
from distributed_llm.common.tensors import token_ids_of_frame
from distributed_llm.common.types import PeerId
from distributed_llm.coordinator import events
from distributed_llm.coordinator.core import Core
from distributed_llm.coordinator.events import RequestKey
from distributed_llm.worker.session.link_events import LinkId

T = TypeVar("T")

_TEXT_S = 0.0002
_QUESTION_S = 0.01
_POLL_S = 1.0
_SILENT_DEATHS = 4
"""One death in so many closes no connection (power loss)."""

_SILENCE_S = 3.0
"""After which a worker notices that the next one, dead without a word, is gone."""

_WINDOW_S = 2.0
_LIMIT_S = 10_000.0
"""Virtual seconds, beside twice the time of asking, within which all requests must end."""


class Meter:
    """CPU time of this thread in the core, by kind of event.

    Attributes:
        count: events by kind.
        seconds: in them, likewise.
    """

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._clock_s = _clock_s()

    def call(self, kind: str, what: Callable[[], T]) -> T:
        """Return what `what` returns, and count its time."""
        started = time.thread_time()
        value = what()
        elapsed = time.thread_time() - started
        self.seconds[kind] += elapsed - self._clock_s
        self.count[kind] += 1
        return value

    @property
    def total_s(self) -> float:
        """In all events."""
        return sum(self.seconds.values())


def _clock_s() -> float:
    """Return what the clock shows for nothing, seconds."""
    differences = [-time.thread_time() + time.thread_time() for _ in range(2000)]
    return sorted(differences)[1000]


class VirtualCluster:
    """One coordinator, its workers and its clients.

    Attributes:
        now: virtual seconds.
        meter: of the core.
        seen: by the clients.
        steps: that the core has sent to a first stage; `relays` to later ones.
        tasks: that workers have computed.
        dials: by connection, whose it is.
        deaths: of workers.
        asked_at: when the first request was sent; `drained_at`: when the last one had a token.
        busy: by pipeline, the shares of that time in which its stages were busy.
    """

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.random = random.Random(scenario.seed)
        self.now = 100.0
        self.meter, self.seen = Meter(), Seen()
        self.steps = self.relays = self.tasks = self.deaths = 0
        self.asked_at = self.drained_at = 0.0
        self.busy: list[list[float]] = []
        self._unstarted = scenario.requests
        self.core = Core(
            served_model(scenario),
            CoordinatorSettings(
                strategy=scenario.strategy,
                objective=scenario.objective,
                replicas=scenario.pipelines,
                max_batch_sequences=scenario.batch,
                max_batch_tokens=scenario.chunk,
                max_waiting_requests=scenario.waiting or scenario.requests,
            ),
            draw_seed=lambda: self.random.getrandbits(62),
        )
        self.workers: dict[PeerId, VirtualWorker] = {}
        self.dials: dict[PeerId, tuple[VirtualWorker, LinkId]] = {}
        self.clients = {client.peer: client for client in self._make_clients()}
        self.coordinator_delay_s = self.link_delay_s()
        self._joined, self._settled = 0, False
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._serial = 0
        self._timer_at = math.inf
        self._texts: dict[RequestKey, list[int]] = {}
        self._common = self._tokens(scenario.shared)

    # -------------------------------------------------------------- the clock

    def at(self, when: float, call: Callable[..., None], *args: Any) -> None:
        """Call `call(*args)` at `when`."""
        self._serial += 1
        heapq.heappush(self._heap, (when, self._serial, call, args))

    def run(self, until: Callable[[], bool], *, limit_s: float) -> None:
        """Let time pass until `until`.

        Raises:
            TimeoutError: it does not come true within `limit_s` virtual seconds.
        """
        stop_at = self.now + limit_s
        while not until():
            if self._timer_at <= self._heap[0][0]:
                self.now = max(self.now, self._timer_at)
                self._on_timer()
                continue
            self.now, _, call, args = heapq.heappop(self._heap)
            if self.now > stop_at:
                raise TimeoutError(f"not done after {limit_s} virtual seconds: {self.seen.ended}")
            call(*args)

    # -------------------------------------------------------------- the coordinator's edge

    def apply(self, event: events.Event) -> None:
        """Give the core an event and do what it says."""
        kind = type(event.message if isinstance(event, events.Received) else event).__name__
        self._perform(self.meter.call(kind, lambda: self._decide(event)))

    def _decide(self, event: events.Event) -> list[events.Action]:
        actions = self.core.handle(event, now=self.now)
        deadline = self.core.next_deadline()
        self._timer_at = math.inf if deadline is None else deadline
        return actions

    def _on_timer(self) -> None:
        self._perform(self.meter.call("timer", self._decide_on_timer))

    def _decide_on_timer(self) -> list[events.Action]:
        actions = self.core.on_timer(now=self.now)
        deadline = self.core.next_deadline()
        self._timer_at = math.inf if deadline is None else deadline
        return actions

    def _perform(self, actions: Iterable[events.Action]) -> None:
        for action in actions:
            match action:
                case events.Send():
                    self._send(action)
                case events.Detokenize(key=key, choice=choice, token_ids=ids, last=last):
                    if counts := self._texts.get(key):
                        counts[choice] += len(ids)
                        text = "a" * len(ids)
                        done = events.Detokenized(key, choice, text, counts[choice], None, last)
                        self.at(self.now + _TEXT_S, self.apply, done)
                case events.Tokenize(key=key, payload=payload):
                    self._texts[key] = [0] * action.num_choices
                    event = events.Tokenized(key, token_ids_of_frame(payload))
                    self.at(self.now + _TEXT_S, self.apply, event)
                case events.Study():
                    found = self.meter.call("Study", action.question.reply)
                    self.at(self.now + _QUESTION_S, self.apply, events.Studied(found))
                case events.Forget(key=key):
                    self._texts.pop(key, None)
                case events.Stop(error=error):
                    raise error

    def _send(self, send: events.Send) -> None:
        client = self.clients.get(send.peer)
        if client is not None:
            client.receive(send.message)
            return
        worker = self.workers[send.peer]
        if isinstance(send.message, Task):
            self.steps += not send.message.timings
            self.relays += bool(send.message.timings)
        if worker.gone:
            self.at(self.now, self.apply, events.Unreachable(send.peer, "is gone"))
        else:
            when = self.now + self.coordinator_delay_s + worker.delay_s
            self.at(when, worker.receive, send.message, send.frames)

    # -------------------------------------------------------------- workers

    def link_delay_s(self) -> float:
        """Return what one end adds to the delay of a link."""
        return self.scenario.link_ms / 1000 * self.random.uniform(0.25, 0.75)

    def start(self) -> None:
        """Let all workers join, and wait until all that can serve do."""
        scenario = self.scenario
        for number in range(scenario.workers):
            self.at(self.now + number * scenario.join_s, self._join)
        self.at(self.now + _POLL_S, self._poll, None)
        self.run(lambda: self._settled, limit_s=600 + 2 * scenario.workers * scenario.join_s)

    def _poll(self, before: ClusterStatus | None) -> None:
        status = self.core.status(now=self.now)
        loading = any(worker.state == "loading" for worker in status.workers)
        same = before is not None and before.epoch == status.epoch
        joined = self._joined >= self.scenario.workers
        self._settled = joined and same and not loading and status.state == "serving"
        if not self._settled:
            self.at(self.now + _POLL_S, self._poll, status)

    def _join(self) -> None:
        self._joined += 1
        worker = VirtualWorker(self, f"w{self._joined}")
        self.workers[worker.peer] = worker
        lifetime_s = self.scenario.lifetime_s
        if lifetime_s:
            self.at(self.now + self.random.expovariate(1 / lifetime_s), self._die, worker)

    def _die(self, worker: VirtualWorker) -> None:
        self.deaths += 1
        worker.alive = False
        noticed_at = self.now + (_SILENCE_S if self.deaths % _SILENT_DEATHS == 0 else CONNECT_S)
        self.at(noticed_at, self.noticed, worker)
        self.at(self.now + self.random.expovariate(1 / self.scenario.rejoin_s), self._join)

    def noticed(self, worker: VirtualWorker) -> None:
        """The connections of a worker are closed."""
        worker.gone = True
        self.apply(events.ConnectionClosed())
        for other in self.workers.values():
            other.lost(worker)

    def pipelines(self) -> list[list[VirtualWorker]]:
        """Return the workers that have layers, by pipeline."""
        groups: defaultdict[int, list[VirtualWorker]] = defaultdict(list)
        for worker in self.workers.values():
            if worker.alive and worker.served:
                groups[worker.epoch].append(worker)
        return list(groups.values())

    # -------------------------------------------------------------- clients

    def _make_clients(self) -> list[VirtualClient]:
        return [VirtualClient(self, f"c{number}") for number in range(self.scenario.clients)]

    def ask(self) -> None:
        """Let the clients ask, and wait until every request has ended."""
        self.begin_asking()
        ended = self.seen.ended
        asking_s = self.scenario.requests / self.scenario.rate if self.scenario.rate else 0.0
        limit_s = 2 * asking_s + _LIMIT_S
        self.run(lambda: ended.total() >= self.scenario.requests, limit_s=limit_s)

    def begin_asking(self) -> None:
        """Let the clients ask while time passes."""
        self.asked_at = self.now
        for worker in self.workers.values():
            worker.busy_s = 0.0
        for client in self.clients.values():
            client.start()
        appetites = [(k + 1) ** -self.scenario.skew for k in range(len(self.clients))]
        askers = self.random.choices(
            list(self.clients.values()), appetites, k=self.scenario.requests
        )
        self.at(self.now + CONNECT_S, self._ask_next, iter(askers))
        self.at(self.now + _WINDOW_S, self._end_window)

    def request_started(self) -> None:
        """A request has its first token, or will never have one."""
        self._unstarted -= 1
        if self._unstarted == 0:
            self.drained_at = self.now
            took_s = self.now - self.asked_at
            self.busy = [[w.busy_s / took_s for w in group] for group in self.pipelines()]

    def _ask_next(self, askers: Iterable[VirtualClient]) -> None:
        for asker in askers:
            prompt = [*self._common, *self._tokens(self._length(self.scenario.prompt))]
            asker.ask(prompt, self._length(self.scenario.answer))
            if self.scenario.rate:
                pause_s = self.random.expovariate(self.scenario.rate)
                self.at(self.now + pause_s, self._ask_next, askers)
                return

    def _tokens(self, number: int) -> list[int]:
        return [self.random.randrange(VOCAB) for _ in range(number)]

    def _length(self, mean: int) -> int:
        sigma = 0.5
        return max(1, round(self.random.lognormvariate(math.log(mean) - sigma**2 / 2, sigma)))

    def _end_window(self) -> None:
        shares = [share for c in self.clients.values() if (share := c.end_window()) is not None]
        if len(shares) > 1:
            self.seen.fairness.append(jain(shares))
        self.at(self.now + _WINDOW_S, self._end_window)
