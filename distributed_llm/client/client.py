"""The client for programs without asyncio.

client = DistributedClient(coordinator_address="192.168.1.100:5555")
client.generate("Once upon a time", max_new_tokens=20)
"""

import threading
import weakref
from collections.abc import AsyncGenerator, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, overload

from distributed_llm.client.answers import Chunk, Generation
from distributed_llm.client.async_client import AsyncDistributedClient
from distributed_llm.client.loop_thread import LoopThread
from distributed_llm.client.prompts import Arguments, Messages, Prompt, Prompts, Tools
from distributed_llm.client.values import Embedding, Identity, NewToken, TokenizedPrompt
from distributed_llm.common.messages import ClusterMembers, ClusterStatus, ModelInfo
from distributed_llm.common.roles import Role

_No = Literal[False]
_Yes = Literal[True]


class DistributedClient:
    """`AsyncDistributedClient` for programs without asyncio; safe to use from many threads.

    In a fork of the process it makes a connection of its own.

    Args:
        coordinator_address: "HOST:PORT".
        key: for that coordinator; None is that in the key file of this machine, else `DLLM_KEY`.
        insecure: use no keys; for a coordinator that was started with --insecure.
        connect_timeout_s: how long to wait for a coordinator to answer at the address.
    """

    def __init__(
        self,
        coordinator_address: str = "127.0.0.1:5555",
        *,
        key: str | None = None,
        insecure: bool = False,
        connect_timeout_s: float = 5.0,
    ) -> None:
        self._make = partial(
            AsyncDistributedClient,
            coordinator_address,
            key=key,
            insecure=insecure,
            connect_timeout_s=connect_timeout_s,
        )
        self._forked = threading.Lock()
        self._open()

    def _open(self) -> None:
        self._client = self._make()
        self._runner = LoopThread()
        self._closer = weakref.finalize(self, _close, self._runner, self._client)

    def _here(self) -> "tuple[LoopThread, AsyncDistributedClient]":
        """Return the loop and the client on it, made anew in a fork of the process."""
        if self._closer.alive and not self._runner.is_here():
            with self._forked:
                if not self._runner.is_here():  # no other thread was quicker
                    self._closer.detach()
                    self._parents = (self._runner, self._client)  # kept: closing would disturb it
                    self._open()
        return self._runner, self._client

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection, which cancels all requests."""
        self._closer()

    @overload
    def generate(
        self, prompt: Prompt, *, n: None = None, details: _No = False, **params: Any
    ) -> str: ...
    @overload
    def generate(
        self, prompt: Prompt, *, n: None = None, details: _Yes, **params: Any
    ) -> Generation: ...
    @overload
    def generate(
        self, prompt: Prompts, *, n: None = None, details: _No = False, **params: Any
    ) -> list[str]: ...
    @overload
    def generate(
        self, prompt: Prompts, *, n: None = None, details: _Yes, **params: Any
    ) -> list[Generation]: ...
    @overload
    def generate(
        self, prompt: Prompt, *, n: int, details: _No = False, **params: Any
    ) -> list[str]: ...
    @overload
    def generate(
        self, prompt: Prompt, *, n: int, details: _Yes, **params: Any
    ) -> list[Generation]: ...
    @overload
    def generate(
        self, prompt: Prompts, *, n: int, details: _No = False, **params: Any
    ) -> list[list[str]]: ...
    @overload
    def generate(
        self, prompt: Prompts, *, n: int, details: _Yes, **params: Any
    ) -> list[list[Generation]]: ...
    def generate(
        self, prompt: Any, *, n: int | None = None, details: bool = False, **params: Any
    ) -> Any:
        """Return the answer or answers; see `AsyncDistributedClient.generate`."""
        runner, client = self._here()
        return runner.run(client.generate(prompt, n=n, details=details, **params))  # type: ignore[call-overload]

    def stream(self, prompt: Prompt, **params: Any) -> Iterator[Chunk]:
        """Return an iterator over the answer; see `AsyncDistributedClient.stream`."""
        runner, client = self._here()
        return self._iterate(runner, client.stream(prompt, **params))

    @overload
    def chat(
        self,
        messages: Messages,
        *,
        tools: Tools | None = None,
        chat_template_kwargs: Arguments | None = None,
        n: None = None,
        details: _No = False,
        **params: Any,
    ) -> str: ...
    @overload
    def chat(
        self,
        messages: Messages,
        *,
        tools: Tools | None = None,
        chat_template_kwargs: Arguments | None = None,
        n: None = None,
        details: _Yes,
        **params: Any,
    ) -> Generation: ...
    @overload
    def chat(
        self,
        messages: Messages,
        *,
        tools: Tools | None = None,
        chat_template_kwargs: Arguments | None = None,
        n: int,
        details: _No = False,
        **params: Any,
    ) -> list[str]: ...
    @overload
    def chat(
        self,
        messages: Messages,
        *,
        tools: Tools | None = None,
        chat_template_kwargs: Arguments | None = None,
        n: int,
        details: _Yes,
        **params: Any,
    ) -> list[Generation]: ...
    def chat(
        self,
        messages: Messages,
        *,
        tools: Tools | None = None,
        chat_template_kwargs: Arguments | None = None,
        n: int | None = None,
        details: bool = False,
        **params: Any,
    ) -> Any:
        """Return the assistant's next message; see `AsyncDistributedClient.chat`."""
        runner, client = self._here()
        template = {"tools": tools, "chat_template_kwargs": chat_template_kwargs}
        answer = client.chat(messages, n=n, details=details, **template, **params)  # type: ignore[call-overload]
        return runner.run(answer)

    def stream_chat(
        self,
        messages: Messages,
        *,
        tools: Tools | None = None,
        chat_template_kwargs: Arguments | None = None,
        **params: Any,
    ) -> Iterator[Chunk]:
        """Return an iterator over the assistant's next message."""
        runner, client = self._here()
        chunks = client.stream_chat(
            messages, tools=tools, chat_template_kwargs=chat_template_kwargs, **params
        )
        return self._iterate(runner, chunks)

    def _iterate(self, runner: LoopThread, chunks: AsyncGenerator[Chunk, None]) -> Iterator[Chunk]:
        # As a generator it references this object, which is not closed before the answer ends.
        yield from runner.iterate(chunks)

    def identity(self) -> Identity:
        """Return who this client is; see `AsyncDistributedClient.identity`."""
        runner, client = self._here()
        return runner.run(client.identity())

    def status(self) -> ClusterStatus:
        """Return the status of the cluster."""
        runner, client = self._here()
        return runner.run(client.status())

    def model(self) -> ModelInfo:
        """Return what is served; see `AsyncDistributedClient.model`."""
        runner, client = self._here()
        return runner.run(client.model())

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> TokenizedPrompt:
        """Return the token ids of a text; see `AsyncDistributedClient.tokenize`."""
        runner, client = self._here()
        return runner.run(client.tokenize(text, add_special_tokens=add_special_tokens))

    def tokenize_chat(
        self,
        messages: Messages,
        *,
        tools: Tools | None = None,
        chat_template_kwargs: Arguments | None = None,
    ) -> TokenizedPrompt:
        """Return the token ids of a conversation; see `AsyncDistributedClient.tokenize_chat`."""
        runner, client = self._here()
        template = {"tools": tools, "chat_template_kwargs": chat_template_kwargs}
        return runner.run(client.tokenize_chat(messages, **template))  # type: ignore[arg-type]

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of token ids; see `AsyncDistributedClient.detokenize`."""
        runner, client = self._here()
        return runner.run(client.detokenize(token_ids, skip_special_tokens=skip_special_tokens))

    @overload
    def embed(self, prompt: Prompt, *, timeout_s: float | None = None) -> Embedding: ...
    @overload
    def embed(self, prompt: Prompts, *, timeout_s: float | None = None) -> list[Embedding]: ...
    def embed(self, prompt: Any, *, timeout_s: float | None = None) -> Any:
        """Return the embedding of a prompt or of each; see `AsyncDistributedClient.embed`."""
        runner, client = self._here()
        return runner.run(client.embed(prompt, timeout_s=timeout_s))

    def drain_worker(self, name: str) -> None:
        """Have a worker end; see `AsyncDistributedClient.drain_worker`."""
        runner, client = self._here()
        runner.run(client.drain_worker(name))

    def members(self) -> ClusterMembers:
        """Return who may connect; see `AsyncDistributedClient.members`."""
        runner, client = self._here()
        return runner.run(client.members())

    def create_token(
        self, role: Role, *, uses: int | None = 1, lifetime_s: float | None = 86_400.0
    ) -> NewToken:
        """Return a new token; see `AsyncDistributedClient.create_token`."""
        runner, client = self._here()
        return runner.run(client.create_token(role, uses=uses, lifetime_s=lifetime_s))

    def revoke_token(self, token_id: str) -> None:
        """Let nobody enrol by a token; see `AsyncDistributedClient.revoke_token`."""
        runner, client = self._here()
        runner.run(client.revoke_token(token_id))

    def remove_machine(self, name: str) -> None:
        """Let a machine connect no more; see `AsyncDistributedClient.remove_machine`."""
        runner, client = self._here()
        runner.run(client.remove_machine(name))

    def readmit_machine(self, name: str) -> None:
        """End a machine's quarantine; see `AsyncDistributedClient.readmit_machine`."""
        runner, client = self._here()
        runner.run(client.readmit_machine(name))


def _close(runner: LoopThread, client: AsyncDistributedClient) -> None:
    if runner.is_here():  # else it is the parent's
        runner.run(client.close())
        runner.stop()
