"""The body of `/v1/chat/completions`, and the turn that it asks for. Pure."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import WithJsonSchema

from distributed_llm.api.bodies import Part
from distributed_llm.api.chat.parsing.formats import Formats
from distributed_llm.api.chat.turn import USUAL_MAX_NEW_TOKENS, Turn
from distributed_llm.api.errors import ApiError, invalid, unsupported
from distributed_llm.api.models import DEFAULT
from distributed_llm.api.openai.conversation import turn_messages, turn_tool_choice, turn_tools
from distributed_llm.api.openai.grammars import GrammarFields, grammar_of
from distributed_llm.api.openai.sampling import NAMES, Integer, SamplingFields, arguments

_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")

_SWITCHES = (
    *("enable_thinking", "thinking", "preserve_thinking", "clear_thinking"),
    *("thinking_budget", "reasoning_effort"),
)
"""Arguments of chat templates that say how to think; they are no lists or objects."""


ToolChoice = Annotated[Any, WithJsonSchema({"type": ["string", "object", "null"]})]
"""Which tool is to be called: "auto", "none", "required", or an object that names one."""


class StreamOptions(Part):
    """How to stream."""

    include_usage: bool | None = None


class ChatRequest(SamplingFields, GrammarFields):
    """Body of `/v1/chat/completions`."""

    model: str = DEFAULT
    messages: list[dict[str, Any]]
    max_completion_tokens: Integer = None
    logprobs: bool | None = None
    top_logprobs: Integer = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    echo: bool | None = None
    dllm_trace: bool | None = None

    @property
    def names(self) -> Mapping[str, str]:
        """Names of `SamplingParams` by those that this body has for them."""
        longest = (
            "max_completion_tokens" if self.max_completion_tokens is not None else "max_tokens"
        )
        others = {name: wire for name, wire in NAMES.items() if name != "max_tokens"}
        return {**others, longest: "max_new_tokens", "top_logprobs": "logprobs"}


def turn_of(body: ChatRequest, formats: Formats, template: str) -> Turn:
    """Return the turn that a body asks for.

    Args:
        formats: how the model writes.
        template: its chat template.

    Raises:
        ApiError: the body is wrong, or asks for what cannot be done.
    """
    if body.echo:
        raise unsupported("echo", "A conversation is not repeated in its answer. Leave echo out.")
    if body.stream_options and not body.stream:
        raise invalid("stream_options goes with stream.", "stream_options")
    tools = turn_tools(body.tools or ())
    return Turn(
        messages=turn_messages(body.messages),
        tools=tools,
        tool_choice=turn_tool_choice(body.tool_choice, tools),
        parallel_tool_calls=body.parallel_tool_calls is not False,
        template_arguments=_template_arguments(body, formats, template),
        params=_params(body),
    )


def _params(body: ChatRequest) -> dict[str, Any]:
    most, newer = body.max_tokens, body.max_completion_tokens
    if most is not None and newer is not None and most != newer:
        raise invalid(
            f"max_tokens is {most!r:.40} and max_completion_tokens {newer!r:.40}; "
            "give one of them.",
            "max_tokens",
        )
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs goes with logprobs: true.", "top_logprobs")
    likely = (body.top_logprobs or 0) if body.logprobs else None
    given = {**dict(body), "top_logprobs": likely}
    params = arguments(given, body.names)
    if "max_new_tokens" not in params:
        params |= {"max_new_tokens": USUAL_MAX_NEW_TOKENS, "fit_context": True}
    if grammar := grammar_of(body):
        params["grammar"] = grammar
    if body.dllm_trace:
        params["trace"] = True
    return params


def _template_arguments(body: ChatRequest, formats: Formats, template: str) -> dict[str, Any]:
    given = dict(body.chat_template_kwargs or {})
    for name in _SWITCHES:
        if name in given and not isinstance(given[name], bool | int | float | str):
            raise invalid(f"{name} cannot be {given[name]!r:.60}.", "chat_template_kwargs")
    return {**_effort(body.reasoning_effort, formats, template), **given}


def _effort(effort: str | None, formats: Formats, template: str) -> dict[str, Any]:
    """Return the arguments by which a template is told how much to think."""
    if effort is None:
        return {}
    if effort not in _EFFORTS:
        raise invalid(
            f"reasoning_effort cannot be {effort!r:.40}. Give one of {', '.join(_EFFORTS)}.",
            "reasoning_effort",
            "invalid_value",
        )
    if formats.thinking_switch:
        return {formats.thinking_switch: effort != "none"}
    if "reasoning_effort" in template:
        return {"reasoning_effort": effort}
    if effort == "medium" or (effort == "none" and not formats.reasoning):
        return {}
    raise _no_effort()


def _no_effort() -> ApiError:
    return unsupported(
        "reasoning_effort",
        "The model's chat template cannot be told how much to think. Leave reasoning_effort out.",
    )
