"""Anthropic's own package, and what Claude Code sends, against the API."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest
from anthropic import Anthropic, AsyncAnthropic

from distributed_llm import DistributedClient
from distributed_llm.common.errors import (
    CapacityError,
    ContextLengthExceeded,
    DistributedLLMError,
    NotAllowed,
    Overloaded,
    WorkerLost,
)
from tests.api.chat_texts import CALL
from tests.api.conftest import Api
from tests.api.fake_server import KEY, MODEL, FakeServer
from tests.unit.test_chat_formats import QWEN3

HI: list[Any] = [{"role": "user", "content": "Hi"}]
WEATHER: Any = {
    "name": "weather",
    "description": "Tells it.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
ANSWER = ("<think>", "Hm", "\n</think>\n\nI look.", "<tool_call>", CALL, "</tool_call>")


@pytest.fixture(scope="module")
def client(fake_server: FakeServer) -> Iterator[Anthropic]:
    with Anthropic(api_key=KEY, base_url=fake_server.url, max_retries=0) as client:
        yield client


def test_a_message(client: Anthropic, fake_server: FakeServer) -> None:
    chat = fake_server.answer("Hello", " there")
    message = client.messages.create(
        model="default",
        max_tokens=50,
        messages=HI,
        system="Be short.",
        stop_sequences=["END"],
        metadata={"user_id": "u"},
        extra_body={"temperature": 0.5, "top_p": 0.9, "top_k": 5},
    )
    assert message.model == MODEL
    assert message.content[0].type == "text"
    assert message.content[0].text == "Hello there"
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (5, 2)
    assert message.usage.output_tokens == 2
    assert message._request_id
    asked = dict(chat.asked)
    assert asked.pop("messages") == [{"role": "system", "content": "Be short."}, *HI]
    assert {name: value for name, value in asked.items() if value is not None} == {
        "max_new_tokens": 50,
        "fit_context": True,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "stop_strings": ("END",),
    }


def test_a_stream_has_the_same_parts_as_a_whole_message(
    client: Anthropic, fake_server: FakeServer
) -> None:
    fake_server.answer(*ANSWER, template=QWEN3)
    asked: Any = {"model": MODEL, "max_tokens": 50, "messages": HI, "tools": [WEATHER]}
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_message()
    blocks = [block.model_dump(exclude_none=True) for block in whole.content]
    assert [block["type"] for block in blocks] == ["thinking", "text", "tool_use"]
    assert blocks[0]["thinking"] == "Hm"
    assert blocks[1]["text"] == "I look."
    assert (blocks[2]["name"], blocks[2]["input"]) == ("weather", json.loads(CALL)["arguments"])
    assert whole.stop_reason == final.stop_reason == "tool_use"
    again = [block.model_dump(exclude_none=True) for block in final.content]
    blocks[2]["id"] = again[2]["id"]
    assert [{**block, "parsed_output": None} for block in again] == [
        {**block, "parsed_output": None} for block in blocks
    ]
    assert final.usage.input_tokens == 5
    assert events[0] == "message_start"
    assert events[-2:] == ["message_delta", "message_stop"]
    assert events.count("content_block_start") == events.count("content_block_stop") == 3


def test_the_events_of_a_stream_as_they_are_sent(fake_server: FakeServer) -> None:
    fake_server.answer("Hello", " there", finish_reason="length")
    body = {"model": MODEL, "max_tokens": 2, "messages": HI, "stream": True}
    sent = httpx.post(f"{fake_server.url}/v1/messages", json=body, headers={"x-api-key": KEY})
    assert sent.headers["content-type"].startswith("text/event-stream")
    events = [event.split("\n") for event in sent.text.removesuffix("\n\n").split("\n\n")]
    assert [name.removeprefix("event: ") for name, _ in events] == [
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    data = [json.loads(line.removeprefix("data: ")) for _, line in events]
    assert data[3] == {
        "type": "content_block_delta",
        "index": 0,
        "delta": {"type": "text_delta", "text": "Hello"},
    }
    assert data[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}


def test_async_client_and_bearer_key(fake_server: FakeServer) -> None:
    fake_server.answer("Hello", " there")

    async def ask() -> str:
        async with (
            AsyncAnthropic(auth_token=KEY, base_url=fake_server.url, max_retries=0) as client,
            client.messages.stream(model=MODEL, max_tokens=9, messages=HI) as stream,
        ):
            return "".join([text async for text in stream.text_stream])

    assert asyncio.run(ask()) == "Hello there"


def test_tokens_are_counted_of_what_would_be_asked(
    client: Anthropic, fake_server: FakeServer
) -> None:
    chat = fake_server.answer(template=QWEN3)
    count = client.messages.count_tokens(
        model=MODEL, messages=HI, system="Be short.", tools=[WEATHER], thinking={"type": "disabled"}
    )
    assert count.input_tokens == 3
    assert chat.asked["chat_template_kwargs"] == {"enable_thinking": False}
    assert len(chat.asked["messages"]) == 2
    assert chat.asked["tools"][0]["function"]["name"] == "weather"


def test_the_answer_is_what_the_cluster_says(api: Api) -> None:
    asked: Any = {"model": "default", "max_tokens": 12, "messages": HI}
    asked["extra_body"] = {"temperature": 0.0}
    with (
        Anthropic(api_key=api.key, base_url=api.url, max_retries=0) as client,
        DistributedClient(api.cluster.address) as direct,
    ):
        wanted = direct.chat(HI, max_new_tokens=12, temperature=0.0, details=True)
        message = client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            streamed = stream.get_final_text()
        counted = client.messages.count_tokens(model=api.model, messages=HI)
        asked["max_tokens"] = 20_000
        assert client.messages.create(**asked).usage.output_tokens > 12
    assert [block.to_dict() for block in message.content] == [{"type": "text", "text": wanted.text}]
    assert streamed == wanted.text
    assert message.usage.output_tokens == wanted.usage.completion_tokens
    assert counted.input_tokens == wanted.usage.prompt_tokens


def test_models_are_listed_in_the_dialect_of_who_asks(
    client: Anthropic, fake_server: FakeServer
) -> None:
    fake_server.answer()
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).display_name == "Tiny-1B"
    listed = httpx.get(f"{fake_server.url}/v1/models", headers={"x-api-key": KEY}).json()
    assert listed["object"] == "list"


def test_results_of_tools_and_thoughts_go_back_to_the_model(
    client: Anthropic, fake_server: FakeServer
) -> None:
    chat = fake_server.answer("Fine.", template=QWEN3)
    call = {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Kiel"}}
    picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
    results = [
        {"type": "tool_result", "tool_use_id": "c1", "content": "Rain", "is_error": True},
        {"type": "tool_result", "tool_use_id": "c2", "content": [picture]},
        {"type": "tool_result", "tool_use_id": "c3"},
        {"type": "text", "text": "So?"},
    ]
    thought = {"type": "thinking", "thinking": "Hm", "signature": ""}
    messages: list[Any] = [
        *HI,
        {"role": "assistant", "content": [thought, {"type": "text", "text": "I look."}, call]},
        {"role": "user", "content": results},
    ]
    client.messages.create(model=MODEL, max_tokens=9, messages=messages, tools=[WEATHER])
    asked = chat.asked["messages"]
    assert asked[1] == {
        "role": "assistant",
        "content": "I look.",
        "reasoning_content": "Hm",
        "tool_calls": [
            {
                "id": "c1",
                "type": "function",
                "function": {"name": "weather", "arguments": {"city": "Kiel"}},
            }
        ],
    }
    assert [(turn["role"], turn["content"][:20]) for turn in asked[2:]] == [
        ("tool", "Error: Rain"),
        ("tool", "[This content is no "),
        ("tool", ""),
        ("user", "So?"),
    ]


@pytest.mark.parametrize(
    ("choice", "tools", "forced"),
    [
        ({"type": "auto"}, 1, False),
        ({"type": "none"}, 0, False),
        ({"type": "any"}, 1, True),
        ({"type": "tool", "name": "weather"}, 1, True),
    ],
)
def test_choices_of_tools(
    client: Anthropic, fake_server: FakeServer, choice: Any, tools: int, forced: bool
) -> None:
    chat = fake_server.answer(f"[{CALL}]", template=QWEN3)
    asked: Any = {"model": MODEL, "max_tokens": 9, "messages": HI, "tools": [WEATHER]}
    message = client.messages.create(**asked, tool_choice=choice)
    assert len(chat.asked["tools"] or ()) == tools
    assert ("grammar" in chat.asked) == forced
    assert message.stop_reason == ("tool_use" if forced else "end_turn")


def test_a_stop_sequence_is_told(client: Anthropic, fake_server: FakeServer) -> None:
    fake_server.answer("One,", stop_string="two")
    asked: Any = {"model": MODEL, "max_tokens": 9, "messages": HI, "stop_sequences": ["two"]}
    message = client.messages.create(**asked)
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "two")
    with client.messages.stream(**asked) as stream:
        assert stream.get_final_message().stop_sequence == "two"


def test_a_schema_for_the_answer(client: Anthropic, fake_server: FakeServer) -> None:
    chat = fake_server.answer('{"a": 1}', template=QWEN3)
    schema: Any = {"type": "object", "properties": {"a": {"type": "integer"}}}
    message = client.messages.create(
        model=MODEL,
        max_tokens=9,
        messages=HI,
        output_config={"format": {"type": "json_schema", "schema": schema}},
    )
    assert json.loads(chat.asked["grammar"].text) == schema
    assert chat.asked["chat_template_kwargs"] == {"enable_thinking": False}
    assert message.content[0].type == "text"


CLAUDE_CODE: dict[str, Any] = {
    "model": "claude-sonnet-4-5-20250929",
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "<system-reminder>\nToday is Monday.\n</system-reminder>"},
                {"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}},
            ],
        }
    ],
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.9; cch=0a1b2;"},
        {
            "type": "text",
            "text": "You are Claude Code, Anthropic's official CLI for Claude.",
            "cache_control": {"type": "ephemeral", "ttl": "1h"},
        },
        {"type": "text", "text": "Be concise.", "cache_control": {"type": "ephemeral"}},
    ],
    "tools": [
        {
            "name": "Bash",
            "description": "Executes a bash command.",
            "input_schema": {
                "$schema": "http://json-schema.org/draft-07/schema#",
                "type": "object",
                "properties": {"command": {"type": "string"}, "timeout": {"type": "number"}},
                "required": ["command"],
                "additionalProperties": False,
            },
            "eager_input_streaming": True,
        }
    ],
    "metadata": {"user_id": "user_0_account__session_1"},
    "max_tokens": 32000,
    "thinking": {"budget_tokens": 31999, "type": "enabled"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "output_config": {"effort": "medium"},
    "stream": True,
}


AGENT = {
    **CLAUDE_CODE,
    "messages": [
        *CLAUDE_CODE["messages"],
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm", "signature": ""},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "c1", "name": "Bash", "input": {"command": "ls"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "c1",
                    "content": [{"type": "text", "text": "a.txt"}],
                    "is_error": False,
                }
            ],
        },
    ],
    "tool_choice": {"type": "tool", "name": "Bash", "disable_parallel_tool_use": True},
    "stop_sequences": ["END"],
    "output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}},
}
"""What it sends later, and what others do."""


def test_what_claude_code_sends(fake_server: FakeServer) -> None:
    chat = fake_server.answer(*ANSWER, template=QWEN3)
    headers = {
        "authorization": f"Bearer {KEY}",
        "anthropic-version": "2023-06-01",
        "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14",
        "anthropic-dangerous-direct-browser-access": "true",
        "user-agent": "claude-cli/2.1.9 (external, cli)",
        "x-app": "cli",
        "x-stainless-helper-method": "stream",
        "x-stainless-retry-count": "0",
    }
    url = f"{fake_server.url}/v1/messages?beta=true"
    sent = httpx.post(url, json=CLAUDE_CODE, headers=headers)
    assert sent.status_code == 200
    assert "event: message_stop" in sent.text
    assert sent.headers["x-dllm-warning"] == (
        f"the model {MODEL} answers for claude-sonnet-4-5-20250929"
    )
    system, user = chat.asked["messages"]
    assert system["content"].startswith("You are Claude Code")
    assert user["content"].endswith("\nHi")
    assert chat.asked["chat_template_kwargs"] == {"enable_thinking": True}
    assert chat.asked["fit_context"] is True


@pytest.mark.parametrize(
    ("error", "kind", "status", "named"),
    [
        (Overloaded("Full.", retry_after_s=3.0), anthropic.OverloadedError, 529, "overloaded"),
        (ContextLengthExceeded("Long."), anthropic.BadRequestError, 400, "invalid_request"),
        (NotAllowed("No."), anthropic.PermissionDeniedError, 403, "permission"),
        (CapacityError("None."), anthropic.ServiceUnavailableError, 503, "api"),
        (WorkerLost("Lost."), anthropic.ServiceUnavailableError, 503, "api"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_of_the_cluster(
    client: Anthropic,
    fake_server: FakeServer,
    error: DistributedLLMError,
    kind: type[anthropic.APIStatusError],
    status: int,
    named: str,
    stream: bool,
) -> None:
    fake_server.fail(error)
    with pytest.raises(kind) as caught:
        client.messages.create(model=MODEL, max_tokens=9, messages=HI, stream=stream)
    assert caught.value.status_code == status
    body: Any = caught.value.body
    assert body["type"] == "error"
    assert body["error"] == {"type": f"{named}_error", "message": str(error)}
    assert body["request_id"] == caught.value.request_id


def test_an_error_in_the_middle_of_a_stream(client: Anthropic, fake_server: FakeServer) -> None:
    fake_server.answer("Hello", error=WorkerLost("It is gone."))
    with (
        client.messages.stream(model=MODEL, max_tokens=9, messages=HI) as stream,
        pytest.raises(anthropic.APIStatusError, match="It is gone"),
    ):
        list(stream)


def test_wrong_keys_and_models(client: Anthropic, fake_server: FakeServer) -> None:
    fake_server.answer()
    with pytest.raises(anthropic.NotFoundError, match="is not served here"):
        client.messages.create(model="gpt-9", max_tokens=9, messages=HI)
    with pytest.raises(anthropic.AuthenticationError):
        client.with_options(api_key="wrong").messages.create(model=MODEL, max_tokens=9, messages=HI)


IMAGE = {"type": "image", "source": {"type": "url", "url": "http://x/y.png"}}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
        ({"temperature": 1000}, "temperature"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "is no text"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "wrong field"),
        ({"messages": [{"role": "user", "content": [{}]}]}, "has a type"),
        ({"messages": [*HI, {"role": "assistant", "content": "{"}]}, "is not supported"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "own servers"),
        ({"tools": [{"name": "x"}]}, "input_schema"),
        ({"tool_choice": {"type": "tool"}}, "names no tool"),
        ({"tool_choice": {"type": "any"}}, "does not have"),
        ({"thinking": {"type": "maybe"}}, "thinking"),
    ],
)
def test_wrong_requests(
    client: Anthropic, fake_server: FakeServer, fields: dict[str, Any], told: str
) -> None:
    fake_server.answer()
    body = {"model": MODEL, "max_tokens": 9, "messages": HI, **fields}
    with pytest.raises(anthropic.BadRequestError, match=told):
        client.post("/v1/messages", body=body, cast_to=object)
