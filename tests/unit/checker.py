"""What must hold after every event that a simulated coordinator handles, whatever happens to it."""

from collections import Counter
from collections.abc import Sequence

from distributed_llm.common.codec import decode_status, encode_payload
from distributed_llm.common.errors import NotEnoughMemory, RemoteProtocolError, UnsupportedModel
from distributed_llm.common.keys import PublicKey
from distributed_llm.common.messages import (
    Embed,
    Generate,
    GiveWeights,
    Heartbeat,
    LoadStage,
    RequestFailed,
    StageReady,
    Task,
    TaskFailed,
    TaskResult,
    WeightSource,
    WorkerHello,
    tag_of,
)
from distributed_llm.common.settings import CoordinatorSettings
from distributed_llm.common.types import LayerRange, PeerId
from distributed_llm.common.weight_forms import Quantize
from distributed_llm.coordinator import events
from distributed_llm.coordinator.cluster.departures import DepartureState
from distributed_llm.coordinator.cluster.worker import WorkerState
from distributed_llm.coordinator.core import Core
from distributed_llm.coordinator.events import RequestKey
from distributed_llm.coordinator.requests.request import Answer
from distributed_llm.coordinator.serving.event_log import EventKind
from distributed_llm.coordinator.serving.pipeline import Pipeline

_LEASES = 5
"""How long a step may be in flight, in leases: two may run out, and each may be renewed."""

_MOST_FOR_A_MOVE_S = 20.0
"""How long an answer may wait for a move to give its room back: then the move is undone."""

_MOST_TO_LEAVE_S = 20.0
"""How long a worker that may leave can stay: longer than all faults of a schedule delay it."""

_FIRST_PAUSE_S, _MOST_PAUSE_S = 10.0, 600.0
"""How long a worker is given no layers after its load failed, at first and at most."""

_DUE, _SPARE_STEPS = 4, 40
"""For how many steps an answer may get no further: per token or answer that is due, and beside."""

_EACH, _LATER = 1000, 8
"""The core is validated after each of so many events, and after every eighth one from then on.

A simulation that goes on for longer repeats itself, and to validate takes a quarter of its time.
"""


