"""What is asked for in a turn of a conversation, whatever dialect asks. Pure values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

USUAL_MAX_NEW_TOKENS = 4096
"""Tokens of an answer at most, if the request sets no limit; fewer if there is no room."""

NOT_TEXT = "[This content is no text. It was left out, because this model reads only text.]"
"""What a model reads in place of a picture that a tool returned."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """The next turn of a conversation.

    Attributes:
        messages: as OpenAI's chats have them; texts only.
        tools: that the model may call, as OpenAI's chats have them.
        tool_choice: "auto", "none", "required", or the name of the tool that is to be called.
        parallel_tool_calls: whether it may call several at once.
        template_arguments: further arguments of the chat template, such as `enable_thinking`.
        params: arguments of `SamplingParams`, and the `grammar` of the answer if it has one.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: str = "auto"
    parallel_tool_calls: bool = True
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
