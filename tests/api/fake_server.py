"""The API in this process, over a fake client: what dialects make of requests and answers."""

import contextlib
import threading
from collections.abc import AsyncGenerator, Iterator
from types import SimpleNamespace
from typing import Any, cast

import uvicorn

from distributed_llm.api.app import make_app
from distributed_llm.api.callers import Caller, Callers, Unauthorized
from distributed_llm.common.errors import DistributedLLMError
from distributed_llm.common.roles import Role
from tests.api.fake_chat import FakeChat

KEY = "dllm-key"
OTHER_KEY = "dllm-other-key"
MODEL = "made-up/Tiny-1B"


class FakeClient:
    """Answers as `chat` does; knows one model.

    What it can do are attributes, for an `ObservedClient` takes over a client's attributes.

    Args:
        template: the model's chat template.
        error: raised instead of an answer, if given.
    """

    def __init__(
        self,
        chat: FakeChat,
        template: str | None = None,
        error: DistributedLLMError | None = None,
    ) -> None:
        self.chat = chat
        self.template = template
        self.error = error
        self.stream_chat = chat.stream_chat
        self.identity = self._identity
        self.model = self._model
        self.status = self._status
        self.tokenize_chat = self._tokenize_chat

    async def _identity(self) -> Any:
        if self.error:
            raise self.error
        return SimpleNamespace(name="app", role=Role.CLIENT, model=MODEL)

    async def _model(self) -> Any:
        return SimpleNamespace(
            name=MODEL, chat_template=self.template, tool_template=None, context_length=2048
        )

    async def _status(self) -> Any:
        return SimpleNamespace(epoch=1)

    async def _tokenize_chat(self, messages: Any, **asked: Any) -> Any:
        self.chat.asked = {"messages": messages, **asked}
        return SimpleNamespace(token_ids=[1, 2, 3])


class FakeCallers:
    """Knows two keys, both of the same client."""

    def __init__(self) -> None:
        self.client = FakeClient(FakeChat([]))
        self.own = cast(Any, self.client)

    @contextlib.asynccontextmanager
    async def caller(self, key: str | None) -> AsyncGenerator[Caller, None]:
        names = {KEY: "app", OTHER_KEY: "other"}
        if key not in names:
            raise Unauthorized("This key is not known here.")
        yield Caller(names[key], Role.CLIENT, cast(Any, self.client))

    async def close(self) -> None:
        """Do nothing."""


class _Server(uvicorn.Server):
    """A server that says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = threading.Event()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.listening.set()


class FakeServer:
    """The API on a port of this machine.

    Attributes:
        callers: whom it answers; its client may be changed by tests.
    """

    def __init__(self) -> None:
        self.callers = FakeCallers()
        app = make_app(cast(Callers, self.callers))
        self._server = _Server(uvicorn.Config(app, port=0, log_config=None, ws="none"))
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        assert self._server.listening.wait(20)

    def answer(self, *pieces: str, template: str | None = None, **options: Any) -> FakeChat:
        """Let the next requests be answered with these pieces; see `FakeChat`."""
        chat = FakeChat(pieces, **options)
        self.callers.client = FakeClient(chat, template)
        return chat

    def fail(self, error: DistributedLLMError) -> None:
        """Let the next requests fail."""
        self.callers.client = FakeClient(FakeChat([]), error=error)

    @property
    def url(self) -> str:
        """Where it listens."""
        port = self._server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}"

    def close(self) -> None:
        """End it."""
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()


def running() -> Iterator[FakeServer]:
    """Yield a server; for fixtures."""
    server = FakeServer()
    try:
        yield server
    finally:
        server.close()
