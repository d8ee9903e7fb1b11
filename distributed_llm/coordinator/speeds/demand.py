"""Demand: what clients ask of a pipeline, measured from its steps. Pure."""

import math
from dataclasses import dataclass

from distributed_llm.common.messages import SequenceSlice
from distributed_llm.coordinator.serving.steps import StepDone
from distributed_llm.coordinator.speeds.work import Work


@dataclass(frozen=True)
class Demand:
    """What clients ask of a pipeline, on average.

    Attributes:
        sequences: that decode at the same time.
        positions: of KV cache to which each of them attends.
        prompt_tokens: prompt tokens per token of an answer.
        chunk_tokens: prompt tokens in a step that has any.
    """

    sequences: float
    positions: float
    prompt_tokens: float
    chunk_tokens: float

    @classmethod
    def expected(cls, num_workers: int) -> "Demand":
        """Return the demand to plan for before there are requests: a sequence per worker."""
        return cls(
            sequences=max(1, num_workers),
            positions=256,
            prompt_tokens=1,
            chunk_tokens=128,
        )

    def mean_step(self, sequences: float) -> Work:
        """Return the average step in which `sequences` sequences decode."""
        return self._step(sequences, self.prompt_share(sequences))

    def step_kinds(self, sequences: float) -> tuple[Work, Work]:
        """Return a step without prompt tokens, and one with."""
        return self._step(sequences, 0.0), self._step(sequences, 1.0)

    def prompt_share(self, sequences: float) -> float:
        """Return the share of steps with prompt tokens."""
        return min(1.0, sequences * self.prompt_tokens / max(1.0, self.chunk_tokens))

    def _step(self, sequences: float, prompts: float) -> Work:
        """Return the mean step where `sequences` decode and a share `prompts` has prompt tokens.

        Prompts come before answers, so their tokens attend to about half of the positions.
        """
        share = self.prompt_share(sequences)
        tokens = prompts * sequences * self.prompt_tokens / share if share else 0.0
        return Work(
            tokens=sequences,
            positions=sequences * self.positions,
            prompts=prompts,
            prompt_tokens=tokens,
            prompt_positions=tokens * self.positions / 2,
        )


_PROMISED_UNTIL_S = 10.0
"""Seconds after the first step until which answers count at the greatest length requests allow."""

_MEASURED_FROM_S = 40.0
"""Seconds after the first step from which answers count as measured; between, a mixture does."""


class DemandMeter:
    """Measures demand: fading means over the steps of a pipeline.

    At first there are more prompt tokens per token of an answer than later, since a request begins
    with its prompt. So at first prompt tokens are divided by the tokens of the answers that are to
    follow, at the length that requests allow.

    Args:
        half_life_s: time after which a step counts half.
    """

    def __init__(self, half_life_s: float = 10.0) -> None:
        self._half_life_s = half_life_s
        self._at: float | None = None
        self._began_at = 0.0
        # Fading sums over steps.
        self._sequences = 0.0
        self._sequences_s = 0.0
        self._answered = 0.0
        self._positions = 0.0
        self._prompt_tokens = 0.0
        self._promised = 0.0  # tokens of answers that may follow these prompt tokens
        self._chunks = 0.0

    def observe(self, done: StepDone, *, decoding: int, now: float) -> None:
        """Learn from a step that has ended.

        Args:
            done: the step.
            decoding: sequences that decode on the pipeline now, in any step.
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
        prompts = [part.num_tokens for part in done.step.slices if _is_prompt(part)]
        self._prompt_tokens = keep * self._prompt_tokens + sum(prompts)
        self._promised = keep * self._promised + _promised(done)
        self._chunks = keep * self._chunks + bool(prompts)
        self._at = now

    @property
    def demand(self) -> Demand | None:
        """The recent demand, None before the first token of an answer."""
        if not self._answered or not self._sequences_s:
            return None
        return Demand(
            sequences=max(1.0, self._sequences / self._sequences_s),
            positions=self._positions / self._answered,
            prompt_tokens=self._prompt_tokens_per_answered(),
            chunk_tokens=self._prompt_tokens / self._chunks if self._chunks else 1.0,
        )

    def _prompt_tokens_per_answered(self) -> float:
        """Return the prompt tokens per token of an answer."""
        assert self._at is not None
        measured = self._prompt_tokens / self._answered
        if not self._promised:
            return measured
        elapsed_s = self._at - self._began_at - _PROMISED_UNTIL_S
        weight = min(1.0, max(0.0, elapsed_s / (_MEASURED_FROM_S - _PROMISED_UNTIL_S)))
        return weight * measured + (1.0 - weight) * self._prompt_tokens / self._promised


def _is_prompt(part: SequenceSlice) -> bool:
    """Return whether tokens are of a prompt: several at once, or of an encoder-decoder a source."""
    return part.is_source if part.source else part.num_tokens > 1


def _promised(done: StepDone) -> float:
    """Return the tokens of answers that may follow the prompt tokens of a step."""
    promised = 0.0
    for answer, part in zip(done.step.answers, done.step.slices, strict=True):
        if _is_prompt(part):
            assert answer.request.limits is not None
            share = part.num_tokens / answer.num_prompt_tokens
            promised += share * answer.request.limits.max_new_tokens
    return promised
