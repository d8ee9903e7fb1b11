"""Answers to several prompts at once, mixed as they come."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from distributed_llm.client.answers import Chunk
from distributed_llm.client.batch import Pace, ask_all

_GIVE_UP_AFTER_S = 10.0
"""Time for which a prompt is sent again while the coordinator's queue is full, seconds."""


class StreamClient(Protocol):
    """What prompts are asked of; an `AsyncDistributedClient`."""

    def stream(self, prompt: str | list[int], **params: Any) -> AsyncGenerator[Chunk, None]:
        """Return an iterator over the answer as it is generated."""


async def answer_all(
    client: StreamClient, prompts: Sequence[str | list[int]], params: Mapping[str, Any], n: int
) -> AsyncGenerator[tuple[int, Chunk], None]:
    """Yield chunks of the answers to all prompts, with the prompts' numbers. Closing cancels all.

    Of many prompts, a part is under way at a time.

    Args:
        params: arguments of `SamplingParams`.
        n: answers to each prompt.

    Raises:
        DistributedLLMError: one cannot be answered; the others are cancelled then.
    """
    if len(prompts) == 1:
        async with aclosing(client.stream(prompts[0], **params)) as chunks:
            async for chunk in chunks:
                yield 0, chunk
        return
    pieces: asyncio.Queue[tuple[int, Chunk] | None] = asyncio.Queue()

    async def ask(number: int) -> None:
        async with aclosing(client.stream(prompts[number], **params)) as chunks:
            async for chunk in chunks:
                pieces.put_nowait((number, chunk))

    numbers = range(len(prompts))
    asking = asyncio.ensure_future(
        ask_all(ask, numbers, Pace(n), give_up_after_s=_GIVE_UP_AFTER_S, progress=None)
    )
    asking.add_done_callback(lambda _: pieces.put_nowait(None))
    try:
        while (piece := await pieces.get()) is not None:
            yield piece
        asking.result()
    finally:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
