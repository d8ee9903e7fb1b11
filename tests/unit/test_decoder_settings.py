"""Generation of encoder-decoders: what old files say of it, how the decoder starts, and limits."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from distributed_llm.common.errors import (
    CheckpointError,
    ContextLengthExceeded,
    InvalidRequest,
    NotEnoughMemory,
)
from distributed_llm.common.sampling_params import CheckpointParams, SamplingParams
from distributed_llm.coordinator.model import GenerationDefaults
from distributed_llm.coordinator.requests.decoder_settings import settings_in_config
from distributed_llm.coordinator.requests.generation_config import (
    FOLLOWED,
    OFF,
    generation_defaults,
)
from distributed_llm.coordinator.requests.parameters import Limits, resolve

CONTEXT, VOCAB = 100, 50


def defaults_of(config: dict[str, Any], said: dict[str, Any] | None = None) -> GenerationDefaults:
    return generation_defaults(
        {"model_type": "bart", **config}, said or {}, context_length=CONTEXT, vocab_size=VOCAB
    )


def limits_of(
    defaults: GenerationDefaults, *, source: int = 10, kv: int = 1024, **params: Any
) -> Limits:
    return resolve(
        SamplingParams.from_arguments(params),
        defaults,
        prompt_tokens=len(defaults.decoder_start),
        kv_tokens=kv,
        seed=7,
        source_tokens=source,
    )


# ------------------------------------------------------------------ files

OLD: dict[str, dict[str, Any]] = {
    "summaries": {
        "model_type": "bart",
        "architectures": ["BartForConditionalGeneration"],
        "bos_token_id": 0,
        "decoder_layers": 2,
        "decoder_start_token_id": 2,
        "early_stopping": True,
        "eos_token_id": 2,
        "force_bos_token_to_be_generated": True,
        "forced_eos_token_id": 2,
        "length_penalty": 2.0,
        "max_length": 42,
        "min_length": 6,
        "no_repeat_ngram_size": 3,
        "num_beams": 4,
        "pad_token_id": None,
        "task_specific_params": {"summarization": {"num_beams": 6, "max_length": 13}},
    },
    "translations": {
        "model_type": "marian",
        "bad_words_ids": [[49]],
        "decoder_start_token_id": 49,
        "do_sample": False,
        "eos_token_id": 0,
        "forced_eos_token_id": None,
        "max_length": 31,
        "num_beams": 6,
        "pad_token_id": 49,
        "temperature": 1.0,
    },
    "in parts": {
        "model_type": "t5gemma",
        "decoder": {"model_type": "x", "bos_token_id": 5, "eos_token_id": [1, 8], "num_beams": 3},
        "encoder": {"model_type": "x", "bos_token_id": 6, "eos_token_id": 9},
        "eos_token_id": None,
        "repetition_penalty": 1.5,
    },
}


@pytest.mark.parametrize("name", OLD)
def test_config_json_says_what_transformers_takes_from_it(name: str, tmp_path: Path) -> None:
    config = OLD[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = GenerationConfig.from_pretrained(
        tmp_path, config_file_name="config.json", _from_model_config=True
    ).to_dict()
    ours = settings_in_config(config, [*FOLLOWED, *OFF])
    followed = {*FOLLOWED, *OFF, "bos_token_id", "decoder_start_token_id"}
    assert ours == {k: v for k, v in theirs.items() if k in followed and v is not None}


def test_old_files_are_followed_as_new_ones() -> None:
    defaults = defaults_of(OLD["summaries"])
    assert defaults == GenerationDefaults(
        context_length=CONTEXT,
        vocab_size=VOCAB,
        eos_token_ids=(2,),
        params=SamplingParams(temperature=0.0, no_repeat_ngram_size=3),
        checkpoint=CheckpointParams(
            min_length=6, max_length=42, forced_bos_token_id=0, forced_eos_token_id=(2,)
        ),
        not_followed=("num_beams",),
        decoder_start=(2,),
    )
    assert defaults_of(OLD["in parts"]).eos_token_ids == (1, 8)


def test_a_generation_config_says_all_of_it() -> None:
    said = {"bos_token_id": 4, "eos_token_id": 3, "num_beams": 1}
    defaults = defaults_of(OLD["summaries"], said)
    assert (defaults.params, defaults.checkpoint) == (
        SamplingParams(temperature=0.0),
        CheckpointParams(),
    )
    assert (defaults.eos_token_ids, defaults.not_followed) == ((3,), ())
    assert defaults.decoder_start == (4,)


def test_config_json_of_other_models_says_nothing_of_it() -> None:
    defaults = defaults_of({**OLD["summaries"], "model_type": "llama"})
    assert defaults == GenerationDefaults(CONTEXT, VOCAB, (2,), SamplingParams(temperature=0.0))


@pytest.mark.parametrize(
    ("said", "config", "start"),
    [
        ({"decoder_start_token_id": 0, "bos_token_id": 4}, {"decoder_start_token_id": 2}, 0),
        ({"bos_token_id": 4}, {"decoder_start_token_id": 2}, 4),
        ({"eos_token_id": 4}, {"decoder_start_token_id": 2, "bos_token_id": 3}, 2),
        ({"eos_token_id": 4}, {"bos_token_id": 3}, 3),
        ({"eos_token_id": 4}, {"bos_token_id": None, "decoder": {"bos_token_id": 6}}, 6),
        ({}, {"decoder": {"bos_token_id": 6}}, 6),
    ],
)
def test_what_the_decoder_starts_with(
    said: dict[str, Any], config: dict[str, Any], start: int
) -> None:
    assert defaults_of(config, said).decoder_start == (start,)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({}, "Neither .* tells .* decoder starts.* Write decoder_start_token_id into"),
        ({"decoder_start_token_id": VOCAB}, f"decoder_start_token_id={VOCAB}.* no token of its 50"),
        ({"bos_token_id": "<s>"}, "bos_token_id='<s>'"),
        ({"bos_token_id": -1}, "bos_token_id=-1"),
    ],
)
def test_a_decoder_that_cannot_start_is_an_error(config: dict[str, Any], why: str) -> None:
    with pytest.raises(CheckpointError, match=why):
        defaults_of(config)


def test_a_value_out_of_range_names_the_file_in_which_it_is() -> None:
    for wrong in ({"no_repeat_ngram_size": -1}, {"min_length": -1}, {"eos_token_id": "2"}):
        with pytest.raises(CheckpointError, match=r"^config\.json of the model"):
            defaults_of({"bos_token_id": 1, **wrong})
        with pytest.raises(CheckpointError, match=r"^generation_config\.json of the model"):
            defaults_of({"bos_token_id": 1}, wrong)


def test_what_compares_with_the_source_is_not_followed() -> None:
    said = {"encoder_repetition_penalty": 2.0, "encoder_no_repeat_ngram_size": 3}
    defaults = defaults_of({"bos_token_id": 1}, said)
    assert defaults.checkpoint == CheckpointParams()
    assert defaults.not_followed == ("encoder_no_repeat_ngram_size", "encoder_repetition_penalty")
    off = {"encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0}
    assert defaults_of({"bos_token_id": 1}, off).not_followed == ()


# ------------------------------------------------------------------ requests


def test_positions_count_from_the_start_of_the_decoder() -> None:
    defaults = defaults_of(OLD["summaries"])
    limits = limits_of(defaults, source=77)
    assert limits.max_new_tokens == 41  # the start is one of 42
    (sampling,) = limits.sampling
    assert (sampling.prompt_tokens, sampling.eos_from, sampling.last_position) == (1, 6, 41)
    (sampling,) = limits_of(defaults, min_new_tokens=3, max_new_tokens=5).sampling
    assert (sampling.eos_from, sampling.last_position) == (4, 5)


def test_source_and_answer_each_fit_the_context() -> None:
    defaults = defaults_of({"bos_token_id": 1})
    assert limits_of(defaults, source=CONTEXT).max_new_tokens == CONTEXT - 1
    assert limits_of(defaults, source=CONTEXT, max_new_tokens=99).max_new_tokens == 99
    with pytest.raises(ContextLengthExceeded, match="prompt is too long: with 101 tokens"):
        limits_of(defaults, source=CONTEXT + 1, max_new_tokens=1)
    with pytest.raises(
        ContextLengthExceeded,
        match=r"^The decoder starts with 1 token and the answer may have 100: .* Lower max_new",
    ):
        limits_of(defaults, source=1, max_new_tokens=100)


def test_source_and_answer_fit_the_memory_together() -> None:
    defaults = defaults_of({"bos_token_id": 1})
    assert limits_of(defaults, source=90, kv=128 + 63).max_new_tokens == 128 - 91
    with pytest.raises(NotEnoughMemory, match=r"may take 129 tokens .* has room for 128"):
        limits_of(defaults, source=90, kv=128, max_new_tokens=38)
    assert limits_of(
        defaults, source=90, kv=128, max_new_tokens=38, fit_context=True
    ).max_new_tokens == (37)
    with pytest.raises(NotEnoughMemory):
        limits_of(defaults, source=64, kv=64)


def test_a_request_may_say_the_first_token() -> None:
    defaults = defaults_of(OLD["summaries"])
    (usual,), (asked,) = (
        limits_of(defaults, **params).sampling for params in ({}, {"forced_bos_token_id": 9})
    )
    assert (usual.forced_bos_token_id, asked.forced_bos_token_id) == (0, 9)
    with pytest.raises(InvalidRequest, match="forced_bos_token_id and a grammar both say"):
        resolve(
            SamplingParams(forced_bos_token_id=9),
            defaults,
            prompt_tokens=1,
            kv_tokens=1024,
            seed=1,
            constrained=True,
            source_tokens=3,
        )


def test_an_empty_source_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="prompt is empty"):
        limits_of(defaults_of({"bos_token_id": 1}), source=0)


def test_files_that_leave_no_answer_are_told_of() -> None:
    with pytest.raises(InvalidRequest, match=r"starts with 1 token.* allow 1 for start and answer"):
        limits_of(defaults_of({"bos_token_id": 1, "max_length": 1}))
