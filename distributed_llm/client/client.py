"""The clients: `AsyncDistributedClient`, and `DistributedClient`, its thin face without asyncio.

client = DistributedClient(coordinator_address="192.168.1.100:5555")
client.generate("Once upon a time", max_new_tokens=20)
"""

import asyncio
import weakref
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, overload

import msgspec

from distributed_llm.client.loop_thread import LoopThread
from distributed_llm.client.session import Session, new_request_id
from distributed_llm.common.codec import encode_payload
from distributed_llm.common.errors import DistributedLLMError, InvalidRequest
from distributed_llm.common.messages import (
    ChatMessage,
    ClusterStatus,
    Finished,
    FinishReason,
    Generate,
    Timings,
    TokenChunk,
    Usage,
)
from distributed_llm.common.sampling_params import SamplingParams
from distributed_llm.common.tensors import (
    MAX_FRAME_BYTES,
    Frame,
    TensorSpec,
    frame_of_bytes,
    frame_of_token_ids,
)
from distributed_llm.common.units import split_address

Prompt = str | list[int]
"""Text, or token ids."""

Messages = Sequence[Mapping[str, str]]
"""A conversation: `[{"role": "user", "content": "Hi"}]`."""

T = TypeVar("T")


@dataclass(frozen=True)
class Generation:
    """A complete answer.

    Attributes:
        text: without special tokens, ended before a stop string.
        token_ids: of the answer alone.
        finish_reason: "stop" (end-of-sequence token or stop string) or "length".
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    request_id: str


@dataclass(frozen=True)
class Chunk:
    """The next piece of an answer.

    Attributes:
        text: complete characters; empty while one is unfinished.
        token_ids: the tokens that were generated since the last chunk.
        generation: the whole answer, with the last chunk only.
    """

    text: str
    token_ids: list[int]
    generation: Generation | None = None


class AsyncDistributedClient:
    """Talks to one coordinator; all requests share a connection.

    It connects with the first call, and again with the first call after the connection was lost.

    Args:
        coordinator_address: "HOST:PORT".
        connect_timeout_s: after which an address without a coordinator is given up.

    Raises:
        InvalidRequest: the address is none.
    """

    def __init__(
        self, coordinator_address: str = "127.0.0.1:5555", *, connect_timeout_s: float = 5.0
    ) -> None:
        try:
            split_address(coordinator_address)
        except ValueError as exc:
            raise InvalidRequest(f"{coordinator_address!r} is no address: {exc}.") from exc
        self._address = coordinator_address
        self._connect_timeout_s = connect_timeout_s
        self._session: Session | None = None
        self._connecting = asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; requests under way are cancelled."""
        if self._session:
            self._session.close()
            self._session = None

    @overload
    async def generate(
        self, prompt: Prompt, *, details: Literal[False] = False, **params: Any
    ) -> str: ...
    @overload
    async def generate(
        self, prompt: Prompt, *, details: Literal[True], **params: Any
    ) -> Generation: ...
    @overload
    async def generate(
        self,
        prompt: list[str] | list[list[int]],
        *,
        details: Literal[False] = False,
        **params: Any,
    ) -> list[str]: ...
    @overload
    async def generate(
        self, prompt: list[str] | list[list[int]], *, details: Literal[True], **params: Any
    ) -> list[Generation]: ...
    async def generate(
        self,
        prompt: Prompt | list[str] | list[list[int]],
        *,
        details: bool = False,
        **params: Any,
    ) -> str | Generation | list[str] | list[Generation]:
        """Return the answer to a prompt, or the answers to a list of prompts, in their order.

        Args:
            prompt: text, token ids, or a list of either.
            details: return `Generation` rather than text.
            params: fields of `SamplingParams`.

        Raises:
            InvalidRequest: a prompt or parameter is wrong.
            CapacityError: the cluster cannot do it now.
            ConnectionFailed: there is no coordinator, or it was lost.
        """
        sampling = SamplingParams.from_arguments(params)
        many = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
        prompts: list[Any] = list(prompt) if many else [prompt]
        if not many:
            generation = await self._complete(*_prompt(prompt), sampling)
            return generation if details else generation.text
        encoded = [_prompt(one) for one in prompts]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._complete(kind, payload, sampling))
                    for kind, payload in encoded
                ]
        except* DistributedLLMError as errors:
            raise _first(errors) from None
        generations = [task.result() for task in tasks]
        return generations if details else [generation.text for generation in generations]

    def stream(self, prompt: Prompt, **params: Any) -> AsyncGenerator[Chunk, None]:
        """Return an iterator over the answer as it is generated; closing it cancels the request.

        Args and errors are those of `generate`.
        """
        return self._stream(*_prompt(prompt), SamplingParams.from_arguments(params))

    @overload
    async def chat(
        self, messages: Messages, *, details: Literal[False] = False, **params: Any
    ) -> str: ...
    @overload
    async def chat(
        self, messages: Messages, *, details: Literal[True], **params: Any
    ) -> Generation: ...
    async def chat(
        self, messages: Messages, *, details: bool = False, **params: Any
    ) -> str | Generation:
        """Return the assistant's next message, by the checkpoint's chat template.

        Args:
            messages: `[{"role": "user", "content": "Hi"}]`.
            details: return `Generation` rather than text.
            params: fields of `SamplingParams`.

        Raises:
            InvalidRequest: also if the model has no chat template. Otherwise as `generate`.
        """
        sampling = SamplingParams.from_arguments(params)
        generation = await self._complete("chat", _chat(messages), sampling)
        return generation if details else generation.text

    def stream_chat(self, messages: Messages, **params: Any) -> AsyncGenerator[Chunk, None]:
        """Return an iterator over the assistant's next message; see `stream` and `chat`."""
        return self._stream("chat", _chat(messages), SamplingParams.from_arguments(params))

    async def status(self) -> ClusterStatus:
        """Return the cluster as the coordinator sees it.

        Raises:
            ConnectionFailed: there is no coordinator, or it was lost.
        """
        session = await self._connected()
        return await session.status(self._connect_timeout_s)

    async def _connected(self) -> Session:
        async with self._connecting:
            if self._session and self._session.error:
                self._session.close()
                self._session = None
            if self._session is None:
                self._session = await Session.open(self._address, self._connect_timeout_s)
            return self._session

    async def _complete(
        self, kind: "_PromptKind", payload: "_Payload", sampling: SamplingParams
    ) -> Generation:
        async with aclosing(self._stream(kind, payload, sampling)) as chunks:
            async for chunk in chunks:
                if chunk.generation:
                    return chunk.generation
        raise AssertionError("a stream ended without its generation")

    async def _stream(
        self, kind: "_PromptKind", payload: "_Payload", sampling: SamplingParams
    ) -> AsyncGenerator[Chunk, None]:
        session = await self._connected()
        specs, frames = payload
        message = Generate(request_id=new_request_id(), prompt=kind, params=sampling, tensors=specs)
        texts: list[str] = []
        token_ids: list[int] = []
        async with aclosing(session.request(message, frames)) as answers:  # type: ignore[type-var]
            async for answer in answers:
                if isinstance(answer, TokenChunk):
                    texts.append(answer.text)
                    token_ids += answer.token_ids
                    yield Chunk(answer.text, list(answer.token_ids))
                elif isinstance(answer, Finished):
                    generation = Generation(
                        text="".join(texts),
                        token_ids=token_ids,
                        finish_reason=answer.finish_reason,
                        usage=answer.usage,
                        timings=answer.timings,
                        request_id=message.request_id,
                    )
                    yield Chunk("", [], generation)


