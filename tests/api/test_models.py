"""`/v1/models`, as OpenAI's own client asks for it."""

import openai
import pytest

from tests.api.conftest import Api


def test_the_served_model_is_listed(api: Api) -> None:
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key=api.key) as client:
        assert [model.id for model in client.models.list()] == [api.model]
        assert client.models.retrieve("default").id == api.model
        with pytest.raises(openai.NotFoundError) as raised:
            client.models.retrieve("gpt-5")
    assert raised.value.code == "model_not_found"
    assert raised.value.param == "model"


def test_a_wrong_key_is_refused(api: Api) -> None:
    wrong = api.key[:-1] + ("A" if api.key[-1] != "A" else "B")
    for key in (wrong, "sk-none", "x" * 10_000):
        with (
            openai.OpenAI(base_url=f"{api.url}/v1", api_key="unused", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError) as raised,
        ):
            client.models.list(extra_headers={"Authorization": f"Bearer {key}"})
        assert raised.value.code == "invalid_api_key"
