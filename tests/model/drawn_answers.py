"""What transformers answers, greedily and by our draws, and whether answers are that.

A drawn token depends on logits, parameters, seed, position and the tokens before it. Where the
logits are those of transformers' own, unsplit model, one step after the other in `generate`, the
draws are what a cluster has to tell, whatever happened to it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from distributed_llm.common.sampling_params import Sampling
from distributed_llm.worker.model.sampler import sample

ONE_BY_ONE = {"rwkv"}
"""Model types of which transformers mixes up the texts of a batch."""

ROUNDING = 2e-4
"""By how much log-probabilities in float32 may differ between a cluster and transformers."""


class Told(NamedTuple):
    """An answer as it came.

    Attributes:
        token_ids: all of it.
        logprobs: how likely each of them is before parameters change that.
    """

    token_ids: list[int]
    logprobs: list[float]


class Expected(NamedTuple):
    """Answers of transformers.

    Attributes:
        before: int64 [answers, tokens], what the decoder was given first.
        token_ids: int64 [answers, new tokens].
        logits: float32 [answers, new tokens, vocabulary], before parameters change them.
        samplings: of the answers.
    """

    before: Tensor
    token_ids: Tensor
    logits: Tensor
    samplings: Sequence[Sampling]

    def check(self, told: Sequence[Told]) -> int:
        """Assert that answers are these; return how many of the drawn ones part at a near tie.

        Up to there, and where they do not part, tokens are the same and as likely.
        """
        return sum(self._parts(row, answer) for row, answer in enumerate(told))

    def _parts(self, row: int, told: Told) -> bool:
        expected = self.token_ids[row].tolist()
        count, parts = len(expected), False
        if told.token_ids != expected:
            pairs = zip(told.token_ids, expected, strict=True)
            count = next(at for at, (one, other) in enumerate(pairs) if one != other)
            parts = self._is_near_tie(row, count, told.token_ids[count])
            assert parts, f"answer {row} is {told.token_ids} and not {expected}, from {count} on"
        likely = self.logits[row, :count].log_softmax(-1).gather(1, self._column(row, count))
        logprobs = torch.tensor(told.logprobs[:count])
        torch.testing.assert_close(logprobs, likely[:, 0], rtol=0.0, atol=ROUNDING)
        return parts

    def _column(self, row: int, count: int) -> Tensor:
        return self.token_ids[row, :count, None]

    def _is_near_tie(self, row: int, at: int, other: int) -> bool:
        """Return whether another token is drawn here if logits are rounded in favour of it."""
        sampling, rounded = self.samplings[row], self.logits[row, at].clone()
        rounded[self.token_ids[row, at]] -= ROUNDING
        rounded[other] += ROUNDING
        history = torch.cat([self.before[row], self.token_ids[row, :at]])
        return not sampling.is_greedy and _next(rounded, sampling, history) == other


def answers_of_transformers(
    model: Any, prompts: Tensor, samplings: Sequence[Sampling], new_tokens: int
) -> Expected:
    """Return transformers' answers to prompts of one length, with tokens drawn by our sampler.

    Args:
        model: of transformers, float32.
        prompts: int64 [answers, tokens]; what an encoder reads, if there is one.
        samplings: of the answers.
        new_tokens: that each of them gets.
    """
    if model.config.model_type in ONE_BY_ONE and len(prompts) > 1:
        each = [
            answers_of_transformers(model, prompt[None], [sampling], new_tokens)
            for prompt, sampling in zip(prompts, samplings, strict=True)
        ]
        before, token_ids, logits = (
            torch.cat(parts) for parts in list(zip(*each, strict=True))[:3]
        )
        return Expected(before, token_ids, logits, samplings)
    scale = 1.0
    if hasattr(model.config, "text_config"):  # which the class for the whole model leaves out
        scale = getattr(model.config.text_config, "logit_scale", scale)
    made = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([_Draws(samplings, scale)]),
        output_logits=True,
        return_dict_in_generate=True,
    )
    before, token_ids = made.sequences[:, :-new_tokens], made.sequences[:, -new_tokens:]
    return Expected(before, token_ids, scale * torch.stack(made.logits, 1), samplings)


class _Draws(LogitsProcessor):
    """Leaves of the tokens that may be next the one that is drawn."""

    def __init__(self, samplings: Sequence[Sampling], scale: float) -> None:
        self._samplings = samplings
        self._scale = scale

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        left = torch.full_like(scores, -torch.inf)
        for row, sampling in enumerate(self._samplings):
            left[row, _next(self._scale * scores[row], sampling, input_ids[row])] = 0.0
        return left


def _next(logits: Tensor, sampling: Sampling, history: Tensor) -> int:
    """Return the token that comes after these."""
    before = history.to(torch.int32).numpy()
    return int(sample(logits[None], [sampling], [len(before)], [before]))
