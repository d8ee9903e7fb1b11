"""Sampling: what transformers leaves of the logits, drawn with the right frequencies.

Penalties that transformers does not have are computed from their definition.
"""

import math
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation.logits_process import TopHLogitsWarper

from distributed_llm.common.errors import InvalidRequest, StageError
from distributed_llm.common.sampling_params import Sampling
from distributed_llm.worker.kv.cache import as_token_ids
from distributed_llm.worker.model import candidates as candidates_module
from distributed_llm.worker.model import sampler
from distributed_llm.worker.model.candidates import Candidates, CutRow, candidates, scaled_rows
from distributed_llm.worker.model.kernels import native
from distributed_llm.worker.model.logits import FloatRow, process
from distributed_llm.worker.model.sampler import (
    RowsFailed,
    draw,
    log_probabilities,
    race,
    sample,
)

VOCAB_SIZE = 3000
HISTORY = as_token_ids([5, 9, 5, 2999, 0, 9, 9, 7])
PROMPT_TOKENS = 3
POSITION = len(HISTORY)

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
    Sampling(temperature=1.0, typical_p=0.2),
    Sampling(temperature=1.5, typical_p=0.95),
    Sampling(temperature=1.0, typical_p=1e-9),
    Sampling(temperature=1.0, epsilon_cutoff=3e-4),
    Sampling(temperature=1.0, epsilon_cutoff=0.9),
    Sampling(temperature=1.0, eta_cutoff=2e-3),
    Sampling(temperature=0.5, eta_cutoff=0.3),
    Sampling(temperature=1.0, top_h=0.4),
    Sampling(temperature=3.0, top_h=1.0, top_k=20),
    Sampling(
        temperature=1.2,
        top_h=0.95,
        top_k=60,
        top_p=0.97,
        min_p=0.01,
        typical_p=0.9,
        epsilon_cutoff=1e-3,
        eta_cutoff=2e-3,
    ),
    Sampling(temperature=1.0, top_k=2000, typical_p=0.7, eta_cutoff=1e-3),
    Sampling(temperature=0.9, top_k=50, top_p=0.9, min_p=0.02, repetition_penalty=1.4),
    Sampling(temperature=1.0, repetition_penalty=0.5, eos_token_ids=(5, 17), eos_from=9),
    Sampling(temperature=1.0, eos_token_ids=(5, 17), eos_from=8),
    Sampling(temperature=1.0, logit_bias=((5, 3.5), (2999, -2.0), (8, 100.0))),
    Sampling(temperature=1.0, presence_penalty=1.5, prompt_tokens=PROMPT_TOKENS),
    Sampling(temperature=1.0, frequency_penalty=0.7, prompt_tokens=PROMPT_TOKENS),
    Sampling(
        temperature=0.8,
        top_k=400,
        top_p=0.95,
        min_p=0.001,
        repetition_penalty=1.2,
        presence_penalty=-0.5,
        frequency_penalty=0.3,
        logit_bias=((5, 6.0), (9, 6.0), (7, -6.0), (17, 8.0)),
        prompt_tokens=PROMPT_TOKENS,
        eos_token_ids=(17,),
        eos_from=12,
    ),
]


class AnswerPenalties(LogitsProcessor):
    """The penalties of the OpenAI API, from their definition: for each token of the vocabulary."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Return the scores less what the tokens of the answer cost."""
        answer = input_ids[0, self.sampling.prompt_tokens :].tolist()
        counts = np.array([answer.count(token) for token in range(scores.shape[-1])])
        scores = scores.numpy().astype(np.float64)
        scores -= counts * self.sampling.frequency_penalty
        scores -= (counts > 0) * self.sampling.presence_penalty
        return torch.from_numpy(scores.astype(np.float32))


