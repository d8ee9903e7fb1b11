"""Answers as Ollama writes them: an object a piece, or one for all. Pure."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

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
from distributed_llm.client.answers import Generation, PickedToken

_NS = 1_000_000_000

Put = Callable[[Mapping[str, Any]], dict[str, Any]]
"""Puts the fields of a message where a kind of answer has them."""


def as_message(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields as an answer of `/api/chat` has them."""
    return {"message": {"role": "assistant", "content": "", **fields}}


def as_response(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields as an answer of `/api/generate` has them."""
    return {"response": fields.get("content", ""), **_without(fields, "content")}


def _without(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {one: value for one, value in fields.items() if one != name}


def now() -> str:
    """Return the time as Ollama writes it."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


class Lines:
    """Writes the events of a turn.

    Args:
        model: name of the model, as it was asked for.
        put: puts the fields of a message where the kind of answer has them.
        clock: returns the time as text.
    """

    def __init__(self, model: str, put: Put, clock: Callable[[], str] = now) -> None:
        self._model = model
        self._put = put
        self._clock = clock
        self._call: dict[str, Any] | None = None
        self._reason = "stop"

    def write(self, event: TurnEvent) -> list[dict[str, Any]]:
        """Return the objects with which an event is told; there may be none."""
        match event:
            case ReasoningDelta(text=text):
                return [self._line({"content": "", "thinking": text})]
            case TextDelta(text=text, tokens=tokens):
                line = self._line({"content": text})
                return [{**line, "logprobs": _logprobs(tokens)} if tokens else line]
            case ToolCallBegun(name=name, id=call_id):
                told = self._ended_call()
                self._call = {"id": call_id, "name": name, "arguments": ""}
                return told
            case ToolCallDelta(arguments=arguments):
                assert self._call is not None
                self._call["arguments"] += arguments
                return []
            case AnswerEnded(reason=reason):
                self._reason = "length" if reason == "length" else "stop"
                return self._ended_call()
            case TurnEnded(generations=generations):
                return [self.last(self._reason, generations[0])]

    def last(self, reason: str, generation: Generation | None = None) -> dict[str, Any]:
        """Return the object that ends an answer.

        Args:
            reason: why it ends.
            generation: the answer; None if nothing was asked for.
        """
        counts = _counts(generation) if generation else {}
        return {**self._line({"content": ""}), "done": True, "done_reason": reason, **counts}

    def _line(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        head = {"model": self._model, "created_at": self._clock()}
        return {**head, **self._put(fields), "done": False}

    def _ended_call(self) -> list[dict[str, Any]]:
        """Return the object that tells the call before, if there is one and it is complete."""
        call, self._call = self._call, None
        if call is None:
            return []
        try:
            arguments = msgspec.json.decode(call["arguments"] or "{}", type=dict[str, Any])
        except msgspec.DecodeError:
            return []  # the answer was cut in the middle of the call
        function = {"name": call["name"], "arguments": arguments}
        told = [{"id": call["id"], "function": function}]
        return [self._line({"content": "", "tool_calls": told})]


def whole(lines: Iterable[dict[str, Any]], put: Put) -> dict[str, Any]:
    """Return one object for all the objects of an answer, of which the last ends it."""
    texts: dict[str, str] = {"content": "", "thinking": ""}
    calls: list[Any] = []
    logprobs: list[Any] = []
    last: dict[str, Any] = {}
    for last in lines:
        fields = last.get("message") or {**last, "content": last.get("response", "")}
        for name in texts:
            texts[name] += fields.get(name, "")
        calls += fields.get("tool_calls", ())
        logprobs += last.get("logprobs", ())
    found: dict[str, Any] = {"content": texts["content"]}
    if texts["thinking"]:
        found["thinking"] = texts["thinking"]
    if calls:
        found["tool_calls"] = calls
    told = {**last, **put(found)}
    return {**told, "logprobs": logprobs} if logprobs else told


def _counts(generation: Generation) -> dict[str, int]:
    times, usage = generation.timings, generation.usage
    whole_s = times.queued_s + times.first_token_s + times.decode_s
    return {
        "total_duration": round(whole_s * _NS),
        "load_duration": round(times.queued_s * _NS),
        "prompt_eval_count": usage.prompt_tokens,
        "prompt_eval_duration": round(times.first_token_s * _NS),
        "eval_count": usage.completion_tokens,
        "eval_duration": round(times.decode_s * _NS),
    }


def _logprobs(tokens: Sequence[PickedToken]) -> list[dict[str, Any]]:
    return [
        {
            "token": token.text,
            "logprob": token.logprob,
            "bytes": token.bytes,
            "top_logprobs": [
                {"token": one.text, "logprob": one.logprob, "bytes": one.bytes} for one in token.top
            ],
        }
        for token in tokens
    ]
