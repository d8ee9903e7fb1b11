"""OpenAI's own package, and what Codex sends, against `/v1/responses`."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pydantic
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.responses import Response, ResponseStreamEvent

from distributed_llm import DistributedClient
from distributed_llm.api.openai.responses.store import Record, ResponseStore
from distributed_llm.common.errors import (
    CapacityError,
    ContextLengthExceeded,
    DeadlineExceeded,
    DistributedLLMError,
    NotAllowed,
    Overloaded,
    WorkerLost,
)
from distributed_llm.common.grammar import Grammar
from tests.api.chat_texts import CALL
from tests.api.conftest import Api
from tests.api.fake_server import KEY, MODEL, OTHER_KEY, FakeServer
from tests.unit.test_chat_formats import QWEN3

WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "Tells it.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}
ANSWER = ("<think>", "Hm", "\n</think>\n\nI look.", "<tool_call>", CALL, "</tool_call>")


@pytest.fixture(scope="module")
def client(fake_server: FakeServer) -> Iterator[OpenAI]:
    with OpenAI(api_key=KEY, base_url=f"{fake_server.url}/v1", max_retries=0) as client:
        yield client


def test_a_response(client: OpenAI, fake_server: FakeServer) -> None:
    chat = fake_server.answer("Hello", " there")
    response = client.responses.create(
        model=MODEL,
        input="Hi",
        instructions="Be short.",
        temperature=0.5,
        top_p=0.9,
        max_output_tokens=50,
        metadata={"a": "b"},
    )
    assert response.output_text == "Hello there"
    assert (response.status, response.model, response.metadata) == ("completed", MODEL, {"a": "b"})
    assert response.usage
    assert (response.usage.input_tokens, response.usage.output_tokens) == (7, 2)
    assert response.usage.input_tokens_details.cached_tokens == 2
    Response.model_validate(response.to_dict(), strict=False)
    asked = {name: value for name, value in chat.asked.items() if value is not None}
    assert asked == {
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "Hi"},
        ],
        "max_new_tokens": 50,
        "fit_context": True,
        "temperature": 0.5,
        "top_p": 0.9,
    }


def test_a_stream_has_the_same_parts_as_a_whole_response(
    client: OpenAI, fake_server: FakeServer
) -> None:
    fake_server.answer(*ANSWER, template=QWEN3)
    asked: Any = {"model": MODEL, "input": "Hi", "tools": [WEATHER]}
    whole = client.responses.create(**asked)
    with client.responses.stream(**asked) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call"]
    either: Any
    for either in (whole, final):
        thought, said, call = either.output
        assert thought.type == "reasoning"
        assert thought.content
        assert thought.content[0].text == "Hm"
        assert either.output_text == "I look."
        assert call.type == "function_call"
        assert (call.name, json.loads(call.arguments)) == ("weather", json.loads(CALL)["arguments"])
        assert (said.type, either.status) == ("message", "completed")
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_the_events_of_a_stream_as_they_are_sent(fake_server: FakeServer) -> None:
    fake_server.answer(*ANSWER, template=QWEN3)
    body = {"model": MODEL, "input": "Hi", "stream": True, "tools": [WEATHER]}
    sent = httpx.post(
        f"{fake_server.url}/v1/responses", json=body, headers={"authorization": f"Bearer {KEY}"}
    )
    events = [event.split("\n") for event in sent.text.removesuffix("\n\n").split("\n\n")]
    data = [json.loads(line.removeprefix("data: ")) for _, line in events]
    assert [name for name, _ in events] == [f"event: {event['type']}" for event in data]
    assert [event["type"].removeprefix("response.") for event in data] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    official = pydantic.TypeAdapter[Any](ResponseStreamEvent)
    for event in data:
        official.validate_python(event)
    done = [event["item"] for event in data if event["type"] == "response.output_item.done"]
    assert done == data[-1]["response"]["output"]
    assert data[2]["item"]["content"] == []


def test_async_client_and_an_answer_that_is_cut(fake_server: FakeServer) -> None:
    fake_server.answer("Hello", " there", finish_reason="length")

    async def ask() -> Any:
        async with AsyncOpenAI(
            api_key=KEY, base_url=f"{fake_server.url}/v1", max_retries=0
        ) as client:
            stream = await client.responses.create(model="default", input="Hi", stream=True)
            return [event async for event in stream][-1]

    last = asyncio.run(ask())
    assert last.type == "response.incomplete"
    assert last.response.incomplete_details.reason == "max_output_tokens"
    assert last.response.output[0].status == "incomplete"
    assert last.response.output_text == "Hello there"


def test_a_response_continues_an_earlier_one(client: OpenAI, fake_server: FakeServer) -> None:
    chat = fake_server.answer(*ANSWER, template=QWEN3)
    first = client.responses.create(
        model=MODEL, input="Hi", tools=[WEATHER], instructions="Once only."
    )
    call = first.output[-1]
    assert call.type == "function_call"
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "Rain"}
    second = client.responses.create(
        model=MODEL, input=[output], previous_response_id=first.id, tools=[WEATHER]
    )
    assert [turn["role"] for turn in chat.asked["messages"]] == ["user", "assistant", "tool"]
    said = chat.asked["messages"][1]
    assert (said["content"], said["reasoning_content"]) == ("I look.", "Hm")
    assert said["tool_calls"][0]["id"] == call.call_id
    client.responses.create(model=MODEL, input="And?", previous_response_id=second.id, store=False)
    assert len(chat.asked["messages"]) == 5


def test_the_answer_is_what_the_cluster_says(api: Api) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    asked: Any = {"model": api.model, "max_output_tokens": 12, "input": "Hi", "temperature": 0.0}
    with (
        OpenAI(api_key=api.key, base_url=f"{api.url}/v1", max_retries=0) as client,
        DistributedClient(api.cluster.address) as direct,
    ):
        first = direct.chat(messages, max_new_tokens=12, temperature=0.0)
        response = client.responses.create(**asked)
        messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "Go on"}]
        second = direct.chat(messages, max_new_tokens=12, temperature=0.0)
        with client.responses.stream(
            **{**asked, "input": "Go on"}, previous_response_id=response.id
        ) as stream:
            texts = [event.delta for event in stream if event.type == "response.output_text.delta"]
    assert response.output_text == first
    assert "".join(texts) == second


def test_a_call_that_was_broken_off_does_not_end_a_conversation(
    client: OpenAI, fake_server: FakeServer
) -> None:
    chat = fake_server.answer("Sorry.", template=QWEN3)
    broken: Any = {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"a": '}
    client.responses.create(model=MODEL, input=[broken, {"role": "user", "content": "So?"}])
    (call,) = chat.asked["messages"][0]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"broken_off": '{"a": '}


def test_responses_are_kept_for_whoever_asked(client: OpenAI, fake_server: FakeServer) -> None:
    fake_server.answer("Hello")
    response = client.responses.create(model=MODEL, input="Hi")
    assert client.responses.retrieve(response.id).output_text == "Hello"
    items = client.responses.input_items.list(response.id)
    assert [item.type for item in items] == ["message"]
    other = client.with_options(api_key=OTHER_KEY)
    with pytest.raises(openai.NotFoundError):
        other.responses.retrieve(response.id)
    with pytest.raises(openai.NotFoundError):
        other.responses.delete(response.id)
    client.responses.delete(response.id)
    for gone in (client.responses.retrieve, client.responses.input_items.list):
        with pytest.raises(openai.NotFoundError):
            gone(response.id)
    forgotten = client.responses.create(model=MODEL, input="Hi", store=False)
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=MODEL, input="Hi", previous_response_id=forgotten.id)
    assert caught.value.code == "previous_response_not_found"


def test_items_are_listed_in_pages(client: OpenAI, fake_server: FakeServer) -> None:
    fake_server.answer("Hello")
    items: Any = [{"role": "user", "content": f"{n}"} for n in range(5)]
    response = client.responses.create(model=MODEL, input=items)
    page = client.responses.input_items.list(response.id, limit=2, order="asc")
    listed = [item.to_dict()["content"] for item in page]  # it asks for the next pages itself
    assert listed == [[{"type": "input_text", "text": f"{n}"}] for n in range(5)]


def test_items_that_are_nested_deeply_are_kept_and_given(
    client: OpenAI, fake_server: FakeServer
) -> None:
    fake_server.answer("Hello")
    deep: Any = {}
    for _ in range(600):
        deep = {"a": deep}
    items: Any = [{"role": "user", "content": "x", "deep": deep}]
    response = client.responses.create(model=MODEL, input=items)
    url = f"/responses/{response.id}/input_items"
    (item,) = json.loads(client.get(url, cast_to=httpx.Response).content)["data"]
    assert item["deep"] == deep


def test_half_a_character_is_refused(fake_server: FakeServer) -> None:
    fake_server.answer("Hello")

    def status(character: str) -> int:
        tool = f'{{"type": "function", "name": "f", "description": "{character}"}}'
        body = f'{{"model": "default", "input": "x", "tools": [{tool}]}}'
        headers = {"x-api-key": KEY, "content-type": "application/json"}
        return httpx.post(
            f"{fake_server.url}/v1/responses", content=body, headers=headers
        ).status_code

    assert [status(text) for text in (r"\ud83d\ude00", r"\ud83d", r"\ude00")] == [200, 400, 400]


def test_what_is_kept_has_bounds() -> None:
    def record(name: str, previous: str | None = None, text: str = "") -> Record:
        return Record({"id": name, "output": [{"of": name}]}, [{"to": name, "t": text}], previous)

    store = ResponseStore(max_responses=3, max_bytes=1000)
    for name, previous in [("a", None), ("b", "a"), ("c", "b")]:
        store.put("me", record(name, previous))
    items = store.conversation("me", "c")
    assert items
    assert [item.get("of") for item in items][1::2] == ["a", "b", "c"]
    assert store.conversation("you", "c") is None
    store.put("me", record("d"))
    assert store.get("me", "c") is None  # used longest ago: the walk went on to "a"
    store.put("me", record("large", text="x" * 2000))
    assert store.get("me", "large") is None
    store.put("me", record("half", text="x" * 780))
    assert store.get("me", "half")
    kept = [name for name in "abd" if store.get("me", name)]
    assert kept == ["d"]
    for name in ("half", "again"):  # what is deleted makes room
        assert store.delete("me", "half") is (name == "half")
        store.put("me", record(name, text="x" * 780))
        assert store.get("me", "d")
        assert store.delete("me", name)


@pytest.mark.parametrize(
    ("choice", "parallel", "tools", "forced"),
    [
        ("auto", True, 1, False),
        ("none", True, 0, False),
        ("required", True, 1, True),
        ({"type": "function", "name": "weather"}, False, 1, True),
        ({"type": "allowed_tools", "mode": "required", "tools": [WEATHER]}, True, 1, True),
        ({"type": "allowed_tools", "mode": "auto", "tools": []}, True, 0, False),
    ],
)
def test_choices_of_tools(
    client: OpenAI, fake_server: FakeServer, choice: Any, parallel: bool, tools: int, forced: bool
) -> None:
    chat = fake_server.answer(f"[{CALL}]", template=QWEN3)
    response = client.responses.create(
        model=MODEL,
        input="Hi",
        tools=[WEATHER],
        tool_choice=choice,
        parallel_tool_calls=parallel,
    )
    assert len(chat.asked["tools"] or ()) == tools
    assert ("grammar" in chat.asked) == forced
    assert response.output[0].type == ("function_call" if forced else "message")


def test_a_schema_for_the_answer(client: OpenAI, fake_server: FakeServer) -> None:
    class Sum(pydantic.BaseModel):
        a: int

    chat = fake_server.answer('{"a"', ": 1}", template=QWEN3)
    response = client.responses.parse(
        model=MODEL, input="Hi", text_format=Sum, reasoning={"effort": "high"}
    )
    assert response.output_parsed == Sum(a=1)
    assert json.loads(chat.asked["grammar"].text)["required"] == ["a"]
    client.responses.create(
        model=MODEL,
        input="Hi",
        text={"format": {"type": "json_object"}},
        reasoning={"effort": "none"},
    )
    assert chat.asked["grammar"] == Grammar("json_object")
    assert chat.asked["chat_template_kwargs"] == {"enable_thinking": False}


CODEX: dict[str, Any] = {
    "model": MODEL,
    "instructions": "You are Codex, a coding agent.",
    "input": [
        {
            "type": "message",
            "role": "developer",
            "content": [{"type": "input_text", "text": "<permissions>read-only</permissions>"}],
        },
        {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "<environment_context/>"}],
        },
        {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "List the files."}],
        },
        {
            "type": "reasoning",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "I list."}],
            "encrypted_content": None,
        },
        {
            "type": "function_call",
            "name": "exec_command",
            "arguments": '{"cmd":"ls"}',
            "call_id": "abcdefghi",
        },
        {"type": "function_call_output", "call_id": "abcdefghi", "output": "a.txt"},
    ],
    "tools": [
        {
            "type": "function",
            "name": "exec_command",
            "description": "Runs a command in a PTY.",
            "strict": False,
            "parameters": {
                "type": "object",
                "properties": {"cmd": {"type": "string"}, "yield_time_ms": {"type": "number"}},
                "required": ["cmd"],
                "additionalProperties": False,
            },
        },
        {
            "type": "custom",
            "name": "apply_patch",
            "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.*/"},
        },
        {"type": "web_search", "external_web_access": False},
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "reasoning": {"effort": "medium", "summary": "auto"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "0199-conversation",
    "text": {"verbosity": "low"},
    "client_metadata": {"x-codex-installation-id": "1"},
}


def test_what_codex_sends(fake_server: FakeServer) -> None:
    chat = fake_server.answer("There is a.txt.", template=QWEN3)
    headers = {
        "authorization": f"Bearer {KEY}",
        "accept": "text/event-stream",
        "openai-beta": "responses=experimental",
        "originator": "codex_cli_rs",
        "session_id": "0199-conversation",
        "user-agent": "codex_cli_rs/0.98.0 (Debian 13.0.0; x86_64) xterm",
    }
    sent = httpx.post(f"{fake_server.url}/v1/responses", json=CODEX, headers=headers)
    assert sent.status_code == 200
    assert "event: response.completed" in sent.text
    assert sent.headers["x-dllm-warning"] == "ignored tools: custom, web_search"
    messages = chat.asked["messages"]
    assert [turn["role"] for turn in messages] == ["system", "user", "assistant", "tool"]
    assert messages[0]["content"].endswith("\n\n<permissions>read-only</permissions>")
    assert messages[1]["content"] == "<environment_context/>\n\nList the files."
    assert messages[2]["reasoning_content"] == "I list."
    assert messages[2]["tool_calls"][0]["function"]["arguments"] == '{"cmd":"ls"}'
    assert [tool["function"]["name"] for tool in chat.asked["tools"]] == ["exec_command"]
    assert chat.asked["chat_template_kwargs"] == {"enable_thinking": True}


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (Overloaded("Full.", retry_after_s=3.0), openai.InternalServerError, "overloaded"),
        (ContextLengthExceeded("Long."), openai.BadRequestError, "context_length_exceeded"),
        (NotAllowed("No."), openai.PermissionDeniedError, "not_allowed"),
        (CapacityError("None."), openai.InternalServerError, "no_capacity"),
        (DeadlineExceeded("Late."), openai.InternalServerError, "deadline_exceeded"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_of_the_cluster(
    client: OpenAI,
    fake_server: FakeServer,
    error: DistributedLLMError,
    kind: type[openai.APIStatusError],
    code: str,
    stream: bool,
) -> None:
    fake_server.fail(error)
    with pytest.raises(kind) as caught:
        client.responses.create(model=MODEL, input="Hi", stream=stream)
    assert caught.value.code == error.code
    assert error.code == code
    assert caught.value.body["message"] == str(error)  # type: ignore[index]
    assert caught.value.request_id


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (WorkerLost("It is gone."), "server_error"),
        (ContextLengthExceeded("It is gone."), "context_length_exceeded"),
    ],
)
def test_an_error_in_the_middle_of_a_stream(
    client: OpenAI, fake_server: FakeServer, error: DistributedLLMError, code: str
) -> None:
    fake_server.answer("Hello", error=error)
    *_, last = client.responses.create(model=MODEL, input="Hi", stream=True)
    assert last.type == "response.failed"
    assert last.response.error
    assert (last.response.error.code, last.response.error.message) == (
        code,
        "It is gone.",
    )
    assert last.response.output_text == "Hello"


def test_wrong_keys_and_models(client: OpenAI, fake_server: FakeServer) -> None:
    fake_server.answer()
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.create(model="gpt-9", input="Hi")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").responses.create(model=MODEL, input="Hi")


USER = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_logprobs": 99}, "top_logprobs"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0"),
        ({"input": [{"type": "mcp_call"}]}, "input.0"),
        ({"input": [{"role": "user", "content": 5}]}, "input.0.content"),
        ({"input": [USER, {"role": "user", "content": [{}]}]}, "input.1.content.0"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0"),
        ({"tools": [{"type": "file_search"}]}, "tools.0"),
        ({"tools": [{"type": "function"}]}, "tools.0"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"reasoning": {"effort": "some"}}, "reasoning.effort"),
    ],
)
def test_wrong_requests(
    client: OpenAI, fake_server: FakeServer, fields: dict[str, Any], param: str
) -> None:
    fake_server.answer()
    body = {"model": MODEL, "input": "Hi", **fields}
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/responses", body=body, cast_to=object)
    assert caught.value.param == param
