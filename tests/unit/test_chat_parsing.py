"""Answers of models of every format, whatever pieces they come in."""

import itertools
import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed_llm.api.chat.events import TextDelta, ToolCallBegun, ToolCallDelta
from distributed_llm.api.chat.parsing.answer_parser import AnswerParser
from distributed_llm.api.chat.parsing.formats import Formats
from distributed_llm.client.answers import PickedToken
from tests.api.chat_texts import (
    ALL,
    ARGUMENTS,
    CALL,
    LLAMA,
    MISTRAL,
    QWEN,
    R1,
    TOOLS,
    Joined,
    decoded,
    joined,
)

WEATHER = [("weather", ARGUMENTS)]


def parser(formats: Formats, **options: Any) -> AnswerParser:
    ids = (f"id{number}" for number in itertools.count())
    return AnswerParser(formats, **{"tools": TOOLS, "new_call_id": lambda: next(ids), **options})


def parse(formats: Formats, *pieces: str, **options: Any) -> Joined:
    reader = parser(formats, **options)
    events = [event for piece in pieces for event in reader.add(piece)]
    return joined(events + reader.end())


@pytest.mark.parametrize(
    ("formats", "text", "said"),
    [
        (QWEN, f"<tool_call>\n{CALL}\n</tool_call>", ""),
        (QWEN, f"I look.\n<tool_call>\n{CALL}\n</tool_call>\n", "I look.\n"),
        (QWEN, f"\n\n<tool_call>{CALL}</tool_call> Done.", "Done."),
        (QWEN, f"<tool_call>\n{CALL[:-1]}\n</tool_call>", ""),  # a brace is forgotten
        (QWEN, f"<tool_call>\n{CALL}", ""),  # broken off, or stopped before the tag
        (LLAMA, CALL, ""),
        (LLAMA, CALL.replace("arguments", "parameters"), ""),
        (LLAMA, f"<|python_tag|>{CALL}", ""),
        (LLAMA, '{"type": "function", "function": ' + CALL + "}", ""),
        (MISTRAL, f"[TOOL_CALLS][{CALL}]", ""),
        (MISTRAL, f'[TOOL_CALLS] [{CALL[:-1]}, "id": "abc123456"}}]', ""),
        (MISTRAL, f"Well. [TOOL_CALLS]weather[ARGS]{json.dumps(ARGUMENTS)}", "Well. "),
        (MISTRAL, f"[TOOL_CALLS]weather[CALL_ID]a1[ARGS] {json.dumps(ARGUMENTS)}", ""),
    ],
)
def test_calls_are_understood(formats: Formats, text: str, said: str) -> None:
    reasoning, spoken, calls = parse(formats, text)
    assert (reasoning, spoken, decoded(calls)) == ("", said, WEATHER)


