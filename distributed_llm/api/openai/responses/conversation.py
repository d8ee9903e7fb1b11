"""A conversation in the words of Responses, as a turn."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from distributed_llm.api.chat.joining import join_neighbours
from distributed_llm.api.chat.parsing.formats import Formats
from distributed_llm.api.chat.turn import NOT_TEXT, USUAL_MAX_NEW_TOKENS, Turn
from distributed_llm.api.errors import invalid, unsupported
from distributed_llm.api.openai.responses.bodies import Item, ResponsesBody
from distributed_llm.api.openai.responses.writer import new_id
from distributed_llm.common.grammar import Grammar

LOGPROBS = "message.output_text.logprobs"
"""In `include`: log-probabilities are asked for."""

NAMES = {
    "max_output_tokens": "max_new_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_logprobs": "logprobs",
}
"""Names of sampling parameters, by those of fields."""

_LEFT_OUT = frozenset(
    {"custom", "image_generation", "local_shell", "namespace", "shell", "tool_search"}
    | {"apply_patch", "web_search", "web_search_preview"}
)
"""Tools that agents offer beside functions, and can do without."""


def items_of(given: str | list[Item]) -> list[Item]:
    """Return the input of a request as items as they are kept: with ids, messages in parts."""
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    return [{**_in_parts(item), "id": item.get("id") or new_id("item")} for item in given]


def _in_parts(item: Item) -> Item:
    match item:
        case {"role": role, "content": str(text)}:
            kind = "output_text" if role == "assistant" else "input_text"
            return {**item, "type": "message", "content": [{"type": kind, "text": text}]}
    return item


def left_out_tools(body: ResponsesBody) -> list[str]:
    """Return the types of the tools that the model is not told of."""
    kinds = {str(tool.get("type")) for tool in body.tools or ()}
    return sorted(kinds & _LEFT_OUT)


def turn_of(body: ResponsesBody, items: Sequence[Item], formats: Formats) -> Turn:
    """Return the turn that a request asks for.

    Args:
        items: of the whole conversation.

    Raises:
        ApiError: the request holds what cannot be served.
    """
    _refuse_unsupported(body)
    if not items:
        raise invalid("The input is empty. Send at least one message.", "input")
    messages = [{"role": "system", "content": body.instructions}] if body.instructions else []
    for number, item in enumerate(items):
        messages += _messages(item, f"input.{number}")
    choice, tools = _tool_choice(body)
    return Turn(
        messages=join_neighbours(messages),
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        template_arguments=_template_arguments(body, formats),
        params=_params(body),
    )


def _refuse_unsupported(body: ResponsesBody) -> None:
    for name, why in {
        "background": "Responses are not made in the background. Stream the response instead.",
        "conversation": "Conversations are not kept. Use previous_response_id, or send all input.",
        "prompt": "Prompts are not kept. Send the text as instructions or input.",
    }.items():
        if getattr(body, name):
            raise unsupported(name, why)
    if body.truncation == "auto":
        raise unsupported("truncation", "Input that is too long is not cut. Send less of it.")


def _params(body: ResponsesBody) -> dict[str, Any]:
    params: dict[str, Any] = {
        "max_new_tokens": min(body.max_output_tokens or USUAL_MAX_NEW_TOKENS, 2**31 - 1),
        "fit_context": True,
        "temperature": body.temperature,
        "top_p": body.top_p,
    }
    if LOGPROBS in (body.include or ()) or body.top_logprobs:
        params["logprobs"] = body.top_logprobs or 0
    params["grammar"] = _grammar(body)
    return {name: value for name, value in params.items() if value is not None}


def _grammar(body: ResponsesBody) -> Grammar | None:
    form = body.text.format if body.text else None
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return Grammar("json_object")
    if form.schema_ is None:
        raise invalid("The format has no schema.", "text.format.schema")
    return Grammar("json_schema", msgspec.json.encode(form.schema_).decode())


def _template_arguments(body: ResponsesBody, formats: Formats) -> dict[str, Any]:
    effort = body.reasoning.effort if body.reasoning else None
    if formats.thinking_switch is None or effort is None:
        return {}
    return {formats.thinking_switch: effort != "none"}


def _tool_choice(body: ResponsesBody) -> tuple[str, list[dict[str, Any]]]:
    """Return the choice, and the tools that may be called."""
    tools = list(_functions(body))
    match body.tool_choice:
        case None:
            return "auto", tools
        case "auto" | "none" | "required" as choice:
            return choice, tools
        case {"type": "function", "name": str(name)}:
            return name, tools
        case {"type": "allowed_tools", "mode": "auto" | "required" as mode, "tools": list(allowed)}:
            names = [tool.get("name") for tool in allowed if isinstance(tool, Mapping)]
            return mode, [tool for tool in tools if tool["function"]["name"] in names]
    raise invalid(
        'The tool choice is "auto", "none", "required", or a function: {"type": "function", '
        '"name": "..."}.',
        "tool_choice",
        "invalid_value",
    )


def _functions(body: ResponsesBody) -> Iterator[dict[str, Any]]:
    for number, tool in enumerate(body.tools or ()):
        match tool:
            case {"type": "function", "name": str()} if isinstance(
                tool.get("parameters") or {}, dict
            ):
                names = ("name", "description", "parameters")
                function = {name: tool[name] for name in names if tool.get(name) is not None}
                yield {"type": "function", "function": function}
            case {"type": str(kind)} if kind in _LEFT_OUT:
                pass
            case {"type": str(kind)} if kind != "function":
                raise unsupported(
                    f"tools.{number}",
                    f"A tool of type {kind!r:.60} is run by OpenAI's own servers, and not by this "
                    "one. Leave it out, or give the model a function.",
                )
            case _:
                raise invalid(
                    "A tool has a type, and a function has a name and a schema of its parameters.",
                    f"tools.{number}",
                )


def _messages(item: Item, param: str) -> Iterator[dict[str, Any]]:
    match item:
        case {"role": "user" | "system" | "developer" | "assistant" as role, "content": content}:
            yield {"role": role, "content": _text(content, f"{param}.content")}
        case {"type": "reasoning"}:
            yield {"role": "assistant", "content": "", "reasoning_content": _thought(item)}
        case {"type": "function_call", "call_id": str(call), "name": str(name)}:
            yield _call(call, name, _arguments(item.get("arguments")))
        case {"type": "custom_tool_call", "call_id": str(call), "name": str(name)}:
            given = msgspec.json.encode({"input": item.get("input")}).decode()
            yield _call(call, name, given)
        case {"type": "function_call_output" | "custom_tool_call_output", "call_id": str(call)}:
            output = _output(item.get("output") or "", f"{param}.output")
            yield {"role": "tool", "tool_call_id": call, "content": output}
        case {"type": "item_reference"}:
            raise unsupported(
                param, "Items are not kept by themselves. Send the item, or previous_response_id."
            )
        case _:
            kind = item.get("type")
            raise invalid(f"An item of type {kind!r:.60} is unknown, or has a wrong field.", param)


def _arguments(written: Any) -> str:
    """Return the arguments of a call, which templates read: a call may have been broken off."""
    try:
        msgspec.json.decode(written, type=dict)
    except (TypeError, msgspec.MsgspecError, ValueError, RecursionError):
        return msgspec.json.encode({"broken_off": written} if written else {}).decode()
    return str(written)


def _call(call: str, name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    tool_call = {"id": call, "type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [tool_call]}


def _thought(item: Item) -> str:
    parts = [item.get(name) for name in ("content", "summary")]
    texts = [_text_in(part) for some in parts if isinstance(some, list) for part in some]
    return "\n".join(filter(None, texts))


def _output(output: Any, param: str) -> str:
    """Return what a tool says; a picture in it must not end a conversation that is under way."""
    if isinstance(output, str):
        return output
    if not isinstance(output, list):
        raise invalid("What a tool says is a text, or a list of parts.", param)
    return "\n".join(_text_in(part) or NOT_TEXT for part in output)


def _text_in(part: Any) -> str:
    match part:
        case {"text": str(text)}:
            return text
    return ""


def _text(content: Any, param: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid("The content of a message is a text, or a list of parts.", param)
    return "\n".join(_part(part, f"{param}.{number}") for number, part in enumerate(content))


def _part(part: Any, param: str) -> str:
    match part:
        case {"type": "input_text" | "output_text" | "text", "text": str(text)}:
            return text
        case {"type": "refusal", "refusal": str(text)}:
            return text
        case {"type": str(kind)} if kind not in ("input_text", "output_text", "text", "refusal"):
            raise unsupported(
                param, f"A part of type {kind!r:.60} is no text; this model reads only text."
            )
    raise invalid('A part of a content is {"type": "input_text", "text": "..."}.', param)
