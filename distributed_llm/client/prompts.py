"""Encoding of prompts, text or token ids or conversations, as tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from distributed_llm.common.codec import encode_payload
from distributed_llm.common.errors import InvalidRequest
from distributed_llm.common.messages import ChatMessage
from distributed_llm.common.tensors import (
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

Messages = Sequence[Mapping[str, str]]
"""A conversation: `[{"role": "user", "content": "Hi"}]`."""


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as `Generate` carries it: one tensor, or none for an empty text."""

    kind: Literal["text", "token_ids", "chat"]
    specs: tuple[TensorSpec, ...]
    frames: tuple[Frame, ...]


def are_several(prompt: Any) -> bool:
    """Return whether `prompt` is a list of prompts rather than one."""
    return isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)


def encode_prompt(prompt: Any) -> EncodedPrompt:
    """Return one prompt encoded.

    Raises:
        InvalidRequest: it is neither text nor token ids, empty, or too long.
    """
    if isinstance(prompt, str):
        try:
            return _of_bytes("text", prompt.encode())
        except UnicodeEncodeError as exc:
            raise InvalidRequest(f"The prompt is not valid Unicode: {exc}.") from exc
    if isinstance(prompt, Sequence) and all(type(token) is int for token in prompt):
        if any(not 0 <= token < 2**31 for token in prompt):
            raise InvalidRequest("Token ids of a prompt must be at least 0 and below 2^31.")
        if not prompt:
            raise InvalidRequest("The prompt is empty. Give at least one token.")
        spec, frame = frame_of_token_ids(prompt)
        return EncodedPrompt("token_ids", (spec,), (frame,))
    raise InvalidRequest(
        f"A prompt is text or a list of token ids, not {type(prompt).__name__} {prompt!r:.60}."
    )


def encode_chat(messages: Messages) -> EncodedPrompt:
    """Return a conversation encoded.

    Raises:
        InvalidRequest: it is no list of messages, or too long.
    """
    try:
        turns = msgspec.convert(list(messages), list[ChatMessage])
    except (msgspec.ValidationError, TypeError) as exc:
        raise InvalidRequest(
            f"Bad messages: {exc}. Give a list of "
            '{"role": "system" | "user" | "assistant" | "tool", "content": "text"}.'
        ) from exc
    return _of_bytes("chat", encode_payload(turns))


def _of_bytes(kind: Literal["text", "chat"], data: bytes) -> EncodedPrompt:
    if len(data) > MAX_FRAME_BYTES:
        raise InvalidRequest(f"The prompt has {len(data)} bytes; {MAX_FRAME_BYTES} are allowed.")
    if not data:
        return EncodedPrompt(kind, (), ())
    spec, frame = frame_of_bytes(data)
    return EncodedPrompt(kind, (spec,), (frame,))
