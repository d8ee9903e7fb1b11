"""What generation_config.json says: same limits as for users, and nothing ignored in silence."""

from typing import Any

import msgspec
import pytest
from transformers import GenerationConfig

from distributed_llm.common import sampling_params
from distributed_llm.common.errors import CheckpointError, InvalidRequest
from distributed_llm.common.sampling_params import (
    MAX_BAD_WORDS,
    MAX_EOS,
    MAX_LOGIT_BIASES,
    MAX_SEED,
    MAX_SEQUENCE_BIASES,
    MAX_SUPPRESSED,
    MAX_WORD_TOKENS,
    CheckpointParams,
    Sampling,
    SamplingParams,
)
from distributed_llm.coordinator.model import GenerationDefaults
from distributed_llm.coordinator.requests.generation_config import (
    FOLLOWED,
    OFF,
    WITHOUT_EFFECT,
    generation_defaults,
)
from distributed_llm.coordinator.requests.parameters import Limits, resolve
from distributed_llm.coordinator.serving.scheduler import MAX_SAMPLING_BYTES

ID = 2**31 - 1

LONGEST: dict[str, Any] = {
    "do_sample": True,
    "eos_token_id": [ID - i for i in range(MAX_EOS)],
    "suppress_tokens": [ID] * MAX_SUPPRESSED,
    "begin_suppress_tokens": [ID] * MAX_SUPPRESSED,
    "bad_words_ids": [[ID] * MAX_WORD_TOKENS] * MAX_BAD_WORDS,
    "sequence_bias": [[[ID] * MAX_WORD_TOKENS, -1000.0]] * MAX_SEQUENCE_BIASES,
    "forced_bos_token_id": ID,
    "forced_eos_token_id": [ID] * MAX_EOS,
    "exponential_decay_length_penalty": [ID, 99.9],
    "encoder_no_repeat_ngram_size": 64,
    "no_repeat_ngram_size": 64,
    "min_length": ID,
    "repetition_penalty": 1.3,
    "encoder_repetition_penalty": 1.3,
    "temperature": 0.7,
    "top_h": 0.9,
    "top_k": ID,
    "top_p": 0.9,
    "min_p": 0.1,
    "typical_p": 0.9,
    "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1,
}
"""A file in which everything is as long as it may be."""


def defaults_of(
    generation_config: dict[str, Any], config: dict[str, Any] | None = None, vocab: int = 2**31
) -> GenerationDefaults:
    return generation_defaults(
        config or {}, generation_config, context_length=10_000, vocab_size=vocab
    )


def limits_of(defaults: GenerationDefaults, *, prompt: int = 10, **params: Any) -> Limits:
    return resolve(
        SamplingParams.from_arguments(params),
        defaults,
        prompt_tokens=prompt,
        kv_tokens=10_048,
        seed=7,
    )


# ------------------------------------------------------------------ limits


@pytest.mark.parametrize("params", [{}, {"min_new_tokens": 3}])
def test_seventeen_ends_reach_the_workers(params: dict[str, Any]) -> None:
    """Every message that follows from a file can be read."""
    defaults = defaults_of({"eos_token_id": list(range(17)), "min_new_tokens": 2})
    limits = limits_of(defaults, **params)
    assert limits.end_token_ids == tuple(range(17))
    (sampling,) = limits.sampling
    assert sampling.eos_token_ids == tuple(range(17))
    sent = msgspec.msgpack.encode(sampling)
    assert msgspec.msgpack.decode(sent, type=Sampling) == sampling


