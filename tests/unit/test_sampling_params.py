"""Generation parameters: what a user may write, and what is refused before it is sent."""

import json
import math
import re
from typing import Any

import msgspec
import pytest

from distributed_llm.common.errors import InvalidRequest
from distributed_llm.common.sampling_params import (
    MAX_BAD_WORDS,
    MAX_EOS,
    MAX_LOGIT_BIASES,
    MAX_SEED,
    MAX_SUPPRESSED,
    MAX_TOKEN_CHARS,
    MAX_WORD_TOKENS,
    Sampling,
    SamplingParams,
)

EVERYTHING: dict[str, Any] = {
    "max_new_tokens": 10,
    "fit_context": True,
    "min_new_tokens": 2,
    "temperature": 0.7,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "typical_p": 0.9,
    "no_repeat_ngram_size": 3,
    "bad_words_ids": [[5, 6], [7]],
    "suppress_tokens": [8],
    "forced_bos_token_id": "deu_Latn",
    "source_language": "eng_Latn",
    "target_language": "fra_Latn",
    "logit_bias": {5: -100.0, 6: 1.0},
    "logprobs": 3,
    "n": 4,
    "seed": 7,
    "stop_strings": ["a", "b"],
    "eos_token_id": [1, 2],
    "stop_token_ids": [9],
    "ignore_eos": True,
    "skip_special_tokens": False,
    "timeout_s": 30.0,
    "trace": True,
}


def test_every_parameter_can_be_given() -> None:
    params = SamplingParams.from_arguments(EVERYTHING)
    assert set(EVERYTHING) == set(SamplingParams.__struct_fields__)
    assert msgspec.to_builtins(params) == {
        **EVERYTHING,
        "stop_strings": ("a", "b"),
        "eos_token_id": (1, 2),
        "stop_token_ids": (9,),
        "bad_words_ids": ((5, 6), (7,)),
        "suppress_tokens": (8,),
    }


def test_nothing_and_none_mean_the_defaults() -> None:
    assert SamplingParams.from_arguments({}) == SamplingParams()
    assert SamplingParams.from_arguments(dict.fromkeys(EVERYTHING)) == SamplingParams()
    encoded = msgspec.msgpack.encode(SamplingParams())
    assert msgspec.msgpack.decode(encoded) == {}  # and cost nothing on the wire


def test_one_stands_for_a_list() -> None:
    params = SamplingParams.from_arguments({"stop_strings": "END", "eos_token_id": 0})
    assert params.stop_strings == ("END",)
    assert params.eos_token_id == (0,)


def test_token_ids_of_biases_may_be_strings_as_in_json() -> None:
    given = json.loads('{"logit_bias": {"5": -100, "50256": 1.5}}')
    assert SamplingParams.from_arguments(given).logit_bias == {5: -100.0, 50256: 1.5}


