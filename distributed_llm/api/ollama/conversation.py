"""Messages and tools of Ollama's chats, as turns have them. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

from distributed_llm.api.chat.parsing.formats import Formats
from distributed_llm.api.chat.turn import Turn
from distributed_llm.api.errors import ApiError, invalid, unsupported
from distributed_llm.api.ollama.bodies import ChatBody, GenerateBody
from distributed_llm.api.ollama.options import params_of, thinking
from distributed_llm.api.openai.conversation import turn_tools


def turn_of_chat(body: ChatBody, formats: Formats, template: str) -> Turn:
    """Return the turn that a chat asks for.

    Raises:
        ApiError: the body is wrong, or asks for what cannot be done.
    """
    return Turn(
        messages=_messages(body.messages or ()),
        tools=turn_tools(body.tools or ()),
        template_arguments=thinking(body, formats, template, body.asked_model),
        params=params_of(body),
    )


def turn_of_prompt(body: GenerateBody, formats: Formats, template: str) -> Turn:
    """Return the turn that a single prompt asks for.

    Raises:
        ApiError: the body is wrong, or asks for what cannot be done.
    """
    system = [{"role": "system", "content": body.system}] if body.system else []
    return Turn(
        messages=[*system, {"role": "user", "content": body.prompt or ""}],
        template_arguments=thinking(body, formats, template, body.asked_model),
        params=params_of(body),
    )


def check_prompt(body: GenerateBody) -> None:
    """Check that a prompt asks for nothing that cannot be done.

    Raises:
        ApiError: it does.
    """
    if body.images:
        raise _only_text("images")
    if body.template:
        raise unsupported(
            "template", "The chat template is the checkpoint's own. Leave template out, or set raw."
        )
    if body.suffix:
        raise unsupported("suffix", "Text is continued, not filled in. Leave suffix out.")
    if body.context:
        raise unsupported("context", "Send the whole conversation to /api/chat instead.")
    if body.raw and body.system:
        raise unsupported("system", "A raw prompt has no system prompt. Put it into the prompt.")


def _messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages as OpenAI's chats have them: calls have ids, and results name them."""
    found = []
    open_calls: list[tuple[str, str]] = []
    for number, message in enumerate(messages):
        if message.get("images"):
            raise _only_text(f"messages.{number}.images")
        one = {name: message[name] for name in ("role", "content") if name in message}
        if isinstance(message.get("thinking"), str):
            one["reasoning_content"] = message["thinking"]
        if calls := message.get("tool_calls"):
            one["tool_calls"] = _calls(number, calls, open_calls)
        if message.get("role") == "tool":
            one["tool_call_id"] = _called(message, open_calls)
            if isinstance(message.get("tool_name"), str):
                one["name"] = message["tool_name"]
        one.setdefault("content", "")
        found.append(one)
    return found


def _calls(number: int, calls: Any, open_calls: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Return the calls of a message; they are added to those without a result."""
    found: list[dict[str, Any]] = []
    for call in calls if isinstance(calls, list) else [None]:
        match call:
            case {"function": {"name": str(name), **function}, **rest}:
                call_id = rest.get("id") or f"{number:04d}{len(found):05d}"  # as long as Mistral's
                open_calls.append((name, str(call_id)))
                told = {"name": name, "arguments": function.get("arguments") or {}}
                found.append({"id": call_id, "type": "function", "function": told})
            case _:
                raise invalid(
                    f"Message {number + 1} has a call that is none. Give "
                    '{"function": {"name": "...", "arguments": {...}}}.',
                    f"messages.{number}.tool_calls",
                )
    return found


def _called(message: Mapping[str, Any], open_calls: list[tuple[str, str]]) -> str:
    """Return the id of the call that a message has the result of: by id, by name, or in order."""
    given = message.get("tool_call_id")
    if isinstance(given, str) and given:
        return given
    name = message.get("tool_name")
    place = next((at for at, (called, _) in enumerate(open_calls) if called == name), 0)
    return open_calls.pop(place)[1] if open_calls else ""


def _only_text(param: str) -> ApiError:
    return unsupported(param, "Only text is served; images are not looked at. Leave them out.")
