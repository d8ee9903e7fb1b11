"""What must hold after every event that a simulated coordinator handles, whatever happens to it."""

from collections.abc import Sequence

from distributed_llm.common.errors import RemoteProtocolError
from distributed_llm.common.messages import (
    Generate,
    LoadStage,
    Task,
    TaskFailed,
    TaskResult,
    tag_of,
)
from distributed_llm.common.settings import CoordinatorSettings
from distributed_llm.common.types import LayerRange, PeerId
from distributed_llm.coordinator import events
from distributed_llm.coordinator.core import Core
from distributed_llm.coordinator.events import RequestKey
from tests.unit.fake_model import NUM_LAYERS

_LEASES = 5
"""How long a step may be in flight, in leases: two may run out, and each may be renewed."""

_MOST_FOR_A_MOVE_S = 20.0
"""How long an answer may wait for a move to give its room back: then the move is undone."""


class Checker:
    """Asserts invariants of a core that hold in public and those that its parts assert themselves.

    Args:
        core: read only.
        settings: of the core.

    Attributes:
        num_arrived: requests of clients that it knows, repeated ones included.
    """

    def __init__(self, core: Core, settings: CoordinatorSettings) -> None:
        self._core = core
        self._settings = settings
        self._stale = False
        self.num_arrived = 0
        self._open: dict[RequestKey, float] = {}  # when it is due, clock seconds
        self._ended: set[RequestKey] = set()
        self._largest = (0, 0, 0, 0, 0, 0, 0, 0)
        self._ordered: dict[int, dict[PeerId, LayerRange]] = {}  # by epoch

    def before(self, event: events.Event, *, now: float) -> None:
        """Look at what an event is about to meet."""
        self._stale = isinstance(event, events.Received) and self._is_stale(event)
        if isinstance(event, events.Received) and isinstance(event.message, Generate):
            self.num_arrived += self._core._registry.is_client(event.peer)

        if isinstance(event, events.Garbage) and isinstance(event.error, RemoteProtocolError):
            asked = event.error.outline.type == tag_of(Generate)
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
        self._core.validate()
        self._check_text_orders(event, actions, now)
        self._check_layers(actions)
        if self._stale:
            effects = [a for a in actions if isinstance(a, events.Detokenize) or _is_task(a)]
            assert not effects, f"a result that nobody waits for was applied: {effects}"
        self._stale = False
        assert all(due >= now - 1e-6 for due in self._open.values()), "a deadline was missed"
        self._check_numbers()
        self._check_nobody_idles(now)
        self._check_steps_end(now)
        self._check_names()

    def _check_text_orders(
        self, event: events.Event | None, actions: Sequence[events.Action], now: float
    ) -> None:
        """Every request that was begun ends once, and nothing is done for it afterwards."""
        for action in actions:
            match action:
                case events.Tokenize(key=key):
                    assert isinstance(event, events.Received)
                    assert isinstance(event.message, Generate)
                    self._open[key] = now + (event.message.params.timeout_s or float("inf"))
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
                case events.Send(peer=peer, message=LoadStage(epoch=epoch, layers=layers)):
                    self._ordered.setdefault(epoch, {})[peer] = layers
                case events.Send(message=Task(epoch=epoch)):
                    ranges = sorted(self._ordered[epoch].values())
                    ends = [0, *(one.stop for one in ranges)]
                    assert [one.start for one in ranges] == ends[:-1], f"{ranges} in plan {epoch}"
                    assert ends[-1] == NUM_LAYERS, f"{ranges} in plan {epoch}"
                case _:
                    pass

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

    def _check_nobody_idles(self, now: float) -> None:
        """No answer waits while a pipeline that has room for it has nothing to do."""
        move = self._core._moves.move
        idle = [
            pipeline
            for pipeline in self._core._pipelines.all
            if pipeline.scheduler and pipeline.in_flight
            if not pipeline.scheduler.num_running and not pipeline.in_flight.num_steps
        ]
        for answer in self._core._book.waiting if idle else ():
            needed = answer.request.reserved_tokens
            since = self._core._book._set_aside.get(answer, now)
            for pipeline in idle:
                waits_for_move = move and move.old is pipeline
                if not waits_for_move or now - since > _MOST_FOR_A_MOVE_S:
                    assert needed > pipeline.kv_tokens, "an answer waits for nothing"

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
        status = self._core.status(now=0.0)
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
        assert not book._queue._accounts
        assert book.next_deadline() is None
        assert not book._deadlines
        assert status.kv_tokens_used == 0
        for pipeline in self._core._pipelines.all:
            assert pipeline.in_flight is not None
            assert pipeline.scheduler is not None
            assert not pipeline.in_flight.num_steps
            assert not pipeline.scheduler._in_flight
            assert not pipeline.scheduler._ending
            ledger = pipeline.scheduler._ledger
            assert set(ledger.sequence_ids) == set(ledger._ended)
            assert not ledger.take_freed()


def _is_task(action: events.Action) -> bool:
    return isinstance(action, events.Send) and isinstance(action.message, Task)
