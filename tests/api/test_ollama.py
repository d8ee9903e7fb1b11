"""Ollama's API: as its own package asks for it, and what Open WebUI sends."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import ollama
import pytest

from distributed_llm import DistributedClient
from distributed_llm.api.bodies import warning
from distributed_llm.api.chat.events import (
    AnswerEnded,
    ReasoningDelta,
    TextDelta,
    ToolCallBegun,
    ToolCallDelta,
    TurnEnded,
    TurnEvent,
)
from distributed_llm.api.chat.parsing.formats import Formats
from distributed_llm.api.errors import ApiError
from distributed_llm.api.ollama.bodies import ChatBody, GenerateBody
from distributed_llm.api.ollama.conversation import check_prompt, turn_of_chat, turn_of_prompt
from distributed_llm.api.ollama.lines import Lines, as_message, as_response, whole
from distributed_llm.api.ollama.names import listed_name
from distributed_llm.api.ollama.options import params_of, unknown_options
from distributed_llm.client.answers import Generation
from distributed_llm.common.grammar import Grammar
from distributed_llm.common.messages import Timings, Usage
from tests.api.chat_texts import QWEN, TOOLS
from tests.api.conftest import LIMIT_S, Api

GENERATION = Generation(
    text="Hi",
    token_ids=[1, 2],
    finish_reason="stop",
    choice=0,
    logprobs=None,
    usage=Usage(prompt_tokens=7, completion_tokens=2, cached_tokens=0),
    timings=Timings(queued_s=0.5, first_token_s=1.0, decode_s=2.0, stages=()),
    request_id="r1",
)
ENDED = TurnEnded(generations=(GENERATION,))
MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def client(api: Api) -> Iterator[ollama.Client]:
    client = ollama.Client(
        host=api.url, headers={"Authorization": f"Bearer {api.key}"}, timeout=LIMIT_S
    )
    yield client
    client._client.close()


@pytest.fixture
def http(api: Api) -> Iterator[httpx.Client]:
    key = {"Authorization": f"Bearer {api.key}"}
    with httpx.Client(base_url=api.url, headers=key, timeout=LIMIT_S) as client:
        yield client


def told(*events: TurnEvent, put: Any = as_message) -> list[dict[str, Any]]:
    lines = Lines("m", put, clock=lambda: "now")
    return [line for event in (*events, ENDED) for line in lines.write(event)]


def test_options_are_parameters() -> None:
    body = ChatBody(
        options={
            "temperature": 0.5,
            "top_k": 40,
            "top_p": 0.9,
            "min_p": 0.1,
            "seed": 7,
            "stop": ["END"],
            "repeat_penalty": 1.2,
            "presence_penalty": 0.1,
            "frequency_penalty": 0.2,
            "num_predict": 12,
            "num_ctx": 4096,
            "magic": 1,
        },
        format="json",
    )
    assert params_of(body) == {
        "temperature": 0.5,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.1,
        "seed": 7,
        "stop_strings": ["END"],
        "repetition_penalty": 1.2,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "max_new_tokens": 12,
        "fit_context": True,
        "grammar": Grammar("json_object"),
    }
    assert unknown_options(body) == ["magic"]


@pytest.mark.parametrize("options", [None, {}, {"num_predict": -1, "seed": -1, "mirostat": 0}])
def test_without_a_limit_an_answer_may_fill_the_context(options: dict[str, Any] | None) -> None:
    params = params_of(ChatBody(options=options))
    assert params == {"max_new_tokens": 2**31 - 1, "fit_context": True}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"options": {"temperature": -1}}, "temperature"),
        ({"options": {"top_k": "many"}}, "top_k"),
        ({"options": {"mirostat": 2}}, "mirostat"),
        ({"top_logprobs": 3}, "top_logprobs"),
    ],
)
def test_wrong_options_are_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as raised:
        params_of(ChatBody(**fields))
    assert (raised.value.status, raised.value.param) == (400, param)


@pytest.mark.parametrize("names", [[], [""], [" "], ["ä"], ["a\nb"]])
def test_a_warning_has_nothing_that_no_header_may(names: list[str]) -> None:
    assert warning("options", names) == {}
    told = warning("options", ["a", *names, "b "])["x-dllm-warning"]
    assert told.startswith("ignored unknown options: a,")
    assert told.endswith(" b")
    assert told.isascii()
    assert told.isprintable()


def test_calls_and_their_results_belong_together() -> None:
    call = {"function": {"name": "weather", "arguments": {"city": "Bern"}}}
    other = {"id": "abc", "function": {"name": "time", "arguments": {}}}
    turn = turn_of_chat(
        ChatBody(
            messages=[
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "thinking": "Hm.", "tool_calls": [call, other]},
                {"role": "tool", "tool_name": "time", "content": "noon"},
                {"role": "tool", "content": "rain"},
            ]
        ),
        Formats(),
        "",
    )
    _, calling, time, weather = turn.messages
    assert calling["reasoning_content"] == "Hm."
    assert [one["id"] for one in calling["tool_calls"]] == ["000100000", "abc"]
    assert (time["tool_call_id"], time["name"]) == ("abc", "time")
    assert weather["tool_call_id"] == "000100000"


@pytest.mark.timeout(8)
def test_very_many_calls_find_their_results_soon() -> None:
    many = 30_000
    calls = [{"id": str(number), "function": {"name": "a"}} for number in range(many)]
    results = [{"role": "tool", "tool_name": "b"}] * many
    body = ChatBody(messages=[{"role": "assistant", "tool_calls": calls}, *results])
    _, *answers = turn_of_chat(body, Formats(), "").messages
    assert [one["tool_call_id"] for one in answers] == [str(number) for number in range(many)]


def test_thinking_is_switched_where_the_model_can() -> None:
    thinking: list[tuple[Any, bool]] = [(True, True), (False, False), ("high", True)]
    for think, expected in thinking:
        turn = turn_of_prompt(GenerateBody(prompt="Hi", think=think), QWEN, "")
        assert turn.template_arguments == {"enable_thinking": expected}
    assert not turn_of_prompt(GenerateBody(prompt="Hi"), QWEN, "").template_arguments
    with pytest.raises(ApiError, match="does not support thinking"):
        turn_of_prompt(GenerateBody(prompt="Hi", think=True), Formats(), "")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"images": ["aGk="]}, "images"),
        ({"template": "{{ .Prompt }}"}, "template"),
        ({"suffix": "end"}, "suffix"),
        ({"context": [1, 2]}, "context"),
        ({"raw": True, "system": "Be kind."}, "system"),
    ],
)
def test_what_cannot_be_done_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as raised:
        check_prompt(GenerateBody(prompt="Hi", **fields))
    assert raised.value.param == param


def test_a_stream_ends_with_counts_in_nanoseconds() -> None:
    first, last = told(TextDelta(choice=0, text="Hi"), AnswerEnded(choice=0, reason="stop"))
    assert first == {
        "model": "m",
        "created_at": "now",
        "message": {"role": "assistant", "content": "Hi"},
        "done": False,
    }
    assert last == {
        "model": "m",
        "created_at": "now",
        "message": {"role": "assistant", "content": ""},
        "done": True,
        "done_reason": "stop",
        "total_duration": 3_500_000_000,
        "load_duration": 500_000_000,
        "prompt_eval_count": 7,
        "prompt_eval_duration": 1_000_000_000,
        "eval_count": 2,
        "eval_duration": 2_000_000_000,
    }


def test_calls_come_whole_and_a_cut_one_not_at_all() -> None:
    lines = told(
        ReasoningDelta(choice=0, text="Hm."),
        ToolCallBegun(choice=0, index=0, id="a", name="weather"),
        ToolCallDelta(choice=0, index=0, arguments='{"city": "B'),
        ToolCallDelta(choice=0, index=0, arguments='ern"}'),
        ToolCallBegun(choice=0, index=1, id="b", name="time"),
        ToolCallDelta(choice=0, index=1, arguments='{"zone'),
        AnswerEnded(choice=0, reason="length"),
    )
    thought, call, last = lines
    assert thought["message"]["thinking"] == "Hm."
    function = {"name": "weather", "arguments": {"city": "Bern"}}
    assert call["message"]["tool_calls"] == [{"id": "a", "function": function}]
    assert last["done_reason"] == "length"
    answer = whole(lines, as_message)
    assert answer["message"]["thinking"] == "Hm."
    assert answer["message"]["tool_calls"] == call["message"]["tool_calls"]


def test_a_prompt_is_answered_without_a_message() -> None:
    lines = told(TextDelta(choice=0, text="H"), TextDelta(choice=0, text="i"), put=as_response)
    assert [line["response"] for line in lines] == ["H", "i", ""]
    assert whole(lines, as_response)["response"] == "Hi"


def test_names_have_tags() -> None:
    assert listed_name("org/tiny") == "org/tiny:latest"
    assert listed_name("/models/tiny/") == "tiny:latest"
    assert listed_name("tiny:7b") == "tiny:7b"


def test_the_model_is_listed_and_shown(api: Api, client: ollama.Client) -> None:
    (listed,) = client.list().models
    assert listed.model
    assert listed.size
    shown = client.show(listed.model)
    assert shown.capabilities
    assert "completion" in shown.capabilities
    assert shown.modelinfo
    assert shown.modelinfo["general.architecture"] == "llama"
    (loaded,) = client.ps().models
    assert loaded.model == listed.model
    assert client.pull(listed.model).status == "success"


def test_answers_equal_those_of_the_cluster(api: Api, client: ollama.Client) -> None:
    options = {"temperature": 0, "num_predict": 8}
    with DistributedClient(api.cluster.address) as direct:
        chat = direct.chat(MESSAGES, temperature=0.0, max_new_tokens=8, details=True)
        text = direct.generate("Once", temperature=0.0, max_new_tokens=8)
    answer = client.chat("default", MESSAGES, options=options)
    assert answer.message.content == chat.text
    assert (answer.done, answer.eval_count) == (True, chat.usage.completion_tokens)
    assert answer.prompt_eval_count == chat.usage.prompt_tokens
    parts = list(client.chat("default", MESSAGES, options=options, stream=True))
    assert "".join(part.message.content or "" for part in parts) == chat.text
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert client.generate("default", "Once", raw=True, options=options).response == text
    wanted = client.generate("default", "Once", options=options, system="Be kind.")
    assert wanted.done_reason in ("stop", "length")
    picked = client.generate(
        "default", "Once", raw=True, options=options, logprobs=True, top_logprobs=2
    )
    assert picked.logprobs
    assert len(picked.logprobs[0].top_logprobs or ()) == 2
    assert client.chat("default", []).done_reason == "load"


def test_embeddings_are_those_of_the_model(client: ollama.Client, api: Api) -> None:
    with DistributedClient(api.cluster.address) as own:
        one, other = own.embed(["Deich", "fox"])
    told = client.embed("default", ["Deich", "fox"])
    for expected, vector in zip((one, other), told.embeddings, strict=True):
        unit = expected.vector / np.linalg.norm(expected.vector)
        assert np.allclose(unit, vector, atol=1e-5)
    assert told.prompt_eval_count == one.usage.prompt_tokens + other.usage.prompt_tokens
    assert np.allclose(client.embeddings("default", "fox").embedding, other.vector, atol=1e-5)
    assert client.embed("default", []).embeddings == []


def test_errors_are_ollamas(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="not served here") as raised:
        client.chat("gpt-5", MESSAGES)
    assert raised.value.status_code == 404
    for refused in (
        lambda: client.delete("default"),
        lambda: client.copy("default", "mine"),
        lambda: client.create("mine", from_="default"),
        lambda: client.push("default"),
        lambda: client.generate("default", "Hi", images=[b"x"]),
        lambda: client.chat("default", MESSAGES, options={"temperature": -1}),
        lambda: list(client.chat("default", [{"role": "x", "content": "y"}], stream=True)),
    ):
        with pytest.raises(ollama.ResponseError) as raised:
            refused()
        assert raised.value.status_code == 400, raised.value
    with pytest.raises(ollama.ResponseError) as raised:
        client.pull("llama3")
    assert raised.value.status_code == 404


def test_what_open_webui_sends(api: Api, http: httpx.Client) -> None:
    name = http.get("/api/tags").json()["models"][0]["model"]
    assert http.get("/api/version").json()["version"].count(".") == 2
    body = {
        "model": name,
        "messages": [{"role": "user", "content": "Hello", "images": []}],
        "options": {"num_predict": 4, "temperature": 0.0, "num_ctx": 2048, "seed": 3},
        "stream": True,
        "keep_alive": "5m",
        "metadata": {"chat_id": "c1"},
    }
    with http.stream("POST", "/api/chat", json=body) as answer:
        assert answer.headers["content-type"] == "application/x-ndjson"
        assert answer.headers["x-dllm-warning"] == "ignored unknown fields: metadata"
        lines = [json.loads(line) for line in answer.iter_lines()]
    assert lines[-1]["done"] is True
    assert lines[-1]["eval_count"] == 4
    assert {line["model"] for line in lines} == {name}
    task = {**body, "stream": False, "format": {"type": "boolean"}, "tools": list(TOOLS[:0])}
    answer = http.post("/api/chat", json=task)
    assert answer.status_code == 200, answer.text
    assert json.loads(answer.json()["message"]["content"]) in (True, False)
