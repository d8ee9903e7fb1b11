"""An answer as a response in OpenAI's words, whole or as the events of a stream."""

import secrets
from collections.abc import Iterator, Sequence
from typing import Any, assert_never

from distributed_llm.api.chat.events import (
    AnswerEnded,
    ReasoningDelta,
    TextDelta,
    ToolCallBegun,
    ToolCallDelta,
    TurnEnded,
    TurnEvent,
)
from distributed_llm.api.errors import ApiError
from distributed_llm.client.answers import LikelyToken, PickedToken

Event = dict[str, Any]
"""An event of a stream; its type is also its name."""

_ERROR_CODES = frozenset({"context_length_exceeded", "rate_limit_exceeded"})
"""Codes of errors that clients act upon."""


class ResponseWriter:
    """Writes down an answer.

    Args:
        response: what is known of the response before there is an answer.

    Attributes:
        response: with what has come of the answer; complete after `TurnEnded`.
    """

    def __init__(self, response: dict[str, Any]) -> None:
        self.response = {**response, "status": "in_progress", "output": []}
        self._output: list[dict[str, Any]] = self.response["output"]
        self._sequence = 0
        self._open = False

    def add(self, event: TurnEvent) -> Iterator[Event]:
        """Yield what is to be sent of an event."""
        yield from self._begin()
        match event:
            case ReasoningDelta():
                yield from self._part("reasoning", _REASONING)
                yield self._more("response.reasoning_text.delta", event.text, content_index=0)
            case TextDelta():
                if event.text or event.tokens:
                    yield from self._part("message", _TEXT)
                    logprobs = _logprobs(event.tokens)
                    self._output[-1]["content"][0]["logprobs"] += logprobs
                    yield self._more(
                        "response.output_text.delta",
                        event.text,
                        content_index=0,
                        logprobs=logprobs,
                    )
            case ToolCallBegun():
                yield from self._close()
                yield from self._item(
                    {
                        "id": new_id("fc"),
                        "type": "function_call",
                        "call_id": event.id,
                        "name": event.name,
                        "arguments": "",
                    }
                )
            case ToolCallDelta():
                yield self._more("response.function_call_arguments.delta", event.arguments)
            case AnswerEnded():
                yield from self._end(event)
            case TurnEnded():
                usage = event.generations[0].usage
                self.response["usage"] = {
                    "input_tokens": usage.prompt_tokens,
                    "input_tokens_details": {
                        "cached_tokens": usage.cached_tokens,
                        "cache_write_tokens": 0,
                    },
                    "output_tokens": usage.completion_tokens,
                    "output_tokens_details": {"reasoning_tokens": 0},
                    "total_tokens": usage.prompt_tokens + usage.completion_tokens,
                }
                yield self._told(f"response.{self.response['status']}")
            case _:
                assert_never(event)

    def fail(self, error: ApiError) -> Iterator[Event]:
        """Yield what is to be sent of an error after which nothing comes."""
        yield from self._begin()
        code = error.code if error.code in _ERROR_CODES else "server_error"
        self.response["status"] = "failed"
        self.response["error"] = {"code": code, "message": error.message}
        yield self._told("response.failed")

    def _begin(self) -> Iterator[Event]:
        if self._sequence == 0:
            yield self._told("response.created")
            yield self._told("response.in_progress")

    def _end(self, event: AnswerEnded) -> Iterator[Event]:
        if event.reason == "length":
            yield from self._close("incomplete")
            self.response["status"] = "incomplete"
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            yield from self._close()
            self.response["status"] = "completed"

    def _part(self, kind: str, empty: dict[str, Any]) -> Iterator[Event]:
        """Begin an item with one part, unless the last one is of that kind."""
        if self._open and self._output[-1]["type"] == kind:
            return
        yield from self._close()
        if kind == "message":
            item = {"id": new_id("msg"), "type": kind, "role": "assistant", "content": []}
        else:
            item = {"id": new_id("rs"), "type": kind, "summary": [], "content": []}
        yield from self._item(item)
        self._output[-1]["content"].append(_copy(empty))
        yield self._of_item("response.content_part.added", content_index=0, part=_copy(empty))

    def _item(self, item: dict[str, Any]) -> Iterator[Event]:
        self._output.append({**item, "status": "in_progress"})
        self._open = True
        yield self._event(
            "response.output_item.added",
            output_index=len(self._output) - 1,
            item=_copy(self._output[-1]),
        )

    def _more(self, kind: str, delta: str, **fields: Any) -> Event:
        item = self._output[-1]
        if item["type"] == "function_call":
            item["arguments"] += delta
        else:
            item["content"][0]["text"] += delta
        return self._of_item(kind, delta=delta, **fields)

    def _close(self, status: str = "completed") -> Iterator[Event]:
        if not self._open:
            return
        self._open = False
        item = self._output[-1]
        item["status"] = status
        if item["type"] == "function_call":
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield self._of_item("response.function_call_arguments.done", **done)
        else:
            yield from self._close_part(item)
        yield self._event(
            "response.output_item.done", output_index=len(self._output) - 1, item=_copy(item)
        )

    def _close_part(self, item: dict[str, Any]) -> Iterator[Event]:
        part = _copy(item["content"][0])
        fields = {"content_index": 0, "text": part["text"]}
        if item["type"] == "message":
            yield self._of_item("response.output_text.done", **fields, logprobs=part["logprobs"])
        else:
            yield self._of_item("response.reasoning_text.done", **fields)
        yield self._of_item("response.content_part.done", content_index=0, part=part)

    def _of_item(self, kind: str, **fields: Any) -> Event:
        index = len(self._output) - 1
        return self._event(kind, item_id=self._output[-1]["id"], output_index=index, **fields)

    def _told(self, kind: str) -> Event:
        output = [_copy(item) for item in self._output]
        return self._event(kind, response={**self.response, "output": output})

    def _event(self, kind: str, **fields: Any) -> Event:
        event = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return event


_TEXT: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
_REASONING: dict[str, Any] = {"type": "reasoning_text", "text": ""}


def _copy(item: dict[str, Any]) -> dict[str, Any]:
    """Return an item that does not change when this one does."""
    lists = {name: _copies(value) for name, value in item.items() if isinstance(value, list)}
    return {**item, **lists}


def _copies(values: list[Any]) -> list[Any]:
    return [_copy(value) if isinstance(value, dict) else value for value in values]


def new_id(prefix: str) -> str:
    """Return an id for a new item."""
    return f"{prefix}_{secrets.token_hex(16)}"


def _logprobs(tokens: Sequence[PickedToken]) -> list[dict[str, Any]]:
    return [
        {**_logprob(token), "top_logprobs": [_logprob(likely) for likely in token.top]}
        for token in tokens
    ]


def _logprob(token: LikelyToken) -> dict[str, Any]:
    return {
        "token": token.text,
        "logprob": token.logprob,
        "bytes": list(token.bytes if token.bytes is not None else token.text.encode()),
    }
