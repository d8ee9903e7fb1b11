"""Answers as models write them, and their chat templates where they show it."""

import json
from typing import Any

from distributed_llm.api.chat.events import (
    ReasoningDelta,
    TextDelta,
    ToolCallBegun,
    ToolCallDelta,
    TurnEvent,
)
from distributed_llm.api.chat.parsing.formats import Formats

QWEN = Formats(
    reasoning=("<think>", "</think>"), thinking_switch="enable_thinking", tagged_calls=True
)
R1 = Formats(reasoning=("<think>", "</think>"), begins_thinking=(True, True, True))
LLAMA = Formats(plain_calls=True)
MISTRAL = Formats(listed_calls=True)
ALL = (Formats(), QWEN, R1, LLAMA, MISTRAL)


def tool(name: str, **properties: object) -> dict[str, Any]:
    """Return a tool with these parameters."""
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = (
    tool("weather", city={"type": "string"}, days={"type": "integer"}),
    tool(
        "write",
        path={"type": "string"},
        text={"type": ["string", "null"]},
        mode={"anyOf": [{"type": "null"}]},
    ),
)

CALL = '{"name": "weather", "arguments": {"city": "Lübeck \\"{\\" ]", "days": 2}}'
ARGUMENTS = {"city": 'Lübeck "{" ]', "days": 2}

Joined = tuple[str, str, list[tuple[str, str]]]
"""Reasoning, text, and the calls with their arguments."""


def joined(events: list[TurnEvent]) -> Joined:
    """Return what events tell in the end."""
    reasoning, text, calls = "", "", list[tuple[str, str]]()
    for event in events:
        match event:
            case ReasoningDelta():
                reasoning += event.text
            case TextDelta():
                text += event.text
            case ToolCallBegun():
                assert event.index == len(calls)
                calls.append((event.name, ""))
            case ToolCallDelta():
                name, so_far = calls[event.index]
                calls[event.index] = (name, so_far + event.arguments)
    return reasoning, text, calls


def decoded(calls: list[tuple[str, str]]) -> list[tuple[str, object]]:
    """Return calls with their arguments read."""
    return [(name, json.loads(arguments)) for name, arguments in calls]
