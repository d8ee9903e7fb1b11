"""Turns asked of a client, and what comes of its chunks."""

import asyncio
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from distributed_llm.api.chat.answering import answer
from distributed_llm.api.chat.events import (
    AnswerEnded,
    ReasoningDelta,
    TextDelta,
    ToolCallBegun,
    ToolCallDelta,
    TurnEnded,
    TurnEvent,
)
from distributed_llm.api.chat.forced_calls import calls_grammar
from distributed_llm.api.chat.parsing.formats import Formats
from distributed_llm.api.chat.turn import Turn
from distributed_llm.common.errors import InvalidRequest
from distributed_llm.common.grammar import Grammar
from tests.api.chat_texts import CALL, LLAMA, QWEN, R1, TOOLS, tool
from tests.api.fake_chat import FakeChat

HI = [{"role": "user", "content": "Hi"}]


def events_of(client: FakeChat, formats: Formats, **turn: Any) -> list[TurnEvent]:
    async def collect() -> list[TurnEvent]:
        return [event async for event in answer(client, Turn(messages=HI, **turn), formats)]

    return asyncio.run(collect())


def test_the_parts_of_a_turn() -> None:
    client = FakeChat(
        ["<think>Hm", "</think>", "\n\nI look.", f"<tool_call>{CALL}", "</tool_call>"]
    )
    *parts, last, ended = events_of(client, QWEN, tools=TOOLS, params={"temperature": 0.5})
    assert isinstance(ended, TurnEnded)
    assert ended.generations[0].usage.completion_tokens == 5
    assert last == AnswerEnded(choice=0, reason="tool_calls")
    kinds = [ReasoningDelta, TextDelta, ToolCallBegun, ToolCallDelta]
    assert [type(part) for part in parts] == kinds
    assert client.asked["temperature"] == 0.5
    assert client.asked["tools"] == TOOLS
    assert client.asked["skip_special_tokens"] is False


def test_several_answers_and_their_ends() -> None:
    client = FakeChat(["a", "b"], finish_reason="length")
    events = events_of(client, R1, params={"n": 2})
    assert [e.choice for e in events if isinstance(e, ReasoningDelta)] == [0, 1, 0, 1]
    ends = [event for event in events if isinstance(event, AnswerEnded)]
    assert ends == [AnswerEnded(choice=choice, reason="length") for choice in (0, 1)]


def test_tools_that_are_not_to_be_called_are_not_shown() -> None:
    client = FakeChat([CALL])
    events = events_of(client, LLAMA, tools=TOOLS, tool_choice="none")
    assert client.asked["tools"] is None
    assert events[:2] == [TextDelta(choice=0, text=CALL), AnswerEnded(choice=0, reason="stop")]


@pytest.mark.parametrize(
    ("choice", "parallel", "fits", "fits_not"),
    [
        ("required", True, f"[{CALL}, {CALL}]", f"{CALL}"),
        ("required", False, f"[{CALL}]", f"[{CALL}, {CALL}]"),
        ("write", True, '[{"name": "write", "arguments": {"path": "x"}}]', f"[{CALL}]"),
    ],
)
def test_tools_that_must_be_called(choice: str, parallel: bool, fits: str, fits_not: str) -> None:
    client = FakeChat([*fits])
    turn = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": parallel}
    events = events_of(client, R1, **turn)
    grammar = client.asked["grammar"]
    assert accepts(grammar, fits)
    assert not accepts(grammar, fits_not)
    assert isinstance(events[0], ToolCallBegun)
    assert events[-2] == AnswerEnded(choice=0, reason="tool_calls")


def accepts(grammar: Grammar, text: str) -> bool:
    assert grammar.kind == "lark"
    tokenizer = LLTokenizer("byte")
    matcher = LLMatcher(tokenizer, grammar.text)
    assert not matcher.get_error()
    tokens = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def test_references_in_a_schema_hold_and_names_are_quoted() -> None:
    one = tool('a"b\n', x={"$ref": "#/$defs/X"})
    one["function"]["parameters"]["$defs"] = {"X": {"type": "integer"}}
    grammar = calls_grammar([one, {"function": {"name": "bare"}}], several=True)
    assert accepts(grammar, '[{"name": "a\\"b\\n", "arguments": {"x": 1}}]')
    assert not accepts(grammar, '[{"name": "a\\"b\\n", "arguments": {"x": "1"}}]')
    assert accepts(grammar, '[{"name": "bare", "arguments": {"any":[]}}]')
    assert not accepts(grammar, '[{"name": "bare", "arguments": { "any": []}}]')


def test_a_tool_that_is_not_there_cannot_be_chosen() -> None:
    with pytest.raises(InvalidRequest, match="it has weather, write"):
        events_of(FakeChat([]), QWEN, tools=TOOLS, tool_choice="other")
    with pytest.raises(InvalidRequest, match="it has none"):
        events_of(FakeChat([]), QWEN, tool_choice="required")


def test_closing_the_answer_closes_the_request() -> None:
    async def close_early() -> None:
        client = FakeChat(["a", "b"])
        events = answer(client, Turn(messages=HI), Formats())
        await anext(events)
        assert not client.closed
        await events.aclose()
        assert client.closed

    asyncio.run(close_early())
