"""Messages and tools of Ollama's chats, as turns have them. Pure."""

import itertools
from collections import defaultdict, deque
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
    open_calls = _OpenCalls()
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


class _OpenCalls:
    """Calls without a result, of which there may be very many."""

    def __init__(self) -> None:
        self._ids: dict[int, str] = {}
        self._by_name: defaultdict[str, deque[int]] = defaultdict(deque)
        self._numbers = itertools.count()

    def add(self, name: str, call_id: str) -> None:
        """Add a call."""
        number = next(self._numbers)
        self._ids[number] = call_id
        self._by_name[name].append(number)

    def take(self, name: object) -> str:
        """Remove and return the id of the first call of a name, or else of all; "" if none is."""
        named = self._by_name.get(name) if isinstance(name, str) else None
        while named:
            number = named.popleft()
            if number in self._ids:
                return self._ids.pop(number)
        first = next(iter(self._ids), None)
        return "" if first is None else self._ids.pop(first)


def _calls(number: int, calls: Any, open_calls: _OpenCalls) -> list[dict[str, Any]]:
    """Return the calls of a message; they are added to those without a result."""
    found: list[dict[str, Any]] = []
    for call in calls if isinstance(calls, list) else [None]:
        match call:
            case {"function": {"name": str(name), **function}, **rest}:
                call_id = rest.get("id") or f"{number:04d}{len(found):05d}"  # as long as Mistral's
                open_calls.add(name, str(call_id))
                told = {"name": name, "arguments": function.get("arguments") or {}}
                found.append({"id": call_id, "type": "function", "function": told})
            case _:
                raise invalid(
                    f"Message {number + 1} has a call that is none. Give "
                    '{"function": {"name": "...", "arguments": {...}}}.',
                    f"messages.{number}.tool_calls",
                )
    return found


def _called(message: Mapping[str, Any], open_calls: _OpenCalls) -> str:
    """Return the id of the call that a message has the result of: by id, by name, or in order."""
    given = message.get("tool_call_id")
    if isinstance(given, str) and given:
        return given
    return open_calls.take(message.get("tool_name"))


def _only_text(param: str) -> ApiError:
    return unsupported(param, "Only text is served; images are not looked at. Leave them out.")