class DistributedClient:
    """`AsyncDistributedClient` for programs without asyncio; safe to use from many threads.

    Args:
        coordinator_address: "HOST:PORT".
        connect_timeout_s: after which an address without a coordinator is given up.
    """

    def __init__(
        self, coordinator_address: str = "127.0.0.1:5555", *, connect_timeout_s: float = 5.0
    ) -> None:
        self._client = AsyncDistributedClient(
            coordinator_address, connect_timeout_s=connect_timeout_s
        )
        self._runner = LoopThread()
        self._closer = weakref.finalize(self, _close, self._runner, self._client)

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
        """Close the connection; requests under way are cancelled."""
        self._closer()

    @overload
    def generate(
        self, prompt: Prompt, *, details: Literal[False] = False, **params: Any
    ) -> str: ...
    @overload
    def generate(self, prompt: Prompt, *, details: Literal[True], **params: Any) -> Generation: ...
    @overload
    def generate(
        self,
        prompt: list[str] | list[list[int]],
        *,
        details: Literal[False] = False,
        **params: Any,
    ) -> list[str]: ...
    @overload
    def generate(
        self, prompt: list[str] | list[list[int]], *, details: Literal[True], **params: Any
    ) -> list[Generation]: ...
    def generate(
        self,
        prompt: Any,
        *,
        details: bool = False,
        **params: Any,
    ) -> Any:
        """Return the answer or answers; see `AsyncDistributedClient.generate`."""
        return self._runner.run(self._client.generate(prompt, details=details, **params))  # type: ignore[call-overload]

    def stream(self, prompt: Prompt, **params: Any) -> Iterator[Chunk]:
        """Return an iterator over the answer as it is generated; closing it cancels the request."""
        return self._runner.iterate(self._client.stream(prompt, **params))

    @overload
    def chat(
        self, messages: Messages, *, details: Literal[False] = False, **params: Any
    ) -> str: ...
    @overload
    def chat(self, messages: Messages, *, details: Literal[True], **params: Any) -> Generation: ...
    def chat(self, messages: Messages, *, details: bool = False, **params: Any) -> str | Generation:
        """Return the assistant's next message; see `AsyncDistributedClient.chat`."""
        return self._runner.run(self._client.chat(messages, details=details, **params))  # type: ignore[call-overload,no-any-return]

    def stream_chat(self, messages: Messages, **params: Any) -> Iterator[Chunk]:
        """Return an iterator over the assistant's next message."""
        return self._runner.iterate(self._client.stream_chat(messages, **params))

    def status(self) -> ClusterStatus:
        """Return the cluster as the coordinator sees it."""
        return self._runner.run(self._client.status())


