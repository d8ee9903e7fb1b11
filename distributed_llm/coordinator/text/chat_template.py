"""A conversation written out by the chat template of the checkpoint."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import msgspec
from jinja2 import Environment

from distributed_llm.common.errors import InvalidRequest
from distributed_llm.common.messages import Chat, ChatMessage, ToolCall

_Turns = list[dict[str, Any]]
"""A conversation as templates know it."""

_FIXED_CHARS = 65536
"""Characters that a chat template may add to any conversation."""

_CHARS_PER_TURN = 1024
"""Characters that it may add for each message besides."""

_GROWTH = 2
"""How many times a text may appear in what it writes."""

_JSON_GROWTH = 16
"""How much longer it may write JSON, which it may indent."""

_ERROR_CHARS = 500
"""Characters of another package's error message that are passed on."""


def short(exc: Exception) -> str:
    """Return what an exception of another package says, in a bounded number of characters."""
    return f"{type(exc).__name__}: {exc}"[:_ERROR_CHARS]


def plain_template(tokenizer: Any) -> str | None:
    """Return the template for conversations without tools; None if there is none.

    Args:
        tokenizer: of transformers.
    """
    if not tokenizer.chat_template:
        return None
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:  # several templates, and none of them is the default
        return None


def tool_template(tokenizer: Any) -> str | None:
    """Return the template for conversations with tools; None if there is none of its own."""
    templates = tokenizer.chat_template
    return templates.get("tool_use") if isinstance(templates, dict) else None


def render_chat(tokenizer: Any, chat: Chat) -> str:
    """Return a conversation as text, ready for the assistant's answer.

    Args:
        tokenizer: of transformers.

    Raises:
        InvalidRequest: there is no chat template, it refuses the conversation or does not know its
            tools or arguments, or what it wrote is far longer than what it was given.
    """
    if not chat.messages:
        raise InvalidRequest("The conversation is empty. Send at least one message.")
    if not tokenizer.chat_template:
        raise InvalidRequest(
            "The model has no chat template; it was not made for conversations. Send the prompt as "
            "text."
        )
    tools = _tools(chat)
    arguments = _arguments(chat)
    try:
        template = _template(tokenizer, tools, arguments)
        known = _Vocabulary.of(template)
        _check_known(known, tools, arguments)
        text = _written(
            _ways(chat, known),
            lambda turns: str(
                tokenizer.apply_chat_template(
                    turns,
                    tools=tools or None,
                    chat_template=template,
                    add_generation_prompt=True,
                    tokenize=False,
                    **arguments,
                )
            ),
        )
    except InvalidRequest:
        raise
    except Exception as exc:  # a template is a program; it may fail in any way
        raise InvalidRequest(
            f"The model's chat template refuses these messages: {short(exc).rstrip('.')}."
        ) from exc
    if len(text) > _most_chars(chat):
        raise InvalidRequest(
            f"The model's chat template made {len(text)} characters of a much shorter "
            "conversation; it is broken. Send the prompt as text."
        )
    return text


def _template(tokenizer: Any, tools: list[Any], arguments: Mapping[str, Any]) -> str:
    """Return the template for a conversation: of several, the one that is named for what it has."""
    named = isinstance(tokenizer.chat_template, dict) and "rag" in tokenizer.chat_template
    if named and not tools and "documents" in arguments:
        return str(tokenizer.get_chat_template("rag"))
    return str(tokenizer.get_chat_template(tools=tools or None))


def _ways(chat: Chat, known: "_Vocabulary") -> list[_Turns]:
    """Return what a conversation may look like to a template, the usual way first.

    A few templates want the arguments of calls as text (DeepSeek's). Others know no system: its
    words are put before those of the user's first message, as the makers of such models advise.
    """
    ways = [[_turn(message, known, _call) for message in chat.messages]]
    if any(message.tool_calls for message in chat.messages):
        ways.append([_turn(message, known, _call_with_text) for message in chat.messages])
    return [*ways, *(merged for turns in ways if (merged := _without_system(turns)))]


def _written(ways: Sequence[_Turns], write: Callable[[_Turns], str]) -> str:
    """Return a conversation as a template writes it.

    The first way counts that it does not refuse, and in which it does not leave the system out. A
    template that leaves it out in any way may as well write it in other letters.

    Args:
        write: renders turns by the template, which may fail in any way.
    """
    begins = ways[0][0]
    said = str(begins["content"]).strip() if begins["role"] == "system" else ""
    texts, failures = [], []
    for turns in ways:
        try:
            text = write(turns)
        except Exception as exc:
            failures.append(exc)
            continue
        if said in text:
            return text
        texts.append(text)
    if texts:
        return texts[0]
    raise failures[0]


