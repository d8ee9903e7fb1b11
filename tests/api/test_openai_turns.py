"""Turns as OpenAI's own client gets them, over a client that answers as it is told."""

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest

from distributed_llm.common.errors import (
    DeadlineExceeded,
    DistributedLLMError,
    NotReady,
    Overloaded,
    WorkerLost,
)
from tests.api.fake_server import KEY, MODEL, FakeServer
from tests.unit.test_chat_formats import QWEN3

MESSAGES: Any = [{"role": "user", "content": "Hi"}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
        },
    }
]
CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "é"}}\n</tool_call>'


@pytest.fixture(scope="module")
def client(fake_server: FakeServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{fake_server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_tools_are_called(fake_server: FakeServer, client: openai.OpenAI) -> None:
    chat = fake_server.answer("Let me.", *CALL, template=QWEN3)
    asked: Any = {"model": MODEL, "messages": MESSAGES, "tools": TOOLS}
    (choice,) = client.chat.completions.create(**asked).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me."
    assert choice.message.tool_calls
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("look", {"at": "é"})
    assert chat.asked["tools"] == TOOLS
    with client.chat.completions.stream(**asked) as stream:
        (final,) = stream.get_final_completion().choices
    assert final.message.tool_calls
    (streamed,) = final.message.tool_calls
    assert (streamed.function.name, streamed.function.arguments) == (
        call.function.name,
        call.function.arguments,
    )
    again = [*MESSAGES, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "x"}]
    client.chat.completions.create(model=MODEL, messages=again, tools=TOOLS)
    assert chat.asked["messages"][1]["tool_calls"][0]["id"] == call.id


def test_reasoning_is_kept_apart(fake_server: FakeServer, client: openai.OpenAI) -> None:
    fake_server.answer("<think>\nWell", ".\n</think>\n\n", "Hel", "lo", template=QWEN3)
    asked: Any = {"model": MODEL, "messages": MESSAGES}
    (choice,) = client.chat.completions.create(**asked).choices
    assert choice.message.content == "Hello"
    assert choice.message.model_dump()["reasoning_content"] == "Well."
    deltas = [
        chunk.choices[0].delta.model_dump()
        for chunk in client.chat.completions.create(stream=True, **asked)
    ]
    assert "".join(one["content"] or "" for one in deltas) == "Hello"
    assert "".join(one.get("reasoning_content") or "" for one in deltas) == "Well."


def test_an_error_within_a_stream_is_its_last_event(
    fake_server: FakeServer, client: openai.OpenAI
) -> None:
    chat = fake_server.answer("a", "b", error=WorkerLost("The worker is gone. Ask again."))
    stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
    texts = [next(stream).choices[0].delta.content for _ in range(3)]
    assert texts == ["", "a", "b"]
    with pytest.raises(openai.APIError) as raised:
        next(stream)
    assert raised.value.code == "worker_lost"
    assert chat.closed
    body = {"model": MODEL, "messages": MESSAGES, "stream": True}
    answer = httpx2.post(
        f"{fake_server.url}/v1/chat/completions",
        json=body,
        headers={"Authorization": f"Bearer {KEY}"},
    )
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.text.endswith(
        'data: {"error":{"message":"The worker is gone. Ask again.","type":"server_error",'
        '"param":null,"code":"worker_lost"}}\n\ndata: [DONE]\n\n'
    )


@pytest.mark.parametrize(
    ("error", "status", "headers"),
    [
        (Overloaded("The queue is full.", retry_after_s=3.2), 503, {"retry-after": "4"}),
        (NotReady("No plan."), 503, {"retry-after": "2"}),
        (WorkerLost("Gone."), 503, {"retry-after": "2"}),
        (DeadlineExceeded("Too late."), 504, {"x-should-retry": "false"}),
        (DistributedLLMError("Broken."), 500, {"x-should-retry": "false"}),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_an_error_before_an_answer_has_a_status(
    fake_server: FakeServer,
    client: openai.OpenAI,
    error: DistributedLLMError,
    status: int,
    headers: dict[str, str],
    stream: bool,
) -> None:
    fake_server.answer(error=error)
    with pytest.raises(openai.InternalServerError) as raised:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=stream)
    assert raised.value.status_code == status
    assert (raised.value.code, raised.value.type) == (error.code, "server_error")
    assert raised.value.response.headers["x-request-id"]
    assert headers.items() <= dict(raised.value.response.headers).items()


def test_wrong_bodies_are_refused_before_anything_is_asked(fake_server: FakeServer) -> None:
    for body, param in (
        (b'{"messages": [], "messages": []}', None),
        (b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}', None),
        (b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}', "temperature"),
        (b'{"messages": "a"}', "messages"),
        (b"[]", None),
        (b"{}", "messages"),
    ):
        answer = httpx2.post(
            f"{fake_server.url}/v1/chat/completions",
            content=body,
            headers={"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
        )
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param
