"""An answer as a message in Anthropic's words, whole or as the events of a stream."""

import secrets
from collections.abc import Iterator
from typing import Any, assert_never

import msgspec

from distributed_llm.api.chat.events import (
    AnswerEnded,
    ReasoningDelta,
    TextDelta,
    ToolCallBegun,
    ToolCallDelta,
    TurnEnded,
    TurnEvent,
)

Event = dict[str, Any]
"""An event of a stream; its type is also its name."""


class MessageWriter:
    """Writes down an answer.

    Attributes:
        message: what has come of it; complete after `TurnEnded`.
    """

    def __init__(self, model: str) -> None:
        self.message: dict[str, Any] = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(0, 0, 0),
        }
        self._content: list[dict[str, Any]] = self.message["content"]
        self._arguments: list[str] = []
        self._begun = False
        self._open = False

    def add(self, event: TurnEvent) -> Iterator[Event]:
        """Yield what is to be sent of an event."""
        if not self._begun:
            self._begun = True
            yield {"type": "message_start", "message": {**self.message, "content": []}}
            yield {"type": "ping"}
        match event:
            case ReasoningDelta():
                yield from self._block("thinking", {"thinking": "", "signature": ""})
                yield self._more("thinking_delta", "thinking", event.text)
            case TextDelta():
                if event.text:
                    yield from self._block("text", {"text": ""})
                    yield self._more("text_delta", "text", event.text)
            case ToolCallBegun():
                yield from self._stop()
                yield from self._start(
                    {"type": "tool_use", "id": event.id, "name": event.name, "input": {}}
                )
            case ToolCallDelta():
                self._arguments.append(event.arguments)
                yield self._delta({"type": "input_json_delta", "partial_json": event.arguments})
            case AnswerEnded():
                yield from self._stop()
                self.message["stop_reason"] = _stop_reason(event)
                self.message["stop_sequence"] = event.stop_string
            case TurnEnded():
                usage = event.generations[0].usage
                fresh = usage.prompt_tokens - usage.cached_tokens
                self.message["usage"] = _usage(fresh, usage.cached_tokens, usage.completion_tokens)
                names = ("stop_reason", "stop_sequence")
                delta = {name: self.message[name] for name in names}
                yield {"type": "message_delta", "delta": delta, "usage": self.message["usage"]}
                yield {"type": "message_stop"}
            case _:
                assert_never(event)

    def _block(self, kind: str, empty: dict[str, Any]) -> Iterator[Event]:
        """Begin a block, unless the last one is of that kind."""
        if self._open and self._content[-1]["type"] == kind:
            return
        yield from self._stop()
        yield from self._start({"type": kind, **empty})

    def _start(self, block: dict[str, Any]) -> Iterator[Event]:
        self._content.append(block)
        self._open = True
        index = len(self._content) - 1
        yield {"type": "content_block_start", "index": index, "content_block": dict(block)}

    def _more(self, kind: str, name: str, text: str) -> Event:
        self._content[-1][name] += text
        return self._delta({"type": kind, name: text})

    def _delta(self, delta: dict[str, Any]) -> Event:
        return {
            "type": "content_block_delta",
            "index": len(self._content) - 1,
            "delta": delta,
        }

    def _stop(self) -> Iterator[Event]:
        if not self._open:
            return
        self._open = False
        if self._content[-1]["type"] == "tool_use":
            self._content[-1]["input"] = _decoded("".join(self._arguments))
            self._arguments = []
        yield {"type": "content_block_stop", "index": len(self._content) - 1}


def _decoded(arguments: str) -> Any:
    """Return the arguments of a call; none if they are broken off."""
    try:
        return msgspec.json.decode(arguments)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return {}


def _stop_reason(event: AnswerEnded) -> str:
    match event.reason:
        case "tool_calls":
            return "tool_use"
        case "length":
            return "max_tokens"
        case "stop":
            return "end_turn" if event.stop_string is None else "stop_sequence"


def _usage(fresh: int, cached: int, generated: int) -> dict[str, Any]:
    return {
        "input_tokens": fresh,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": generated,
    }