class Checker:
    """Asserts invariants of a core that hold in public and those that its parts assert themselves.

    Args:
        core: read only.
        settings: of the core.

    Attributes:
        num_arrived: requests of clients that it knows, repeated ones included.
        all_are_honest: whether no peer breaks the protocol on purpose.
        num_sources: how often orders have named a source of weights.
        forms: of the weights of all plans so far, oldest first, each once in a row.
    """

    def __init__(self, core: Core, settings: CoordinatorSettings) -> None:
        self._core = core
        self._settings = settings
        self._num_checked = 0
        self._stale = False
        self.num_arrived = 0
        self.all_are_honest = True
        self.num_sources = 0
        self.forms: list[Quantize] = ["none"]
        self._open: dict[RequestKey, float] = {}  # when it is due, clock seconds
        self._ended: set[RequestKey] = set()
        self._largest = (0, 0, 0, 0, 0, 0, 0, 0)
        self._ordered: dict[int, dict[PeerId, LayerRange]] = {}  # by epoch
        self._form_of: dict[int, Quantize] = {}  # by epoch
        self._squeezed: dict[Answer, float] = {}  # since when a move takes its room
        self._dismissed: dict[PeerId, float] = {}  # since when a worker may leave
        self._unfit: dict[PeerId, float] = {}  # since when
        self._times_unfit: Counter[PeerId] = Counter()
        self._marks: dict[Answer, tuple[object, int, int]] = {}  # how far, since when, steps due
        self._num_moves = 0
        self._stocks: dict[PeerId, set[int]] = {}  # layers whose weights a session can give
        self._readers: dict[PeerId, tuple[PublicKey, ...]] = {}  # whom a session lets read
        self._has_served = False
        self._num_faults = 0
        self._is_faulty = False

    def before(self, event: events.Event, *, now: float) -> None:
        """Look at what an event is about to meet."""
        self._stale = isinstance(event, events.Received) and self._is_stale(event)
        self._is_faulty = isinstance(event, events.Garbage) or (
            isinstance(event, events.Received)
            and isinstance(event.message, WorkerHello)
            and self._core._registry.knows(event.peer)
        )
        if isinstance(event, events.Received) and isinstance(event.message, Generate | Embed):
            self.num_arrived += self._core._registry.is_client(event.peer)

        if isinstance(event, events.Garbage) and isinstance(event.error, RemoteProtocolError):
            asked = event.error.outline.type in (tag_of(Generate), tag_of(Embed))
            self.num_arrived += asked and self._core._registry.is_client(event.peer)

    def _is_stale(self, event: events.Received) -> bool:
        """Return whether it is about a step of an older plan, or one that was given up."""
        result = event.message
        if not isinstance(result, TaskResult | TaskFailed):
            return False
        all_in_flight = {
            pipeline.epoch: pipeline.in_flight for pipeline in self._core._pipelines.all
        }
        in_flight = all_in_flight.get(result.epoch)
        return in_flight is None or result.step not in in_flight._flights

    def check(
        self, event: events.Event | None, actions: Sequence[events.Action], *, now: float
    ) -> None:
        """Assert all of it; `event` is None for a timer."""
        self._num_checked += 1
        if self._num_checked <= _EACH or self._num_checked % _LATER == 0:
            self._core.validate()
        self._check_text_orders(event, actions, now)
        self._check_layers(actions)
        self._check_sources(event, actions)
        if self._stale:
            effects = [a for a in actions if isinstance(a, events.Detokenize) or _is_task(a)]
            assert not effects, f"a result that nobody waits for was applied: {effects}"
        self._stale = False
        assert all(due >= now - 1e-6 for due in self._open.values()), "a deadline was missed"
        self._check_faults()
        self._check_numbers()
        self._check_waiting(now)
        self._check_steps_end(now)
        self._check_names()
        self._check_stop(actions)
        self._check_commits(actions)
        match event:
            case events.Received(peer=peer, message=Heartbeat() as beat):
                self._check_tried_again(peer, beat, now)
                self._check_leaves(peer, now)
            case events.Received(message=TaskResult()):
                self._check_all_get_on()
            case _:
                pass

    def _check_text_orders(
        self, event: events.Event | None, actions: Sequence[events.Action], now: float
    ) -> None:
        """Every request that was begun ends once, and nothing is done for it afterwards."""
        for action in actions:
            match action:
                case events.Tokenize(key=key):
                    assert isinstance(event, events.Received)
                    message = event.message
                    assert isinstance(message, Generate | Embed)
                    asked = message if isinstance(message, Embed) else message.params
                    self._open[key] = now + (asked.timeout_s or float("inf"))
                    waiting = self._core._book.num_waiting
                    assert waiting <= self._settings.max_waiting_requests
                case events.Detokenize(key=key):
                    assert key not in self._ended, f"{action} after the end"
                case events.Forget(key=key):
                    del self._open[key]
                    self._ended.add(key)
                case _:
                    pass

    def _check_layers(self, actions: Sequence[events.Action]) -> None:
        """Whoever serves an epoch together has every layer of the model once."""
        for action in actions:
            match action:
                case events.Send(peer=peer, message=LoadStage(epoch=epoch, layers=layers) as order):
                    self._ordered.setdefault(epoch, {})[peer] = layers
                    self._check_form(order)
                    self._check_room(peer, order)
                case events.Send(message=Task(epoch=epoch)):
                    ranges = sorted(self._ordered[epoch].values())
                    ends = [0, *(one.stop for one in ranges)]
                    assert [one.start for one in ranges] == ends[:-1], f"{ranges} in plan {epoch}"
                    last = self._core._cluster.model.cost.num_layers
                    assert ends[-1] == last, f"{ranges} in plan {epoch}"
                case _:
                    pass

    def _check_form(self, order: LoadStage) -> None:
        """All stages of a plan have weights of the same form, which is said if it is a new one."""
        if self._form_of.setdefault(order.epoch, order.quantize) != self.forms[-1]:
            entries = self._core._event_log.entries
            kinds = (EventKind.WEIGHTS_QUANTIZED, EventKind.WEIGHTS_CHANGED)
            said = {entry.epoch for entry in entries if entry.kind in kinds}
            assert order.epoch in said, f"nobody is told of {order.quantize} in plan {order.epoch}"
            self.forms.append(order.quantize)
        assert self.forms[-1] == order.quantize, f"plan {order.epoch} mixes weights"

    def _check_room(self, peer: PeerId, order: LoadStage) -> None:
        """What a worker is told to hold, and what its steps take, fits into what it offers."""
        worker = self._core._registry.worker(peer)
        assert worker is not None
        cost = self._core._cluster.model.cost_at(order.quantize)
        kv_bytes = order.kv_tokens * cost.kv_bytes(order.layers)
        taken = cost.weight_bytes(order.layers) + kv_bytes + order.workspace_bytes
        offered = worker.capabilities.memory_bytes
        assert order.from_disk or taken <= offered, f"{taken} bytes on a worker that has {offered}"

    def _check_faults(self) -> None:
        """Nobody is charged with a fault but for what was spoiled, or for a hello that came twice.

        The network of a simulation does that to honest workers; TCP does not.
        """
        faults = sum(map(len, self._core._access.conduct._faults.values()))
        expected = faults == self._num_faults or self._is_faulty or not self.all_are_honest
        assert expected, "an honest peer committed a fault"
        self._num_faults, self._is_faulty = faults, False

    def _check_sources(self, event: events.Event | None, actions: Sequence[events.Action]) -> None:
        """Whoever is named as a source has weights, and lets the reader in; others are not told."""
        if isinstance(event, events.Received) and isinstance(event.message, StageReady):
            layers = self._ordered.get(event.message.epoch, {}).get(event.peer)
            if event.message.gives_weights and layers:
                self._stocks.setdefault(event.peer, set()).update(range(layers.start, layers.stop))
        told: set[PeerId] = set()
        named: set[PeerId] = set()
        for action in actions:
            match action:
                case events.Send(peer=peer, message=GiveWeights(readers=readers)):
                    self._readers[peer] = readers
                    told.add(peer)
                case events.Send(peer=peer, message=LoadStage() as order):
                    named |= {self._check_source(peer, order, one) for one in order.sources}
                case _:
                    pass
        assert told == named, "who gives weights is told so, and nobody else"

    def _check_source(self, reader: PeerId, order: LoadStage, source: WeightSource) -> PeerId:
        worker = self._core._registry.named(source.worker)
        own = self._core._registry.worker(reader)
        assert worker is not None, f"{source.worker} is gone"
        assert own is not None
        assert worker is not own
        assert (worker.key, worker.peer_addresses) == (source.key, source.addresses)
        held = {n for layers in source.layers for n in range(layers.start, layers.stop)}
        assert held <= self._stocks.get(worker.peer, set()), f"{source.worker} lacks them"
        assert not held.isdisjoint(range(order.layers.start, order.layers.stop))
        assert own.key in self._readers.get(worker.peer, ()), f"{own.id} is not let in"
        self.num_sources += 1
        return worker.peer

    def _check_numbers(self) -> None:
        totals = self._core._book.totals
        numbers = (
            self._core._pipelines.epoch,
            totals.finished,
            totals.cancelled,
            totals.failed,
            totals.tokens,
            totals.prefix_hit_tokens,
            totals.preemptions,
            sum(self._core._event_log.rejected.values()),
        )
        assert all(a <= b for a, b in zip(self._largest, numbers, strict=True)), "it decreased"
        self._largest = numbers

    def _check_waiting(self, now: float) -> None:
        """No answer waits for nothing, whatever loads or moves.

        A pipeline with a seat and with room for everybody that it may serve leaves nobody waiting.
        An answer for which only a move leaves no room waits until the move is undone.
        """
        waiting = self._core._book.waiting
        serving = self._core._pipelines.loaded if waiting else []
        rooms, most = [0], 0
        for pipeline in serving:
            assert pipeline.scheduler is not None
            scheduler, most = pipeline.scheduler, max(most, pipeline.kv_tokens)
            rooms.append(scheduler.kv_tokens)
            if scheduler.has_seat:
                fitting = [a for a in waiting if a.request.reserved_tokens <= scheduler.kv_tokens]
                free = scheduler._ledger.room_tokens
                is_full = any(len(answer.token_ids) + 1 > free for answer in fitting)
                assert is_full or not fitting, "an answer waits for nothing"
        squeezed = [a for a in waiting if max(rooms) < a.request.reserved_tokens <= most]
        self._squeezed = {answer: self._squeezed.get(answer, now) for answer in squeezed}
        for since in self._squeezed.values():
            assert now - since <= _MOST_FOR_A_MOVE_S, "an answer waits for the end of a move"

    def _check_all_get_on(self) -> None:
        """Every running answer gets on after as many steps as the others are due."""
        marks = {}
        for pipeline in self._core._pipelines.loaded:
            assert pipeline.scheduler is not None
            assert pipeline.in_flight is not None
            running = list(pipeline.scheduler.running)
            if any(answer.suspects for answer in running):
                continue  # they run by themselves, and the others wait for them
            begun = pipeline.in_flight.next_step
            unread = sum(a.num_uncomputed_tokens for a in running if a.num_uncomputed_tokens > 1)
            is_full = pipeline.scheduler._ledger.room_tokens <= 0
            youngest = max(running, key=lambda answer: answer.number, default=None)
            for answer in running:
                if answer.waits_for_mask or (is_full and answer is youngest):
                    continue  # for the text process, or for room, which others need more
                mark = self._mark(pipeline, answer)
                due = _DUE * (unread if answer.num_uncomputed_tokens > 1 else len(running))
                known, since, most = self._marks.get(answer, (None, begun, 0))
                since, most = (since, max(due, most)) if known == mark else (begun, due)
                assert begun - since <= most + _SPARE_STEPS, f"{answer.request.key} gets no turn"
                marks[answer] = mark, since, most
        self._marks = marks

    @staticmethod
    def _mark(pipeline: Pipeline, answer: Answer) -> object:
        """Return what changes when an answer gets on, or when its steps were lost."""
        assert pipeline.in_flight is not None
        oldest = pipeline.in_flight._oldest
        leader = answer.waits_for
        others = leader.num_computed_tokens if leader else 0
        return pipeline.epoch, oldest, answer.num_computed_tokens, len(answer.token_ids), others

    def _check_stop(self, actions: Sequence[events.Action]) -> None:
        """The coordinator ends only if nobody can split its model, nor ever did."""
        for action in actions:
            if isinstance(action, events.Stop):
                assert isinstance(action.error, UnsupportedModel)
                assert not self._has_served, "one worker ended a coordinator that has served"
                assert not self._core._registry.fit, "others might do what one worker cannot"
        self._has_served |= bool(self._core._pipelines.loaded)

    def _check_commits(self, actions: Sequence[events.Action]) -> None:
        """No move takes the room of a request away."""
        num_moves, self._num_moves = self._num_moves, self._core._moves.num_moves
        for action in actions if num_moves != self._num_moves else ():
            match action:
                case events.Send(message=RequestFailed(code=NotEnoughMemory.code, message=why)):
                    raise AssertionError(f"a move took the room of a request: {why}")
                case _:
                    pass

    def _check_tried_again(self, peer: PeerId, beat: Heartbeat, now: float) -> None:
        """Nobody is unfit for longer than the pause after so many failures, unless it loads."""
        worker = self._core._registry.worker(peer)
        if worker is None or worker.state is not WorkerState.UNFIT:
            self._unfit.pop(peer, None)
            return
        if peer not in self._unfit:
            self._unfit[peer] = now
            self._times_unfit[peer] += 1
        pause_s = min(_FIRST_PAUSE_S * 2 ** (self._times_unfit[peer] - 1), _MOST_PAUSE_S)
        passed = now - self._unfit[peer] > pause_s
        assert beat.loading or worker.leaving or not passed, f"{worker.id} is unfit for ever"

    def _check_leaves(self, peer: PeerId, now: float) -> None:
        """Who was told that it may leave does so."""
        departure = self._core._departures._leaving.get(peer)
        if departure is None or departure.state is not DepartureState.DISMISSED:
            self._dismissed.pop(peer, None)
            return
        since = self._dismissed.setdefault(peer, now)
        assert now - since <= _MOST_TO_LEAVE_S, f"{peer!r} was never told that it may leave"

    def _check_steps_end(self, now: float) -> None:
        """Every step ends, or is noticed to be lost, whatever becomes of other steps."""
        limit_s = _LEASES * self._settings.task_timeout_s
        for pipeline in self._core._pipelines.all:
            for flight in pipeline.in_flight._flights.values() if pipeline.in_flight else ():
                assert now - flight.began_at <= limit_s, f"step {flight.number} was lost"

    def _check_names(self) -> None:
        """Nobody without layers goes without its name while nobody else has that."""
        workers = self._core._registry.workers
        taken = {worker.id for worker in workers}
        for worker in workers:
            if worker.layers is None and not worker.leaving:
                assert worker.wanted_name in taken, f"{worker.id} is {worker.wanted_name}"

    def check_drained(self) -> None:
        """Assert that nothing is left of any request in the core."""
        self._core.validate()
        status = self._core.status(now=0.0)
        assert decode_status(encode_payload(status)) == status
        assert (status.answers_running, status.answers_waiting) == (0, 0)
        duplicates = status.rejected.get("duplicate_request", 0)
        assert (
            status.requests_finished + status.requests_cancelled + status.requests_failed
            == self.num_arrived - duplicates
        )
        assert not self._open
        book = self._core._book
        assert not book.busy
        assert not book._schedulers
        assert not book.waiting.clients
        assert book.next_deadline() is None
        assert not book._deadlines._heap
        assert status.kv_tokens_used == 0
        for pipeline in self._core._pipelines.loaded:
            assert pipeline.in_flight is not None
            assert pipeline.scheduler is not None
            assert not pipeline.in_flight.num_steps
            assert not pipeline.scheduler._sequences.are_computed
            assert not pipeline.scheduler._sequences._ending
            ledger = pipeline.scheduler._ledger
            assert set(ledger.sequence_ids) == set(ledger._ended)
            assert not ledger.take_freed()


def _is_task(action: events.Action) -> bool:
    return isinstance(action, events.Send) and isinstance(action.message, Task)
