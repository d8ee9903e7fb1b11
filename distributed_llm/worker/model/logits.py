"""What generation parameters make of the logits of one row before any token is dropped as unlikely.

Logits are processed in float32, in the order of transformers' `LogitsProcessor`s, with the
penalties that transformers lacks where vLLM has them: biases, repetition penalties, presence and
frequency penalty, repeated n-grams, bad words, end-of-sequence tokens before the least length,
forced tokens, growth of the end-of-sequence logits, suppressed tokens. `candidates` goes on.

Finite logits and parameters within their limits give no NaN: what would exceed float32 is cut off
at its largest number.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from distributed_llm.common.sampling_params import Sampling
from distributed_llm.worker.kv.segments import TokenIds

FloatRow = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

Mask = npt.NDArray[np.uint8]
"""Which tokens may be sampled, one bit each, as in `Task`."""

_LARGEST = np.finfo(np.float32).max

_MAX_GROWTH = 1e30
"""Factor at which an exponential length penalty stops growing."""


def changes(sampling: Sampling, position: int, mask: Mask | None = None) -> bool:
    """Return whether `process` would change the logits of the token at `position`."""
    return (
        mask is not None or _biases(sampling) or _penalizes(sampling) or _bans(sampling, position)
    )


def process(
    scores: FloatRow,
    sampling: Sampling,
    position: int,
    history: TokenIds,
    mask: Mask | None = None,
) -> None:
    """Apply everything but temperature and cutoffs to logits [vocab_size], in place.

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
