"""What clients hear while the API is ending: that, and when to ask again."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any, cast

import pytest

from distributed_llm.api import serve
from distributed_llm.api.app import make_app
from distributed_llm.api.callers import Callers
from distributed_llm.api.ending import Ending
from distributed_llm.client.answers import Chunk
from distributed_llm.common.errors import (
    CoordinatorLost,
    DistributedLLMError,
    InvalidRequest,
    NotReady,
)
from distributed_llm.common.settings import ApiSettings, ClientSettings
from tests.api.fake_chat import FakeChat
from tests.api.fake_server import KEY, MODEL, FakeCallers, FakeClient
from tests.api.http_server import NOBODY

ASKED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": MODEL},
    "/v1/messages": {"model": MODEL, "max_tokens": 5},
    "/v1/responses": {"model": MODEL, "input": "Hi"},
    "/api/chat": {"model": MODEL},
}
"""What is asked of the API, beside the messages, by path."""

NO_WORKER = NotReady("No worker has joined. Start a worker.")


class Heard:
    """What a client hears, as it comes."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        self.coming = asyncio.Event()

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], dict(message["headers"])
        else:
            self.body += message["body"]
            self.coming.set()


async def ask(ending: Ending, chat: FakeChat, path: str, stream: bool, heard: Heard) -> None:
    callers = FakeCallers()
    callers.client = FakeClient(chat)
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": stream} | ASKED[path]
    if path == "/v1/responses":
        del body["messages"]
    sent = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
    headers = [(b"host", b"localhost"), (b"x-api-key", KEY.encode())]
    headers.append((b"content-type", b"application/json"))
    scope = {
        **{"type": "http", "method": "POST", "scheme": "http", "http_version": "1.1"},
        **{"path": path, "raw_path": path.encode(), "query_string": b"", "root_path": ""},
        **{"headers": headers, "client": ("127.0.0.1", 1), "server": ("localhost", 80)},
    }

    async def receive() -> Any:
        return sent.pop() if sent else await asyncio.Event().wait()

    await make_app(cast(Callers, callers), ending=ending)(scope, receive, heard.send)


def told(heard: Heard) -> str:
    return heard.body.decode()


@pytest.mark.parametrize("path", ASKED)
@pytest.mark.parametrize("stream", [False, True])
def test_what_follows_from_the_end_is_told_as_the_end(path: str, stream: bool) -> None:
    async def check() -> None:
        ending = Ending()
        for error in (NO_WORKER, CoordinatorLost("The coordinator is gone."), InvalidRequest("n")):
            ending.begun = False
            before, after = Heard(), Heard()
            await ask(ending, FakeChat([], error=error), path, stream, before)
            assert str(error) in told(before)
            ending.begun = True
            await ask(ending, FakeChat([], error=error), path, stream, after)
            if isinstance(error, InvalidRequest):
                assert after.body.count(b"ending") == 0
                assert after.status == before.status
            else:
                assert (after.status, after.headers[b"retry-after"]) == (503, b"10")
                assert "This service is ending" in told(after)
                assert str(error) not in told(after)

    asyncio.run(check())


@pytest.mark.parametrize("path", ASKED)
def test_a_stream_that_breaks_by_the_end_says_so(path: str) -> None:
    async def check() -> None:
        ending, heard = Ending(), Heard()
        ending.begun = True
        await ask(ending, FakeChat(["Once", " upon"], error=NO_WORKER), path, True, heard)
        assert heard.status == 200
        assert "This service is ending" in told(heard)
        assert str(NO_WORKER) not in told(heard)

    asyncio.run(check())


class Endless(FakeChat):
    """Goes on for ever after its pieces."""

    async def stream_chat(self, messages: Any, **params: Any) -> AsyncGenerator[Chunk, None]:
        for piece in self._pieces:
            yield Chunk(text=piece, token_ids=[1], choice=0)
        await asyncio.Event().wait()


@pytest.mark.parametrize("path", ASKED)
@pytest.mark.parametrize("begun", [False, True])
def test_what_is_cut_off_in_the_end_is_told_so(path: str, begun: bool) -> None:
    async def check() -> None:
        ending, heard = Ending(), Heard()
        chat = Endless(["Once"] if begun else [])
        asking = asyncio.ensure_future(ask(ending, chat, path, begun, heard))
        if begun:
            await heard.coming.wait()
        else:
            await asyncio.sleep(0)
        ending.begun = True
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert heard.status == (200 if begun else 503)
        assert "This service is ending" in told(heard)

    asyncio.run(check())


def test_errors_before_the_end_are_told_as_they_are() -> None:
    async def check() -> None:
        heard: list[Heard] = []
        for error in (NO_WORKER, DistributedLLMError("A bug.")):
            heard.append(Heard())
            chat = FakeChat([], error=error)
            await ask(Ending(), chat, "/v1/chat/completions", False, heard[-1])
        assert [one.status for one in heard] == [503, 500]
        assert "Start a worker" in told(heard[0])

    asyncio.run(check())


def test_a_signal_is_the_beginning_of_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    endings: list[Ending] = []

    def made(*given: Any) -> Any:
        endings.extend(one for one in given if isinstance(one, Ending))
        return make_app(*given)

    monkeypatch.setattr(serve, "make_app", made)
    monkeypatch.setattr(
        serve, "on_signal", lambda stop: asyncio.get_running_loop().call_soon(stop, 15)
    )
    asked = ClientSettings(coordinator=NOBODY, insecure=True)
    settings = ApiSettings(bind=("127.0.0.1:0",))
    code = asyncio.run(serve.serve(settings, asked, on_listening=lambda _: None))
    assert code == 0
    assert [one.begun for one in endings] == [True]
