"""A picture in a request is refused with a clear word, whatever API it is asked in."""

from typing import Any

import httpx
import pytest

from tests.api.fake_server import KEY, MODEL, FakeServer

URL = "data:image/png;base64,aGk="
TEXT = {"type": "text", "text": "What is this?"}


def of_user(*parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts), **more}]}


ASKED: list[tuple[str, dict[str, Any]]] = [
    (
        "/v1/chat/completions",
        of_user(TEXT, {"type": "image_url", "image_url": {"url": URL}}),
    ),
    (
        "/v1/responses",
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": URL}]}]},
    ),
    (
        "/v1/messages",
        {"max_tokens": 9}
        | of_user(
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}},
            TEXT,
        ),
    ),
    ("/api/chat", {"messages": [{"role": "user", "content": "What?", "images": ["aGk="]}]}),
    ("/api/generate", {"prompt": "What?", "images": ["aGk="]}),
]


@pytest.mark.parametrize(("path", "body"), ASKED, ids=[path for path, _ in ASKED])
def test_a_picture_is_refused(fake_server: FakeServer, path: str, body: dict[str, Any]) -> None:
    fake_server.answer("Hi", template="{{ messages }}")
    response = httpx.post(
        f"{fake_server.url}{path}",
        json={"model": MODEL, "stream": False, **body},
        headers={"Authorization": f"Bearer {KEY}"},
    )
    assert response.status_code == 400
    assert "only text" in response.text.lower()
