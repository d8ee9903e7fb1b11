"""OpenAI's own client, unmodified, against an API over a real cluster."""

import asyncio
import random
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from typing import Any, Literal

import httpx2
import openai
import pytest
from pydantic import BaseModel

from distributed_llm import AsyncDistributedClient, DistributedClient
from tests.api.conftest import LIMIT_S, Api

MESSAGES: Any = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hé 🙂"}]
EMOJI = "aé ß漢字🙂👩‍👧🏳️‍🌈\n\t\"\\'<&>\u202e\u0301\u200d\x00"


@pytest.fixture(scope="module")
def client(api: Api) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key=api.key, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def direct(api: Api) -> Iterator[DistributedClient]:
    with DistributedClient(api.cluster.address, key=api.key) as client:
        yield client


@asynccontextmanager
async def async_clients(
    api: Api,
) -> AsyncGenerator[tuple[openai.AsyncOpenAI, AsyncDistributedClient], None]:
    async with (
        openai.AsyncOpenAI(base_url=f"{api.url}/v1", api_key=api.key, max_retries=0) as asked,
        AsyncDistributedClient(api.cluster.address, key=api.key) as direct,
    ):
        yield asked, direct


def test_chats_are_answered_as_by_the_own_client(
    client: openai.OpenAI, direct: DistributedClient
) -> None:
    expected = direct.chat(MESSAGES, n=2, seed=3, max_new_tokens=9, details=True, logprobs=2)
    answer = client.chat.completions.create(
        model="default",
        messages=MESSAGES,
        n=2,
        seed=3,
        max_completion_tokens=9,
        logprobs=True,
        top_logprobs=2,
    )
    assert answer.id.startswith("chatcmpl-")
    assert answer.system_fingerprint
    assert answer.usage
    assert answer.usage.prompt_tokens == expected[0].usage.prompt_tokens
    assert answer.usage.completion_tokens == sum(len(one.token_ids) for one in expected)
    for choice, wanted in zip(answer.choices, expected, strict=True):
        assert choice.index == wanted.choice
        assert choice.message.content == wanted.text
        assert choice.finish_reason == wanted.finish_reason
        assert choice.logprobs
        assert choice.logprobs.content
        assert wanted.logprobs
        told = [one.logprob for one in choice.logprobs.content]
        assert told == pytest.approx([one.logprob for one in wanted.logprobs])
        assert [one.token for one in choice.logprobs.content] == [x.text for x in wanted.logprobs]
        assert all(len(one.top_logprobs) == 2 for one in choice.logprobs.content)


