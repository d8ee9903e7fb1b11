"""One request's life: parameters after defaults, tokens so far, when it ends. Pure.

    tokenizing -> waiting -> running -> closing -> gone

It can go from any phase to `gone`: by an error, or because its client is gone. It is `closing`
once its last token is known, until the text of that token is known too. The tokens of a request
are kept here and nowhere else: whatever a worker loses is computed again from them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, TypeVar

import msgspec

from distributed_llm.common.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    NotEnoughMemory,
)
from distributed_llm.common.messages import (
    FinishReason,
    RequestId,
    StageTiming,
    Timings,
    Usage,
)
from distributed_llm.common.sampling_params import Sampling, SamplingParams
from distributed_llm.common.types import LayerRange, PeerId, WorkerId

DEFAULT_MAX_NEW_TOKENS = 256

T = TypeVar("T")

RequestKey = tuple[PeerId, RequestId, int]
"""Names a request for good: clients choose ids, and may use them again; the number is ours."""


class Phase(Enum):
    """Where a request is in its life."""

    TOKENIZING = auto()
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
        sampling: as a task carries it, without `suppressed`.
        eos_token_ids: tokens that end the answer; empty if they are ignored.
    """

    sampling: Sampling
    max_new_tokens: int
    min_new_tokens: int
    eos_token_ids: tuple[int, ...]


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
        kv_tokens: positions that the cluster has room for.
        seed: used if the user gave none.

    Raises:
        ContextLengthExceeded: prompt and answer do not fit the model.
        NotEnoughMemory: they do not fit the cluster.
        InvalidRequest: the parameters contradict one another.
    """
    if prompt_tokens == 0:
        raise InvalidRequest("The prompt is empty. Give at least one token.")
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
    return Limits(
        sampling=_sampling(params, defaults.params, seed),
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        eos_token_ids=() if params.ignore_eos else eos,
    )


def _sampling(params: SamplingParams, defaults: SamplingParams, seed: int) -> Sampling:
    temperature = params.temperature
    if temperature is None:
        temperature = defaults.temperature or 0.0
        shaped = any(x is not None for x in (params.top_k, params.top_p, params.min_p))
        if shaped and temperature == 0.0:
            temperature = 1.0  # who shapes the distribution wants to sample from it
    return Sampling(
        temperature=temperature,
        top_k=_first(params.top_k, defaults.top_k) or 0,
        top_p=_first(params.top_p, defaults.top_p) or 1.0,
        min_p=_first(params.min_p, defaults.min_p) or 0.0,
        repetition_penalty=_first(params.repetition_penalty, defaults.repetition_penalty) or 1.0,
        seed=seed if params.seed is None else params.seed,
    )


def _first(given: T | None, default: T | None) -> T | None:
    return default if given is None else given


@dataclass
class Request:
    """A request and what has come of it.

    Attributes:
        key: its client, the id that the client chose, and `sequence_id`.
        sequence_id: names it to the workers; never used twice.
        token_ids: prompt and answer so far.
        num_computed_tokens: how many of them are in the KV cache of every stage.
        losses: how many workers died while they worked on its next token.
        failures: how many steps for its next token failed.
        alone: it is suspected of breaking steps, and runs without company until its next token.
        started_at: time of its first step, clock seconds; likewise the others.
    """

    key: RequestKey
    sequence_id: int
    params: SamplingParams
    arrived_at: float
    phase: Phase = Phase.TOKENIZING
    limits: Limits | None = None
    token_ids: list[int] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_computed_tokens: int = 0
    in_flight: bool = False
    losses: int = 0
    failures: int = 0
    alone: bool = False
    finish_reason: FinishReason | None = None
    num_sent_tokens: int = 0
    started_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    stages: dict[tuple[WorkerId, LayerRange], StageTiming] = field(default_factory=dict)

    @property
    def num_new_tokens(self) -> int:
        """Tokens of the answer so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def reserved_tokens(self) -> int:
        """Positions of KV cache that it may come to need."""
        assert self.limits is not None
        return self.num_prompt_tokens + self.limits.max_new_tokens

    def accept(self, prompt: Sequence[int], limits: Limits) -> None:
        """Take the prompt's token ids and wait."""
        self.token_ids = list(prompt)
        self.num_prompt_tokens = len(prompt)
        self.limits = limits
        self.phase = Phase.WAITING

    def next_sampling(self) -> Sampling:
        """Return how its next token is to be picked."""
        limits = self.limits
        assert limits is not None
        if self.num_new_tokens >= limits.min_new_tokens or not limits.eos_token_ids:
            return limits.sampling
        return msgspec.structs.replace(limits.sampling, suppressed=limits.eos_token_ids)

    def append(self, token_id: int, *, now: float) -> None:
        """Take the next token of the answer; it may end the answer."""
        limits = self.limits
        assert limits is not None
        self.token_ids.append(token_id)
        self.first_token_at = now if self.first_token_at is None else self.first_token_at
        self.last_token_at = now
        if token_id in limits.eos_token_ids:
            self.finish_reason = "stop"
        elif self.num_new_tokens >= limits.max_new_tokens:
            self.finish_reason = "length"

    def add_stage_time(self, worker: WorkerId, layers: LayerRange, compute_s: float) -> None:
        """Count one task of a stage that this request was part of."""
        before = self.stages.get((worker, layers))
        self.stages[worker, layers] = StageTiming(
            worker=worker,
            layers=layers,
            tasks=1 + (before.tasks if before else 0),
            compute_s=compute_s + (before.compute_s if before else 0.0),
        )

    def usage(self) -> Usage:
        """Return its token counts."""
        return Usage(prompt_tokens=self.num_prompt_tokens, completion_tokens=self.num_new_tokens)

    def timings(self) -> Timings:
        """Return where its time went; call it once it has a token."""
        assert self.started_at is not None
        assert self.first_token_at is not None
        assert self.last_token_at is not None
        return Timings(
            queued_s=self.started_at - self.arrived_at,
            first_token_s=self.first_token_at - self.started_at,
            decode_s=self.last_token_at - self.first_token_at,
            stages=tuple(sorted(self.stages.values(), key=lambda s: s.layers))[:256],
        )
