"""Programs that speak OpenAI's API through libraries of their own, once each."""

from typing import Any

import pytest

from distributed_llm import DistributedClient
from tests.api.conftest import Api

MESSAGES: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def expected(api: Api) -> str:
    with DistributedClient(api.cluster.address, key=api.key) as client:
        return client.chat(MESSAGES, max_new_tokens=6, temperature=0.0)


def test_langchain(api: Api, expected: str) -> None:
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(
        model="default",
        base_url=f"{api.url}/v1",
        api_key=api.key,  # type: ignore[arg-type]
        max_completion_tokens=6,
        temperature=0,
    )
    assert model.invoke("Hello").content == expected
    assert "".join(str(chunk.content) for chunk in model.stream("Hello")) == expected


@pytest.mark.filterwarnings("ignore")
def test_litellm(api: Api, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks for prices
    import litellm

    asked: Any = {
        "model": "openai/default",
        "api_base": f"{api.url}/v1",
        "api_key": api.key,
        "messages": MESSAGES,
        "max_tokens": 6,
        "temperature": 0,
    }
    assert litellm.completion(**asked).choices[0].message.content == expected
    chunks = litellm.completion(stream=True, **asked)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
