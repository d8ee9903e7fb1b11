"""Requests from arrival to their last message. Pure.

Every request ends with exactly one of `Finished` and `RequestFailed`, unless its client is gone.
Those that wait are served fairly among clients, and in the order of arrival within one.
"""

import heapq
from collections.abc import Callable, Iterable

from distributed_llm.common.errors import (
    DeadlineExceeded,
    DistributedLLMError,
    InvalidRequest,
    NotEnoughMemory,
    Overloaded,
    RequestCancelled,
)
from distributed_llm.common.messages import (
    Finished,
    Generate,
    RequestFailed,
    RequestId,
    TokenChunk,
    TokenLogprobs,
)
from distributed_llm.common.tensors import Frame
from distributed_llm.common.types import PeerId
from distributed_llm.coordinator.events import (
    Action,
    Detokenize,
    Detokenized,
    Forget,
    RequestKey,
    Send,
    Tokenize,
    Tokenized,
)
from distributed_llm.coordinator.model import GenerationDefaults
from distributed_llm.coordinator.requests.fairness import FairQueue
from distributed_llm.coordinator.requests.parameters import resolve, wrong_prompt
from distributed_llm.coordinator.requests.request import Phase, Request, Ticket
from distributed_llm.coordinator.requests.totals import Totals
from distributed_llm.coordinator.serving.scheduler import Scheduler
from distributed_llm.coordinator.serving.steps import StepDone