_PromptKind = Literal["text", "token_ids", "chat"]
_Payload = tuple[tuple[TensorSpec, ...], tuple[Frame, ...]]


def _close(runner: LoopThread, client: AsyncDistributedClient) -> None:
    runner.run(client.close())
    runner.stop()


def _prompt(prompt: Any) -> tuple[_PromptKind, _Payload]:
    if isinstance(prompt, str):
        try:
            return "text", _payload(prompt.encode())
        except UnicodeEncodeError as exc:
            raise InvalidRequest(f"The prompt is not valid Unicode: {exc}.") from exc
    if isinstance(prompt, Sequence) and all(type(token) is int for token in prompt):
        if any(not 0 <= token < 2**31 for token in prompt):
            raise InvalidRequest("Token ids of a prompt must be at least 0 and below 2^31.")
        if not prompt:
            raise InvalidRequest("The prompt is empty. Give at least one token.")
        spec, frame = frame_of_token_ids(prompt)
        return "token_ids", ((spec,), (frame,))
    raise InvalidRequest(
        f"A prompt is text or a list of token ids, not {type(prompt).__name__} {prompt!r:.60}."
    )


def _chat(messages: Messages) -> _Payload:
    try:
        turns = msgspec.convert(list(messages), list[ChatMessage])
    except (msgspec.ValidationError, TypeError) as exc:
        raise InvalidRequest(
            f"Bad messages: {exc}. Give a list of "
            '{"role": "system" | "user" | "assistant" | "tool", "content": "text"}.'
        ) from exc
    return _payload(encode_payload(turns))


def _payload(data: bytes) -> _Payload:
    if len(data) > MAX_FRAME_BYTES:
        raise InvalidRequest(f"The prompt has {len(data)} bytes; {MAX_FRAME_BYTES} are allowed.")
    if not data:
        return (), ()
    spec, frame = frame_of_bytes(data)
    return (spec,), (frame,)


def _first(errors: BaseExceptionGroup[DistributedLLMError]) -> DistributedLLMError:
    inner = errors.exceptions[0]
    return _first(inner) if isinstance(inner, BaseExceptionGroup) else inner
