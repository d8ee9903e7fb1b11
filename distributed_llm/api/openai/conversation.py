"""Messages and tools of a chat's body, as turns have them. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

from distributed_llm.api.errors import invalid, unsupported

_MESSAGE_FIELDS = ("role", "content", "name", "reasoning_content", "tool_calls", "tool_call_id")

_PART_TEXTS = {"text": "text", "refusal": "refusal", "input_text": "text", "output_text": "text"}
"""Kinds of parts that are texts, and where these are."""


def turn_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages with what a turn needs of them; what else clients send back is left out.

    Raises:
        ApiError: there is none, or one has something else than text.
    """
    if not messages:
        raise invalid("The list of messages is empty. Send at least one.", "messages")
    return [_message(number, message) for number, message in enumerate(messages)]


def _message(number: int, message: Mapping[str, Any]) -> dict[str, Any]:
    if message.get("function_call"):
        raise unsupported(
            f"messages.{number}.function_call",
            "Functions are called as tools: send tool_calls, and answers with the role tool.",
        )
    if message.get("audio"):
        raise _not_text(number, "audio")
    found = {name: message[name] for name in _MESSAGE_FIELDS if name in message}
    content = found.get("content")
    if isinstance(content, list):
        found["content"] = [_part(number, part) for part in content]
    return found


def _part(number: int, part: Any) -> Any:
    if not isinstance(part, dict) or "type" not in part:
        return part  # which the client says in its words
    where = _PART_TEXTS.get(part["type"]) if isinstance(part["type"], str) else None
    if where is None:
        raise _not_text(number, part["type"])
    return {"type": "text", "text": part.get(where)}


def _not_text(number: int, kind: Any) -> Exception:
    return unsupported(
        f"messages.{number}.content",
        f"Message {number + 1} has a part of type {kind!r:.60}. Only text is served; nothing is "
        "fetched, looked at or listened to.",
    )


def turn_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the tools of a turn.

    Raises:
        ApiError: one is no function, or two have the same name.
    """
    names: set[str] = set()
    for number, tool in enumerate(tools):
        kind, function = tool.get("type", "function"), tool.get("function")
        if kind != "function":
            raise unsupported(
                f"tools.{number}.type",
                f"Tool {number + 1} is of the type {kind!r:.60}. Only functions can be called.",
            )
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise invalid(
                f'Tool {number + 1} has no function with a name. Give {{"type": "function", '
                '"function": {"name": "...", "parameters": {...}}}.',
                f"tools.{number}.function",
            )
        if not isinstance(function.get("parameters") or {}, dict):
            raise invalid(
                f"The parameters of tool {number + 1} are no JSON schema. Give an object.",
                f"tools.{number}.function.parameters",
            )
        if function["name"] in names:
            raise invalid(f"Two tools are named {function['name']!r:.100}.", "tools")
        names.add(function["name"])
    return [dict(tool) for tool in tools]


def turn_tool_choice(choice: Any, tools: Sequence[Mapping[str, Any]]) -> str:
    """Return which tool is to be called, as turns say it.

    Raises:
        ApiError: it is none of the tools, or cannot be said here.
    """
    match choice:
        case None:
            return "auto"
        case "none":
            return "none"
        case "auto" | "required":
            name = ""
        case {"type": "function", "function": {"name": str(name)}}:
            pass
        case {"type": "allowed_tools"}:
            raise unsupported("tool_choice", "Send only the tools that may be called.")
        case _:
            raise invalid(
                f"tool_choice cannot be {choice!r:.80}. Give 'auto', 'none', 'required', or "
                '{"type": "function", "function": {"name": "..."}}.',
                "tool_choice",
                "invalid_value",
            )
    if not tools:
        raise invalid("tool_choice goes with tools. Send `tools`, or leave it out.", "tool_choice")
    if name and all(tool["function"]["name"] != name for tool in tools):
        raise invalid(f"There is no tool {name!r:.100} among the tools.", "tool_choice")
    return name or str(choice)
