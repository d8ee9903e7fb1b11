"""Encoding of prompts, text or token ids or conversations, as tensors."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec

from distributed_llm.common.codec import encode_payload
from distributed_llm.common.errors import InvalidRequest
from distributed_llm.common.grammar import Grammar, GrammarKind, encode_grammar
from distributed_llm.common.messages import (
    MAX_CHAT_MESSAGES,
    MAX_JSON_CHARS,
    Chat,
    ChatMessage,
)
from distributed_llm.common.tensors import (
    ITEM_BYTES,
    MAX_FRAME_BYTES,
    Frame,
    TensorSpec,
    frame_of_bytes,
    frame_of_token_ids,
)

Prompt = str | list[int]
"""Text, or token ids."""

Prompts = list[str] | list[list[int]]
"""Several prompts of one kind."""

Messages = Sequence[Mapping[str, Any]]
"""A conversation: `[{"role": "user", "content": "Hi"}]`, with the fields of OpenAI's messages."""

Tools = Sequence[Mapping[str, Any]]
"""Functions that may be called: `[{"type": "function", "function": {"name": ..., ...}}]`."""

Arguments = Mapping[str, Any]
"""Arguments of a chat template: `{"enable_thinking": False}`."""

_GIVE_MESSAGES = (
    'Give a list of {"role": "system" | "developer" | "user" | "assistant" | "tool", "content": '
    '"text"}.'
)


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as `Generate` carries it, and the grammar of its answers.

    Attributes:
        specs: of one tensor for the prompt, none for an empty text; and one for the grammar's text.
        grammar: kind of the grammar; None if there is none.
    """

    kind: Literal["text", "token_ids", "chat"]
    specs: tuple[TensorSpec, ...]
    frames: tuple[Frame, ...]
    grammar: GrammarKind | None = None

    def following(self, grammar: Grammar | None) -> "EncodedPrompt":
        """Return it with a grammar.

        Raises:
            InvalidRequest: `grammar` is none, or too long.
        """
        if grammar is None:
            return self
        text = encode_grammar(grammar)
        if not text:
            return replace(self, grammar=grammar.kind)
        spec, frame = frame_of_bytes(text)
        return EncodedPrompt(self.kind, (*self.specs, spec), (*self.frames, frame), grammar.kind)


def are_several(prompt: Any) -> bool:
    """Return whether `prompt` is a list of prompts, perhaps of none, rather than one."""
    return isinstance(prompt, list) and not (prompt and isinstance(prompt[0], int))


def encode_prompt(prompt: Any, grammar: Grammar | None = None) -> EncodedPrompt:
    """Return one prompt encoded, with the grammar of its answers.

    Raises:
        InvalidRequest: it is neither text nor token ids, empty, or too long; or the grammar is.
    """
    return _encode_prompt(prompt).following(grammar)


def _encode_prompt(prompt: Any) -> EncodedPrompt:
    if isinstance(prompt, str):
        try:
            return _of_bytes("text", prompt.encode())
        except UnicodeEncodeError as exc:
            raise InvalidRequest(f"The prompt is not valid Unicode: {exc}.") from exc
    if isinstance(prompt, bytes | bytearray | memoryview):
        raise InvalidRequest(
            f"A prompt is text or a list of token ids, not {type(prompt).__name__}. Decode it, as "
            'in prompt.decode("utf-8"), or give list(prompt) if the bytes are token ids.'
        )
    if isinstance(prompt, Sequence) and all(type(token) is int for token in prompt):
        if not prompt:
            raise InvalidRequest("The prompt is empty. Give at least one token.")
        return EncodedPrompt("token_ids", *encode_token_ids(prompt))
    raise InvalidRequest(
        f"A prompt is text or a list of token ids, not {type(prompt).__name__} {prompt!r:.60}."
    )


def encode_token_ids(
    token_ids: Sequence[int],
) -> tuple[tuple[TensorSpec, ...], tuple[Frame, ...]]:
    """Return token ids as one tensor, or as none if there are none.

    Raises:
        InvalidRequest: they are no token ids, or too many.
    """
    if any(type(token) is not int or not 0 <= token < 2**31 for token in token_ids):
        raise InvalidRequest("Token ids must be whole numbers, at least 0 and below 2^31.")
    most = MAX_FRAME_BYTES // ITEM_BYTES["int32"]
    if len(token_ids) > most:
        raise InvalidRequest(f"{len(token_ids):,} tokens are too many; {most:,} are allowed.")
    if not token_ids:
        return (), ()
    spec, frame = frame_of_token_ids(token_ids)
    return (spec,), (frame,)


def encode_chat(
    messages: Messages,
    tools: Tools | None = None,
    template_arguments: Arguments | None = None,
    grammar: Grammar | None = None,
) -> EncodedPrompt:
    """Return a conversation encoded, with the grammar of the answers.

    Args:
        messages: as OpenAI's and Hugging Face's chats have them.
        tools: JSON schemas of the functions that the assistant may call.
        template_arguments: further arguments of the chat template.
        grammar: what the answers have to look like.

    Raises:
        InvalidRequest: it is no conversation, holds more than text, or is too long.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Iterable):
        raise InvalidRequest(f"Bad messages: expected a list. {_GIVE_MESSAGES}")
    turns = tuple(_turn(number, one) for number, one in enumerate(messages, start=1))
    if len(turns) > MAX_CHAT_MESSAGES:
        raise InvalidRequest(
            f"The conversation has {len(turns)} messages; {MAX_CHAT_MESSAGES} are allowed."
        )
    chat = Chat(
        messages=turns,
        tools=_json("tools", [_tool(tool) for tool in tools]) if tools else "",
        template_arguments=_json("chat_template_kwargs", dict(template_arguments or {})),
    )
    try:
        return _of_bytes("chat", encode_payload(chat)).following(grammar)
    except UnicodeEncodeError as exc:
        raise InvalidRequest(f"Bad messages: not valid Unicode: {exc}.") from exc


