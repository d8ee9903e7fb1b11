"""Messages of one voice become one."""

from typing import Any

import pytest

from distributed_llm.api.chat.joining import join_neighbours


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
