"""The client: generates, chats, and asks the coordinator whatever it may be asked."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self, overload

import msgspec

from distributed_llm.client.answers import Chunk, Generation
from distributed_llm.client.batch import Pace, Progress, ask_all
from distributed_llm.client.prompts import (
    Arguments,
    Messages,
    Prompt,
    Prompts,
    Tools,
    are_several,
    encode_chat,
    encode_prompt,
)
from distributed_llm.client.requests import Requests
from distributed_llm.client.shared_session import SharedSession
from distributed_llm.client.values import Embedding, Identity, NewToken, TokenizedPrompt
from distributed_llm.common.errors import InvalidRequest
from distributed_llm.common.grammar import Grammar
from distributed_llm.common.join_line import JoinLine
from distributed_llm.common.keyring import FindLogin, find_login, key_of_text, no_login
from distributed_llm.common.keys import token_id
from distributed_llm.common.messages import (
    ClusterMembers,
    ClusterStatus,
    CreateToken,
    GetMembers,
    ModelInfo,
    Name,
    ReadmitMachine,
    RemoveMachine,
    RevokeToken,
)
from distributed_llm.common.roles import Role
from distributed_llm.common.sampling_params import SamplingParams
from distributed_llm.common.transport import Login, new_key_pair
from distributed_llm.common.units import split_address

_No = Literal[False]
_Yes = Literal[True]


class AsyncDistributedClient:
    """A client of one coordinator; all its requests share a connection.

    The first call connects, and so does the first call after the connection was lost.

    Args:
        coordinator_address: "HOST:PORT".
        key: for that coordinator; None is that in the key file of this machine, else `DLLM_KEY`.
        insecure: use no keys; for a coordinator that was started with --insecure.
        connect_timeout_s: how long to wait for a coordinator to answer at the address.

    Raises:
        InvalidRequest: the address is not "HOST:PORT".
        ConfigError: `key` is none.
    """

    requests_type = Requests
    """What sends its requests."""

    def __init__(
        self,
        coordinator_address: str = "127.0.0.1:5555",
        *,
        key: str | None = None,
        insecure: bool = False,
        connect_timeout_s: float = 5.0,
    ) -> None:
        try:
            split_address(coordinator_address)
        except ValueError as exc:
            raise InvalidRequest(f"{coordinator_address!r} is no address: {exc}.") from exc
        self._address = coordinator_address
        self._timeout_s = connect_timeout_s
        self._session = SharedSession(
            coordinator_address, _finder(key, insecure), connect_timeout_s
        )
        self._requests = self.requests_type(self._session)

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
        """Close the connection, which cancels all requests."""
        self._session.close()

    @overload
    async def generate(
        self, prompt: Prompt, *, n: None = None, details: _No = False, **params: Any
    ) -> str: ...
    @overload
    async def generate(
        self, prompt: Prompt, *, n: None = None, details: _Yes, **params: Any
    ) -> Generation: ...
    @overload
    async def generate(
        self, prompt: Prompts, *, n: None = None, details: _No = False, **params: Any
    ) -> list[str]: ...
    @overload
    async def generate(
        self, prompt: Prompts, *, n: None = None, details: _Yes, **params: Any
    ) -> list[Generation]: ...
    @overload
    async def generate(
        self, prompt: Prompt, *, n: int, details: _No = False, **params: Any
    ) -> list[str]: ...
    @overload
    async def generate(
        self, prompt: Prompt, *, n: int, details: _Yes, **params: Any
    ) -> list[Generation]: ...
    @overload
    async def generate(
        self, prompt: Prompts, *, n: int, details: _No = False, **params: Any
    ) -> list[list[str]]: ...
    @overload
    async def generate(
        self, prompt: Prompts, *, n: int, details: _Yes, **params: Any
    ) -> list[list[Generation]]: ...
    async def generate(
        self,
        prompt: Prompt | Prompts,
        *,
        n: int | None = None,
        details: bool = False,
        progress: Progress | None = None,
        grammar: Grammar | None = None,
        **params: Any,
    ) -> Any:
        """Return the answer to a prompt, or the answers to a list of prompts, in their order.

        Of a long list, a part is under way at a time. A prompt of a list that is refused because
        the coordinator's queue is full is sent again when the coordinator says, until its
        `timeout_s` is over.

        Args:
            prompt: text, token ids, or a list of either; an empty list gives an empty list.
            n: number of answers to each prompt. If given, even as 1, a list of `n` answers takes
                the place of each single answer.
            details: return `Generation` instead of text.
            progress: called after each prompt with the number of those that are answered and the
                number of all, on the thread of the event loop.
            grammar: what the answers have to look like.
            params: other fields of `SamplingParams`.

        Raises:
            InvalidRequest: a prompt or parameter is wrong.
            CapacityError: the cluster cannot do it now.
            DeadlineExceeded: it was not done within `timeout_s`.
            ConnectionFailed: there is no coordinator, or it was lost.
        """
        sampling = SamplingParams.from_arguments({"n": n, **params})
        if not are_several(prompt):
            generations = await self._requests.complete(encode_prompt(prompt, grammar), sampling)
            if progress:
                progress(1, 1)
            return _answers(generations, n, details)
        every = await ask_all(
            lambda one: self._requests.complete(one, sampling),
            [encode_prompt(one, grammar) for one in prompt],
            Pace(sampling.n),
            give_up_after_s=sampling.timeout_s,
            progress=progress,
        )
        return [_answers(generations, n, details) for generations in every]

    def stream(
        self, prompt: Prompt, *, grammar: Grammar | None = None, **params: Any
    ) -> AsyncGenerator[Chunk, None]:
        """Return an iterator over the answer as it is generated; closing it cancels the request.

        With `n`, chunks of all answers are mixed; `choice` says which answer a chunk is part of.

        Args:
            prompt: text or token ids.
            grammar: what the answers have to look like.
            params: fields of `SamplingParams`.

        Raises:
            DistributedLLMError: as `generate` does; a wrong prompt or parameter is told at once,
                the rest as the chunks are read.
        """
        encoded = encode_prompt(prompt, grammar)
        return self._requests.stream(encoded, SamplingParams.from_arguments(params))

    @overload
    async def chat(
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
    async def chat(
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
    async def chat(
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
    async def chat(
        self,
        messages: Messages,
        *,
        tools: Tools | None = None,
        chat_template_kwargs: Arguments | None = None,
        n: int,
        details: _Yes,
        **params: Any,
    ) -> list[Generation]: ...
    async def chat(
        self,
        messages: Messages,
        *,
        tools: Tools | None = None,
        chat_template_kwargs: Arguments | None = None,
        n: int | None = None,
        details: bool = False,
        grammar: Grammar | None = None,
        **params: Any,
    ) -> Any:
        """Return the assistant's next message, by the checkpoint's chat template.

        Args:
            messages: `[{"role": "user", "content": "Hi"}]`. A message may also have what OpenAI's
                have: content in parts (texts only), name, tool_calls, tool_call_id.
            tools: JSON schemas of functions that the assistant may call; its calls come as text, as
                the model writes them.
            chat_template_kwargs: further arguments of the template: `{"enable_thinking": False}`.
            n: number of answers. If given, even as 1, a list of `n` answers is returned.
            details: return `Generation` instead of text.
            grammar: what the answers have to look like.
            params: other fields of `SamplingParams`.

        Raises:
            InvalidRequest: also if the model has no chat template, or one that does not know the
                tools or arguments. Otherwise as `generate`.
        """
        sampling = _chat_params({"n": n, **params})
        prompt = encode_chat(messages, tools, chat_template_kwargs, grammar)
        return _answers(await self._requests.complete(prompt, sampling), n, details)

    def stream_chat(
        self,
        messages: Messages,
        *,
        tools: Tools | None = None,
        chat_template_kwargs: Arguments | None = None,
        grammar: Grammar | None = None,
        **params: Any,
    ) -> AsyncGenerator[Chunk, None]:
        """Return an iterator over the assistant's next message; see `stream` and `chat`."""
        prompt = encode_chat(messages, tools, chat_template_kwargs, grammar)
        return self._requests.stream(prompt, _chat_params(params))

    async def identity(self) -> Identity:
        """Return who this client is to the coordinator.

        Raises:
            NotAllowed: the coordinator does not know its key.
            ConnectionFailed: the coordinator cannot be reached, or was lost.
        """
        welcome = (await self._session.get()).welcome
        return Identity(welcome.name, welcome.role, welcome.model)

    async def status(self) -> ClusterStatus:
        """Return the status of the cluster.

        Raises:
            ConnectionFailed: the coordinator cannot be reached, or was lost.
        """
        session = await self._session.get()
        return await session.status(self._timeout_s)

    async def model(self) -> ModelInfo:
        """Return what is served: sizes, special tokens, the chat template.

        Raises:
            ConnectionFailed: the coordinator cannot be reached, or was lost.
        """
        session = await self._session.get()
        return await session.model(self._timeout_s)

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> TokenizedPrompt:
        """Return the token ids of a text, as a prompt of `generate` has them.

        Args:
            text: of any length that is not certainly far too long for the model.
            add_special_tokens: with those by which the model's prompts start or end.

        Raises:
            InvalidRequest: the text is too long, or the model has no tokenizer.
            Overloaded: too many such questions wait.
            TextError: the coordinator's text process has died over it.
            ConnectionFailed: there is no coordinator, or it was lost.
        """
        if not isinstance(text, str):
            raise InvalidRequest(f"Only text has token ids, not {type(text).__name__}.")
        return await self._requests.tokenize(
            encode_prompt(text), add_special_tokens=add_special_tokens
        )

    async def tokenize_chat(
        self,
        messages: Messages,
        *,
        tools: Tools | None = None,
        chat_template_kwargs: Arguments | None = None,
    ) -> TokenizedPrompt:
        """Return the token ids of a conversation, as a prompt of `chat` has them.

        Raises:
            InvalidRequest: also if the model has no chat template, or one that does not know the
                tools or arguments. Otherwise as `tokenize`.
        """
        prompt = encode_chat(messages, tools, chat_template_kwargs)
        return await self._requests.tokenize(prompt, add_special_tokens=True)

    async def detokenize(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = False
    ) -> str:
        """Return the text of token ids; those that the tokenizer does not know have none.

        Raises:
            InvalidRequest: they are no token ids, too many, or the model has no tokenizer.
                Otherwise as `tokenize`.
        """
        return await self._requests.detokenize(token_ids, skip_special_tokens=skip_special_tokens)

    @overload
    async def embed(self, prompt: Prompt, *, timeout_s: float | None = None) -> Embedding: ...
    @overload
    async def embed(
        self, prompt: Prompts, *, timeout_s: float | None = None
    ) -> list[Embedding]: ...
    async def embed(self, prompt: Prompt | Prompts, *, timeout_s: float | None = None) -> Any:
        """Return the embedding of a prompt, or those of a list of prompts, in their order.

        That is the mean of the model's last hidden states, after its final norm, over all
        positions of the prompt, special tokens included. It is not normalised.

        Args:
            prompt: text, token ids, or a list of either.
            timeout_s: time from the arrival of each prompt after which it fails.

        Raises:
            InvalidRequest: a prompt is wrong, or the model has no embeddings.
            CapacityError: the cluster cannot do it now.
            DeadlineExceeded: it was not done within `timeout_s`.
            ConnectionFailed: there is no coordinator, or it was lost.
        """
        SamplingParams.from_arguments({"timeout_s": timeout_s})
        if not are_several(prompt):
            return await self._requests.embed(encode_prompt(prompt), timeout_s)
        return await ask_all(
            lambda one: self._requests.embed(one, timeout_s),
            [encode_prompt(one) for one in prompt],
            Pace(1),
            give_up_after_s=timeout_s,
            progress=None,
        )

    async def drain_worker(self, name: str) -> None:
        """Have a worker end once other workers have its layers, while requests run.

        Returns when the worker has ended, however long that takes. Cancelling this call does not
        stop the worker from ending. In float32 no token of the requests changes; in bfloat16 and
        float16 one may now and then, by rounding.

        Args:
            name: the worker's name, as `status` shows it.

        Raises:
            InvalidRequest: there is no such worker.
            NotEnoughMemory: the others cannot hold its layers; it stays.
            ConnectionFailed: there is no coordinator, or it was lost.
        """
        try:
            msgspec.convert(name, Name)
        except msgspec.ValidationError as exc:
            raise InvalidRequest(
                f"{name!r:.100} is no worker's name. `dllm status` shows the names."
            ) from exc
        session = await self._session.get()
        await session.drain(name)

    async def members(self) -> ClusterMembers:
        """Return the machines that may connect, and the tokens by which others may enrol.

        Raises:
            NotAllowed: this machine is no admin.
            ConnectionFailed: there is no coordinator, or it was lost.
        """
        return await self._administer(GetMembers())

    async def create_token(
        self, role: Role, *, uses: int | None = 1, lifetime_s: float | None = 86_400.0
    ) -> NewToken:
        """Return a new token by which machines enrol.

        Args:
            role: what they may do.
            uses: machines that may enrol by it; None for any number.
            lifetime_s: time for which they may, seconds; None for ever.

        Raises:
            NotAllowed: this machine is no admin.
            InvalidRequest: there are too many tokens.
            ConnectionFailed: there is no coordinator, or it was lost.
        """
        keys = new_key_pair()  # the coordinator gets the public half only
        members = await self._administer(
            CreateToken(key=keys.public, role=role, uses=uses, lifetime_s=lifetime_s)
        )
        session = await self._session.get()
        assert session.server is not None
        address = (*members.addresses, self._address)[0]
        line = str(JoinLine(address, session.server, keys.secret))
        return NewToken(line, token_id(keys.public), members.addresses)

    async def revoke_token(self, token_id: str) -> None:
        """Let nobody enrol by a token any more; machines that did stay.

        Raises:
            NotAllowed: this machine is no admin.
            InvalidRequest: there is no such token.
            ConnectionFailed: there is no coordinator, or it was lost.
        """
        await self._administer(RevokeToken(token_id=token_id[:256]))

    async def remove_machine(self, name: str) -> None:
        """Let a machine connect no more; its sessions end at once.

        Raises:
            NotAllowed: this machine is no admin.
            InvalidRequest: there is no such machine.
            ConnectionFailed: there is no coordinator, or it was lost.
        """
        await self._administer(RemoveMachine(name=name[:256]))

    async def readmit_machine(self, name: str) -> None:
        """Let a machine connect again that is quarantined, for it broke the protocol.

        Raises:
            NotAllowed: this machine is no admin.
            InvalidRequest: there is no such machine, or it is not quarantined.
            ConnectionFailed: there is no coordinator, or it was lost.
        """
        await self._administer(ReadmitMachine(name=name[:256]))

    async def _administer(
        self, message: GetMembers | CreateToken | RevokeToken | RemoveMachine | ReadmitMachine
    ) -> ClusterMembers:
        session = await self._session.get()
        return await session.administer(message, self._timeout_s)


def _finder(key: str | None, insecure: bool) -> FindLogin:
    """Return what finds the keys for a coordinator."""
    if insecure:
        return no_login
    if key is None:
        return find_login
    login = key_of_text(key)

    async def given(address: str, give_up_at: float | None) -> Login:
        return login

    return given


def _chat_params(params: Mapping[str, Any]) -> SamplingParams:
    """Return the parameters; say where to put those that are meant for the chat template."""
    try:
        return SamplingParams.from_arguments(params)
    except InvalidRequest as exc:
        if params.keys() <= set(SamplingParams.__struct_fields__):
            raise
        raise InvalidRequest(
            f"{exc} Arguments of the chat template go into chat_template_kwargs."
        ) from None


def _answers(
    generations: Sequence[Generation], n: int | None, details: bool
) -> str | Generation | list[str] | list[Generation]:
    """Return the answers to one prompt: one or a list, texts or `Generation`."""
    if details:
        return generations[0] if n is None else list(generations)
    texts = [generation.text for generation in generations]
    return texts[0] if n is None else texts
