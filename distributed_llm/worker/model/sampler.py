"""Samples the next token: a pure function of logits, parameters, seed, position and history.

Logits are processed in float32, in the order of transformers, with the penalties that transformers
lacks where vLLM has them: logit bias, repetition penalty, presence and frequency penalty, tokens
suppressed before the minimum number of new tokens, temperature, top-k, top-p, min-p. The result is
a list of candidates with their probabilities.

The draw is an exponential race (the Gumbel-max trick in another form): candidate i arrives at time
-log(u_i) / p_i for a uniform u_i, and is the first with probability p_i. It is run in two heats,
because the first of a group arrives like one candidate with the sum of the group's probabilities:
the first heat is between groups of 256 consecutive token ids, the second within the group that won.
So a few hundred numbers are drawn instead of one for each token (4 ms instead of 17 for 16
sequences with a vocabulary of 128,000, without top-k and top-p).

u_i depends on (seed, position, group) or (seed, position, token id) alone. It is an element of the
sequence of the counter-based Philox generator with the key (seed, position), which NumPy guarantees
not to change. So the same probabilities give the same token on every machine, in every batch and at
every retry. If the probabilities differ in the last bits, as between machines, the result differs
only if the first two arrivals are that close. (A search in the cumulated probabilities would be
affected by an error at any candidate before the one found.)

Everything but plain argmax is computed on the CPU, wherever the logits are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from distributed_llm.common.sampling_params import Sampling
from distributed_llm.worker.kv.segments import TokenIds

FloatRow = npt.NDArray[np.float32]

_GROUP = 256
"""Consecutive token ids in one group of the draw."""

_SECOND_HEAT = 2**32
"""Position of the second heat's numbers in the generator's sequence, in blocks of four numbers."""

_TOP_GROUP = 128
"""Values in each group whose maxima `_largest` compares first."""


@dataclass(frozen=True)
class Candidates:
    """Tokens that may be sampled.

    Attributes:
        token_ids: [n] int64, ascending.
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
    """Sample one token per row.

    Args:
        logits: [n, vocab_size], finite.
        samplings: parameters, by row.
        positions: of the sampled tokens in their sequences, by row.
        histories: the tokens before them, int32, by row; used by penalties alone.

    Returns:
        int32 [n], on the CPU.
    """
    rows = [row for row, s in enumerate(samplings) if not _is_plain_argmax(s, positions[row])]
    if len(rows) < len(samplings):
        # argmax of bfloat16 takes torch five times as long as argmax of float32.
        token_ids = logits.float().argmax(dim=-1).to("cpu", torch.int32)
    else:
        token_ids = torch.empty(len(samplings), dtype=torch.int32)
    if rows:
        scores = logits[rows].to("cpu", torch.float32).numpy()
        for row, own in zip(rows, scores, strict=True):
            token_ids[row] = _sample_row(own, samplings[row], positions[row], histories[row])
    return token_ids


