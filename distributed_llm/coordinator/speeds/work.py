"""What a step computes in every layer, as numbers that its time is linear in. Pure."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from distributed_llm.common.messages import StageTrial
from distributed_llm.coordinator.serving.step import Step


@dataclass(frozen=True)
class Work:
    """What one step computes, or the average of many steps.

    Attributes:
        tokens: sequences that decode, one token each.
        positions: positions of KV cache that these attend to, summed.
        prompts: 1 if the step has prompt tokens, else 0; on average, the share of steps with them.
        prompt_tokens: tokens of prompts.
        prompt_positions: positions that these attend to, summed over the tokens.
    """

    tokens: float = 0.0
    positions: float = 0.0
    prompts: float = 0.0
    prompt_tokens: float = 0.0
    prompt_positions: float = 0.0

    @classmethod
    def of_prompt(cls, tokens: float, positions: float) -> "Work":
        """Return the work of a step with prompt tokens only."""
        return cls(prompts=1.0, prompt_tokens=tokens, prompt_positions=positions)

    @property
    def all_tokens(self) -> float:
        """Tokens of both kinds; so many activations cross each link."""
        return self.tokens + self.prompt_tokens

    @cached_property
    def vector(self) -> npt.NDArray[np.float64]:
        """The factors of the coefficients of a `SpeedFit`, float64 [6]."""
        decoding = (1.0, self.tokens, self.positions)
        return np.array((*decoding, self.prompts, self.prompt_tokens, self.prompt_positions))


def work_of(step: Step) -> Work:
    """Return what every layer computes in a step."""
    tokens = positions = prompt_tokens = prompt_positions = 0
    for part in step.slices:
        if part.num_tokens == 1:
            tokens += 1
            positions += part.start + 1
        else:
            prompt_tokens += part.num_tokens
            prompt_positions += _positions(part.start, part.num_tokens)
    return Work(tokens, positions, bool(prompt_tokens), prompt_tokens, prompt_positions)


def work_of_trial(trial: StageTrial) -> Work:
    """Return what every layer computed in a trial."""
    positions = trial.sequences * _positions(trial.start, trial.num_tokens)
    if trial.num_tokens == 1:
        return Work(trial.sequences, positions)
    return Work.of_prompt(trial.sequences * trial.num_tokens, positions)


def _positions(start: int, num_tokens: int) -> int:
    """Return the positions that each of some tokens after `start` others attends to, summed."""
    return num_tokens * start + num_tokens * (num_tokens + 1) // 2