class RequestBook:
    """All requests of all clients.

    Args:
        defaults: of the checkpoint.
        max_waiting: answers that may wait to be begun; more are refused.
        draw_seed: gives a seed for a request without one.

    Attributes:
        totals: what has come of all requests.
    """

    def __init__(
        self,
        defaults: GenerationDefaults,
        *,
        max_waiting: int,
        draw_seed: Callable[[], int],
    ) -> None:
        self._defaults = defaults
        self._max_waiting = max_waiting
        self._draw_seed = draw_seed
        self._tickets: dict[PeerId, dict[RequestId, Ticket]] = {}
        self._queue: FairQueue[Request] = FairQueue()
        self._homes: dict[Request, Scheduler] = {}
        self._num_tokenizing = 0
        self._next_number = 0
        self._kv_tokens = 0
        self._deadlines: list[tuple[float, RequestKey]] = []
        self.totals = Totals()

    @property
    def busy(self) -> bool:
        """Whether any request is under way."""
        return bool(self._tickets)

    @property
    def num_running(self) -> int:
        """Answers that a pipeline works on."""
        return len(self._homes)

    @property
    def num_waiting(self) -> int:
        """Answers whose prompt is being tokenized or that wait for room."""
        return self._num_tokenizing + len(self._queue)

    @property
    def most_reserved(self) -> int:
        """Positions that the largest request which runs or waits may take."""
        return max((r.ticket.reserved_tokens for r in (*self._queue, *self._homes)), default=0)

    # -------------------------------------------------------------- arrival

    def submit(
        self, peer: PeerId, message: Generate, frames: tuple[Frame, ...], *, now: float
    ) -> list[Action]:
        """Take a new request."""
        params = message.params
        if self.num_waiting + params.n > self._max_waiting:
            error = Overloaded(
                f"{self.num_waiting} answers wait already, and the limit is {self._max_waiting}. "
                "Try again later, or raise max_waiting_requests.",
                retry_after_s=self.totals.seconds_for(self.num_waiting + params.n),
            )
            return self.refuse(peer, message.request_id, error)
        wrong = wrong_prompt(message, self._defaults.context_length)
        if wrong:
            return self.refuse(peer, message.request_id, wrong)
        key = (peer, message.request_id, self._next_number)
        self._next_number += params.n
        ticket = Ticket(key, params, arrived_at=now)
        self._tickets.setdefault(peer, {})[message.request_id] = ticket
        self._num_tokenizing += params.n
        if ticket.deadline is not None:
            heapq.heappush(self._deadlines, (ticket.deadline, key))
        payload = bytes(frames[0]) if frames else b""
        return [Tokenize(key, message.prompt, payload, params.n, params.stop_strings)]

    def refuse(
        self, peer: PeerId, request_id: RequestId, error: DistributedLLMError
    ) -> list[Action]:
        """Answer a request that is not taken."""
        self.totals.failed += 1
        return [_failure(peer, request_id, error)]

    def has(self, peer: PeerId, request_id: RequestId) -> bool:
        """Return whether a request of this name is under way."""
        return request_id in self._tickets.get(peer, ())

    def tokenized(self, event: Tokenized) -> list[Action]:
        """The prompt of a request is known: queue its answers."""
        ticket = self._find(event.key)
        if ticket is None:
            return []
        vocab = self._defaults.vocab_size
        used = (*event.token_ids, *ticket.params.logit_bias)
        strange = next((t for t in used if not 0 <= t < vocab), None)
        if strange is not None:
            error = InvalidRequest(
                f"Token id {strange} is not in the model's vocabulary of {vocab}."
            )
            return self.fail(event.key, error)
        try:
            limits = resolve(
                ticket.params,
                self._defaults,
                prompt_tokens=len(event.token_ids),
                kv_tokens=self._kv_tokens,
                seed=self._draw_seed(),
            )
        except DistributedLLMError as exc:
            return self.fail(event.key, exc)
        self._num_tokenizing -= ticket.params.n
        ticket.accept(event.token_ids, limits, number=event.key[2])
        for request in ticket.requests:
            self._queue.add(ticket.key[0], request, order=request.number)
        return []

    # -------------------------------------------------------------- to pipelines and back

    def next_waiting(self) -> Request | None:
        """Return the request whose turn it is."""
        return self._queue.first()

    def admit(self, scheduler: Scheduler, *, now: float) -> bool:
        """Let the request whose turn it is run, if there is room; return whether it does."""
        request = self._queue.first()
        assert request is not None
        if not scheduler.admit(request, now=now):
            return False
        self._queue.pop()
        self._queue.charge(request.ticket.key[0], len(request.token_ids))
        self._homes[request] = scheduler
        return True

    def requeue(self, requests: Iterable[Request]) -> None:
        """These lost their KV cache; they come before younger ones of their client."""
        for request in requests:
            if self._homes.pop(request, None) is not None:  # else it has ended
                self._queue.add(request.ticket.key[0], request, order=request.number)

    def collect(self, scheduler: Scheduler) -> None:
        """Queue the requests that gave up their KV cache to older ones; count prefix hits."""
        self.totals.prefix_hit_tokens += scheduler.prefix_hit_tokens
        self.totals.preemptions += len(scheduler.preempted)
        self.requeue(scheduler.preempted)
        scheduler.preempted.clear()
        scheduler.prefix_hit_tokens = 0

    def set_capacity(self, kv_tokens: int) -> list[Action]:
        """The largest pipeline has, or will have, room for `kv_tokens` positions."""
        self._kv_tokens = kv_tokens
        tickets = {r.ticket: None for r in (*self._queue, *self._homes)}
        actions: list[Action] = []
        for ticket in [one for one in tickets if one.reserved_tokens > kv_tokens]:
            error = NotEnoughMemory(
                f"The request may take {ticket.reserved_tokens} positions, but after workers left "
                f"there is room for {kv_tokens}. Add a worker or lower max_new_tokens."
            )
            actions += self.fail(ticket.key, error)
        return actions

    def step_done(self, done: StepDone, counts: Iterable[bool], *, now: float) -> list[Action]:
        """A step ran: its requests have a token more, where it still `counts`."""
        actions: list[Action] = []
        samplers = [
            request
            for request, part in zip(done.step.requests, done.step.slices, strict=True)
            if part.sample
        ]
        for request, token, logprobs, current in zip(
            samplers, done.token_ids, done.logprobs, counts, strict=True
        ):
            if current:
                actions += self._append(request, token, logprobs, now)
        return actions

    def _append(
        self, request: Request, token: int, logprobs: TokenLogprobs | None, now: float
    ) -> list[Action]:
        request.append(token, logprobs, now=now)
        self.totals.tokens += 1
        self._queue.charge(request.ticket.key[0], 1)
        last = request.finish_reason is not None
        if last:
            self._leave(request, keep=True)
        return [Detokenize(request.ticket.key, request.choice, (token,), last)]

    def _leave(self, request: Request, *, keep: bool) -> None:
        """Its pipeline is done with a request; only its text may be missing."""
        scheduler = self._homes.pop(request, None)
        if scheduler is not None:
            scheduler.remove(request, keep=keep)
        request.phase = Phase.CLOSING

    # -------------------------------------------------------------- the end

    def detokenized(self, event: Detokenized, *, now: float) -> list[Action]:
        """Text of an answer is known: send it, and the end if this is it."""
        ticket = self._find(event.key)
        if ticket is None:
            return []
        request = ticket.requests[event.choice]
        if request.phase is Phase.GONE:
            return []
        stop = request.num_prompt_tokens + event.num_tokens
        if event.stopped:
            self._leave(request, keep=True)
            del request.token_ids[stop:]
            request.finish_reason = "stop"
        actions = self._chunk(request, event.text, stop, ended=event.stopped or event.last)
        if event.stopped or event.last:
            request.phase = Phase.GONE
            if all(other.phase is Phase.GONE for other in ticket.requests):
                actions += self._finish(ticket, now)
        return actions

    def _chunk(self, request: Request, text: str, stop: int, *, ended: bool) -> list[Action]:
        sent, key = request.num_sent_tokens, request.ticket.key
        new = tuple(request.token_ids[request.num_prompt_tokens + sent : stop])
        if not (new or text or ended):
            return []
        request.num_sent_tokens += len(new)
        chunk = TokenChunk(
            request_id=key[1],
            choice=request.choice,
            index=sent,
            text=text,
            token_ids=new,
            logprobs=tuple(request.logprobs[sent : sent + len(new)]),
            finish_reason=request.finish_reason if ended else None,
        )
        return [Send(key[0], chunk)]

    def _finish(self, ticket: Ticket, now: float) -> list[Action]:
        finished = Finished(
            request_id=ticket.key[1], usage=ticket.usage(), timings=ticket.timings()
        )
        self._retire(ticket)
        self.totals.count_finished(now=now)
        return [Send(ticket.key[0], finished), Forget(ticket.key)]

    def fail(self, key: RequestKey, error: DistributedLLMError) -> list[Action]:
        """End a request with an error, if it is still under way."""
        ticket = self._find(key)
        if ticket is None:
            return []
        self._retire(ticket)
        self.totals.failed += 1
        return [_failure(*key[:2], error), Forget(key)]

    def cancel(self, peer: PeerId, request_id: RequestId) -> list[Action]:
        """End a request because its client wants it."""
        ticket = self._tickets.get(peer, {}).get(request_id)
        error = RequestCancelled("The request was cancelled.")
        return self.fail(ticket.key, error) if ticket else []

    def drop_client(self, peer: PeerId) -> list[Action]:
        """End all requests of a client that is gone."""
        tickets = list(self._tickets.get(peer, {}).values())
        for ticket in tickets:
            self._retire(ticket)
            self.totals.failed += 1
        return [Forget(ticket.key) for ticket in tickets]

    def fail_all(self, error: DistributedLLMError) -> list[Action]:
        """End every request with an error, but those that only wait for the text of their end."""
        ended = (Phase.CLOSING, Phase.GONE)
        keys = [
            ticket.key
            for tickets in self._tickets.values()
            for ticket in tickets.values()
            if not ticket.requests or any(r.phase not in ended for r in ticket.requests)
        ]
        return [action for key in keys for action in self.fail(key, error)]

    def next_deadline(self) -> float | None:
        """Return when the next request will have taken too long, clock seconds."""
        while self._deadlines and self._find(self._deadlines[0][1]) is None:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def on_timer(self, *, now: float) -> list[Action]:
        """End the requests that took too long."""
        actions: list[Action] = []
        while (at := self.next_deadline()) is not None and at <= now:
            ticket = self._find(heapq.heappop(self._deadlines)[1])
            assert ticket is not None
            error = DeadlineExceeded(
                f"The request did not finish within {ticket.params.timeout_s:g} s, its timeout_s. "
                "Allow more time, or ask for fewer tokens."
            )
            actions += self.fail(ticket.key, error)
        return actions

    def _find(self, key: RequestKey) -> Ticket | None:
        """Return the ticket, unless it has ended; another one may have its id by now."""
        ticket = self._tickets.get(key[0], {}).get(key[1])
        return ticket if ticket is not None and ticket.key == key else None

    def _retire(self, ticket: Ticket) -> None:
        peer, request_id, _ = ticket.key
        del self._tickets[peer][request_id]
        if not ticket.requests:
            self._num_tokenizing -= ticket.params.n
        for request in ticket.requests:
            if request.phase is Phase.WAITING:
                self._queue.remove(peer, request)
            self._leave(request, keep=False)
            request.phase = Phase.GONE
        if not self._tickets[peer]:
            del self._tickets[peer]
            self._queue.forget(peer)

    def validate(self) -> None:
        """Assert the invariants; tests call this after every step."""
        self._queue.validate()
        waiting = set(self._queue)
        tickets = [t for tickets in self._tickets.values() for t in tickets.values()]
        requests = [request for ticket in tickets for request in ticket.requests]
        assert all(self._find(ticket.key) is ticket for ticket in tickets)
        assert waiting == {r for r in requests if r.phase is Phase.WAITING}
        assert set(self._homes) == {r for r in requests if r.phase is Phase.RUNNING}
        assert self._num_tokenizing == sum(t.params.n for t in tickets if not t.requests)
        for request, scheduler in self._homes.items():
            assert request in scheduler.running


def _failure(peer: PeerId, request_id: RequestId, error: DistributedLLMError) -> Send:
    retry_after_s = error.retry_after_s if isinstance(error, Overloaded) else 0.0
    return Send(
        peer,
        RequestFailed(
            request_id=request_id,
            code=error.code,
            message=str(error)[:4096],
            retry_after_s=retry_after_s,
        ),
    )