def reference(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Return transformers' probabilities for `logits`, float32 [vocab_size]."""
    steps: list[Any] = []
    if sampling.logit_bias:
        biases = {(token,): bias for token, bias in sampling.logit_bias}
        steps.append(SequenceBiasLogitsProcessor(cast(Any, biases)))
    if sampling.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    steps.append(AnswerPenalties(sampling))
    if sampling.eos_token_ids:
        least = sampling.eos_from - PROMPT_TOKENS
        suppressed = list(sampling.eos_token_ids)
        steps.append(MinNewTokensLengthLogitsProcessor(PROMPT_TOKENS, least, suppressed))
    if sampling.temperature not in {0, 1}:
        steps.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_h is not None:
        steps.append(TopHLogitsWarper(sampling.top_h))
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        steps.append(MinPLogitsWarper(sampling.min_p))
    if sampling.typical_p < 1:
        steps.append(TypicalLogitsWarper(sampling.typical_p))
    if sampling.epsilon_cutoff:
        steps.append(EpsilonLogitsWarper(sampling.epsilon_cutoff))
    if sampling.eta_cutoff:
        steps.append(EtaLogitsWarper(sampling.eta_cutoff))
    history: Any = torch.from_numpy(HISTORY.astype(np.int64))[None]
    scores = LogitsProcessorList(steps)(history, cast(Any, logits[None].clone()))
    return torch.softmax(scores[0], dim=0)


def left(scores: FloatRow, sampling: Sampling) -> Candidates:
    """Return the candidates in processed logits [vocab_size]."""
    (row,) = scaled_rows(torch.from_numpy(scores)[None], [sampling])
    return candidates(row).left()


@pytest.fixture(params=[True, False], ids=["C", "numpy"])
def by_library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have top-p and min-p cut by the C library, and without."""
    if not request.param:
        monkeypatch.setattr(candidates_module, "can_cut", lambda: False)
    elif native.instructions() == "none":
        pytest.skip("the C library was not built here")


def random_logits(seed: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.usefixtures("by_library")
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_candidates_are_those_of_transformers(sampling: Sampling, seed: int, scale: float) -> None:
    logits = random_logits(seed, scale)
    wanted = reference(logits, sampling).double().numpy()
    scores = logits.numpy().copy()
    process(scores, sampling, POSITION, HISTORY)
    kept = left(scores, sampling)
    assert (np.diff(kept.token_ids) > 0).all()
    positive = kept.probabilities > 0
    assert set(kept.token_ids[positive].tolist()) == set(np.flatnonzero(wanted).tolist())
    normalised = kept.probabilities / kept.probabilities.sum()
    np.testing.assert_allclose(normalised, wanted[kept.token_ids], rtol=1e-4, atol=1e-9)


def test_tokens_as_likely_as_the_last_of_the_top_k_stay() -> None:
    sampling = Sampling(temperature=1.0, top_k=2)
    kept = left(np.array([0.0, 1.0, 2.0, 1.0], dtype=np.float32), sampling)
    assert kept.token_ids.tolist() == [1, 2, 3]


@pytest.mark.usefixtures("by_library")
def test_no_more_tokens_than_reach_top_p_stay_though_they_are_as_likely() -> None:
    kept = left(np.zeros(1000, dtype=np.float32), Sampling(temperature=1.0, top_p=0.3))
    assert kept.token_ids.tolist() == list(range(300))


@pytest.mark.skipif(native.instructions() == "none", reason="the C library was not built here")
@pytest.mark.parametrize("width", [5, 300, 20011])
@pytest.mark.parametrize("top_p", [1e-9, 0.4, 0.95, 1 - 1e-12, 1.0])
@pytest.mark.parametrize("steps", [2.0, 1e4])
def test_the_library_leaves_the_same_tokens_and_draws_the_same(
    width: int, top_p: float, steps: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With few different logits most tokens are as likely as many others; some are forbidden."""
    generator = torch.Generator().manual_seed(width)
    logits = (torch.randn(4, width, generator=generator) * steps).round() / steps
    logits[:2] *= 5
    logits[1::2, 1::3] = float("-inf")
    samplings = [Sampling(temperature=t, top_p=top_p, min_p=t / 100) for t in (0.7, 1, 0.5, 2)]
    ours = [candidates(row) for row in scaled_rows(logits, samplings)]
    monkeypatch.setattr(candidates_module, "can_cut", lambda: False)
    theirs = [candidates(row) for row in scaled_rows(logits, samplings)]
    for own, expected in zip(ours, theirs, strict=True):
        assert isinstance(own, CutRow)
        assert isinstance(expected, Candidates)
        positive = expected.probabilities > 0
        np.testing.assert_array_equal(own.left().token_ids, expected.token_ids[positive])
        np.testing.assert_array_equal(own.left().probabilities, expected.probabilities[positive])
        for position in range(10):
            assert draw(own, 3, position) == draw(expected, 3, position)


@pytest.mark.parametrize(
    "change",
    [
        {"eos_token_ids": (1047,), "eos_from": POSITION + 1},
        {"logit_bias": ((1047, -100.0),)},
        {"repetition_penalty": 3.0, "logit_bias": ((5, 100.0), (8, 50.0))},
        {"presence_penalty": 100.0},
        {"frequency_penalty": 100.0},
    ],
)
def test_greedy_is_the_likeliest_after_bias_and_penalties(change: dict[str, Any]) -> None:
    """Beside rows without any, which are computed together."""
    logits = random_logits(1)
    best = 1047
    logits[best] = logits.max() + 1
    history = as_token_ids([*HISTORY, best]) if len(change) == 1 else HISTORY
    position = POSITION if "eos_token_ids" in change else len(history)
    sampling = Sampling(**change)
    scores = logits.numpy().copy()
    process(scores, sampling, position, history)
    assert int(scores.argmax()) != best
    samplings = [Sampling(), sampling, Sampling(eos_token_ids=(best,), eos_from=position)]
    token_ids = sample(logits.expand(3, -1), samplings, [position] * 3, [history] * 3)
    assert token_ids.dtype == torch.int32
    assert token_ids.tolist() == [best, scores.argmax(), best]


def test_tokens_beyond_the_vocabulary_change_nothing() -> None:
    logits = random_logits(1)
    sampling = Sampling(
        logit_bias=((VOCAB_SIZE, 1000.0),), eos_token_ids=(VOCAB_SIZE,), eos_from=100
    )
    assert sample(logits[None], [sampling], [3], [HISTORY]).tolist() == [int(logits.argmax())]


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
    assert drawn == [786, 91, 2, 322, 376, 989, 117, 765, 40]


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
@pytest.mark.parametrize(
    "token_ids", [[0, 3, 4, 17, 18, 999], [0, 255, 256, 511, 512, 513], [1, 2, 3, 4, 5, 6]]
)
def test_frequencies_are_the_probabilities(seed: int, token_ids: list[int]) -> None:
    """Chi-square of 4000 draws at consecutive positions; the limit is met by 999 of 1000 seeds."""
    probabilities = np.array([0.4, 0.3, 0.15, 0.1, 0.04, 0.01])
    choice = Candidates(np.array(token_ids), probabilities * 7)
    total = 4000
    drawn = [draw(choice, seed, position) for position in range(total)]
    counts = np.array([drawn.count(token) for token in token_ids])
    assert counts.sum() == total
    chi_square = float((((counts - total * probabilities) ** 2) / (total * probabilities)).sum())
    assert chi_square < 20.5  # 5 degrees of freedom


def test_a_whole_vocabulary_is_drawn_evenly() -> None:
    """Chi-square over the tokens' places within their groups and over the groups."""
    choice = Candidates(np.arange(2560), np.full(2560, 0.5))
    drawn = np.array([draw(choice, 3, position) for position in range(5120)])
    for cells in (np.bincount(drawn // 256, minlength=10), np.bincount(drawn % 256)):
        expected = 5120 / len(cells)
        chi_square = float(((cells - expected) ** 2 / expected).sum())
        freedom = len(cells) - 1
        assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


def test_a_candidate_fewer_changes_no_draw_that_it_would_have_lost() -> None:
    """As when another machine's probabilities are off in the last bits at a border."""
    probabilities = np.full(1000, 1e-3)
    whole = Candidates(np.arange(1000), probabilities)
    fewer = Candidates(np.delete(np.arange(1000), 300), np.delete(probabilities, 300))
    pairs = [(draw(whole, 1, position), draw(fewer, 1, position)) for position in range(500)]
    assert sum(a != b for a, b in pairs) < 5


def test_what_cannot_happen_is_never_drawn() -> None:
    choice = Candidates(np.array([1, 302, 303]), np.array([0.0, 1e-300, 0.0]))
    assert {draw(choice, 0, position) for position in range(200)} == {302}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [100, 2560, VOCAB_SIZE])
@pytest.mark.parametrize("count", [0, 1, 20])
def test_log_probabilities_are_those_of_the_raw_logits(
    dtype: torch.dtype, vocab_size: int, count: int
) -> None:
    logits = torch.stack([random_logits(seed)[:vocab_size] for seed in range(4)]).to(dtype)
    logits[1, -1] = 30.0
    picked = torch.tensor([3, 99, 0, 17], dtype=torch.int32)
    logprobs, token_ids = log_probabilities(logits, picked, count, range(4))
    assert (logprobs.dtype, token_ids.dtype) == (torch.float32, torch.int32)
    assert logprobs.shape == token_ids.shape == (4, 1 + count)
    assert token_ids[:, 0].tolist() == picked.tolist()
    wanted = logits.double().numpy()
    wanted = wanted - np.log(np.exp(wanted).sum(axis=1, keepdims=True))
    expected = np.take_along_axis(wanted, token_ids.numpy().astype(np.int64), axis=1)
    np.testing.assert_allclose(logprobs.numpy(), expected, atol=1e-5)
    likeliest = -np.sort(-wanted, axis=1)[:, :count]
    np.testing.assert_allclose(logprobs[:, 1:].numpy(), likeliest, atol=1e-5)
    assert all(len(set(row)) == count for row in token_ids[:, 1:].tolist())


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(repetition_penalty=1e-2), *SAMPLINGS], ids=str
)
def test_a_token_that_the_mask_forbids_is_never_sampled(sampling: Sampling) -> None:
    logits = torch.randn(4, VOCAB_SIZE, generator=torch.Generator().manual_seed(3)) * 5
    allowed = np.zeros(VOCAB_SIZE, dtype=np.uint8)
    allowed[[1, 5, 8, 9, 1000, 2998]] = 1
    mask = np.packbits(allowed, bitorder="little")
    masks = [mask, None, mask[:126], mask]  # one ends before the vocabulary does
    rows = [sampling] * 4
    token_ids = sample(logits, rows, [POSITION] * 4, [HISTORY] * 4, masks).tolist()
    free = sample(logits, rows, [POSITION] * 4, [HISTORY] * 4).tolist()
    assert token_ids[1] == free[1]
    for row, (given, token) in enumerate(zip(masks, token_ids, strict=True)):
        if given is not None:
            assert allowed[token]
            scores = logits[row].numpy().copy()
            process(scores, sampling, POSITION, HISTORY)
            scores[allowed == 0] = -np.inf
            scores[8 * len(given) :] = -np.inf
            if sampling.is_greedy:
                assert token == scores.argmax()
            else:
                assert token == draw(left(scores, sampling), sampling.seed, POSITION)


