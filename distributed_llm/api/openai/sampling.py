"""OpenAI's names of generation parameters, and `SamplingParams`' for the same. Pure."""

import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Annotated, Any, TypeVar

from pydantic import WithJsonSchema

from distributed_llm.api.bodies import Body
from distributed_llm.api.errors import ApiError, invalid, of_exception
from distributed_llm.api.openai.grammars import GRAMMAR_FIELDS
from distributed_llm.common.errors import ContextLengthExceeded, InvalidRequest
from distributed_llm.common.sampling_params import SamplingParams

# What these fields may be, `SamplingParams` checks; OpenAPI is told their types.
_Number = Annotated[Any, WithJsonSchema({"type": ["number", "null"]})]
_Flag = Annotated[Any, WithJsonSchema({"type": ["boolean", "null"]})]
_Integers = Annotated[
    Any, WithJsonSchema({"type": ["array", "null"], "items": {"type": "integer"}})
]
_Texts = Annotated[
    Any, WithJsonSchema({"type": ["string", "array", "null"], "items": {"type": "string"}})
]
_Name = Annotated[Any, WithJsonSchema({"type": ["string", "null"]})]
_Token = Annotated[Any, WithJsonSchema({"type": ["integer", "string", "null"]})]
_Biases = Annotated[
    Any, WithJsonSchema({"type": ["object", "null"], "additionalProperties": {"type": "number"}})
]
Integer = Annotated[Any, WithJsonSchema({"type": ["integer", "null"]})]
"""A field that `SamplingParams` takes for a whole number."""


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
    forced_bos_token_id: _Token = None
    source_language: _Name = None
    target_language: _Name = None
    logit_bias: _Biases = None
    max_tokens: Integer = None
    min_tokens: Integer = None

    @property
    def names(self) -> Mapping[str, str]:
        """Names of `SamplingParams` by those that this body has for them."""
        return NAMES


NAMES: Mapping[str, str] = {
    **{
        name: name
        for name in (
            *("n", "temperature", "top_p", "top_k", "min_p", "typical_p", "seed"),
            *("presence_penalty", "frequency_penalty", "repetition_penalty"),
            *("no_repeat_ngram_size", "logit_bias", "stop_token_ids", "ignore_eos"),
            *("skip_special_tokens", "forced_bos_token_id", "source_language", "target_language"),
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
    events: AsyncGenerator[_T, None],
    names: Mapping[str, str],
    prompt: str,
    given: Mapping[str, Any],
) -> AsyncGenerator[_T, None]:
    """Yield what comes; of a request that the coordinator finds wrong, raise what `error_of` says.

    Args:
        events: closed with this.
        names: names of `SamplingParams` by the request's names.
        prompt: name of the field that has the prompt.
        given: values by the request's names.
    """
    try:
        async with aclosing(events):
            async for event in events:
                yield event
    except InvalidRequest as exc:
        raise error_of(exc, names, prompt, given) from exc


def error_of(
    exc: InvalidRequest, names: Mapping[str, str], prompt: str, given: Mapping[str, Any]
) -> ApiError:
    """Return the error of a request that the coordinator, or the client, finds wrong.

    Args:
        names: names of `SamplingParams` by the request's names.
        prompt: name of the field that has the prompt.
        given: values by the request's names.
    """
    message = str(exc)
    code = "invalid_value"
    if isinstance(exc, ContextLengthExceeded):
        if "prompt" in message:
            return _renamed(exc, names, prompt, exc.code)
        code = exc.code  # of an encoder-decoder, whose answer alone may be too long
    if "grammar" in message:
        fields = (*GRAMMAR_FIELDS, "text.format")
        asked = next((name for name in fields if given.get(name) is not None), "tools")
        return _renamed(exc, names, asked, "invalid_value")
    if token := re.match(r"Token id (\d+) ", message):
        return _renamed(exc, names, _place_of(int(token[1]), given) or prompt, "invalid_value")
    wire = sorted(names.values(), key=message.find)
    named = next(
        (name for name in wire if re.search(rf"\b{name}\b", message) and len(name) > 1), None
    )
    param = next((name for name in names if names[name] == named), None)
    return _renamed(exc, names, param or _subject(message, prompt), code)


def _place_of(token: int, given: Mapping[str, Any]) -> str | None:
    """Return the parameter that names a token; None if none does."""
    if str(token) in (given.get("logit_bias") or ()):
        return "logit_bias"
    if token == given.get("forced_bos_token_id"):
        return "forced_bos_token_id"
    return "stop_token_ids" if token in (given.get("stop_token_ids") or ()) else None


_SUBJECTS = (
    (re.compile("^Bad messages? "), ""),
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
