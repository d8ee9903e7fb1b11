"""One request: parameters after defaults, and when its answer ends."""

from typing import Any

import pytest

from distributed_llm.common.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    NotEnoughMemory,
)
from distributed_llm.common.messages import Usage
from distributed_llm.common.sampling_params import Sampling, SamplingParams
from distributed_llm.common.types import LayerRange, PeerId, WorkerId
from distributed_llm.coordinator.requests import (
    DEFAULT_MAX_NEW_TOKENS,
    GenerationDefaults,
    Limits,
    Request,
    generation_defaults,
    resolve,
)


def defaults_of(
    generation_config: dict[str, Any], config: dict[str, Any] | None = None
) -> GenerationDefaults:
    return generation_defaults(config or {}, generation_config, context_length=100, vocab_size=50)


PLAIN = defaults_of({"eos_token_id": 2})


def limits_of(
    defaults: GenerationDefaults = PLAIN, *, prompt: int = 10, kv: int = 1000, **params: Any
) -> Limits:
    return resolve(
        SamplingParams.from_arguments(params),
        defaults,
        prompt_tokens=prompt,
        kv_tokens=kv,
        seed=77,
    )


def request_of(limits: Limits, prompt: int = 3) -> Request:
    request = Request((PeerId(b"c"), "r", 0), 0, SamplingParams(), arrived_at=1.0)
    request.accept(range(prompt), limits)
    return request


# ------------------------------------------------------------------ defaults of the checkpoint


def test_sampling_parameters_count_only_with_do_sample() -> None:
    values: dict[str, Any] = {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.1}
    assert defaults_of(values).params == SamplingParams(temperature=0.0)
    assert defaults_of({**values, "do_sample": False}).params == SamplingParams(temperature=0.0)
    assert defaults_of({**values, "do_sample": True}).params == SamplingParams(**values)


def test_do_sample_alone_is_temperature_one() -> None:
    assert defaults_of({"do_sample": True}).params.temperature == 1.0
    assert defaults_of({"do_sample": True, "temperature": None}).params.temperature == 1.0


def test_lengths_and_penalty_count_always() -> None:
    found = defaults_of({"max_new_tokens": 7, "min_new_tokens": 2, "repetition_penalty": 1.2})
    assert found.params == SamplingParams(
        temperature=0.0, max_new_tokens=7, min_new_tokens=2, repetition_penalty=1.2
    )


@pytest.mark.parametrize(
    ("generation_config", "config", "eos"),
    [
        ({"eos_token_id": 2}, {}, (2,)),
        ({"eos_token_id": [2, 5]}, {"eos_token_id": 9}, (2, 5)),
        ({}, {"eos_token_id": 9}, (9,)),
        ({}, {"eos_token_id": [9, 3]}, (9, 3)),
        ({"eos_token_id": 0}, {"eos_token_id": 9}, (0,)),
        ({}, {}, ()),
        ({"eos_token_id": None}, {}, ()),
        ({"eos_token_id": [-1, 49, 50]}, {}, (49,)),
    ],
)
def test_eos_tokens(generation_config: Any, config: Any, eos: tuple[int, ...]) -> None:
    assert defaults_of(generation_config, config).eos_token_ids == eos


def test_default_out_of_range_is_an_error() -> None:
    with pytest.raises(InvalidRequest, match="top_p"):
        defaults_of({"do_sample": True, "top_p": 1.5})


# ------------------------------------------------------------------ lengths


def test_length_is_256_or_what_the_context_leaves() -> None:
    roomy = GenerationDefaults(10_000, 50, (), SamplingParams())
    assert limits_of(roomy, kv=10_000).max_new_tokens == DEFAULT_MAX_NEW_TOKENS == 256
    assert limits_of().max_new_tokens == 90
    assert limits_of(kv=60).max_new_tokens == 50


def test_length_of_the_checkpoint_is_a_wish_and_of_the_request_an_order() -> None:
    long = defaults_of({"max_new_tokens": 5000, "min_new_tokens": 20})
    assert limits_of(long).max_new_tokens == 90
    assert limits_of(long, kv=40).max_new_tokens == 30
    short = limits_of(long, max_new_tokens=5)
    assert (short.max_new_tokens, short.min_new_tokens) == (5, 5)
    with pytest.raises(ContextLengthExceeded):
        limits_of(long, max_new_tokens=91)
    assert limits_of(defaults_of({"max_new_tokens": 8})).max_new_tokens == 8


def test_context_exceeded_names_both_numbers() -> None:
    assert limits_of(max_new_tokens=90).max_new_tokens == 90
    with pytest.raises(ContextLengthExceeded) as caught:
        limits_of(max_new_tokens=91)
    message = str(caught.value)
    assert "prompt has 10 tokens" in message
    assert "answer may have 91" in message
    assert "together 101 exceed the model's context of 100" in message


def test_prompt_that_leaves_no_room() -> None:
    assert limits_of(prompt=99).max_new_tokens == 1
    with pytest.raises(ContextLengthExceeded, match=r"101 exceed"):
        limits_of(prompt=100)


def test_kv_cache_has_too_little_room() -> None:
    assert limits_of(max_new_tokens=20, kv=30).max_new_tokens == 20
    with pytest.raises(NotEnoughMemory, match=r"31 positions.*room for 30"):
        limits_of(max_new_tokens=21, kv=30)
    with pytest.raises(NotEnoughMemory, match=r"11 positions.*room for 10"):
        limits_of(kv=10)