def log_probabilities(logits: Tensor, token_ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of the sampled and of the likeliest tokens, without any processing.

    Args:
        logits: [n, vocab_size].
        token_ids: int32 [n], the sampled tokens.
        count: of likeliest tokens; at most the vocabulary is returned.

    Returns:
        Natural logarithms, float32 [n, 1 + count], and the token ids that they belong to, int32 of
        the same shape, both on the CPU. The sampled token comes first, then the likeliest, best
        first.
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    picked = token_ids.to(logprobs.device, torch.int64)[:, None]
    likeliest = _largest(logprobs, min(count, logprobs.shape[-1]))
    ids = torch.cat([picked, likeliest], dim=-1)
    return logprobs.gather(-1, ids).cpu(), ids.to("cpu", torch.int32)


def process(scores: FloatRow, sampling: Sampling, position: int, history: TokenIds) -> None:
    """Apply bias, penalties and suppressed tokens to logits [vocab_size], in place.

    Token ids beyond the vocabulary are ignored.
    """
    for token, bias in sampling.logit_bias:
        if token < len(scores):
            scores[token] += bias
    if sampling.repetition_penalty != 1.0:
        # A token that occurs twice is written twice, with the same value.
        old = scores[history]
        scores[history] = np.where(
            old < 0, old * sampling.repetition_penalty, old / sampling.repetition_penalty
        )
    if sampling.presence_penalty or sampling.frequency_penalty:
        said, counts = np.unique(history[sampling.prompt_tokens :], return_counts=True)
        counts = counts.astype(np.float32)
        scores[said] -= sampling.frequency_penalty * counts + sampling.presence_penalty
    if position < sampling.suppressed_before:
        scores[[token for token in sampling.suppressed if token < len(scores)]] = -np.inf


def candidates(scores: FloatRow, sampling: Sampling) -> Candidates:
    """Return the tokens that temperature, top-k, top-p and min-p leave of `scores` [vocab_size]."""
    scores = scores / np.float32(sampling.temperature)
    token_ids = np.arange(len(scores))
    if 0 < sampling.top_k < len(scores):
        # As in transformers, tokens that tie with the k-th likeliest stay too.
        last = len(scores) - sampling.top_k
        token_ids = np.flatnonzero(scores >= np.partition(scores, last)[last])
        scores = scores[token_ids]
    probabilities = torch.softmax(torch.from_numpy(scores), dim=0).numpy()
    if sampling.top_p < 1:
        chosen = _nucleus(probabilities, sampling.top_p)
        token_ids, probabilities = token_ids[chosen], probabilities[chosen]
    if sampling.min_p > 0:
        least = np.float32(sampling.min_p) * probabilities.max()
        chosen = np.flatnonzero(probabilities >= least)
        token_ids, probabilities = token_ids[chosen], probabilities[chosen]
    return Candidates(token_ids, probabilities.astype(np.float64))


def draw(choice: Candidates, seed: int, position: int) -> int:
    """Draw a token id from the candidates; the same one for the same seed and position.

    Args:
        choice: the candidates, at least one with a probability above 0.
        seed: of the request, below 2**63.
        position: of the token in its sequence.
    """
    key = np.array([seed, position], dtype=np.uint64)
    token_ids, probabilities = choice.token_ids, choice.probabilities
    groups = int(token_ids[-1]) // _GROUP + 1
    borders = np.searchsorted(token_ids, np.arange(groups + 1) * _GROUP)
    sums = np.add.reduceat(probabilities, borders[:-1])
    sums[borders[1:] == borders[:-1]] = 0.0  # no candidates; reduceat gives a neighbour there
    winner = _race(sums, _uniform(key, 0, groups))
    group = slice(borders[winner], borders[winner + 1])
    numbers = _uniform(key, _SECOND_HEAT + winner * (_GROUP // 4), _GROUP)
    numbers = numbers[token_ids[group] - winner * _GROUP]
    return int(token_ids[group][_race(probabilities[group], numbers)])


def _is_plain_argmax(sampling: Sampling, position: int) -> bool:
    return (
        sampling.temperature == 0
        and sampling.repetition_penalty == 1.0
        and not sampling.presence_penalty
        and not sampling.frequency_penalty
        and not sampling.logit_bias
        and not (sampling.suppressed and position < sampling.suppressed_before)
    )


def _sample_row(scores: FloatRow, sampling: Sampling, position: int, history: TokenIds) -> int:
    process(scores, sampling, position, history)
    if sampling.temperature == 0:
        return int(scores.argmax())
    return draw(candidates(scores, sampling), sampling.seed, position)


def _nucleus(probabilities: FloatRow, top_p: float) -> npt.NDArray[np.int64]:
    """Return the indices of the likeliest tokens that together reach `top_p`; at least one."""
    # Tokens below this make up less than 1 - top_p, even all together.
    least = min((1 - top_p) / len(probabilities), float(probabilities.max()))
    indices = np.flatnonzero(probabilities >= np.float32(least))
    values = np.sort(probabilities[indices])[::-1]
    before = np.cumsum(values, dtype=np.float64) - values
    count = max(1, int(np.searchsorted(before, top_p)))
    lowest = values[count - 1]
    above = np.flatnonzero(probabilities > lowest)
    equal = np.flatnonzero(probabilities == lowest)[: count - len(above)]
    return np.sort(np.concatenate([above, equal]))


def _uniform(key: npt.NDArray[np.uint64], place: int, count: int) -> npt.NDArray[np.float64]:
    """Return uniform numbers in (0, 1), from these positions of the generator's sequence."""
    bits = np.random.Philox(key=key, counter=place).random_raw(count)
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _race(probabilities: npt.NDArray[np.float64], uniform: npt.NDArray[np.float64]) -> int:
    """Return the index of the first arrival; a candidate of probability 0 never arrives."""
    with np.errstate(divide="ignore"):
        return int(np.argmin(-np.log(uniform) / probabilities))


def _largest(values: Tensor, count: int) -> Tensor:
    """Return the indices of the largest values of each row, [n, count], largest first.

    They are in the groups with the largest maxima. Searching these takes less than a tenth of the
    time of `topk` (0.3 ms against 5 ms for 20 of 128,000 values in 16 rows).
    """
    rows, width = values.shape
    if count * _TOP_GROUP >= width:
        return torch.topk(values, count).indices
    padded = F.pad(values, (0, -width % _TOP_GROUP), value=float("-inf"))
    grouped = padded.view(rows, -1, _TOP_GROUP)
    groups = torch.topk(grouped.amax(dim=-1), count).indices
    inside = grouped.gather(1, groups[..., None].expand(-1, -1, _TOP_GROUP)).flatten(1)
    best = torch.topk(inside, count).indices
    return groups.gather(1, best // _TOP_GROUP) * _TOP_GROUP + best % _TOP_GROUP
