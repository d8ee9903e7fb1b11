"""OpenAI's names of generation parameters, and `SamplingParams`' for the same. Pure."""

import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Annotated, Any, TypeVar

from pydantic import WithJsonSchema

from distributed_llm.api.bodies import Body
from distributed_llm.api.errors import ApiError, invalid, of_exception
from distributed_llm.common.errors import ContextLengthExceeded, InvalidRequest
from distributed_llm.common.sampling_params import SamplingParams


def _any(**schema: Any) -> Any:
    """Return the type of a field whose values `SamplingParams` checks, as OpenAPI tells it."""
    types = schema.pop("type")
    return Annotated[Any, WithJsonSchema({"type": [*types, "null"], **schema})]


_Number = _any(type=["number"])
Integer = _any(type=["integer"])
"""A field that `SamplingParams` takes for a whole number."""

_Flag = _any(type=["boolean"])
_Integers = _any(type=["array"], items={"type": "integer"})
_Texts = _any(type=["string", "array"], items={"type": "string"})
_Biases = _any(type=["object"], additionalProperties={"type": "number"})


class SamplingFields(Body):
    """Fields of a body that say how to generate; names of OpenAI, or else of vLLM.

    Ranges are those of `SamplingParams`; null stands for its default.
    """

    n: Integer = None
    temperature: _Number = None
    top_p: _Number = None
    top_k: Integer = None
    min_p: _Number = None
    typical_p: _Number = None
    seed: Integer = None
    stop: _Texts = None
    stop_token_ids: _Integers = None
    ignore_eos: _Flag = None
    skip_special_tokens: _Flag = None
    presence_penalty: _Number = None
    frequency_penalty: _Number = None
    repetition_penalty: _Number = None
    no_repeat_ngram_size: Integer = None
    logit_bias: _Biases = None
    max_tokens: Integer = None
    min_tokens: Integer = None


NAMES: Mapping[str, str] = {
    **{
        name: name
        for name in (
            *("n", "temperature", "top_p", "top_k", "min_p", "typical_p", "seed"),
            *("presence_penalty", "frequency_penalty", "repetition_penalty"),
            *("no_repeat_ngram_size", "logit_bias", "stop_token_ids", "ignore_eos"),
            "skip_special_tokens",
        )
    },
    "stop": "stop_strings",
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
}
"""Names of `SamplingParams` by the names that requests have for them."""


def arguments(given: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return arguments of `SamplingParams` for the fields of a request.

    Args:
        given: values by the request's names; None is not given, others are ignored.
        names: names of `SamplingParams` by the request's names.

    Raises:
        ApiError: a value is wrong; it names the field as the request does.
    """
    values = {names[name]: value for name, value in given.items() if name in names}
    values = {name: value for name, value in values.items() if value is not None}
    try:
        SamplingParams.from_arguments(values)
    except InvalidRequest as exc:
        wrong = next((name for name in names if _is_wrong(given.get(name), names[name])), None)
        raise _renamed(exc, names, wrong, "invalid_value") from exc
    return values


def _is_wrong(value: Any, name: str) -> bool:
    try:
        SamplingParams.from_arguments({name: value})
    except InvalidRequest:
        return True
    return False


_T = TypeVar("_T")


async def named_as_asked(
    events: AsyncGenerator[_T, None], names: Mapping[str, str], prompt: str
) -> AsyncGenerator[_T, None]:
    """Yield what comes; of a request that the coordinator finds wrong, raise what `error_of` says.

    Args:
        events: closed with this.
    """
    try:
        async with aclosing(events):
            async for event in events:
                yield event
    except InvalidRequest as exc:
        raise error_of(exc, names, prompt) from exc


def error_of(exc: InvalidRequest, names: Mapping[str, str], prompt: str) -> ApiError:
    """Return the error of a request that the coordinator, or the client, finds wrong.

    Args:
        names: names of `SamplingParams` by the request's names.
        prompt: name of the field that has the prompt.
    """
    if isinstance(exc, ContextLengthExceeded):
        return _renamed(exc, names, prompt, exc.code)
    message = str(exc)
    wire = sorted(names.values(), key=message.find)
    named = next(
        (name for name in wire if re.search(rf"\b{name}\b", message) and len(name) > 1), None
    )
    param = next((name for name in names if names[name] == named), None)
    return _renamed(exc, names, param or _subject(message, prompt), "invalid_value")


_SUBJECTS = (
    (re.compile("^Bad messages? "), ""),
    (re.compile("grammar|schema|regular expression"), "response_format"),
    (re.compile(r"argument\b"), "chat_template_kwargs"),
    (re.compile(r"\btools?\b"), "tools"),
    (re.compile("(?i)prompt|messages?|conversation"), ""),
)


def _subject(message: str, prompt: str) -> str | None:
    """Return the field that a message is about; None if it names none."""
    found = next((field for words, field in _SUBJECTS if words.search(message)), None)
    return prompt if found == "" else found


def _renamed(
    exc: InvalidRequest, names: Mapping[str, str], param: str | None, code: str | None
) -> ApiError:
    """Return the error with the request's names in its message."""
    message = of_exception(exc).message
    for name, wire in names.items():
        if name != wire:
            message = re.sub(rf"\b{wire}\b", name, message)
    return invalid(message, param, code)