def test_the_longest_file_and_the_longest_request_fit_a_message() -> None:
    defaults = defaults_of(LONGEST)
    assert defaults.not_followed == ()
    assert msgspec.to_builtins(defaults.checkpoint)  # all of it is in there
    biases = {ID - i: -1000.0 for i in range(MAX_LOGIT_BIASES)}
    limits = limits_of(
        defaults,
        logit_bias=biases,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        seed=MAX_SEED,
        logprobs=20,
        n=64,
    )
    for sampling in limits.sampling:
        sent = msgspec.msgpack.encode(sampling)
        assert msgspec.msgpack.decode(sent, type=Sampling) == sampling
        assert len(sent) <= MAX_SAMPLING_BYTES, "no step would ever have room for it"
    told = msgspec.to_builtins(limits.sampling[0])
    assert set(told) == set(Sampling.__struct_fields__)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eos_token_id", list(range(MAX_EOS + 1))),
        ("eos_token_id", "2"),
        ("eos_token_id", [2, None]),
        ("eos_token_id", True),
        ("repetition_penalty", 1e-45),
        ("min_new_tokens", -1),
        ("no_repeat_ngram_size", 65),
        ("bad_words_ids", [[]]),
        ("bad_words_ids", [[1]] * (MAX_BAD_WORDS + 1)),
        ("suppress_tokens", [1] * (MAX_SUPPRESSED + 1)),
        ("begin_suppress_tokens", [-1]),
        ("min_length", -1),
        ("max_length", "20"),
        ("forced_bos_token_id", -1),
        ("forced_eos_token_id", [-1]),
        ("encoder_repetition_penalty", 0),
        ("encoder_no_repeat_ngram_size", 1.5),
        ("sequence_bias", {"5": 1.0}),
        ("sequence_bias", [[[5], 1e6]]),
        ("exponential_decay_length_penalty", [1]),
        ("exponential_decay_length_penalty", [1, 0.0]),
        ("temperature", -1.0),
        ("typical_p", 1.5),
        ("top_h", 2.0),
        ("epsilon_cutoff", -0.1),
        ("eta_cutoff", 2),
    ],
)
def test_values_out_of_range_name_the_file_at_the_start(name: str, value: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        defaults_of({"do_sample": True, name: value})
    said = str(caught.value)
    assert said.startswith("generation_config.json of the model ")
    assert f"{name}=" in said
    assert said.endswith("Correct the file, or take the line out.")


def test_ends_in_the_config_are_that_files() -> None:
    with pytest.raises(CheckpointError, match=r"^config\.json of the model .*eos_token_id="):
        defaults_of({}, {"eos_token_id": list(range(MAX_EOS + 1))})


@pytest.mark.parametrize("name", ["epsilon_cutoff", "eta_cutoff", "typical_p", "top_p"])
def test_one_is_off(name: str) -> None:
    values = {"do_sample": True, "top_k": 0, name: 1.0}
    (sampling,) = limits_of(defaults_of(values), seed=7).sampling
    assert sampling == Sampling(temperature=1.0, seed=7, prompt_tokens=10, eos_from=10)


# ------------------------------------------------------------------ what is not followed


def test_all_that_transformers_knows_is_followed_or_listed() -> None:
    known = set(vars(GenerationConfig()))  # type: ignore[no-untyped-call]
    assert known - FOLLOWED - WITHOUT_EFFECT - set(OFF) == set()
    assert not FOLLOWED & WITHOUT_EFFECT
    assert not (FOLLOWED | WITHOUT_EFFECT) & set(OFF)


def test_what_is_not_followed_is_listed_once_by_name() -> None:
    found = defaults_of(
        {
            "num_beams": 4,
            "guidance_scale": 1.5,
            "watermarking_config": {"bias": 2.0},
            "remove_invalid_values": True,
            "of_the_future": 1,
            "transformers_version": "9.9",
            "pad_token_id": 0,
            "top_k": 5,
        }
    )
    assert found.not_followed == (
        "guidance_scale",
        "num_beams",
        "of_the_future",
        "remove_invalid_values",
        "watermarking_config",
    )


def test_what_is_off_is_not_listed() -> None:
    off = {name: values[0] if values else None for name, values in OFF.items()}
    assert defaults_of({**off, "token_healing": False}).not_followed == ()


# ------------------------------------------------------------------ what applies when


def test_max_length_counts_the_prompt() -> None:
    defaults = defaults_of({"max_length": 30})
    assert limits_of(defaults, prompt=12).max_new_tokens == 18
    assert limits_of(defaults, prompt=12, max_new_tokens=40).max_new_tokens == 40
    both = defaults_of({"max_length": 30, "max_new_tokens": 9})
    assert limits_of(both, prompt=12).max_new_tokens == 9
    with pytest.raises(InvalidRequest, match=r"30 .*max_length.*Give max_new_tokens"):
        limits_of(defaults, prompt=30)


@pytest.mark.parametrize(
    ("params", "eos_from"), [({}, 15), ({"min_new_tokens": 0}, 12), ({"min_new_tokens": 9}, 21)]
)
def test_min_length_counts_the_prompt_unless_the_request_says(
    params: dict[str, Any], eos_from: int
) -> None:
    (sampling,) = limits_of(defaults_of({"min_length": 15}), prompt=12, **params).sampling
    assert sampling.eos_from == eos_from


def test_warpers_count_only_with_do_sample() -> None:
    values = {"top_h": 0.5, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1, "typical_p": 0.5}
    assert defaults_of(values).checkpoint == CheckpointParams()
    assert defaults_of(values).params.typical_p is None
    sampled = defaults_of({**values, "do_sample": True})
    assert sampled.checkpoint == CheckpointParams(top_h=0.5, epsilon_cutoff=0.1, eta_cutoff=0.1)
    assert sampled.params.typical_p == 0.5


def test_a_request_replaces_what_it_can() -> None:
    defaults = defaults_of(
        {"no_repeat_ngram_size": 3, "bad_words_ids": [[1]], "suppress_tokens": [4]}
    )
    (kept,) = limits_of(defaults).sampling
    assert (kept.no_repeat_ngram_size, kept.bad_words_ids, kept.suppress_tokens) == (
        3,
        ((1,),),
        (4,),
    )
    (gone,) = limits_of(
        defaults, no_repeat_ngram_size=0, bad_words_ids=[], suppress_tokens=[]
    ).sampling
    assert (gone.no_repeat_ngram_size, gone.bad_words_ids, gone.suppress_tokens) == (0, (), ())


def test_all_limits_are_those_of_the_wire() -> None:
    """`Sampling` takes whatever the other two take: it is built from them without a check."""
    other = ("logit_bias", "top_p", "forced_bos_token_id")  # which is made an id before
    for kind in (SamplingParams, CheckpointParams):
        hints = {f.name: f.type for f in msgspec.structs.fields(kind)}
        for field in msgspec.structs.fields(Sampling):
            if field.name in hints and field.name not in other:
                given = hints[field.name]
                assert field.type == given or given == field.type | None, field.name
    assert sampling_params.MAX_SUPPRESSED == MAX_SUPPRESSED
