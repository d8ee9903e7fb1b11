"""The book of all requests, from their arrival to their last message. Pure.

A client's `Generate` becomes a `Request`, which ends with exactly one `Finished` or `RequestFailed`
unless the client is gone. Its answers wait in a queue that is fair among clients until a
pipeline's scheduler admits them. Tokens become text elsewhere: the book asks for it
(`Detokenize`) and sends it on when it comes (`Detokenized`).
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable

import msgspec

from distributed_llm.common.errors import (
    DeadlineExceeded,
    DistributedLLMError,
    InvalidRequest,
    NotEnoughMemory,
    Overloaded,
    RequestCancelled,
)
from distributed_llm.common.keys import NOBODY, PublicKey
from distributed_llm.common.messages import (
    Embed,
    Embedded,
    Finished,
    Generate,
    RequestId,
    TokenChunk,
    TokenLogprobs,
)
from distributed_llm.common.sampling_params import SamplingParams
from distributed_llm.common.tensors import Frame, TensorSpec
from distributed_llm.common.types import PeerId
from distributed_llm.common.wording import count_text
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
from distributed_llm.coordinator.requests.answer_states import AnswerCause, AnswerState
from distributed_llm.coordinator.requests.deadlines import Deadlines
from distributed_llm.coordinator.requests.failures import failure
from distributed_llm.coordinator.requests.inputs import split, wrong_inputs
from distributed_llm.coordinator.requests.parameters import (
    Limits,
    embedding_limits,
    resolve,
    text_rules,
    unknown_token,
)
from distributed_llm.coordinator.requests.request import Answer, Request
from distributed_llm.coordinator.requests.totals import Totals
from distributed_llm.coordinator.requests.waiting import WaitingAnswers
from distributed_llm.coordinator.serving.chunks import messages_of
from distributed_llm.coordinator.serving.event_log import EventKind, EventLog
from distributed_llm.coordinator.serving.scheduler import Scheduler
from distributed_llm.coordinator.serving.steps import StepDone


class RequestBook:
    """The requests of all clients, and their answers.

    Args:
        defaults: generation parameters of the checkpoint.
        max_waiting: answers that may wait; a request that would exceed it is refused.
        draw_seed: returns a seed for a request without one.
        share_prefixes: whether clients with different keys share prefixes.

    Attributes:
        waiting: the answers that wait for a pipeline.
        totals: counts since the coordinator started.
    """

    def __init__(
        self,
        defaults: GenerationDefaults,
        event_log: EventLog,
        *,
        max_waiting: int,
        draw_seed: Callable[[], int],
        share_prefixes: bool = False,
    ) -> None:
        self._defaults = defaults
        self._event_log = event_log
        self._max_waiting = max_waiting
        self._draw_seed = draw_seed
        self._share_prefixes = share_prefixes
        self._requests: dict[PeerId, dict[RequestId, Request]] = {}
        self._open: Counter[Hashable] = Counter()  # requests, by their client
        self.waiting = WaitingAnswers()
        self._schedulers: dict[Answer, Scheduler] = {}  # of the running answers
        self._num_tokenizing = 0
        self._next_number = 0
        self._kv_tokens = 0
        self._deadlines = Deadlines()
        self.totals = Totals()

    @property
    def busy(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._requests)

    @property
    def num_running(self) -> int:
        """Answers that run on a pipeline."""
        return len(self._schedulers)

    @property
    def num_waiting(self) -> int:
        """Answers whose prompt is being tokenized or that wait for a pipeline."""
        return self._num_tokenizing + len(self.waiting)

    @property
    def most_reserved(self) -> int:
        """Positions of KV cache that the largest answer may grow to; 0 if no answer needs any."""
        return max((request.reserved_tokens for request in self._uncomputed()), default=0)

    def draw_number(self, count: int = 1) -> int:
        """Return the first of so many numbers that nothing else has."""
        number = self._next_number
        self._next_number += count
        return number

    # -------------------------------------------------------------- arrival

    def submit(
        self,
        peer: PeerId,
        message: Generate | Embed,
        frames: tuple[Frame, ...],
        *,
        holder: PublicKey = NOBODY,
        now: float,
    ) -> list[Action]:
        """Accept or refuse a new request.

        Args:
            frames: prompt and grammar, as `message.tensors` describes them.
            holder: key of the client; `NOBODY` without keys.
        """
        embeds = isinstance(message, Embed)
        params = (
            SamplingParams(max_new_tokens=1, timeout_s=message.timeout_s)
            if isinstance(message, Embed)
            else message.params
        )
        if self.num_waiting + params.n > self._max_waiting:
            error = Overloaded(
                f"{self.num_waiting} answers wait already, and the limit is {self._max_waiting}. "
                "Try again later, or raise max_waiting_requests.",
                retry_after_s=self.totals.seconds_for(self.num_waiting + params.n),
            )
            return self.refuse(peer, message.request_id, error)
        wrong = wrong_inputs(message, self._defaults.context_length)
        if wrong:
            return self.refuse(peer, message.request_id, wrong)
        if embeds and self._defaults.decoder_start:
            none = InvalidRequest(
                "This model is an encoder-decoder, and encoder-decoders have no embeddings here. "
                "Use a model with a decoder alone."
            )
            return self.refuse(peer, message.request_id, none)
        try:
            payload, grammar = split(message, frames)
        except InvalidRequest as exc:
            return self.refuse(peer, message.request_id, exc)
        key = (peer, message.request_id, self.draw_number(params.n))
        request = Request(
            key,
            params,
            arrived_at=now,
            client=holder or peer,
            shares_with=None if self._share_prefixes else holder or None,
            constrained=grammar is not None,
            embeds=embeds,
        )
        self._requests.setdefault(peer, {})[message.request_id] = request
        self._open[request.client] += 1
        self._num_tokenizing += params.n
        if request.deadline is not None:
            self._deadlines.add(key, request.deadline)
        self._event_log.trace(EventKind.REQUEST_ARRIVED, message.request_id, answers=params.n)
        texts = 0 if embeds else params.n
        rules = text_rules(params, self._defaults, grammar)
        return [Tokenize(key, message.prompt, payload, texts, rules)]

    def refuse(
        self, peer: PeerId, request_id: RequestId, error: DistributedLLMError
    ) -> list[Action]:
        """Fail a request without accepting it."""
        self.totals.count_failed(error.code)
        return [failure(peer, request_id, error)]

    def has(self, peer: PeerId, request_id: RequestId) -> bool:
        """Return whether the client at `peer` has a request with this id that has not ended."""
        return request_id in self._requests.get(peer, ())

    def tokenized(self, event: Tokenized) -> list[Action]:
        """Queue the answers of a request whose prompt is tokenized."""
        request = self._find(event.key)
        if request is None:
            return []
        if event.first is not None:
            request.params = msgspec.structs.replace(
                request.params, forced_bos_token_id=event.first
            )
        vocab_size = self._defaults.vocab_size
        if error := unknown_token(event.token_ids, request.params, vocab_size):
            return self.fail(event.key, error)
        try:
            limits = self._limits(request, len(event.token_ids))
        except DistributedLLMError as exc:
            return self.fail(event.key, exc)
        self._num_tokenizing -= request.params.n
        request.accept(
            event.token_ids,
            limits,
            number=event.key[2],
            mask=event.mask,
            start=self._defaults.decoder_start,
        )
        self.totals.prompt_tokens += len(event.token_ids)
        self._event_log.trace(
            EventKind.REQUEST_QUEUED, request.key[1], prompt_tokens=len(event.token_ids)
        )
        for answer in request.answers:
            self.waiting.add(answer)
        return []

    def _limits(self, request: Request, prompt_tokens: int) -> Limits:
        start = self._defaults.decoder_start
        if request.embeds:
            return embedding_limits(
                self._defaults, prompt_tokens=prompt_tokens, kv_tokens=self._kv_tokens
            )
        return resolve(
            request.params,
            self._defaults,
            prompt_tokens=len(start) or prompt_tokens,
            source_tokens=prompt_tokens if start else 0,
            kv_tokens=self._kv_tokens,
            seed=self._draw_seed(),
            constrained=request.constrained,
        )

    # -------------------------------------------------------------- queue and pipelines

    def admit(self, scheduler: Scheduler, *, now: float) -> bool:
        """Let the next answer run on a scheduler with room for it; return whether it runs."""
        answer = self.waiting.first()
        is_first = answer.started_at is None
        if not scheduler.admit(answer, now=now):
            return False
        if is_first:
            self.totals.times.queue.add(now - answer.request.arrived_at)
        self.waiting.take()
        self._schedulers[answer] = scheduler
        return True

    def requeue(self, answers: Iterable[Answer]) -> int:
        """Queue answers that lost their KV cache, before younger ones of their clients.

        Returns:
            How many were queued; the others have ended.
        """
        running = [answer for answer in answers if self._schedulers.pop(answer, None) is not None]
        for answer in running:
            self.waiting.add(answer)
        return len(running)

    def collect(self, scheduler: Scheduler) -> None:
        """Queue the answers that a scheduler preempted; count them and its prefix hits."""
        preempted = scheduler.take_preempted()
        for answer in preempted:
            self._event_log.trace(
                EventKind.ANSWER_PREEMPTED, answer.request.key[1], choice=answer.choice
            )
        self.requeue(preempted)
        self.totals.preemptions += len(preempted)
        queried, hit = scheduler.take_prefix_tokens()
        self.totals.prefix_query_tokens += queried
        self.totals.prefix_hit_tokens += hit

    def set_capacity(self, kv_tokens: int) -> list[Action]:
        """Set how many positions the largest pipeline has room for; fail larger requests."""
        self._kv_tokens = kv_tokens
        actions: list[Action] = []
        for request in [r for r in self._uncomputed() if r.reserved_tokens > kv_tokens]:
            error = NotEnoughMemory(
                f"The request may take {count_text(request.reserved_tokens, 'token')} of context, "
                f"but after workers left there is room for {kv_tokens:,}. Add a worker or lower "
                "max_new_tokens."
            )
            actions += self.fail(request.key, error)
        return actions

    def step_done(self, done: StepDone, are_current: Iterable[bool], *, now: float) -> list[Action]:
        """Append the tokens that a step has sampled; end what was to be embedded, and is.

        Args:
            are_current: of each token, whether it is; the others are dropped.
        """
        actions: list[Action] = []
        for answer, token, logprobs, is_current in zip(
            done.step.samplers, done.token_ids, done.logprobs, are_current, strict=True
        ):
            if is_current:
                actions += self._append(answer, token, logprobs, now)
        for answer in done.step.answers:
            if answer.is_embedded:
                actions += self._embedded(answer, now)
        return actions

    def _append(
        self, answer: Answer, token: int, logprobs: TokenLogprobs | None, now: float
    ) -> list[Action]:
        before = answer.last_token_at
        answer.append(token, logprobs, now=now)
        self.totals.tokens += 1
        if before is None:
            self.totals.times.first_token.add(now - answer.request.arrived_at)
        else:
            self.totals.times.between_tokens.add(now - before)
        self.waiting.served(answer, 1)
        last = answer.finish_reason is not None
        if last:
            self._withdraw(answer, keep=True)
            answer.change(AnswerCause.LAST_TOKEN)
        spell = () if logprobs is None else (token, *(likely for likely, _ in logprobs.top))
        return [Detokenize(answer.request.key, answer.choice, (token,), last, spell)]

    def _withdraw(self, answer: Answer, *, keep: bool) -> None:
        """Take an answer off its pipeline, or out of the queue.

        Args:
            keep: keep its KV cache as a prefix for other answers.
        """
        scheduler = self._schedulers.pop(answer, None)
        if scheduler is not None:
            scheduler.remove(answer, keep=keep)
        elif answer.state is AnswerState.WAITING:
            self.waiting.remove(answer)

    # -------------------------------------------------------------- the end

    def detokenized(self, event: Detokenized, *, now: float) -> list[Action]:
        """Send the next text of an answer; end the request once all its answers have ended."""
        request = self._find(event.key)
        if request is None:
            return []
        answer = request.answers[event.choice]
        if answer.state is AnswerState.GONE:
            return []
        stop = answer.num_prompt_tokens + event.num_tokens
        if event.stopped or event.complete:
            self._withdraw(answer, keep=True)
            del answer.token_ids[stop:]
            del answer.logprobs[stop - answer.num_prompt_tokens - answer.num_sent_tokens :]
            answer.finish_reason = "stop"
        elif event.mask:
            answer.mask = event.mask
            if scheduler := self._schedulers.get(answer):
                scheduler.on_change()
        actions = self._chunk(answer, event, stop)
        if event.stopped or event.complete or event.last:
            answer.change(_cause_of_end(event))
            if all(other.state is AnswerState.GONE for other in request.answers):
                usage, timings = request.usage(), request.timings()
                finished = Finished(request_id=request.key[1], usage=usage, timings=timings)
                actions += self._finish(request, finished, now=now)
        return actions

    def _chunk(self, answer: Answer, event: Detokenized, stop: int) -> list[Action]:
        sent, key = answer.num_sent_tokens, answer.request.key
        new = tuple(answer.token_ids[answer.num_prompt_tokens + sent : stop])
        ended = event.stopped or event.complete or event.last
        if not (new or event.text or ended):
            return []
        answer.num_sent_tokens += len(new)
        chunk = TokenChunk(
            request_id=key[1],
            choice=answer.choice,
            index=sent,
            text=event.text,
            token_ids=new,
            logprobs=answer.take_logprobs(len(new), event.spelled),
            finish_reason=answer.finish_reason if ended else None,
            stop_string=event.stop_string,
            trace=answer.take_trace(),
        )
        return [Send(key[0], message) for message in messages_of(chunk)]

    def _embedded(self, answer: Answer, now: float) -> list[Action]:
        """Send the mean of an answer's hidden states."""
        assert answer.pooled is not None
        request = answer.request
        self._withdraw(answer, keep=True)
        answer.change(AnswerCause.EMBEDDED)
        mean = (answer.pooled / answer.num_prompt_tokens).astype("<f4")
        spec = TensorSpec("float32", (len(mean),))
        message = Embedded(request_id=request.key[1], usage=request.usage(), tensors=(spec,))
        return self._finish(request, message, (mean.tobytes(),), now=now)

    def _finish(
        self,
        request: Request,
        finished: Finished | Embedded,
        frames: tuple[Frame, ...] = (),
        *,
        now: float,
    ) -> list[Action]:
        self._retire(request)
        self.totals.count_finished(now=now)
        self.totals.times.whole.add(now - request.arrived_at)
        self._event_log.trace(
            EventKind.REQUEST_FINISHED,
            request.key[1],
            answer_tokens=finished.usage.completion_tokens,
        )
        return [Send(request.key[0], finished, frames), Forget(request.key)]

    def fail(self, key: RequestKey, error: DistributedLLMError) -> list[Action]:
        """End a request with an error, unless it has ended."""
        request = self._find(key)
        if request is None:
            return []
        self._retire(request)
        if isinstance(error, RequestCancelled):
            self.totals.cancelled += 1
            self._event_log.trace(EventKind.REQUEST_CANCELLED, request.key[1])
        else:
            self.totals.count_failed(error.code)
            self._event_log.trace(
                EventKind.REQUEST_FAILED, request.key[1], code=error.code, why=str(error)
            )
        return [failure(*key[:2], error), Forget(key)]

    def cancel(self, peer: PeerId, request_id: RequestId) -> list[Action]:
        """End a request because its client asked for that."""
        request = self._requests.get(peer, {}).get(request_id)
        error = RequestCancelled("The request was cancelled.")
        return self.fail(request.key, error) if request else []

    def drop_client(self, peer: PeerId) -> list[Action]:
        """End all requests of a client that is gone, without a message to it."""
        requests = list(self._requests.get(peer, {}).values())
        for request in requests:
            self._retire(request)
            self._event_log.trace(EventKind.CLIENT_GONE, request.key[1])
            self.totals.cancelled += 1
        return [Forget(request.key) for request in requests]

    def fail_all(self, error: DistributedLLMError) -> list[Action]:
        """End all requests with an error, except those whose tokens are all known."""
        computed = (AnswerState.CLOSING, AnswerState.GONE)
        keys = [
            request.key
            for requests in self._requests.values()
            for request in requests.values()
            if not request.answers or any(a.state not in computed for a in request.answers)
        ]
        return [action for key in keys for action in self.fail(key, error)]

    def next_deadline(self) -> float | None:
        """Return when the next request times out, clock seconds, or None."""
        return self._deadlines.next()

    def on_timer(self, *, now: float) -> list[Action]:
        """End the requests that have timed out."""
        actions: list[Action] = []
        for key in self._deadlines.take_due(now=now):
            request = self._find(key)
            assert request is not None
            error = DeadlineExceeded(
                f"The request did not finish within {request.params.timeout_s:g} s, its timeout_s. "
                "Allow more time, or ask for fewer tokens."
            )
            actions += self.fail(key, error)
        return actions

    def _uncomputed(self) -> Iterable[Request]:
        """Return the requests with answers that wait or run."""
        return {answer.request: None for answer in (*self.waiting, *self._schedulers)}

    def _find(self, key: RequestKey) -> Request | None:
        """Return a request, or None if it has ended; a new one may have the same client and id."""
        request = self._requests.get(key[0], {}).get(key[1])
        return request if request is not None and request.key == key else None

    def _retire(self, request: Request) -> None:
        """Forget a request, and end those of its answers that have not ended."""
        peer, request_id, _ = request.key
        del self._requests[peer][request_id]
        self._deadlines.remove(request.key)
        if not request.answers:
            self._num_tokenizing -= request.params.n
        for answer in request.answers:
            if answer.state is not AnswerState.GONE:
                self._withdraw(answer, keep=False)
                answer.change(AnswerCause.FAILED)
        if not self._requests[peer]:
            del self._requests[peer]
        self._open[request.client] -= 1
        if not self._open[request.client]:
            del self._open[request.client]
            self.waiting.forget(request.client)

    def validate(self) -> None:
        """Assert the invariants; tests call this after every step."""
        self.waiting.validate()
        waiting = set(self.waiting)
        requests = [r for requests in self._requests.values() for r in requests.values()]
        assert self._open == Counter(request.client for request in requests)
        answers = [answer for request in requests for answer in request.answers]
        assert all(self._find(request.key) is request for request in requests)
        assert waiting == {a for a in answers if a.state is AnswerState.WAITING}
        assert set(self._schedulers) == {a for a in answers if a.state is AnswerState.RUNNING}
        assert self.waiting.clients <= set(self._open)
        self._deadlines.validate(r.key for r in requests if r.deadline is not None)
        assert self._num_tokenizing == sum(r.params.n for r in requests if not r.answers)
        for answer, scheduler in self._schedulers.items():
            assert answer in scheduler.running


def _cause_of_end(event: Detokenized) -> AnswerCause:
    if event.stopped:
        return AnswerCause.STOP_STRING
    return AnswerCause.GRAMMAR_COMPLETE if event.complete else AnswerCause.TEXT_SENT
