"""One request's life: parameters after defaults, tokens so far, when it ends. Pure.

A client's request is a `Ticket`. Once its prompt is known, each of its `n` answers is a `Request`:

    waiting -> running -> closing -> gone

It can go from any phase to `gone`: by an error, or because its client is gone; and from running
back to waiting, when it gives its KV cache up. It is `closing` once its last token is known, until
the text of that token is known too. The tokens are kept here and nowhere else: whatever a worker
loses is computed again from them.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, TypeVar

from distributed_llm.common.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    NotEnoughMemory,
)
from distributed_llm.common.messages import (
    MAX_STAGES,
    FinishReason,
    Generate,
    RequestId,
    SharedPrefix,
    StageTime,
    StageTiming,
    Timings,
    TokenLogprobs,
    Usage,
)
from distributed_llm.common.sampling_params import MAX_SEED, Sampling, SamplingParams
from distributed_llm.common.types import KV_BLOCK, LayerRange, PeerId, WorkerId

DEFAULT_MAX_NEW_TOKENS = 256

_MAX_BYTES_PER_TOKEN = 64
"""Of a prompt; no text comes near it on average, so what is longer need not be tokenized."""
_MIN_PROMPT_BYTES = 64 * 1024

T = TypeVar("T")

RequestKey = tuple[PeerId, RequestId, int]
"""Names a ticket for good: clients choose ids, and may use them again; the number is ours."""


class Phase(Enum):
    """Where a request is in its life."""

    WAITING = auto()
    RUNNING = auto()
    CLOSING = auto()
    GONE = auto()


@dataclass(frozen=True)
class GenerationDefaults:
    """What the checkpoint says about generation.

    Attributes:
        context_length: positions that prompt and answer may take together.
        eos_token_ids: tokens that end an answer.
        params: values for what a request leaves open.
    """

    context_length: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    params: SamplingParams


def generation_defaults(
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any],
    *,
    context_length: int,
    vocab_size: int,
) -> GenerationDefaults:
    """Return the defaults in a checkpoint's config.json and generation_config.json.

    As in transformers, sampling parameters count only if `do_sample` is true. What is no token of
    the vocabulary (some files say -1) ends nothing.

    Raises:
        InvalidRequest: a value in the files is out of range.
    """
    eos = generation_config.get("eos_token_id", config.get("eos_token_id"))
    eos_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    eos_ids = tuple(token for token in eos_ids if 0 <= token < vocab_size)
    names = ["max_new_tokens", "min_new_tokens", "repetition_penalty"]
    values: dict[str, Any] = {"temperature": 0.0}
    if generation_config.get("do_sample"):
        values["temperature"] = 1.0
        names += ["temperature", "top_k", "top_p", "min_p"]
    for name in names:
        if generation_config.get(name) is not None:
            values[name] = generation_config[name]
    params = SamplingParams.from_arguments(values)
    return GenerationDefaults(context_length, vocab_size, eos_ids, params)


@dataclass(frozen=True)
class Limits:
    """The parameters of one request after defaults.

    Attributes:
        sampling: of each answer, as a task carries it.
        eos_token_ids: tokens that end the answer; empty if they are ignored.
    """

    sampling: tuple[Sampling, ...]
    max_new_tokens: int
    eos_token_ids: tuple[int, ...]


def wrong_prompt(message: Generate, context_length: int) -> InvalidRequest | None:
    """Return why the prompt of `message` cannot be right, before it is tokenized."""
    wanted = "int32" if message.prompt == "token_ids" else "uint8"
    limit = max(_MIN_PROMPT_BYTES, _MAX_BYTES_PER_TOKEN * context_length)
    for spec in message.tensors:
        if spec.dtype != wanted:
            return InvalidRequest(f"A {message.prompt} prompt travels as {wanted}, not {spec}.")
        if spec.nbytes > limit:
            return ContextLengthExceeded(
                f"The prompt has {spec.nbytes} bytes, which no context of {context_length} tokens "
                "can hold. Shorten it."
            )
    return None


def resolve(
    params: SamplingParams,
    defaults: GenerationDefaults,
    *,
    prompt_tokens: int,
    kv_tokens: int,
    seed: int,
) -> Limits:
    """Return the parameters of a request with `prompt_tokens` tokens.

    Args:
        params: as the user gave them.
        defaults: of the checkpoint.
        prompt_tokens: length of the prompt.
        kv_tokens: positions that a pipeline has room for.
        seed: used if the user gave none.

    Raises:
        ContextLengthExceeded: prompt and answer do not fit the model.
        NotEnoughMemory: they do not fit the cluster.
        InvalidRequest: the parameters contradict one another.
    """
    if prompt_tokens == 0:
        raise InvalidRequest("The prompt is empty. Give at least one token.")
    kv_tokens -= kv_tokens % KV_BLOCK
    room = min(defaults.context_length, kv_tokens) - prompt_tokens
    usual = defaults.params.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
    max_new_tokens = params.max_new_tokens or max(1, min(usual, room))
    total = prompt_tokens + max_new_tokens
    if total > defaults.context_length:
        raise ContextLengthExceeded(
            f"The prompt has {prompt_tokens} tokens and the answer may have {max_new_tokens}; "
            f"together {total} exceed the model's context of {defaults.context_length}. Shorten "
            "the prompt or lower max_new_tokens."
        )
    if total > kv_tokens:
        raise NotEnoughMemory(
            f"Prompt and answer may take {total} positions, but the workers' memory has room for "
            f"{kv_tokens}. Add a worker, raise --max-memory, or lower max_new_tokens."
        )
    usual = min(defaults.params.min_new_tokens or 0, max_new_tokens)
    min_new_tokens = usual if params.min_new_tokens is None else params.min_new_tokens
    if min_new_tokens > max_new_tokens:
        raise InvalidRequest(
            f"min_new_tokens ({min_new_tokens}) is above max_new_tokens ({max_new_tokens})."
        )
    eos = defaults.eos_token_ids if params.eos_token_id is None else params.eos_token_id
    eos = () if params.ignore_eos else eos
    first = params.seed if params.seed is not None else seed
    return Limits(
        sampling=tuple(
            Sampling(
                **_shaping(params, defaults.params),
                presence_penalty=params.presence_penalty,
                frequency_penalty=params.frequency_penalty,
                logit_bias=tuple(params.logit_bias.items()),
                seed=(first + choice) % (MAX_SEED + 1),
                prompt_tokens=prompt_tokens,
                suppressed=eos if min_new_tokens else (),
                suppressed_before=prompt_tokens + min_new_tokens,
                logprobs=params.logprobs,
            )
            for choice in range(params.n)
        ),
        max_new_tokens=max_new_tokens,
        eos_token_ids=eos,
    )


def _shaping(params: SamplingParams, defaults: SamplingParams) -> dict[str, Any]:
    temperature = params.temperature
    if temperature is None:
        temperature = defaults.temperature or 0.0
        shaped = any(x is not None for x in (params.top_k, params.top_p, params.min_p))
        if shaped and temperature == 0.0:
            temperature = 1.0  # who shapes the distribution wants to sample from it
    penalty = _first(params.repetition_penalty, defaults.repetition_penalty)
    return {
        "temperature": temperature,
        "top_k": _first(params.top_k, defaults.top_k) or 0,
        "top_p": _first(params.top_p, defaults.top_p) or 1.0,
        "min_p": _first(params.min_p, defaults.min_p) or 0.0,
        "repetition_penalty": penalty or 1.0,
    }


def _first(given: T | None, default: T | None) -> T | None:
    return default if given is None else given


@dataclass(frozen=True)
class Seat:
    """A worker and the layers that it serves."""

    peer: PeerId
    worker: WorkerId
    layers: LayerRange


@dataclass
class Spent:
    """What the stages of one plan did for a request: steps, and time of each stage."""

    seats: Sequence[Seat]
    compute_us: list[int]
    tasks: int = 0


@dataclass(eq=False)
class Request:
    """One answer to a client's request, and what has come of it.

    Attributes:
        ticket: what the client asked for.
        number: of all answers, in the order of arrival.
        choice: which of the ticket's answers.
        token_ids: prompt and answer so far.
        sequence_id: names its KV cache to the workers; None while it has none. Never used twice.
        num_computed_tokens: how many of its tokens are in the KV cache of every stage.
        num_scheduled_tokens: how many will be when the steps that are under way have ended.
        num_in_flight: how many these steps are.
        sampling_sent: the last stage knows how to pick its tokens.
        prefix: what its sequence begins as, if that was another's.
        shares: it may begin as another sequence.
        waits_for: another request, which computes what this one is going to share, up to
            position `waits_until`.
        losses: how many workers died while they worked on its next token.
        failures: how many steps for its next token failed.
        alone: it is suspected of breaking steps, and runs without company until its next token.
        logprobs: of the tokens of the answer, if they were asked for.
        started_at: time of its first step, clock seconds; likewise the others.
        stages: what they computed for it, by the epoch of their plan.
    """

    ticket: "Ticket"
    number: int
    choice: int
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: Sampling
    phase: Phase = Phase.WAITING
    sequence_id: int | None = None
    num_computed_tokens: int = 0
    num_scheduled_tokens: int = 0
    num_in_flight: int = 0
    num_cached_tokens: int = 0
    sampling_sent: bool = False
    prefix: SharedPrefix | None = None
    shares: bool = True
    waits_for: "Request | None" = None
    waits_until: int = 0
    losses: int = 0
    failures: int = 0
    alone: bool = False
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_sent_tokens: int = 0
    started_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    stages: dict[int, Spent] = field(default_factory=dict)

    @property
    def num_new_tokens(self) -> int:
        """Tokens of the answer so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_unscheduled_tokens(self) -> int:
        """Tokens that no step computes yet."""
        return len(self.token_ids) - self.num_scheduled_tokens

    @property
    def sampling_bytes(self) -> int:
        """About what its parameters take in a message; 0 once they are known."""
        return 0 if self.sampling_sent else 300 + 16 * len(self.sampling.logit_bias)

    def reset(self) -> None:
        """Forget what is computed; no token of its answer changes."""
        self.sequence_id = self.prefix = self.waits_for = None
        self.num_computed_tokens = self.num_scheduled_tokens = self.num_in_flight = 0
        self.sampling_sent = False

    def clear(self) -> None:
        """Clear it of suspicion."""
        self.alone = False
        self.losses = self.failures = 0

    def append(self, token_id: int, logprobs: TokenLogprobs | None, *, now: float) -> None:
        """Take the next token of the answer; it may end the answer."""
        limits = self.ticket.limits
        assert limits is not None
        self.token_ids.append(token_id)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        self.first_token_at = now if self.first_token_at is None else self.first_token_at
        self.last_token_at = now
        if token_id in limits.eos_token_ids:
            self.finish_reason = "stop"
        elif self.num_new_tokens >= limits.max_new_tokens:
            self.finish_reason = "length"

    def add_stage_times(
        self, epoch: int, seats: Sequence[Seat], timings: Sequence[StageTime]
    ) -> None:
        """Count a step that this request was part of, on all stages of a plan."""
        spent = self.stages.get(epoch)
        if spent is None:
            spent = self.stages[epoch] = Spent(seats, [0] * len(seats))
        spent.tasks += 1
        for stage, timing in enumerate(timings):
            spent.compute_us[stage] += timing.compute_us


