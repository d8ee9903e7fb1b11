"""Which tokens temperature and cutoffs leave of processed logits, and their probabilities.

In the order of transformers' warpers: temperature, top-h, top-k, top-p, min-p, typical-p, epsilon
and eta cutoff. Large vocabularies make this the dearest part of sampling, so passes over all tokens
are few: what is needed of all rows is computed for them together, and thresholds that surely let
enough tokens pass come before anything is sorted. Where the C library was built, it cuts at top-p
and min-p without sorting, and makes zeros of what is cut off instead of a list of what stays.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distributed_llm.common.sampling_params import Sampling
from distributed_llm.worker.model.kernels.native.nuclei import Cut, can_cut, cut_probabilities
from distributed_llm.worker.model.logits import FloatRow, Indices

DRAWN_TOGETHER = 256
"""Consecutive token ids that are one group of a draw."""

_TOP_H_TOKENS = 100
"""Likeliest tokens that top-h considers, as in transformers."""

_GROUP = 64
"""Tokens in each group whose largest logits are compared to find the k-th largest of all."""

_FEW = 4096
"""Probabilities that are sorted at once; more are first counted by their leading bits."""

_DROPPED_BITS = 19
"""Bits of a float32 without which 16 steps remain between a number and its double."""


Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Candidates:
    """Tokens that may be sampled.

    Attributes:
        token_ids: [n] int64, ascending.
        probabilities: [n] float64, not normalised.
    """

    token_ids: Indices
    probabilities: Floats

    def group_sums(self) -> Floats:
        """Return the sum of each group of `DRAWN_TOGETHER` token ids, [groups]."""
        borders = self._borders()
        sums: Floats = np.add.reduceat(self.probabilities, borders[:-1])
        sums[borders[1:] == borders[:-1]] = 0.0  # no candidates; reduceat gives a neighbour there
        return sums

    def of_group(self, group: int) -> "Candidates":
        """Return the candidates of one of these groups."""
        start, stop = self._borders()[group : group + 2]
        return Candidates(self.token_ids[start:stop], self.probabilities[start:stop])

    def left(self) -> "Candidates":
        """Return these."""
        return self

    def _borders(self) -> Indices:
        token_ids = self.token_ids
        borders = np.arange(int(token_ids[-1]) // DRAWN_TOGETHER + 2) * DRAWN_TOGETHER
        if token_ids[-1] >= len(token_ids):  # some are missing
            return np.searchsorted(token_ids, borders).astype(np.int64)
        borders[-1] = len(token_ids)
        return borders


@dataclass(frozen=True)
class CutRow:
    """The probabilities of all tokens, zeros for those that may not be sampled.

    Attributes:
        probabilities: float32 [vocab_size]
        sums: of each group of `DRAWN_TOGETHER`, [groups].
    """

    probabilities: FloatRow
    sums: Floats

    def group_sums(self) -> Floats:
        """Return `sums`."""
        return self.sums

    def of_group(self, group: int) -> Candidates:
        """Return the candidates of one of these groups."""
        start = group * DRAWN_TOGETHER
        probabilities = self.probabilities[start : start + DRAWN_TOGETHER].astype(np.float64)
        return Candidates(start + np.arange(len(probabilities)), probabilities)

    def left(self) -> Candidates:
        """Return the candidates of all groups."""
        token_ids = np.flatnonzero(self.probabilities)
        return Candidates(token_ids, self.probabilities[token_ids].astype(np.float64))


@dataclass(frozen=True)
class ScaledRow:
    """Logits of one row after temperature.

    Attributes:
        scores: [vocab_size]
        probabilities: of all tokens, [vocab_size]; None where some are dropped before these count.
        sampling: the parameters of the row.
        cut: the probabilities after top-p and min-p, where the C library has cut them.
    """

    scores: FloatRow
    probabilities: FloatRow | None
    sampling: Sampling
    cut: CutRow | None


def scaled_rows(scores: Tensor, samplings: Sequence[Sampling]) -> list[ScaledRow]:
    """Return logits after temperature, with probabilities where all tokens have some.

    Args:
        scores: float32 [n, vocab_size], as `process` leaves them; in each row at least one is not
            -inf. They are not changed.
        samplings: parameters, by row; no temperature is greedy.
    """
    temperatures = torch.tensor([[s.temperature] for s in samplings], dtype=torch.float32)
    scaled = scores / temperatures
    highest = scores.amax(dim=-1, keepdim=True)
    for row in torch.isposinf(highest / temperatures).any(dim=-1).nonzero().flatten().tolist():
        # The largest becomes 0, and what overflows -inf.
        scaled[row] = (scores[row] - highest[row]) / temperatures[row]
    whole = [row for row, s in enumerate(samplings) if _counts_all(s, scores.shape[-1])]
    together = scaled if len(whole) == len(scaled) else scaled[whole]
    probabilities = torch.softmax(together, dim=-1)
    cut: dict[int, CutRow] = {}
    if whole and can_cut():
        cuts = [Cut(samplings[row].top_p, samplings[row].min_p) for row in whole]
        sums = cut_probabilities(probabilities, cuts, DRAWN_TOGETHER)
        cut = dict(zip(whole, map(CutRow, probabilities.numpy(), sums.numpy()), strict=True))
    given = dict(zip(whole, probabilities.numpy(), strict=True))
    return [
        ScaledRow(row, given.get(number), sampling, cut.get(number))
        for number, (row, sampling) in enumerate(zip(scaled.numpy(), samplings, strict=True))
    ]


def candidates(row: ScaledRow) -> Candidates | CutRow:
    """Return the tokens that the cutoffs leave."""
    left = row.cut or _left_of(row)
    warpers = _entropy_warpers(row.sampling)
    if not warpers:
        return left
    token_ids = left.left().token_ids
    scores = row.scores[token_ids]
    for warper in warpers:
        chosen = warper(scores)
        token_ids, scores = token_ids[chosen], scores[chosen]
    return Candidates(token_ids, _softmax(scores).astype(np.float64))


def _left_of(row: ScaledRow) -> Candidates:
    """Return the tokens that top-h and top-k, then top-p and min-p leave."""
    sampling, probabilities = row.sampling, row.probabilities
    token_ids: Indices | None = None  # all
    if probabilities is None:
        token_ids = _likeliest(row.scores, sampling)
        probabilities = _softmax(row.scores[token_ids])
    for chosen in _cut(probabilities, sampling):
        token_ids = chosen if token_ids is None else token_ids[chosen]
        probabilities = probabilities[chosen]
    if token_ids is None:
        token_ids = np.arange(len(row.scores))
    return Candidates(token_ids, probabilities.astype(np.float64))


def _counts_all(sampling: Sampling, vocab_size: int) -> bool:
    """Return whether all tokens have a part in the first probabilities that are computed."""
    return sampling.top_h is None and not 0 < sampling.top_k < vocab_size


def _softmax(scores: FloatRow) -> FloatRow:
    probabilities: FloatRow = torch.softmax(torch.from_numpy(scores), dim=0).numpy()
    return probabilities


# ------------------------------------------------------------------ the likeliest


def _likeliest(scores: FloatRow, sampling: Sampling) -> Indices:
    """Return the tokens that top-h leaves, and of these the ones that top-k leaves."""
    if sampling.top_h is None:
        return _top_k(scores, sampling.top_k)
    token_ids = _top_h(scores, sampling.top_h)
    if 0 < sampling.top_k < len(token_ids):
        token_ids = token_ids[_top_k(scores[token_ids], sampling.top_k)]
    return token_ids


def _top_k(scores: FloatRow, count: int) -> Indices:
    """Return the `count` likeliest tokens, and, as in transformers, those that tie with the last.

    The k-th of the largest of disjoint groups cannot be above the k-th of all, so what is below it
    need not be looked at again.
    """
    groups = len(scores) // _GROUP
    if count > groups:
        return np.flatnonzero(scores >= _kth_largest(scores, count))
    maxima = scores[: groups * _GROUP].reshape(_GROUP, groups).max(axis=0)
    near = np.flatnonzero(scores >= _kth_largest(maxima, count))
    return near[scores[near] >= _kth_largest(scores[near], count)]


def _kth_largest(scores: FloatRow, count: int) -> np.float32:
    last = len(scores) - count
    least: np.float32 = np.partition(scores, last)[last]
    return least


def _top_h(scores: FloatRow, top_h: float) -> Indices:
    """Return the likeliest tokens whose entropy is within a share of that of the likeliest 100."""
    row = torch.from_numpy(scores)
    top, indices = torch.topk(row, min(_TOP_H_TOKENS, len(scores)))
    probabilities = torch.softmax(top, dim=0)
    terms = -probabilities * torch.log(probabilities)  # NaN where a probability is 0
    kept = torch.cumsum(terms, dim=0) <= torch.nansum(terms) * top_h
    kept[0] = True
    return np.sort(indices[kept].numpy())


# ------------------------------------------------------------------ top-p and min-p


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
    # Tokens below this make up less than 1 - top_p, even all together; the likeliest is above it.
    least = np.float32((1 - top_p) / len(probabilities) / 2)
    near = np.flatnonzero(probabilities >= least)
    if len(near) <= _FEW:
        values = probabilities[near]
        return near[_reaching(values, values, top_p)]
    border, missing = _bin_of_border(probabilities, top_p)
    return np.flatnonzero(_reaching(probabilities, border, missing))


def _reaching(values: FloatRow, border: FloatRow, missing: float) -> npt.NDArray[np.bool_]:
    """Return which values are in the nucleus.

    Args:
        values: all probabilities that may be.
        border: those of them among which the least likely one of the nucleus is; larger ones are in
            the nucleus as a whole.
        missing: what the tokens at the border must reach.
    """
    border = np.sort(border)[::-1]
    before = np.cumsum(border, dtype=np.float64) - border
    count = max(1, int(np.searchsorted(before, missing)))
    lowest = border[count - 1]
    reaching: npt.NDArray[np.bool_] = values > lowest
    equal = count - np.count_nonzero(border > lowest)
    reaching[np.flatnonzero(values == lowest)[:equal]] = True
    return reaching


def _bin_of_border(values: FloatRow, top_p: float) -> tuple[FloatRow, float]:
    """Return the probabilities among which the last of the nucleus is, and what they must reach.

    Floats that are not negative are ordered like their bits, so those with the same leading bits
    follow one another.
    """
    bins = values.view(np.int32) >> _DROPPED_BITS
    bins = bins.max() - bins
    sums = np.bincount(bins, weights=values)
    before = np.cumsum(sums) - sums
    last = max(1, int(np.searchsorted(before, top_p))) - 1
    return values[bins == last], top_p - float(before[last])


# ------------------------------------------------------------------ cutoffs by entropy


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


def _logprobs_and_entropy(scores: FloatRow) -> tuple[Tensor, Tensor]:
    logprobs = torch.log_softmax(torch.from_numpy(scores), dim=0)
    return logprobs, -torch.nansum(logprobs * torch.exp(logprobs))
