"""The body of `/v1/completions`, and what it asks for. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import WithJsonSchema

from distributed_llm.api.errors import invalid, unsupported
from distributed_llm.api.models import DEFAULT
from distributed_llm.api.openai.chat_request import StreamOptions
from distributed_llm.api.openai.grammars import GrammarFields, grammar_of
from distributed_llm.api.openai.sampling import NAMES, Integer, SamplingFields, arguments

MAX_PROMPTS = 1024
"""Prompts of one request."""

_TEXT = {"type": "string"}
_TOKENS = {"type": "array", "items": {"type": "integer"}}
Prompts = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                _TEXT,
                _TOKENS,
                {"type": "array", "items": _TEXT},
                {"type": "array", "items": _TOKENS},
            ]
        }
    ),
]
"""A text, token ids, or a list of either."""


class CompletionRequest(SamplingFields, GrammarFields):
    """Body of `/v1/completions`."""

    model: str = DEFAULT
    prompt: Prompts
    logprobs: Integer = None
    best_of: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    dllm_trace: bool | None = None

    @property
    def names(self) -> Mapping[str, str]:
        """Names of `SamplingParams` by those that this body has for them."""
        return {**NAMES, "logprobs": "logprobs"}


@dataclass(frozen=True)
class Completions:
    """What a body asks for.

    Attributes:
        prompts: texts or token ids.
        params: arguments of `SamplingParams`.
        n: answers to each prompt.
    """

    prompts: list[str | list[int]]
    params: dict[str, Any]
    n: int


def completions_of(body: CompletionRequest) -> Completions:
    """Return what a body asks for.

    Raises:
        ApiError: the body is wrong, or asks for what cannot be done.
    """
    params = arguments(dict(body), body.names)
    n = params.get("n") or 1
    if body.best_of is not None and body.best_of != n:
        raise unsupported(
            "best_of",
            f"best_of is {body.best_of}, and n is {n}: all answers are given. Leave it out.",
        )
    if body.suffix:
        raise unsupported(
            "suffix", "Answers follow the prompt; they cannot be made to fit a suffix."
        )
    if body.echo and body.logprobs is not None:
        raise unsupported(
            "logprobs", "Log-probabilities of prompts are not computed. Leave out echo or logprobs."
        )
    if body.stream_options and not body.stream:
        raise invalid("stream_options goes with stream.", "stream_options")
    if grammar := grammar_of(body):
        params["grammar"] = grammar
    if body.dllm_trace:
        params["trace"] = True
    return Completions(prompts_of(body.prompt, "prompt"), params, n)


def prompts_of(given: Any, param: str) -> list[str | list[int]]:
    """Return the prompts of a field.

    Raises:
        ApiError: it has none, too many, or something else.
    """
    found = given if isinstance(given, list) and given and not _is_token(given[0]) else [given]
    if len(found) > MAX_PROMPTS:
        raise invalid(f"{param} has {len(found)} prompts; {MAX_PROMPTS} are allowed.", param)
    for one in found:
        is_tokens = isinstance(one, list) and one and all(map(_is_token, one))
        if not (isinstance(one, str) or is_tokens):
            raise invalid(
                f"{param} cannot be {one!r:.80}. Give a text, a list of token ids, or a list of "
                "either.",
                param,
                "invalid_value",
            )
    return found


def _is_token(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31
