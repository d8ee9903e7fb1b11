"""What a client sends for each kind of request, and what it makes of the answers."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import numpy as np
import pytest

from distributed_llm.client.prompts import encode_chat, encode_prompt
from distributed_llm.client.requests import Requests
from distributed_llm.client.session import Frames, Question, Reply
from distributed_llm.client.shared_session import SharedSession
from distributed_llm.common.keyring import no_login
from distributed_llm.common.messages import (
    DecodeTokens,
    Embed,
    Embedded,
    EncodePrompt,
    Finished,
    Generate,
    PromptEncoded,
    Timings,
    TokenChunk,
    TokensDecoded,
    Usage,
)
from distributed_llm.common.sampling_params import SamplingParams
from distributed_llm.common.tensors import TensorSpec, frame_of_token_ids, token_ids_of_frame

USAGE = Usage(prompt_tokens=3, completion_tokens=2)
TIMINGS = Timings(queued_s=0.0, first_token_s=0.1, decode_s=0.2, stages=())


class Coordinator(SharedSession):
    """Stands for the session: keeps what it is sent, and answers as it is told."""

    def __init__(self) -> None:
        super().__init__("127.0.0.1:1", no_login, 1.0)
        self.sent: list[tuple[Generate | Question, Frames]] = []
        self.cancelled = 0

    async def get(self) -> "Coordinator":  # type: ignore[override]
        return self

    async def request(
        self, message: Generate | Question, frames: Frames
    ) -> AsyncGenerator[tuple[Reply, Frames], None]:
        self.sent.append((message, frames))
        done = False
        try:
            for reply, tensors in self.replies(message):
                done = not isinstance(reply, TokenChunk)
                yield reply, tensors
        finally:
            self.cancelled += not done

    def replies(self, message: Generate | Question) -> list[tuple[Reply, Frames]]:
        one = message.request_id
        match message:
            case Generate():
                pieces = [("Hi", (5,), None), (" you", (6,), "length")]
                chunks = [
                    TokenChunk(
                        request_id=one,
                        choice=choice,
                        index=at,
                        text=text,
                        token_ids=ids,
                        finish_reason=why,  # type: ignore[arg-type]
                    )
                    for at, (text, ids, why) in enumerate(pieces)
                    for choice in range(message.params.n)
                ]
                finished = Finished(request_id=one, usage=USAGE, timings=TIMINGS)
                return [*((chunk, ()) for chunk in chunks), (finished, ())]
            case Embed():
                spec = TensorSpec("float32", (2,))
                vector = np.array([0.5, -2.0], dtype="<f4").tobytes()
                return [(Embedded(request_id=one, usage=USAGE, tensors=(spec,)), (vector,))]
            case EncodePrompt():
                spec, frame = frame_of_token_ids([7, 8])
                return [(PromptEncoded(request_id=one, tensors=(spec,)), (frame,))]
            case DecodeTokens() if message.tensors:
                spec = TensorSpec("uint8", (3,))
                return [(TokensDecoded(request_id=one, tensors=(spec,)), ("é!".encode(),))]
            case DecodeTokens():
                return [(TokensDecoded(request_id=one, tensors=()), ())]


def test_all_answers_to_a_prompt_come_as_a_whole() -> None:
    async def main() -> None:
        coordinator = Coordinator()
        sampling = SamplingParams(n=2, max_new_tokens=2)
        answers = await Requests(coordinator).complete(encode_prompt([1, 2, 3]), sampling)
        assert [(one.choice, one.text, one.token_ids) for one in answers] == [
            (0, "Hi you", [5, 6]),
            (1, "Hi you", [5, 6]),
        ]
        ((message, frames),) = coordinator.sent
        assert isinstance(message, Generate)
        assert (message.prompt, message.params) == ("token_ids", sampling)
        assert token_ids_of_frame(frames[0]) == [1, 2, 3]
        assert coordinator.cancelled == 0

    asyncio.run(main())


def test_a_stream_that_is_closed_cancels_its_request() -> None:
    async def main() -> None:
        coordinator = Coordinator()
        stream = Requests(coordinator).stream(encode_prompt("Hi"), SamplingParams())
        async with aclosing(stream) as chunks:
            assert (await anext(chunks)).text == "Hi"
            assert coordinator.cancelled == 0
        assert coordinator.cancelled == 1

    asyncio.run(main())


def test_requests_have_ids_of_their_own() -> None:
    async def main() -> None:
        coordinator = Coordinator()
        requests = Requests(coordinator)
        for _ in range(2):
            await requests.complete(encode_prompt("Hi"), SamplingParams())
            await requests.embed(encode_prompt("Hi"), None)
        assert len({message.request_id for message, _ in coordinator.sent}) == 4

    asyncio.run(main())


def test_an_embedding_is_a_vector_with_what_it_took() -> None:
    async def main() -> None:
        coordinator = Coordinator()
        found = await Requests(coordinator).embed(encode_prompt("Hi"), 5.0)
        assert found.vector.tolist() == [0.5, -2.0]
        assert found.usage == USAGE
        ((message, _),) = coordinator.sent
        assert isinstance(message, Embed)
        assert (message.prompt, message.timeout_s) == ("text", 5.0)

    asyncio.run(main())


@pytest.mark.parametrize("special", [True, False])
def test_texts_and_conversations_become_token_ids(special: bool) -> None:
    async def main() -> None:
        coordinator = Coordinator()
        requests = Requests(coordinator)
        for prompt in (encode_prompt("Hi"), encode_chat([{"role": "user", "content": "Hi"}])):
            found = await requests.tokenize(prompt, add_special_tokens=special)
            assert found.token_ids == [7, 8]
            message, frames = coordinator.sent[-1]
            assert isinstance(message, EncodePrompt)
            assert (message.prompt, message.add_special_tokens) == (prompt.kind, special)
            assert frames == prompt.frames

    asyncio.run(main())


def test_token_ids_become_text_and_none_become_none() -> None:
    async def main() -> None:
        coordinator = Coordinator()
        requests = Requests(coordinator)
        assert await requests.detokenize([9, 10], skip_special_tokens=True) == "é!"
        message, frames = coordinator.sent[-1]
        assert isinstance(message, DecodeTokens)
        assert message.skip_special_tokens
        assert token_ids_of_frame(frames[0]) == [9, 10]
        assert await requests.detokenize([], skip_special_tokens=False) == ""
        assert coordinator.sent[-1][1] == ()

    asyncio.run(main())
