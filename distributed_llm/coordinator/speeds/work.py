"""What a step computes in every layer, as numbers that its time is linear in. Pure."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from distributed_llm.common.messages import StageTrial
from distributed_llm.coordinator.serving.step import Step


@dataclass(frozen=True)
class Work:
    """What one step computes, or the average of many steps.

    An encoder-decoder reads sources, which are its prompts, in steps of their own: `prompts` and
    what follows is the work of its encoder layers, the rest that of its decoder layers. On average,
    a step that decodes stands for the share of a step with prompts that comes with it.

    Attributes:
        tokens: sequences that decode, one token each.
        positions: positions of KV cache that these attend to, summed.
        prompts: 1 if the step has prompt tokens, else 0; on average, the share of steps with them.
        prompt_tokens: tokens of prompts.
        prompt_positions: positions that these attend to, summed over the tokens.
        steps: 0 if the step is for sources of an encoder-decoder, else 1.
    """

    tokens: float = 0.0
    positions: float = 0.0
    prompts: float = 0.0
    prompt_tokens: float = 0.0
    prompt_positions: float = 0.0
    steps: float = 1.0

    @classmethod
    def of_prompt(cls, tokens: float, positions: float) -> "Work":
        """Return the work of a step with prompt tokens only."""
        return cls(prompts=1.0, prompt_tokens=tokens, prompt_positions=positions)

    @classmethod
    def of_source(cls, tokens: float, positions: float) -> "Work":
        """Return the work of a step in which an encoder reads sources."""
        return replace(cls.of_prompt(tokens, positions), steps=0.0)

    @property
    def is_source(self) -> bool:
        """Whether this is a step for sources of an encoder-decoder."""
        return not self.steps

    @property
    def reading(self) -> "Work":
        """The part that reads sources, of an encoder-decoder's work."""
        return replace(self, tokens=0.0, positions=0.0, steps=0.0)

    @property
    def answering(self) -> "Work":
        """The part that decodes, of an encoder-decoder's work."""
        return replace(self, prompts=0.0, prompt_tokens=0.0, prompt_positions=0.0)

    @property
    def all_tokens(self) -> float:
        """Tokens of both kinds; so many activations cross each link."""
        return self.tokens + self.prompt_tokens

    @cached_property
    def vector(self) -> npt.NDArray[np.float64]:
        """The factors of the coefficients of a `SpeedFit`, float64 [6]."""
        decoding = (self.steps, self.tokens, self.positions)
        return np.array((*decoding, self.prompts, self.prompt_tokens, self.prompt_positions))


def work_of(step: Step) -> Work:
    """Return what every layer that has to do with a step computes in it.

    Each token of a source attends to the whole of it. Tokens of an encoder-decoder's answer that
    are computed again count like tokens of as many sequences, for decoder layers read no prompts.
    """
    if step.is_source:
        lengths = [part.num_tokens for part in step.slices]
        return Work.of_source(sum(lengths), sum(length * length for length in lengths))
    tokens = positions = prompt_tokens = prompt_positions = 0
    for part in step.slices:
        if part.num_tokens == 1 or part.source:
            tokens += part.num_tokens
            positions += _positions(part.start, part.num_tokens)
        else:
            prompt_tokens += part.num_tokens
            prompt_positions += _positions(part.start, part.num_tokens)
    return Work(tokens, positions, bool(prompt_tokens), prompt_tokens, prompt_positions)


def work_of_trial(trial: StageTrial) -> Work:
    """Return what every layer that has to do with a trial computed in it."""
    if trial.is_source:
        tokens = trial.sequences * trial.num_tokens
        return Work.of_source(tokens, tokens * trial.num_tokens)
    positions = trial.sequences * _positions(trial.start, trial.num_tokens)
    if trial.num_tokens == 1:
        return Work(trial.sequences, positions)
    return Work.of_prompt(trial.sequences * trial.num_tokens, positions)


def _positions(start: int, num_tokens: int) -> int:
    """Return the positions that each of some tokens after `start` others attends to, summed."""
    return num_tokens * start + num_tokens * (num_tokens + 1) // 2