def test_a_mask_that_leaves_nothing_fails_its_row_alone() -> None:
    nothing = np.zeros(4, dtype=np.uint8)
    logits = torch.randn(2, VOCAB_SIZE, generator=torch.Generator().manual_seed(3))
    with pytest.raises(RowsFailed) as caught:
        sample(logits, [Sampling()] * 2, [POSITION] * 2, [HISTORY] * 2, [None, nothing])
    assert caught.value.rows == (1,)
    assert isinstance(caught.value.error, InvalidRequest)


def test_there_are_no_more_log_probabilities_than_tokens() -> None:
    logprobs, _ = log_probabilities(torch.zeros(1, 7), torch.zeros(1, dtype=torch.int32), 20, [0])
    assert logprobs.shape == (1, 8)


def test_only_rows_that_asked_get_log_probabilities() -> None:
    logits = torch.stack([random_logits(seed) for seed in range(4)])
    picked = torch.tensor([3, 99, 0, 17], dtype=torch.int32)
    every, every_id = log_probabilities(logits, picked, 5, range(4))
    some, some_ids = log_probabilities(logits, picked, 5, [1, 3])
    assert torch.equal(some[[1, 3]], every[[1, 3]])
    assert torch.equal(some_ids[[1, 3]], every_id[[1, 3]])
    assert not some[[0, 2]].any()
    assert not some_ids[[0, 2]].any()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, top_p=0.9),
        Sampling(temperature=1.0, top_p=0.999, min_p=1e-3),
        Sampling(temperature=0.8, top_p=1e-9),
        Sampling(temperature=0.8, top_k=50, top_p=0.95),
        Sampling(temperature=0.8, top_k=200),
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", [0.0, 0.1, 3.0])
def test_large_vocabularies_lose_the_same_tokens(sampling: Sampling, scale: float) -> None:
    """More than are sorted at once; many tie, as bfloat16 has few values."""
    generator = torch.Generator().manual_seed(4)
    logits = (torch.randn(20_011, generator=generator) * scale).bfloat16().float()
    kept = left(logits.numpy(), sampling)
    wanted = reference(logits, sampling).double().numpy()
    least = kept.probabilities.min() / kept.probabilities.sum()
    assert len(kept.token_ids) == np.count_nonzero(wanted)  # of those that tie, any may go
    assert wanted[kept.token_ids].min() >= 0
    assert (wanted[np.setdiff1d(np.flatnonzero(wanted), kept.token_ids)] <= least * 1.001).all()


