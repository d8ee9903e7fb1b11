"""Generation parameters: what a user may write, and what is refused before it is sent."""

import math
from typing import Any

import msgspec
import pytest

from distributed_llm.common.errors import InvalidRequest
from distributed_llm.common.sampling_params import MAX_SEED, Sampling, SamplingParams

EVERYTHING: dict[str, Any] = {
    "max_new_tokens": 10,
    "min_new_tokens": 2,
    "temperature": 0.7,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "seed": 7,
    "stop_strings": ["a", "b"],
    "eos_token_id": [1, 2],
    "ignore_eos": True,
}


def test_every_parameter_can_be_given() -> None:
    params = SamplingParams.from_arguments(EVERYTHING)
    assert set(EVERYTHING) == set(SamplingParams.__struct_fields__)
    assert msgspec.to_builtins(params) == {
        **EVERYTHING,
        "stop_strings": ("a", "b"),
        "eos_token_id": (1, 2),
    }


def test_nothing_and_none_mean_the_defaults() -> None:
    assert SamplingParams.from_arguments({}) == SamplingParams()
    assert SamplingParams.from_arguments(dict.fromkeys(EVERYTHING)) == SamplingParams()
    assert msgspec.msgpack.encode(SamplingParams()) == b"\x80"  # and cost nothing on the wire


def test_one_stands_for_a_list() -> None:
    params = SamplingParams.from_arguments({"stop_strings": "END", "eos_token_id": 0})
    assert params.stop_strings == ("END",)
    assert params.eos_token_id == (0,)


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
        ("repetition_penalty", 100.0),
        ("seed", 0),
        ("seed", MAX_SEED),
        ("stop_strings", []),
        ("stop_strings", ("x" * 256,) * 16),
        ("eos_token_id", []),
        ("eos_token_id", [2**31 - 1]),
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
        ("repetition_penalty", math.nan),
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
        ("eos_token_id", [1] * 17),
        ("eos_token_id", "1"),
        ("ignore_eos", 1),
        ("ignore_eos", "yes"),
    ],
)
def test_what_is_wrong_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=rf"\$\.{name}"):
        SamplingParams.from_arguments({name: value})


def test_the_wire_is_as_strict_as_the_user_is_told() -> None:
    decoder = msgspec.msgpack.Decoder(SamplingParams)
    for name, value in (("temperature", math.nan), ("top_k", -1), ("other", 1)):
        with pytest.raises(msgspec.ValidationError):
            decoder.decode(msgspec.msgpack.encode({name: value}))
    assert decoder.decode(msgspec.msgpack.encode({"top_k": 1})) == SamplingParams(top_k=1)


def test_what_a_task_carries_is_greedy_and_plain_by_default() -> None:
    assert msgspec.to_builtins(Sampling()) == {}
    assert Sampling() == Sampling(
        temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, seed=0
    )
