"""The requests of a client as messages: what is sent for each, and what is made of the answers."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import numpy as np

from distributed_llm.client.answers import Answers, Chunk, Generation
from distributed_llm.client.prompts import EncodedPrompt, encode_token_ids
from distributed_llm.client.session import Frames, Question, Reply, new_request_id
from distributed_llm.client.shared_session import SharedSession
from distributed_llm.client.values import Embedding, TokenizedPrompt
from distributed_llm.common.messages import (
    DecodeTokens,
    Embed,
    Embedded,
    EncodePrompt,
    Finished,
    Generate,
    TokenChunk,
)
from distributed_llm.common.sampling_params import SamplingParams
from distributed_llm.common.tensors import token_ids_of_frame


class Requests:
    """Sends requests and reads their answers; any number may be under way.

    All methods raise what the coordinator answers, and what `SharedSession.get` raises.

    Args:
        session: over which they are sent.
    """

    def __init__(self, session: SharedSession) -> None:
        self._session = session

    async def complete(self, prompt: EncodedPrompt, sampling: SamplingParams) -> list[Generation]:
        """Return the `n` answers to a prompt, by choice."""
        async with aclosing(self.stream(prompt, sampling)) as chunks:
            return [chunk.generation async for chunk in chunks if chunk.generation]

    async def stream(
        self, prompt: EncodedPrompt, sampling: SamplingParams
    ) -> AsyncGenerator[Chunk, None]:
        """Yield the answers to a prompt as they are generated, and then each as a whole.

        Closing the iterator cancels the request.
        """
        session = await self._session.get()
        message = Generate(
            request_id=new_request_id(),
            prompt=prompt.kind,
            params=sampling,
            tensors=prompt.specs,
            grammar=prompt.grammar,
        )
        answers = Answers(message.request_id, sampling)
        async with aclosing(session.request(message, prompt.frames)) as replies:
            async for reply, _ in replies:
                if isinstance(reply, TokenChunk):
                    yield answers.add(reply)
                    continue
                assert isinstance(reply, Finished)
                for generation in answers.finish(reply):
                    yield Chunk("", [], generation.choice, generation=generation)

    async def embed(self, prompt: EncodedPrompt, timeout_s: float | None) -> Embedding:
        """Return the embedding of a text or of token ids."""
        assert prompt.kind != "chat"
        message = Embed(
            request_id=new_request_id(),
            prompt=prompt.kind,
            timeout_s=timeout_s,
            tensors=prompt.specs,
        )
        answer, (vector,) = await self._ask(message, prompt.frames)
        assert isinstance(answer, Embedded)
        return Embedding(np.frombuffer(bytes(vector), dtype="<f4"), answer.usage)

    async def tokenize(self, prompt: EncodedPrompt, *, add_special_tokens: bool) -> TokenizedPrompt:
        """Return the token ids of a text or a conversation."""
        assert prompt.kind != "token_ids"
        message = EncodePrompt(
            request_id=new_request_id(),
            prompt=prompt.kind,
            add_special_tokens=add_special_tokens,
            tensors=prompt.specs,
        )
        _, tensors = await self._ask(message, prompt.frames)
        (token_ids,) = tensors or (b"",)
        return TokenizedPrompt(token_ids_of_frame(token_ids))

    async def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Return the text of token ids."""
        specs, frames = encode_token_ids(token_ids)
        message = DecodeTokens(
            request_id=new_request_id(), skip_special_tokens=skip_special_tokens, tensors=specs
        )
        _, tensors = await self._ask(message, frames)
        (text,) = tensors or (b"",)
        return bytes(text).decode()

    async def _ask(self, message: Question, frames: Frames) -> tuple[Reply, Frames]:
        """Return the answer to a question, and its tensors."""
        session = await self._session.get()
        async with aclosing(session.request(message, frames)) as replies:
            return await anext(replies)