def test_logits_are_left_as_they_were() -> None:
    logits = random_logits(0)
    before = logits.clone()
    sample(logits[None], [SAMPLINGS[-1]], [POSITION], [HISTORY])
    log_probabilities(logits[None], torch.zeros(1, dtype=torch.int32), 5, [0])
    assert torch.equal(logits, before)
    assert math.isfinite(float(logits.sum()))


# ------------------------------------------------------------------ extremes

LARGEST = float(np.finfo(np.float32).max)

EXTREMES: list[dict[str, Any]] = [
    {"temperature": 1e-38, "top_p": 0.5},
    {"temperature": 1e-5, "top_p": 0.5},
    {"temperature": 1e-5, "top_k": 2},
    {"temperature": 1e-5, "min_p": 1.0},
    {"temperature": 100.0, "top_p": 1e-300, "min_p": 1e-300},
    {"temperature": 100.0, "typical_p": 1e-300},
    {"temperature": 1e-5, "typical_p": 0.5, "epsilon_cutoff": 1.0, "eta_cutoff": 1.0},
    {"temperature": 1e-5, "top_h": 1e-300},
    {"temperature": 1.0, "top_h": 1.0, "eta_cutoff": 1e-300, "epsilon_cutoff": 1e-300},
    {"temperature": 1e-5, "encoder_repetition_penalty": 100.0, "repetition_penalty": 0.01},
    {"temperature": 1.0, "sequence_bias": (((5,), 1000.0), ((9, 7, 9), 1000.0))},
    {"temperature": 1.0, "length_penalty_factor": 100.0, "eos_token_ids": (5, 9)},
    {"temperature": 1.0, "length_penalty_factor": 1e-300, "eos_token_ids": (5, 9)},
    {"temperature": 1.0, "repetition_penalty": 0.01},
    {"temperature": 1.0, "repetition_penalty": 100.0},
    {"repetition_penalty": 0.01},
    {"temperature": 1.0, "presence_penalty": -100.0, "frequency_penalty": -100.0},
    {"temperature": 1e-5, "presence_penalty": 100.0, "frequency_penalty": 100.0},
    {"temperature": 1e-5, "logit_bias": ((5, 1000.0), (9, 1000.0), (0, -1000.0))},
    {"temperature": 1e-5, "repetition_penalty": 100.0, "logit_bias": ((5, -1000.0),)},
]