def test_empty_prompt() -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        limits_of(prompt=0)


def test_min_above_max() -> None:
    assert limits_of(min_new_tokens=5, max_new_tokens=5).min_new_tokens == 5
    with pytest.raises(InvalidRequest, match=r"min_new_tokens \(6\) is above max_new_tokens \(5\)"):
        limits_of(min_new_tokens=6, max_new_tokens=5)


def test_min_of_zero_overrides_the_checkpoint() -> None:
    assert limits_of(defaults_of({"min_new_tokens": 4}), min_new_tokens=0).min_new_tokens == 0


# ------------------------------------------------------------------ sampling


def test_greedy_unless_someone_samples() -> None:
    assert limits_of().sampling == Sampling(seed=77)
    assert limits_of(temperature=0.0, top_k=5, top_p=0.5).sampling.temperature == 0.0
    sampled = defaults_of({"do_sample": True, "temperature": 0.6, "top_k": 20})
    assert limits_of(sampled).sampling == Sampling(temperature=0.6, top_k=20, seed=77)
    assert limits_of(sampled, temperature=0.0).sampling.temperature == 0.0


@pytest.mark.parametrize("shape", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}])
def test_shaping_the_distribution_means_sampling_from_it(shape: dict[str, Any]) -> None:
    assert limits_of(**shape).sampling.temperature == 1.0
    sampled = defaults_of({"do_sample": True, "temperature": 0.6})
    assert limits_of(sampled, **shape).sampling.temperature == 0.6


def test_request_overrides_each_default() -> None:
    values: dict[str, Any] = {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.1}
    sampled = defaults_of({"do_sample": True, "repetition_penalty": 1.3, **values})
    off: dict[str, Any] = {
        "temperature": 0.5,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }
    assert limits_of(sampled, **off).sampling == Sampling(temperature=0.5, seed=77)
    assert limits_of(sampled).sampling == Sampling(**values, repetition_penalty=1.3, seed=77)


def test_seed() -> None:
    assert limits_of().sampling.seed == 77
    assert limits_of(seed=0).sampling.seed == 0


# ------------------------------------------------------------------ the end of an answer


def test_ends_with_eos() -> None:
    request = request_of(limits_of(max_new_tokens=5))
    request.append(9, now=2.0)
    assert request.finish_reason is None
    request.append(2, now=3.0)
    assert request.finish_reason == "stop"
    assert request.usage() == Usage(prompt_tokens=3, completion_tokens=2)


def test_ends_at_its_length() -> None:
    request = request_of(limits_of(max_new_tokens=2))
    request.append(9, now=2.0)
    request.append(9, now=2.0)
    assert request.finish_reason == "length"
    assert request.reserved_tokens == 5


def test_last_token_that_is_eos_counts_as_stop() -> None:
    request = request_of(limits_of(max_new_tokens=1))
    request.append(2, now=2.0)
    assert request.finish_reason == "stop"


def test_eos_of_the_request_replaces_the_checkpoints() -> None:
    assert limits_of(eos_token_id=[7, 8]).eos_token_ids == (7, 8)
    assert limits_of(eos_token_id=[]).eos_token_ids == ()


def test_eos_in_the_prompt_ends_nothing() -> None:
    request = request_of(limits_of(max_new_tokens=3))
    assert 2 in request.token_ids
    request.append(0, now=2.0)
    assert request.finish_reason is None


def test_ignore_eos_goes_on_and_suppresses_nothing() -> None:
    request = request_of(limits_of(ignore_eos=True, max_new_tokens=3, min_new_tokens=2))
    assert request.next_sampling().suppressed == ()
    request.append(2, now=2.0)
    assert request.finish_reason is None


def test_eos_is_suppressed_until_min_new_tokens() -> None:
    shape = {"temperature": 0.7, "top_k": 3, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.2}
    limits = limits_of(min_new_tokens=2, max_new_tokens=5, seed=5, **shape)  # type: ignore[arg-type]
    request = request_of(limits)
    for _ in range(2):
        sampling = request.next_sampling()
        assert sampling == Sampling(0.7, 3, 0.8, 0.1, 1.2, 5, suppressed=(2,))
        request.append(9, now=2.0)
    assert request.next_sampling() == limits.sampling
    assert request.next_sampling().suppressed == ()


# ------------------------------------------------------------------ timings


def test_timings() -> None:
    request = request_of(limits_of(max_new_tokens=3))
    request.started_at = 2.5
    for now in (4.0, 5.0, 7.0):
        request.append(9, now=now)
    a, b = (WorkerId("a"), LayerRange(0, 1)), (WorkerId("b"), LayerRange(1, 2))
    for where, compute_s in ((b, 1.0), (a, 0.25), (b, 2.0)):
        request.add_stage_time(*where, compute_s)
    timings = request.timings()
    assert (timings.queued_s, timings.first_token_s, timings.decode_s) == (1.5, 1.5, 3.0)
    assert [(s.worker, s.tasks, s.compute_s) for s in timings.stages] == [
        ("a", 1, 0.25),
        ("b", 2, 3.0),
    ]
