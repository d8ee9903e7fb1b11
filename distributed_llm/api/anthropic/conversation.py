"""A conversation in Anthropic's words, as a turn."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from distributed_llm.api.anthropic.bodies import CountTokensBody, InputMessage, MessagesBody
from distributed_llm.api.chat.joining import join_neighbours
from distributed_llm.api.chat.parsing.formats import Formats
from distributed_llm.api.chat.turn import NOT_TEXT, Turn
from distributed_llm.api.errors import invalid, unsupported
from distributed_llm.common.grammar import Grammar

NAMES = {
    "max_tokens": "max_new_tokens",
    "stop_sequences": "stop_strings",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
}
"""Names of sampling parameters, by those of fields."""

_BILLING = "x-anthropic-billing-header:"
"""Begins a system text of Claude Code that differs in each request and is not for the model.

Passed on, it would keep all that follows from being found in the KV cache.
"""


def turn_of(body: CountTokensBody, formats: Formats) -> Turn:
    """Return the turn that a request asks for.

    Raises:
        ApiError: it holds what cannot be served.
    """
    messages = list(_system(body))
    for number, message in enumerate(body.messages):
        messages += _messages(message, f"messages.{number}")
    if body.messages[-1].role == "assistant":
        raise unsupported(
            "messages",
            "The conversation ends with a message of the assistant, and continuing it is not "
            "supported. End with a message of the user.",
        )
    choice = body.tool_choice
    return Turn(
        messages=join_neighbours(messages),
        tools=[_tool(tool, f"tools.{number}") for number, tool in enumerate(body.tools)],
        tool_choice=_tool_choice(body),
        parallel_tool_calls=not (choice and choice.disable_parallel_tool_use),
        template_arguments=_template_arguments(body, formats),
        params=_params(body) if isinstance(body, MessagesBody) else {},
    )


def _params(body: MessagesBody) -> dict[str, Any]:
    params: dict[str, Any] = {
        "max_new_tokens": min(body.max_tokens, 2**31 - 1),
        "fit_context": True,  # clients ask for as much as Anthropic's models can give
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "stop_strings": tuple(body.stop_sequences or ()),
    }
    if body.output_config and body.output_config.format:
        schema = msgspec.json.encode(body.output_config.format.schema_).decode()
        params["grammar"] = Grammar("json_schema", schema)
    return {name: value for name, value in params.items() if value is not None}


def _template_arguments(body: CountTokensBody, formats: Formats) -> dict[str, Any]:
    if formats.thinking_switch is None or body.thinking is None:
        return {}
    match body.thinking.type:
        case "enabled" | "disabled" as kind:
            return {formats.thinking_switch: kind == "enabled"}
    return {}  # the model decides


def _tool_choice(body: CountTokensBody) -> str:
    match body.tool_choice:
        case None:
            return "auto"
        case choice if choice.type == "tool":
            if choice.name is None:
                raise invalid("The tool choice names no tool.", "tool_choice.name")
            return choice.name
        case choice:
            return "required" if choice.type == "any" else choice.type


def _tool(tool: Mapping[str, Any], param: str) -> dict[str, Any]:
    match tool:
        case {"name": str(name), "input_schema": dict(schema)}:
            function = {"name": name, "parameters": schema}
            if description := tool.get("description"):
                function["description"] = description
            return {"type": "function", "function": function}
        case {"type": str(kind)} if kind != "custom":
            raise unsupported(
                param,
                f"A tool of type {kind!r:.60} is run by Anthropic's own servers, and not by this "
                "one. Leave it out, or give the model a tool of your own.",
            )
    raise invalid("A tool has a name and an input_schema.", param)


def _system(body: CountTokensBody) -> Iterator[dict[str, Any]]:
    texts = [text for text in _texts(body.system or "", "system") if not text.startswith(_BILLING)]
    if content := "\n\n".join(filter(None, texts)):
        yield {"role": "system", "content": content}


def _messages(message: InputMessage, param: str) -> Iterator[dict[str, Any]]:
    content = f"{param}.content"
    match message.role:
        case "system":
            text = "\n\n".join(_texts(message.content, content))
            yield {"role": "system", "content": text}
        case "user":
            yield from _of_user(message.content, content)
        case "assistant":
            yield _of_assistant(message.content, content)


def _of_user(content: str | list[dict[str, Any]], param: str) -> Iterator[dict[str, Any]]:
    """Yield results of tools, and what is said, in their order."""
    said: list[str] = []
    for number, block in enumerate(_blocks(content)):
        match block:
            case {"type": "tool_result", "tool_use_id": str(call)}:
                if said:
                    yield {"role": "user", "content": "\n".join(said)}
                    said = []
                result = _result(block, f"{param}.{number}.content")
                yield {"role": "tool", "tool_call_id": call, "content": result}
            case _:
                said.append(_text(block, f"{param}.{number}"))
    if said:
        yield {"role": "user", "content": "\n".join(said)}


def _result(block: Mapping[str, Any], param: str) -> str:
    """Return what a tool says; a picture in it must not end a conversation that is under way."""
    content = block.get("content") or ""
    if not isinstance(content, str | list):
        raise invalid("What a tool says is a text, or a list of blocks.", param)
    texts = [
        part["text"] if isinstance(part.get("text"), str) else NOT_TEXT for part in _blocks(content)
    ]
    text = "\n".join(texts)
    return f"Error: {text}" if block.get("is_error") is True else text


def _of_assistant(content: str | list[dict[str, Any]], param: str) -> dict[str, Any]:
    said: list[str] = []
    thought: list[str] = []
    calls: list[dict[str, Any]] = []
    for number, block in enumerate(_blocks(content)):
        match block:
            case {"type": "thinking", "thinking": str(text)}:
                thought.append(text)
            case {"type": "redacted_thinking"}:
                pass
            case {"type": "tool_use", "id": str(call), "name": str(name), "input": dict(given)}:
                function = {"name": name, "arguments": given}
                calls.append({"id": call, "type": "function", "function": function})
            case _:
                said.append(_text(block, f"{param}.{number}"))
    message: dict[str, Any] = {"role": "assistant", "content": "\n".join(said)}
    if thought:
        message["reasoning_content"] = "\n".join(thought)
    if calls:
        message["tool_calls"] = calls
    return message


def _texts(content: str | list[dict[str, Any]], param: str) -> list[str]:
    blocks = enumerate(_blocks(content))
    return [_text(block, f"{param}.{number}") for number, block in blocks]


def _blocks(content: str | list[Any]) -> Sequence[Mapping[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [part for part in content if isinstance(part, Mapping)]


def _text(block: Mapping[str, Any], param: str) -> str:
    match block:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": "image" | "document" | "search_result" | "container_upload" as kind}:
            raise unsupported(
                param, f"A block of type {kind!r} is no text; this model reads only text."
            )
        case {"type": str(kind)}:
            raise invalid(
                f"A block of type {kind!r:.60} is unknown here, or has a wrong field.", param
            )
    raise invalid("A block of content has a type, and a text.", param)