@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize(
    ("low", "high"), [(-1.0, 1.0), (0.0, 0.0), (-LARGEST, LARGEST), (LARGEST / 2, LARGEST)]
)
def test_no_parameters_within_their_limits_overflow(
    extreme: dict[str, Any], low: float, high: float
) -> None:
    logits = random_logits(2).clamp(-1, 1)
    logits = (low / 2 + high / 2) + logits * (high / 2 - low / 2)
    assert torch.isfinite(logits).all()
    sampling = Sampling(**extreme, prompt_tokens=PROMPT_TOKENS)
    with np.errstate(all="raise"):
        (token,) = sample(logits[None], [sampling], [POSITION], [HISTORY]).tolist()
    assert 0 <= token < VOCAB_SIZE
    logprobs, _ = log_probabilities(logits[None], torch.tensor([token]), 20, [0])
    assert (logprobs >= -1e9).all(), "the coordinator takes no smaller ones"


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-38, 9.9e-6])
def test_temperatures_that_round_to_zero_are_greedy(temperature: float) -> None:
    logits = torch.stack([random_logits(seed) for seed in range(3)])
    samplings = [Sampling(temperature=temperature, seed=seed) for seed in range(3)]
    token_ids = sample(logits, samplings, [POSITION] * 3, [HISTORY] * 3)
    assert token_ids.tolist() == logits.argmax(dim=-1).tolist()


