"""What is asked of a pipeline, as its steps show. Pure."""

import math

from distributed_llm.coordinator.forecast import Demand
from distributed_llm.coordinator.pipeline import StepDone


class DemandMeter:
    """Means over the steps of a pipeline, of which the older ones count less and less.

    Args:
        half_life_s: after which a step counts half.
    """

    def __init__(self, half_life_s: float = 10.0) -> None:
        self._half_life_s = half_life_s
        self._at = 0.0
        # Sums over steps, faded.
        self._sequences = 0.0
        self._sequences_s = 0.0
        self._answered = 0.0
        self._positions = 0.0
        self._prompt_tokens = 0.0
        self._chunks = 0.0

    def observe(self, done: StepDone, *, decoding: int, now: float) -> None:
        """Take a step that has ended.

        Args:
            decoding: sequences that decode on the pipeline now, in this step or another.
            now: clock seconds.
        """
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
            prompt_tokens=self._prompt_tokens / self._answered,
            chunk_tokens=self._prompt_tokens / self._chunks if self._chunks else 1.0,
        )
