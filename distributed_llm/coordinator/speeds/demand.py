"""What is asked of a pipeline, as its steps show. Pure."""

import math
from dataclasses import dataclass

from distributed_llm.coordinator.serving.steps import StepDone
from distributed_llm.coordinator.speeds.work import Work


@dataclass(frozen=True)
class Demand:
    """What is asked of a pipeline, on average.

    Attributes:
        sequences: that decode at the same time.
        positions: of KV cache that each of them attends to.
        prompt_tokens: tokens of prompts that are computed per token that is answered.
        chunk_tokens: tokens of prompts in a step that has parts of them.
    """

    sequences: float
    positions: float
    prompt_tokens: float
    chunk_tokens: float

    @classmethod
    def expected(cls, num_workers: int) -> "Demand":
        """Return what to plan for before anything was asked: enough to keep all workers busy."""
        return cls(
            sequences=max(1, num_workers),
            positions=256,
            prompt_tokens=1,
            chunk_tokens=128,
        )

    def mean_step(self, sequences: float) -> Work:
        """Return an average step in which so many sequences decode."""
        return self._step(sequences, self.prompt_share(sequences))

    def step_kinds(self, sequences: float) -> tuple[Work, Work]:
        """Return a step without a part of a prompt, and one that has."""
        return self._step(sequences, 0.0), self._step(sequences, 1.0)

    def prompt_share(self, sequences: float) -> float:
        """Return the share of steps that have parts of prompts."""
        return min(1.0, sequences * self.prompt_tokens / max(1.0, self.chunk_tokens))

    def _step(self, sequences: float, prompts: float) -> Work:
        """Prompts are before their answers, so they attend to fewer positions, say half of them."""
        share = self.prompt_share(sequences)
        tokens = prompts * sequences * self.prompt_tokens / share if share else 0.0
        return Work(
            tokens=sequences,
            positions=sequences * self.positions,
            prompts=prompts,
            prompt_tokens=tokens,
            prompt_positions=tokens * self.positions / 2,
        )


_BELIEVED_S = (10.0, 40.0)
"""Seconds after the first step: until then, and from then on, in which what prompts are to answers
is taken from the lengths that requests may have, and from what was seen."""


class DemandMeter:
    """Means over the steps of a pipeline, of which the older ones count less and less.

    At first there are more prompts than later: whoever comes has one, and no answer yet. So they
    are compared with the answers that are to follow, as long as those may be.

    Args:
        half_life_s: after which a step counts half.
    """

    def __init__(self, half_life_s: float = 10.0) -> None:
        self._half_life_s = half_life_s
        self._at: float | None = None
        self._began_at = 0.0
        # Sums over steps, faded.
        self._sequences = 0.0
        self._sequences_s = 0.0
        self._answered = 0.0
        self._positions = 0.0
        self._prompt_tokens = 0.0
        self._promised = 0.0  # tokens of answers to these parts of prompts
        self._chunks = 0.0

    def observe(self, done: StepDone, *, decoding: int, now: float) -> None:
        """Take a step that has ended.

        Args:
            decoding: sequences that decode on the pipeline now, in this step or another.
            now: clock seconds.
        """
        if self._at is None:
            self._at = self._began_at = now
        elapsed_s = max(0.0, now - self._at)
        keep = math.exp2(-elapsed_s / self._half_life_s)
        answered = done.step.num_samples
        self._sequences = keep * self._sequences + elapsed_s * decoding
        self._sequences_s = keep * self._sequences_s + elapsed_s
        self._answered = keep * self._answered + answered
        ends = (part.start + part.num_tokens for part in done.step.slices if part.sample)
        self._positions = keep * self._positions + sum(ends)
        prompts = [part.num_tokens for part in done.step.slices if part.num_tokens > 1]
        self._prompt_tokens = keep * self._prompt_tokens + sum(prompts)
        self._promised = keep * self._promised + _promised(done)
        self._chunks = keep * self._chunks + bool(prompts)
        self._at = now

    @property
    def demand(self) -> Demand | None:
        """The load of late, None before any token was answered."""
        if not self._answered or not self._sequences_s:
            return None
        return Demand(
            sequences=max(1.0, self._sequences / self._sequences_s),
            positions=self._positions / self._answered,
            prompt_tokens=self._prompt_share(),
            chunk_tokens=self._prompt_tokens / self._chunks if self._chunks else 1.0,
        )

    def _prompt_share(self) -> float:
        """Return the tokens of prompts per token that is answered."""
        assert self._at is not None
        seen = self._prompt_tokens / self._answered
        if not self._promised:
            return seen
        first, last = _BELIEVED_S
        weight = min(1.0, max(0.0, (self._at - self._began_at - first) / (last - first)))
        return weight * seen + (1.0 - weight) * self._prompt_tokens / self._promised


def _promised(done: StepDone) -> float:
    """Return the tokens that may be answered to the parts of prompts in a step."""
    promised = 0.0
    for request, part in zip(done.step.requests, done.step.slices, strict=True):
        if part.num_tokens > 1:
            assert request.ticket.limits is not None
            share = part.num_tokens / request.num_prompt_tokens
            promised += share * request.ticket.limits.max_new_tokens
    return promised