def _without_system(turns: _Turns) -> _Turns | None:
    """Return turns in which the user says what the system says; None if they are not such."""
    match turns:
        case [{"role": "system"} as system, {"role": "user"} as user, *others]:
            texts = (str(system["content"]), str(user["content"]))
            return [{**user, "content": "\n\n".join(filter(str.strip, texts))}, *others]
    return None


def _tools(chat: Chat) -> list[dict[str, Any]]:
    tools = _decode("tools", chat.tools, [])
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InvalidRequest("The tools are no list of objects.")
    return tools


def _arguments(chat: Chat) -> dict[str, Any]:
    arguments = _decode("chat template's arguments", chat.template_arguments, {})
    if not isinstance(arguments, dict):
        raise InvalidRequest("The chat template's arguments are no object.")
    if reserved := sorted(_reserved() & arguments.keys()):
        raise InvalidRequest(
            f"{reserved[0]!r} is no argument that a request may give to the chat template."
        )
    return arguments


def _decode(what: str, text: str, default: Any) -> Any:
    if not text:
        return default
    try:
        return msgspec.json.decode(text)
    except (ValueError, RecursionError) as exc:
        raise InvalidRequest(f"The {what} are no JSON: {short(exc)}.") from exc


@cache
def _reserved() -> frozenset[str]:
    """Return the arguments of `apply_chat_template` that are not for the template."""
    from transformers import PreTrainedTokenizerBase

    parameters = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    return frozenset(parameters) - {"documents", "kwargs"} | {"messages"}


@dataclass(frozen=True)
class _Vocabulary:
    """What a template speaks of.

    Attributes:
        names: of variables, fields, tests and the like.
        strings: that it compares with or writes; not the text between its tags.
    """

    names: frozenset[str]
    strings: frozenset[str]

    @classmethod
    def of(cls, template: str) -> "_Vocabulary":
        tokens = list(Environment(autoescape=False).lex(template))  # noqa: S701 - nothing is rendered
        return cls(
            frozenset(value for _, kind, value in tokens if kind == "name"),
            frozenset(value.strip("'\"") for _, kind, value in tokens if kind == "string"),
        )


def _check_known(known: _Vocabulary, tools: list[Any], arguments: Mapping[str, Any]) -> None:
    """Refuse what the template would pass over in silence."""
    if tools and "tools" not in known.names:
        raise InvalidRequest(
            "The model's chat template knows no tools. Ask without tools, or use a model that was "
            "made to call them."
        )
    if unknown := sorted(arguments.keys() - known.names):
        raise InvalidRequest(
            f"The model's chat template knows no argument {unknown[0]!r}. Leave it out."
        )


def _turn(
    message: ChatMessage, known: _Vocabulary, call_of: Callable[[ToolCall], dict[str, Any]]
) -> dict[str, Any]:
    """Return a message as templates know them: only with the fields that it has.

    To templates that were written before there were developers they are the system.

    Args:
        call_of: returns a call as the template wants it.
    """
    role: str = message.role
    if role == "developer" and role not in known.strings:
        role = "system"
    turn: dict[str, Any] = {"role": role, "content": message.content}
    for name in ("name", "reasoning_content", "tool_call_id"):
        if text := getattr(message, name):
            turn[name] = text
    if message.tool_calls:
        turn["tool_calls"] = [call_of(call) for call in message.tool_calls]
    return turn


def _call(call: ToolCall) -> dict[str, Any]:
    arguments = _decode(f"arguments of the call of {call.name}", call.arguments, {})
    return _named_call(call, arguments)


def _call_with_text(call: ToolCall) -> dict[str, Any]:
    return _named_call(call, call.arguments or "{}")


def _named_call(call: ToolCall, arguments: Any) -> dict[str, Any]:
    function = {"name": call.name, "arguments": arguments}
    return {"type": "function", "function": function, **({"id": call.id} if call.id else {})}


def _most_chars(chat: Chat) -> int:
    """Return the length of text that is plausible for a conversation."""
    texts = sum(len(m.content) + len(m.reasoning_content) + len(m.name) for m in chat.messages)
    calls = [call for message in chat.messages for call in message.tool_calls]
    json = sum(len(call.name) + len(call.arguments) for call in calls)
    json += len(chat.tools) + len(chat.template_arguments)
    turns = len(chat.messages) + len(calls)
    return _FIXED_CHARS + _CHARS_PER_TURN * turns + _GROWTH * texts + _JSON_GROWTH * json
