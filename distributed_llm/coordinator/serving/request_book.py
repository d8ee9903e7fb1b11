"""The book of all requests, from their arrival to their last message. Pure.

A client's `Generate` becomes a `Ticket`, which ends with exactly one `Finished` or `RequestFailed`
unless the client is gone. Its answers, one `Request` each, wait in a queue that is fair among
clients until a pipeline's scheduler admits them. Tokens become text elsewhere: the book asks for it
(`Detokenize`) and sends it on when it comes (`Detokenized`).
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
from distributed_llm.coordinator.requests.lifecycle import RequestCause, RequestState
from distributed_llm.coordinator.requests.parameters import resolve, wrong_prompt
from distributed_llm.coordinator.requests.request import Request, Ticket
from distributed_llm.coordinator.requests.totals import Totals
from distributed_llm.coordinator.serving.event_log import EventKind, EventLog
from distributed_llm.coordinator.serving.scheduler import Scheduler
from distributed_llm.coordinator.serving.steps import StepDone


class RequestBook:
    """All requests of all clients.

    Args:
        defaults: generation parameters of the checkpoint.
        max_waiting: requests that may wait; tickets with more are refused.
        draw_seed: returns a seed for a ticket without one.

    Attributes:
        totals: counts of all requests since the start.
    """

    def __init__(
        self,
        defaults: GenerationDefaults,
        event_log: EventLog,
        *,
        max_waiting: int,
        draw_seed: Callable[[], int],
    ) -> None:
        self._defaults = defaults
        self._event_log = event_log
        self._max_waiting = max_waiting
        self._draw_seed = draw_seed
        self._tickets: dict[PeerId, dict[RequestId, Ticket]] = {}
        self._queue: FairQueue[Request] = FairQueue()
        self._schedulers: dict[Request, Scheduler] = {}  # of the running requests
        self._num_tokenizing = 0
        self._next_number = 0
        self._kv_tokens = 0
        self._deadlines: list[tuple[float, RequestKey]] = []
        self.totals = Totals()

    @property
    def busy(self) -> bool:
        """Whether any ticket has not ended."""
        return bool(self._tickets)

    @property
    def num_running(self) -> int:
        """Requests that run on a pipeline."""
        return len(self._schedulers)

    @property
    def num_waiting(self) -> int:
        """Requests whose prompt is being tokenized or that wait for a pipeline."""
        return self._num_tokenizing + len(self._queue)

    @property
    def most_reserved(self) -> int:
        """Positions of KV cache that the largest request may grow to; 0 if there is none."""
        return max((r.ticket.reserved_tokens for r in (*self._queue, *self._schedulers)), default=0)

    # -------------------------------------------------------------- arrival

    def submit(
        self, peer: PeerId, message: Generate, frames: tuple[Frame, ...], *, now: float
    ) -> list[Action]:
        """Accept or refuse a new ticket.

        Args:
            frames: the prompt, as `message.tensors` describes it.
        """
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
        self._event_log.trace(EventKind.REQUEST_ARRIVED, message.request_id, answers=params.n)
        payload = bytes(frames[0]) if frames else b""
        return [Tokenize(key, message.prompt, payload, params.n, params.stop_strings)]

    def refuse(
        self, peer: PeerId, request_id: RequestId, error: DistributedLLMError
    ) -> list[Action]:
        """Answer a ticket with an error without accepting it."""
        self.totals.failed += 1
        return [_failure(peer, request_id, error)]

    def has(self, peer: PeerId, request_id: RequestId) -> bool:
        """Return whether the client at `peer` has a ticket with this id that has not ended."""
        return request_id in self._tickets.get(peer, ())

    def tokenized(self, event: Tokenized) -> list[Action]:
        """Queue the requests of a ticket whose prompt is tokenized."""
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
        self._event_log.trace(
            EventKind.REQUEST_QUEUED, ticket.key[1], prompt_tokens=len(event.token_ids)
        )
        for request in ticket.requests:
            self._queue.add(ticket.key[0], request, order=request.number)
        return []

    # -------------------------------------------------------------- queue and pipelines

    def next_waiting(self) -> Request | None:
        """Return the request that is next, or None if none waits."""
        return self._queue.first()

    def admit(self, scheduler: Scheduler, *, now: float) -> bool:
        """Let the next request run on a scheduler, if that has room; return whether it runs."""
        request = self._queue.first()
        assert request is not None
        if not scheduler.admit(request, now=now):
            return False
        self._queue.pop()
        self._queue.charge(request.ticket.key[0], len(request.token_ids))
        self._schedulers[request] = scheduler
        return True

    def requeue(self, requests: Iterable[Request]) -> None:
        """Queue requests that lost their KV cache, before younger ones of their clients."""
        for request in requests:
            if self._schedulers.pop(request, None) is not None:  # otherwise it has ended
                self._queue.add(request.ticket.key[0], request, order=request.number)

    def collect(self, scheduler: Scheduler) -> None:
        """Queue the requests that a scheduler preempted; count them and its prefix hits."""
        preempted = scheduler.take_preempted()
        for request in preempted:
            self._event_log.trace(
                EventKind.ANSWER_PREEMPTED, request.ticket.key[1], choice=request.choice
            )
        self.requeue(preempted)
        self.totals.preemptions += len(preempted)
        self.totals.prefix_hit_tokens += scheduler.take_prefix_hit_tokens()

    def set_capacity(self, kv_tokens: int) -> list[Action]:
        """Set how many positions the largest pipeline has room for; fail larger tickets."""
        self._kv_tokens = kv_tokens
        tickets = {r.ticket: None for r in (*self._queue, *self._schedulers)}
        actions: list[Action] = []
        for ticket in [one for one in tickets if one.reserved_tokens > kv_tokens]:
            error = NotEnoughMemory(
                f"The request may take {ticket.reserved_tokens} positions, but after workers left "
                f"there is room for {kv_tokens}. Add a worker or lower max_new_tokens."
            )
            actions += self.fail(ticket.key, error)
        return actions

    def step_done(self, done: StepDone, counts: Iterable[bool], *, now: float) -> list[Action]:
        """Append the tokens that a step has sampled.

        Args:
            counts: of each token, whether it is current; others are dropped.
        """
        actions: list[Action] = []
        for request, token, logprobs, current in zip(
            done.step.samplers, done.token_ids, done.logprobs, counts, strict=True
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
            self._withdraw(request, keep=True)
            request.change(RequestCause.LAST_TOKEN)
        return [Detokenize(request.ticket.key, request.choice, (token,), last)]

    def _withdraw(self, request: Request, *, keep: bool) -> None:
        """Take a request off its pipeline, or out of the queue.

        Args:
            keep: keep its KV cache as a prefix for other requests.
        """
        scheduler = self._schedulers.pop(request, None)
        if scheduler is not None:
            scheduler.remove(request, keep=keep)
        elif request.state is RequestState.WAITING:
            self._queue.remove(request.ticket.key[0], request)

    # -------------------------------------------------------------- the end

    def detokenized(self, event: Detokenized, *, now: float) -> list[Action]:
        """Send the next text of an answer; end the ticket if it was the last of all answers."""
        ticket = self._find(event.key)
        if ticket is None:
            return []
        request = ticket.requests[event.choice]
        if request.state is RequestState.GONE:
            return []
        stop = request.num_prompt_tokens + event.num_tokens
        if event.stopped:
            self._withdraw(request, keep=True)
            del request.token_ids[stop:]
            request.finish_reason = "stop"
        actions = self._chunk(request, event.text, stop, ended=event.stopped or event.last)
        if event.stopped or event.last:
            request.change(RequestCause.STOP_STRING if event.stopped else RequestCause.TEXT_SENT)
            if all(other.state is RequestState.GONE for other in ticket.requests):
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
        self._event_log.trace(
            EventKind.REQUEST_FINISHED,
            ticket.key[1],
            answer_tokens=finished.usage.completion_tokens,
        )
        return [Send(ticket.key[0], finished), Forget(ticket.key)]

    def fail(self, key: RequestKey, error: DistributedLLMError) -> list[Action]:
        """End a ticket with an error, unless it has ended."""
        ticket = self._find(key)
        if ticket is None:
            return []
        self._retire(ticket)
        self.totals.failed += 1
        self._event_log.trace(
            EventKind.REQUEST_FAILED, ticket.key[1], code=error.code, why=str(error)
        )
        return [_failure(*key[:2], error), Forget(key)]

    def cancel(self, peer: PeerId, request_id: RequestId) -> list[Action]:
        """End a ticket because its client asked for that."""
        ticket = self._tickets.get(peer, {}).get(request_id)
        error = RequestCancelled("The request was cancelled.")
        return self.fail(ticket.key, error) if ticket else []

    def drop_client(self, peer: PeerId) -> list[Action]:
        """End all tickets of a client that is gone, without a message to it."""
        tickets = list(self._tickets.get(peer, {}).values())
        for ticket in tickets:
            self._retire(ticket)
            self._event_log.trace(EventKind.CLIENT_GONE, ticket.key[1])
            self.totals.failed += 1
        return [Forget(ticket.key) for ticket in tickets]

    def fail_all(self, error: DistributedLLMError) -> list[Action]:
        """End all tickets with an error, except those of which only text is missing."""
        computed = (RequestState.CLOSING, RequestState.GONE)
        keys = [
            ticket.key
            for tickets in self._tickets.values()
            for ticket in tickets.values()
            if not ticket.requests or any(r.state not in computed for r in ticket.requests)
        ]
        return [action for key in keys for action in self.fail(key, error)]

    def next_deadline(self) -> float | None:
        """Return when the next ticket times out, clock seconds, or None."""
        while self._deadlines and self._find(self._deadlines[0][1]) is None:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def on_timer(self, *, now: float) -> list[Action]:
        """End the tickets that have timed out."""
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
        """Return a ticket, or None if it has ended; a new one may have the same client and id."""
        ticket = self._tickets.get(key[0], {}).get(key[1])
        return ticket if ticket is not None and ticket.key == key else None

    def _retire(self, ticket: Ticket) -> None:
        """Forget a ticket, and end those of its requests that have not ended."""
        peer, request_id, _ = ticket.key
        del self._tickets[peer][request_id]
        if not ticket.requests:
            self._num_tokenizing -= ticket.params.n
        for request in ticket.requests:
            if request.state is not RequestState.GONE:
                self._withdraw(request, keep=False)
                request.change(RequestCause.FAILED)
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
        assert waiting == {r for r in requests if r.state is RequestState.WAITING}
        assert set(self._schedulers) == {r for r in requests if r.state is RequestState.RUNNING}
        assert self._num_tokenizing == sum(t.params.n for t in tickets if not t.requests)
        for request, scheduler in self._schedulers.items():
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