def test_an_unknown_name_is_refused_and_the_known_are_listed() -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams.from_arguments({"temprature": 1.0, "top_k": 3})
    assert "'temprature'" in str(caught.value)
    assert all(name in str(caught.value) for name in EVERYTHING)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 1),
        ("max_new_tokens", 2**31 - 1),
        ("min_new_tokens", 0),
        ("temperature", 0),
        ("temperature", 100.0),
        ("top_k", 0),
        ("top_p", 1),
        ("top_p", 1e-9),
        ("min_p", 0.0),
        ("min_p", 1.0),
        ("repetition_penalty", 0.01),
        ("repetition_penalty", 100.0),
        ("typical_p", 1),
        ("typical_p", 1e-300),
        ("no_repeat_ngram_size", 0),
        ("no_repeat_ngram_size", 64),
        ("bad_words_ids", []),
        ("bad_words_ids", ((2**31 - 1,) * MAX_WORD_TOKENS,) * MAX_BAD_WORDS),
        ("suppress_tokens", []),
        ("forced_bos_token_id", 0),
        ("forced_bos_token_id", 2**31 - 1),
        ("forced_bos_token_id", "x" * MAX_TOKEN_CHARS),
        ("suppress_tokens", (2**31 - 1,) * MAX_SUPPRESSED),
        ("presence_penalty", -100.0),
        ("presence_penalty", 100),
        ("frequency_penalty", -100.0),
        ("frequency_penalty", 100.0),
        ("logit_bias", {}),
        ("logit_bias", {0: -1000.0, 2**31 - 1: 1000}),
        ("logit_bias", dict.fromkeys(range(MAX_LOGIT_BIASES), 1.0)),
        ("logprobs", 0),
        ("logprobs", 20),
        ("n", 1),
        ("n", 64),
        ("seed", 0),
        ("seed", MAX_SEED),
        ("stop_strings", []),
        ("stop_strings", ("x" * 256,) * 16),
        ("eos_token_id", []),
        ("eos_token_id", [2**31 - 1]),
        ("eos_token_id", (2**31 - 1,) * MAX_EOS),
        ("timeout_s", 0.001),
        ("timeout_s", 1_000_000),
    ],
)
def test_the_bounds_are_allowed(name: str, value: Any) -> None:
    got = getattr(SamplingParams.from_arguments({name: value}), name)
    assert got == (tuple(value) if isinstance(value, list | tuple) else value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", -1),
        ("max_new_tokens", 2**31),
        ("max_new_tokens", 1.0),
        ("max_new_tokens", True),
        ("max_new_tokens", "10"),
        ("min_new_tokens", -1),
        ("temperature", -0.1),
        ("temperature", 100.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 0.5),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", -0.01),
        ("min_p", 1.01),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e-45),
        ("repetition_penalty", 0.0099),
        ("typical_p", 0),
        ("typical_p", 1.01),
        ("no_repeat_ngram_size", -1),
        ("no_repeat_ngram_size", 65),
        ("no_repeat_ngram_size", 2.0),
        ("bad_words_ids", [5]),
        ("bad_words_ids", [[]]),
        ("bad_words_ids", [[-1]]),
        ("bad_words_ids", [[1] * (MAX_WORD_TOKENS + 1)]),
        ("bad_words_ids", [[1]] * (MAX_BAD_WORDS + 1)),
        ("suppress_tokens", 5),
        ("forced_bos_token_id", -1),
        ("forced_bos_token_id", True),
        ("forced_bos_token_id", 1.5),
        ("forced_bos_token_id", [1]),
        ("forced_bos_token_id", ""),
        ("forced_bos_token_id", "x" * (MAX_TOKEN_CHARS + 1)),
        ("source_language", 5),
        ("source_language", ""),
        ("target_language", "x" * 33),
        ("suppress_tokens", [-1]),
        ("suppress_tokens", [1] * (MAX_SUPPRESSED + 1)),
        ("repetition_penalty", math.nan),
        ("presence_penalty", -100.1),
        ("presence_penalty", math.nan),
        ("frequency_penalty", 100.1),
        ("frequency_penalty", "0"),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {2**31: 1.0}),
        ("logit_bias", {"five": 1.0}),
        ("logit_bias", {"": 1.0}),
        ("logit_bias", {5: 1000.1}),
        ("logit_bias", {5: -math.inf}),
        ("logit_bias", {5: math.nan}),
        ("logit_bias", {5: "1"}),
        ("logit_bias", [(5, 1.0)]),
        ("logit_bias", dict.fromkeys(range(MAX_LOGIT_BIASES + 1), 1.0)),
        ("logprobs", -1),
        ("logprobs", 21),
        ("logprobs", True),
        ("n", 0),
        ("n", 65),
        ("n", 2.0),
        ("seed", -1),
        ("seed", MAX_SEED + 1),
        ("seed", 2**64),
        ("stop_strings", ""),
        ("stop_strings", [""]),
        ("stop_strings", ["x" * 257]),
        ("stop_strings", ["x"] * 17),
        ("stop_strings", [1]),
        ("stop_strings", 1),
        ("eos_token_id", -1),
        ("eos_token_id", [2**31]),
        ("eos_token_id", True),
        ("eos_token_id", [1] * (MAX_EOS + 1)),
        ("eos_token_id", "1"),
        ("ignore_eos", 1),
        ("ignore_eos", "yes"),
        ("trace", 1),
        ("timeout_s", 0),
        ("timeout_s", -1.0),
        ("timeout_s", 1e7),
        ("timeout_s", math.inf),
        ("timeout_s", "30s"),
    ],
)
def test_what_is_wrong_is_refused_with_what_to_give(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams.from_arguments({**EVERYTHING, name: value})
    said = rf"^Bad generation parameter {name}={re.escape(repr(value)[:80])}: .*\. Give .+\.$"
    assert re.match(said, str(caught.value))


def test_what_to_give_is_known_for_every_parameter() -> None:
    for name in EVERYTHING:
        with pytest.raises(InvalidRequest, match=rf"{name}=<object.*: expected .*\. Give "):
            SamplingParams.from_arguments({name: object()})


def test_the_wire_is_as_strict_as_the_user_is_told() -> None:
    decoder = msgspec.msgpack.Decoder(SamplingParams)
    for name, value in (("temperature", math.nan), ("top_k", -1), ("other", 1)):
        with pytest.raises(msgspec.ValidationError):
            decoder.decode(msgspec.msgpack.encode({name: value}))
    assert decoder.decode(msgspec.msgpack.encode({"top_k": 1})) == SamplingParams(top_k=1)


def test_what_a_task_carries_is_greedy_and_plain_by_default() -> None:
    assert msgspec.to_builtins(Sampling()) == {}
    assert Sampling() == Sampling(
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        repetition_penalty=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        seed=0,
        logprobs=None,
    )
