"""Logits to candidates: what generation parameters leave of the logits of one row.

Logits are processed in float32, in the order of transformers' `LogitsProcessor`s, with the
penalties that transformers lacks where vLLM has them: biases, repetition penalties, presence and
frequency penalty, repeated n-grams, bad words, end-of-sequence tokens before the least length,
forced tokens, growth of the end-of-sequence logits, suppressed tokens; then temperature, top-h,
top-k, top-p, min-p, typical-p, epsilon and eta cutoff. The result is a list of candidates with
their probabilities.

Finite logits and parameters within their limits give no NaN: what would exceed float32 is cut off
at its largest number.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from distributed_llm.common.sampling_params import Sampling
from distributed_llm.worker.kv.segments import TokenIds

FloatRow = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

Mask = npt.NDArray[np.uint8]
"""Which tokens may be sampled, one bit each, as in `Task`."""

_LARGEST = np.finfo(np.float32).max

_MAX_GROWTH = 1e30
"""Factor at which an exponential length penalty stops growing."""

_TOP_H_TOKENS = 100
"""Likeliest tokens that top-h considers, as in transformers."""


@dataclass(frozen=True)
class Candidates:
    """Tokens that may be sampled.

    Attributes:
        token_ids: [n] int64, ascending.
        probabilities: [n] float64, not normalised.
    """

    token_ids: npt.NDArray[np.int64]
    probabilities: npt.NDArray[np.float64]


def is_plain_argmax(sampling: Sampling, position: int) -> bool:
    """Return whether the token at `position` is the one with the largest logit as it is."""
    return (
        sampling.is_greedy
        and not _biases(sampling)
        and not _penalizes(sampling)
        and not _bans(sampling, position)
    )


def process(
    scores: FloatRow,
    sampling: Sampling,
    position: int,
    history: TokenIds,
    mask: Mask | None = None,
) -> None:
    """Apply everything but the warpers of sampling to logits [vocab_size], in place.

    Token ids beyond the vocabulary are ignored.

    Args:
        scores: finite logits; -inf afterwards for tokens that must not be sampled.
        sampling: the parameters.
        position: of the token in its sequence.
        history: the tokens before it.
        mask: which tokens may be sampled; None: all.
    """
    if _biases(sampling):
        _add_biases(scores, sampling, history)
    if _penalizes(sampling):
        _penalize(scores, sampling, history)
    if _bans(sampling, position):
        _ban(scores, sampling, position, history)
    if mask is not None:  # last, for penalties make numbers of -inf
        allowed = np.unpackbits(mask, count=len(scores), bitorder="little")
        scores[allowed == 0] = -np.inf


def candidates(scores: FloatRow, sampling: Sampling) -> Candidates:
    """Return the tokens that temperature and the other warpers leave of `scores` [vocab_size].

    Args:
        scores: as `process` leaves them; at least one is not -inf.
        sampling: the parameters; its temperature is not greedy.
    """
    scores = _scaled(scores, sampling.temperature)
    token_ids = np.arange(len(scores))
    if sampling.top_h is not None:
        token_ids = _top_h(scores, sampling.top_h)
        scores = scores[token_ids]
    if 0 < sampling.top_k < len(scores):
        # As in transformers, tokens that tie with the k-th likeliest stay too.
        last = len(scores) - sampling.top_k
        chosen = np.flatnonzero(scores >= np.partition(scores, last)[last])
        token_ids, scores = token_ids[chosen], scores[chosen]
    probabilities = _softmax(scores)
    for chosen in _cut(probabilities, sampling):
        token_ids, scores = token_ids[chosen], scores[chosen]
        probabilities = probabilities[chosen]
    for warper in _entropy_warpers(sampling):
        chosen = warper(scores)
        token_ids, scores = token_ids[chosen], scores[chosen]
        probabilities = _softmax(scores)
    return Candidates(token_ids, probabilities.astype(np.float64))


# ------------------------------------------------------------------ biases and penalties


def _biases(sampling: Sampling) -> bool:
    return bool(sampling.logit_bias or sampling.sequence_bias)


def _add_biases(scores: FloatRow, sampling: Sampling, history: TokenIds) -> None:
    for token, bias in sampling.logit_bias:
        if token < len(scores):
            scores[token] += bias
    for words, bias in sampling.sequence_bias:
        if words[-1] < len(scores) and _ends_with(history, words[:-1]):
            scores[words[-1]] += bias


def _penalizes(sampling: Sampling) -> bool:
    return bool(
        sampling.encoder_repetition_penalty != 1.0
        or sampling.repetition_penalty != 1.0
        or sampling.presence_penalty
        or sampling.frequency_penalty
    )


def _penalize(scores: FloatRow, sampling: Sampling, history: TokenIds) -> None:
    if sampling.encoder_repetition_penalty != 1.0:
        # Without an encoder, transformers takes the prompt for the encoder's input.
        prompt = history[: sampling.prompt_tokens]
        _divide(scores, prompt, 1.0 / sampling.encoder_repetition_penalty)
    if sampling.repetition_penalty != 1.0:
        _divide(scores, history, sampling.repetition_penalty)
    if sampling.presence_penalty or sampling.frequency_penalty:
        said, counts = np.unique(history[sampling.prompt_tokens :], return_counts=True)
        counts = counts.astype(np.float32)
        scores[said] -= sampling.frequency_penalty * counts + sampling.presence_penalty


def _divide(scores: FloatRow, token_ids: TokenIds, penalty: float) -> None:
    """Make tokens less likely; one that occurs twice is written twice, with the same value."""
    old = scores[token_ids]
    with np.errstate(over="ignore", under="ignore"):
        new = np.where(old < 0, old * np.float32(penalty), old / np.float32(penalty))
    scores[token_ids] = np.clip(new, -_LARGEST, _LARGEST)


# ------------------------------------------------------------------ tokens that must or must not be


def _bans(sampling: Sampling, position: int) -> bool:
    return bool(
        sampling.no_repeat_ngram_size
        or sampling.encoder_no_repeat_ngram_size
        or sampling.bad_words_ids
        or (sampling.eos_token_ids and position < sampling.eos_from)
        or sampling.forced_bos_token_id is not None
        or sampling.forced_eos_token_ids
        or sampling.length_penalty_factor is not None
        or sampling.suppress_tokens
        or (sampling.begin_suppress_tokens and position <= _beginning(sampling))
    )


def _ban(scores: FloatRow, sampling: Sampling, position: int, history: TokenIds) -> None:
    prompt = history[: sampling.prompt_tokens]
    for size, text in (
        (sampling.no_repeat_ngram_size, history),
        (sampling.encoder_no_repeat_ngram_size, prompt),
    ):
        if size:
            scores[_continuations(text, history, size)] = -np.inf
    for words in sampling.bad_words_ids:
        if words[-1] < len(scores) and _ends_with(history, words[:-1]):
            scores[words[-1]] = -np.inf
    if position < sampling.eos_from:
        scores[_known(sampling.eos_token_ids, scores)] = -np.inf
    if sampling.forced_bos_token_id is not None and position == 1:
        _force(scores, (sampling.forced_bos_token_id,))
    if sampling.forced_eos_token_ids and position == sampling.last_position:
        _force(scores, sampling.forced_eos_token_ids)
    if sampling.length_penalty_factor is not None:
        _favour_the_end(scores, sampling, position)
    scores[_known(sampling.suppress_tokens, scores)] = -np.inf
    if position == _beginning(sampling):
        scores[_known(sampling.begin_suppress_tokens, scores)] = -np.inf


def _beginning(sampling: Sampling) -> int:
    """Return the position of the first token of the answer that is not forced."""
    forced = sampling.forced_bos_token_id is not None and sampling.prompt_tokens == 1
    return sampling.prompt_tokens + forced


def _favour_the_end(scores: FloatRow, sampling: Sampling, position: int) -> None:
    """Raise the logits of the end-of-sequence tokens, the more the longer the answer is."""
    assert sampling.length_penalty_factor is not None
    beyond = position - sampling.length_penalty_from
    if beyond <= 0:
        return
    with np.errstate(over="ignore", under="ignore"):
        growth = min(float(np.power(sampling.length_penalty_factor, beyond)), _MAX_GROWTH) - 1.0
        eos = _known(sampling.eos_token_ids, scores)
        eos = eos[np.isfinite(scores[eos])]
        raised = scores[eos] + np.abs(scores[eos]) * np.float32(growth)
    scores[eos] = np.clip(raised, -_LARGEST, _LARGEST)


def _force(scores: FloatRow, token_ids: Iterable[int]) -> None:
    scores[:] = -np.inf
    scores[_known(token_ids, scores)] = 0.0


def _known(token_ids: Iterable[int], scores: FloatRow) -> Indices:
    return np.array([token for token in token_ids if token < len(scores)], dtype=np.int64)


def _ends_with(history: TokenIds, words: tuple[int, ...]) -> bool:
    count = len(words)
    return count <= len(history) and tuple(history[len(history) - count :].tolist()) == words


def _continuations(text: TokenIds, history: TokenIds, size: int) -> TokenIds:
    """Return the tokens that follow in `text` on the last `size - 1` tokens of `history`."""
    if len(text) < size:
        return text[:0]
    # `ends` are the indices in `text` of the last tokens of n-grams that begin like the history.
    ends = np.arange(size - 1, len(text))
    for back in range(1, size):
        ends = ends[text[ends - back] == history[-back]]
    return text[ends]


# ------------------------------------------------------------------ warpers


def _scaled(scores: FloatRow, temperature: float) -> FloatRow:
    with np.errstate(over="ignore"):
        scaled: FloatRow = scores / np.float32(temperature)
        if np.isposinf(scaled).any():  # the largest becomes 0, and what overflows -inf
            scaled = (scores - scores.max()) / np.float32(temperature)
    return scaled


def _softmax(scores: FloatRow) -> FloatRow:
    probabilities: FloatRow = torch.softmax(torch.from_numpy(scores), dim=0).numpy()
    return probabilities


def _cut(probabilities: FloatRow, sampling: Sampling) -> Iterable[Indices]:
    """Yield the indices that top-p leaves, then those of them that min-p leaves."""
    if sampling.top_p < 1:
        chosen = _nucleus(probabilities, sampling.top_p)
        yield chosen
        probabilities = probabilities[chosen]
    if sampling.min_p > 0:
        with np.errstate(under="ignore"):
            least = np.float32(sampling.min_p) * probabilities.max()
        yield np.flatnonzero(probabilities >= least)


def _nucleus(probabilities: FloatRow, top_p: float) -> Indices:
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


def _top_h(scores: FloatRow, top_h: float) -> Indices:
    """Return the likeliest tokens whose entropy is within a share of that of the likeliest 100."""
    row = torch.from_numpy(scores)
    top, indices = torch.topk(row, min(_TOP_H_TOKENS, len(scores)))
    probabilities = torch.softmax(top, dim=0)
    terms = -probabilities * torch.log(probabilities)  # NaN where a probability is 0
    kept = torch.cumsum(terms, dim=0) <= torch.nansum(terms) * top_h
    kept[0] = True
    return np.sort(indices[kept].numpy())


def _entropy_warpers(sampling: Sampling) -> list[Callable[[FloatRow], Indices]]:
    """Return the functions from scores to the indices that stay, in their order."""
    warpers: list[Callable[[FloatRow], Indices]] = []
    if sampling.typical_p < 1:
        warpers.append(lambda scores: _typical(scores, sampling.typical_p))
    if sampling.epsilon_cutoff > 0:
        warpers.append(lambda scores: _likelier(scores, sampling.epsilon_cutoff))
    if sampling.eta_cutoff > 0:
        warpers.append(lambda scores: _likelier(scores, _eta(scores, sampling.eta_cutoff)))
    return warpers


def _typical(scores: FloatRow, mass: float) -> Indices:
    """Return the tokens whose information is closest to the entropy and that reach `mass`."""
    logprobs, entropy = _logprobs_and_entropy(scores)
    distance, order = torch.sort(torch.abs(-logprobs - entropy))
    reached = torch.cumsum(torch.exp(logprobs[order]), dim=0)
    last = min(int((reached < mass).sum()), len(order) - 1)
    kept = distance <= distance[last]
    kept[0] = True
    return np.sort(order[kept].numpy())


def _eta(scores: FloatRow, epsilon: float) -> float:
    _, entropy = _logprobs_and_entropy(scores)
    return min(epsilon, float(np.sqrt(epsilon) * np.exp(-float(entropy))))


def _likelier(scores: FloatRow, least: float) -> Indices:
    """Return the tokens of at least this probability, and the likeliest in any case."""
    kept: Indices = np.flatnonzero(
        (_softmax(scores) >= np.float32(least)) | (scores >= scores.max())
    )
    return kept


def _logprobs_and_entropy(scores: FloatRow) -> tuple[torch.Tensor, torch.Tensor]:
    logprobs = torch.log_softmax(torch.from_numpy(scores), dim=0)
    return logprobs, -torch.nansum(logprobs * torch.exp(logprobs))
