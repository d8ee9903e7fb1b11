"""A request, which is what a client asks for, and its answers. Pure.

A client's message `Generate` becomes a `Request`. Once its prompt is tokenized, it gets an `Answer`
for each of the `n` answers that the client wants; each is scheduled, preempted and ended by itself.
The token ids of prompt and answers are kept here and nowhere else; whatever KV cache a worker loses
is computed again from them.
"""

import hashlib
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice

import msgspec
import numpy as np
import numpy.typing as npt

from distributed_llm.common.messages import (
    MAX_TRACED,
    FinishReason,
    SharedPrefix,
    Spelling,
    StepTrace,
    Timings,
    TokenLogprobs,
    Usage,
)
from distributed_llm.common.sampling_params import Sampling, SamplingParams
from distributed_llm.common.types import SequenceId
from distributed_llm.coordinator.events import RequestKey
from distributed_llm.coordinator.requests.answer_states import (
    ANSWER_STATES,
    AnswerCause,
    AnswerState,
)
from distributed_llm.coordinator.requests.parameters import Limits
from distributed_llm.coordinator.requests.stage_times import StageTimes


class Suspects:
    """A group of answers that run in steps of their own, as one of them may break steps."""


@dataclass(eq=False)
class Answer:
    """One of the answers to a request, and how far it has come.

    Attributes:
        number: orders all answers by arrival; the oldest has the smallest.
        choice: its index among the answers to the request.
        token_ids: of the prompt, then of the answer.
        sequence_id: id of its KV cache on the workers, never reused; None while it has none.
        num_computed_tokens: tokens that the KV cache of every stage has.
        num_scheduled_tokens: tokens that it will have when the steps in flight have ended.
        num_in_flight: steps in flight that compute some of its tokens.
        latest_slice: number of the latest slice of it in a step, among all that its scheduler
            made; 0 before any.
        num_cached_tokens: most tokens that it shared with another sequence instead of computing.
        sampling_sent: whether the last stage was sent `sampling`.
        prefix: the beginning of another sequence that this one begins with.
        shares: whether it may share a prefix.
        mask: which token may be the next, as in `Task`; None without a grammar, and until the text
            process has sent it.
        waits_for: the answer whose prefix this one will share, and which it waits for until
            `waits_until` positions are computed.
        losses: workers that died in a row while they worked on its next token.
        failures: steps that failed in a row over its next token, and for certain because of it.
        suspects: the group with which it is suspected of breaking steps; None if it is not.
        logprobs: of the tokens that the client was not sent yet; empty unless they were asked for.
        pooled: sum of the model's last hidden states at the computed positions, if the request
            wants their mean: float64 [hidden_size]; None before the first.
        num_sent_tokens: tokens of the answer that the client was sent.
        trace: steps that led to tokens that the client was not sent yet, the latest; none unless
            they were asked for.
        started_at: when it was first admitted; like all times here in clock seconds.
    """

    request: "Request"
    number: int
    choice: int
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: Sampling
    sequence_id: SequenceId | None = None
    num_computed_tokens: int = 0
    num_scheduled_tokens: int = 0
    num_in_flight: int = 0
    latest_slice: int = 0
    num_cached_tokens: int = 0
    sampling_sent: bool = False
    prefix: SharedPrefix | None = None
    shares: bool = True
    mask: bytes | None = None
    waits_for: "Answer | None" = None
    waits_until: int = 0
    losses: int = 0
    failures: int = 0
    suspects: Suspects | None = None
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    pooled: npt.NDArray[np.float64] | None = None
    num_sent_tokens: int = 0
    trace: deque[StepTrace] = field(default_factory=lambda: deque(maxlen=MAX_TRACED))
    started_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    stage_times: StageTimes = field(default_factory=StageTimes)
    _state: AnswerState = field(default=ANSWER_STATES.initial, init=False)

    @property
    def state(self) -> AnswerState:
        """Where it is in its life."""
        return self._state

    def change(self, cause: AnswerCause) -> None:
        """Enter the state that follows on `cause`.

        Raises:
            IllegalTransition: `cause` cannot happen in its state.
        """
        self._state = ANSWER_STATES.after(self._state, cause)

    @property
    def num_new_tokens(self) -> int:
        """Tokens of the answer so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens that are not in the KV cache of every stage."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_unscheduled_tokens(self) -> int:
        """Tokens that no step has computed and no step in flight computes."""
        return len(self.token_ids) - self.num_scheduled_tokens

    @property
    def is_embedded(self) -> bool:
        """Whether it runs for an embedding, and the sum for that is complete."""
        runs = self._state is AnswerState.RUNNING
        return self.request.embeds and runs and not self.num_uncomputed_tokens

    @property
    def reads_source(self) -> bool:
        """Whether an encoder has to read its source next."""
        return self.num_scheduled_tokens < self.request.source_tokens

    @property
    def waits_for_source(self) -> bool:
        """Whether a step in flight reads its source."""
        return self.num_computed_tokens < self.request.source_tokens and not self.reads_source

    @property
    def sampling_bytes(self) -> int:
        """How many bytes `sampling` adds to its next task; 0 once it was sent."""
        return 0 if self.sampling_sent else self._encoded_bytes

    @cached_property
    def _encoded_bytes(self) -> int:
        return len(msgspec.msgpack.encode(self.sampling))

    @property
    def waits_for_mask(self) -> bool:
        """Whether it cannot run before it is known which token may be the next."""
        return self.request.constrained and self.mask is None

    def pool(self, total: npt.NDArray[np.float32]) -> None:
        """Add the sum of the last hidden states at positions that were computed."""
        self.pooled = total.astype(np.float64) if self.pooled is None else self.pooled + total

    def reset(self) -> None:
        """Forget the KV cache, so that all tokens are computed again; the tokens stay."""
        self.pooled = None
        self.sequence_id = self.prefix = self.waits_for = None
        self.num_computed_tokens = self.num_scheduled_tokens = self.num_in_flight = 0
        self.latest_slice = 0
        self.sampling_sent = False

    def clear_suspicion(self) -> None:
        """Forget failures and losses: it got a token."""
        self.suspects = None
        self.losses = self.failures = 0

    def append(self, token_id: int, logprobs: TokenLogprobs | None, *, now: float) -> None:
        """Add the next token of the answer; set `finish_reason` if it is the last."""
        limits = self.request.limits
        assert limits is not None
        self.token_ids.append(token_id)
        self.mask = None
        if logprobs is not None:
            self.logprobs.append(logprobs)
        self.first_token_at = now if self.first_token_at is None else self.first_token_at
        self.last_token_at = now
        if token_id in limits.end_token_ids:
            self.finish_reason = "stop"
        elif self.num_new_tokens >= limits.max_new_tokens:
            self.finish_reason = "length"

    def take_logprobs(
        self, count: int, spelled: Iterable[Spelling | None]
    ) -> tuple[TokenLogprobs, ...]:
        """Remove and return the log-probabilities of the next tokens that the client is sent.

        Args:
            count: number of these tokens.
            spelled: how each of them is written, followed by the likeliest ones at its position;
                empty if that is not known.
        """
        taken, self.logprobs[:count] = self.logprobs[:count], []
        left = iter(spelled)
        return tuple(
            msgspec.structs.replace(one, spelled=tuple(islice(left, 1 + len(one.top))))
            for one in taken
        )

    def take_trace(self) -> tuple[StepTrace, ...]:
        """Remove and return the steps that led to the tokens that the client was sent."""
        taken = []
        while self.trace and self.trace[0].index < self.num_sent_tokens:
            taken.append(self.trace.popleft())
        return tuple(taken)


@dataclass(eq=False)
class Request:
    """What a client asked for: one prompt, and `params.n` answers.

    Attributes:
        key: the client's address, its id for the request, and a number that no other request has.
        arrived_at: clock seconds.
        client: among whom service is fair: the key of who asks, else the connection.
        shares_with: only requests with an equal value share prefixes with it.
        constrained: whether a grammar says which tokens may be sampled.
        embeds: whether it wants the mean of the last hidden states of its prompt, and no tokens.
        source_tokens: how many tokens, at the beginning of its answers', an encoder reads; what is
            made of them depends on all of them, so none of them can be shared alone.
        limits: the parameters after defaults; None until the prompt is tokenized.
        answers: empty until the prompt is tokenized.
    """

    key: RequestKey
    params: SamplingParams
    arrived_at: float
    client: Hashable
    shares_with: Hashable = None
    constrained: bool = False
    embeds: bool = False
    source_tokens: int = 0
    limits: Limits | None = None
    answers: tuple[Answer, ...] = ()

    @property
    def deadline(self) -> float | None:
        """When it is given up, clock seconds; None if the client set no timeout."""
        timeout_s = self.params.timeout_s
        return None if timeout_s is None else self.arrived_at + timeout_s

    @property
    def reserved_tokens(self) -> int:
        """Positions of KV cache that one of its answers may grow to."""
        assert self.limits is not None
        return self.answers[0].num_prompt_tokens + self.limits.max_new_tokens

    def accept(
        self,
        prompt: Sequence[int],
        limits: Limits,
        *,
        number: int,
        mask: bytes = b"",
        start: Sequence[int] = (),
    ) -> None:
        """Create its answers.

        Args:
            prompt: token ids.
            number: of the first answer; the others have the following numbers.
            mask: which token may be their first; empty without a grammar.
            start: what answers of an encoder-decoder begin with, of which the prompt is the source.
        """
        self.limits = limits
        if start:
            self.source_tokens = len(prompt)
            source = hashlib.sha256(np.asarray(prompt, dtype=np.int32).tobytes()).digest()
            self.shares_with = (self.shares_with, source)
        tokens = [*prompt, *start]
        self.answers = tuple(
            Answer(
                self,
                number + choice,
                choice,
                list(tokens),
                len(tokens),
                sampling,
                mask=mask or None,
                shares=not self.embeds,  # what is shared has no hidden states here
            )
            for choice, sampling in enumerate(limits.sampling)
        )

    def usage(self) -> Usage:
        """Return its token counts."""
        return Usage(
            prompt_tokens=self.source_tokens or self.answers[0].num_prompt_tokens,
            completion_tokens=sum(answer.num_new_tokens for answer in self.answers),
            cached_tokens=self._cached_tokens,
        )

    @property
    def _cached_tokens(self) -> int:
        cached = self.answers[0].num_cached_tokens
        return min(cached, self.source_tokens) if self.source_tokens else cached

    def timings(self) -> Timings:
        """Return where its time went. Every answer must have a token."""
        started_at = min(a.started_at for a in self.answers if a.started_at is not None)
        first_at = min(a.first_token_at for a in self.answers if a.first_token_at is not None)
        decodes = [
            a.last_token_at - a.first_token_at
            for a in self.answers
            if a.first_token_at is not None and a.last_token_at is not None
        ]
        return Timings(
            queued_s=started_at - self.arrived_at,
            first_token_s=first_at - started_at,
            decode_s=max(decodes),
            stages=StageTimes.sums(answer.stage_times for answer in self.answers),
        )
