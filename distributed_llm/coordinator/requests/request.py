"""One request's life: parameters after defaults, tokens so far, when it ends. Pure.

A client's request is a `Ticket`. Once its prompt is known, each of its `n` answers is a `Request`:

    waiting -> running -> closing -> gone

It can go from any phase to `gone`: by an error, or because its client is gone; and from running
back to waiting, when it gives its KV cache up. It is `closing` once its last token is known, until
the text of that token is known too. The tokens are kept here and nowhere else: whatever a worker
loses is computed again from them.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from distributed_llm.common.messages import (
    MAX_STAGES,
    FinishReason,
    SharedPrefix,
    StageTime,
    StageTiming,
    Timings,
    TokenLogprobs,
    Usage,
)
from distributed_llm.common.sampling_params import Sampling, SamplingParams
from distributed_llm.common.types import LayerRange, WorkerId
from distributed_llm.coordinator.events import RequestKey
from distributed_llm.coordinator.plan import PipelineStage
from distributed_llm.coordinator.requests.parameters import Limits


class Phase(Enum):
    """Where a request is in its life."""

    WAITING = auto()
    RUNNING = auto()
    CLOSING = auto()
    GONE = auto()


@dataclass
class Spent:
    """What the stages of one plan did for a request: steps, and time of each stage."""

    stages: Sequence[PipelineStage]
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
        self, epoch: int, stages: Sequence[PipelineStage], timings: Sequence[StageTime]
    ) -> None:
        """Count a step that this request was part of, on all stages of a plan."""
        spent = self.stages.get(epoch)
        if spent is None:
            spent = self.stages[epoch] = Spent(stages, [0] * len(stages))
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
            for stage, microseconds in zip(spent.stages, spent.compute_us, strict=True):
                tasks[stage.worker, stage.layers] += spent.tasks
                compute_us[stage.worker, stage.layers] += microseconds
    timings = [
        StageTiming(
            worker=stage[0], layers=stage[1], tasks=number, compute_s=compute_us[stage] / 1e6
        )
        for stage, number in tasks.items()
    ]
    return tuple(sorted(timings, key=lambda timing: timing.layers))[:MAX_STAGES]