@dataclass(eq=False)
class Ticket:
    """What a client asked for: one prompt, `params.n` answers.

    Attributes:
        key: its client, the id that the client chose, and a number of ours.
        arrived_at: clock seconds.
        requests: its answers; none before the prompt is known.
    """

    key: RequestKey
    params: SamplingParams
    arrived_at: float
    limits: Limits | None = None
    requests: tuple[Request, ...] = ()

    @property
    def deadline(self) -> float | None:
        """When it is given up, clock seconds, or None."""
        timeout_s = self.params.timeout_s
        return None if timeout_s is None else self.arrived_at + timeout_s

    @property
    def reserved_tokens(self) -> int:
        """Positions of KV cache that one of its answers may come to need."""
        assert self.limits is not None
        return self.requests[0].num_prompt_tokens + self.limits.max_new_tokens

    def accept(self, prompt: Sequence[int], limits: Limits, *, number: int) -> None:
        """Take the prompt's token ids; its answers are numbered from `number` on."""
        self.limits = limits
        self.requests = tuple(
            Request(self, number + choice, choice, list(prompt), len(prompt), sampling)
            for choice, sampling in enumerate(limits.sampling)
        )

    def usage(self) -> Usage:
        """Return its token counts."""
        return Usage(
            prompt_tokens=self.requests[0].num_prompt_tokens,
            completion_tokens=sum(request.num_new_tokens for request in self.requests),
            cached_tokens=self.requests[0].num_cached_tokens,
        )

    def timings(self) -> Timings:
        """Return where its time went; call it once all answers have a token."""
        started_at = min(r.started_at for r in self.requests if r.started_at is not None)
        first_at = min(r.first_token_at for r in self.requests if r.first_token_at is not None)
        decodes = [
            r.last_token_at - r.first_token_at
            for r in self.requests
            if r.first_token_at is not None and r.last_token_at is not None
        ]
        return Timings(
            queued_s=started_at - self.arrived_at,
            first_token_s=first_at - started_at,
            decode_s=max(decodes),
            stages=_stage_timings(self.requests),
        )


def _stage_timings(requests: Iterable[Request]) -> tuple[StageTiming, ...]:
    """Return what each stage did; a task is counted for each of the answers in it."""
    tasks: Counter[tuple[WorkerId, LayerRange]] = Counter()
    compute_us: Counter[tuple[WorkerId, LayerRange]] = Counter()
    for request in requests:
        for spent in request.stages.values():
            for seat, microseconds in zip(spent.seats, spent.compute_us, strict=True):
                tasks[seat.worker, seat.layers] += spent.tasks
                compute_us[seat.worker, seat.layers] += microseconds
    timings = [
        StageTiming(
            worker=stage[0], layers=stage[1], tasks=number, compute_s=compute_us[stage] / 1e6
        )
        for stage, number in tasks.items()
    ]
    return tuple(sorted(timings, key=lambda timing: timing.layers))[:MAX_STAGES]