@pytest.mark.parametrize(
    ("formats", "text"),
    [
        (QWEN, f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>"),
        (QWEN, f"<tool_call>{CALL}\n<tool_call>{CALL}</tool_call>"),
        (LLAMA, f"{CALL}; {CALL}"),
        (MISTRAL, f"[TOOL_CALLS][{CALL}, {CALL}]"),
        (MISTRAL, f"[TOOL_CALLS]weather[ARGS]{json.dumps(ARGUMENTS)}" * 2),
    ],
)
def test_several_calls(formats: Formats, text: str) -> None:
    assert decoded(parse(formats, text)[2]) == WEATHER * 2
    one = parse(formats, text, one_call=True)
    assert (one[1], decoded(one[2])) == ("", WEATHER)


def test_arguments_come_as_they_are_written_and_their_order_may_be_any() -> None:
    reader = parser(QWEN)
    begun = reader.add('<tool_call>{"name": "weather", "arguments": {"city": "Lü')
    assert begun[0] == ToolCallBegun(choice=0, index=0, id="id0", name="weather")
    assert begun[1] == ToolCallDelta(choice=0, index=0, arguments='{"city": "Lü')
    assert reader.add("beck") == [ToolCallDelta(choice=0, index=0, arguments="beck")]
    swapped = '<tool_call>{"arguments": {"n": 1.50}, "name": "weather"}</tool_call>'
    assert parse(QWEN, swapped)[2] == [("weather", '{"n": 1.50}')]
    twice = '<tool_call>{"name": "f", "arguments": "{\\"n\\": 1}"}</tool_call>'
    assert parse(QWEN, twice)[2] == [("f", '{"n": 1}')]


def test_calls_in_tags_have_the_types_of_the_tool() -> None:
    text = (
        '<tool_call>\n<function=weather>\n<parameter=city>\nA "quoted"\n\nline \\\n</parameter>\n'
        "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=write>\n<parameter=path>\n5\n</parameter>\n<parameter=mode>null"
        "</parameter><parameter=text>5</parameter></function></tool_call>"
        "<tool_call><function=other></function></tool_call>"
    )
    assert decoded(parse(QWEN, text)[2]) == [
        ("weather", {"city": 'A "quoted"\n\nline \\', "days": 3}),
        ("write", {"path": "5", "mode": None, "text": "5"}),
        ("other", {}),
    ]


def test_reasoning_is_apart() -> None:
    text = f"<think>\nHm </thin <tool_call>\n\n</think>\n\nYes.\n<tool_call>{CALL}</tool_call>"
    reasoning, spoken, calls = parse(QWEN, text)
    assert (reasoning, spoken) == ("Hm </thin <tool_call>", "Yes.\n")
    assert decoded(calls) == WEATHER
    assert parse(R1, "Hm\n</think>\n\nYes.", begins_inside=True)[:2] == ("Hm", "Yes.")
    assert parse(R1, "<think>Hm</think>Yes.", begins_inside=True)[:2] == ("Hm", "Yes.")
    assert parse(QWEN, "<think>\n\n</think>\n\nYes.")[:2] == ("", "Yes.")
    assert parse(QWEN, "<think>never ends \n")[:2] == ("never ends \n", "")
    assert parse(QWEN, "Say <think> loud.")[:2] == ("", "Say <think> loud.")


NO_CALLS = [
    "<tool_call>",
    "<tool_call> and more",
    "<tool_call>{</tool_call>",
    '<tool_call>{"name": "weather"',
    '<tool_call>{"nam',
    '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
    '<tool_call>{"a": 1}</tool_call>',
    "<tool_call><function= x",
    "<tool_call><fun",
    "[TOOL_CALLS]",
    "[TOOL_CALLS][]",
    "[TOOL_CALLS][1]",
    "[TOOL_CALLS]weather[ARG]{}",
    "[TOOL_CALLS] I said.",
    "[TOOL_C",
    '{"name": "John", "parameters": {"age": 3}}',
    '{"answer": 42}',
    '{"name": "weather", "age": 3}',
    "{}",
    "<|python_tag|>print(1)",
    "  {",
    " \n ",
    "x" * 600 + "<tool_call",
]


@pytest.mark.parametrize("text", NO_CALLS)
def test_what_is_no_call_is_text(text: str) -> None:
    for formats, pieces in itertools.product(ALL, ([text], text)):
        assert parse(formats, *pieces) == ("", text, [])


def test_json_that_is_no_call_comes_as_it_is_written() -> None:
    reader = parser(LLAMA)
    assert joined(reader.add('{"answer"')) == ("", '{"answer"', [])
    assert joined(reader.add(": 42")) == ("", ": 42", [])


def test_without_tools_nothing_is_a_call() -> None:
    text = f"<tool_call>{CALL}</tool_call>"
    assert parse(QWEN, text, tools=()) == ("", text, [])


def test_an_answer_that_must_call() -> None:
    for formats in ALL:
        for pieces in ([f"[{CALL}, {CALL}]"], f"[{CALL}, {CALL}]"):
            called = parse(formats, *pieces, must_call=True, begins_inside=True)
            assert (*called[:2], decoded(called[2])) == ("", "", WEATHER * 2)


MARKS = [
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[", "]"),
    *("<|python_tag|>", CALL, CALL[:30], "weather", "{}", "{", "}", ",", ";", '"', "\\", "\n"),
    *(" ", "ü", "<function=weather>", "<parameter=city>", "<parameter=days>", "</parameter>"),
    *("</function>", '{"name": "weather", "arguments": {', '"id": 1}', " " * 300, "x"),
]
texts = st.lists(st.sampled_from(MARKS) | st.text(max_size=4), max_size=14).map("".join)


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(ALL), texts, st.data(), st.booleans(), st.booleans(), st.booleans())
def test_any_cut_of_a_text_gives_the_same(
    formats: Formats, text: str, data: st.DataObject, inside: bool, one: bool, must: bool
) -> None:
    options = {"begins_inside": inside, "one_call": one, "must_call": must}
    whole = parse(formats, text, **options)
    assert parse(formats, *text, **options) == whole
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    assert parse(formats, *pieces, **options) == whole


@settings(max_examples=50, deadline=None)
@given(texts)
def test_text_without_formats_is_itself(text: str) -> None:
    assert parse(Formats(), text, tools=()) == ("", text, [])


LATE_NAME = '<tool_call>{"arguments": {"x": "' + "x" * 66_000 + '"}, "name": "f"}</tool_call>'


def test_a_call_is_not_held_back_for_ever() -> None:
    assert parse(QWEN, LATE_NAME) == ("", LATE_NAME, [])


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>{" * 40_000,
        '<tool_call>{"name": "f", "arguments": ' + '{"a":' * 60_000,
        "<tool_call>" + "[" * 100_000,
        "<tool_call>" + '{"arguments": "' + "x" * 300_000,
        " " * 300_000,
        "<think>" + "\n" * 300_000,
        "<" * 300_000,
        "<tool_call><function=weather><parameter=city>" + "</par" * 60_000,
        "[TOOL_CALLS]" * 30_000,
        LATE_NAME,
    ],
)
def test_hostile_answers_are_parsed_in_time(text: str) -> None:
    begun = time.perf_counter()
    for formats in (QWEN, MISTRAL):
        whole = parse(formats, text)
        steps = [text[place : place + 997] for place in range(0, len(text), 997)]
        assert parse(formats, *steps) == whole
    assert time.perf_counter() - begun < 10


def picked(text: str) -> PickedToken:
    return PickedToken(token_id=len(text), logprob=-1.0, text=text, bytes=None, top=())


def test_tokens_come_with_the_text_they_make() -> None:
    reader = parser(QWEN)
    events = []
    for piece, tokens in [
        ("<think>", ["<think>"]),
        ("Hm", ["Hm"]),
        ("</think>\n\n", ["</think>", "\n\n"]),
        ("", ["\ufffd"]),
        ("ü ", ["\ufffd", " "]),
        ("<tool", ["<tool"]),
        ("x", ["x"]),
        ("", ["<|im_end|>"]),
    ]:
        events += reader.add(piece, [picked(token) for token in tokens])
    events += reader.end()
    told = [event for event in events if isinstance(event, TextDelta)]
    assert [(event.text, [token.text for token in event.tokens]) for event in told] == [
        ("ü ", ["\ufffd", "\ufffd", " "]),
        ("<toolx", ["<tool", "x"]),
        ("", ["<|im_end|>"]),
    ]