def test_the_draw_never_takes_a_candidate_without_probability() -> None:
    """Not even where the uniform number rounds to 1, whose logarithm is 0."""
    ones = np.ones(3)
    with np.errstate(all="raise"):
        assert race(np.array([0.0, 0.5, 0.0]), ones) == 1


# ------------------------------------------------------------------ rows that fail


def test_rows_that_fail_are_named() -> None:
    logits = torch.stack([random_logits(seed) for seed in range(3)])
    nothing_left = Sampling(eos_token_ids=tuple(range(VOCAB_SIZE)), eos_from=POSITION + 1)
    samplings = [Sampling(), nothing_left, Sampling(temperature=1.0)]
    with pytest.raises(RowsFailed) as caught:
        sample(logits, samplings, [POSITION] * 3, [HISTORY] * 3)
    assert caught.value.rows == (1,)
    assert isinstance(caught.value.error, InvalidRequest)
    assert "no token is left" in str(caught.value.error)


def test_rows_with_a_bug_are_named_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(scores: Any, sampling: Sampling, *rest: Any) -> None:
        if sampling.seed == 2:
            raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(sampler, "process", broken)
    logits = torch.stack([random_logits(seed) for seed in range(3)])
    samplings = [Sampling(temperature=1.0, seed=seed) for seed in range(3)]
    with pytest.raises(RowsFailed) as caught:
        sample(logits, samplings, [POSITION] * 3, [HISTORY] * 3)
    assert caught.value.rows == (2,)
    assert isinstance(caught.value.error, StageError)
    samplings[1] = Sampling(temperature=1.0, bad_words_ids=((1,),))
    monkeypatch.setattr(sampler, "process", broken_or_empty(broken))
    with pytest.raises(RowsFailed) as caught:
        sample(logits, samplings, [POSITION] * 3, [HISTORY] * 3)
    assert caught.value.rows == (1,), "only those that failed for the same reason"
    assert isinstance(caught.value.error, InvalidRequest)


def broken_or_empty(broken: Any) -> Any:
    """Return a `process` that leaves no token to rows with a bad word, and else is `broken`."""

    def process(scores: Any, sampling: Sampling, *rest: Any) -> None:
        broken(scores, sampling, *rest)
        if sampling.bad_words_ids:
            scores[:] = -np.inf

    return process