def _turn(number: int, message: Any) -> ChatMessage:
    """Return a message, which is the `number`th, as it travels."""
    if not isinstance(message, Mapping):
        raise InvalidRequest(f"Bad messages: {message!r:.60} is no message. {_GIVE_MESSAGES}")
    given = {name: value for name, value in message.items() if value is not None}
    if "content" not in given and given.get("role") == "assistant":
        given["content"] = ""  # it called tools
    if isinstance(given.get("content"), Sequence) and not isinstance(given["content"], str):
        given["content"] = "\n".join(_part(number, part) for part in given["content"])
    if isinstance(given.get("tool_calls"), Sequence):
        given["tool_calls"] = [_call(number, call) for call in given["tool_calls"]]
    try:
        return msgspec.convert(given, ChatMessage)
    except msgspec.ValidationError as exc:
        raise InvalidRequest(f"Bad message {number}: {exc}. {_GIVE_MESSAGES}") from exc


def _part(number: int, part: Any) -> str:
    match part:
        case {"type": "text", "text": str(text)} | str(text):
            return text
        case {"type": str(kind)}:
            raise InvalidRequest(
                f"Message {number} has a part of type {kind!r:.40}; only text can be served."
            )
    raise InvalidRequest(
        f"Bad message {number}: a part of its content is {part!r:.60}. "
        'Give {"type": "text", "text": "..."}.'
    )


def _call(number: int, call: Any) -> dict[str, Any]:
    match call:
        case {"function": {"name": str(name), **function}, **rest}:
            arguments = function.get("arguments") or {}
            text = arguments if isinstance(arguments, str) else _json("arguments", arguments)
            return {"name": name, "arguments": text, "id": rest.get("id") or ""}
    raise InvalidRequest(
        f"Bad message {number}: a tool call is {call!r:.60}. "
        'Give {"id": "...", "type": "function", "function": {"name": "...", "arguments": {...}}}.'
    )


def _tool(tool: Any) -> dict[str, Any]:
    match tool:
        case {"function": {"name": str()}}:
            return dict(tool)
    raise InvalidRequest(
        f"A tool is {tool!r:.60}. Give "
        '{"type": "function", "function": {"name": "...", "description": "...", "parameters": '
        "{...}}}, with a JSON schema as parameters."
    )


def _json(what: str, value: Any) -> str:
    """Return a value as JSON; empty for an empty one."""
    if not value:
        return ""
    try:
        text = msgspec.json.encode(value).decode()
    except (TypeError, ValueError, RecursionError) as exc:
        raise InvalidRequest(f"The {what} cannot be written as JSON: {exc}.") from exc
    if len(text) > MAX_JSON_CHARS:
        raise InvalidRequest(
            f"The {what} have {len(text)} characters as JSON; {MAX_JSON_CHARS} are allowed."
        )
    return text


def _of_bytes(kind: Literal["text", "chat"], data: bytes) -> EncodedPrompt:
    if len(data) > MAX_FRAME_BYTES:
        raise InvalidRequest(f"The prompt has {len(data)} bytes; {MAX_FRAME_BYTES} are allowed.")
    if not data:
        return EncodedPrompt(kind, (), ())
    spec, frame = frame_of_bytes(data)
    return EncodedPrompt(kind, (spec,), (frame,))
