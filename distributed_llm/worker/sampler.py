"""Picks the next token: a pure function of logits, parameters, seed, position and history.

Logits are processed in float32, in transformers' order: repetition penalty, suppressed tokens,
temperature, top-k, top-p, min-p. What is left is a list of candidates and their probabilities.

The draw is an exponential race: candidate i gets a time -log(u_i) / p_i, the earliest wins, which
happens with probability p_i. u_i belongs to (seed, position, token id): it is number i of the
Philox generator with that key, which NumPy promises never to change. So the same probabilities give
the same token on every machine, in every batch, at every retry. Were the probabilities another
machine's, off in the last bits, the race would end otherwise only if its two first were that
close; searching a uniform number in the cumulated probabilities would err at every candidate's
border at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distributed_llm.common.sampling_params import Sampling
from distributed_llm.worker.kv_cache import TokenIds

_TOP_P_CANDIDATES = 1024
"""How many tokens nearly always hold `top_p` of the probability; finding them beats sorting all."""


@dataclass(frozen=True)
class Candidates:
    """Tokens that may be picked.

    Attributes:
        token_ids: [n] int64, distinct.
        probabilities: [n] float64, not normalised.
    """

    token_ids: npt.NDArray[np.int64]
    probabilities: npt.NDArray[np.float64]


def sample(
    logits: Tensor,
    samplings: Sequence[Sampling],
    positions: Sequence[int],
    histories: Sequence[TokenIds],
) -> Tensor:
    """Return one token per row.

    Args:
        logits: [n, vocab_size], finite.
        samplings: how to pick, by row.
        positions: which the picked tokens will have in their sequences, by row.
        histories: the tokens before them, by row; read only where there is a repetition penalty.

    Returns:
        int32 [n], on the CPU.
    """
    if all(_is_plain_argmax(sampling) for sampling in samplings):
        return logits.argmax(dim=-1).to("cpu", torch.int32)
    picked = [
        _sample_row(row, sampling, position, history)
        for row, sampling, position, history in zip(
            logits, samplings, positions, histories, strict=True
        )
    ]
    return torch.tensor(picked, dtype=torch.int32)


def process(logits: Tensor, sampling: Sampling, history: TokenIds) -> Tensor:
    """Return float32 [vocab_size]: logits after the penalties, before the temperature."""
    scores = logits.to(torch.float32, copy=True)
    if sampling.repetition_penalty != 1.0:
        seen = torch.from_numpy(np.unique(history).astype(np.int64)).to(scores.device)
        penalised = scores[seen]
        scores[seen] = torch.where(
            penalised < 0,
            penalised * sampling.repetition_penalty,
            penalised / sampling.repetition_penalty,
        )
    if sampling.suppressed:
        inside = [token for token in sampling.suppressed if token < len(scores)]
        scores[inside] = float("-inf")
    return scores


def candidates(scores: Tensor, sampling: Sampling) -> Candidates:
    """Return what temperature, top-k, top-p and min-p leave of `scores`, float32 [vocab_size]."""
    scores = scores / sampling.temperature
    if 0 < sampling.top_k < len(scores):
        # Not the k tokens of topk: tokens as likely as the last of them stay too.
        kept = (scores >= torch.topk(scores, sampling.top_k).values[-1]).nonzero()[:, 0]
    else:
        kept = torch.arange(len(scores), device=scores.device)
    probabilities = torch.softmax(scores[kept], dim=0)
    if sampling.top_p < 1:
        chosen = _nucleus(probabilities, sampling.top_p)
        kept, probabilities = kept[chosen], probabilities[chosen]
    if sampling.min_p > 0:
        chosen = probabilities >= sampling.min_p * probabilities.max()
        kept, probabilities = kept[chosen], probabilities[chosen]
    return Candidates(kept.cpu().numpy(), probabilities.cpu().numpy().astype(np.float64))


def draw(choice: Candidates, seed: int, position: int) -> int:
    """Return one of the candidates with its probability, the same for the same seed and position.

    Args:
        choice: at least one of them with a probability above 0.
        seed: of the request, below 2**63.
        position: which the token will have in its sequence.
    """
    key = np.array([seed, position], dtype=np.uint64)
    count = int(choice.token_ids.max()) + 1
    bits = np.random.Philox(key=key).random_raw(count)[choice.token_ids]
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # inside (0, 1)
    with np.errstate(divide="ignore"):  # a candidate of probability 0 never arrives
        times = -np.log(uniform) / choice.probabilities
    return int(choice.token_ids[np.argmin(times)])


def _is_plain_argmax(sampling: Sampling) -> bool:
    return (
        sampling.temperature == 0 and sampling.repetition_penalty == 1.0 and not sampling.suppressed
    )


def _sample_row(logits: Tensor, sampling: Sampling, position: int, history: TokenIds) -> int:
    scores = process(logits, sampling, history)
    if sampling.temperature == 0:
        return int(scores.argmax())
    return draw(candidates(scores, sampling), sampling.seed, position)


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Return the indices of the likeliest tokens that together reach `top_p`; at least one."""
    count = min(_TOP_P_CANDIDATES, len(probabilities))
    likeliest, indices = torch.topk(probabilities, count)
    before = likeliest.cumsum(0) - likeliest
    if count < len(probabilities) and float(before[-1]) < top_p:
        likeliest, indices = probabilities.sort(descending=True)
        before = likeliest.cumsum(0) - likeliest
    chosen = before < top_p
    chosen[0] = True
    return indices[chosen]
