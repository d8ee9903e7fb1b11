"""Conversations, from what a user gives the client to what the model reads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from distributed_llm.client.prompts import encode_chat
from distributed_llm.common.codec import decode_chat
from distributed_llm.common.errors import InvalidRequest
from distributed_llm.common.messages import Chat, ChatMessage
from distributed_llm.coordinator.text.tokenizer import Tokenizer
from tests.unit.made_tokenizers import (
    byte_level,
    every_kind,
    folder_of,
    reference_of,
    save,
    tokenizer_of,
)

RICH = """
{%- if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>{% endif %}
{%- for message in messages %}
<s>{{ message.role }}{% if message.name %}({{ message.name }}){% endif %}: {{ message.content }}
{%- if message.reasoning_content is defined %}<t>{{ message.reasoning_content }}</t>{% endif %}
{%- if message.tool_call_id %} [{{ message.tool_call_id }}]{% endif %}
{%- for call in message.tool_calls or [] %}
<call {{ call.id }}>{{ call.function.name }} {{ call.function.arguments | tojson }}</call>
{%- for key, value in call.function.arguments | items %}{{ key }}={{ value }};{% endfor %}
{%- endfor %}
{%- endfor %}
{%- if add_generation_prompt %}
<s>assistant:{% if enable_thinking is defined and enable_thinking is false %}<t></t>{% endif %}
{%- endif %}"""

USER = {"role": "user", "content": "hello é"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}
CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "weather", "arguments": {"place": "Köln", "days": 2}},
}


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("chat"), byte_level(), chat_template=RICH)


def asked(folder: Path, messages: Any, **more: Any) -> list[int]:
    """Return the token ids of a conversation that a client sends."""
    prompt = encode_chat(messages, **more)
    return Tokenizer.load(folder).encode_chat(decode_chat(prompt.frames[0]))


def expected(folder: Path, messages: Any, **arguments: Any) -> list[int]:
    """Return what transformers makes of it."""
    from transformers import AutoTokenizer

    ids: Any = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False, **arguments
    )
    return list(ids)


@every_kind
def test_chat_is_rendered_and_encoded_as_transformers_does(kind: str) -> None:
    messages = [{"role": "system", "content": "be brief"}, USER]
    assert asked(folder_of(kind), messages) == reference_of(kind).apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )


def test_tools_calls_and_their_answers(rich: Path) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Rain?", "name": "Eva"},
        {"role": "assistant", "content": "", "reasoning_content": "Hm.", "tool_calls": [CALL]},
        {"role": "tool", "content": "No.", "tool_call_id": "c1", "name": "weather"},
    ]
    wanted = expected(rich, messages, tools=[WEATHER])
    assert asked(rich, messages, tools=[WEATHER]) == wanted
    as_openai = {"name": "weather", "arguments": '{"place": "Köln", "days": 2}'}
    null: dict[str, Any] = {"refusal": None, "audio": None, "function_call": None}
    messages[1] |= {"content": None, "tool_calls": [{**CALL, "function": as_openai}], **null}
    assert asked(rich, messages, tools=[WEATHER]) == wanted


def test_arguments_of_the_template(rich: Path) -> None:
    off = {"enable_thinking": False}
    assert asked(rich, [USER], template_arguments=off) == expected(rich, [USER], **off)
    on = {"enable_thinking": True}
    assert asked(rich, [USER], template_arguments=on) == expected(rich, [USER])


def test_content_in_parts_is_joined_as_lines(rich: Path) -> None:
    parts = [{"type": "text", "text": "hello"}, {"type": "text", "text": "é"}]
    together = [{"role": "user", "content": "hello\né"}]
    assert asked(rich, [{"role": "user", "content": parts}]) == expected(rich, together)


def test_a_developer_is_the_system_where_the_template_knows_none(
    rich: Path, tmp_path: Path
) -> None:
    messages = [{"role": "developer", "content": "be brief"}, USER]
    system = [{**messages[0], "role": "system"}, USER]
    assert asked(rich, messages) == expected(rich, system)
    newer = RICH + "{% if messages[0].role == 'developer' %}!{% endif %}"
    folder = save(tmp_path / "newer", byte_level(), chat_template=newer)
    assert asked(folder, messages) == expected(folder, messages)


WRONG: list[tuple[Any, Mapping[str, Any], str]] = [
    ("hello", {}, "Give a list"),
    (USER, {}, "Give a list"),
    (3, {}, "Give a list"),
    (["hello"], {}, "is no message"),
    ([{"role": "king", "content": "x"}], {}, "Bad message 1.*king"),
    ([USER, {"role": "user"}], {}, "Bad message 2.*content"),
    ([{"role": "user", "content": None}], {}, "content"),
    ([{"role": "user", "content": 3}], {}, "Bad message 1"),
    ([{"role": "user", "content": "\ud83d"}], {}, "Unicode"),
    ([{"role": "user", "content": "x", "mood": "good"}], {}, "mood"),
    (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]}],
        {},
        "'image_url'; only text",
    ),
    ([{"role": "user", "content": [3]}], {}, "a part of its content is 3"),
    ([{"role": "assistant", "tool_calls": [{"id": "x"}]}], {}, "a tool call is"),
    ([{"role": "assistant", "tool_calls": "x"}], {}, "a tool call is 'x'"),
    ([USER], {"tools": [{"name": "x"}]}, "A tool is"),
    ([USER], {"tools": [{"function": {"name": "x", "parameters": object()}}]}, "JSON"),
    ([USER], {"template_arguments": {"x": "y" * (1 << 20)}}, "1048584 characters as JSON"),
    ([USER] * 16_385, {}, "16385 messages"),
]


@pytest.mark.parametrize(("messages", "more", "said"), WRONG, ids=[words for *_, words in WRONG])
def test_what_is_no_conversation(messages: Any, more: Any, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        encode_chat(messages, **more)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"tools": [WEATHER]}, "knows no tools"),
        ({"template_arguments": {"enable_thinking": False}}, "knows no argument 'enable_thinking'"),
        ({"template_arguments": {"chat_template": "{{ 1 }}"}}, "'chat_template' is no argument"),
        ({"template_arguments": {"tokenize": True}}, "'tokenize' is no argument"),
        ({"template_arguments": {"messages": []}}, "'messages' is no argument"),
    ],
)
def test_what_a_template_does_not_know_is_not_passed_over(more: Any, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        asked(folder_of("byte-level"), [USER], **more)


@pytest.mark.parametrize(
    ("field", "text", "said"),
    [
        ("tools", "{", "no JSON"),
        ("tools", "[" * 10**5, "no JSON"),
        ("tools", "[3]", "no list of objects"),
        ("template_arguments", "[]", "no object"),
    ],
)
def test_what_another_client_may_send(rich: Path, field: str, text: str, said: str) -> None:
    fields: dict[str, Any] = {field: text}
    chat = Chat(messages=(ChatMessage(role="user", content="x"),), **fields)
    with pytest.raises(InvalidRequest, match=said):
        Tokenizer.load(rich).encode_chat(chat)


# ------------------------------------------------------------------ templates that misbehave


def chat_with(tmp_path: Path, template: str | None) -> list[int]:
    return asked(save(tmp_path / "chat", byte_level(), chat_template=template), [USER])


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('only poems') }}", "only poems"),
        ("{{ messages.nothing.here }}", "refuses"),
        ("{{ 1 / 0 }}", "refuses"),
        ("{% for", "refuses"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses"),
        ("{{ 'x' * 1000000 }}", "1000000 characters"),
        ("{{ raise_exception('x' * 9999) }}", "^.{,600}$"),
    ],
)
def test_what_a_template_may_do_wrong(tmp_path: Path, template: str | None, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        chat_with(tmp_path, template)


def test_a_template_may_refuse_a_role() -> None:
    with pytest.raises(InvalidRequest, match="no tools"):
        asked(folder_of("byte-level"), [{"role": "tool", "content": "x"}])


def test_an_empty_conversation_is_an_invalid_request() -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        asked(folder_of("byte-level"), [])


def test_many_short_turns_are_not_too_long() -> None:
    turn = ChatMessage(role="user", content="")
    assert tokenizer_of("byte-level").encode_chat(Chat(messages=(turn,) * 2000))


def test_tools_that_are_written_with_indents_are_not_too_long(tmp_path: Path) -> None:
    template = "{{ tools | tojson(indent=4) }}{{ messages[0].content }}"
    folder = save(tmp_path / "chat", byte_level(), chat_template=template)
    names = {f"a{number}": {"type": "string"} for number in range(3000)}
    tool = {"type": "function", "function": {"name": "x", "parameters": {"properties": names}}}
    assert asked(folder, [USER], tools=[tool]) == expected(folder, [USER], tools=[tool])
