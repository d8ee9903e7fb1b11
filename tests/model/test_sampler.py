"""Sampling: what transformers leaves of the logits, drawn with the right frequencies."""

import math
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from distributed_llm.common.sampling_params import Sampling
from distributed_llm.worker.kv_cache import as_token_ids
from distributed_llm.worker.sampler import Candidates, candidates, draw, process, sample

VOCAB_SIZE = 3000
HISTORY = as_token_ids([5, 9, 5, 2999, 0])

SAMPLINGS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.3),
    Sampling(temperature=1.5, top_k=7),
    Sampling(temperature=1.0, top_k=10**6),
    Sampling(temperature=1.0, top_p=0.8),
    Sampling(temperature=3.0, top_p=0.999),
    Sampling(temperature=1.0, top_p=1e-9),
    Sampling(temperature=2.0, min_p=0.05),
    Sampling(temperature=1.0, min_p=1.0),
    Sampling(temperature=0.9, top_k=50, top_p=0.9, min_p=0.02, repetition_penalty=1.4),
    Sampling(temperature=1.0, repetition_penalty=0.5, suppressed=(5, 17)),
]


def reference(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Return transformers' probabilities for `logits`, float32 [vocab_size]."""
    steps: list[Any] = []
    if sampling.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.suppressed:
        steps.append(SuppressTokensLogitsProcessor(list(sampling.suppressed)))
    if sampling.temperature not in {0, 1}:
        steps.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        steps.append(MinPLogitsWarper(sampling.min_p))
    history: Any = torch.from_numpy(HISTORY.astype(np.int64))[None]
    scores = LogitsProcessorList(steps)(history, cast(Any, logits[None].clone()))
    return torch.softmax(scores[0], dim=0)


def random_logits(seed: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_candidates_are_those_of_transformers(sampling: Sampling, seed: int, scale: float) -> None:
    logits = random_logits(seed, scale)
    wanted = reference(logits, sampling).double().numpy()
    found = candidates(process(logits, sampling, HISTORY), sampling)
    positive = found.probabilities > 0
    assert set(found.token_ids[positive].tolist()) == set(np.flatnonzero(wanted).tolist())
    normalised = found.probabilities / found.probabilities.sum()
    np.testing.assert_allclose(normalised, wanted[found.token_ids], rtol=1e-4, atol=1e-9)


def test_tokens_as_likely_as_the_last_of_the_top_k_stay() -> None:
    sampling = Sampling(temperature=1.0, top_k=2)
    found = candidates(torch.tensor([0.0, 1.0, 2.0, 1.0]), sampling)
    assert sorted(found.token_ids.tolist()) == [1, 2, 3]


@pytest.mark.parametrize("penalty", [1.0, 3.0])
def test_greedy_is_the_likeliest_after_the_penalties(penalty: float) -> None:
    logits = random_logits(1)
    best = int(logits.argmax())
    sampling = Sampling(repetition_penalty=penalty, suppressed=(best,))
    expected = int(reference(logits, sampling).argmax())
    assert sample(logits[None], [sampling], [3], [HISTORY]).tolist() == [expected] != [best]
    assert sample(logits[None], [Sampling()], [3], [HISTORY]).tolist() == [best]


def test_a_token_depends_on_neither_batch_nor_order() -> None:
    logits = torch.stack([random_logits(seed) for seed in range(len(SAMPLINGS))])
    samplings = [
        Sampling(temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, seed=number)
        for number, s in enumerate(SAMPLINGS)
    ]
    count = len(samplings)
    positions = list(range(100, 100 + count))
    together = sample(logits, samplings, positions, [HISTORY] * count)
    assert together.dtype == torch.int32
    turned = sample(logits.flip(0), samplings[::-1], positions[::-1], [HISTORY] * count)
    assert turned.flip(0).tolist() == together.tolist()
    for row in range(count):
        alone = sample(logits[row : row + 1], [samplings[row]], [positions[row]], [HISTORY])
        assert alone.tolist() == [together[row]]


def test_draws_are_these_on_every_platform() -> None:
    """A change of these numbers would change the text of every request with a seed."""
    choice = Candidates(np.arange(1000), np.full(1000, 1e-3))
    drawn = [draw(choice, seed, position) for seed in (0, 1, 2**63 - 1) for position in (0, 1, 2)]
    assert drawn == [956, 995, 215, 668, 339, 381, 400, 613, 59]


def test_seeds_and_positions_draw_independently() -> None:
    choice = Candidates(np.arange(1000), np.full(1000, 1e-3))
    for drawn in (
        [draw(choice, seed, 5) for seed in range(200)],
        [draw(choice, 5, position) for position in range(200)],
    ):
        assert len(set(drawn)) > 150
    swapped = [(draw(choice, a, a + 1), draw(choice, a + 1, a)) for a in range(50)]
    assert sum(a == b for a, b in swapped) < 5


@pytest.mark.parametrize("seed", range(3))
def test_frequencies_are_the_probabilities(seed: int) -> None:
    """Chi-square of 4000 draws at consecutive positions; the limit is met by 999 of 1000 seeds."""
    probabilities = np.array([0.4, 0.3, 0.15, 0.1, 0.04, 0.01])
    choice = Candidates(np.array([3, 999, 0, 17, 18, 4]), probabilities * 7)
    total = 4000
    drawn = [draw(choice, seed, position) for position in range(total)]
    counts = np.array([drawn.count(token) for token in choice.token_ids.tolist()])
    assert counts.sum() == total
    chi_square = float((((counts - total * probabilities) ** 2) / (total * probabilities)).sum())
    assert chi_square < 20.5  # 5 degrees of freedom


def test_what_cannot_happen_is_never_drawn() -> None:
    choice = Candidates(np.array([1, 2, 3]), np.array([0.0, 1e-300, 0.0]))
    assert {draw(choice, 0, position) for position in range(200)} == {2}


def test_logits_are_left_as_they_were() -> None:
    logits = random_logits(0)
    before = logits.clone()
    sample(logits[None], [SAMPLINGS[-1]], [0], [HISTORY])
    assert torch.equal(logits, before)
    assert math.isfinite(float(logits.sum()))