def test_a_stream_is_the_whole_answer(client: openai.OpenAI, direct: DistributedClient) -> None:
    expected = direct.chat(MESSAGES, n=2, temperature=0.0, max_new_tokens=12)
    texts = ["", ""]
    roles: list[list[str | None]] = [[], []]
    chunks = list(
        client.chat.completions.create(
            model="default",
            messages=MESSAGES,
            n=2,
            temperature=0,
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert len({(one.id, one.created, one.model, one.system_fingerprint) for one in chunks}) == 1
    *pieces, last = chunks
    for chunk in pieces:
        (choice,) = chunk.choices
        assert chunk.usage is None
        roles[choice.index].append(choice.delta.role)
        texts[choice.index] += choice.delta.content or ""
    assert texts == expected
    assert all(first == "assistant" and not any(others) for first, *others in roles)
    assert last.choices == []
    assert last.usage
    assert last.usage.completion_tokens == 24


def test_completions_are_answered_as_by_the_own_client(
    client: openai.OpenAI, direct: DistributedClient
) -> None:
    prompts = ["Once", "upon a time"]
    expected = direct.generate(prompts, n=2, seed=5, max_new_tokens=6)
    asked: Any = {"model": "default", "n": 2, "seed": 5, "max_tokens": 6}
    answer = client.completions.create(prompt=prompts, **asked)
    assert [one.text for one in answer.choices] == [text for both in expected for text in both]
    texts = dict.fromkeys(range(4), "")
    for chunk in client.completions.create(prompt=prompts, stream=True, **asked):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert list(texts.values()) == [text for both in expected for text in both]


def test_prompts_may_be_token_ids_and_are_echoed_as_text(
    client: openai.OpenAI, direct: DistributedClient
) -> None:
    tokens = direct.tokenize("Hello").token_ids
    answer = client.completions.create(
        model="default", prompt=[tokens], max_tokens=4, temperature=0, echo=True
    )
    expected = direct.generate("Hello", max_new_tokens=4, temperature=0.0)
    assert answer.choices[0].text == "Hello" + expected


def test_parameters_reach_the_coordinator(client: openai.OpenAI, direct: DistributedClient) -> None:
    answer = client.completions.create(
        model="default",
        prompt="Once",
        max_tokens=8,
        seed=1,
        temperature=1.5,
        top_p=0.9,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        logit_bias={"70": 3},
        stop=["zz", "yy"],
        extra_body={
            "top_k": 40,
            "min_p": 0.01,
            "repetition_penalty": 1.1,
            "ignore_eos": True,
            "min_tokens": 2,
            "stop_token_ids": [9],
            "skip_special_tokens": False,
        },
    )
    assert answer.choices[0].text == direct.generate(
        "Once",
        max_new_tokens=8,
        seed=1,
        temperature=1.5,
        top_p=0.9,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        logit_bias={70: 3},
        stop_strings=["zz", "yy"],
        top_k=40,
        min_p=0.01,
        repetition_penalty=1.1,
        ignore_eos=True,
        min_new_tokens=2,
        stop_token_ids=[9],
        skip_special_tokens=False,
    )


def test_the_first_token_may_be_said_by_how_it_is_written(client: openai.OpenAI) -> None:
    """After a prompt of a single token, and by encoder-decoders after any."""
    for first in ("x", 93):
        answer = client.completions.create(
            model="default",
            prompt=[[5]],
            max_tokens=3,
            temperature=0,
            extra_body={"forced_bos_token_id": first},
        )
        assert answer.choices[0].text.startswith("x")


def test_text_of_any_kind_streams_as_it_is_answered_whole(
    client: openai.OpenAI, direct: DistributedClient
) -> None:
    rng = random.Random(7)
    prompts = ["".join(rng.choices(EMOJI, k=1 + number % 17)) for number in range(100)]
    asked: Any = {"model": "default", "prompt": prompts, "max_tokens": 5, "temperature": 0}
    whole = [one.text for one in client.completions.create(**asked).choices]
    texts = [""] * len(prompts)
    for chunk in client.completions.create(stream=True, **asked):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == whole == direct.generate(prompts, max_new_tokens=5, temperature=0.0)


CHAT_ERRORS: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": -1}, "temperature", "invalid_value"),
    ({"temperature": "hot"}, "temperature", "invalid_value"),
    ({"n": True}, "n", "invalid_value"),
    ({"max_tokens": 10**12}, "max_tokens", "invalid_value"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "invalid_value"),
    ({"max_tokens": 1000}, "messages", "context_length_exceeded"),
    ({"top_logprobs": 10**6, "logprobs": True}, "top_logprobs", "invalid_value"),
    ({"stop": ["a"] * 17}, "stop", "invalid_value"),
    ({"logit_bias": {"9999": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {str(n): 1 for n in range(301)}}, "logit_bias", "invalid_value"),
    ({"forced_bos_token_id": 9999}, "forced_bos_token_id", "invalid_value"),
    ({"forced_bos_token_id": "no token"}, "forced_bos_token_id", "invalid_value"),
    ({"forced_bos_token_id": -1}, "forced_bos_token_id", "invalid_value"),
    ({"target_language": "fra_Latn"}, "target_language", "invalid_value"),
    ({"source_language": "eng_Latn"}, "source_language", "invalid_value"),
    ({"seed": 2**128}, "seed", "invalid_value"),
    ({"min_tokens": 9, "max_tokens": 3}, "min_tokens", "invalid_value"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "invalid_value"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages", "invalid_value"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages.0.content",
        "unsupported_parameter",
    ),
    ({"chat_template": "x"}, "chat_template", "unsupported_parameter"),
    (
        {"chat_template_kwargs": {"enable_thinking": False}},
        "chat_template_kwargs",
        "invalid_value",
    ),
    ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs", "invalid_value"),
    ({"reasoning_effort": "high"}, "reasoning_effort", "unsupported_parameter"),
    ({"response_format": {"type": "xml"}}, "response_format", "unsupported_parameter"),
]


@pytest.mark.parametrize(("wrong", "param", "code"), CHAT_ERRORS)
def test_a_wrong_field_is_named(
    client: openai.OpenAI, wrong: dict[str, Any], param: str, code: str
) -> None:
    body = {"messages": MESSAGES, **wrong}
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(
            model="default", messages=body.pop("messages"), stream=True, extra_body=body
        )
    assert (raised.value.param, raised.value.code) == (param, code)
    assert raised.value.type == "invalid_request_error"
    assert "_new_tokens" not in str(raised.value)


def test_errors_are_of_the_clients_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-5", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError) as refused:
        client.with_options(api_key="sk-none").completions.create(model="default", prompt="x")
    assert refused.value.code == "invalid_api_key"


def test_raw_responses_have_an_id_and_warn_of_fields_that_are_not_known(
    client: openai.OpenAI,
) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="default",
        messages=MESSAGES,
        max_tokens=1,
        user="me",
        store=True,
        metadata={"a": "b"},
        service_tier="auto",
        extra_body={"sparkle": 1},
    )
    assert raw.request_id
    assert raw.headers["x-dllm-warning"] == "ignored unknown fields: sparkle"
    assert raw.parse().choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_cancels_the_request(api: Api, stream: bool) -> None:
    async def leave() -> None:
        async with async_clients(api) as (asked, direct):
            before = (await direct.status()).requests_cancelled
            asking = asyncio.ensure_future(
                asked.chat.completions.create(
                    model="default",
                    messages=MESSAGES,
                    max_tokens=200,
                    stream=stream,
                    extra_body={"ignore_eos": True},
                )
            )
            async with asyncio.timeout(LIMIT_S):
                while not (await direct.status()).answers_running:
                    assert not asking.done() or stream
            if stream:
                await (await asking).response.aclose()  # type: ignore[union-attr]
            asking.cancel()
            async with asyncio.timeout(LIMIT_S):
                while (await direct.status()).requests_cancelled == before:
                    pass
            assert (await direct.status()).answers_running == 0

    asyncio.run(leave())


def test_answers_follow_a_grammar(client: openai.OpenAI) -> None:
    asked: Any = {"model": "default", "messages": MESSAGES, "max_tokens": 20, "n": 3}
    chosen = client.chat.completions.create(extra_body={"guided_choice": ["yes", "nö"]}, **asked)
    assert {choice.message.content for choice in chosen.choices} <= {"yes", "nö"}
    stream = client.chat.completions.create(
        stream=True, extra_body={"structured_outputs": {"regex": "[0-9]{3}"}}, **asked
    )
    texts = ["", "", ""]
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert all(len(text) == 3 and text.isdigit() for text in texts)
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(extra_body={"guided_regex": "[0-9"}, **asked)
    assert raised.value.param == "guided_regex"


def test_json_is_parsed_by_the_client(client: openai.OpenAI, direct: DistributedClient) -> None:
    class Point(BaseModel):
        axis: Literal["x", "y"]
        up: bool

    spaces = {str(token): -1000 for token in direct.tokenize(" \n\r\t").token_ids}
    parsed = client.chat.completions.parse(
        model="default",
        messages=MESSAGES,
        response_format=Point,
        max_tokens=100,
        logit_bias=spaces,  # which a random model would write without end
    )
    assert isinstance(parsed.choices[0].message.parsed, Point)


def test_embeddings_are_those_of_the_own_client(
    client: openai.OpenAI, direct: DistributedClient
) -> None:
    texts = ["Hello", "Hé 🙂"]
    expected = [one.vector.tolist() for one in direct.embed(texts)]
    answer = client.embeddings.create(model="default", input=texts)  # as base64
    plain = client.embeddings.create(model="default", input=texts, encoding_format="float")
    for told in (answer, plain):
        assert [one.embedding for one in told.data] == [pytest.approx(one) for one in expected]
    counts = [len(direct.tokenize(text).token_ids) for text in texts]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(counts)
    tokens = direct.tokenize(texts[0]).token_ids
    of_tokens = client.embeddings.create(model="default", input=tokens, dimensions=32)
    assert of_tokens.data[0].embedding == pytest.approx(expected[0])
    with pytest.raises(openai.BadRequestError) as raised:
        client.embeddings.create(model="default", input="x", dimensions=8)
    assert raised.value.param == "dimensions"
    with pytest.raises(openai.BadRequestError) as raised:
        client.embeddings.create(model="default", input=[])
    assert raised.value.param == "input"


def test_the_model_says_how_long_its_context_is(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.created > 0
    assert model.model_dump()["max_model_len"] == 256


def test_texts_and_token_ids(api: Api, direct: DistributedClient) -> None:
    headers = {"Authorization": f"Bearer {api.key}"}
    with httpx2.Client(base_url=api.url, headers=headers) as http:
        asked = {"prompt": "Hé 🙂", "return_token_strs": True}
        body = http.post("/tokenize", json=asked).json()
        assert body["tokens"] == direct.tokenize("Hé 🙂").token_ids
        assert body["count"] == len(body["tokens"]) == len(body["token_strs"])
        assert body["max_model_len"] == 256
        chat = http.post("/tokenize", json={"messages": MESSAGES}).json()["tokens"]
        assert chat == direct.tokenize_chat(MESSAGES).token_ids
        text = http.post("/detokenize", json={"tokens": body["tokens"]}).json()
        assert text == {"prompt": "Hé 🙂"}
        wrong = http.post("/detokenize", json={"tokens": [-1]})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "tokens")
