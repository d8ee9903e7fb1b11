"""Answers of `/v1/chat/completions`: whole, or written in chunks. Pure."""

from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from distributed_llm.api.chat.events import (
    AnswerEnded,
    ReasoningDelta,
    TextDelta,
    ToolCallBegun,
    ToolCallDelta,
    TurnEnded,
    TurnEvent,
)
from distributed_llm.api.openai.answer_head import AnswerHead
from distributed_llm.api.openai.logprobs import ChatLogprobs, chat_logprobs
from distributed_llm.api.openai.tracing import Hop
from distributed_llm.api.openai.usage import UsageBody, usage_of
from distributed_llm.api.streaming import DONE, sse
from distributed_llm.client.answers import PickedToken
from distributed_llm.common.messages import Timings


class Function(msgspec.Struct):
    """A function that is called, or the next piece of its arguments."""

    arguments: str
    name: str | UnsetType = UNSET


class Call(msgspec.Struct):
    """A call of a tool, or the next piece of it."""

    function: Function
    index: int | UnsetType = UNSET
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET


class Delta(msgspec.Struct, kw_only=True):
    """The next piece of a message."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[Call] | UnsetType = UNSET


class ChunkChoice(msgspec.Struct, kw_only=True):
    """The next piece of an answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatChunk(msgspec.Struct, kw_only=True):
    """An event of a stream."""

    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: UsageBody | UnsetType | None = UNSET
    dllm_hops: list[Hop] | UnsetType = UNSET
    dllm_timings: Timings | UnsetType = UNSET


class ChatStream:
    """Writes the events of a turn as server-sent events.

    Args:
        with_usage: tell the token counts at the end.
        with_trace: tell where and how long was computed.
    """

    def __init__(self, head: AnswerHead, *, with_usage: bool, with_trace: bool) -> None:
        self._head = head
        self._with_usage = with_usage
        self._with_trace = with_trace
        self._usage: UnsetType | None = None if with_usage else UNSET
        self._begun: set[int] = set()

    def write(self, event: TurnEvent, hops: list[Hop] | None = None) -> bytes:
        """Return what to send for an event.

        Args:
            hops: what stages did for it, if that is told.
        """
        if isinstance(event, TurnEnded):
            return self._end(event)
        match event:
            case TextDelta(text=text, tokens=tokens):
                piece = ChunkChoice(index=event.choice, delta=Delta(content=text))
                piece.logprobs = chat_logprobs(tokens) if tokens else None
            case ReasoningDelta(text=text):
                piece = ChunkChoice(index=event.choice, delta=Delta(reasoning_content=text))
            case ToolCallBegun():
                call = Call(Function("", event.name), event.index, event.id, "function")
                piece = ChunkChoice(index=event.choice, delta=Delta(tool_calls=[call]))
            case ToolCallDelta():
                call = Call(Function(event.arguments), event.index)
                piece = ChunkChoice(index=event.choice, delta=Delta(tool_calls=[call]))
            case AnswerEnded(reason=reason):
                piece = ChunkChoice(index=event.choice, delta=Delta(), finish_reason=reason)
        written = self._chunk(piece, hops)
        if event.choice in self._begun:
            return written
        self._begun.add(event.choice)
        role = ChunkChoice(index=event.choice, delta=Delta(role="assistant", content=""))
        return self._chunk(role) + written

    def _chunk(self, choice: ChunkChoice, hops: list[Hop] | None = None) -> bytes:
        head = self._head
        return sse(
            ChatChunk(
                id=head.id,
                created=head.created,
                model=head.model,
                system_fingerprint=head.fingerprint,
                choices=[choice],
                usage=self._usage,
                dllm_hops=hops or UNSET,
            )
        )

    def _end(self, event: TurnEnded) -> bytes:
        if not (self._with_usage or self._with_trace):
            return DONE
        head = self._head
        last = ChatChunk(
            id=head.id,
            created=head.created,
            model=head.model,
            system_fingerprint=head.fingerprint,
            choices=[],
        )
        if self._with_usage:
            last.usage = usage_of([event.generations])
        if self._with_trace:
            last.dllm_timings = event.generations[0].timings
        return sse(last) + DONE


class _Message:
    """Collects one answer."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.reasoning: list[str] = []
        self.tokens: list[PickedToken] = []
        self.calls: list[Call] = []
        self.reason: str | None = None

    def add(self, event: TurnEvent) -> None:
        match event:
            case TextDelta(text=text, tokens=tokens):
                self.text.append(text)
                self.tokens += tokens
            case ReasoningDelta(text=text):
                self.reasoning.append(text)
            case ToolCallBegun():
                function = Function("", event.name)
                self.calls.append(Call(function, id=event.id, type="function"))
            case ToolCallDelta():
                self.calls[event.index].function.arguments += event.arguments
            case AnswerEnded(reason=reason):
                self.reason = reason

    def choice(self, index: int, *, with_logprobs: bool) -> dict[str, Any]:
        text = "".join(self.text)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": text if text or not self.calls else None,
            "refusal": None,
        }
        if self.reasoning:
            message["reasoning_content"] = "".join(self.reasoning)
        if self.calls:
            message["tool_calls"] = self.calls
        return {
            "index": index,
            "message": message,
            "logprobs": chat_logprobs(self.tokens) if with_logprobs else None,
            "finish_reason": self.reason,
        }


def whole_chat(
    events: Iterable[TurnEvent], head: AnswerHead, *, with_logprobs: bool, with_trace: bool
) -> dict[str, Any]:
    """Return the body of an answer that is sent at once.

    Args:
        events: all of a turn.
        with_logprobs: tell log-probabilities.
        with_trace: tell where and how long was computed.
    """
    messages: dict[int, _Message] = {}
    for event in events:
        if isinstance(event, TurnEnded):
            generations = event.generations
        else:
            messages.setdefault(event.choice, _Message()).add(event)
    body = {
        **head.fields("chat.completion"),
        "choices": [
            message.choice(index, with_logprobs=with_logprobs)
            for index, message in sorted(messages.items())
        ],
        "usage": usage_of([generations]),
    }
    if with_trace:
        body["dllm_timings"] = generations[0].timings
    return body
