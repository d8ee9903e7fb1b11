"""Messages of one voice become one, and the model is asked about once."""

import asyncio
from typing import Any

import pytest

from distributed_llm.api.chat.joining import join_neighbours
from distributed_llm.api.chat.served import served_model
from tests.api.fake_server import MODEL, FakeClient
from tests.api.test_chat_formats import QWEN3


def message(role: str, content: str, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


@pytest.mark.parametrize(
    ("messages", "joined"),
    [
        ([], []),
        (
            [message("system", "a"), message("developer", "b"), message("user", "c")],
            [message("system", "a\n\nb"), message("user", "c")],
        ),
        ([message("developer", "a")] * 2, [message("developer", "a\n\na")]),
        (
            [message("tool", "a"), message("tool", "b")],
            [message("tool", "a"), message("tool", "b")],
        ),
        (
            [
                message("assistant", "", reasoning_content="r"),
                message("assistant", "said"),
                message("assistant", "", tool_calls=[1]),
                message("assistant", "", tool_calls=[2]),
            ],
            [message("assistant", "said", reasoning_content="r", tool_calls=[1, 2])],
        ),
        ([message("user", "a"), message("system", "b")],) * 2,
    ],
)
def test_neighbours_are_joined(messages: list[Any], joined: list[Any]) -> None:
    before = repr(messages)
    assert join_neighbours(messages) == joined
    assert repr(messages) == before


def test_a_model_is_asked_about_once_per_connection() -> None:
    class Counting(FakeClient):
        asked = 0

        async def model(self) -> Any:
            self.asked += 1
            return await super().model()

    async def ask() -> None:
        client = Counting(template=QWEN3)
        first = await served_model(client)
        assert (first.name, first.formats.tagged_calls) == (MODEL, True)
        assert await served_model(client) is first
        assert client.asked == 1

    asyncio.run(ask())
